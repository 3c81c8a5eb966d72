//! A pool: an XFS file system in a file that is allocated from its first to its last byte.
//!
//! Whatever happens to the host's free space, what the pool has is its own: XFS, which gives up when it cannot write,
//! never learns of a full host. It grows ahead of what is used, as long as the host has room, and never shrinks.
//!
//! The file system is mounted in the host's mount table, and stays so when the server ends. Its loop device goes by
//! itself with the last of that mount and of the sandboxes whose disks are in it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nagaya_guest::mount;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, UnmountFlags};

use super::{MOUNT_POINT, POOL_FILE};
use crate::host::capacity::free_bytes;
use crate::sys::loop_device::LoopDevice;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// XFS wants 300 MiB, and some must be left for what is put into it.
const BYTES_MIN: u64 = 384 * MIB;
/// A pool grows when less than this, or less than half of it, is free.
const FREE_BYTES_MIN: u64 = 2 * GIB;
/// What it grows by is half of what it has, within these limits.
const STEP_BYTES: std::ops::RangeInclusive<u64> = GIB..=32 * GIB;
/// Growing by less than this is not worth the group of blocks that it makes.
const STEP_BYTES_LEAST: u64 = 64 * MIB;
/// While a part of the file is allocated, nobody can write to the rest.
const PIECE_BYTES: u64 = 256 * MIB;
/// A disk is filled at a gigabyte per second at most.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long growing rests after it failed.
const REST: Duration = Duration::from_secs(10);
/// How long the kernel may take to let go of sandboxes' disks, and of the pool.
const UNMOUNT_MAX: Duration = Duration::from_secs(15);
const UNMOUNT_STEP: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    #[error("{step} of the pool {path}")]
    System { step: &'static str, path: String, source: io::Error },
    #[error("run {program} (package xfsprogs): {said}")]
    Program { program: &'static str, said: String },
    #[error("the host has {0} MiB for a pool, which is too little")]
    NoRoom(u64),
    #[error("the host's loop devices do not work directly on files of this file system")]
    Buffered,
    #[error(
        "the pool's file system at {0} has failed and sandboxes still use it: end them or restart the host, \
         and look for its disk's errors in the kernel's log"
    )]
    Broken(String),
    #[error("{0} is in use by something else: unmount it")]
    Occupied(String),
}

/// The pool of one data directory, there or not.
pub(super) struct Pool {
    data: PathBuf,
    file: PathBuf,
    mount_point: PathBuf,
    /// Free space that is left to the host, bytes.
    host_free_bytes_min: u64,
}

impl Pool {
    pub fn of(data: &Path, host_free_mb_min: u64) -> Self {
        let (file, mount_point) = (data.join(POOL_FILE), data.join(MOUNT_POINT));
        Self { data: data.to_owned(), file, mount_point, host_free_bytes_min: host_free_mb_min * MIB }
    }

    fn on<E: Into<io::Error>>(&self, step: &'static str) -> impl Fn(E) -> PoolError {
        move |source| PoolError::System { step, path: self.file.display().to_string(), source: source.into() }
    }

    fn fresh(&self) -> PathBuf {
        self.file.with_extension("new")
    }

    /// Removes what an earlier server did not finish.
    pub fn sweep(&self) {
        let _ = fs::remove_file(self.fresh());
    }

