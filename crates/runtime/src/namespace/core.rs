//! What the parts of the driver share.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};

use nagaya_api::ids::SessionId;
use nagaya_engine::ports::{DriverError, Ended};
use tokio::sync::{Notify, mpsc};

use super::running::RunningSandbox;
use super::slots::{Factory, PreparedSlot, SlotPool};
use crate::host::record::Record;
use crate::host::volumes::Sandbox;
use crate::host::{Host, failed};

pub(super) struct DriverCore {
    /// What sandboxes' records call this driver.
    pub name: String,
    pub host: Arc<Host>,
    pub shortcuts: bool,
    pub factory: Arc<Factory>,
    pub pools: Vec<Arc<SlotPool>>,
    pub prepared: Vec<Arc<SlotPool<PreparedSlot>>>,
    pub running: Mutex<HashMap<SessionId, Arc<RunningSandbox>>>,
    /// New sandboxes that are not on the host's disk for sure, and whether their disks are to be synced too.
    pub unsynced: Mutex<HashMap<SessionId, bool>>,
    pub releasing: Mutex<HashSet<SessionId>>,
    /// Told after each release; one waiter at a time.
    pub released: Notify,
    pub ends: mpsc::UnboundedSender<Ended>,
}

impl DriverCore {
    pub fn running_sandboxes(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<RunningSandbox>>> {
        self.running.lock().expect("the list is changed without panics")
    }

    pub fn unsynced(&self) -> MutexGuard<'_, HashMap<SessionId, bool>> {
        self.unsynced.lock().expect("the list is changed without panics")
    }

    pub fn releasing(&self) -> MutexGuard<'_, HashSet<SessionId>> {
        self.releasing.lock().expect("the list is changed without panics")
    }

    /// A running sandbox, for its volumes.
    pub fn sandbox(&self, id: SessionId) -> Result<Sandbox, DriverError> {
        let running = self.running(id)?;
        let pidfd = running.pidfd.try_clone().map_err(|error| failed("watch the sandbox", &error))?;
        let user_id = Record::read(&self.host.directory(id)).ok_or(DriverError::Gone)?.user_id;
        Ok(Sandbox { id, slot: running.slot, user_id, pidfd })
    }
}
