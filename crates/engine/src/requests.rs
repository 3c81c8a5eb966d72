//! What callers hand to the engine, and the plain data that they get back.

use std::collections::BTreeMap;

use nagaya_api::ids::{SessionId, SnapshotId, VolumeId, WorkspaceId};

use crate::model::{Binding, Egress, Preview, Resources, SessionState, UnixMs, WakeOnVisit};

/// A session to create. Absent values are those of the snapshot, else defaults.
#[derive(Debug, Clone, Default)]
pub struct NewSession {
    pub name: String,
    /// It is to be found by its name, which must not be empty: refused while another session of the workspace that was
    /// asked for like this has it and has not ended.
    pub name_is_unique: bool,
    /// The image it stands on, as people name it; absent: the snapshot's, else the server's default.
    pub image: Option<String>,
    /// The driver it runs on; absent: the server's default.
    pub driver: Option<String>,
    pub cpu_millis: Option<u32>,
    pub memory_bytes: Option<u64>,
    pub disk_bytes: Option<u64>,
    /// What counts where neither the fields above nor a snapshot say anything.
    pub default_resources: Resources,
    pub env: BTreeMap<String, String>,
    pub metadata: BTreeMap<String, String>,
    pub tags: Vec<String>,
    /// `None`: it lives until it is terminated. Zero is refused.
    pub max_duration_ms: Option<u64>,
    pub inbound: bool,
    pub outbound: bool,
    /// The only destinations it reaches; absent: the snapshot's, else all that the server lets sandboxes reach.
    pub egress: Option<Egress>,
    pub ssh_authorized_keys: Vec<String>,
    pub sticky: bool,
    pub idle_timeout_minutes: Option<u32>,
    pub pause_retention_ms: Option<u64>,
    /// Which visits resume it while it is stopped; absent: the server's default.
    pub wake_on_visit: Option<WakeOnVisit>,
    /// Its disk starts as a copy of this one.
    pub snapshot_id: Option<SnapshotId>,
    /// Volumes that are there from the start.
    pub mounts: Vec<NewMount>,
    /// Must be the caller's own where given.
    pub workspace_id: Option<WorkspaceId>,
}

/// A volume to put into a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMount {
    pub volume_id: VolumeId,
    /// Absolute; see `validate::mount_path`.
    pub path: String,
    pub readonly: bool,
}

/// A snapshot to take.
#[derive(Debug, Clone, Default)]
pub struct NewSnapshot {
    pub name: String,
    /// `None`: the workspace's retention decides.
    pub expires_at: Option<UnixMs>,
    /// Answer when it is READY or FAILED; otherwise when it is recorded.
    pub wait: bool,
}

/// Which snapshots to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct ListSnapshots {
    /// Must be the caller's own where given.
    pub workspace_id: Option<WorkspaceId>,
    /// Only those taken from this session.
    pub session_id: Option<SessionId>,
    /// Only those whose session has ended.
    pub dangling: bool,
    /// 0 is the default size.
    pub page_size: u32,
    /// Empty for the first page.
    pub page_token: String,
}

/// Changes to a snapshot; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct SnapshotUpdate {
    pub name: Option<String>,
    /// `Some(None)`: it does not expire any more.
    pub expires_at: Option<Option<UnixMs>>,
    /// An empty list removes all tags.
    pub tags: Option<Vec<String>>,
}

/// A volume to make.
#[derive(Debug, Clone, Default)]
pub struct NewVolume {
    pub name: String,
    pub size_bytes: u64,
    /// Must be the caller's own where given.
    pub workspace_id: Option<WorkspaceId>,
}

/// Which volumes to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct ListVolumes {
    /// Must be the caller's own where given.
    pub workspace_id: Option<WorkspaceId>,
    /// 0 is the default size.
    pub page_size: u32,
    /// Empty for the first page.
    pub page_token: String,
}

/// Changes to a volume; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct VolumeUpdate {
    pub name: Option<String>,
    /// An empty list removes all tags.
    pub tags: Option<Vec<String>>,
}

/// Sessions to make from the disk of another one.
#[derive(Debug, Clone, Default)]
pub struct Fork {
    pub count: u32,
    /// All of them get this name; `None`: `<name>-fork-<n>`, n from 1.
    pub name: Option<String>,
}

