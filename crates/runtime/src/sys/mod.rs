//! The system calls that the standard library and rustix do not offer.
#![allow(unsafe_code)]

pub mod ext4;
pub mod loop_device;
pub mod netlink;
pub mod rcu;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const FIRST_BEYOND_STANDARD: libc::c_uint = 3;
const CLOSE_RANGE_CLOEXEC: libc::c_int = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;

/// Hands descriptors to a child under the given numbers, and no others but the three standard ones: whoever started the
/// server may have left some open that are nobody's business. The numbers must not be in use by the descriptors themselves.
pub fn pass_descriptors(command: &mut Command, descriptors: Vec<(OwnedFd, i32)>) {
    let place = move || {
        // SAFETY: takes no pointers.
        if unsafe { libc::close_range(FIRST_BEYOND_STANDARD, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) } == -1 {
            return Err(io::Error::last_os_error());
        }
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

/// Gives the memory that the process has freed back to the host. Takes some milliseconds.
pub fn give_memory_back() {
    // SAFETY: takes no pointers, and may be called by any thread at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
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

/// Runs `work` on this thread in another network namespace, named by itself or by the pidfd of a process in it.
/// `work` must not wait for other tasks: they would run there, too. A thread that cannot come back ends the server,
/// because everything that it made later would lie in a sandbox's network; sandboxes live on.
pub fn in_network_namespace<T>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let home = std::fs::File::open("/proc/thread-self/ns/net")?;
    enter_network_namespace(namespace)?;
    let result = work();
    if let Err(error) = enter_network_namespace(home.as_fd()) {
        tracing::error!(%error, "a thread cannot return from a sandbox's network namespace; the server ends at once");
        std::process::abort();
    }
    result
}

/// Marks a socket, so that rules of the packet filter know packets that would be delivered to it.
pub fn set_socket_mark(socket: BorrowedFd<'_>, mark: u32) -> io::Result<()> {
    let length = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes at the pointer, which is a live u32 of that size.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MARK, (&raw const mark).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets a task wait for a descriptor to become readable. Needs the runtime's context.
pub fn wait_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and names the same file for as long as it lives, and the result
    // owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// Bytes of a page of memory.
pub fn page_bytes() -> u64 {
    // SAFETY: takes no pointers.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4_096).max(1)
}

/// Lowers the priority of the calling thread, and only of it.
pub fn yield_to_others() {
    const NICENESS: i32 = 10;
    // SAFETY: takes no pointers. With id 0 Linux means the calling thread, not the process. A
    // failure leaves the priority as it was, which is harmless.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
}
