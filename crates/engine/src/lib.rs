//! The domain of Nagaya: sessions, their states, deadlines, quotas and recovery.
//!
//! This crate opens no socket and no file, reads no clock and draws no random number of its own:
//! it reaches the world through the traits in [`ports`], so that all of it runs under the
//! deterministic simulator in `tests/`. It knows no client family and no isolation technology.
//!
//! Start reading at [`session`] (what a session may do when), then `actor.rs` (the task that owns
//! one), then `engine_core.rs` (the subsystems) and `engine.rs` (what callers see).

mod access;
mod actor;
mod backoff;
mod config;
mod deadlines;
mod dispatch;
mod egress;
mod engine;
mod engine_core;
mod errors;
pub mod event_log;
mod executions;
mod explain;
#[cfg(feature = "fake")]
pub mod fake;
mod handle;
mod images;
pub mod model;
mod open;
pub mod ports;
mod previews;
mod query;
mod recovery;
mod registry;
mod requests;
pub mod session;
mod sessions;
mod shared;
mod snapshots;
mod tasks;
pub mod validate;
mod volumes;
mod workspaces;

pub use access::{Caller, check_secret};
pub use config::{EngineConfig, SettingError};
pub use engine::Engine;
pub use explain::{Finding, FindingCode};
pub use open::{OpenSession, PreviewConnection, SshSession};
pub use requests::{
    Certificate, Fork, ListPreviews, ListSessions, ListSnapshots, ListVolumes, NewExecution, NewExposure, NewMount,
    NewPreview, NewSession, NewSnapshot, NewVolume, OpenPreview, PreviewTarget, PreviewUrl, SessionUpdate,
    SnapshotUpdate, Usage, VolumeUpdate, WorkspaceSettingsUpdate,
};
