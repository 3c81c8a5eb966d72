//! A sandbox's processes: starting, finding, connecting to and ending them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nagaya_api::ids::SessionId;
use nagaya_engine::model::Machine;
use nagaya_engine::ports::DriverError;
use nagaya_guest::spawn;
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::unix::AsyncFd;

use super::record::Record;
use super::slots::{self, Slot, group_name};
use super::{Inner, Started, failed};
use crate::cgroup::{Cgroups, Group, Limits, Part};
use crate::link::Link;
use crate::sys;

const SOCKET: &str = "agent.sock";
/// An agent answers within a millisecond; one that is silent for this long is broken.
const AGENT_ANSWER_MAX: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 16;

/// A process that cannot be confused with a later one of the same number.
pub(super) struct PidFd(AsyncFd<OwnedFd>);

impl PidFd {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(sys::wait_readable(fd)?))
    }

    /// Waits for the end of the process. When it is a sandbox's first one, all others of the
    /// sandbox have ended before it.
    pub async fn ended(&self) {
        // Readiness of a pidfd is final, so it needs no clearing.
        let _ = self.0.readable().await;
    }

    pub async fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.0.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.ended().await;
        Ok(())
    }
}

/// A sandbox that this process watches.
pub(super) struct Live {
    pub id: SessionId,
    pub slot: u32,
    pub pidfd: PidFd,
    ending: AtomicBool,
}

impl Live {
    pub fn new(id: SessionId, slot: u32, pidfd: PidFd) -> Self {
        Self { id, slot, pidfd, ending: AtomicBool::new(false) }
    }

    /// Whether its end was asked for.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    pub async fn end(&self) -> io::Result<()> {
        self.ending.store(true, Ordering::Release);
        self.pidfd.kill().await
    }
}

/// Writes the record, sets the limits and starts the first process. On error the caller removes
/// the directory and the slot.
pub(super) fn start(inner: &Inner, id: SessionId, machine: &Machine, slot: &Slot) -> Result<Started, DriverError> {
    let on = |step: &'static str| move |error: io::Error| failed(step, &error);
    let directory = inner.directory(id);
    fs::create_dir(&directory).map_err(on("make the sandbox's directory"))?;
    let record = Record { slot: slot.number, machine: machine.clone(), base: inner.factory.image.base.clone() };
    record.write(&directory).map_err(on("write the sandbox's record"))?;
    fs::rename(&slot.image, directory.join("disk.ext4")).map_err(on("move the sandbox's disk"))?;
    let listen = listen(&directory).map_err(on("make the agent's socket"))?;

    let cgroup = |error| failed("set the sandbox's limits", &error);
    let memory_bytes = u64::from(machine.memory_mb) << 20;
    let limits = Limits { cpu_cores: machine.cpu_cores, memory_bytes, processes_max: inner.config.processes_max };
    slot.group.set_limits(limits).map_err(cgroup)?;
    let agent_files = slot.group.join_files(Part::Agent).map_err(cgroup)?;
    let command_files = slot.group.join_files(Part::Commands).map_err(cgroup)?;
    let memory_usage = slot.group.memory_usage_file().map_err(cgroup)?;

    let (error, error_write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|errno| on("make a pipe")(errno.into()))?;
    let order = spawn::Sandbox {
        layers: inner.factory.image.layer_names(),
        agent_cgroups: agent_files.len(),
        command_cgroups: command_files.len(),
        first_id: slots::first_id(slot.number),
        processors: inner.processors_for(slot.number, machine.cpu_cores),
        memory_bytes,
        hostname: "sandbox".into(),
    };
    let mut fds: Vec<BorrowedFd<'_>> = vec![
        error_write.as_fd(),
        listen.as_fd(),
        slot.user.as_fd(),
        slot.network.as_fd(),
        slot.disk.as_fd(),
        slot.base.as_fd(),
    ];
    fds.extend(slot.layers.iter().map(AsFd::as_fd));
    fds.extend(agent_files.iter().chain(&command_files).map(File::as_fd));
    fds.push(memory_usage.as_fd());
    let (_, pidfd) = inner.spawner.sandbox(order, &fds).map_err(|error| failed("start the sandbox", &error))?;
    Ok(Started { slot: slot.number, pidfd, error })
}

/// Binds the agent's socket in the sandbox's directory, however long its path is.
fn listen(directory: &Path) -> io::Result<OwnedFd> {
    let place = open_directory(directory)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(short_path(&place))?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn open_directory(directory: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Socket addresses hold 107 bytes; a path through a descriptor always fits.
fn short_path(directory: &OwnedFd) -> String {
    format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd())
}

/// Connects to the agent and exchanges greetings.
pub(super) async fn connect(directory: &Path, cgroups: &Cgroups, slot: u32) -> Result<Arc<Link>, DriverError> {
    let group = cgroups.group(&group_name(slot)).map_err(|error| failed("open the control group", &error))?;
    let place = open_directory(directory).map_err(|error| failed("open the sandbox's directory", &error))?;
    let path = short_path(&place);
    let connecting = Link::connect(Path::new(&path));
    let link = tokio::time::timeout(AGENT_ANSWER_MAX, connecting)
        .await
        .map_err(|_| DriverError::Failed("the agent does not answer".into()))?
        .map_err(|error| failed("connect to the agent", &error))?;
    link.count_out_of_memory_kills(move || group.out_of_memory_kills());
    Ok(link)
}

/// What the first process said before it gave up; empty when it said nothing, or lives.
pub(super) fn read_error(pipe: &OwnedFd) -> String {
    let mut text = [0; 512];
    let _ = rustix::io::ioctl_fionbio(pipe, true);
    let length = rustix::io::read(pipe, &mut text).unwrap_or(0);
    String::from_utf8_lossy(&text[..length]).into_owned()
}

/// The first process of the sandbox in a slot, found by its control group: nothing else is ever in it.
pub(super) fn find(cgroups: &Cgroups, slot: u32) -> Option<OwnedFd> {
    let group = cgroups.group(&group_name(slot)).ok()?;
    let pid = Pid::from_raw(*group.processes(Part::Agent).first()?)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // The number may have passed to another process before it was opened.
    group.processes(Part::Agent).contains(&pid.as_raw_nonzero().get()).then_some(pidfd)
}

/// Kills whatever is in a group.
pub(super) fn kill_group(group: &Group) {
    for part in [Part::Agent, Part::Commands] {
        for pid in group.processes(part).into_iter().filter_map(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// Removes the group of a sandbox whose first process has ended. The kernel takes a moment to take
/// dead processes out of their groups.
pub(super) fn remove_group(cgroups: &Cgroups, slot: u32) {
    let Ok(group) = cgroups.group(&group_name(slot)) else { return };
    for pause_ms in [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000] {
        std::thread::sleep(Duration::from_millis(pause_ms));
        match group.remove() {
            Ok(()) => return,
            Err(error) if pause_ms == 2_000 => {
                tracing::warn!(error = &error as &dyn std::error::Error, slot, "could not remove a control group");
            }
            Err(_) => kill_group(&group),
        }
    }
}