    /// Makes an empty one. It has its name only when it is known to work here.
    pub fn create(&self, first_mb: u64) -> Result<(), PoolError> {
        let room = free_bytes(&self.data).unwrap_or(0).saturating_sub(self.host_free_bytes_min);
        let bytes = (first_mb * MIB).min(room / 2) / MIB * MIB;
        if bytes < BYTES_MIN {
            return Err(PoolError::NoRoom(bytes / MIB));
        }
        let fresh = self.fresh();
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&fresh);
        let file = file.map_err(self.on("make the file"))?;
        allocate(&file, 0, bytes).map_err(self.on("allocate the file"))?;
        // Its sectors are the blocks of our disks, and of the loop device. Discarding would free what was allocated.
        let options = ["-q", "-K", "-s", "size=4096", "-m", "reflink=1,rmapbt=0"];
        run("mkfs.xfs", &options, &fresh)?;
        allocate(&file, 0, bytes).map_err(self.on("allocate the file"))?;
        let (_device, tree) = self.mount_detached(&file)?;
        drop(tree);
        file.sync_all().map_err(self.on("sync the file"))?;
        fs::create_dir_all(&self.mount_point).map_err(self.on("make the mount point"))?;
        fs::rename(&fresh, &self.file).map_err(self.on("name the file"))?;
        File::open(&self.data).and_then(|directory| directory.sync_all()).map_err(self.on("name the file"))
    }

    /// Mounts it where it is not, and lets it have the size of its file.
    pub fn mount(&self) -> Result<(), PoolError> {
        let file = OpenOptions::new().read(true).write(true).open(&self.file).map_err(self.on("open the file"))?;
        let bytes = file.metadata().map_err(self.on("look at the file"))?.len();
        if let Err(error) = allocate(&file, 0, bytes) {
            tracing::warn!(%error, pool = %self.file.display(), "the host has no space for all of the pool");
        }
        fs::create_dir_all(&self.mount_point).map_err(self.on("make the mount point"))?;
        if !self.is_mounted()? {
            let (_device, tree) = self.mount_detached(&file)?;
            let place = self.mount_point.to_string_lossy();
            mount::attach(tree.as_fd(), &place).map_err(self.on("attach the file system"))?;
        }
        // The one that sandboxes still use may be dead as well.
        rustix::fs::stat(&self.mount_point).map_err(|_| PoolError::Broken(self.mount_point.display().to_string()))?;
        self.take_size()
    }

    /// Whether the mount point shows the pool. What is dead there, after errors of the host's disk, is unmounted.
    fn is_mounted(&self) -> Result<bool, PoolError> {
        let place = match rustix::fs::stat(&self.mount_point) {
            Err(Errno::IO) => {
                self.unmount(UnmountFlags::DETACH).map_err(self.on("unmount the file system"))?;
                return Ok(false);
            }
            place => place.map_err(self.on("look at the mount point"))?.st_dev,
        };
        let around = fs::metadata(&self.data).map_err(self.on("look at the mount point"))?.dev();
        if place == around {
            return Ok(false);
        }
        let number = (rustix::fs::major(place), rustix::fs::minor(place));
        let device = LoopDevice::numbered(number, &self.file).map_err(self.on("look at the loop device"))?;
        device.map(|_| true).ok_or_else(|| PoolError::Occupied(self.mount_point.display().to_string()))
    }

    /// The file system as a mount of its own, with its device: that which sandboxes still use, if there is one. A second
    /// device over the file would be another file system on the same blocks.
    fn mount_detached(&self, file: &File) -> Result<(LoopDevice, OwnedFd), PoolError> {
        let path = if self.file.exists() { self.file.clone() } else { self.fresh() };
        let used = LoopDevice::over(&path).map_err(self.on("look for the loop device"))?.into_iter().next();
        let device = match used {
            Some(device) => device,
            None => LoopDevice::attach_direct(file.as_fd()).map_err(self.on("attach a loop device"))?,
        };
        if !device.is_direct().map_err(self.on("look at the loop device"))? {
            return Err(PoolError::Buffered);
        }
        if let Err(error) = device.forbid_discards() {
            tracing::warn!(%error, "whoever trims all file systems of this host makes the pool sparse");
        }
        let options = [
            ("source", Some(device.path.as_str())),
            // A copy of a whole data directory may be mounted beside it.
            ("nouuid", None),
            ("nodiscard", None),
            ("noquota", None),
        ];
        let quiet = MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let tree = mount::new_filesystem("xfs", &options, quiet).map_err(self.on("mount the file system"))?;
        Ok((device, tree))
    }

    /// Lets the file system fill its file.
    fn take_size(&self) -> Result<(), PoolError> {
        for device in LoopDevice::over(&self.file).map_err(self.on("look for the loop device"))? {
            device.take_size().map_err(self.on("size the loop device"))?;
        }
        run("xfs_growfs", &["-d"], &self.mount_point)
    }

    /// Grows when it should. The size it has then, if it grew.
    fn grow_when_needed(&self) -> Result<Option<u64>, PoolError> {
        let file = OpenOptions::new().read(true).write(true).open(&self.file).map_err(self.on("open the file"))?;
        let bytes = file.metadata().map_err(self.on("look at the file"))?.len();
        let free = |place: &Path| free_bytes(place).ok_or(io::ErrorKind::Other).map_err(self.on("look at the space"));
        let host_room = free(&self.data)?.saturating_sub(self.host_free_bytes_min);
        let Some(more) = growth(bytes, free(&self.mount_point)?, host_room) else { return Ok(None) };
        if let Err(error) = allocate(&file, bytes, more) {
            // The device does not reach that far yet.
            file.set_len(bytes).map_err(self.on("size the file"))?;
            return Err(self.on("allocate the file")(error));
        }
        self.take_size()?;
        Ok(Some(bytes + more))
    }

    fn unmount(&self, flags: UnmountFlags) -> Result<(), Errno> {
        rustix::mount::unmount(&self.mount_point, flags)
    }

    /// Unmounts and removes it. Sandboxes that ended a moment ago may still have their disks.
    pub fn remove(&self) -> Result<(), PoolError> {
        let begin = Instant::now();
        let patient = || {
            std::thread::sleep(UNMOUNT_STEP);
            begin.elapsed() < UNMOUNT_MAX
        };
        loop {
            match self.unmount(UnmountFlags::empty()) {
                // It is no mount any more.
                Err(Errno::INVAL | Errno::NOENT) => break,
                Ok(()) => {}
                Err(Errno::BUSY) if patient() => {}
                Err(errno) => return Err(self.on("unmount the file system")(errno)),
            }
        }
        while !LoopDevice::over(&self.file).map_err(self.on("look for the loop device"))?.is_empty() {
            if !patient() {
                return Err(self.on("let go")(io::Error::from(io::ErrorKind::TimedOut)));
            }
        }
        fs::remove_file(&self.file).map_err(self.on("remove the file"))?;
        fs::remove_dir(&self.mount_point).map_err(self.on("remove the mount point"))
    }
}

