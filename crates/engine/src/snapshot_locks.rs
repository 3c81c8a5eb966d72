//! What work on snapshots shares.

use std::sync::Mutex;

/// What the work on snapshots shares.
#[derive(Default)]
pub(crate) struct SnapshotLocks {
    /// Read by those who store blobs until they are recorded, written by who removes those not recorded.
    pub(crate) blobs: tokio::sync::RwLock<()>,
    /// How long sources were frozen, microseconds.
    pub(crate) source_stops_us: Mutex<Vec<u64>>,
}
