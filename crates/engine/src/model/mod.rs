//! The records of the domain, as the store keeps them.

mod event;
mod limit;
mod machine;

use std::collections::BTreeMap;

use nagaya_api::ids::{
    AttachmentId, DiskImageId, ExecutionId, KeyId, PreviewId, SessionId, SnapshotId, VolumeId, WorkspaceId,
};
use serde::{Deserialize, Serialize};

pub use event::{DiskOnlyReason, DiskSource, EndReason, Event, EventKind, PauseReason, RestoreMode};
pub use limit::{Limit, Resource};
pub use machine::{
    Capabilities, DiskOrigin, ImageDigest, ImageUser, Isolation, Layer, Machine, Resources, RootImage, SandboxSpec,
};

/// Milliseconds since the Unix epoch.
pub type UnixMs = u64;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workspace {
    pub id: WorkspaceId,
    pub name: String,
    pub created_at: UnixMs,
    pub settings: WorkspaceSettings,
}

/// What a workspace may use and how long it keeps things. `None` is no limit beyond the server's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkspaceSettings {
    /// How long paused sessions are kept that do not say so themselves.
    pub pause_retention_ms: Option<u64>,
    /// How long snapshots are kept that do not say so themselves.
    pub snapshot_retention_ms: Option<u64>,
    pub snapshots_max: Option<u32>,
    pub templates_max: Option<u32>,
    pub volumes_max: Option<u32>,
    /// Stored bytes of snapshots and sizes of volumes together.
    pub bytes_max: Option<u64>,
    /// Sessions that may be alive at once; paused ones do not count.
    pub sessions_max: Option<u32>,
    pub sticky_sessions_max: Option<u32>,
    pub preview_urls_max: Option<u32>,
}

/// An API key. The secret itself is stored nowhere, only its BLAKE3 hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    pub id: KeyId,
    pub workspace_id: WorkspaceId,
    pub secret_hash: [u8; 32],
    pub created_at: UnixMs,
}

/// Where a session is in its life; see `session.rs` for the diagram. The numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SessionState {
    Creating = 1,
    Running = 3,
    Paused = 4,
    Terminating = 5,
    Terminated = 6,
    Pausing = 7,
    Resuming = 8,
    UserShutdown = 9,
}

impl SessionState {
    pub const ALL: [Self; 8] = [
        Self::Creating,
        Self::Running,
        Self::Paused,
        Self::Terminating,
        Self::Terminated,
        Self::Pausing,
        Self::Resuming,
        Self::UserShutdown,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Creating => "CREATING",
            Self::Running => "RUNNING",
            Self::Paused => "PAUSED",
            Self::Terminating => "TERMINATING",
            Self::Terminated => "TERMINATED",
            Self::Pausing => "PAUSING",
            Self::Resuming => "RESUMING",
            Self::UserShutdown => "USER_SHUTDOWN",
        }
    }

    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Terminating | Self::Terminated)
    }
}

/// Destinations a sandbox may reach. What the server denies to all sandboxes stays denied.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Egress {
    /// Lower case, without a dot at the end; `*.example.com` is every name below it.
    pub allow_domains: Vec<String>,
    /// IPv4 networks in their shortest form, such as `1.2.3.0/24`.
    pub allow_cidrs: Vec<String>,
}

/// Why a connection was denied to a sandbox that had too many: [`Connection::denied`].
pub const CONNECTIONS_USED_UP: &str = "the sandbox has as many connections as it may have at a time";

/// A connection that a sandbox made, or tried to make, to the outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    pub at: UnixMs,
    /// `ADDRESS:PORT`; of an ICMP message the address. Empty where only a name was asked for.
    pub destination: String,
    /// `tcp`, `udp`, `icmp`, `dns`, or the protocol's number.
    pub protocol: String,
    /// The name that the sandbox found the address by, where that is known.
    pub name: String,
    /// Sent by the sandbox, with the headers of packets.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Empty: it was let through. Otherwise why not, in words for the user.
    pub denied: String,
}

