//! The engine's records in the words of the wire, and back.

use buffa_types::google::protobuf::{Duration, Timestamp};
use connectrpc::ConnectError;
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::ParseIdError;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::Certificate;
use nagaya_engine::model::{Execution, ExecutionStatus, Session, SessionState, UnixMs};
use nagaya_engine::ports::{ExitStatus, GuestError, Signal};

/// Sessions are owned by a key, which the contract has no word for; `SERVICE` comes closest.
pub(super) const OWNER_TYPE: &str = "SERVICE";

pub(super) fn timestamp(at: UnixMs) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(at / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(at % 1000).unwrap_or(0) * 1_000_000,
        ..Default::default()
    }
}

pub(super) fn duration(ms: u64) -> Duration {
    Duration {
        seconds: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(ms % 1000).unwrap_or(0) * 1_000_000,
        ..Default::default()
    }
}

/// Milliseconds, rounded up, so that nothing longer than zero becomes zero.
pub(super) fn milliseconds(duration: &Duration, field: &str) -> Result<u64, Error> {
    match (u64::try_from(duration.seconds), u32::try_from(duration.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
            Ok(seconds.saturating_mul(1000).saturating_add(nanos.div_ceil(1_000_000).into()))
        }
        _ => Err(Error::new(Code::InvalidArgument, format!("{field} must not be negative"))),
    }
}

/// Reads an id; what is no UUID is refused with the field's name.
pub(super) fn id<T: std::str::FromStr<Err = ParseIdError>>(text: &str, field: &str) -> Result<T, Error> {
    text.parse().map_err(|_| Error::new(Code::InvalidId, field))
}

/// Like [`id`], where an empty text stands for none.
pub(super) fn optional_id<T: std::str::FromStr<Err = ParseIdError>>(
    text: &str,
    field: &str,
) -> Result<Option<T>, Error> {
    if text.is_empty() { Ok(None) } else { id(text, field).map(Some) }
}

/// A count that the wire has as signed. Negative ones become 0, which every such field refuses.
pub(super) fn count(number: i32) -> u32 {
    u32::try_from(number).unwrap_or(0)
}

pub(super) fn state(state: SessionState) -> wire::SessionState {
    match state {
        SessionState::Creating => wire::SessionState::Creating,
        SessionState::Running => wire::SessionState::Running,
        SessionState::Paused => wire::SessionState::Paused,
        SessionState::Terminating => wire::SessionState::Terminating,
        SessionState::Terminated => wire::SessionState::Terminated,
        SessionState::Pausing => wire::SessionState::Pausing,
        SessionState::Resuming => wire::SessionState::Resuming,
        SessionState::UserShutdown => wire::SessionState::UserShutdown,
    }
}

/// The state to filter a list by; `None` for "any".
pub(super) fn state_filter(state: buffa::EnumValue<wire::SessionState>) -> Result<Option<SessionState>, Error> {
    match state.to_i32() {
        0 => Ok(None),
        number => SessionState::from_number(number.into())
            .map(Some)
            .ok_or_else(|| Error::new(Code::InvalidArgument, "state is none of the contract's")),
    }
}

pub(super) fn session(session: Session) -> wire::SandboxSession {
    let workspace_id = session.workspace_id.to_string();
    wire::SandboxSession {
        id: session.id.to_string(),
        state: state(session.state).into(),
        owner_type: OWNER_TYPE.into(),
        owner_id: session.owner_id.to_string(),
        created_at: timestamp(session.created_at).into(),
        ready_at: session.ready_at.map(timestamp).into(),
        terminated_at: session.terminated_at.map(timestamp).into(),
        timeout_at: session.timeout_at.map(timestamp).into(),
        inbound_enabled: session.inbound,
        outbound_enabled: session.machine.outbound,
        cpu_cores: signed(session.machine.cpu_cores),
        memory_mb: signed(session.machine.memory_mb),
        disk_size_gb: signed(session.machine.disk_gb),
        metadata: session.metadata,
        // A workspace has exactly one project, which clients of an older generation ask for.
        project_id: workspace_id.clone(),
        workspace_id,
        name: session.name,
        tags: session.tags,
        idle_timeout_minutes: session.idle_timeout_minutes.map(signed),
        last_activity_at: timestamp(session.last_activity_at).into(),
        pause_retention: session.pause_retention_ms.map(duration).into(),
        sticky: session.sticky,
        terminal_error: session.terminal_error,
        ..Default::default()
    }
}

pub(super) fn credential(certificate: Certificate) -> wire::SessionCredential {
    wire::SessionCredential { credential: certificate.text, expires_at: timestamp(certificate.expires_at).into() }
}

pub(super) fn execution(execution: Execution) -> wire::CommandExecution {
    let status = match execution.status {
        ExecutionStatus::Running => wire::CommandStatus::Running,
        ExecutionStatus::Succeeded => wire::CommandStatus::Succeeded,
        ExecutionStatus::Failed => wire::CommandStatus::Failed,
        ExecutionStatus::TimedOut => wire::CommandStatus::TimedOut,
    };
    wire::CommandExecution {
        id: execution.id.to_string(),
        session_id: execution.session_id.to_string(),
        command: execution.command,
        args: execution.args,
        status: status.into(),
        exit_code: execution.exit_code,
        duration_ms: i64::try_from(execution.duration_ms).unwrap_or(i64::MAX),
        started_at: timestamp(execution.started_at).into(),
        ended_at: execution.ended_at.map(timestamp).into(),
        ..Default::default()
    }
}

pub(super) fn exit(status: ExitStatus) -> wire::RunExit {
    wire::RunExit {
        exit_code: status.code,
        signal: status.signal,
        timed_out: status.timed_out,
        duration_ms: status.duration_ms,
        reason: status.reason,
        errno: status.errno,
    }
}

/// Signals without a name of their own become TERM.
pub(super) fn signal(signal: wire::run_signal::Sig) -> Signal {
    use wire::run_signal::Sig;
    match signal {
        Sig::SIG_KILL => Signal::Kill,
        Sig::SIG_INT => Signal::Int,
        Sig::SIG_HUP => Signal::Hup,
        Sig::SIG_USR1 => Signal::Usr1,
        Sig::SIG_USR2 => Signal::Usr2,
        Sig::SIG_UNSPECIFIED | Sig::SIG_TERM => Signal::Term,
    }
}

pub(super) fn guest_error(error: GuestError) -> ConnectError {
    Error::new(error.code, error.detail).into()
}

fn signed(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_round_up_and_come_back() {
        let read = |seconds, nanos| milliseconds(&Duration { seconds, nanos, ..Default::default() }, "field");
        assert_eq!(read(0, 1), Ok(1));
        assert_eq!(read(600, 0), Ok(600_000));
        assert_eq!(read(1, 500_000_000), Ok(1_500));
        assert_eq!(milliseconds(&duration(1_234), "field"), Ok(1_234));
        for (seconds, nanos) in [(-1, 0), (0, -1), (0, 1_000_000_000)] {
            assert_eq!(read(seconds, nanos).unwrap_err().code, Code::InvalidArgument);
        }
        assert_eq!(read(i64::MAX, 0), Ok(u64::MAX));
    }

    #[test]
    fn every_state_has_its_number_on_the_wire() {
        for known in SessionState::ALL {
            assert_eq!(state(known) as i32, known as i32);
            assert_eq!(state_filter(state(known).into()), Ok(Some(known)));
        }
        assert_eq!(state_filter(0.into()), Ok(None));
        assert_eq!(state_filter(2.into()).unwrap_err().code, Code::InvalidArgument);
    }
}
