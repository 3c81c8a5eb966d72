//! Record locks on files, which Linux counts to no control group and bounds by nothing.
//!
//! Each takes some 250 bytes of the host's memory, and one process can have any number. So the server looks at the
//! host's table once a second, no further than it takes to see too many, and ends the processes of a sandbox that has
//! more than its share. Locks of open files, whose holders the table does not tell, are refused by the system call filter.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::time::MissedTickBehavior;

/// Locks of one sandbox. Databases have hundreds.
const LOCKS_MAX: usize = 10_000;
/// Lines of the table that are read at most: enough to see who has most of a table of any size.
const LINES_MAX: usize = 2 * LOCKS_MAX;
const LOOK: Duration = Duration::from_secs(1);
const TABLE: &str = "/proc/locks";

/// Ends who has too many locks in groups whose paths begin so, until the host is gone.
pub(super) fn watch<Host: Send + Sync + 'static>(host: &Arc<Host>, groups: String) {
    let host = Arc::downgrade(host);
    tokio::spawn(async move {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            if host.strong_count() == 0 {
                return;
            }
            let groups = groups.clone();
            // The table is short on most hosts, and read within a millisecond.
            let _ = tokio::task::spawn_blocking(move || end_hoarders(&groups)).await;
        }
    });
}

fn end_hoarders(groups: &str) {
    let Ok(table) = File::open(TABLE) else { return };
    let locks = count(BufReader::new(table));
    if locks.values().sum::<usize>() < LOCKS_MAX {
        return;
    }
    let slot = |pid: i32| slot_of(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?, groups);
    let mut sandboxes: HashMap<u32, Vec<(i32, usize)>> = HashMap::new();
    for (pid, locks) in locks {
        if let Some(slot) = slot(pid) {
            sandboxes.entry(slot).or_default().push((pid, locks));
        }
    }
    for (number, holders) in sandboxes {
        let held: usize = holders.iter().map(|(_, locks)| locks).sum();
        if held < LOCKS_MAX {
            continue;
        }
        // All that have a part in it: it may be shared out among a thousand.
        let share = LOCKS_MAX / holders.len() / 2;
        tracing::warn!(slot = number, held, "a sandbox holds too many file locks; ending the processes that do");
        for (pid, _) in holders.into_iter().filter(|(_, locks)| *locks >= share.max(1)) {
            end(pid, || slot(pid) == Some(number));
        }
    }
}

/// Locks by the holder's process, of the beginning of a table.
fn count(table: impl BufRead) -> HashMap<i32, usize> {
    let mut locks = HashMap::new();
    for line in table.lines().map_while(Result::ok).take(LINES_MAX) {
        // `7: POSIX  ADVISORY  WRITE 1234 fe:00:99 0 EOF`; who waits has an arrow behind the number.
        let pid = line.split_whitespace().filter(|word| *word != "->").nth(4).and_then(|word| word.parse().ok());
        if let Some(pid) = pid.filter(|pid| *pid > 0) {
            *locks.entry(pid).or_default() += 1;
        }
    }
    locks
}

/// The slot by the text of a process's `cgroup` file.
fn slot_of(text: &str, groups: &str) -> Option<u32> {
    let (_, rest) = text.split_once(groups)?;
    rest.split('/').next()?.parse().ok()
}

/// Kills a process of which the condition holds, and no later one of the same number.
fn end(pid: i32, is_meant: impl Fn() -> bool) {
    let Some(pidfd) = Pid::from_raw(pid).and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok())
    else {
        return;
    };
    if is_meant() {
        let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_counted_by_their_holders() {
        let table = "1: POSIX  ADVISORY  WRITE 88347 fe:00:9986066 58 58\n\
                     1: -> POSIX  ADVISORY  WRITE 12 fe:00:9986066 58 58\n\
                     2: FLOCK  ADVISORY  WRITE 88347 fe:00:9986067 0 EOF\n\
                     3: OFDLCK ADVISORY  READ -1 fe:00:9986068 0 EOF\n\
                     nonsense\n";
        assert_eq!(count(table.as_bytes()), HashMap::from([(88_347, 2), (12, 1)]));
        let long = "1: POSIX  ADVISORY  WRITE 5 fe:00:1 0 0\n".repeat(LINES_MAX + 7);
        assert_eq!(count(long.as_bytes()), HashMap::from([(5, LINES_MAX)]));
    }

    #[test]
    fn a_process_belongs_to_the_sandbox_whose_group_it_is_in() {
        let groups = "/nagaya/ab12/slot-";
        let split = "9:pids:/nagaya/ab12/slot-7/commands/c1\n8:memory:/nagaya/ab12/slot-7/commands\n";
        assert_eq!(slot_of(split, groups), Some(7));
        assert_eq!(slot_of("0::/nagaya/ab12/slot-31/agent\n", groups), Some(31));
        assert_eq!(slot_of("0::/nagaya/ffff/slot-31/agent\n", groups), None, "another server's");
        assert_eq!(slot_of("0::/init\n", groups), None);
    }
}
