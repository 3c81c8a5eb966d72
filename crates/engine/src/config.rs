//! What an operator may set about the engine, and how any owner of settings refuses one.

use serde::{Deserialize, Serialize};

use crate::model::WakeOnVisit;

/// A setting that cannot be used: its key with the section, and what is wrong or allowed instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} {problem}")]
pub struct SettingError {
    pub key: &'static str,
    pub problem: String,
}

impl SettingError {
    pub fn new(key: &'static str, problem: impl Into<String>) -> Self {
        Self { key, problem: problem.into() }
    }

    /// Refuses the first setting that is 0.
    pub fn unless_positive(settings: &[(&'static str, u64)]) -> Result<(), Self> {
        match settings.iter().find(|(_, value)| *value == 0) {
            Some((key, _)) => Err(Self::new(key, "must not be 0")),
            None => Ok(()),
        }
    }
}

/// Sessions: how many there may be, how long they live, and what may be said about them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EngineConfig {
    /// Sessions that may be alive at once on this server, over all workspaces.
    pub sessions_max: u32,
    /// Sandboxes being created at once; further ones wait, so that a burst does not thrash.
    pub creates_concurrent_max: u32,
    /// How long a session certificate opens the data plane.
    pub certificate_ttl_ms: u64,
    /// Longest time that may lie between a session's creation and its end by deadline.
    pub max_duration_max_ms: u64,
    /// Idle time after which sessions pause that do not say so themselves. Default: they never do.
    pub idle_timeout_default_minutes: Option<u32>,
    /// How long paused sessions are kept when neither they nor their workspace say so. Default: for ever.
    pub pause_retention_default_ms: Option<u64>,
    /// How long a paused session may keep its memory; then only its disk is kept.
    pub pause_in_memory_max_ms: Option<u64>,
    /// Which stopped sessions are resumed when somebody wants to reach them from outside, unless they were made with a value of their own.
    pub wake_on_visit: WakeOnVisit,
    /// How long somebody who reaches for a session waits until it runs.
    pub wake_timeout_ms: u64,
    /// Previews of this server, over all workspaces.
    pub previews_max: u32,
    /// Previews that lead to one session.
    pub exposed_ports_max: u32,
    /// How long a private preview stays open that nobody looks at, unless whoever opened it said so.
    pub private_preview_ttl_ms: u64,
    /// Longest life of a viewer token.
    pub viewer_token_ttl_max_ms: u64,
    /// Sessions made by one fork.
    pub forks_max: u32,
    /// Volumes in one session.
    pub volumes_per_session_max: u32,
    /// Executions remembered per live session; a new one pushes out the oldest finished one.
    pub executions_per_session_max: u32,
    /// Events kept per session; a new one pushes out the oldest.
    pub events_per_session_max: u32,
    /// How long a session that has ended is remembered, with its events. Ends of others push it out then.
    pub ended_sessions_kept_ms: u64,
    /// How long activity may stay in memory before it is written to the store.
    pub activity_flush_ms: u64,
    /// Pause before a failed step is tried again; doubles up to `retry_max_ms`.
    pub retry_first_ms: u64,
    /// Longest pause before that.
    pub retry_max_ms: u64,
    /// How long the end of a session waits for what its driver is doing for it; then it ends the sandbox all the same.
    pub step_timeout_ms: u64,
    /// How long a start waits for sandboxes that do not answer, after the last one that did. They are tried again later.
    pub recovery_patience_ms: u64,
    /// Names and values of a session's or command's environment together.
    pub env_bytes_max: usize,
    /// Keys and values of a session's metadata together.
    pub metadata_bytes_max: usize,
    /// Arguments of one command together.
    pub argv_bytes_max: usize,
    /// Public keys that open one session over SSH.
    pub ssh_authorized_keys_max: usize,
    /// Remove sandboxes and volumes that no record names, not even as ended. For one start, and never from a file.
    #[serde(skip)]
    pub discard_unrecorded: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            sessions_max: 1_000,
            creates_concurrent_max: 16,
            certificate_ttl_ms: 600_000,
            max_duration_max_ms: 365 * 24 * 3_600_000,
            idle_timeout_default_minutes: None,
            pause_retention_default_ms: None,
            pause_in_memory_max_ms: Some(24 * 3_600_000),
            wake_on_visit: WakeOnVisit::Idle,
            wake_timeout_ms: 60_000,
            previews_max: 4_096,
            exposed_ports_max: 32,
            private_preview_ttl_ms: 3_600_000,
            viewer_token_ttl_max_ms: 24 * 3_600_000,
            forks_max: 100,
            volumes_per_session_max: 16,
            executions_per_session_max: 100,
            events_per_session_max: 1_000,
            ended_sessions_kept_ms: 30 * 24 * 3_600_000,
            activity_flush_ms: 30_000,
            retry_first_ms: 100,
            retry_max_ms: 30_000,
            step_timeout_ms: 60_000,
            recovery_patience_ms: 3_000,
            env_bytes_max: 128 * 1024,
            metadata_bytes_max: 64 * 1024,
            argv_bytes_max: 1024 * 1024,
            ssh_authorized_keys_max: 32,
            discard_unrecorded: false,
        }
    }
}

impl EngineConfig {
    /// Refuses what no server can work with.
    pub fn validate(&self) -> Result<(), SettingError> {
        SettingError::unless_positive(&[
            ("engine.forks_max", self.forks_max.into()),
            ("engine.sessions_max", self.sessions_max.into()),
            ("engine.certificate_ttl_ms", self.certificate_ttl_ms),
            ("engine.wake_timeout_ms", self.wake_timeout_ms),
            ("engine.previews_max", self.previews_max.into()),
            ("engine.exposed_ports_max", self.exposed_ports_max.into()),
            ("engine.private_preview_ttl_ms", self.private_preview_ttl_ms),
            ("engine.viewer_token_ttl_max_ms", self.viewer_token_ttl_max_ms),
        ])
    }
}
