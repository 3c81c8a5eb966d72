//! System calls of the agent that no safe wrapper offers.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use rustix::io::Errno;

use super::limits::Limit;
use super::score::Loan;

/// How far a new process came before it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Step {
    /// The process could not be made.
    Clone = 1,
    /// Its session, terminal, limits or standard streams.
    Prepare = 2,
    /// It could not be put under the sandbox's limits.
    Cgroup = 3,
    /// Its user.
    User = 4,
    /// Its working directory.
    Directory = 5,
    /// The program itself.
    Execute = 6,
}

/// Why no process came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpawnError {
    pub step: Step,
    pub errno: Errno,
}

/// Everything a new process needs, prepared by the parent: the child must not allocate.
#[derive(Debug)]
pub struct Program<'a> {
    /// Files to try, in order, until one can be executed.
    pub candidates: Vec<CString>,
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    pub cwd: CString,
    /// What becomes descriptors 0, 1 and 2. None of them is below 3.
    pub streams: [BorrowedFd<'a>; 3],
    /// Standard input is a terminal, to become the controlling one.
    pub terminal: bool,
    /// Uid and gid; `None` stays root.
    pub user: Option<(u32, u32)>,
    /// All its groups.
    pub groups: &'a [u32],
    pub umask: u32,
    pub limits: &'a [Limit],
    /// Files in which to write `0`.
    pub cgroup_procs: &'a [BorrowedFd<'a>],
    /// Our own score, which a new process begins with.
    pub oom_score: Option<BorrowedFd<'a>>,
    /// Soft limit of open files.
    pub open_files_max: u64,
}

/// Shared with the child, which runs in this very memory until it executes the program.
struct Plan {
    candidates: Vec<*const c_char>,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    cwd: *const c_char,
    streams: [RawFd; 3],
    terminal: bool,
    user: Option<(u32, u32)>,
    groups: (usize, *const libc::gid_t),
    umask: libc::mode_t,
    limits: (usize, *const Limit),
    cgroup_procs: Vec<RawFd>,
    score: Option<Loan>,
    open_files_max: u64,
    step: Step,
    errno: c_int,
}

/// The child's stack, bytes. It calls little and never deep.
const STACK_BYTES: usize = 64 * 1024;

/// Starts a program. Returns when it runs, with its process id, which is also its group and session.
///
/// Blocks while the kernel loads the program.
pub fn spawn(program: &Program<'_>) -> Result<i32, SpawnError> {
    let pointers = |strings: &[CString]| {
        let mut pointers: Vec<*const c_char> = strings.iter().map(|string| string.as_ptr()).collect();
        pointers.push(std::ptr::null());
        pointers
    };
    let mut plan = Plan {
        candidates: pointers(&program.candidates),
        argv: pointers(&program.argv),
        env: pointers(&program.env),
        cwd: program.cwd.as_ptr(),
        streams: program.streams.map(|stream| stream.as_raw_fd()),
        terminal: program.terminal,
        user: program.user,
        groups: (program.groups.len(), program.groups.as_ptr()),
        umask: program.umask,
        limits: (program.limits.len(), program.limits.as_ptr()),
        cgroup_procs: program.cgroup_procs.iter().map(|file| file.as_raw_fd()).collect(),
        score: None,
        open_files_max: program.open_files_max,
        step: Step::Clone,
        errno: 0,
    };
    let mut stack = vec![0u128; STACK_BYTES / 16];
    let top = stack.as_mut_ptr_range().end;
    plan.score = program.oom_score.map(|file| Loan::take(file.as_raw_fd()));
    // SAFETY: with CLONE_VM and CLONE_VFORK this thread is suspended until the child has executed a
    // program or exited, so `plan` and `stack` outlive its use of them and nobody else touches them.
    // All signals are blocked meanwhile, so that no handler of ours runs on the child's stack. The
    // stack is aligned to 16 bytes and grows downwards on every supported architecture.
    let (pid, errno) = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let pid = libc::clone(child, top.cast(), flags, (&raw mut plan).cast());
        let errno = *libc::__errno_location();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        (pid, errno)
    };
    // For a child that did not come to it.
    if let Some(score) = &plan.score {
        score.give_back();
    }
    // The child wrote to the plan behind the compiler's back.
    // SAFETY: both point to initialised fields of a live local.
    let (step, child_errno) =
        unsafe { ((&raw const plan.step).read_volatile(), (&raw const plan.errno).read_volatile()) };
    if pid < 0 {
        return Err(SpawnError { step: Step::Clone, errno: Errno::from_raw_os_error(errno) });
    }
    if child_errno != 0 {
        return Err(SpawnError { step, errno: Errno::from_raw_os_error(child_errno) });
    }
    Ok(pid)
}

