//! The system calls that the standard library and rustix do not offer.
#![allow(unsafe_code)]

pub mod ext4;
pub mod loop_device;
pub mod netlink;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Hands descriptors to a child under the given numbers. The numbers must not be in use by the
/// descriptors themselves.
pub fn pass_descriptors(command: &mut Command, descriptors: Vec<(OwnedFd, i32)>) {
    let place = move || {
        for (fd, number) in &descriptors {
            // SAFETY: dup2 is async-signal-safe and takes no pointers.
            if unsafe { libc::dup2(fd.as_raw_fd(), *number) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes async-signal-safe calls only and does not allocate on success.
    unsafe { command.pre_exec(place) };
}

/// Moves the calling thread, and only it, into a network namespace.
pub fn enter_network_namespace(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes no pointers; a network namespace is a property of the thread.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Lets a task wait for a descriptor to become readable. Needs the runtime's context.
pub fn wait_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and names the same file for as long as it lives, and the result
    // owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// Lowers the priority of the calling thread, and only of it.
pub fn yield_to_others() {
    const NICENESS: i32 = 10;
    // SAFETY: takes no pointers. With id 0 Linux means the calling thread, not the process. A
    // failure leaves the priority as it was, which is harmless.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
}
