//! Attaching volumes in sandboxes that run, and taking them out again.
//!
//! A process of its own enters the sandbox's mount namespace for it. From there no path leads out of the
//! sandbox, whatever is renamed meanwhile; it is in none of the sandbox's other namespaces, so nobody in
//! there sees it; and it executes nothing. Every directory is held by a descriptor while something is done to it.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags};
use rustix::thread::ThreadNameSpaceType;

use super::process::{self, Clone, Exit};
use super::sandbox::act_as;
use super::{Step, StepError};
use crate::spawn::{Mount, MountOutcome, Unmount};

/// The only kind of file system in which directories are made and covered: a sandbox's root and its layers are
/// overlays; its other file systems are not for users.
const OVERLAY: u64 = 0x794c_7630;
/// A sandbox can rename directories above a volume while it is looked for. Nobody wins that race so often by chance.
const TRIES: u32 = 256;

pub(super) fn mount(order: Mount, descriptors: Vec<OwnedFd>) -> Result<(), StepError> {
    let [outcome, sandbox, tree] = parts(descriptors)?;
    in_a_process(outcome, move || {
        enter(sandbox.as_fd())?;
        // New directories belong to whoever makes them, and the sandbox's file systems know its own ids only.
        act_as(order.owner).step("act as the sandbox's user")?;
        let place = match open_place(&order.path) {
            Ok(place) => place,
            Err(refusal) => return refusal.into_outcome(),
        };
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        match rustix::mount::move_mount(&tree, "", &place, "", flags) {
            Ok(()) => Ok(MountOutcome::Done),
            Err(Errno::NOENT) => refused("it was removed meanwhile"),
            Err(errno) => Err(StepError { step: "attach the volume", errno }),
        }
    })
}

pub(super) fn unmount(order: Unmount, descriptors: Vec<OwnedFd>) -> Result<(), StepError> {
    let [outcome, sandbox] = parts(descriptors)?;
    in_a_process(outcome, move || {
        // The host's, in which this process has a number.
        let proc = open_directory(rustix::fs::CWD, "/proc", ResolveFlags::empty()).step("open /proc")?;
        enter(sandbox.as_fd())?;
        for _ in 0..TRIES {
            let Some(path) = path_of(&read_mounts(proc.as_fd())?, &order) else {
                return Ok(MountOutcome::Done);
            };
            if unmount_at(&path, &order)? == Some(MountOutcome::Busy) {
                return Ok(MountOutcome::Busy);
            }
        }
        Err(StepError { step: "find the volume, which is renamed all the time", errno: Errno::AGAIN })
    })
}

fn parts<const COUNT: usize>(descriptors: Vec<OwnedFd>) -> Result<[OwnedFd; COUNT], StepError> {
    descriptors.try_into().map_err(|_| StepError { step: "read the request", errno: Errno::INVAL })
}

/// Runs `work` in a child, which writes the outcome to the pipe. What `work` owns is closed before
/// that: an open descriptor of a mount would keep it busy.
fn in_a_process(outcome: OwnedFd, work: impl FnOnce() -> Result<MountOutcome, StepError>) -> Result<(), StepError> {
    match process::clone(0).step("clone a process for a mount")? {
        Clone::Parent { .. } => Ok(()),
        Clone::Child => {
            let result = work().unwrap_or_else(|error| MountOutcome::Failed {
                step: error.step.into(),
                errno: error.errno.raw_os_error(),
            });
            let sent = serde_json::to_vec(&result).map(|text| rustix::io::write(&outcome, &text));
            process::exit(if sent.is_ok() { Exit::Done } else { Exit::Failed })
        }
    }
}

fn enter(sandbox: BorrowedFd<'_>) -> Result<(), StepError> {
    // Root and working directory become the namespace's own, which is the sandbox's root.
    rustix::thread::move_into_thread_name_spaces(sandbox, ThreadNameSpaceType::MOUNT)
        .step("enter the sandbox's mount namespace")
}

fn refused(why: &str) -> Result<MountOutcome, StepError> {
    Ok(MountOutcome::Refused(format!("the mount path cannot be used: {why}")))
}

/// Why there is no place for a mount.
enum Refusal {
    Path(&'static str),
    Step(StepError),
}

impl Refusal {
    fn into_outcome(self) -> Result<MountOutcome, StepError> {
        match self {
            Self::Path(why) => refused(why),
            Self::Step(error) => Err(error),
        }
    }
}

impl From<StepError> for Refusal {
    fn from(error: StepError) -> Self {
        Self::Step(error)
    }
}

fn open_directory(from: BorrowedFd<'_>, path: impl rustix::path::Arg, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(from, path, flags, Mode::empty(), resolve)
}

/// Links could lead a path past the rules that were checked on its text.
const NO_LINKS: ResolveFlags = ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_MAGICLINKS);

/// Opens the directory of that path, one part after the other, and makes those that are missing.
fn open_place(path: &str) -> Result<OwnedFd, Refusal> {
    let mut place = open_directory(rustix::fs::CWD, "/", NO_LINKS).step("open the sandbox's root")?;
    let names = path.strip_prefix('/').ok_or(Refusal::Path("it is not absolute"))?;
    for name in names.split('/') {
        if matches!(name, "" | "." | "..") {
            return Err(Refusal::Path("it has a part that is empty, `.` or `..`"));
        }
        if rustix::fs::fstatfs(&place).step("look at the mount path")?.f_type as u64 != OVERLAY {
            return Err(Refusal::Path("it is not on the sandbox's own disk"));
        }
        place = open_or_make(place.as_fd(), name)?;
    }
    if is_mount_root(place.as_fd()).step("look at the mount path")?.is_some() {
        return Err(Refusal::Path("something is mounted there already"));
    }
    Ok(place)
}