/// One session, from its creation to its last trace. Written before every side effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    pub id: SessionId,
    pub workspace_id: WorkspaceId,
    /// The key that created it.
    pub owner_id: KeyId,
    pub name: String,
    /// No other session of the workspace that has not ended and says so too has this name.
    #[serde(default)]
    pub name_is_unique: bool,
    pub state: SessionState,
    pub machine: Machine,
    /// Whether ports of the sandbox may be reached from outside.
    pub inbound: bool,
    /// Environment of every command, under the command's own.
    pub env: BTreeMap<String, String>,
    pub metadata: BTreeMap<String, String>,
    /// Lower case, no duplicates, in the order given.
    pub tags: Vec<String>,
    pub ssh_authorized_keys: Vec<String>,
    pub sticky: bool,
    /// Minutes; `Some(0)` is never.
    pub idle_timeout_minutes: Option<u32>,
    pub pause_retention_ms: Option<u64>,
    /// Which visits resume it while it is stopped; `None`: as the server does by default.
    #[serde(default)]
    pub wake_on_visit: Option<WakeOnVisit>,
    pub created_at: UnixMs,
    pub ready_at: Option<UnixMs>,
    pub terminated_at: Option<UnixMs>,
    /// When the session ends by itself; from max_duration at creation, moved by extend.
    pub timeout_at: Option<UnixMs>,
    pub last_activity_at: UnixMs,
    /// From TERMINATING on.
    #[serde(default)]
    pub end_reason: Option<EndReason>,
    /// Why it ended, in words, when it did not end by request.
    pub terminal_error: String,
    /// What was used up, where that kept it from being created.
    #[serde(default)]
    pub exhausted: Option<Limit>,
    /// What the driver promised when it was created; `None` in records of servers that had one driver.
    #[serde(default)]
    pub isolation: Option<Isolation>,
    /// The name of the driver it runs on.
    pub driver: String,
    /// The snapshot it was made from.
    pub source_snapshot_id: Option<SnapshotId>,
    /// The disk image it is made from, while it is CREATING: a fork's, or what its snapshot is restored to.
    pub source_image_id: Option<DiskImageId>,
    /// While it is PAUSING, PAUSED, RESUMING or USER_SHUTDOWN.
    pub pause: Option<Pause>,
    /// Why it is PAUSED although somebody wanted it to run; empty otherwise.
    pub last_resume_error: String,
    /// What it was resumed from last; `None`: it never was.
    #[serde(default)]
    pub last_resume: Option<Resume>,
    /// Volumes in it, or on their way in or out. One that is out is not here any more.
    pub attachments: Vec<Attachment>,
}

/// What a stopped session went on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    pub mode: RestoreMode,
    /// Why only its disk had been kept.
    pub disk_reason: Option<DiskOnlyReason>,
}

/// How a stopped session is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    pub paused_at: UnixMs,
    /// When the session ends unless it is resumed; `None` is never.
    pub expires_at: Option<UnixMs>,
    /// The id under which its disk can be used as a snapshot while it is paused.
    pub snapshot_id: SnapshotId,
    /// Processes and memory are kept, frozen. False: only the disk is.
    pub in_memory: bool,
    /// Why only the disk is kept; `None` while `in_memory`.
    #[serde(default, with = "disk_only_reason")]
    pub disk_reason: Option<DiskOnlyReason>,
    /// It was paused because nobody used it; whoever wants to reach it may wake it.
    #[serde(default)]
    pub idle: bool,
}

/// In records no reason is an empty text.
mod disk_only_reason {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::model::DiskOnlyReason;

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Recorded {
        Reason(DiskOnlyReason),
        Text(String),
    }

    pub fn serialize<S: Serializer>(reason: &Option<DiskOnlyReason>, to: S) -> Result<S::Ok, S::Error> {
        reason.map(DiskOnlyReason::name).unwrap_or_default().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<DiskOnlyReason>, D::Error> {
        match Recorded::deserialize(from)? {
            Recorded::Reason(reason) => Ok(Some(reason)),
            Recorded::Text(text) if text.is_empty() => Ok(None),
            Recorded::Text(text) => Err(serde::de::Error::custom(format!("no reason is called {text:?}"))),
        }
    }
}

/// Which stopped sessions a visit from outside resumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum WakeOnVisit {
    /// None of them.
    Never,
    /// Those that were paused because nobody used them: what was paused by request stays paused.
    Idle,
    /// All of them.
    Always,
}

impl WakeOnVisit {
    pub const ALL: [Self; 3] = [Self::Never, Self::Idle, Self::Always];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Idle => "idle",
            Self::Always => "always",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|of| of.name() == name)
    }

    /// Whether a visit resumes what is stopped like this.
    pub const fn wakes(self, pause: &Pause) -> bool {
        match self {
            Self::Never => false,
            Self::Idle => pause.idle,
            Self::Always => true,
        }
    }
}

