//! Volumes: disks of their own that outlive sandboxes, `volumes/<id>.ext4` in the storage.
//!
//! A volume in a sandbox is a loop device over its image, mounted in the sandbox's mount namespace and held by
//! nothing else, so that it goes with the sandbox however that ends. Nothing about it is kept in memory: who has
//! a volume is read from the kernel, as a later server does that knows of nothing.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use nagaya_api::ids::{SessionId, VolumeId};
use nagaya_engine::model::Limit;
use nagaya_engine::ports::{DriverError, Mount};
use nagaya_guest::mount::{self, NO_DEVICES, READ_ONLY};
use nagaya_guest::spawn::{self, MountOutcome};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;
use rustix::thread::CapabilitySet;

use super::capacity;
use super::errors::{blocking, failed, too_long};
use super::ext4_image::{self, BLOCK, Superblock};
use super::numbers::first_id;
use crate::spawner::Spawner;
use crate::sys::ext4;
use crate::sys::loop_device::LoopDevice;

const SUFFIX: &str = "ext4";
/// What a volume may have: the least has room for a file; more than the most is beyond what its file system can grow to.
const VOLUME_BYTES: RangeInclusive<u64> = 1 << 20..=100 << 30;
/// A volume that is being made.
const FRESH: &str = "new";
/// How long whoever had a volume may take to let go of it after their end, before they count as having it.
const GRACE: Duration = Duration::from_secs(3);
/// How long the kernel may take to write back what was unmounted.
const GONE_AT_LAST: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(5);
/// Whoever waits longer for a volume to come back should be told of in the log.
const SETTLING_IS_SLOW: Duration = Duration::from_secs(10);
/// Whoever waits is told then; the host may have let go of it the next time.
const SETTLING_MAX: Duration = Duration::from_secs(60);
/// Processes that just ended, and programs that this server starts meanwhile, hold on to things for a moment.
const BUSY_FOR_GOOD: Duration = Duration::from_millis(50);

const NO_GROWTH_IN_USE: &str =
    "this server may not grow a volume that is in use (it has no CAP_SYS_RESOURCE): detach the volume first";

/// The volumes of one storage. Everything but [`Volumes::settle`] blocks.
pub(crate) struct Volumes {
    directory: PathBuf,
    /// Free space of the host's file system below which no volume is made or grown, MiB.
    disk_free_mb_min: u64,
    turns: KeyedLocks,
}

/// A running sandbox, for a volume on its way in or out.
pub(crate) struct Sandbox {
    pub id: SessionId,
    pub slot: u32,
    /// To whom directories belong that are made for a mount, as the sandbox counts them.
    pub user_id: u32,
    /// Of its first process.
    pub pidfd: OwnedFd,
}

