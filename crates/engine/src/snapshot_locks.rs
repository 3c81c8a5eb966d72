//! What keeps work on snapshots apart, and what it counts.

use std::sync::Mutex;

/// What the work on snapshots shares.
#[derive(Default)]
pub(crate) struct SnapshotLocks {
    /// Held while limits of a workspace are checked and what counts against them is recorded, and while
    /// a snapshot's record is read and changed.
    pub(crate) quiet: tokio::sync::Mutex<()>,
    /// Read by those who store blobs until they are recorded, written by who removes those not recorded.
    pub(crate) blobs: tokio::sync::RwLock<()>,
    /// How long sources were frozen, microseconds.
    pub(crate) source_stops_us: Mutex<Vec<u64>>,
}
