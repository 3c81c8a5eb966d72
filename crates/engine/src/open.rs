//! Running sandboxes, opened for those who want to use them.

use std::collections::BTreeMap;
use std::sync::Arc;

use nagaya_api::ids::{PreviewId, SessionId};
use tokio::sync::watch;

use crate::event_log::CommandLog;
use crate::handle::InUse;
use crate::model::{Session, SessionState};
use crate::ports::Guest;

/// A running sandbox, open for one call of the data plane. While it lives the session is in use.
pub struct OpenSession {
    pub guest: Arc<dyn Guest>,
    /// The session's environment, to be laid under the command's own.
    pub env: BTreeMap<String, String>,
    /// Where commands that are started here get their ids, and their abnormal ends are recorded.
    pub commands: CommandLog,
    pub(crate) _activity: Option<InUse>,
}

impl OpenSession {
    /// Completes when the session is not RUNNING any more, with the state it is in. Never completes while the engine
    /// stops: the sandbox lives on.
    pub fn stopped(&self) -> impl Future<Output = SessionState> + Send + 'static {
        let published = self._activity.as_ref().map(|in_use| in_use.live.published.clone());
        async move {
            // One that ended while it was opened is not in use.
            let Some(mut published) = published else { return SessionState::Terminated };
            let state = published.wait_for(|session| session.state != SessionState::Running).await;
            let state = state.ok().map(|session| session.state);
            match state {
                Some(state) => state,
                None => std::future::pending().await,
            }
        }
    }
}

/// Somebody who looks at a preview. While it lives the session is in use.
pub struct PreviewConnection {
    pub preview_id: PreviewId,
    /// Where the preview led when the visit began. A visit goes on there to its end, whatever becomes of the preview.
    pub session_id: SessionId,
    /// Of the sandbox's own loopback.
    pub port: u16,
    /// Another one after every start of the sandbox: connections to an earlier one are dead.
    pub guest: Arc<dyn Guest>,
    pub(crate) _activity: InUse,
}

/// A running sandbox, open for a connection that may last. While it lives the session is in use.
pub struct SshSession {
    pub session_id: SessionId,
    pub open: OpenSession,
    /// Lines of an `authorized_keys` file, as they were when the visit began.
    pub ssh_authorized_keys: Vec<String>,
    pub(crate) published: watch::Receiver<Session>,
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
