//! The life of a session, and what is accepted when. Pure: no store, no driver, no clock.
//!
//! ```text
//!     create_session
//!          │
//!          ▼            pause, idle                       its memory is given up
//!      CREATING ──▶ RUNNING ──▶ PAUSING ──▶ PAUSED ◀─────────┐  (disk only)
//!          │         │ │ ▲ ◀───────┘ failed  │ │ └───────────┘
//!          │         │ │ │                   │ └────────────────────────────────┐
//!          │         │ │ └───── RESUMING ◀───┴───────────── USER_SHUTDOWN       │
//!          │         │ │           └──▶ PAUSED, if it fails     ▲ │             │
//!          │         │ ├─ ended by itself ──▶ PAUSED            │ │ retention   │ retention
//!          │         │ └─ powered itself off ───────────────────┘ │ terminate   │ terminate
//!          │         │ terminate, deadline                        │             │
//!          └────▶ TERMINATING ◀───────────────────────────────────┴─────────────┘
//!                      └──▶ TERMINATED
//! ```
//!
//! - → CREATING: the row is committed, then the caller is answered, then the driver creates.
//! - CREATING → RUNNING: the driver created the sandbox and mounted its volumes.
//! - CREATING → TERMINATING: the driver failed, or terminate, or deadline, or the server stopped meanwhile.
//! - RUNNING → PAUSING → PAUSED: the driver froze it. What could not be frozen or recorded is RUNNING again.
//! - RUNNING → PAUSED, USER_SHUTDOWN: its sandbox ended by itself, or powered itself off; its disk is kept.
//! - PAUSED → PAUSED: its memory is given up for its disk; that is recorded first.
//! - PAUSED → RESUMING → RUNNING: the driver thawed it, or started it again on its disk.
//! - USER_SHUTDOWN → RESUMING → RUNNING: the driver started it again.
//! - RESUMING → PAUSED: that failed; the reason is in `last_resume_error`.
//! - any → TERMINATING: terminate, a deadline, or not even its disk is there.
//! - TERMINATING → TERMINATED: the driver destroyed the sandbox. Nothing leaves TERMINATED.
//!
//! Each arrow is committed before the side effect it announces and before anybody is told of it, with one
//! exception: freezing and thawing happen first and are recorded once. A crash in between leaves the
//! driver's answer (frozen or not) against the row, and the row decides: the sandbox is thawed or frozen
//! again. PAUSING, and RESUMING of what is in memory, are therefore shown but never stored.

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
    Pause,
    Resume,
    /// Copy its disk, for snapshots and forks.
    Copy,
    /// Attach or detach a volume.
    Mount,
    Terminate,
    /// Its deadline has come. Time stands still while it is stopped.
    Expire,
    /// Nobody has used it for as long as it allows.
    Idle,
    /// It has been stopped for as long as it is kept.
    RetentionExpired,
    /// Its sandbox ended by itself.
    Exit,
}

impl Request {
    pub const ALL: [Self; 12] = [
        Self::Use,
        Self::Change,
        Self::Activity,
        Self::Pause,
        Self::Resume,
        Self::Copy,
        Self::Mount,
        Self::Terminate,
        Self::Expire,
        Self::Idle,
        Self::RetentionExpired,
        Self::Exit,
    ];
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Do,
    /// It is done or under way already; asking again has no effect.
    Nothing,
    /// Refuse with this code.
    Refuse(Code),
}

/// The acceptance table: what a session in `state` does with `request`. What is accepted on the way
/// from one state to another waits until it is there, and is looked at again.
pub const fn accept(state: SessionState, request: Request) -> Verdict {
    use Request as R;
    use SessionState as S;
    match (state, request) {
        (S::Terminating | S::Terminated, R::Terminate | R::Expire | R::Idle | R::RetentionExpired | R::Exit) => {
            Verdict::Nothing
        }
        (S::Terminating | S::Terminated, _) => Verdict::Refuse(Code::SessionTerminated),
        (_, R::Change | R::Activity | R::Terminate) => Verdict::Do,
        (S::Running, R::Use | R::Mount) => Verdict::Do,
        (_, R::Use | R::Mount) => Verdict::Refuse(Code::SessionNotRunning),
        (S::Creating, R::Pause | R::Resume | R::Copy) => Verdict::Refuse(Code::SessionNotRunning),
        (S::Paused | S::UserShutdown, R::Pause) | (S::Running, R::Resume) => Verdict::Nothing,
        (_, R::Pause | R::Resume | R::Copy) => Verdict::Do,
        (S::Creating | S::Running, R::Expire) => Verdict::Do,
        (S::Running, R::Idle) => Verdict::Do,
        (S::Paused | S::UserShutdown, R::RetentionExpired) => Verdict::Do,
        // A sandbox that dies while it is created or moved makes that fail.
        (S::Running | S::Paused, R::Exit) => Verdict::Do,
        (_, R::Expire | R::Idle | R::RetentionExpired | R::Exit) => Verdict::Nothing,
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
        (SessionState::Creating, "nddnnnndd---"),
        (SessionState::Running, "dddd-ddddd-d"),
        (SessionState::Paused, "ndd-ddnd--dd"),
        (SessionState::Terminating, "ttttttt-----"),
        (SessionState::Terminated, "ttttttt-----"),
        (SessionState::Pausing, "ndddddnd----"),
        (SessionState::Resuming, "ndddddnd----"),
        (SessionState::UserShutdown, "ndd-ddnd--d-"),
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
