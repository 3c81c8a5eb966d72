//! The engine's records in the words of the wire, and back.

use std::collections::BTreeMap;

use buffa_types::google::protobuf::{Duration, Timestamp};
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{DiskImageId, ParseIdError, SessionId};
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::model::{
    Attachment, AttachmentState, DiskOnlyReason, Durability, Egress, RestoreMode, Resume, Session, SessionState,
    Snapshot, SnapshotKind, SnapshotState, UnixMs,
};

/// The kind of the key that owns sessions. All keys of this server are personal ones: whoever holds one is a user.
pub(crate) const OWNER_TYPE: &str = "USER";

/// The image below every disk, so far.
const BASE_IMAGE: &str = "sandbox";
/// Snapshots hold disks: what is made from one starts with a boot.
const RESTORE_MODE: &str = "COLD_BOOT";

pub(crate) fn timestamp(at: UnixMs) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(at / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(at % 1000).unwrap_or(0) * 1_000_000,
        ..Default::default()
    }
}

pub(crate) fn duration(ms: u64) -> Duration {
    Duration {
        seconds: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(ms % 1000).unwrap_or(0) * 1_000_000,
        ..Default::default()
    }
}

/// A moment as text, where the contract has no type for it.
pub(crate) fn rfc3339(at: UnixMs) -> String {
    match serde_json::to_value(timestamp(at)) {
        Ok(serde_json::Value::String(text)) => text,
        // Years beyond 9999 have no such text.
        _ => String::new(),
    }
}

/// Milliseconds since the epoch of a moment that a caller named.
pub(crate) fn unix_ms(timestamp: &Timestamp, field: &str) -> Result<UnixMs, Error> {
    match (u64::try_from(timestamp.seconds), u64::try_from(timestamp.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
            Ok(seconds.saturating_mul(1000).saturating_add(nanos / 1_000_000))
        }
        _ => Err(Error::new(Code::InvalidArgument, format!("{field} is not a moment after 1970"))),
    }
}

/// Milliseconds, rounded up, so that nothing longer than zero becomes zero.
pub(crate) fn milliseconds(duration: &Duration, field: &str) -> Result<u64, Error> {
    match (u64::try_from(duration.seconds), u32::try_from(duration.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
            Ok(seconds.saturating_mul(1000).saturating_add(nanos.div_ceil(1_000_000).into()))
        }
        _ => Err(Error::new(Code::InvalidArgument, format!("{field} must not be negative"))),
    }
}

/// Reads an id; what is no UUID is refused with the field's name.
pub(crate) fn id<T: std::str::FromStr<Err = ParseIdError>>(text: &str, field: &str) -> Result<T, Error> {
    text.parse().map_err(|_| Error::new(Code::InvalidId, field))
}

/// An id in a field that need not be there. One that is there and empty is no id.
pub(crate) fn optional_id<T: std::str::FromStr<Err = ParseIdError>>(
    text: Option<&str>,
    field: &str,
) -> Result<Option<T>, Error> {
    text.map(|text| id(text, field)).transpose()
}