/// Changes to a workspace's settings; `None` stays, `Some(None)` takes the limit away.
#[derive(Debug, Clone, Default)]
pub struct WorkspaceSettingsUpdate {
    pub pause_retention_ms: Option<Option<u64>>,
    pub snapshot_retention_ms: Option<Option<u64>>,
    pub snapshots_max: Option<Option<u32>>,
    pub templates_max: Option<Option<u32>>,
    pub volumes_max: Option<Option<u32>>,
    pub bytes_max: Option<Option<u64>>,
    pub sessions_max: Option<Option<u32>>,
    pub sticky_sessions_max: Option<Option<u32>>,
    pub preview_urls_max: Option<Option<u32>>,
}

/// Changes to a session; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct SessionUpdate {
    pub name: Option<String>,
    /// Whether it is found by its name; see [`NewSession::name_is_unique`].
    pub name_is_unique: Option<bool>,
    /// An empty list removes all tags.
    pub tags: Option<Vec<String>>,
    pub sticky: Option<bool>,
    /// Counted from the session's creation: when that is past, the session ends now.
    pub max_duration_ms: Option<u64>,
    /// Replaces all of them; a list without any is refused.
    pub ssh_authorized_keys: Option<Vec<String>>,
    /// `Some(None)`: as the server does by default.
    pub wake_on_visit: Option<Option<WakeOnVisit>>,
}

/// Which sessions to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct ListSessions {
    /// Must be the caller's own where given.
    pub workspace_id: Option<WorkspaceId>,
    pub owner_id: Option<String>,
    pub state: Option<SessionState>,
    /// All of them must be on the session.
    pub tags: Vec<String>,
    pub sticky: Option<bool>,
    pub include_terminated: bool,
    /// 0 is the default size.
    pub page_size: u32,
    /// Empty for the first page.
    pub page_token: String,
}

/// A command to start with [`Engine::execute`].
#[derive(Debug, Clone, Default)]
pub struct NewExecution {
    pub command: String,
    pub args: Vec<String>,
    /// Over the session's own environment.
    pub env: BTreeMap<String, String>,
    /// 0 is no limit.
    pub timeout_ms: u64,
}

/// A port to make reachable from outside.
#[derive(Debug, Clone, Default)]
pub struct NewExposure {
    /// Not 0.
    pub port: u16,
    /// `None`: with the session.
    pub expires_at: Option<UnixMs>,
    /// The named preview to reach it under, which is made if need be; `None`: a name that nobody can guess.
    pub slug: Option<String>,
}

/// A named preview to make.
#[derive(Debug, Clone, Default)]
pub struct NewPreview {
    pub slug: String,
    /// Where it leads; it may be bound later.
    pub binding: Option<Binding>,
    /// When that ends.
    pub expires_at: Option<UnixMs>,
    /// Must be the caller's own where given.
    pub workspace_id: Option<WorkspaceId>,
}

/// Which named previews to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct ListPreviews {
    /// Must be the caller's own where given.
    pub workspace_id: Option<WorkspaceId>,
    /// Only those that lead to this session.
    pub session_id: Option<SessionId>,
    /// 0 is the default size.
    pub page_size: u32,
    /// Empty for the first page.
    pub page_token: String,
}

/// A preview, and what a browser opens to see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviewUrl {
    pub preview: Preview,
    /// Without a slash at its end. Empty while the ingress cannot make it reachable, which it keeps trying.
    pub url: String,
}

/// A private preview, open for whoever has the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenPreview {
    pub preview: Preview,
    /// Without the token.
    pub url: String,
    pub viewer_token: String,
    /// When the token ends, unless the preview is kept open by visits and touches.
    pub expires_at: UnixMs,
}

/// Where a preview's token leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviewTarget {
    pub preview: Preview,
    /// Nothing can answer there now: it is not bound, or its session does not run.
    pub is_offline: bool,
}

/// Opens the data plane of one session until it expires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    pub text: String,
    pub expires_at: UnixMs,
}

/// What the live sessions of a workspace use. Paused ones do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub active_sessions: u64,
    /// The smaller of the workspace's and the server's limit.
    pub sessions_max: Option<u64>,
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
}