/// A volume in a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub id: AttachmentId,
    pub volume_id: VolumeId,
    /// Absolute and normal: no `..`, no empty parts, not `/`.
    pub mount_path: String,
    pub readonly: bool,
    pub state: AttachmentState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AttachmentState {
    /// Being mounted, or to be mounted when the sandbox boots.
    Attaching,
    Attached,
    /// Being unmounted and written back; nobody else can have the volume yet.
    SyncPending,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotKind {
    User = 1,
    /// The disk of a paused session; gone when that is resumed or ends.
    Pause = 2,
    Template = 3,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotState {
    Creating = 1,
    Ready = 2,
    Failed = 3,
    Deleting = 4,
}

/// Where a snapshot's bytes are safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Durability {
    /// Nowhere yet.
    None = 0,
    /// On this machine.
    LocalReady = 1,
    /// In the blob store.
    Durable = 2,
    /// The blob store does not take it; it is tried again.
    PropagationFailed = 3,
}

/// A point in the life of a disk, and what is needed to start a sandbox from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub workspace_id: WorkspaceId,
    /// The session it was taken from.
    pub session_id: SessionId,
    pub name: String,
    pub kind: SnapshotKind,
    pub state: SnapshotState,
    pub durability: Durability,
    pub tags: Vec<String>,
    pub created_at: UnixMs,
    pub expires_at: Option<UnixMs>,
    pub local_ready_at: Option<UnixMs>,
    pub durable_at: Option<UnixMs>,
    /// What sessions made from it inherit.
    pub machine: Machine,
    pub env: BTreeMap<String, String>,
    /// The copy of the disk that its bytes are read from while it is CREATING.
    pub image_id: DiskImageId,
    /// The disk had been copied: after a crash the rest can be done from the copy.
    pub copied: bool,
    /// How long writes to the source's disk were frozen, microseconds.
    pub source_stopped_us: u64,
    /// Digest of the manifest in the blob store; empty until READY, and for pauses.
    pub manifest: String,
    /// Bytes of the disk that are not holes.
    pub size_bytes: u64,
    /// Bytes that the blob store has because of it, before sharing with other snapshots.
    pub stored_bytes: u64,
    pub failure_reason: String,
    pub propagation_error: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeState {
    Creating = 0,
    Available = 1,
    Deleting = 2,
}

/// A disk that outlives sandboxes. Who has it is in the sessions' records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub id: VolumeId,
    pub workspace_id: WorkspaceId,
    pub name: String,
    pub size_bytes: u64,
    /// While it is being grown: the size to reach.
    pub growing_to_bytes: Option<u64>,
    pub state: VolumeState,
    pub tags: Vec<String>,
    pub created_at: UnixMs,
    pub updated_at: UnixMs,
}

/// The numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PreviewKind {
    /// A port of a session, under a name that nobody can guess; goes with the session.
    Exposed = 1,
    /// Under a name of the user's choice (its slug); outlives sessions.
    Named = 2,
    /// Like `Exposed`, but opens for holders of a viewer token only.
    Private = 3,
}

/// The numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PreviewState {
    /// Recorded, but nobody was told of it yet: the next start removes it.
    Making = 0,
    Live = 1,
}

/// Where a preview leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    pub session_id: SessionId,
    pub port: u16,
}

/// A name under which a port of a sandbox is reached from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preview {
    pub id: PreviewId,
    pub workspace_id: WorkspaceId,
    /// The key that made it.
    pub owner_id: KeyId,
    pub kind: PreviewKind,
    pub state: PreviewState,
    /// One DNS label; no other preview of the server has it. Of a named preview its slug.
    pub label: String,
    /// Always present but for named ones. Its session may have ended.
    pub binding: Option<Binding>,
    /// When the binding ends, and with it what is not named; `None` is with the session.
    pub expires_at: Option<UnixMs>,
    /// The port that the ingress has given it, kept so that its URL stays the same; 0 for none.
    #[serde(alias = "edge_port")]
    pub ingress_port: u16,
    pub created_at: UnixMs,
    pub updated_at: UnixMs,
    /// The last visit, to the minute.
    pub last_accessed_at: Option<UnixMs>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecutionStatus {
    Running = 2,
    Succeeded = 3,
    Failed = 4,
    TimedOut = 5,
}

/// A command that belongs to the session, not to the stream of whoever started it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Execution {
    pub id: ExecutionId,
    pub session_id: SessionId,
    pub command: String,
    pub args: Vec<String>,
    pub status: ExecutionStatus,
    pub exit_code: i32,
    pub duration_ms: u64,
    pub started_at: UnixMs,
    pub ended_at: Option<UnixMs>,
}
