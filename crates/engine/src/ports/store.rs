//! Records that survive the process. `nagaya-store` implements it on SQLite.

use async_trait::async_trait;
use nagaya_api::ids::{ExecutionId, PreviewId, SessionId, SnapshotId, VolumeId, WorkspaceId};

use crate::model::{
    ApiKey, Event, Execution, Preview, PreviewKind, Session, SessionState, Snapshot, UnixMs, Volume, Workspace,
};

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// There is no space to write to; nothing was changed.
    #[error("store: no space left on the host's disk")]
    Full,
    /// What is on the disk is not what was written.
    #[error("store: {0}")]
    Damaged(String),
    #[error("store: {0}")]
    Failed(String),
}

/// One row to insert or replace.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // most changes are sessions, and none lives long
pub enum Change {
    Workspace(Workspace),
    ApiKey(ApiKey),
    Session(Session),
    Execution(Execution),
    /// Forget an execution, e.g. because newer ones pushed it out.
    ForgetExecution(ExecutionId),
    Snapshot(Snapshot),
    ForgetSnapshot(SnapshotId),
    Volume(Volume),
    ForgetVolume(VolumeId),
    Preview(Preview),
    ForgetPreview(PreviewId),
    /// Appended to its session's events, of which the last `events_max` are kept.
    Event {
        event: Event,
        events_max: u32,
    },
    /// Forgets sessions that ended before that time, with their executions and events: the first ones, at most so many.
    ForgetEnded {
        ended_before: UnixMs,
        sessions_max: u32,
    },
    /// A named secret or setting of the server.
    Setting {
        name: String,
        value: Vec<u8>,
    },
}

/// Which sessions to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct SessionQuery {
    pub workspace_id: Option<WorkspaceId>,
    /// Text because callers may send anything; no match is an empty page.
    pub owner_id: Option<String>,
    pub state: Option<SessionState>,
    /// All of them must be on the session.
    pub tags: Vec<String>,
    pub sticky: Option<bool>,
    /// Also sessions in TERMINATED (TERMINATING ones are always listed).
    pub include_terminated: bool,
    /// Only sessions older than this one, by (created_at, id).
    pub before: Option<(UnixMs, SessionId)>,
    /// Rows at most.
    pub limit: u32,
}

/// Which snapshots to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct SnapshotQuery {
    pub workspace_id: Option<WorkspaceId>,
    pub session_id: Option<SessionId>,
    /// Only those whose session has ended.
    pub dangling: bool,
    /// Only snapshots older than this one, by (created_at, id).
    pub before: Option<(UnixMs, SnapshotId)>,
    /// Rows at most.
    pub limit: u32,
}

/// Which volumes to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct VolumeQuery {
    pub workspace_id: Option<WorkspaceId>,
    /// Only volumes older than this one, by (created_at, id).
    pub before: Option<(UnixMs, VolumeId)>,
    /// Rows at most.
    pub limit: u32,
}

/// Which previews to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct PreviewQuery {
    pub workspace_id: Option<WorkspaceId>,
    pub kind: Option<PreviewKind>,
    /// Only those that lead to this session.
    pub session_id: Option<SessionId>,
    /// Only previews older than this one, by (created_at, id).
    pub before: Option<(UnixMs, PreviewId)>,
    /// Rows at most.
    pub limit: u32,
}

/// Records that survive the process. What `commit` acknowledged is on disk.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Applies all changes, or none.
    async fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError>;
    async fn workspaces(&self) -> Result<Vec<Workspace>, StoreError>;
    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError>;
    async fn setting(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError>;
    async fn session(&self, id: SessionId) -> Result<Option<Session>, StoreError>;
    async fn sessions(&self, query: SessionQuery) -> Result<Vec<Session>, StoreError>;
    /// Every session not in TERMINATED, of every workspace: what recovery starts from.
    async fn live_sessions(&self) -> Result<Vec<Session>, StoreError>;
    async fn execution(&self, id: ExecutionId) -> Result<Option<Execution>, StoreError>;
    /// Executions of a session, oldest first.
    async fn executions(&self, session_id: SessionId) -> Result<Vec<Execution>, StoreError>;
    async fn snapshot(&self, id: SnapshotId) -> Result<Option<Snapshot>, StoreError>;
    async fn snapshots(&self, query: SnapshotQuery) -> Result<Vec<Snapshot>, StoreError>;
    /// Every snapshot of every workspace.
    async fn all_snapshots(&self) -> Result<Vec<Snapshot>, StoreError>;
    async fn volume(&self, id: VolumeId) -> Result<Option<Volume>, StoreError>;
    async fn volumes(&self, query: VolumeQuery) -> Result<Vec<Volume>, StoreError>;
    /// Every volume of every workspace.
    async fn all_volumes(&self) -> Result<Vec<Volume>, StoreError>;
    async fn previews(&self, query: PreviewQuery) -> Result<Vec<Preview>, StoreError>;
    /// Every preview of every workspace.
    async fn all_previews(&self) -> Result<Vec<Preview>, StoreError>;
    /// Up to `limit` events of a session with greater sequences than `after`, in their order.
    async fn events(&self, session_id: SessionId, after: u64, limit: u32) -> Result<Vec<Event>, StoreError>;
}
