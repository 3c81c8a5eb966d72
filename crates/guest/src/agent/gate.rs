//! Answers calls in the kernel's place, or decides whether the kernel may carry them out.
//!
//! The system call filter stops whoever makes one of these calls and tells this process. It answers `sysinfo(2)`, counts
//! what the kernel counts to nobody ([`shares`](super::shares)), and keeps the buffers small of sockets that hold what
//! nobody counts. For that, and for nothing else, the agent may look into the sandbox's processes; its commands may not.
//! See docs/decisions/0017-shares-of-the-kernel.md.
//!
//! What may wait for the sandbox's own threads is done beside the main loop: they may have no processor time.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use rustix::thread::CapabilitySet;
use rustix::time::Timespec;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::shares::Shares;
use super::{Agent, machine, processes};
use crate::seccomp::Listener;

/// `_IOWR('!', 0, struct seccomp_notif)`, `_IOWR('!', 1, struct seccomp_notif_resp)`, `_IOW('!', 2, u64)` and
/// `_IOW('!', 3, struct seccomp_notif_addfd)`.
const RECEIVE: u32 = 0xc050_2100;
const SEND: u32 = 0xc018_2101;
const IS_VALID: u32 = 0x4008_2102;
const GIVE_DESCRIPTOR: u32 = 0x4018_2103;
/// Lets the kernel carry out the call.
const CONTINUE: u32 = 1;
/// Giving a descriptor is the answer.
const AND_SEND: u32 = 2;

/// So many questions are answered in this time at most: whoever calls all the time must not get this process's time all
/// the time.
const ANSWERS_AT_ONCE: u32 = 256;
const TURN: Duration = Duration::from_millis(40);
/// Questions for which this process waits for the sandbox's threads at a time.
const WAITING_MAX: usize = 4;
/// Questions that wait for an answer at a time. Whoever was interrupted asks again.
const QUESTIONS_MAX: usize = 256;

/// Bytes asked for, of which the kernel makes twice as many, for sockets that hold what nobody counts. It was Linux's
/// own limit up to 6.17, so that programs stand it.
const BUFFER_BYTES_MAX: u32 = 212_992;

/// `struct seccomp_notif`.
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

/// `struct seccomp_notif_addfd`.
#[repr(C)]
struct Gift {
    id: u64,
    flags: u32,
    descriptor: u32,
    new_descriptor: u32,
    new_flags: u32,
}

/// How a call ends, if the kernel carries it out.
type Told = Result<(), Errno>;

/// Where questions come from and answers go to.
struct Calls {
    waiting: AsyncFd<OwnedFd>,
    listener: Listener,
    places: Arc<Semaphore>,
}

/// Takes the questions and answers them.
pub fn start(agent: &Arc<Agent>) {
    let settings = &agent.settings;
    let (Some(waiting), Some(secret)) = (&settings.calls, &settings.secret) else { return };
    let mut bytes = [0; 8];
    if rustix::io::read(secret, &mut bytes) != Ok(bytes.len()) {
        return;
    }
    let listener = Listener { secret: u64::from_ne_bytes(bytes) };
    let Ok(waiting) = waiting.try_clone() else { return };
    // SAFETY: an `OwnedFd` keeps its descriptor open as long as it lives, and gives the same one each time.
    let Ok(waiting) = (unsafe { AsyncFd::register_with_interest(waiting, Interest::READABLE) }) else { return };
    let calls = Calls { waiting, listener, places: Arc::new(Semaphore::new(WAITING_MAX)) };
    tokio::spawn(answer(agent.clone(), Arc::new(calls)));
}

