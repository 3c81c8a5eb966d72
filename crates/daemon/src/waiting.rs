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

#[cfg(test)]
mod tests {
    use nagaya_api::error::Code;
    use nagaya_engine::NewSession;
    use nagaya_engine::fake::{self, Fakes};
    use tokio::time::Instant;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A session that stays CREATING until the driver may go on.
    async fn creating() -> (Engine, Caller, Fakes, Session) {
        let (engine, _, caller, fakes) = fake::start(Default::default()).await;
        fakes.driver.hold_creates(true);
        let session = engine.create_session(&caller, NewSession::default()).await.unwrap();
        (engine, caller, fakes, session)
    }

    fn is_running(session: &Session) -> bool {
        session.state == SessionState::Running
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_is_as_wanted_already_is_answered_at_once() {
        let (engine, caller, _fakes, session) = creating().await;
        let begun = Instant::now();
        let mut states = engine.watch_session(&caller, session.id).await.unwrap();
        let waited = until(&mut states, |session| session.state == SessionState::Creating, None).await;
        assert!(matches!(waited, Waited::Reached(now) if now.id == session.id));
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_early_when_the_session_becomes_as_wanted() {
        let (engine, caller, fakes, session) = creating().await;
        let begun = Instant::now();
        let driver = fakes.driver.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SECOND).await;
            driver.hold_creates(false);
        });
        let created = created(&engine, &caller, session.id, Some(60 * SECOND)).await.unwrap();
        assert!(is_running(&created), "{:?}", created.state);
        assert!((SECOND..2 * SECOND).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_is_too_short_tells_how_far_it_came() {
        let (engine, caller, fakes, session) = creating().await;
        let begun = Instant::now();
        let mut states = engine.watch_session(&caller, session.id).await.unwrap();
        let late = until(&mut states, is_running, Some(3 * SECOND)).await;
        assert!(matches!(&late, Waited::Late(now) if now.state == SessionState::Creating), "{late:?}");
        let ending = async { engine.terminate_session(&caller, session.id).await };
        let never = async { std::future::pending().await };
        let changed_late = changed(&engine, &caller, session.id, never, Some(4 * SECOND)).await.unwrap();
        assert_eq!(changed_late.state, SessionState::Creating);
        assert_eq!(begun.elapsed(), 7 * SECOND);
        fakes.driver.hold_creates(false);
        let ended = changed(&engine, &caller, session.id, ending, Some(60 * SECOND)).await.unwrap();
        assert_eq!(ended.state, SessionState::Terminated);
        let refused = async { Err(Code::ResumeFailed.into()) };
        assert_eq!(changed(&engine, &caller, session.id, refused, None).await.unwrap_err().code, Code::ResumeFailed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_when_the_engine_stops() {
        let (engine, caller, fakes, session) = creating().await;
        fakes.driver.hold_creates(false);
        created(&engine, &caller, session.id, None).await.unwrap();
        let mut states = engine.watch_session(&caller, session.id).await.unwrap();
        tokio::spawn(async move { engine.shut_down().await });
        let waited = until(&mut states, |session| session.state == SessionState::Paused, None).await;
        assert!(matches!(&waited, Waited::Draining(now) if now.id == session.id && is_running(now)), "{waited:?}");
    }

    #[test]
    fn an_answer_is_there_before_the_deadline() {
        for (remaining_s, margin_s, time_s) in [(30, 2, 28.0), (3, 2, 1.5), (0, 2, 0.0)] {
            let time = time_to_answer(Some(remaining_s * SECOND), margin_s * SECOND);
            assert_eq!(time, Some(Duration::from_secs_f64(time_s)), "{remaining_s} s");
        }
        assert_eq!(time_to_answer(None, SECOND), None);
    }
}
