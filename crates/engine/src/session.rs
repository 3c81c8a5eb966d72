//! The life of a session, and what is accepted when. Pure: no store, no driver, no clock.
//!
//! ```text
//!     create_session
//!          │
//!          ▼
//!      CREATING ───────────────▶ RUNNING ◀─ ─ ─ ▶ PAUSING, PAUSED, RESUMING, USER_SHUTDOWN
//!          │                        │                            │
//!          └──────────┐   ┌─────────┘   ┌────────────────────────┘
//!                     ▼   ▼             ▼
//!                    TERMINATING ──▶ TERMINATED
//! ```
//!
//! - → CREATING: the row is committed, then the caller is answered, then the driver creates.
//! - CREATING → RUNNING: the driver created the sandbox.
//! - CREATING → TERMINATING: the driver failed, or terminate, or deadline, or the server stopped meanwhile.
//! - RUNNING → TERMINATING: terminate, or deadline, or the sandbox ended by itself.
//! - TERMINATING → TERMINATED: the driver destroyed the sandbox. Nothing leaves TERMINATED.
//! - The dashed states belong to pause and resume. Nothing enters them yet; terminate leaves them.
//!
//! Each arrow is committed before the side effect it announces and before anybody is told of it.

use nagaya_api::error::{Code, Error};

use crate::model::SessionState;

/// Everything that may be asked of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Reach its commands and files: certificates, data plane, executions.
    Use,
    /// Change its name, tags, stickiness or deadline.
    Change,
    /// Note that somebody is using it.
    Activity,
    Terminate,
    /// Its deadline has come.
    Expire,
    /// Its sandbox ended by itself.
    Exit,
}

impl Request {
    pub const ALL: [Self; 6] = [Self::Use, Self::Change, Self::Activity, Self::Terminate, Self::Expire, Self::Exit];
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Do,
    /// It is done or under way already; asking again is no error.
    Nothing,
    /// Refuse with this code.
    Refuse(Code),
}

/// The acceptance table: what a session in `state` does with `request`.
pub const fn accept(state: SessionState, request: Request) -> Verdict {
    use Request as R;
    use SessionState as S;
    match (state, request) {
        (S::Running, R::Use) => Verdict::Do,
        (S::Terminating | S::Terminated, R::Use | R::Change | R::Activity) => Verdict::Refuse(Code::SessionTerminated),
        (_, R::Use) => Verdict::Refuse(Code::SessionNotRunning),
        (S::Terminating | S::Terminated, R::Terminate | R::Expire | R::Exit) => Verdict::Nothing,
        (_, R::Change | R::Activity | R::Terminate | R::Expire) => Verdict::Do,
        (S::Running, R::Exit) => Verdict::Do,
        // A sandbox that dies while it is created makes the creation fail; one that is stopped
        // on purpose has no process to lose.
        (_, R::Exit) => Verdict::Nothing,
    }
}

/// The error for a request that [`accept`] refuses, with the state where it helps.
pub fn check(state: SessionState, request: Request) -> Result<(), Error> {
    match accept(state, request) {
        Verdict::Do | Verdict::Nothing => Ok(()),
        Verdict::Refuse(Code::SessionNotRunning) => {
            Err(Error::new(Code::SessionNotRunning, format!("(state={})", state.name())))
        }
        Verdict::Refuse(code) => Err(code.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row per state, one letter per request in the order of `Request::ALL`:
    /// `d` does it, `-` nothing to do, `t` refused as terminated, `n` refused as not running.
    const TABLE: [(SessionState, &str); 8] = [
        (SessionState::Creating, "ndddd-"),
        (SessionState::Running, "dddddd"),
        (SessionState::Paused, "ndddd-"),
        (SessionState::Terminating, "ttt---"),
        (SessionState::Terminated, "ttt---"),
        (SessionState::Pausing, "ndddd-"),
        (SessionState::Resuming, "ndddd-"),
        (SessionState::UserShutdown, "ndddd-"),
    ];

    #[test]
    fn every_state_answers_every_request_as_the_table_says() {
        assert_eq!(TABLE.map(|row| row.0), SessionState::ALL);
        for (state, row) in TABLE {
            let answers: String = Request::ALL
                .into_iter()
                .map(|request| match accept(state, request) {
                    Verdict::Do => 'd',
                    Verdict::Nothing => '-',
                    Verdict::Refuse(Code::SessionTerminated) => 't',
                    Verdict::Refuse(Code::SessionNotRunning) => 'n',
                    Verdict::Refuse(other) => panic!("unexpected code {}", other.name()),
                })
                .collect();
            assert_eq!(answers, row, "{}", state.name());
        }
    }

    #[test]
    fn a_refusal_names_the_state_the_session_is_in() {
        let error = check(SessionState::Paused, Request::Use).unwrap_err();
        assert_eq!(error.code, Code::SessionNotRunning);
        assert!(error.to_string().contains("state=PAUSED"), "{error}");
    }
}
