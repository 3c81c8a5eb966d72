//! Where disks, images, volumes and blobs lie: in the data directory itself, or in a pool in it.
//!
//! Copies of disks share their blocks where the file system can (XFS, btrfs), and cost nothing then. Where the data
//! directory's own file system cannot, it gets a pool: an XFS file system in a file. Which of both it is, is decided
//! when a data directory is used for the first time, and stays.

mod pool;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::Deserialize;

use pool::{Pool, PoolGrower};

pub use pool::PoolError;

/// The pool of a data directory.
const POOL_FILE: &str = "storage.xfs";
/// Where its file system is mounted.
const MOUNT_POINT: &str = "storage";
/// Every driver makes it, so that one without a pool has been used without.
pub(crate) const SANDBOXES: &str = "sandboxes";

/// Where disks, volumes and snapshots lie. Decided when a data directory is used for the first time.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Disks {
    /// Whether a new data directory gets a pool of disks. One that is filled faster than it grows gives its sandboxes errors
    /// that the host's own file system would not.
    pub pool: DiskPool,
    /// What a pool begins with; at most half of what the host has left. It grows by itself.
    pub pool_first_mb: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(serde::Serialize, schemars::JsonSchema))]
pub enum DiskPool {
    /// Where the data directory's file system shares no blocks between copies, disks lie in a pool: an XFS file system in a
    /// file.
    Auto,
    /// Disks are plain files always.
    Off,
}

impl Default for Disks {
    fn default() -> Self {
        Self { pool: DiskPool::Off, pool_first_mb: 4_096 }
    }
}

/// The directory that holds `sandboxes`, `disks`, `volumes` and `blobs` of a data directory.
pub fn storage_root(data: &Path) -> PathBuf {
    if has_pool(data) { data.join(MOUNT_POINT) } else { data.to_owned() }
}

pub(crate) fn has_pool(data: &Path) -> bool {
    data.join(POOL_FILE).exists()
}

/// Whether a data directory was used without a pool.
pub(crate) fn storage_is_plain(data: &Path) -> bool {
    !has_pool(data) && data.join(SANDBOXES).exists()
}

/// Whether copies within this directory can share their blocks.
pub(crate) fn shares_blocks(directory: &Path) -> io::Result<bool> {
    let temporary = || rustix::fs::open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR);
    match (temporary(), temporary()) {
        (Ok(source), Ok(target)) => Ok(rustix::fs::ioctl_ficlone(target, source).is_ok()),
        // A file system without such files is none of those that share blocks.
        (Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT), _) => Ok(false),
        (Err(errno), _) | (_, Err(errno)) => Err(errno.into()),
    }
}

/// The storage of one data directory.
pub(crate) struct Storage {
    root: PathBuf,
    pool: Option<Arc<Pool>>,
    keeper: Mutex<Option<PoolGrower>>,
}

impl Storage {
    /// Finds what the data directory has, or decides what it gets. Blocks.
    pub fn open(data: &Path, disks: &Disks, disk_free_mb_min: u64) -> Result<Self, PoolError> {
        let pool = Pool::of(data, disk_free_mb_min);
        pool.sweep();
        if !has_pool(data)
            && !storage_is_plain(data)
            && disks.pool == DiskPool::Auto
            && !shares_blocks(data).unwrap_or(false)
            && let Err(error) = pool.create(disks.pool_first_mb)
        {
            pool.sweep();
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "disks are plain files, and copies of large ones take long; see nagaya doctor");
        }
        if !has_pool(data) {
            return Ok(Self { root: data.to_owned(), pool: None, keeper: Mutex::new(None) });
        }
        pool.mount()?;
        let pool = Arc::new(pool);
        Ok(Self {
            root: storage_root(data),
            keeper: Mutex::new(Some(PoolGrower::start(pool.clone()))),
            pool: Some(pool),
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Removes a pool with all that is in it; when nothing uses it any more. Blocks.
    pub fn remove(&self) -> Result<(), PoolError> {
        drop(self.keeper.lock().expect("the keeper is replaced without panics").take());
        self.pool.as_ref().map_or(Ok(()), |pool| pool.remove())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_data_directory_that_was_used_without_a_pool_stays_without_one() {
        let data = tempfile::tempdir().expect("a directory");
        fs::create_dir(data.path().join(SANDBOXES)).expect("a directory");
        let storage =
            Storage::open(data.path(), &Disks { pool: DiskPool::Auto, pool_first_mb: 512 }, 0).expect("storage");
        assert_eq!(storage.root(), data.path());
        assert!(!has_pool(data.path()));
    }
}
