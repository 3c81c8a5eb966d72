//! What happened to sessions, as it is recorded and told.

use nagaya_api::ids::{ExecutionId, SessionId, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

use super::{Egress, UnixMs};

/// Something that happened to a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub session_id: SessionId,
    /// Counts the session's events from 1. Given by the store; 0 until then.
    pub sequence: u64,
    pub at: UnixMs,
    pub fact: EventKind,
    /// The command that it happened to.
    pub execution_id: Option<ExecutionId>,
}

/// What happened. Stored, and told to users, under these names: none may be renamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EventKind {
    Created(DiskSource),
    Ready {
        after_ms: u64,
    },
    Paused {
        reason: PauseReason,
        /// In words, where nobody asked for it.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        cause: String,
    },
    /// Processes and memory were given up; the disk is kept.
    MemoryReleased {
        reason: DiskOnlyReason,
    },
    PoweredOff,
    Resumed {
        mode: RestoreMode,
        /// Why only the disk was there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<DiskOnlyReason>,
    },
    ResumeFailed {
        cause: String,
    },
    Extended {
        by_ms: u64,
        timeout_at_ms: UnixMs,
    },
    Forked {
        sessions: u32,
    },
    SnapshotCreated {
        snapshot_id: SnapshotId,
    },
    SnapshotFailed {
        snapshot_id: SnapshotId,
        cause: String,
    },
    VolumeAttached {
        volume_id: VolumeId,
        path: String,
    },
    VolumeDetached {
        volume_id: VolumeId,
        path: String,
    },
    EgressChanged {
        /// All that the server lets sandboxes reach.
        unrestricted: bool,
        /// How many are allowed.
        domains: usize,
        networks: usize,
    },
    CommandKilled {
        program: String,
        signal: String,
    },
    CommandTimedOut {
        program: String,
        after_ms: u64,
    },
    CommandNotFound {
        program: String,
    },
    /// Git said more than an answer holds.
    GitFailed {
        operation: String,
        exit_code: i32,
        /// All of it that the server read.
        said: String,
    },
    /// A process was killed because the sandbox's memory was used up.
    OutOfMemory {
        /// The command that was running.
        program: String,
        limit_mb: u32,
    },
    /// What was asked for would have gone beyond a limit.
    Refused {
        request: String,
        limit: String,
    },
    Terminated {
        reason: EndReason,
        #[serde(default, skip_serializing_if = "String::is_empty")]
        cause: String,
    },
    /// Recorded by a later version of the server.
    #[serde(other)]
    Unknown,
}

/// What a session's disk began with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case")]
pub enum DiskSource {
    Fresh,
    Snapshot { snapshot_id: SnapshotId },
    Fork { session_id: SessionId },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    Requested,
    Idle,
    SandboxEnded,
    HostRestarted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreMode {
    Memory,
    ColdBoot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    Requested,
    MaxDuration,
    PauseRetention,
    Failed,
}

/// Why only the disk of a stopped session is kept. Recorded and told under these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskOnlyReason {
    MemoryTimeLimit,
    MemoryPressure,
    HostRestarted,
    SandboxEnded,
    PoweredOff,
}

impl DiskOnlyReason {
    pub const fn name(self) -> &'static str {
        match self {
            Self::MemoryTimeLimit => "memory_time_limit",
            Self::MemoryPressure => "memory_pressure",
            Self::HostRestarted => "host_restarted",
            Self::SandboxEnded => "sandbox_ended",
            Self::PoweredOff => "powered_off",
        }
    }
}

impl std::fmt::Display for DiskOnlyReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl EventKind {
    pub(crate) fn egress(egress: Option<&Egress>) -> Self {
        Self::EgressChanged {
            unrestricted: egress.is_none(),
            domains: egress.map_or(0, |egress| egress.allow_domains.len()),
            networks: egress.map_or(0, |egress| egress.allow_cidrs.len()),
        }
    }

    /// What happened, in one sentence.
    pub fn summary(&self) -> String {
        match self {
            Self::Created(DiskSource::Fresh) => "created with an empty disk".to_owned(),
            Self::Created(DiskSource::Snapshot { snapshot_id }) => format!("created from snapshot {snapshot_id}"),
            Self::Created(DiskSource::Fork { session_id }) => format!("created as a fork of session {session_id}"),
            Self::Ready { after_ms } => format!("ready after {after_ms} ms"),
            Self::Paused { reason: PauseReason::Requested, .. } => "paused by request".to_owned(),
            Self::Paused { reason: PauseReason::Idle, .. } => "paused because nobody used it".to_owned(),
            Self::Paused { cause, .. } => format!("paused because it stopped by itself: {cause}"),
            Self::MemoryReleased { reason } => {
                format!("memory and processes given up, the disk is kept ({reason})")
            }
            Self::PoweredOff => "powered itself off; the disk is kept".to_owned(),
            Self::Resumed { mode: RestoreMode::Memory, .. } => "resumed with its memory".to_owned(),
            Self::Resumed { mode: RestoreMode::ColdBoot, reason } => {
                format!("booted again from its disk ({})", reason.map(DiskOnlyReason::name).unwrap_or_default())
            }
            Self::ResumeFailed { cause } => format!("could not be resumed: {cause}"),
            Self::Extended { by_ms, .. } => format!("deadline moved by {} s", by_ms / 1_000),
            Self::Forked { sessions } => format!("forked into {sessions} sessions"),
            Self::SnapshotCreated { snapshot_id } => format!("snapshot {snapshot_id} is ready"),
            Self::SnapshotFailed { snapshot_id, cause } => format!("snapshot {snapshot_id} failed: {cause}"),
            Self::VolumeAttached { volume_id, path } => format!("volume {volume_id} attached at {path}"),
            Self::VolumeDetached { volume_id, path } => format!("volume {volume_id} detached from {path}"),
            Self::EgressChanged { unrestricted: true, .. } => "outbound destinations are not restricted".to_owned(),
            Self::EgressChanged { domains, networks, .. } => {
                format!("outbound destinations restricted to {domains} names and {networks} networks")
            }
            Self::CommandKilled { program, signal } => format!("{program} was killed by {signal}"),
            Self::CommandTimedOut { program, after_ms } => format!("{program} timed out after {after_ms} ms"),
            Self::CommandNotFound { program } => format!("{program} was not found in the sandbox"),
            Self::GitFailed { operation, exit_code, said } => {
                format!("git {operation} failed (exit_code={exit_code}): {said}")
            }
            Self::OutOfMemory { program, limit_mb } => {
                format!("a process was killed because memory ran out while {program} ran (limit {limit_mb} MB)")
            }
            Self::Refused { request, limit } => format!("{request} was refused: {limit}"),
            Self::Terminated { reason: EndReason::Requested, .. } => "terminated by request".to_owned(),
            Self::Terminated { cause, .. } => format!("terminated: {cause}"),
            Self::Unknown => "something that this version of the server does not know".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_recorded_under_the_names_that_are_told() {
        use DiskOnlyReason::{HostRestarted, MemoryPressure, MemoryTimeLimit, PoweredOff, SandboxEnded};
        for reason in [MemoryTimeLimit, MemoryPressure, HostRestarted, SandboxEnded, PoweredOff] {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }
}