impl Volumes {
    pub fn open(storage: &Path, disk_free_mb_min: u64) -> io::Result<Self> {
        let directory = storage.join("volumes");
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&directory)?.flatten() {
            // What an earlier server did not finish.
            if entry.path().extension().is_some_and(|extension| extension == FRESH) {
                fs::remove_file(entry.path())?;
            }
        }
        File::open(storage)?.sync_all()?;
        Ok(Self { directory, disk_free_mb_min, turns: KeyedLocks::default() })
    }

    fn path(&self, id: VolumeId) -> PathBuf {
        self.directory.join(format!("{id}.{SUFFIX}"))
    }

    fn existing(&self, id: VolumeId) -> Result<PathBuf, DriverError> {
        let path = self.path(id);
        if path.exists() { Ok(path) } else { Err(DriverError::Gone) }
    }

    pub fn list(&self) -> Result<Vec<VolumeId>, DriverError> {
        let entries = fs::read_dir(&self.directory).map_err(on("list volumes"))?;
        let id = |path: &Path| path.file_name()?.to_str()?.strip_suffix(SUFFIX)?.strip_suffix('.')?.parse().ok();
        Ok(entries.flatten().filter_map(|entry| id(&entry.path())).collect())
    }

    pub fn create(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        let _turn = self.turns.take([id.to_string()]);
        let path = self.path(id);
        if path.exists() {
            return Ok(());
        }
        check_size(size_bytes)?;
        self.check_room()?;
        let fresh = path.with_extension(FRESH);
        let made = ext4_image::format(&fresh, whole_blocks(size_bytes))
            .map_err(on("make a volume"))
            .and_then(|()| fs::rename(&fresh, &path).map_err(on("name a volume")));
        if made.is_err() {
            let _ = fs::remove_file(&fresh);
        }
        made?;
        ext4_image::sync_directory(&self.directory).map_err(on("make a volume"))
    }

    pub fn remove(&self, id: VolumeId) -> Result<(), DriverError> {
        let _turn = self.turns.take([id.to_string()]);
        let path = self.path(id);
        if !path.exists() {
            return Ok(());
        }
        if !wait_for(GRACE, || Ok(devices_in_use(&path)?.is_empty()))? {
            return Err(DriverError::Busy);
        }
        fs::remove_file(&path).map_err(on("remove a volume"))?;
        ext4_image::sync_directory(&self.directory).map_err(on("remove a volume"))
    }

    pub fn grow(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        let _turn = self.turns.take([id.to_string()]);
        let path = self.existing(id)?;
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(on("open the volume's image"))?;
        let devices = devices_in_use(&path)?;
        let found = if devices.is_empty() { ext4_image::recover(&path) } else { Superblock::read(&file) };
        let found = found.map_err(on("grow a volume"))?;
        let bytes = whole_blocks(size_bytes) + found.journal_bytes;
        if bytes < found.bytes {
            return Err(DriverError::Refused("a volume cannot shrink".into()));
        }
        check_size(size_bytes)?;
        let device = match devices.as_slice() {
            [] if bytes == found.bytes => return sync(&path),
            [] => None,
            [device] if !is_reader(device) => Some(device),
            _ => return Err(DriverError::Busy),
        };
        // Only ever longer: what is mounted may be larger already than its superblock on disk says. An image that is
        // longer than its file system, after a failure, is harmless. One that has the length already was let grow
        // before a crash, and is not refused after it: its file system may have been told already.
        if bytes > file.metadata().map_err(on("look at the volume's image"))?.len() {
            self.check_room()?;
            file.set_len(bytes).map_err(on("size the volume's image"))?;
        }
        match (device, may_resize()) {
            (Some(device), true) => grow_mounted(device, bytes)?,
            (Some(_), false) => return Err(DriverError::Refused(NO_GROWTH_IN_USE.into())),
            (None, true) => {
                let device = attach_image(&path, false)?;
                let number = device.number().map_err(on("look at a loop device"))?;
                grow_mounted(&device, bytes)?;
                drop(device);
                wait_until_free(&path, number)?;
            }
            (None, false) => ext4_image::grow(&path, bytes).map_err(on("grow a volume"))?,
        }
        sync(&path)
    }

    pub fn size(&self, id: VolumeId) -> Result<u64, DriverError> {
        let _turn = self.turns.take([id.to_string()]);
        let file = File::open(self.existing(id)?).map_err(on("open the volume's image"))?;
        let found = Superblock::read(&file).map_err(on("look at a volume"))?;
        Ok(found.bytes.saturating_sub(found.journal_bytes))
    }

    pub fn attach(&self, spawner: &Spawner, sandbox: &Sandbox, wanted: &Mount) -> Result<(), DriverError> {
        let _turn = self.turns.take([wanted.volume_id.to_string(), sandbox.id.to_string()]);
        let path = self.existing(wanted.volume_id)?;
        if let Some(device) = self.device_in(sandbox, &path)? {
            let read_only = device.is_read_only().map_err(on("look at a loop device"))?;
            let same = read_only == wanted.readonly && !device.is_cut_off().map_err(on("look at a loop device"))?;
            return if same { Ok(()) } else { Err(DriverError::Busy) };
        }
        // One writer, or any number of readers; whoever ended a moment ago may still be on the way out.
        let mut unused = false;
        let may_attach = || {
            let devices = devices_in_use(&path)?;
            unused = devices.is_empty();
            Ok(devices.iter().all(|device| wanted.readonly && is_reader(device)))
        };
        if !wait_for(GRACE, may_attach)? {
            return Err(DriverError::Busy);
        }
        if unused {
            ext4_image::recover(&path).map_err(on("attach a volume"))?;
        }
        let device = attach_image(&path, wanted.readonly)?;
        let tree = mount_device(&device, wanted.readonly)?;
        let attributes = if wanted.readonly { NO_DEVICES | READ_ONLY } else { NO_DEVICES };
        mount::set_attributes(tree.as_fd(), attributes, Some(sandbox.user_namespace()?.as_fd()))
            .map_err(on("map the volume's ids"))?;
        let order = spawn::Mount { path: wanted.path.clone(), owner: first_id(sandbox.slot) + sandbox.user_id };
        let outcome = spawner.mount(order, sandbox.pidfd.as_fd(), tree.as_fd());
        sandbox.judge(outcome.map_err(on("attach a volume"))?)
    }

    pub fn detach(
        &self,
        spawner: &Spawner,
        sandbox: &Sandbox,
        volume_id: VolumeId,
        force: bool,
    ) -> Result<(), DriverError> {
        let _turn = self.turns.take([volume_id.to_string(), sandbox.id.to_string()]);
        let path = self.existing(volume_id)?;
        let Some(device) = self.device_in(sandbox, &path)? else {
            return sync(&path);
        };
        let begin = Instant::now();
        let outcome = loop {
            let outcome = unmount(spawner, sandbox, &device, false);
            if !matches!(outcome, Err(DriverError::Busy)) || begin.elapsed() > BUSY_FOR_GOOD {
                break outcome;
            }
            std::thread::sleep(STEP);
        };
        match outcome {
            Err(DriverError::Busy) if force => {
                shut_down(&device, &path)?;
                unmount(spawner, sandbox, &device, true)?;
            }
            other => other?,
        }
        let number = device.number().map_err(on("look at a loop device"))?;
        drop(device);
        wait_until_free(&path, number)?;
        sync(&path)
    }

    /// Waits until nobody can write to the volume any more, and until all that was written to it is on disk.
    /// Readers, of whom others may go on, are not waited for.
    pub async fn settle(&self, id: VolumeId) -> Result<(), DriverError> {
        let begin = Instant::now();
        let mut told = false;
        let settled = |path: PathBuf| {
            blocking(move || match devices_in_use(&path)?.iter().all(is_reader) {
                true => sync(&path).map(|()| true),
                false => Ok(false),
            })
        };
        while !settled(self.path(id)).await? {
            if begin.elapsed() > SETTLING_IS_SLOW && !std::mem::replace(&mut told, true) {
                tracing::warn!(%id, "a volume is still mounted although nobody should have it");
            }
            if begin.elapsed() > SETTLING_MAX {
                return Err(too_long("the volume was not let go of", SETTLING_MAX));
            }
            tokio::time::sleep(STEP).await;
        }
        Ok(())
    }

    fn check_room(&self) -> Result<(), DriverError> {
        match capacity::free_disk_mb(&self.directory) {
            Some(free) if free < self.disk_free_mb_min => Err(DriverError::Exhausted(Limit::DiskFreeMin)),
            _ => Ok(()),
        }
    }

    /// The device over an image that is mounted in a sandbox.
    fn device_in(&self, sandbox: &Sandbox, path: &Path) -> Result<Option<LoopDevice>, DriverError> {
        let mounts =
            fs::read(format!("/proc/{}/mountinfo", sandbox.pid()?)).map_err(on("read the sandbox's mounts"))?;
        sandbox.check_alive()?;
        for number in String::from_utf8_lossy(&mounts).lines().filter_map(ext4_device) {
            if let Some(device) = LoopDevice::numbered(number, path).map_err(on("look at a loop device"))? {
                return Ok(Some(device));
            }
        }
        Ok(None)
    }
}

