//! The server's handle on a spawner process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nagaya_guest::spawn::{self, Answer, MountOutcome, Request, SPAWNER_AGENT_FD, SPAWNER_SOCKET_FD};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::pipe::PipeFlags;
use rustix::time::Timespec;

use crate::{programs, sys};

/// How long a spawner may take for an answer: it only ever makes a process.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// How long a process may take that mounts or unmounts in a sandbox, and may have to wait for the sandbox's disk.
const MOUNT_MAX: Duration = Duration::from_secs(60);
/// How long a spawner may take to end.
const LEAVE_MAX: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("start the spawner")]
    Start(#[source] io::Error),
    #[error("talk to the spawner")]
    Channel(#[from] spawn::ChannelError),
    #[error("{step}: {cause}")]
    Refused { step: String, cause: io::Error },
    #[error("learn what became of a mount")]
    Outcome(#[source] io::Error),
    #[error("the spawner gave an answer to another question")]
    Confused,
}

/// A spawner process; started at once, and again should it ever die. Calls block for about as long
/// as a `clone3`.
pub struct Spawner {
    agent: OwnedFd,
    process: Mutex<Process>,
}

struct Process {
    child: Child,
    socket: OwnedFd,
}

impl Drop for Process {
    fn drop(&mut self) {
        // Closing the socket ends the spawner, and what it made lives on; one that hangs is killed. This only collects it.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let begin = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if begin.elapsed() > LEAVE_MAX {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Spawner {
    pub fn start() -> Result<Self, SpawnError> {
        let agent = programs::agent().map_err(SpawnError::Start)?;
        let process = Process::start(agent.as_fd()).map_err(SpawnError::Start)?;
        Ok(Self { agent, process: Mutex::new(process) })
    }

    /// A user namespace for ids from `first_id` on, and a network namespace: (network, user).
    pub fn namespaces(&self, first_id: u32) -> Result<(OwnedFd, OwnedFd), SpawnError> {
        let (answer, mut fds) = self.call(&Request::Namespaces { first_id }, &[])?;
        match (answer, fds.pop(), fds.pop()) {
            (Answer::Namespaces, Some(user), Some(network)) => Ok((network, user)),
            _ => Err(SpawnError::Confused),
        }
    }

    /// Starts a sandbox's first process: its pid and its pidfd.
    pub fn sandbox(&self, order: spawn::Sandbox, fds: &[BorrowedFd<'_>]) -> Result<(i32, OwnedFd), SpawnError> {
        let (answer, mut fds) = self.call(&Request::Sandbox(Box::new(order)), fds)?;
        match (answer, fds.pop()) {
            (Answer::Sandbox { pid }, Some(pidfd)) => Ok((pid, pidfd)),
            _ => Err(SpawnError::Confused),
        }
    }

    /// Attaches a detached mount in the sandbox of that first process. As long as `mount` is open, it is busy.
    pub fn mount(
        &self,
        order: spawn::Mount,
        sandbox: BorrowedFd<'_>,
        mount: BorrowedFd<'_>,
    ) -> Result<MountOutcome, SpawnError> {
        self.call_for_outcome(&Request::Mount(order), &[sandbox, mount])
    }

    /// Unmounts a block device in the sandbox of that first process.
    pub fn unmount(&self, order: spawn::Unmount, sandbox: BorrowedFd<'_>) -> Result<MountOutcome, SpawnError> {
        self.call_for_outcome(&Request::Unmount(order), &[sandbox])
    }

    /// The spawner starts a process for it and goes on with other requests; the process may have to wait for
    /// the sandbox's disk.
    fn call_for_outcome(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<MountOutcome, SpawnError> {
        let (outcome, told) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(spawn::ChannelError::from)?;
        let all: Vec<BorrowedFd<'_>> = std::iter::once(told.as_fd()).chain(fds.iter().copied()).collect();
        let (answer, _) = self.call(request, &all)?;
        // The end of the process must be the end of what can be read.
        drop(told);
        let text = read_within(outcome, MOUNT_MAX).map_err(SpawnError::Outcome)?;
        match answer {
            Answer::Begun => serde_json::from_slice(&text).map_err(|error| SpawnError::Outcome(error.into())),
            _ => Err(SpawnError::Confused),
        }
    }

    fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(Answer, Vec<OwnedFd>), SpawnError> {
        let mut process = self.lock();
        let outcome = process.call(request, fds);
        if let Err(error) = &outcome {
            // What the spawner made is not lost with it; the next caller gets a new one.
            tracing::error!(%error, "the spawner died; starting another");
            *process = Process::start(self.agent.as_fd()).map_err(SpawnError::Start)?;
        }
        drop(process);
        match outcome? {
            (Answer::Failed { step, errno }, _) => {
                Err(SpawnError::Refused { step, cause: io::Error::from_raw_os_error(errno) })
            }
            answer => Ok(answer),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Process> {
        self.process.lock().expect("no caller panics while it holds the spawner")
    }
}

/// Reads to the end, which is the end of the process at the other end. What a process does that never ends is waited for no
/// longer than this.
fn read_within(pipe: OwnedFd, limit: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + limit;
    let (mut text, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        match rustix::io::read(&pipe, &mut piece) {
            Ok(0) => return Ok(text),
            Ok(length) => text.extend_from_slice(&piece[..length]),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

impl Process {
    fn start(agent: BorrowedFd<'_>) -> io::Result<Self> {
        let program = programs::spawner()?;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // Above the numbers that the spawner expects, so that placing one does not close another.
        let theirs = rustix::io::fcntl_dupfd_cloexec(&theirs, 16)?;
        let agent = rustix::io::fcntl_dupfd_cloexec(agent, 16)?;
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command.arg0("nagaya-spawner").env_clear().stdin(Stdio::null()).stdout(Stdio::null());
        sys::pass_descriptors(&mut command, vec![(theirs, SPAWNER_SOCKET_FD), (agent, SPAWNER_AGENT_FD)]);
        // A spawner that hangs is taken for dead; a new one takes its place.
        sockopt::set_socket_timeout(&ours, sockopt::Timeout::Recv, Some(ANSWER_MAX))?;
        let child = command.spawn()?;
        Ok(Self { child, socket: ours })
    }

    fn call(
        &mut self,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Answer, Vec<OwnedFd>), spawn::ChannelError> {
        spawn::send(self.socket.as_fd(), request, fds)?;
        spawn::receive(&self.socket)
    }
}
