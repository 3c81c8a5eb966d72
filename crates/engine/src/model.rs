//! The records of the domain, as the store keeps them.

use std::collections::BTreeMap;

use nagaya_api::ids::{ExecutionId, KeyId, SessionId, WorkspaceId};
use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch.
pub type UnixMs = u64;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workspace {
    pub id: WorkspaceId,
    pub name: String,
    pub created_at: UnixMs,
    /// Sessions that may be alive at once; `None` is no limit beyond the server's own.
    pub sessions_max: Option<u32>,
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

    pub fn from_number(number: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as i64 == number)
    }

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

/// The machine a driver is asked for. Everything here can be enforced by every driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub cpu_cores: u32,
    /// MiB.
    pub memory_mb: u32,
    /// GiB.
    pub disk_gb: u32,
    /// False: no packet leaves the sandbox.
    pub outbound: bool,
}

/// One session, from its creation to its last trace. Written before every side effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    pub id: SessionId,
    pub workspace_id: WorkspaceId,
    /// The key that created it.
    pub owner_id: KeyId,
    pub name: String,
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
    pub created_at: UnixMs,
    pub ready_at: Option<UnixMs>,
    pub terminated_at: Option<UnixMs>,
    /// When the session ends by itself; from max_duration at creation, moved by extend.
    pub timeout_at: Option<UnixMs>,
    pub last_activity_at: UnixMs,
    /// Why it ended, when it did not end by request.
    pub terminal_error: String,
    /// The driver it runs on; empty until one is chosen.
    pub driver: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecutionStatus {
    Running = 2,
    Succeeded = 3,
    Failed = 4,
    TimedOut = 5,
}

/// A command started through `ExecuteCommand`: it belongs to the session, not to a stream.
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

/// What a driver promises about the sandboxes it makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guarantees {
    /// "shared kernel", "user-space kernel" or "hardware virtualisation".
    pub isolation: String,
    pub memory_snapshot: bool,
}
