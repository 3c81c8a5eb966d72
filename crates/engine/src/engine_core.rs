//! What the parts of the engine share, and how they find a caller's sessions.

use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, WorkspaceId};
use tokio::sync::{Semaphore, oneshot};

use crate::access::{Access, Caller};
use crate::backoff::Backoff;
use crate::config::EngineConfig;
use crate::deadlines::Deadlines;
use crate::errors::store_error;
use crate::handle::{Registry, SessionHandle, Slot};
use crate::model::{DiskOrigin, Resources, SandboxSpec, Session};
use crate::ports::{Blobs, Change, Clock, Driver, DriverError, Drivers, Entropy, Host, Ingress, Store};
use crate::preview_table::Previews;
use crate::session::{Request, check};
use crate::snapshot_locks::SnapshotLocks;
use crate::tasks::{Running, Tasks};
use crate::volume_table::Volumes;

/// Setting in which the store keeps the key that signs session certificates.
const CERTIFICATE_KEY: &str = "session_certificate_key";

pub(crate) struct EngineCore {
    pub(crate) config: EngineConfig,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) drivers: Drivers,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) blobs: Arc<dyn Blobs>,
    pub(crate) ingress: Arc<dyn Ingress>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) entropy: Arc<dyn Entropy>,
    pub(crate) access: Access,
    pub(crate) registry: Arc<Registry>,
    pub(crate) snapshots: SnapshotLocks,
    pub(crate) volumes: Volumes,
    pub(crate) previews: Previews,
    pub(crate) deadlines: Deadlines,
    pub(crate) creates: Semaphore,
    pub(crate) tasks: Tasks,
}

/// A session the caller may see.
#[allow(clippy::large_enum_variant)] // it lives for one look
pub(crate) enum Found {
    Live(Arc<SessionHandle>),
    Ended(Session),
}

/// The engine. Clones share it.
#[derive(Clone)]
pub struct Engine(pub(crate) Arc<EngineCore>);

impl EngineCore {
    pub(crate) fn backoff(&self) -> Backoff {
        Backoff::new(&self.config)
    }

    pub(crate) async fn write(&self, changes: Vec<Change>) -> Result<(), Error> {
        self.store.commit(changes).await.map_err(store_error)
    }

