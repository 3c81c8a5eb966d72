//! Which control groups a command joins.
//!
//! Commands are spread over a few groups, which share the sandbox's processor time as equals, and none of which may have
//! all of its processes. A command that runs wild fills its own group; the next one goes where there is more room.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::settings::{CommandGroup, Settings};

/// Where the search begins, so that groups which are equally full are used in turn.
#[derive(Debug, Default)]
pub struct Turn(AtomicUsize);

/// Files in which a new command writes `0`.
pub fn choose<'a>(settings: &'a Settings, turn: &Turn) -> Vec<BorrowedFd<'a>> {
    let groups = &settings.command_groups;
    let start = turn.0.fetch_add(1, Ordering::Relaxed);
    let in_turn = (0..groups.len()).map(|step| &groups[start.wrapping_add(step) % groups.len()]);
    let emptiest = in_turn.min_by_key(|group| processes(group));
    let own = emptiest.map_or(&[][..], |group| &group.procs);
    // The group that can be frozen comes last: from there on the command may stand still.
    own.iter().chain(&settings.cgroup_procs).map(OwnedFd::as_fd).collect()
}

/// Processes and threads in all groups; `None` where there are no groups.
pub fn sum(settings: &Settings) -> Option<u64> {
    let counted = settings.command_groups.iter().filter_map(|group| number(group.processes.as_ref()?));
    counted.reduce(u64::saturating_add)
}

/// How many processes and threads there may be; 0 where there is no limit. Without control groups the kernel has two.
pub fn most(settings: &Settings) -> u64 {
    match &settings.processes_limit {
        Some(file) => number(file).unwrap_or(0),
        None => ["threads-max", "pid_max"]
            .into_iter()
            .filter_map(|name| fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?.trim().parse().ok())
            .min()
            .unwrap_or(0),
    }
}

/// Processes in a group; one that does not tell is the last to be chosen.
fn processes(group: &CommandGroup) -> u64 {
    group.processes.as_ref().and_then(number).unwrap_or(u64::MAX)
}

fn number(file: &OwnedFd) -> Option<u64> {
    let mut text = [0; 32];
    let length = rustix::io::pread(file, &mut text, 0).ok()?;
    std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
}