/// What a pool of `bytes` with `free` bytes free grows by, where the host can give `host_room`.
fn growth(bytes: u64, free: u64, host_room: u64) -> Option<u64> {
    if free >= FREE_BYTES_MIN.min(bytes / 2) {
        return None;
    }
    let wanted = (bytes / 2).clamp(*STEP_BYTES.start(), *STEP_BYTES.end());
    let more = wanted.min(host_room) / MIB * MIB;
    (more >= STEP_BYTES_LEAST).then_some(more)
}

/// Gives blocks of its own to every byte of this part that has none, and makes the file as long as that.
fn allocate(file: &File, from: u64, bytes: u64) -> io::Result<()> {
    let end = from + bytes;
    for start in (from..end).step_by(PIECE_BYTES as usize) {
        rustix::fs::fallocate(file, FallocateFlags::empty(), start, PIECE_BYTES.min(end - start))?;
    }
    Ok(())
}

fn run(program: &'static str, options: &[&str], path: &Path) -> Result<(), PoolError> {
    let output = Command::new(program)
        .args(options)
        .arg(path)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| PoolError::Program { program, said: error.to_string() })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(PoolError::Program { program, said })
}

/// The thread that lets a pool grow, until this is dropped.
pub(super) struct PoolGrower {
    stopped: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl PoolGrower {
    pub fn start(pool: Arc<Pool>) -> Self {
        let stopped = Arc::new((Mutex::new(false), Condvar::new()));
        let seen = stopped.clone();
        let thread = std::thread::Builder::new()
            .name("pool-keeper".into())
            .spawn(move || keep(&pool, &seen))
            .expect("the host has room for a thread");
        Self { stopped, thread: Some(thread) }
    }
}

impl Drop for PoolGrower {
    fn drop(&mut self) {
        *self.stopped.0.lock().expect("the flag is changed without panics") = true;
        self.stopped.1.notify_all();
        // It may be growing the pool, which takes a moment. A panic of its own was told already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn keep(pool: &Pool, (stopped, changed): &(Mutex<bool>, Condvar)) {
    let mut pause = Duration::ZERO;
    let mut told = false;
    loop {
        let guard = stopped.lock().expect("the flag is changed without panics");
        let (stopped, _) =
            changed.wait_timeout_while(guard, pause, |stopped| !*stopped).expect("the flag is changed without panics");
        if *stopped {
            return;
        }
        drop(stopped);
        pause = LOOK_EVERY;
        match pool.grow_when_needed() {
            Ok(None) => {}
            Ok(Some(bytes)) => {
                told = false;
                tracing::info!(gib = bytes as f64 / GIB as f64, "the pool of disks has grown");
            }
            Err(error) => {
                pause = REST;
                if !std::mem::replace(&mut told, true) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "the pool of disks cannot grow; it goes on with what it has");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_grows_by_half_while_the_host_has_room() {
        let plenty = 1_000 * GIB;
        assert_eq!(growth(4 * GIB, 2 * GIB, plenty), None, "enough is free");
        assert_eq!(growth(4 * GIB, 2 * GIB - 1, plenty), Some(2 * GIB));
        assert_eq!(growth(512 * MIB, 300 * MIB, plenty), None, "small ones need half of theirs");
        assert_eq!(growth(512 * MIB, 200 * MIB, plenty), Some(GIB));
        assert_eq!(growth(400 * GIB, 0, plenty), Some(32 * GIB));
        assert_eq!(growth(4 * GIB, 0, 100 * MIB + 5), Some(100 * MIB), "the host's last space but its reserve");
        assert_eq!(growth(4 * GIB, 0, 63 * MIB), None);
    }
}
