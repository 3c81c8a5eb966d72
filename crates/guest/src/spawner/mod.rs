//! The spawner: one process, one thread, one request at a time.

mod limits;
mod mounts;
mod process;
mod root;
mod sandbox;

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::spawn::{self, Answer, ChannelError, IDS_PER_SANDBOX, Request, SPAWNER_AGENT_FD, SPAWNER_SOCKET_FD};
use process::{Clone, Exit};

/// A system call that failed, and what it was for.
#[derive(Debug)]
pub(crate) struct StepError {
    step: &'static str,
    errno: Errno,
}

pub(crate) trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, StepError>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, step: &'static str) -> Result<T, StepError> {
        self.map_err(|errno| StepError { step, errno })
    }
}

impl<T> Step<T> for std::io::Result<T> {
    fn step(self, step: &'static str) -> Result<T, StepError> {
        self.map_err(|error| StepError { step, errno: Errno::from_io_error(&error).unwrap_or(Errno::IO) })
    }
}

/// Answers requests until the server is gone.
pub fn serve() {
    // SAFETY: the server starts this program with exactly these two descriptors and nobody else
    // in this process owns them.
    let (socket, agent) = unsafe { (OwnedFd::from_raw_fd(SPAWNER_SOCKET_FD), OwnedFd::from_raw_fd(SPAWNER_AGENT_FD)) };
    for fd in [&socket, &agent] {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).expect("own descriptors take flags");
    }
    process::ignore_children();
    let prepared = limits::lower_own().and_then(|()| root::prepare());
    loop {
        let (request, descriptors) = match spawn::receive::<Request>(&socket) {
            Ok(message) => message,
            Err(ChannelError::Closed) => return,
            Err(error) => panic!("the server's socket failed: {error}"),
        };
        let outcome = match (&prepared, request) {
            (Err(error), _) => Err(StepError { step: error.step, errno: error.errno }),
            (Ok(()), Request::Namespaces { first_id }) => namespaces(first_id).map(|fds| (Answer::Namespaces, fds)),
            (Ok(()), Request::Sandbox(order)) => {
                let started = sandbox::start(&order, &descriptors, agent.as_fd(), socket.as_fd());
                started.map(|(pid, fd)| (Answer::Sandbox { pid }, vec![fd]))
            }
            (Ok(()), Request::Mount(order)) => mounts::mount(order, descriptors).map(|()| (Answer::Begun, Vec::new())),
            (Ok(()), Request::Unmount(order)) => {
                mounts::unmount(order, descriptors).map(|()| (Answer::Begun, Vec::new()))
            }
        };
        let (answer, fds) = outcome.unwrap_or_else(|error| {
            (Answer::Failed { step: error.step.into(), errno: error.errno.raw_os_error() }, Vec::new())
        });
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        if spawn::send(socket.as_fd(), &answer, &borrowed).is_err() {
            return;
        }
    }
}

/// A process is needed to give birth to a user namespace; it lives only until both are opened.
fn namespaces(first_id: u32) -> Result<Vec<OwnedFd>, StepError> {
    let (ready_read, ready_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).step("make a pipe")?;
    let (go_read, go_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).step("make a pipe")?;
    let child = match process::clone(0).step("clone a namespace holder")? {
        Clone::Child => {
            drop((ready_read, go_write));
            let errno = make_namespaces(first_id).err().map_or(0, Errno::raw_os_error);
            let _ = rustix::io::write(&ready_write, &errno.to_ne_bytes());
            let mut end = [0];
            let _ = rustix::io::read(&go_read, &mut end);
            process::exit(Exit::Done);
        }
        Clone::Parent { pid, .. } => pid,
    };
    drop((ready_write, go_read));
    let opened = open_namespaces(child, &ready_read, first_id);
    drop(go_write);
    process::wait(child);
    opened
}

/// Of the calling process, which has no other use.
fn make_namespaces(first_id: u32) -> Result<(), Errno> {
    // The network namespace first: it must belong to the host's user namespace, so that root in the sandbox has no
    // power over it.
    process::unshare(libc::CLONE_NEWNET)?;
    // What the kernel counts for a user inside, it counts for the maker of the user namespace as well. That is an id
    // which nobody but this sandbox has, so nobody but this sandbox runs into the limit; see `limits`.
    process::become_user(first_id)?;
    process::unshare(libc::CLONE_NEWUSER)
}

fn open_namespaces(child: i32, ready: &OwnedFd, first_id: u32) -> Result<Vec<OwnedFd>, StepError> {
    let mut errno = [0; 4];
    rustix::io::read(ready, &mut errno).step("wait for namespaces")?;
    match i32::from_ne_bytes(errno) {
        0 => {}
        errno => return Err(StepError { step: "unshare namespaces", errno: Errno::from_raw_os_error(errno) }),
    }
    let map = format!("0 {first_id} {IDS_PER_SANDBOX}\n");
    fs::write(format!("/proc/{child}/uid_map"), &map).step("map user ids")?;
    fs::write(format!("/proc/{child}/gid_map"), &map).step("map group ids")?;
    let open = |name: &str| fs::File::open(format!("/proc/{child}/ns/{name}")).map(OwnedFd::from);
    Ok(vec![open("net").step("open the network namespace")?, open("user").step("open the user namespace")?])
}