/// Asks for the space of a part of a file, as a process of its own that joins control groups first. Returns its process
/// id; its exit code is 0, or an error's number.
pub fn reserve_apart(
    file: BorrowedFd<'_>,
    offset: u64,
    bytes: u64,
    cgroup_procs: &[BorrowedFd<'_>],
) -> Result<i32, SpawnError> {
    // SAFETY: without CLONE_VM the child works on a copy of this memory, of which it uses the arguments alone: system
    // calls, no allocation and no locks. All signals stay blocked in it, so no handler of ours runs there.
    let (pid, errno) = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let pid = libc::syscall(libc::SYS_clone, libc::SIGCHLD as usize, 0usize, 0usize, 0usize, 0usize);
        if pid == 0 {
            libc::_exit(reserve(file.as_raw_fd(), offset, bytes, cgroup_procs));
        }
        let errno = *libc::__errno_location();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        (pid, errno)
    };
    match pid {
        ..0 => Err(SpawnError { step: Step::Clone, errno: Errno::from_raw_os_error(errno) }),
        pid => Ok(pid as i32),
    }
}

/// # Safety
/// Only for the child in [`reserve_apart`].
unsafe fn reserve(file: RawFd, offset: u64, bytes: u64, cgroup_procs: &[BorrowedFd<'_>]) -> c_int {
    // SAFETY: plain system calls with valid arguments.
    unsafe {
        for group in cgroup_procs {
            if libc::write(group.as_raw_fd(), c"0".as_ptr().cast(), 1) < 0 {
                return *libc::__errno_location();
            }
        }
        // Its end costs the sandbox less than that of a command.
        let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if score >= 0 {
            libc::write(score, c"1000".as_ptr().cast(), 4);
        }
        let (Ok(offset), Ok(bytes)) = (offset.try_into(), bytes.try_into()) else { return libc::EFBIG };
        match libc::fallocate(file, libc::FALLOC_FL_KEEP_SIZE, offset, bytes) {
            0 => 0,
            _ => *libc::__errno_location(),
        }
    }
}

/// Runs in the child, on its own stack but in the parent's memory: only system calls, no
/// allocation, no locks, and no libc function that looks at other threads (such as `setuid`).
extern "C" fn child(plan: *mut c_void) -> c_int {
    // SAFETY: `spawn` passes a live plan, which nobody else uses until this function ends.
    let plan = unsafe { &mut *plan.cast::<Plan>() };
    // SAFETY: as above; the pointers in the plan are valid and end with a null pointer.
    unsafe {
        if let Some(score) = &plan.score {
            score.give_back();
        }
        if let Err(step) = prepare(plan) {
            plan.errno = *libc::__errno_location();
            plan.step = step;
            libc::_exit(127);
        }
        let mut refused = libc::ENOENT;
        for candidate in &plan.candidates[..plan.candidates.len() - 1] {
            libc::execve(*candidate, plan.argv.as_ptr(), plan.env.as_ptr());
            match *libc::__errno_location() {
                // The next directory of PATH may have it.
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => refused = libc::EACCES,
                errno => {
                    refused = errno;
                    break;
                }
            }
        }
        plan.step = Step::Execute;
        plan.errno = refused;
        libc::_exit(127)
    }
}

const CAP_SYS_PTRACE: libc::c_ulong = 19;

/// # Safety
/// Only for [`child`].
unsafe fn prepare(plan: &Plan) -> Result<(), Step> {
    let check = |result: i64, step: Step| if result < 0 { Err(step) } else { Ok(()) };
    // SAFETY: plain system calls with valid arguments; see `child`.
    unsafe {
        // All that we handle: a handler must not run in the parent's memory.
        for signal in [libc::SIGPIPE, libc::SIGCHLD, libc::SIGTERM].iter().chain(&super::power::SIGNALS) {
            libc::signal(*signal, libc::SIG_DFL);
        }
        check(libc::setsid().into(), Step::Prepare)?;
        for file in &plan.cgroup_procs {
            check(libc::write(*file, c"0".as_ptr().cast(), 1) as i64, Step::Cgroup)?;
        }
        // Whoever wants a core raises the soft limit. Where cores would leave the sandbox the filter lets nobody change it.
        limit(Limit { resource: libc::RLIMIT_CORE as c_int, soft: Some(0), hard: None });
        limit(Limit { resource: libc::RLIMIT_NOFILE as c_int, soft: Some(plan.open_files_max), hard: None });
        for each in std::slice::from_raw_parts(plan.limits.1, plan.limits.0) {
            limit(*each);
        }
        for (target, source) in plan.streams.iter().enumerate() {
            check(libc::dup2(*source, target as c_int).into(), Step::Prepare)?;
        }
        if plan.terminal {
            check(libc::ioctl(0, libc::TIOCSCTTY, 0).into(), Step::Prepare)?;
        }
        check(libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32), Step::Prepare)?;
        // The agent's, for its answers to `sysinfo`; commands have no power over each other. Without the right to
        // give it up there is none to be had.
        libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0);
        libc::umask(plan.umask);
        let groups = libc::syscall(libc::SYS_setgroups, plan.groups.0, plan.groups.1);
        if let Some((uid, gid)) = plan.user {
            check(groups, Step::User)?;
            check(libc::syscall(libc::SYS_setresgid, gid, gid, gid), Step::User)?;
            check(libc::syscall(libc::SYS_setresuid, uid, uid, uid), Step::User)?;
        }
        check(libc::chdir(plan.cwd).into(), Step::Directory)?;
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
    Ok(())
}

