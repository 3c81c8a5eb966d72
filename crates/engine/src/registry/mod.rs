//! Which sessions there are that have not ended: who may see them, what they use up, and how they are reached.

mod table;
mod waking;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, WorkspaceId};

use crate::access::Caller;
use crate::errors::store_error;
use crate::handle::SessionHandle;
use crate::model::{Resources, Session, SessionState};
use crate::session::{Request, check};
use crate::shared::Shared;

pub(crate) use table::{NameClaim, SessionTable, Slot};

pub(crate) struct Registry {
    shared: Arc<Shared>,
    pub(crate) live: Arc<SessionTable>,
}

/// A session the caller may see.
#[allow(clippy::large_enum_variant)] // it lives for one look
pub(crate) enum Found {
    Live(Arc<SessionHandle>),
    Ended(Session),
}

impl Registry {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, live: Arc::default() }
    }

    /// The one place where a caller's right to a session is checked.
    pub(crate) async fn find(&self, caller: &Caller, id: SessionId) -> Result<Found, Error> {
        let found = match self.live.get(id) {
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

    /// A session that has not ended, for somebody whose right to it was proved otherwise.
    pub(crate) async fn find_certified(&self, id: SessionId) -> Result<Arc<SessionHandle>, Error> {
        if let Some(live) = self.live.get(id) {
            return Ok(live);
        }
        let session = self.shared.store.session(id).await.map_err(store_error)?;
        let ended = session.is_some();
        Err(if ended { Code::SessionTerminated } else { Code::SessionNotFound }.into())
    }

    /// Room for one more running session, if its workspace and the server have it.
    pub(crate) fn reserve(&self, workspace_id: WorkspaceId, resources: &Resources) -> Result<Slot, Error> {
        let of_workspace = self.shared.access.settings(workspace_id).sessions_max;
        self.live.reserve(workspace_id, resources, of_workspace, self.shared.config.sessions_max)
    }

    /// Refuses one more sticky session where the workspace has a limit. For callers who keep the workspaces quiet,
    /// so that nobody else makes one meanwhile.
    pub(crate) fn check_sticky(&self, workspace_id: WorkspaceId, but: Option<SessionId>) -> Result<(), Error> {
        let Some(max) = self.shared.access.settings(workspace_id).sticky_sessions_max else { return Ok(()) };
        let counts = |live: &Arc<SessionHandle>| {
            let session = live.published.borrow();
            live.workspace_id == workspace_id && Some(live.id) != but && session.sticky && !session.state.is_terminal()
        };
        if self.live.all().iter().filter(|live| counts(live)).count() < max as usize {
            return Ok(());
        }
        Err(Error::new(Code::QuotaExceeded, format!("the workspace's sticky_sessions_max is {max}")))
    }

    /// Asks for the memory of the session that has been paused for longest.
    pub(crate) fn release_longest_paused(&self) {
        let in_memory = |live: &Arc<SessionHandle>| {
            let session = live.published.borrow();
            let pause = session.pause.as_ref().filter(|pause| pause.in_memory && session.state == SessionState::Paused);
            pause.map(|pause| (pause.paused_at, live.id)).filter(|_| !live.memory_low.load(Ordering::Acquire))
        };
        let longest = self.live.all().into_iter().filter_map(|live| Some((in_memory(&live)?, live)));
        if let Some((_, live)) = longest.min_by_key(|(since, _)| *since) {
            live.memory_low.store(true, Ordering::Release);
            live.alarm.notify_one();
        }
    }
}
