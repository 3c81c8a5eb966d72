//! Waiting for sessions on behalf of a caller, the same way in every façade: answered at once where a session is as
//! wanted, else when it becomes so, and at the latest after a given time.

use std::time::Duration;

use nagaya_api::error::Error;
use nagaya_api::ids::SessionId;
use nagaya_engine::model::{Session, SessionState};
use nagaya_engine::{Caller, Engine};
use tokio::sync::watch;

/// How a wait ended, with the session as it was then.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Waited {
    /// It is as wanted.
    Reached(Session),
    /// The time was over before.
    Late(Session),
    /// The engine stopped before.
    Draining(Session),
}

impl Waited {
    /// For answers that tell how far a session came.
    pub(crate) fn session(self) -> Session {
        match self {
            Self::Reached(session) | Self::Late(session) | Self::Draining(session) => session,
        }
    }
}

/// Waits for one of the session's states, `at_most` so long; `None`: as long as it takes.
pub(crate) async fn until(
    states: &mut watch::Receiver<Session>,
    wanted: impl FnMut(&Session) -> bool,
    at_most: Option<Duration>,
) -> Waited {
    let reached = async { states.wait_for(wanted).await.map(|session| session.clone()) };
    match within(at_most, reached).await {
        Some(Ok(session)) => Waited::Reached(session),
        Some(Err(_)) => Waited::Draining(states.borrow().clone()),
        None => Waited::Late(states.borrow().clone()),
    }
}

/// The session when its creation is over, or how far that came.
pub(crate) async fn created(
    engine: &Engine,
    caller: &Caller,
    session: SessionId,
    at_most: Option<Duration>,
) -> Result<Session, Error> {
    let mut states = engine.watch_session(caller, session).await?;
    // It may have been RUNNING and be PAUSED again before anybody looked.
    let is_over = |session: &Session| session.state != SessionState::Creating;
    Ok(until(&mut states, is_over, at_most).await.session())
}

/// What a change of the session came to, or how far it came. A change goes on when nobody waits for it any more.
pub(crate) async fn changed(
    engine: &Engine,
    caller: &Caller,
    session: SessionId,
    change: impl Future<Output = Result<Session, Error>>,
    at_most: Option<Duration>,
) -> Result<Session, Error> {
    match within(at_most, change).await {
        Some(changed) => changed,
        None => engine.session(caller, session).await,
    }
}

/// How long an answer may be held back, so that it is there before a call's deadline. `None`: as long as it takes.
pub(crate) fn time_to_answer(remaining: Option<Duration>, margin: Duration) -> Option<Duration> {
    remaining.map(|remaining| remaining - margin.min(remaining / 2))
}

/// `None` when the time was over first.
async fn within<T>(at_most: Option<Duration>, wait: impl Future<Output = T>) -> Option<T> {
    match at_most {
        Some(at_most) => tokio::time::timeout(at_most, wait).await.ok(),
        None => Some(wait.await),
    }
}
