//! Sizes in bytes, and how long things may take unless told otherwise.

use std::time::Duration;

pub const KB: u64 = 1_000;
pub const MB: u64 = 1_000 * KB;
pub const GB: u64 = 1_000 * MB;
pub const TB: u64 = 1_000 * GB;
pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// Until a new session is RUNNING.
pub const DEFAULT_CREATE_TIMEOUT: Duration = Duration::from_secs(180);
/// The same for a session that builds a template specification first.
pub const DEFAULT_TEMPLATE_SPEC_CREATE_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);
/// Until a snapshot is READY.
pub const DEFAULT_SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(300);
/// Until a resumed session is RUNNING again.
pub const DEFAULT_RESTORE_TIMEOUT: Duration = Duration::from_secs(300);
/// A sensible limit for a short command. Commands have none unless they are given one.
pub const DEFAULT_EXEC_TIMEOUT: Duration = Duration::from_secs(30);
/// Until a detached volume is gone from its session.
pub const DEFAULT_VOLUME_DETACH_TIMEOUT: Duration = Duration::from_secs(120);
/// Until a volume is AVAILABLE.
pub const DEFAULT_VOLUME_READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Until a session's data plane answers.
pub const DATA_PLANE_READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Until a connection to the server is made, the TLS handshake included.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For one call of the control plane. The longest ones store a sandbox's memory.
pub(crate) const CONTROL_CALL_TIMEOUT: Duration = Duration::from_secs(5 * 60 + 30);
/// Metadata key under which servers are told of the driver, and tell of it.
pub(crate) const DRIVER_KEY: &str = "nagaya_driver";
/// The same for which visits resume a stopped session.
pub(crate) const WAKE_ON_VISIT_KEY: &str = "nagaya_wake_on_visit";
/// The same for what the driver promises, which is only told.
pub(crate) const ISOLATION_KEY: &str = "nagaya_isolation";
