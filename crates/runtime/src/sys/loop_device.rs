//! Loop devices that vanish with their last user.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const LOOP_CTL_REMOVE: libc::c_ulong = 0x4C81;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_SET_STATUS64: libc::c_ulong = 0x4C04;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Another process may take the free device first; each try asks for a new one.
const TRIES: u32 = 64;
/// No file reaches that far, so nothing can be read or written there.
const NOWHERE: u64 = 1 << 62;

#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// A block device over a file. The kernel detaches it when neither this nor a mount uses it.
#[derive(Debug)]
pub struct LoopDevice {
    device: File,
    pub path: String,
}

impl LoopDevice {
    pub fn attach(file: BorrowedFd<'_>) -> io::Result<Self> {
        Self::attach_with(file, LO_FLAGS_AUTOCLEAR)
    }

    pub fn attach_read_only(file: BorrowedFd<'_>) -> io::Result<Self> {
        Self::attach_with(file, LO_FLAGS_AUTOCLEAR | LO_FLAGS_READ_ONLY)
    }

    /// One that keeps nothing in memory: what lies on it does that already.
    pub fn attach_direct(file: BorrowedFd<'_>) -> io::Result<Self> {
        Self::attach_with(file, LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO)
    }

    fn attach_with(file: BorrowedFd<'_>, flags: u32) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        let mut last = io::Error::from_raw_os_error(libc::EBUSY);
        for _ in 0..TRIES {
            // SAFETY: takes no pointers.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            if forbids_discards(number) {
                // SAFETY: takes no pointers.
                let removed = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_REMOVE, libc::c_long::from(number)) };
                if removed == 0 {
                    continue;
                }
                // Somebody has it open. On it, a file only keeps its size.
            }
            let path = format!("/dev/loop{number}");
            let device = match OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path) {
                Ok(device) => device,
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            match configure(device.as_fd(), file, flags) {
                Ok(()) => return Ok(Self { device, path }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Every device over the file at `path`, whoever made it. While one is in the list, it stays what it is.
    pub fn over(path: &Path) -> io::Result<Vec<Self>> {
        let wanted = fs::metadata(path)?;
        let names = attached()?;
        let directories = names.iter().map(|name| Path::new("/sys/block").join(name));
        Ok(directories.filter_map(|directory| Self::open_if_over(&directory, path, &wanted)).collect())
    }

    /// The device of that number, if it is over the file at `path`.
    pub fn numbered((major, minor): (u32, u32), path: &Path) -> io::Result<Option<Self>> {
        let wanted = fs::metadata(path)?;
        let directory = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"));
        Ok(directory.ok().and_then(|directory| Self::open_if_over(&directory, path, &wanted)))
    }

    /// A device that comes or goes meanwhile is in use by nobody whom the caller knows of.
    fn open_if_over(directory: &Path, file: &Path, wanted: &fs::Metadata) -> Option<Self> {
        let backing = fs::read_to_string(directory.join("loop/backing_file")).ok()?;
        // There may be hundreds of others, and each would have to be opened to be asked.
        if Path::new(backing.trim_end()).file_name() != file.file_name() {
            return None;
        }
        let path = format!("/dev/{}", directory.file_name()?.to_str()?);
        let device = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(&path).ok()?;
        let device = Self { device, path };
        let info = device.info().ok()?;
        ((info.device, info.inode) == (wanted.dev(), wanted.ino())).then_some(device)
    }

    /// The block device's number: major, minor.
    pub fn number(&self) -> io::Result<(u32, u32)> {
        let number = self.device.metadata()?.rdev();
        Ok((rustix::fs::major(number), rustix::fs::minor(number)))
    }

    pub fn is_read_only(&self) -> io::Result<bool> {
        Ok(self.info()?.flags & LO_FLAGS_READ_ONLY != 0)
    }

    /// Whether it reads and writes its file directly. Where the file's own system cannot, the kernel leaves that out.
    pub fn is_direct(&self) -> io::Result<bool> {
        Ok(self.info()?.flags & LO_FLAGS_DIRECT_IO != 0)
    }

    /// Lets nobody punch holes into the file by discarding blocks of the device.
    pub fn forbid_discards(&self) -> io::Result<()> {
        let name = Path::new(&self.path).file_name().unwrap_or_default();
        fs::write(queue(&name.to_string_lossy(), "discard_max_bytes"), "0")
    }

    /// Whether [`LoopDevice::cut_off`] was called on it.
    pub fn is_cut_off(&self) -> io::Result<bool> {
        Ok(self.info()?.offset == NOWHERE)
    }

    /// Takes the file away from whoever still uses the device: from now on all their reads and writes fail, also
    /// those that the kernel makes when the last user of a dead file system goes.
    pub fn cut_off(&self) -> io::Result<()> {
        let mut info = self.info()?;
        info.offset = NOWHERE;
        // SAFETY: the structure has the layout of the kernel's `struct loop_info64` and outlives the call.
        done(unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_SET_STATUS64, &raw const info) })
    }

    /// Tells the device that its file has another size.
    pub fn take_size(&self) -> io::Result<()> {
        // SAFETY: takes no pointers.
        done(unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_SET_CAPACITY) })
    }

    fn info(&self) -> io::Result<LoopInfo64> {
        // SAFETY: plain numbers and byte arrays; all zero is a valid value.
        let mut info: LoopInfo64 = unsafe { std::mem::zeroed() };
        // SAFETY: the structure has the layout of the kernel's `struct loop_info64` and outlives the call.
        done(unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
        Ok(info)
    }
}

fn queue(name: &str, setting: &str) -> PathBuf {
    Path::new("/sys/block").join(name).join("queue").join(setting)
}

/// Whether [`LoopDevice::forbid_discards`] was called on whoever had that number before. The kernel keeps it with the
/// number and takes no other value any more, so that such a device has to be removed; the next one is made anew.
fn forbids_discards(number: libc::c_int) -> bool {
    let name = format!("loop{number}");
    let limit = |setting| -> Option<u64> { fs::read_to_string(queue(&name, setting)).ok()?.trim().parse().ok() };
    limit("discard_max_bytes") == Some(0) && limit("discard_max_hw_bytes").is_some_and(|most| most > 0)
}

/// Names of the loop devices that have a file. Hosts keep those that once had one, thousands of them, and asking each takes
/// many times as long as this list, which leaves out what has no size.
fn attached() -> io::Result<Vec<String>> {
    let partitions = fs::read_to_string("/proc/partitions")?;
    let names = partitions.lines().filter_map(|line| line.split_whitespace().nth(3));
    Ok(names.filter(|name| name.starts_with("loop")).map(str::to_owned).collect())
}

fn configure(device: BorrowedFd<'_>, file: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: plain numbers and byte arrays; all zero is a valid value.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd() as u32;
    config.block_size = 4096;
    config.info.flags = flags;
    // SAFETY: the structure has the layout of the kernel's `struct loop_config` and outlives the call.
    done(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) })
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_discards_again_for_whoever_has_it_next() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let limit = |device: &LoopDevice| {
            let name = device.path.trim_start_matches("/dev/");
            fs::read_to_string(queue(name, "discard_max_bytes")).unwrap()
        };
        // The kernel gives the lowest number that is free, so that the next one is mostly the same.
        for _ in 0..8 {
            let device = LoopDevice::attach(file.as_fd()).expect("as root");
            assert_ne!(limit(&device).trim(), "0", "{}", device.path);
            device.forbid_discards().unwrap();
            assert_eq!(limit(&device).trim(), "0");
        }
    }
}