/// The device's number, where a line of a `mountinfo` is of an ext4.
fn ext4_device(line: &str) -> Option<(u32, u32)> {
    let (mount, system) = line.split_once(" - ")?;
    let (major, minor) = mount.split(' ').nth(2)?.split_once(':')?;
    system.starts_with("ext4 ").then_some((major.parse().ok()?, minor.parse().ok()?))
}

impl Sandbox {
    fn pid(&self) -> Result<i32, DriverError> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd()))
            .map_err(on("read the sandbox's process number"))?;
        let number = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
        number.filter(|pid| *pid > 0).ok_or(DriverError::Gone)
    }

    /// Of what was read by the process's number just before: whether it was that process's.
    fn check_alive(&self) -> Result<(), DriverError> {
        let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
        match rustix::event::poll(&mut ended, Some(&rustix::time::Timespec::default())) {
            Ok(0) => Ok(()),
            _ => Err(DriverError::Gone),
        }
    }

    fn user_namespace(&self) -> Result<OwnedFd, DriverError> {
        let file =
            File::open(format!("/proc/{}/ns/user", self.pid()?)).map_err(on("open the sandbox's user namespace"))?;
        self.check_alive()?;
        Ok(file.into())
    }

    fn judge(&self, outcome: MountOutcome) -> Result<(), DriverError> {
        match outcome {
            MountOutcome::Done => Ok(()),
            MountOutcome::Busy => Err(DriverError::Busy),
            MountOutcome::Refused(why) => Err(DriverError::Refused(why)),
            MountOutcome::Failed { step, errno } => {
                self.check_alive()?;
                Err(failed(&step, &io::Error::from_raw_os_error(errno)))
            }
        }
    }
}

