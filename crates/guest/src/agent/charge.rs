//! Memory that files take counts as the sandbox's, also where the agent writes them.
//!
//! The kernel counts a page for whoever asked for it first. The agent itself is outside the sandbox's limits; so the
//! pages of a file that lives in memory are asked for by a process of its own, which joins the commands' control groups
//! before. What the agent then writes into them costs nothing more.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;

use super::sys::{self, SpawnError};
use super::{Agent, groups};

/// `statfs` of a file system in memory.
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

/// Set once, when the agent starts: whoever writes is many calls away from it.
static AGENT: OnceLock<Arc<Agent>> = OnceLock::new();

pub fn begin(agent: &Arc<Agent>) {
    let _ = AGENT.set(agent.clone());
}

/// Makes room for what will be written to a file, if that room is memory. Blocks.
pub fn reserve(file: impl AsFd, offset: u64, bytes: u64) -> Result<(), Errno> {
    let Some(agent) = AGENT.get() else { return Ok(()) };
    if bytes == 0 || !lives_in_memory(file.as_fd())? {
        return Ok(());
    }
    let cgroup_procs = groups::choose(&agent.settings, &agent.turn);
    if cgroup_procs.is_empty() {
        return Ok(());
    }
    let started = agent.reaper.spawn(|| sys::reserve_apart(file.as_fd(), offset, bytes, &cgroup_procs));
    let (_, ended) = started.map_err(|SpawnError { errno, .. }| errno)?;
    match ended.blocking_recv().ok().and_then(|status| status.exit_status()) {
        Some(0) => Ok(()),
        Some(errno) => Err(Errno::from_raw_os_error(errno)),
        // It is the first to be killed when the sandbox's memory is used up.
        None => Err(Errno::NOMEM),
    }
}

fn lives_in_memory(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(rustix::fs::fstatfs(file)?.f_type == TMPFS)
}
