//! What a server tells about a session.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use nagaya_api::tenki::v1;
use serde::Serialize;

use crate::constants::{DRIVER_KEY, ISOLATION_KEY, WAKE_ON_VISIT_KEY};
use crate::wire::{self, wire_enum};

wire_enum! {
    /// Where a session is in its life.
    SessionState, v1::SessionState {
        Creating = "creating",
        /// Ready for use.
        Running = "running",
        /// Its processes or its disk are kept; it takes no work until it is resumed.
        Paused = "paused",
        Terminating = "terminating",
        Terminated = "terminated",
        Pausing = "pausing",
        Resuming = "resuming",
        /// The sandbox powered itself off; its disk is kept, as while paused.
        UserShutdown = "user_shutdown",
    }
}

wire_enum! {
    /// What became of a template's start command.
    RuntimeState, v1::TemplateRuntimeState {
        /// There is none.
        Unspecified = "none",
        Starting = "starting",
        Ready = "ready",
        Failed = "failed",
        Stopped = "stopped",
    }
}

/// A volume in a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VolumeAttachment {
    pub id: String,
    pub volume_id: String,
    pub session_id: String,
    pub mount_path: String,
    pub read_only: bool,
    /// `ATTACHED`, `SYNC_PENDING` or another word of the server.
    pub state: String,
}

/// The only destinations that a session reaches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct EgressPolicy {
    /// Names, with `*.` in front for everything below one.
    pub allow_domains: Vec<String>,
    /// Addresses or networks such as `192.0.2.0/24`.
    pub allow_cidrs: Vec<String>,
}

/// A session as it was when the server was last asked.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SessionInfo {
    pub id: String,
    pub name: String,
    pub state: SessionState,
    pub owner_type: String,
    pub owner_id: String,
    pub workspace_id: String,
    pub inbound_enabled: bool,
    pub outbound_enabled: bool,
    /// `None`: all that the server lets sandboxes reach.
    pub egress: Option<EgressPolicy>,
    pub cpu_cores: u32,
    /// MiB.
    pub memory_mb: u32,
    /// GiB.
    pub disk_size_gb: u32,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub created_at: Option<SystemTime>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub ready_at: Option<SystemTime>,
    /// When it ends by itself.
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub timeout_at: Option<SystemTime>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub last_activity_at: Option<SystemTime>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub paused_at: Option<SystemTime>,
    /// When it ends if it is not resumed.
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub pause_expires_at: Option<SystemTime>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub terminated_at: Option<SystemTime>,
    /// How long it may be idle until it is paused; `None`: for ever.
    #[serde(serialize_with = "wire::serialize_optional_span")]
    pub idle_timeout: Option<Duration>,
    #[serde(serialize_with = "wire::serialize_optional_span")]
    pub pause_retention: Option<Duration>,
    /// Whether it is resumed by use and kept while paused.
    pub sticky: bool,
    pub metadata: BTreeMap<String, String>,
    /// The name of the driver that it runs on; empty where the server does not tell.
    pub driver: String,
    /// What stands between it and the host's kernel, such as `shared kernel`; empty where the server does not tell.
    pub isolation: String,
    /// Which visits resume it while it is stopped: `never`, `idle` or `always`; `None`: as the server does by default.
    pub wake_on_visit: Option<String>,
    pub tags: Vec<String>,
    pub volumes: Vec<VolumeAttachment>,
    pub pause_snapshot_id: Option<String>,
    pub source_snapshot_id: Option<String>,
    pub source_template_id: Option<String>,
    pub source_registry_ref: Option<String>,
    /// Why the last attempt to resume it failed; empty when there was no such attempt.
    pub last_resume_error: String,
    /// Why it ended by itself; empty otherwise.
    pub terminal_error: String,
    pub runtime_state: RuntimeState,
    pub runtime_error: Option<String>,
}

impl SessionInfo {
    /// Whether it takes commands and files now.
    pub fn is_ready(&self) -> bool {
        self.state == SessionState::Running
    }

    /// Whether it has ended or is about to.
    pub fn is_terminal(&self) -> bool {
        matches!(self.state, SessionState::Terminating | SessionState::Terminated)
    }
}

impl VolumeAttachment {
    pub(crate) fn of_wire(attachment: v1::VolumeAttachment) -> Self {
        Self {
            id: attachment.id,
            volume_id: attachment.volume_id,
            session_id: attachment.session_id,
            mount_path: attachment.mount_path,
            read_only: attachment.readonly,
            state: attachment.state,
        }
    }
}

impl EgressPolicy {
    pub(crate) fn of_wire(policy: v1::SessionEgressPolicy) -> Self {
        Self { allow_domains: policy.allow_domains, allow_cidrs: policy.allow_cidrs }
    }

    pub(crate) fn into_wire(self) -> v1::SessionEgressPolicy {
        v1::SessionEgressPolicy { allow_domains: self.allow_domains, allow_cidrs: self.allow_cidrs }
    }
}

impl SessionInfo {
    pub(crate) fn of_wire(mut session: v1::SandboxSession) -> Self {
        let idle_minutes: Option<u64> = session.idle_timeout_minutes.map(wire::unsigned);
        Self {
            id: session.id,
            name: session.name,
            state: SessionState::of_wire(session.state),
            owner_type: session.owner_type,
            owner_id: session.owner_id,
            workspace_id: session.workspace_id,
            inbound_enabled: session.inbound_enabled,
            outbound_enabled: session.outbound_enabled,
            egress: session.egress.into_option().map(EgressPolicy::of_wire),
            cpu_cores: wire::unsigned(session.cpu_cores),
            memory_mb: wire::unsigned(session.memory_mb),
            disk_size_gb: wire::unsigned(session.disk_size_gb),
            created_at: wire::time(session.created_at),
            ready_at: wire::time(session.ready_at),
            timeout_at: wire::time(session.timeout_at),
            last_activity_at: wire::time(session.last_activity_at),
            paused_at: wire::time(session.paused_at),
            pause_expires_at: wire::time(session.pause_expires_at),
            terminated_at: wire::time(session.terminated_at),
            idle_timeout: idle_minutes.filter(|minutes| *minutes > 0).map(|minutes| Duration::from_secs(60 * minutes)),
            pause_retention: wire::span(session.pause_retention),
            sticky: session.sticky,
            driver: session.metadata.remove(DRIVER_KEY).unwrap_or_default(),
            isolation: session.metadata.remove(ISOLATION_KEY).unwrap_or_default(),
            wake_on_visit: session.metadata.remove(WAKE_ON_VISIT_KEY),
            metadata: session.metadata,
            tags: session.tags,
            volumes: session.volume_attachments.into_iter().map(VolumeAttachment::of_wire).collect(),
            pause_snapshot_id: session.pause_snapshot_id,
            source_snapshot_id: session.source_snapshot_id.or(session.snapshot_id),
            source_template_id: session.source_template_id,
            source_registry_ref: session.source_registry_ref,
            last_resume_error: session.last_resume_error,
            terminal_error: session.terminal_error,
            runtime_state: RuntimeState::of_wire(session.runtime_state),
            runtime_error: session.runtime_error,
        }
    }
}