/// Lets everything that is done to one volume, or to the volumes of one sandbox, happen one after the other.
#[derive(Default)]
struct KeyedLocks {
    taken: Mutex<HashSet<String>>,
    given_back: Condvar,
}

struct Turn<'a, const COUNT: usize> {
    turns: &'a KeyedLocks,
    names: [String; COUNT],
}

impl KeyedLocks {
    fn take<const COUNT: usize>(&self, names: [String; COUNT]) -> Turn<'_, COUNT> {
        let mut taken = self.taken.lock().expect("turns are changed without panics");
        // All at once, so that nobody waits for a second one while others wait for the first.
        while names.iter().any(|name| taken.contains(name)) {
            taken = self.given_back.wait(taken).expect("turns are changed without panics");
        }
        taken.extend(names.iter().cloned());
        Turn { turns: self, names }
    }
}

impl<const COUNT: usize> Drop for Turn<'_, COUNT> {
    fn drop(&mut self) {
        let mut taken = self.turns.taken.lock().expect("turns are changed without panics");
        for name in &self.names {
            taken.remove(name);
        }
        self.turns.given_back.notify_all();
    }
}

fn on<E: std::error::Error + 'static>(step: &'static str) -> impl Fn(E) -> DriverError {
    move |error| capacity::refusal(step, &error)
}

fn check_size(size_bytes: u64) -> Result<(), DriverError> {
    match VOLUME_BYTES.contains(&size_bytes) {
        true => Ok(()),
        false => Err(DriverError::Refused("volumes have 1 MiB to 100 GiB".into())),
    }
}

fn whole_blocks(bytes: u64) -> u64 {
    bytes / BLOCK * BLOCK
}

/// Growing a mounted file system needs a capability that not every root has, e.g. in containers.
fn may_resize() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_RESOURCE))
}

