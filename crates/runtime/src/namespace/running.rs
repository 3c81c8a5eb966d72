//! A sandbox's processes: starting, finding, connecting to and ending them.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nagaya_api::ids::SessionId;
use nagaya_engine::ports::DriverError;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::time::Timespec;
use tokio::io::unix::AsyncFd;

use crate::agent_client::Link;
use crate::cgroup::{Group, Part};
use crate::host::{Host, failed, too_long};
use crate::sys;

const SOCKET: &str = "agent.sock";
/// An agent answers within a millisecond; one that is silent for this long is broken.
const AGENT_ANSWER_MAX: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 16;
/// How long killed processes may take to end: one that waits for the host's disk ends only after that.
const END_MAX: Duration = Duration::from_secs(30);

const HALTED: &str = "the sandbox's first process is stopped: send it SIGCONT, or terminate the session";

/// A process that cannot be confused with a later one of the same number.
pub(super) struct PidFd(AsyncFd<OwnedFd>);

/// Whether the process behind a pidfd has ended.
pub(super) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    !matches!(rustix::event::poll(&mut ended, Some(&Timespec::default())), Ok(0))
}

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

    /// Whether it has ended already.
    pub fn has_ended(&self) -> bool {
        has_ended(self.0.get_ref().as_fd())
    }

    /// Whether somebody stopped it (SIGSTOP), so that it answers nobody.
    pub fn is_halted(&self) -> bool {
        let pid = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.get_ref().as_raw_fd())).ok();
        let pid = pid.as_deref().and_then(|text| text.lines().find_map(|line| line.strip_prefix("Pid:")));
        let state = pid.and_then(|pid| fs::read_to_string(format!("/proc/{}/stat", pid.trim())).ok());
        // A process of the same number that came later is no harm: the pidfd would say that this one has ended.
        state.is_some_and(|state| is_halted(&state))
    }

    pub fn try_clone(&self) -> io::Result<OwnedFd> {
        self.0.get_ref().try_clone()
    }

    /// Asks for its end.
    fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.0.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The state is what follows the name, which may hold anything but ends with the last parenthesis.
fn is_halted(stat: &str) -> bool {
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 't']))
}

/// A sandbox that this process watches.
pub(super) struct RunningSandbox {
    pub id: SessionId,
    pub slot: u32,
    pub pidfd: PidFd,
    /// Its end was asked for, or was told already.
    ending: AtomicBool,
    link: Mutex<Option<Arc<Link>>>,
}

impl RunningSandbox {
    pub fn new(id: SessionId, slot: u32, pidfd: PidFd) -> Self {
        Self { id, slot, pidfd, ending: AtomicBool::new(false), link: Mutex::new(None) }
    }

    /// Takes the right to tell of its end; false when it is no news.
    pub fn begin_ending(&self) -> bool {
        !self.ending.swap(true, Ordering::AcqRel)
    }

    /// Whether its end was told or is under way, though its first process may still be there.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Ends all processes, frozen or not.
    pub async fn end(&self, host: &Host) -> Result<(), DriverError> {
        self.begin_ending();
        self.pidfd.kill().map_err(|error| failed("kill the sandbox", &error))?;
        let group = host.group(self.slot);
        if group.is_to_be_frozen().unwrap_or(false) {
            // On cgroup v1 what is frozen ends when it is thawed. All of it is marked for its end before, so
            // that nothing runs once more.
            group.kill(Part::Commands);
            group.thaw().map_err(|error| failed("thaw the sandbox", &error))?;
        }
        match tokio::time::timeout(END_MAX, self.pidfd.ended()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(too_long("the sandbox's processes did not end", END_MAX)),
        }
    }

    /// The connection to its agent, as long as that lasts.
    pub fn link(&self) -> Option<Arc<Link>> {
        let link = self.link.lock().expect("nothing panics while holding the connection").clone();
        link.filter(|link| !link.is_closed())
    }

    pub fn disconnect(&self) {
        if let Some(link) = self.link() {
            link.close();
        }
    }

    pub fn set_link(&self, link: Arc<Link>) {
        *self.link.lock().expect("nothing panics while holding the connection") = Some(link);
    }
}

/// Ends a process and waits for its end, but not for ever. Blocks.
pub(super) fn kill_and_wait(pidfd: &OwnedFd) {
    // A process that has ended already is what we want.
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    let mut ended = [PollFd::new(pidfd, PollFlags::IN)];
    let limit = Timespec { tv_sec: END_MAX.as_secs() as i64, tv_nsec: 0 };
    while rustix::event::poll(&mut ended, Some(&limit)) == Err(rustix::io::Errno::INTR) {}
}

/// Binds the agent's socket in the sandbox's directory, however long its path is.
pub(super) fn listen(directory: &Path) -> io::Result<OwnedFd> {
    // Of an earlier life of this disk.
    let _ = fs::remove_file(directory.join(SOCKET));
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
pub(super) async fn connect(host: &Host, running: &RunningSandbox, shortcuts: bool) -> Result<Arc<Link>, DriverError> {
    let (group, directory) = (host.group(running.slot), host.directory(running.id));
    if running.pidfd.is_halted() {
        return Err(DriverError::Failed(HALTED.into()));
    }
    let process = running.pidfd.try_clone().map_err(|error| failed("name the sandbox's first process", &error))?;
    let place = open_directory(&directory).map_err(|error| failed("open the sandbox's directory", &error))?;
    let path = short_path(&place);
    let connecting = Link::connect(Path::new(&path));
    let link = tokio::time::timeout(AGENT_ANSWER_MAX, connecting)
        .await
        .map_err(|_| DriverError::Failed("the agent does not answer".into()))?
        .map_err(|error| failed("connect to the agent", &error))?;
    if shortcuts {
        link.count_out_of_memory_kills(move || group.out_of_memory_kills());
        link.use_network_of(process);
    }
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
pub(super) fn find(group: &Group) -> Option<OwnedFd> {
    let pid = Pid::from_raw(*group.processes(Part::Agent).first()?)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // The number may have passed to another process before it was opened.
    group.processes(Part::Agent).contains(&pid.as_raw_nonzero().get()).then_some(pidfd)
}

/// Removes the group of a sandbox whose first process has ended. The kernel takes a moment to take
/// dead processes out of their groups.
pub(super) fn remove_group(group: &Group) {
    for pause_ms in [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000] {
        std::thread::sleep(Duration::from_millis(pause_ms));
        match group.remove() {
            Ok(()) => return,
            Err(error) if pause_ms == 2_000 => {
                tracing::warn!(error = &error as &dyn std::error::Error, ?group, "could not remove a control group");
            }
            Err(_) => group.kill_all(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_halted_process_is_told_by_its_state_whatever_its_name_is() {
        assert!(is_halted("17 (nagaya-agent) T 1 17"));
        assert!(is_halted("17 (x) R (y) t 1 17"));
        assert!(!is_halted("17 (a) T b) S 1 17"));
        assert!(!is_halted("17 (nagaya-agent) D 1 17"));
        assert!(!is_halted(""));
    }
}
