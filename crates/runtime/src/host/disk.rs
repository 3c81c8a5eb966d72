//! Writable disks: sparse ext4 images, copied from a template that is formatted once for each size.
//!
//! A disk in use is a detached mount over an auto-clearing loop device: both are held by the
//! sandbox's mount namespace (or by this process, before one has it) and go with it, so a killed
//! server leaves neither a mount nor a loop device behind.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nagaya_guest::{mount, spawn};
use rustix::fs::{Mode, SeekFrom};
use rustix::mount::MountAttrFlags;

use super::brake;
use super::ext4_image::{self, ImageError, Superblock};
use crate::sys::loop_device::LoopDevice;

const GIB: u64 = 1 << 30;
const BLOCK_BYTES: u64 = 4096;
const COPIED_AT_ONCE: u64 = 128 << 10;
/// How long the host may take to write a disk back and to let go of it.
const UNMOUNT_MAX: Duration = Duration::from_secs(120);
/// Raised whenever what is inside a fresh disk changes.
const TEMPLATE_VERSION: u32 = 3;
/// Templates that are kept. They take little, but clients may ask for any size.
const TEMPLATES_MAX: usize = 64;
/// What a disk may have: the least has room for its journal; more than the most is beyond what disks can grow to.
pub const DISK_BYTES: RangeInclusive<u64> = 64 << 20..=100 * GIB;

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{step} {path}")]
    System { step: &'static str, path: String, source: io::Error },
    #[error("format a disk: {0}")]
    Format(String),
    #[error("resize a disk")]
    Resize(#[from] ImageError),
}

fn at<T>(step: &'static str, path: &Path, result: io::Result<T>) -> Result<T, DiskError> {
    result.map_err(|source| DiskError::System { step, path: path.display().to_string(), source })
}

/// A sandbox's disk, in its directory.
pub(crate) fn path(directory: &Path) -> PathBuf {
    directory.join("disk.ext4")
}

/// The templates of one storage.
pub struct Disks {
    templates: PathBuf,
    /// One formatting at a time; two sandboxes of a new size would race for its template.
    formatting: Mutex<()>,
}

impl Disks {
    pub fn open(storage: &Path) -> Result<Self, DiskError> {
        let templates = storage.join("templates");
        at("create", &templates, fs::create_dir_all(&templates))?;
        Ok(Self { templates, formatting: Mutex::new(()) })
    }

    /// Makes a fresh disk of so many bytes at `path`.
    pub fn make(&self, path: &Path, bytes: u64) -> Result<(), DiskError> {
        let source = self.template(bytes)?;
        let target = at("create", path, OpenOptions::new().write(true).create_new(true).mode(0o600).open(path))?;
        // Shared blocks would have to be read from the host's disk again, as soon as it is mounted, and copied with the first
        // write. The little that is on a fresh disk is in memory.
        at("copy to", path, copy_sparse(&source, &target, copy_bytes))
    }

    fn template(&self, bytes: u64) -> Result<File, DiskError> {
        let path = self.templates.join(format!("v{TEMPLATE_VERSION}-{bytes}.ext4"));
        let _one = self.formatting.lock().expect("formatting does not panic");
        if !path.exists() {
            self.make_room()?;
            let fresh = path.with_extension("new");
            format(&fresh, bytes)?;
            // A power cut must not leave half of it to be copied ever after.
            at("sync", &fresh, File::open(&fresh).and_then(|file| file.sync_all()))?;
            at("rename", &path, fs::rename(&fresh, &path))?;
        }
        at("open", &path, File::open(&path))
    }

    /// Removes all templates where there are as many as may be kept, and what an earlier server did not finish: making one again
    /// takes a tenth of a second.
    fn make_room(&self) -> Result<(), DiskError> {
        let entries: Vec<_> = at("list", &self.templates, fs::read_dir(&self.templates))?.flatten().collect();
        let many = entries.len() >= TEMPLATES_MAX;
        for path in entries.iter().map(fs::DirEntry::path) {
            if many || path.extension().is_some_and(|extension| extension == "new") {
                at("remove", &path, fs::remove_file(&path))?;
            }
        }
        Ok(())
    }
}

fn format(path: &Path, bytes: u64) -> Result<(), DiskError> {
    let file = at("create", path, OpenOptions::new().write(true).create_new(true).mode(0o600).open(path))?;
    at("size", path, file.set_len(bytes))?;
    drop(file);
    // Every disk is a copy of what is written here: room to grow beyond what is allowed would be
    // ten times that. The first write of a sandbox looks at all groups of a flexible group (-G).
    let (feature, growth) = if bytes < *DISK_BYTES.end() {
        ("resize_inode", format!(",resize={}", DISK_BYTES.end() / BLOCK_BYTES))
    } else {
        ("^resize_inode", String::new())
    };
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-b", &BLOCK_BYTES.to_string(), "-J", "size=16", "-G", "4", "-O", feature])
        .arg("-E")
        .arg(format!("lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0{growth}"))
        .arg(path)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| DiskError::Format(format!("run mkfs.ext4 (package e2fsprogs): {error}")))?;
    if !output.status.success() {
        return Err(DiskError::Format(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let disk = attach(path)?;
    for layer in spawn::overlays() {
        for directory in ["", "/upper", "/work"] {
            let name = format!("{layer}{directory}");
            rustix::fs::mkdirat(&disk, &name, Mode::from_raw_mode(0o755)).map_err(|errno| DiskError::System {
                step: "create",
                path: name,
                source: errno.into(),
            })?;
        }
    }
    Ok(())
}

/// Attaches a disk image and returns it as a detached mount.
pub fn attach(path: &Path) -> Result<OwnedFd, DiskError> {
    let file = at("open", path, OpenOptions::new().read(true).write(true).open(path))?;
    let device = at("attach a loop device to", path, LoopDevice::attach(file.as_fd()))?;
    mount(&device, path)
}

/// A mount of its own of the disk on a device, also when that is mounted already.
pub fn mount(device: &LoopDevice, path: &Path) -> Result<OwnedFd, DiskError> {
    let mount = mount::new_filesystem("ext4", &options(device), MountAttrFlags::MOUNT_ATTR_NODEV);
    at("mount", path, mount.map_err(Into::into))
}

/// Mounts a disk of which nothing was ever flushed. Setting the file system up writes its superblock and flushes that, and with it the
/// whole image; nothing needs that order as long as none of the image is on the host's disk for sure. From then on the file
/// system keeps it: what is flushed next takes all of the image along.
pub fn mount_unflushed(device: &LoopDevice, path: &Path) -> Result<OwnedFd, DiskError> {
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = mount::new_filesystem_set_up_with("ext4", &options(device), "nobarrier", "barrier", attributes);
    at("mount", path, mount.map_err(Into::into))
}

fn options(device: &LoopDevice) -> [(&'static str, Option<&str>); 5] {
    [
        ("source", Some(device.path.as_str())),
        // The template's inode tables are zero where it is a hole; writing zeros would fill the holes.
        ("noinit_itable", None),
        // Freed blocks go back to the host at once.
        ("discard", None),
        // ext4 otherwise writes a file out while it is renamed over another, which makes whoever
        // replaces a large file wait for the host's disk. A file that must last is synced by its writer.
        ("noauto_da_alloc", None),
        // The thread that would read them ahead costs more than reading the few that get used.
        ("no_prefetch_block_bitmaps", None),
    ]
}

/// Whether the file system that is mounted from a disk had errors, and whether it is held because the host has no space.
pub(crate) fn faults(path: &Path) -> (bool, bool) {
    let devices = LoopDevice::over(path).unwrap_or_default();
    let names: Vec<&str> = devices.iter().filter_map(|device| device.path.strip_prefix("/dev/")).collect();
    let had_errors = |name: &&str| {
        let count = fs::read_to_string(format!("/sys/fs/ext4/{name}/errors_count"));
        count.is_ok_and(|count| count.trim().parse::<u64>().is_ok_and(|count| count > 0))
    };
    (names.iter().any(had_errors), names.iter().any(|name| brake::is_held(name)))
}

/// Puts a disk in order that is not in use and had errors. What the kernel can do itself, such as replaying the journal, is
/// left to it.
pub(crate) fn repair(path: &Path) -> Result<(), DiskError> {
    let file = at("open", path, File::open(path))?;
    if Superblock::read(&file)?.has_errors {
        ext4_image::repair(path)?;
    }
    Ok(())
}

/// Grows what is on a disk that is not in use to this size, unless it is as large already.
pub fn grow(path: &Path, bytes: u64) -> Result<(), DiskError> {
    let file = at("open", path, OpenOptions::new().read(true).write(true).open(path))?;
    let has = |found: Superblock| found.bytes >= bytes;
    if Superblock::read(&file).map(has)? {
        return Ok(());
    }
    // Not by the kernel, to which only servers with CAP_SYS_RESOURCE may say so.
    if ext4_image::recover(path).map(has)? {
        return Ok(());
    }
    if at("look at", path, file.metadata())?.len() < bytes {
        at("size", path, file.set_len(bytes))?;
    }
    ext4_image::grow(path, bytes)?;
    at("sync", path, file.sync_all())
}

/// Waits until the host has written a disk back and let go of it: a mount goes with its mount namespace, a while
/// after the last process of that.
pub fn wait_until_unmounted(path: &Path) -> Result<(), DiskError> {
    let begin = Instant::now();
    let mut pause = Duration::from_millis(1);
    while !at("look for the loop device of", path, LoopDevice::over(path))?.is_empty() {
        if begin.elapsed() > UNMOUNT_MAX {
            return at("unmount", path, Err(io::ErrorKind::TimedOut.into()));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    Ok(())
}

/// Copies a file into an empty one: shares its blocks where the file system can, and copies what is not a hole
/// where it cannot.
pub fn copy(source: &File, target: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(target, source).is_ok() {
        return Ok(());
    }
    copy_sparse(source, target, copy_in_kernel)
}

/// Copies what is not a hole, by a function that copies from one position to another.
fn copy_sparse(
    source: &File,
    target: &File,
    part: impl Fn(&File, &File, u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(position)) {
            Ok(start) => start,
            // No data after this position.
            Err(rustix::io::Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?;
        part(source, target, start, end)?;
        position = end;
    }
    Ok(())
}

fn copy_in_kernel(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let rest = (end - from) as usize;
        let copied = rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), rest)?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

fn copy_bytes(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut piece = vec![0; COPIED_AT_ONCE.min(end - start) as usize];
    for from in (start..end).step_by(COPIED_AT_ONCE as usize) {
        let piece = &mut piece[..COPIED_AT_ONCE.min(end - from) as usize];
        source.read_exact_at(piece, from)?;
        target.write_all_at(piece, from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_sparse_copy_has_the_same_content_and_stays_sparse() {
        check_copy(copy_in_kernel);
        check_copy(copy_bytes);
    }

    fn check_copy(part: impl Fn(&File, &File, u64, u64) -> io::Result<()>) {
        let directory = tempfile::tempdir().expect("a directory");
        let open = |name: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(directory.path().join(name))
                .expect("a file")
        };
        let (source, target) = (open("a"), open("b"));
        source.set_len(64 << 20).expect("a size");
        for offset in [0, 5 << 20, (64 << 20) - 4] {
            source.write_all_at(b"data", offset).expect("write");
        }
        copy_sparse(&source, &target, part).expect("copy");
        let metadata = target.metadata().expect("metadata");
        assert_eq!(metadata.len(), 64 << 20);
        assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
        for offset in [0, 5 << 20, (64 << 20) - 4] {
            let mut found = [0; 4];
            target.read_exact_at(&mut found, offset).expect("read");
            assert_eq!(&found, b"data");
        }
    }
}
