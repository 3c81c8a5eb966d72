//! Copies of disks at rest: `disks/<image id>.ext4` in the storage.
//!
//! A disk is copied as it is at one moment: its file system is frozen, which writes everything back,
//! its image is copied, and it is thawed again. A file beside the disk tells a later server of a
//! freeze that was not undone.
//!
//! Images are on their way from one place to another, and are not synced: they outlive servers, but
//! not the host's run. What is made of them is synced by whoever makes it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nagaya_api::ids::DiskImageId;
use rustix::fs::{Mode, OFlags};

use super::capacity;
use super::disk::{self, DiskError};
use super::storage::shares_blocks;
use crate::sys::ext4;
use crate::sys::loop_device::LoopDevice;
use crate::sys::rcu::{self, Expedited};

const SUFFIX: &str = "ext4";
/// An image that is being made.
const FRESH: &str = "new";
/// Beside a disk whose file system is frozen.
const FROZEN: &str = "frozen";
/// In it when the host's grace periods are expedited for that.
const EXPEDITED: &str = "expedited";
/// Names the run of the host in which the images were made.
const RUN: &str = "boot-id";

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("{step}")]
    System { step: &'static str, source: io::Error },
    #[error("find the disk")]
    Disk(#[from] DiskError),
    /// A copy would take the last of the host's disk, which others need.
    #[error("less than {0} MiB would be left of the host's disk")]
    NoRoom(u64),
}

fn on<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> CopyError {
    move |source| CopyError::System { step, source: source.into() }
}

/// The images of one storage. Everything blocks.
pub(crate) struct DiskImages {
    directory: PathBuf,
    /// Free space of the host's file system that copies leave for others, MiB.
    disk_free_mb_min: u64,
    /// Copies share their blocks with what they are copies of.
    shares_blocks: bool,
    /// Images that are being written, or are whole and wait to be taken.
    prepared: Mutex<HashMap<DiskImageId, LoopDevice>>,
}

impl DiskImages {
    pub fn open(storage: &Path, disk_free_mb_min: u64, boot_id: &str) -> io::Result<Self> {
        let directory = storage.join("disks");
        fs::create_dir_all(&directory)?;
        let same_run = fs::read_to_string(directory.join(RUN)).is_ok_and(|run| run == boot_id);
        for entry in fs::read_dir(&directory)?.flatten() {
            // What an earlier server did not finish, and all that a power cut may have damaged.
            if !same_run || entry.path().extension().is_some_and(|extension| extension == FRESH) {
                fs::remove_file(entry.path())?;
            }
        }
        fs::write(directory.join(RUN), boot_id)?;
        let shares_blocks = shares_blocks(&directory)?;
        Ok(Self { directory, disk_free_mb_min, shares_blocks, prepared: Mutex::default() })
    }

    pub fn path(&self, id: DiskImageId) -> PathBuf {
        self.directory.join(format!("{id}.{SUFFIX}"))
    }

    fn prepared(&self) -> MutexGuard<'_, HashMap<DiskImageId, LoopDevice>> {
        self.prepared.lock().expect("the list is changed without panics")
    }

    /// Makes the empty file of an image and its device. Attaching a device to a file that has been written makes the kernel
    /// wait until all of that is on the host's disk. The file has the name of what is unfinished until it is taken, and goes with the server.
    pub fn prepare(&self, id: DiskImageId) -> io::Result<PathBuf> {
        let path = self.path(id).with_extension(FRESH);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        let device = LoopDevice::attach(file.as_fd()).inspect_err(|_| drop(fs::remove_file(&path)))?;
        self.prepared().insert(id, device);
        Ok(path)
    }

    pub fn list(&self) -> io::Result<Vec<DiskImageId>> {
        let id = |path: &Path| path.file_name()?.to_str()?.strip_suffix(SUFFIX)?.strip_suffix('.')?.parse().ok();
        Ok(fs::read_dir(&self.directory)?.flatten().filter_map(|entry| id(&entry.path())).collect())
    }

    pub fn remove(&self, id: DiskImageId) -> io::Result<()> {
        self.prepared().remove(&id);
        for path in [self.path(id).with_extension(FRESH), self.path(id)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes an image the disk of a sandbox's directory. `NotFound` when there is no such image.
    pub fn take(&self, id: DiskImageId, directory: &Path) -> io::Result<LoopDevice> {
        let disk = disk::path(directory);
        if let Some(device) = self.prepared().remove(&id) {
            fs::rename(self.path(id).with_extension(FRESH), disk)?;
            return Ok(device);
        }
        fs::rename(self.path(id), &disk)?;
        let file = OpenOptions::new().read(true).write(true).open(disk)?;
        LoopDevice::attach(file.as_fd()).map_err(|error| match error.kind() {
            // A host without loop devices is not an image that is gone.
            io::ErrorKind::NotFound => io::Error::other(error),
            _ => error,
        })
    }

    /// Copies the disk in a sandbox's directory, in use or not, and tells how long its writes were frozen.
    /// On error none of the images is left.
    pub fn copy(&self, directory: &Path, images: &[DiskImageId]) -> Result<Duration, CopyError> {
        let paths: Vec<PathBuf> = images.iter().map(|id| self.path(*id)).collect();
        let copied = self.copy_to(directory, &paths);
        if copied.is_err() {
            for path in paths {
                let _ = fs::remove_file(path.with_extension(FRESH));
                let _ = fs::remove_file(path);
            }
        }
        copied
    }

    fn check_room(&self, source: &File, copies: usize) -> Result<(), CopyError> {
        const BLOCK_BYTES: u64 = 512;
        let copied = if self.shares_blocks { 0 } else { source.metadata().map_err(on("look at the disk"))?.blocks() };
        let copied_mb = ((copied * BLOCK_BYTES) >> 20) * copies as u64;
        match capacity::free_disk_mb(&self.directory) {
            Some(free) if free.saturating_sub(copied_mb) < self.disk_free_mb_min => {
                Err(CopyError::NoRoom(self.disk_free_mb_min))
            }
            _ => Ok(()),
        }
    }

    fn copy_to(&self, directory: &Path, paths: &[PathBuf]) -> Result<Duration, CopyError> {
        let Some((first, others)) = paths.split_first() else { return Ok(Duration::ZERO) };
        let source = File::open(disk::path(directory)).map_err(on("open the disk"))?;
        self.check_room(&source, paths.len())?;
        let first = create(&first.with_extension(FRESH))?;
        let stopped = {
            let still = FsFreezeGuard::hold(directory)?;
            disk::copy(&source, &first).map_err(on("copy the disk"))?;
            still.map_or(Ok(Duration::ZERO), FsFreezeGuard::end)?
        };
        for path in others {
            let other = create(&path.with_extension(FRESH))?;
            disk::copy(&first, &other).map_err(on("copy the disk"))?;
        }
        for path in paths {
            fs::rename(path.with_extension(FRESH), path).map_err(on("name the copy of the disk"))?;
        }
        Ok(stopped)
    }
}

fn create(path: &Path) -> Result<File, CopyError> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
    file.map_err(on("create the copy of the disk"))
}

/// A mounted disk whose file system is frozen for as long as this lives.
struct FsFreezeGuard {
    root: OwnedFd,
    mark: PathBuf,
    expedited: Option<Expedited>,
    since: Instant,
}

impl FsFreezeGuard {
    /// `None` when the disk is not mounted.
    fn hold(directory: &Path) -> Result<Option<Self>, CopyError> {
        let Some(root) = open_root(directory)? else { return Ok(None) };
        // What is written back now need not be while everything waits.
        rustix::fs::syncfs(&root).map_err(on("sync the disk"))?;
        let mark = directory.join(FROZEN);
        let content = if rcu::can_be_expedited() { EXPEDITED } else { "" };
        fs::write(&mark, content).map_err(on("mark the disk as frozen"))?;
        let expedited = Some(Expedited::begin());
        let still = Self { root, mark, expedited, since: Instant::now() };
        // From here on whatever goes wrong is undone.
        ext4::freeze(still.root.as_fd()).map_err(on("freeze the disk"))?;
        Ok(Some(still))
    }

    fn end(self) -> Result<Duration, CopyError> {
        ext4::thaw(self.root.as_fd()).map_err(on("thaw the disk"))?;
        Ok(self.since.elapsed())
    }
}

impl Drop for FsFreezeGuard {
    fn drop(&mut self) {
        let thawed = ext4::thaw(self.root.as_fd());
        // Before the mark that tells of it.
        drop(self.expedited.take());
        match thawed {
            Ok(()) => drop(fs::remove_file(&self.mark)),
            Err(error) => tracing::error!(%error, mark = %self.mark.display(), "could not thaw a disk"),
        }
    }
}

/// Mounts a disk in a sandbox's directory of which nothing was ever flushed. The host's grace periods are expedited meanwhile, which the
/// same mark tells of as when it is frozen. Where they cannot be, flushing takes less time than not to.
pub(crate) fn mount_unflushed(device: &LoopDevice, directory: &Path) -> Result<OwnedFd, CopyError> {
    let mark = directory.join(FROZEN);
    let content = if rcu::can_be_expedited() { EXPEDITED } else { "" };
    fs::write(&mark, content).map_err(on("mark the disk"))?;
    let expedited = Expedited::begin();
    let path = disk::path(directory);
    let mounted = match rcu::are_expedited() {
        true => disk::mount_unflushed(device, &path),
        false => disk::mount(device, &path),
    };
    drop(expedited);
    fs::remove_file(mark).map_err(on("unmark the disk"))?;
    Ok(mounted?)
}

/// Writes back what is on the disk in a sandbox's directory. One that is not mounted is written back already.
pub(crate) fn sync_disk(directory: &Path) -> Result<(), CopyError> {
    match open_root(directory)? {
        Some(root) => rustix::fs::syncfs(&root).map_err(on("sync the disk")),
        None => Ok(()),
    }
}

/// Whether a server froze the disk in this directory and has not thawed it.
pub(crate) fn is_marked_frozen(directory: &Path) -> bool {
    directory.join(FROZEN).exists()
}

/// Undoes what a server left that was killed while it copied the disk in this directory.
pub(crate) fn thaw(directory: &Path) -> Result<(), CopyError> {
    if let Some(root) = open_root(directory)? {
        ext4::thaw(root.as_fd()).map_err(on("thaw the disk"))?;
    }
    let mark = directory.join(FROZEN);
    if fs::read_to_string(&mark).is_ok_and(|content| content == EXPEDITED) {
        rcu::end().map_err(on("end expedited grace periods"))?;
    }
    fs::remove_file(mark).map_err(on("unmark the disk"))
}

/// The root of what is on a mounted disk. The mount that a sandbox has cannot be reached from outside, so
/// this is another one of the same file system.
fn open_root(directory: &Path) -> Result<Option<OwnedFd>, CopyError> {
    let image = disk::path(directory);
    let devices = match LoopDevice::over(&image) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        devices => devices.map_err(on("look for the disk's loop device"))?,
    };
    let Some(device) = devices.first() else { return Ok(None) };
    let tree = disk::mount(device, &image)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&tree, ".", flags, Mode::empty()).map(Some).map_err(on("open the disk"))
}