    pub(crate) fn random<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.entropy.fill(&mut bytes);
        bytes
    }

    /// The driver that a session's sandbox runs on.
    pub(crate) fn driver_of(&self, session: &Session) -> Arc<dyn Driver> {
        self.drivers.of(&session.driver)
    }

    /// What the driver is told to start a session's sandbox.
    pub(crate) async fn spec(&self, session: &Session, disk: DiskOrigin) -> Result<SandboxSpec, DriverError> {
        let machine = &session.machine;
        Ok(SandboxSpec {
            resources: machine.resources,
            root: self.host.root(&machine.root).await?,
            disk,
            memory: None,
            outbound: machine.outbound,
            egress: machine.egress.clone(),
        })
    }

    /// The one place where a caller's right to a session is checked.
    pub(crate) async fn find(&self, caller: &Caller, id: SessionId) -> Result<Found, Error> {
        let found = match self.registry.get(id) {
            Some(live) if live.workspace_id == caller.workspace_id => Some(Found::Live(live)),
            Some(_) => None,
            None => {
                let session = self.store.session(id).await.map_err(store_error)?;
                session.filter(|session| session.workspace_id == caller.workspace_id).map(Found::Ended)
            }
        };
        found.ok_or_else(|| Code::SessionNotFound.into())
    }

    /// A session that has not ended, for a request that an ended one refuses.
    pub(crate) async fn find_live(
        &self,
        caller: &Caller,
        id: SessionId,
        request: Request,
    ) -> Result<Arc<SessionHandle>, Error> {
        match self.find(caller, id).await? {
            Found::Live(live) => {
                check(live.state(), request)?;
                Ok(live)
            }
            Found::Ended(session) => {
                check(session.state, request)?;
                // Only a stopping engine has records without tasks.
                Err(Code::Draining.into())
            }
        }
    }

    /// Room for one more running session, if its workspace and the server have it.
    pub(crate) fn reserve(&self, workspace_id: WorkspaceId, resources: &Resources) -> Result<Slot, Error> {
        let of_workspace = self.access.settings(workspace_id).sessions_max;
        self.registry.reserve(workspace_id, resources, of_workspace, self.config.sessions_max)
    }

    /// How long a workspace's paused sessions are kept that do not say so themselves.
    pub(crate) fn pause_retention_ms(&self, workspace_id: WorkspaceId) -> Option<u64> {
        self.access.settings(workspace_id).pause_retention_ms.or(self.config.pause_retention_default_ms)
    }

    /// Refuses one more sticky session where the workspace has a limit. For callers who hold the snapshots' lock, so
    /// that nobody else makes one meanwhile.
    pub(crate) fn check_sticky(&self, workspace_id: WorkspaceId, but: Option<SessionId>) -> Result<(), Error> {
        let Some(max) = self.access.settings(workspace_id).sticky_sessions_max else { return Ok(()) };
        let counts = |live: &Arc<SessionHandle>| {
            let session = live.published.borrow();
            live.workspace_id == workspace_id && Some(live.id) != but && session.sticky && !session.state.is_terminal()
        };
        if self.registry.all().iter().filter(|live| counts(live)).count() < max as usize {
            return Ok(());
        }
        Err(Error::new(Code::QuotaExceeded, format!("the workspace's sticky_sessions_max is {max}")))
    }

    /// Does something that belongs to nobody's future: a caller that goes away does not stop it half-way.
    pub(crate) async fn detached<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let running = self.tasks.enter()?;
        let (reply, answer) = oneshot::channel();
        tokio::spawn(async move {
            let result = work.await;
            drop(running);
            let _ = reply.send(result);
        });
        answer.await.unwrap_or_else(|_| Err(Code::Draining.into()))
    }

    /// Starts something that nobody waits for, unless the engine stops.
    pub(crate) fn background(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        if let Ok(running) = self.tasks.enter() {
            spawn_running(running, work);
        }
    }

    /// Repeats a step until it succeeds. False when the engine stops instead; the next start goes on with it.
    pub(crate) async fn insist<E: Display, F: Future<Output = Result<(), E>>>(
        &self,
        what: &str,
        mut step: impl FnMut() -> F,
    ) -> bool {
        let mut backoff = self.backoff();
        loop {
            match step().await {
                Ok(()) => return true,
                Err(error) => tracing::warn!(%error, "{what}; trying again"),
            }
            if !self.pause(backoff.next_ms()).await {
                return false;
            }
        }
    }

    /// False when the engine stops meanwhile.
    pub(crate) async fn pause(&self, pause_ms: u64) -> bool {
        let wake = self.clock.sleep_until(self.clock.now() + pause_ms);
        tokio::select! {
            biased;
            () = self.tasks.stopping() => false,
            () = wake => true,
        }
    }
}

pub(crate) fn spawn_running(running: Running, work: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(async move {
        work.await;
        drop(running);
    });
}

pub(crate) async fn certificate_key(store: &dyn Store, entropy: &dyn Entropy) -> Result<[u8; 32], Error> {
    lasting_secret(store, entropy, CERTIFICATE_KEY).await
}

/// A secret of the server that is made when it is first asked for.
pub(crate) async fn lasting_secret(store: &dyn Store, entropy: &dyn Entropy, name: &str) -> Result<[u8; 32], Error> {
    let stored = store.setting(name).await.map_err(store_error)?;
    if let Some(stored) = stored {
        return stored.try_into().map_err(|_| Error::new(Code::Internal, format!("the stored {name} is damaged")));
    }
    let mut key = [0; 32];
    entropy.fill(&mut key);
    let change = Change::Setting { name: name.to_owned(), value: key.to_vec() };
    store.commit(vec![change]).await.map_err(store_error)?;
    Ok(key)
}