/// Sets limits of the calling process, within those that it has: it has no power to raise them.
///
/// # Safety
/// Only for [`prepare`]: it makes system calls and nothing else.
unsafe fn limit(limit: Limit) {
    // SAFETY: plain system calls with a valid structure. The cast is to libc's own type for resources.
    unsafe {
        let mut now: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(limit.resource as _, &mut now) == 0 {
            now.rlim_max = limit.hard.unwrap_or(now.rlim_max).min(now.rlim_max);
            now.rlim_cur = limit.soft.unwrap_or(now.rlim_cur).min(now.rlim_max);
            libc::setrlimit(limit.resource as _, &now);
        }
    }
}

/// Makes every descriptor from `first` on close when a program is executed.
pub fn close_on_exec_from(first: RawFd) {
    // SAFETY: changes flags of descriptors only; a kernel without the call is older than we support.
    unsafe {
        libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
}

/// Puts all signals to their default action and unblocks them, except SIGPIPE, which is ignored.
pub fn reset_signals() {
    // All zero is the default action in every field of the kernel's structure, which has 32 bytes on
    // the architectures we know. libc would refuse the signals it keeps for itself.
    let default = [0u64; 4];
    // SAFETY: no handler has been installed yet; setting an action to its default is always allowed
    // or refused without effect. The kernel only reads the structure.
    unsafe {
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), 8);
        }
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
}

/// Gives up all supplementary groups. Refused without the capability, which leaves them as they are.
pub fn drop_groups() {
    // SAFETY: a plain system call without pointers; the agent has one thread when this is called.
    unsafe {
        libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>());
    }
}

/// Sends a signal to every process of the sandbox but this one, which is process 1.
pub fn signal_all(signal: c_int) {
    assert_eq!(rustix::process::getpid().as_raw_nonzero().get(), 1, "elsewhere -1 is every process of the host");
    // SAFETY: a plain system call without pointers. Without other processes it fails, which is fine.
    unsafe {
        libc::kill(-1, signal);
    }
}

/// Makes orphans become our children, for when we are not process 1.
pub fn become_subreaper() {
    // SAFETY: a plain system call without pointers.
    unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    }
}

/// Forbids others of the same user to look into this process, and gives it a name to be seen by.
pub fn introduce() {
    // SAFETY: plain system calls; the name ends with a NUL.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"nagaya-agent".as_ptr(), 0, 0, 0);
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
    }
}

/// Keeps the heap small: one arena, memory given back early.
pub fn tune_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: called before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 512 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1024 * 1024);
    }
}

/// Gives free memory of the heap back to the kernel.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no arguments that could be wrong; the heap is locked inside.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The text as a C string, or `None` when it holds a NUL.
pub fn c_string(text: impl Into<Vec<u8>>) -> Option<CString> {
    CString::new(text).ok()
}