/// The devices over an image that can still read or write it.
fn devices_in_use(path: &Path) -> Result<Vec<LoopDevice>, DriverError> {
    match LoopDevice::over(path) {
        // A device that went meanwhile answers no question.
        Ok(devices) => Ok(devices.into_iter().filter(|device| device.is_cut_off().is_ok_and(|cut| !cut)).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(DriverError::Gone),
        Err(error) => Err(on("look for loop devices")(error)),
    }
}

fn is_reader(device: &LoopDevice) -> bool {
    device.is_read_only().unwrap_or(false)
}

fn attach_image(path: &Path, read_only: bool) -> Result<LoopDevice, DriverError> {
    let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(on("open the volume's image"))?;
    let attached =
        if read_only { LoopDevice::attach_read_only(file.as_fd()) } else { LoopDevice::attach(file.as_fd()) };
    attached.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY | libc::ENOENT | libc::ENODEV | libc::ENOSPC) => DriverError::Exhausted(Limit::LoopDevices),
        _ => on("attach a loop device")(error),
    })
}

/// A mount of its own of what is on a device, also when that is mounted elsewhere.
fn mount_device(device: &LoopDevice, read_only: bool) -> Result<OwnedFd, DriverError> {
    let mut options = vec![("source", Some(device.path.as_str())), ("noinit_itable", None), ("nodiscard", None)];
    if read_only {
        options.push(("ro", None));
    }
    mount::new_filesystem("ext4", &options, MountAttrFlags::MOUNT_ATTR_NODEV)
        .map_err(io::Error::from)
        .map_err(on("mount a volume"))
}

fn open_root(tree: BorrowedFd<'_>) -> Result<OwnedFd, DriverError> {
    rustix::fs::openat(tree, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .map_err(on("open a volume"))
}

fn grow_mounted(device: &LoopDevice, bytes: u64) -> Result<(), DriverError> {
    device.take_size().map_err(on("size a loop device"))?;
    let root = open_root(mount_device(device, false)?.as_fd())?;
    ext4::resize(root.as_fd(), bytes / BLOCK).map_err(on("grow a volume"))?;
    rustix::fs::syncfs(&root).map_err(io::Error::from).map_err(on("sync a volume"))
}

/// Writes back what a mounted volume holds, and lets whoever still uses it have nothing of it any more.
fn shut_down(device: &LoopDevice, path: &Path) -> Result<(), DriverError> {
    let root = open_root(mount_device(device, is_reader(device))?.as_fd())?;
    ext4::shut_down(root.as_fd()).map_err(on("shut a volume down"))?;
    drop(root);
    sync(path)?;
    // Files that are open keep the dead file system for as long as they like, while the volume is used elsewhere.
    device.cut_off().map_err(on("cut a volume off"))
}

fn unmount(spawner: &Spawner, sandbox: &Sandbox, device: &LoopDevice, lazy: bool) -> Result<(), DriverError> {
    let (major, minor) = device.number().map_err(on("look at a loop device"))?;
    let outcome = spawner.unmount(spawn::Unmount { major, minor, lazy }, sandbox.pidfd.as_fd());
    match outcome.map_err(on("detach a volume"))? {
        MountOutcome::Busy => Err(DriverError::Busy),
        other => sandbox.judge(other),
    }
}

/// Waits until that device does not use the image any more.
fn wait_until_free(path: &Path, number: (u32, u32)) -> Result<(), DriverError> {
    let free = || match LoopDevice::numbered(number, path).map_err(on("look at a loop device"))? {
        Some(device) => device.is_cut_off().map_err(on("look at a loop device")),
        None => Ok(true),
    };
    match wait_for(GONE_AT_LAST, free)? {
        true => Ok(()),
        false => Err(DriverError::Failed("the host does not let go of the volume's loop device".into())),
    }
}

fn wait_for(limit: Duration, mut ask: impl FnMut() -> Result<bool, DriverError>) -> Result<bool, DriverError> {
    let begin = Instant::now();
    while !ask()? {
        if begin.elapsed() > limit {
            return Ok(false);
        }
        std::thread::sleep(STEP);
    }
    Ok(true)
}

fn sync(path: &Path) -> Result<(), DriverError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(on("sync the volume's image"))
}

#[cfg(test)]
mod tests;
