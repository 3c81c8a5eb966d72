//! Answers `sysinfo(2)` in the kernel's place.
//!
//! The system call filter stops whoever calls it and tells this process, which writes the answer into the caller's
//! memory. For that, and for nothing else, the agent may look into the sandbox's processes; its commands may not.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::thread::CapabilitySet;
use rustix::time::Timespec;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Agent, machine};

/// `_IOWR('!', 0, struct seccomp_notif)`, `_IOWR('!', 1, struct seccomp_notif_resp)` and `_IOW('!', 2, u64)`.
const RECEIVE: u32 = 0xc050_2100;
const SEND: u32 = 0xc018_2101;
const IS_VALID: u32 = 0x4008_2102;
/// Lets the kernel carry out the call.
const CONTINUE: u32 = 1;

/// Answers given before a rest: whoever calls all the time must not get this process's time all the time.
const ANSWERS_AT_ONCE: u32 = 64;
const REST: Duration = Duration::from_millis(20);

/// `struct seccomp_notif`; the filter stops one call only, so its number is known.
#[repr(C)]
#[derive(Default)]
struct Question {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    architecture: u32,
    instruction: u64,
    arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

pub async fn answer(agent: Arc<Agent>, listener: OwnedFd) {
    // SAFETY: an `OwnedFd` keeps its descriptor open as long as it lives, and gives the same one each time.
    let Ok(listener) = (unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }) else { return };
    let mut answers = 0;
    loop {
        let Ok(mut ready) = listener.readable().await else { return };
        if !is_waiting(&listener) {
            ready.clear_ready();
            continue;
        }
        let mut question = Question::default();
        // Fails when whoever asked is gone.
        if control(&listener, RECEIVE, (&raw mut question).cast()) {
            let told = tell(&agent, &listener, &question);
            control(&listener, SEND, (&raw const told).cast_mut().cast());
        }
        answers += 1;
        if answers % ANSWERS_AT_ONCE == 0 {
            tokio::time::sleep(REST).await;
        }
    }
}

/// Whether this thread may look into the sandbox's processes. It may not while anything else is done: what is asked of
/// the agent through the API is not to be done with that right. Threads begin with what the first one has then.
pub fn use_power(now: bool) {
    if let Ok(mut sets) = rustix::thread::capabilities(None) {
        sets.effective.set(CapabilitySet::SYS_PTRACE, now && sets.permitted.contains(CapabilitySet::SYS_PTRACE));
        // Laying it down is always allowed, and so is taking up what is permitted.
        let _ = rustix::thread::set_capabilities(None, sets);
    }
}

/// Whether there is a question: receiving one would wait for it.
fn is_waiting(listener: &AsyncFd<OwnedFd>) -> bool {
    let mut waiting = [PollFd::new(listener.get_ref(), PollFlags::IN)];
    matches!(rustix::event::poll(&mut waiting, Some(&Timespec::default())), Ok(1))
}

fn tell(agent: &Agent, listener: &AsyncFd<OwnedFd>, question: &Question) -> Answer {
    let answer = |error: i32, flags: u32| Answer { id: question.id, value: 0, error, flags };
    use_power(true);
    let memory = OpenOptions::new().write(true).open(format!("/proc/{}/mem", question.pid));
    use_power(false);
    // What cannot be answered here is answered by the kernel. The number could be another process's by now, unless
    // the question still stands after its memory was opened.
    let mut id = question.id;
    let (Ok(memory), true) = (memory, control(listener, IS_VALID, (&raw mut id).cast())) else {
        return answer(0, CONTINUE);
    };
    let told = machine::sysinfo(agent);
    // SAFETY: a structure of numbers that lives as long as the slice; it was zeroed, padding too.
    let bytes = unsafe { std::slice::from_raw_parts((&raw const told).cast::<u8>(), size_of::<libc::sysinfo>()) };
    match memory.write_all_at(bytes, question.arguments[0]) {
        Ok(()) => answer(0, 0),
        Err(_) => answer(-libc::EFAULT, 0),
    }
}

fn control(listener: &AsyncFd<OwnedFd>, request: u32, argument: *mut c_void) -> bool {
    // SAFETY: every request gets a pointer to the structure that it names, which outlives the call.
    unsafe { libc::ioctl(listener.get_ref().as_raw_fd(), request as _, argument) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<Question>(), size_of::<Answer>()), (80, 24));
    }
}
