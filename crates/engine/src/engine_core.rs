//! What the parts of the engine share, and how they find a caller's sessions.

use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, WorkspaceId};
use tokio::sync::Semaphore;

use crate::access::Caller;
use crate::errors::store_error;
use crate::handle::{Registry, SessionHandle, Slot};
use crate::model::{DiskOrigin, Resources, SandboxSpec, Session};
use crate::ports::{Blobs, DriverError, Ingress};
use crate::preview_table::Previews;
use crate::session::{Request, check};
use crate::shared::Shared;
use crate::snapshot_locks::SnapshotLocks;
use crate::volume_table::Volumes;
use crate::workspaces::Workspaces;

pub(crate) struct EngineCore {
    pub(crate) shared: Arc<Shared>,
    pub(crate) workspaces: Arc<Workspaces>,
    pub(crate) blobs: Arc<dyn Blobs>,
    pub(crate) ingress: Arc<dyn Ingress>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) snapshots: SnapshotLocks,
    pub(crate) volumes: Volumes,
    pub(crate) previews: Previews,
    pub(crate) creates: Semaphore,
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

    /// The one place where a caller's right to a session is checked.
    pub(crate) async fn find(&self, caller: &Caller, id: SessionId) -> Result<Found, Error> {
        let found = match self.registry.get(id) {
            Some(live) if live.workspace_id == caller.workspace_id => Some(Found::Live(live)),
            Some(_) => None,
            None => {
                let session = self.shared.store.session(id).await.map_err(store_error)?;
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
        let of_workspace = self.shared.access.settings(workspace_id).sessions_max;
        self.registry.reserve(workspace_id, resources, of_workspace, self.shared.config.sessions_max)
    }

    /// How long a workspace's paused sessions are kept that do not say so themselves.
    pub(crate) fn pause_retention_ms(&self, workspace_id: WorkspaceId) -> Option<u64> {
        self.shared.access.settings(workspace_id).pause_retention_ms.or(self.shared.config.pause_retention_default_ms)
    }

    /// Refuses one more sticky session where the workspace has a limit. For callers who keep the workspaces quiet,
    /// so that nobody else makes one meanwhile.
    pub(crate) fn check_sticky(&self, workspace_id: WorkspaceId, but: Option<SessionId>) -> Result<(), Error> {
        let Some(max) = self.shared.access.settings(workspace_id).sticky_sessions_max else { return Ok(()) };
        let counts = |live: &Arc<SessionHandle>| {
            let session = live.published.borrow();
            live.workspace_id == workspace_id && Some(live.id) != but && session.sticky && !session.state.is_terminal()
        };
        if self.registry.all().iter().filter(|live| counts(live)).count() < max as usize {
            return Ok(());
        }
        Err(Error::new(Code::QuotaExceeded, format!("the workspace's sticky_sessions_max is {max}")))
    }
}
