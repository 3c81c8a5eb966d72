//! Requests to a mounted ext4 that only root may make.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `_IOW('f', 16, __u64)`.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
/// `_IOR('X', 125, __u32)`.
const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587D;
/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`; neither reads nor writes the integer.
const FIFREEZE: libc::c_ulong = 0xC004_5877;
const FITHAW: libc::c_ulong = 0xC004_5878;
/// Everything is written back first.
const GOING_FLAGS_DEFAULT: u32 = 0;
/// Nothing is, which works on a broken one too.
const GOING_FLAGS_NOLOGFLUSH: u32 = 2;

/// Grows the file system of this file or directory; its device must be large enough. Needs CAP_SYS_RESOURCE.
pub fn resize(root: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    // SAFETY: the kernel reads eight bytes from the pointer, which is valid during the call.
    done(unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) })
}

/// Writes everything back, then lets all reading and writing of open files fail.
pub fn shut_down(root: BorrowedFd<'_>) -> io::Result<()> {
    let shut_down = |flags: u32| {
        // SAFETY: the kernel reads four bytes from the pointer, which is valid during the call.
        done(unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_SHUTDOWN, &raw const flags) })
    };
    shut_down(GOING_FLAGS_DEFAULT).or_else(|_| shut_down(GOING_FLAGS_NOLOGFLUSH))
}

/// Writes everything back and lets all that would change the file system wait, until [`thaw`]. Not bound to the
/// life of this process.
pub fn freeze(root: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes no pointers.
    done(unsafe { libc::ioctl(root.as_raw_fd(), FIFREEZE, 0) })
}

/// Thawing one that is not frozen changes nothing.
pub fn thaw(root: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes no pointers.
    match done(unsafe { libc::ioctl(root.as_raw_fd(), FITHAW, 0) }) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
