//! What a server for SSH needs of the engine: secrets that last, and a way into sessions.

use nagaya_api::error::Error;
use nagaya_api::ids::SessionId;
use tokio::sync::watch;

use crate::access::Caller;
use crate::engine_core::Engine;
use crate::event_log::CommandLog;
use crate::model::{Session, SessionState};
use crate::open::OpenSession;
use crate::session::Request;
use crate::shared::lasting_secret;

/// A running sandbox, open for a connection that may last. While it lives the session is in use.
pub struct SshSession {
    pub session_id: SessionId,
    pub open: OpenSession,
    /// Lines of an `authorized_keys` file, as they were when the visit began.
    pub ssh_authorized_keys: Vec<String>,
    published: watch::Receiver<Session>,
}

impl SshSession {
    /// Completes when what was running is not there any more: the session has ended, or only its disk is kept.
    /// The text says which, for the visitor. Never completes while the engine stops: the sandbox lives on.
    pub fn ended(&self) -> impl Future<Output = &'static str> + Send + 'static {
        let mut published = self.published.clone();
        async move {
            let ended = published.wait_for(|session| end_of(session).is_some()).await;
            match ended.map(|session| end_of(&session)) {
                Ok(Some(text)) => text,
                Ok(None) | Err(_) => std::future::pending().await,
            }
        }
    }
}

fn end_of(session: &Session) -> Option<&'static str> {
    match (session.state, &session.pause) {
        (state, _) if state.is_terminal() => Some("the session has ended"),
        (SessionState::UserShutdown, _) => Some("the sandbox powered itself off"),
        (_, Some(pause)) if !pause.in_memory => Some("the session was stopped; only its disk is kept"),
        _ => None,
    }
}

impl Engine {
    /// 32 random bytes that are made when they are first asked for, and are the same ever after.
    pub async fn lasting_secret(&self, name: &str) -> Result<[u8; 32], Error> {
        lasting_secret(&*self.0.shared.store, &*self.0.shared.entropy, name).await
    }

    /// Whether the caller may be let into this session by SSH, now or when it runs again.
    pub async fn check_visit(&self, caller: &Caller, id: SessionId) -> Result<(), Error> {
        self.0.shared.tasks.check()?;
        self.0.registry.find_live(caller, id, Request::Activity).await.map(drop)
    }

    /// Opens a session for a caller who wants to stay; one that does not run is woken where visits may.
    pub async fn visit(&self, caller: &Caller, id: SessionId) -> Result<SshSession, Error> {
        self.0.shared.tasks.check()?;
        self.0.registry.find(caller, id).await?;
        self.visit_certified(id).await
    }

    /// The same for somebody whose right to this very session was proved to the server by a certificate of its own.
    pub async fn visit_certified(&self, id: SessionId) -> Result<SshSession, Error> {
        let inner = &*self.0;
        inner.shared.tasks.check()?;
        let live = inner.registry.find_certified(id).await?;
        let (in_use, guest) = inner.registry.reach(&live).await?;
        let session = live.published.borrow().clone();
        let commands = CommandLog {
            events: self.0.events.clone(),
            session_id: id,
            memory_bytes: session.machine.resources.memory_bytes,
        };
        Ok(SshSession {
            session_id: id,
            open: OpenSession { guest, env: session.env, commands, _activity: Some(in_use) },
            ssh_authorized_keys: session.ssh_authorized_keys,
            published: live.published.clone(),
        })
    }
}