/// The text of a field in which the contract lets an empty text stand for none.
pub(crate) fn or_none(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

pub(crate) fn state(state: SessionState) -> wire::SessionState {
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
pub(crate) fn state_filter(asked: buffa::EnumValue<wire::SessionState>) -> Result<Option<SessionState>, Error> {
    match asked.as_known() {
        Some(wire::SessionState::Unspecified) => Ok(None),
        known => SessionState::ALL
            .into_iter()
            .find(|of| Some(state(*of)) == known)
            .map(Some)
            .ok_or_else(|| Error::new(Code::InvalidArgument, "state is none of the contract's")),
    }
}

pub(crate) fn session(session: Session) -> wire::SandboxSession {
    let workspace_id = session.workspace_id.to_string();
    // Until it is PAUSED there is nothing that could be used as a snapshot.
    let pause = session.pause.as_ref().filter(|_| session.state != SessionState::Pausing);
    let source_snapshot_id = session.source_snapshot_id.map(|id| id.to_string());
    let metadata = told(&session);
    wire::SandboxSession {
        paused_at: pause.map(|pause| timestamp(pause.paused_at)).into(),
        pause_expires_at: pause.and_then(|pause| pause.expires_at).map(timestamp).into(),
        pause_snapshot_id: pause.map(|pause| pause.snapshot_id.to_string()),
        pause_snapshot: pause_snapshot(&session).map(snapshot).into(),
        last_resume_error: session.last_resume_error,
        volume_attachments: session.attachments.into_iter().map(|each| attachment(session.id, each)).collect(),
        // The contract has two names for it, which clients of different age read.
        snapshot_id: source_snapshot_id.clone(),
        source_snapshot_id,
        source_registry_ref: Some(session.machine.image).filter(|image| !image.is_empty()),
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
        egress: session.machine.egress.map(egress).into(),
        cpu_cores: signed(session.machine.resources.cpus()),
        memory_mb: saturating_32(session.machine.resources.memory_mib()),
        disk_size_gb: saturating_32(session.machine.resources.disk_gib()),
        metadata,
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

/// The disk of a stopped session as the snapshot that it can be used as. It is told with the
/// session, so that every look at a session does not become two.
fn pause_snapshot(session: &Session) -> Option<Snapshot> {
    let pause = session.pause.as_ref().filter(|_| session.state != SessionState::Pausing)?;
    Some(Snapshot {
        id: pause.snapshot_id,
        workspace_id: session.workspace_id,
        session_id: session.id,
        name: session.name.clone(),
        kind: SnapshotKind::Pause,
        state: SnapshotState::Ready,
        durability: Durability::LocalReady,
        tags: Vec::new(),
        created_at: pause.paused_at,
        expires_at: None,
        local_ready_at: Some(pause.paused_at),
        durable_at: None,
        machine: session.machine.clone(),
        env: BTreeMap::new(),
        image_id: DiskImageId::from_uuid(*pause.snapshot_id.as_uuid()),
        copied: false,
        source_stopped_us: 0,
        manifest: String::new(),
        size_bytes: 0,
        stored_bytes: 0,
        failure_reason: String::new(),
        propagation_error: String::new(),
    })
}

pub(crate) fn snapshot(snapshot: Snapshot) -> wire::Snapshot {
    let workspace_id = snapshot.workspace_id.to_string();
    let state = match snapshot.state {
        SnapshotState::Creating => wire::SnapshotState::Creating,
        SnapshotState::Ready => wire::SnapshotState::Ready,
        SnapshotState::Failed => wire::SnapshotState::Failed,
        SnapshotState::Deleting => wire::SnapshotState::Deleting,
    };
    let kind = match snapshot.kind {
        SnapshotKind::User => wire::SnapshotType::User,
        SnapshotKind::Pause => wire::SnapshotType::Pause,
        SnapshotKind::Template => wire::SnapshotType::Template,
    };
    let durability = match snapshot.durability {
        Durability::None => wire::SnapshotDurabilityState::Unspecified,
        Durability::LocalReady => wire::SnapshotDurabilityState::LocalReady,
        Durability::Durable => wire::SnapshotDurabilityState::Durable,
        Durability::PropagationFailed => wire::SnapshotDurabilityState::PropagationFailed,
    };
    wire::Snapshot {
        id: snapshot.id.to_string(),
        session_id: snapshot.session_id.to_string(),
        project_id: workspace_id.clone(),
        workspace_id: Some(workspace_id),
        name: Some(snapshot.name).filter(|name| !name.is_empty()),
        state: state.into(),
        r#type: kind.into(),
        durability_state: durability.into(),
        size_bytes: saturating(snapshot.size_bytes),
        compressed_bytes: saturating(snapshot.stored_bytes),
        base_image_id: BASE_IMAGE.into(),
        created_at: timestamp(snapshot.created_at).into(),
        expires_at: snapshot.expires_at.map(timestamp).into(),
        local_ready_at: snapshot.local_ready_at.map(timestamp).into(),
        tags: snapshot.tags,
        cpu_cores: signed(snapshot.machine.resources.cpus()),
        memory_mb: saturating_32(snapshot.machine.resources.memory_mib()),
        disk_size_gb: saturating_32(snapshot.machine.resources.disk_gib()),
        failure_reason: snapshot.failure_reason,
        propagation_error: snapshot.propagation_error,
        raw_image_available: state == wire::SnapshotState::Ready && kind != wire::SnapshotType::Pause,
        restore_mode: RESTORE_MODE.into(),
        ..Default::default()
    }
}

pub(crate) fn attachment(session_id: SessionId, attachment: Attachment) -> wire::VolumeAttachment {
    let state = match attachment.state {
        AttachmentState::Attaching => "ATTACHING",
        AttachmentState::Attached => "ATTACHED",
        AttachmentState::SyncPending => "SYNC_PENDING",
    };
    wire::VolumeAttachment {
        id: attachment.id.to_string(),
        volume_id: attachment.volume_id.to_string(),
        session_id: session_id.to_string(),
        mount_path: attachment.mount_path,
        readonly: attachment.readonly,
        state: state.into(),
    }
}

pub(crate) fn egress(egress: Egress) -> wire::SessionEgressPolicy {
    wire::SessionEgressPolicy { allow_domains: egress.allow_domains, allow_cidrs: egress.allow_cidrs }
}

/// Metadata key under which the driver of a session is asked for and told; the contract has no field for it.
pub(crate) const DRIVER_KEY: &str = "nagaya_driver";

/// The same for which visits resume a session that is stopped; told of sessions that were made with a value of their own.
pub(crate) const WAKE_ON_VISIT_KEY: &str = "nagaya_wake_on_visit";

/// The same for what stands between the sandbox and the host's kernel, which is only told.
const ISOLATION_KEY: &str = "nagaya_isolation";

/// Metadata with what the contract has no fields for: the driver, what visits do, and what the session was resumed from.
fn told(session: &Session) -> BTreeMap<String, String> {
    let mut metadata = session.metadata.clone();
    metadata.insert(DRIVER_KEY.to_owned(), session.driver.clone());
    if let Some(visits) = session.wake_on_visit {
        metadata.insert(WAKE_ON_VISIT_KEY.to_owned(), visits.name().to_owned());
    }
    if let Some(isolation) = session.isolation {
        metadata.insert(ISOLATION_KEY.to_owned(), isolation.name().to_owned());
    }
    if let Some(Resume { mode, disk_reason }) = session.last_resume {
        let (mode, degraded) = match mode {
            RestoreMode::Memory => ("memory", false),
            RestoreMode::ColdBoot => ("cold_boot", disk_reason != Some(DiskOnlyReason::PoweredOff)),
        };
        metadata.insert("restore_mode".to_owned(), mode.to_owned());
        metadata.insert("restore_degraded".to_owned(), degraded.to_string());
        if let Some(reason) = disk_reason {
            metadata.insert("restore_reason".to_owned(), reason.name().to_owned());
        }
    }
    metadata
}

fn saturating_32(number: u64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn signed(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

pub(crate) fn saturating(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
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
    fn every_state_comes_back_from_the_wire() {
        for known in SessionState::ALL {
            assert_eq!(state_filter(state(known).into()), Ok(Some(known)));
        }
        assert_eq!(state_filter(0.into()), Ok(None));
        assert_eq!(state_filter(2.into()).unwrap_err().code, Code::InvalidArgument);
    }
}
