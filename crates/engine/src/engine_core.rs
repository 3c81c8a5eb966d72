//! What the parts of the engine share, and how they find a caller's sessions.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::event_log::Events;
use crate::model::{DiskOrigin, SandboxSpec, Session};
use crate::ports::DriverError;
use crate::previews::Previews;
use crate::registry::Registry;
use crate::shared::Shared;
use crate::snapshots::Snapshots;
use crate::volumes::Volumes;
use crate::workspaces::Workspaces;

pub(crate) struct EngineCore {
    pub(crate) shared: Arc<Shared>,
    pub(crate) workspaces: Arc<Workspaces>,
    pub(crate) events: Arc<Events>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) previews: Arc<Previews>,
    pub(crate) creates: Semaphore,
}

/// The engine. Clones share it.
#[derive(Clone)]
pub struct Engine(pub(crate) Arc<EngineCore>);

impl EngineCore {
    /// What the driver is told to start a session's sandbox.
    pub(crate) async fn spec(&self, session: &Session, disk: DiskOrigin) -> Result<SandboxSpec, DriverError> {
        let machine = &session.machine;
        Ok(SandboxSpec {
            resources: machine.resources,
            root: self.shared.host.root(&machine.root).await?,
            disk,
            memory: None,
            outbound: machine.outbound,
            egress: machine.egress.clone(),
        })
    }
}