async fn answer(agent: Arc<Agent>, calls: Arc<Calls>) {
    let mut shares = Shares::new();
    let questions = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let (mut answers, mut turn) = (0, Instant::now());
    loop {
        let Ok(mut ready) = calls.waiting.readable().await else { return };
        if !calls.is_waiting() {
            ready.clear_ready();
            continue;
        }
        let place = questions.clone().acquire_owned().await.expect("never closed");
        let mut question = Question::default();
        // Fails when whoever asked is gone.
        if calls.control(RECEIVE, (&raw mut question).cast()).is_ok() {
            decide(&agent, &calls, &mut shares, question, place);
        }
        answers += 1;
        if answers == ANSWERS_AT_ONCE {
            tokio::time::sleep_until(turn + TURN).await;
            (answers, turn) = (0, Instant::now());
        }
    }
}

fn decide(agent: &Agent, calls: &Arc<Calls>, shares: &mut Shares, question: Question, place: OwnedSemaphorePermit) {
    let id = question.id;
    match i64::from(question.number) {
        libc::SYS_sysinfo => calls.answer(tell(agent, calls, &question)),
        libc::SYS_setsockopt => calls.beside(question, place, set_buffer),
        libc::SYS_socket if question.arguments[0] as i32 == libc::AF_NETLINK => {
            // Made here and given, so that no two can take the last one.
            match shares.take_netlink().and_then(|()| calls.open_netlink(&question)) {
                Ok(socket) => calls.beside(question, place, move |calls, question| calls.give(question, socket)),
                Err(errno) => calls.finish(id, Err(errno)),
            }
        }
        libc::SYS_socket => calls.let_go_on(id, shares.take_datagrams(agent)),
        // `seccomp` and `prctl`, as far as they install a filter.
        _ => calls.let_go_on(id, shares.take_filter()),
    }
}

impl Calls {
    /// Whether there is a question: receiving one would wait for it.
    fn is_waiting(&self) -> bool {
        let mut waiting = [PollFd::new(self.waiting.get_ref(), PollFlags::IN)];
        matches!(rustix::event::poll(&mut waiting, Some(&Timespec::default())), Ok(1))
    }

    fn control(&self, request: u32, argument: *mut c_void) -> Told {
        // SAFETY: every request gets a pointer to the structure that it names, which outlives the call.
        match unsafe { libc::ioctl(self.waiting.get_ref().as_raw_fd(), request as _, argument) } {
            -1 => Err(last_errno()),
            _ => Ok(()),
        }
    }

    /// Whether the caller still waits for the answer.
    fn stands(&self, question: &Question) -> bool {
        let mut id = question.id;
        self.control(IS_VALID, (&raw mut id).cast()).is_ok()
    }

    /// Whoever asked may be gone.
    fn answer(&self, answer: Answer) {
        let _ = self.control(SEND, (&raw const answer).cast_mut().cast());
    }

    fn finish(&self, id: u64, told: Told) {
        let error = told.map_or_else(|errno| -errno.raw_os_error(), |()| 0);
        self.answer(Answer { id, value: 0, error, flags: 0 });
    }

    fn let_go_on(&self, id: u64, told: Told) {
        match told {
            // What decides is in the call's own registers, which nobody can change meanwhile.
            Ok(()) => self.answer(Answer { id, value: 0, error: 0, flags: CONTINUE }),
            Err(errno) => self.finish(id, Err(errno)),
        }
    }

    /// Does something on a thread of its own, and answers with what came of it.
    fn beside(
        self: &Arc<Self>,
        question: Question,
        place: OwnedSemaphorePermit,
        work: impl FnOnce(&Self, &Question) -> Told + Send + 'static,
    ) {
        let calls = self.clone();
        tokio::spawn(async move {
            let _question = place;
            let _place = calls.places.clone().acquire_owned().await.expect("never closed");
            let worker = calls.clone();
            let work = move || {
                let told = work(&worker, &question);
                worker.finish(question.id, told);
            };
            let _ = tokio::task::spawn_blocking(work).await;
        });
    }

    fn open_netlink(&self, question: &Question) -> Result<OwnedFd, Errno> {
        let [family, kind, protocol, ..] = question.arguments;
        let [family, kind] = self.listener.sign(family as i32, kind as i32 | libc::SOCK_CLOEXEC);
        // SAFETY: a call without pointers.
        match unsafe { libc::syscall(libc::SYS_socket, family, kind, protocol) } {
            -1 => Err(last_errno()),
            // SAFETY: the kernel made a new descriptor that nobody else owns.
            descriptor => Ok(unsafe { OwnedFd::from_raw_fd(descriptor as RawFd) }),
        }
    }

