//! The server's handle on a spawner process.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};

use nagaya_guest::spawn::{self, Answer, MountOutcome, Request, SPAWNER_AGENT_FD, SPAWNER_SOCKET_FD};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;

use crate::{programs, sys};

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
        // Closing the socket ends the spawner; this only collects it.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let _ = self.child.wait();
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
        let mut text = Vec::new();
        File::from(outcome).read_to_end(&mut text).map_err(SpawnError::Outcome)?;
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
