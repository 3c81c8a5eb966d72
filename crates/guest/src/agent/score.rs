//! The score by which the kernel chooses what to kill when the host has no memory left: commands go first.
//!
//! Nobody in the sandbox may write to the agent's files in `/proc`, the agent's children included as long as they have
//! its memory. But a process begins with the score of its parent, and the agent holds its own file open: it raises its
//! own score, and its child takes that back before anything else. One start at a time does so.
#![allow(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const COMMAND: &[u8] = b"500";
const AGENT: &[u8] = b"0";

/// 1 while somebody's score is raised. A child opens it for the next one, so that it is no `Mutex`.
static RAISED: AtomicU32 = AtomicU32::new(0);
/// Others wait no longer than this for a child that somebody in the sandbox has stopped. What starts then may get the
/// agent's own score.
const PATIENCE: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// The agent's score on loan to a child.
#[derive(Debug)]
pub struct Loan {
    file: RawFd,
    lent: AtomicBool,
}

impl Loan {
    /// Raises the score of this process, of whose file `file` is an open descriptor.
    pub fn take(file: RawFd) -> Self {
        while RAISED.swap(1, Ordering::AcqRel) != 0 {
            if !wait() {
                break;
            }
        }
        write(file, COMMAND);
        Self { file, lent: AtomicBool::new(true) }
    }

    /// Gives it back, once. Only system calls: a child calls it in its parent's memory.
    pub fn give_back(&self) {
        if self.lent.swap(false, Ordering::AcqRel) {
            write(self.file, AGENT);
            RAISED.store(0, Ordering::Release);
            wake();
        }
    }
}

/// Best effort, as without memory to spare on the host nothing depends on it.
fn write(file: RawFd, score: &[u8]) {
    // SAFETY: the kernel reads `score.len()` bytes at a live pointer.
    unsafe { libc::write(file, score.as_ptr().cast(), score.len()) };
}

/// False when it took too long.
fn wait() -> bool {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let patience = PATIENCE;
    // SAFETY: the kernel reads the four bytes of a static, and a time on the stack.
    let result = unsafe { libc::syscall(libc::SYS_futex, RAISED.as_ptr(), operation, 1, &raw const patience) };
    result == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
}

fn wake() {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel only takes the address of a static as a name.
    unsafe { libc::syscall(libc::SYS_futex, RAISED.as_ptr(), operation, 1) };
}