    /// Answers with a descriptor. Waits until the caller has taken it.
    fn give(&self, question: &Question, descriptor: OwnedFd) -> Told {
        let kept = question.arguments[1] as i32 & libc::SOCK_CLOEXEC == 0;
        let mut gift = Gift {
            id: question.id,
            flags: AND_SEND,
            descriptor: descriptor.as_raw_fd() as u32,
            new_descriptor: 0,
            new_flags: if kept { 0 } else { libc::O_CLOEXEC as u32 },
        };
        rustix::io::retry_on_intr(|| self.control(GIVE_DESCRIPTOR, (&raw mut gift).cast()))
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

fn with_power<T>(work: impl FnOnce() -> T) -> T {
    use_power(true);
    let done = work();
    use_power(false);
    done
}

/// The caller's memory. The number could be another process's by now, unless the question still stands after it was
/// opened.
fn memory(calls: &Calls, question: &Question, options: &OpenOptions) -> Option<File> {
    let memory = with_power(|| options.open(format!("/proc/{}/mem", question.pid))).ok()?;
    calls.stands(question).then_some(memory)
}

fn tell(agent: &Agent, calls: &Calls, question: &Question) -> Answer {
    let answer = |error: i32, flags: u32| Answer { id: question.id, value: 0, error, flags };
    // What cannot be answered here is answered by the kernel.
    let Some(memory) = memory(calls, question, OpenOptions::new().write(true)) else {
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

/// Carries out `setsockopt` for the size of a buffer: were the caller to go on, it could change the size meanwhile.
fn set_buffer(calls: &Calls, question: &Question) -> Told {
    let [descriptor, _, option, place, size, _] = question.arguments;
    let gone = Errno::SRCH;
    let process = processes::of_thread(question.pid).and_then(|pid| Pid::from_raw(pid as i32)).ok_or(gone)?;
    let process = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
    let memory = memory(calls, question, OpenOptions::new().read(true)).ok_or(gone)?;
    let taken = with_power(|| rustix::process::pidfd_getfd(process, descriptor as RawFd, PidfdGetfdFlags::empty()));
    let socket = taken?;
    let mut bytes = [0; 4];
    if (size as u32) < bytes.len() as u32 {
        return Err(Errno::INVAL);
    }
    memory.read_exact_at(&mut bytes, place).map_err(|_| Errno::FAULT)?;
    let mut wanted = u32::from_ne_bytes(bytes);
    // What sockets of these kinds hold is counted.
    let domain = number_of(&socket, libc::SO_DOMAIN)?;
    if domain != libc::AF_UNIX && number_of(&socket, libc::SO_TYPE)? != libc::SOCK_STREAM {
        // As the kernel does it, for which a negative number is a large one.
        wanted = wanted.min(BUFFER_BYTES_MAX);
    }
    let [descriptor, level] = calls.listener.sign(socket.as_raw_fd(), libc::SOL_SOCKET);
    // SAFETY: the pointer is to a number of that size, which outlives the call.
    match unsafe { libc::syscall(libc::SYS_setsockopt, descriptor, level, option, &raw const wanted, size_of::<u32>()) }
    {
        -1 => Err(last_errno()),
        _ => Ok(()),
    }
}

/// An option of `SOL_SOCKET` that is a number.
fn number_of(socket: &OwnedFd, option: i32) -> Result<i32, Errno> {
    let (mut number, mut size) = (0i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: both pointers are to numbers that outlive the call, and the size is the first one's.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut number).cast(), &raw mut size)
    };
    if result == 0 { Ok(number) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<Question>(), size_of::<Answer>(), size_of::<Gift>()), (80, 24, 24));
    }
}
