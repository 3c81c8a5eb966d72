//! The domain of Nagaya: sessions, their states, deadlines, quotas and recovery.
//!
//! This crate opens no socket and no file, reads no clock and draws no random number of its own:
//! it reaches the world through the traits in [`ports`], so that all of it runs under the
//! deterministic simulator in `tests/`. It knows no client family and no isolation technology.
//!
//! Start reading at [`session`] (what a session may do when), then `actor.rs` (the task that owns
//! one), then `engine.rs` (what callers see).

mod access;
mod actor;
mod calls;
mod config;
mod creation;
mod deadlines;
mod egress;
mod engine;
pub mod events;
mod executions;
mod explain;
#[cfg(feature = "fake")]
pub mod fake;
mod inner;
mod live;
pub mod model;
pub mod ports;
mod previews;
mod query;
mod recovery;
pub mod session;
mod settings;
mod snapshots;
mod ssh;
mod tasks;
pub mod validate;
mod visits;
mod volumes;
mod waking;

pub use access::{Caller, check_secret};
pub use calls::{
    Certificate, Fork, ListPreviews, ListSessions, ListSnapshots, ListVolumes, NewExecution, NewExposure, NewMount,
    NewPreview, NewSession, NewSnapshot, NewVolume, OpenPreview, OpenSession, PreviewTarget, PreviewUrl, PreviewVisit,
    SessionUpdate, SnapshotUpdate, Usage, VolumeUpdate, WorkspaceSettingsUpdate,
};
pub use config::{EngineConfig, WakeOnVisit};
pub use engine::Engine;
pub use explain::{Finding, FindingCode};
pub use ssh::Visit;
