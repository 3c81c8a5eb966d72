//! Process calls that the standard library does not offer.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;

use crate::mount::last_errno;

pub(super) enum Clone {
    Child,
    Parent { pid: i32, pidfd: OwnedFd },
}

/// Forks with `flags`; the child is a copy of this one-threaded process and may do anything.
pub(super) fn clone(flags: i32) -> Result<Clone, Errno> {
    let mut pidfd: RawFd = -1;
    // SAFETY: an all-zero clone_args is valid; unused fields must be zero.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags as u64 | libc::CLONE_PIDFD as u64;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM and a stack this is fork; this process has one thread, so no lock
    // can be held by another one in the child.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) } {
        -1 => Err(last_errno()),
        0 => Ok(Clone::Child),
        // SAFETY: on success the kernel stored a new descriptor that nobody else owns.
        pid => Ok(Clone::Parent { pid: pid as i32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
    }
}

pub(super) fn unshare(flags: i32) -> Result<(), Errno> {
    // SAFETY: takes no pointers; only namespaces of this one-threaded process change.
    if unsafe { libc::unshare(flags) } == 0 { Ok(()) } else { Err(last_errno()) }
}

/// Takes on another user and group for good, and keeps all capabilities.
pub(super) fn become_user(id: u32) -> Result<(), Errno> {
    // SAFETY: takes no pointers; the process has one thread, so the raw calls change all of it.
    unsafe {
        if libc::prctl(libc::PR_SET_SECUREBITS, KEEP_CAPABILITIES) != 0
            || libc::syscall(libc::SYS_setresgid, id, id, id) != 0
            || libc::syscall(libc::SYS_setresuid, id, id, id) != 0
        {
            return Err(last_errno());
        }
    }
    Ok(())
}

/// SECBIT_NO_SETUID_FIXUP: another user id takes no capabilities away.
pub(super) const KEEP_CAPABILITIES: libc::c_ulong = 1 << 2;

/// Closes a child's copy of what its parent goes on to use.
pub(super) fn close(copy: BorrowedFd<'_>) {
    // SAFETY: only called in a child that never uses or drops what owns the descriptor.
    unsafe { libc::close(copy.as_raw_fd()) };
}

pub(super) enum Exit {
    Done,
    Failed,
}

/// Ends a child without running what the parent registered for its own end.
pub(super) fn exit(status: Exit) -> ! {
    // SAFETY: ends the process.
    unsafe {
        libc::_exit(match status {
            Exit::Done => 0,
            Exit::Failed => 1,
        })
    }
}

pub(super) fn wait(pid: i32) {
    // SAFETY: a null status pointer is allowed.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } == -1 && last_errno() == Errno::INTR {}
}

/// Lets the kernel collect sandboxes that ended; the server learns of it from their pidfds.
pub(super) fn ignore_children() {
    // SAFETY: sets a disposition; no handler of ours is involved.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Undoes [`ignore_children`] in a child, which hands its dispositions on through exec.
pub(super) fn notice_children() {
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}
