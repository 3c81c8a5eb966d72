//! The engine's records in the words of the wire, where the façade for Tenki clients alone speaks of them.

use connectrpc::ConnectError;
use nagaya_api::error::Error;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::Certificate;
use nagaya_engine::model::{Execution, ExecutionStatus, Preview, PreviewKind, Volume, VolumeState};
use nagaya_engine::ports::{ExitReason, ExitStatus, GuestError, Signal};

use crate::rpc::convert::{rfc3339, saturating, timestamp};

/// `attached` anywhere: clients that look at the state only must see that it cannot be deleted.
pub(super) fn volume(volume: Volume, attached: bool) -> wire::Volume {
    let workspace_id = volume.workspace_id.to_string();
    let state = match volume.state {
        VolumeState::Creating => wire::VolumeState::Unspecified,
        VolumeState::Available if attached => wire::VolumeState::InUse,
        VolumeState::Available => wire::VolumeState::Available,
        VolumeState::Deleting => wire::VolumeState::Deleting,
    };
    wire::Volume {
        id: volume.id.to_string(),
        project_id: workspace_id.clone(),
        workspace_id,
        name: volume.name,
        size_bytes: saturating(volume.size_bytes),
        state: state.into(),
        created_at: rfc3339(volume.created_at),
        updated_at: rfc3339(volume.updated_at),
        tags: volume.tags,
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
        reason: match status.reason {
            ExitReason::SessionEnded => format!("{}:sandbox_ended", status.reason.name()),
            reason => reason.name().to_owned(),
        },
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

/// The name that the user chose.
pub(super) fn slug(preview: &Preview) -> Option<String> {
    (preview.kind == PreviewKind::Named).then(|| preview.label.clone())
}
