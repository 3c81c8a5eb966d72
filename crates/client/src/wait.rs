//! Waiting for a session: the server tells every change where it can, and is asked again and again where not.

use std::time::Duration;

use nagaya_api::tenki::v1;
use tokio::time::Instant;

use crate::{Error, RefusalKind, Result, Session, SessionInfo, SessionState, Status};

/// Pauses between two questions; the last one goes on.
const POLL_PAUSES_MS: [u64; 5] = [100, 250, 500, 1_000, 2_000];
/// How long a session may still be called PAUSED after it was told to resume.
const RESUME_GRACE: Duration = Duration::from_secs(3);

pub(crate) async fn ready(session: &Session, timeout: Duration) -> Result<SessionInfo> {
    let deadline = Instant::now() + timeout;
    let waited = tokio::time::timeout_at(deadline, async {
        match follow(session, timeout).await {
            Err(error) if can_be_asked_instead(&error) => ask(session).await,
            outcome => outcome,
        }
    });
    let outcome =
        waited.await.unwrap_or_else(|_| Err(Error::TimedOut { what: "becoming RUNNING".to_owned(), after: timeout }));
    outcome.map_err(|cause| match cause {
        Error::Refused {
            kind: RefusalKind::SessionTerminated | RefusalKind::SessionNotFound | RefusalKind::Unauthorized,
            ..
        } => cause,
        cause => Error::WaitReadyFailed { session_id: session.id().to_owned(), cause: Box::new(cause) },
    })
}

/// Follows what the server tells, until the session is RUNNING.
async fn follow(session: &Session, timeout: Duration) -> Result<SessionInfo> {
    let request = v1::WaitSessionRequest { session_id: session.id().to_owned() };
    let mut states = session.client().control_within(timeout).wait_session(request).await.map_err(Error::of_rpc)?;
    while let Some(message) = states.message().await.map_err(Error::of_rpc)? {
        let Some(state) = message.session.as_option().cloned() else { continue };
        let info = session.described(Some(state))?;
        let credential = message.credential.as_option().cloned();
        session.offer_route(message.data_plane_endpoint.clone(), credential, message.route_status).await;
        if settled(&info)? {
            return Ok(info);
        }
    }
    Err(Error::StreamClosed("the server stopped telling before the session was RUNNING".into()))
}

/// Asks the server until the session is RUNNING. It may not be known everywhere yet.
async fn ask(session: &Session) -> Result<SessionInfo> {
    for attempt in 0.. {
        match session.refresh().await {
            Ok(info) if settled(&info)? => return Ok(info),
            Ok(_) | Err(Error::Refused { kind: RefusalKind::SessionNotFound, .. } | Error::Unreachable { .. }) => {}
            Err(error) if error.retryable() => {}
            Err(error) => return Err(error),
        }
        pause(attempt).await;
    }
    unreachable!("there is no last attempt")
}

/// Whether the session is RUNNING; an error when it never will be.
fn settled(info: &SessionInfo) -> Result<bool> {
    if info.is_terminal() {
        let why = if info.terminal_error.is_empty() { "it was ended" } else { &info.terminal_error };
        let message = format!("session is terminated: {why} [session_terminated]");
        return Err(Error::refused(RefusalKind::SessionTerminated, Status::FailedPrecondition, message));
    }
    Ok(info.is_ready())
}

fn can_be_asked_instead(error: &Error) -> bool {
    match error {
        Error::Unreachable { .. } | Error::Refused { kind: RefusalKind::DataPlaneNotReady, .. } => true,
        Error::Refused { kind: RefusalKind::Other, status, .. } => {
            matches!(status, Status::Unimplemented | Status::Unavailable)
        }
        _ => false,
    }
}

pub(crate) async fn resumed(session: &Session, timeout: Duration) -> Result<SessionInfo> {
    let begun = Instant::now();
    let mut seen_resuming = false;
    let asking = async {
        for attempt in 0.. {
            let info = session.refresh().await?;
            seen_resuming |= info.state == SessionState::Resuming;
            let asleep = matches!(info.state, SessionState::Paused | SessionState::UserShutdown);
            if asleep && (seen_resuming || begun.elapsed() > RESUME_GRACE) {
                let why = &info.last_resume_error;
                let why = if why.is_empty() { "it is paused again" } else { why };
                return Err(Error::ResumeFailed(why.to_owned()));
            }
            if settled(&info)? {
                return Ok(info);
            }
            pause(attempt).await;
        }
        unreachable!("there is no last attempt")
    };
    let timed_out = |_| Error::TimedOut { what: "resuming".to_owned(), after: timeout };
    tokio::time::timeout(timeout, asking).await.map_err(timed_out)?
}

/// The pause after this many questions.
pub(crate) async fn pause(attempt: usize) {
    let milliseconds = POLL_PAUSES_MS[attempt.min(POLL_PAUSES_MS.len() - 1)];
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}