fn open_or_make(parent: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Refusal> {
    for _ in 0..TRIES {
        match open_directory(parent, name, NO_LINKS | ResolveFlags::BENEATH) {
            Ok(directory) => return Ok(directory),
            Err(Errno::LOOP) => return Err(Refusal::Path("a part of it is a symbolic link")),
            Err(Errno::NOTDIR) => return Err(Refusal::Path("a part of it is not a directory")),
            Err(Errno::NAMETOOLONG) => return Err(Refusal::Path("a part of it is too long")),
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(StepError { step: "open the mount path", errno }.into()),
        }
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(Errno::NOSPC | Errno::DQUOT) => return Err(Refusal::Path("the sandbox's disk is full")),
            Err(Errno::NOENT) => return Err(Refusal::Path("a part of it was removed meanwhile")),
            Err(errno) => return Err(StepError { step: "make the mount path", errno }.into()),
        }
    }
    Err(Refusal::Path("a part of it comes and goes all the time"))
}

/// The device (major, minor) of the file system whose root this is; `None` for what is no root of a mount.
fn is_mount_root(place: BorrowedFd<'_>) -> Result<Option<(u32, u32)>, Errno> {
    let found = rustix::fs::statx(place, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    let root = found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    Ok(root.then_some((found.stx_dev_major, found.stx_dev_minor)))
}

fn read_mounts(proc: BorrowedFd<'_>) -> Result<Vec<u8>, StepError> {
    let file = rustix::fs::openat(proc, "self/mountinfo", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .step("open the list of mounts")?;
    let mut text = Vec::new();
    std::fs::File::from(file).read_to_end(&mut text).step("read the list of mounts")?;
    Ok(text)
}

/// Where a device is mounted, by the text of a `mountinfo`.
fn path_of(mounts: &[u8], order: &Unmount) -> Option<Vec<u8>> {
    let device = format!("{}:{}", order.major, order.minor);
    let line = mounts.split(|byte| *byte == b'\n').find(|line| field(line, 2) == Some(device.as_bytes()))?;
    Some(unescape(field(line, 4)?))
}

fn field(line: &[u8], index: usize) -> Option<&[u8]> {
    line.split(|byte| *byte == b' ').nth(index)
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                rest = &after[3..];
            }
            _ => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

/// Unmounts the device if it is still there; `None` when it is not.
fn unmount_at(path: &[u8], order: &Unmount) -> Result<Option<MountOutcome>, StepError> {
    let Some(slash) = path.iter().rposition(|byte| *byte == b'/') else { return Ok(None) };
    // The slash stays with the parent, for that may be the root.
    let (parent, name) = path.split_at(slash + 1);
    let open = |from: BorrowedFd<'_>, path: &[u8]| match open_directory(from, path, NO_LINKS) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => Ok(None),
        Err(errno) => Err(StepError { step: "open the volume's place", errno }),
    };
    let Some(parent) = open(rustix::fs::CWD, parent)? else { return Ok(None) };
    let Some(place) = open(parent.as_fd(), name)? else { return Ok(None) };
    let device = is_mount_root(place.as_fd()).step("look at the volume's place")?;
    // It would keep the volume busy.
    drop(place);
    if device != Some((order.major, order.minor)) {
        return Ok(None);
    }
    // What is mounted on cannot be renamed or removed, so the name in this directory is what was looked at.
    rustix::process::fchdir(&parent).step("enter the volume's directory")?;
    let flags = if order.lazy { UnmountFlags::NOFOLLOW | UnmountFlags::DETACH } else { UnmountFlags::NOFOLLOW };
    match rustix::mount::unmount(name, flags) {
        Ok(()) => Ok(Some(MountOutcome::Done)),
        Err(Errno::BUSY) => Ok(Some(MountOutcome::Busy)),
        Err(errno) => Err(StepError { step: "unmount the volume", errno }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_where_it_is_mounted_and_nowhere_else() {
        let mounts = b"21 1 0:30 / / rw - overlay nagaya rw\n\
                      34 21 7:12 / /home/user/a\\040b\\134c rw - ext4 /dev/loop12 rw\n\
                      35 21 7:1 / /data ro - ext4 /dev/loop1 ro\n";
        let order = |minor| Unmount { major: 7, minor, lazy: false };
        assert_eq!(path_of(mounts, &order(12)).as_deref(), Some(&b"/home/user/a b\\c"[..]));
        assert_eq!(path_of(mounts, &order(1)).as_deref(), Some(&b"/data"[..]));
        assert_eq!(path_of(mounts, &order(2)), None);
    }

    #[test]
    fn what_is_no_escape_stays_as_it_is() {
        for text in ["", "/plain", "/ends\\", "/\\04", "/\\999", "/\\日本", "/040"] {
            assert_eq!(unescape(text.as_bytes()), text.as_bytes());
        }
        assert_eq!(unescape(b"/\\040\\012x"), b"/ \nx");
    }
}
