//! The processes of a command: all that it started and has not set free.
//!
//! A command begins as the leader of a session. What it starts stays in that session, whatever process group it makes
//! for itself, until it leaves on purpose with `setsid`.

use std::collections::BTreeSet;

use rustix::process::{Pid, Signal, getpgid, getsid, kill_process, kill_process_group, test_kill_process};

/// Rounds in which processes that appear meanwhile are looked for. Each halts all that it finds, and what is halted
/// keeps its place among the sandbox's processes, so even a fork bomb runs out of room for more.
const ROUNDS_MAX: usize = 64;

/// A command's session, by the process id of its leader.
#[derive(Debug, Clone, Copy)]
pub struct Session {
    id: i32,
    /// The leader has ended, and its end was collected.
    leaderless: bool,
}

impl Session {
    pub fn new(id: i32) -> Self {
        Self { id, leaderless: false }
    }

    pub fn leader_ended(&mut self) {
        self.leaderless = true;
    }

    /// Sends a signal to every process. Where there is none the command was faster.
    pub fn signal(self, signal: Signal) {
        if signal == Signal::KILL {
            return self.kill();
        }
        let others = self.members().into_iter().filter(|process| group(*process) != Some(self.id));
        let others: Vec<_> = others.collect();
        // The command's own group at once, so that none of it sees another end first.
        self.signal_group(signal);
        for process in others {
            let _ = kill_process(process, signal);
        }
    }

    /// Ends every process, also those that are being started.
    pub fn kill(self) {
        let mut seen = BTreeSet::new();
        for _ in 0..ROUNDS_MAX {
            let before = seen.len();
            for process in self.members() {
                if seen.insert(process.as_raw_nonzero()) {
                    let _ = kill_process(process, Signal::STOP);
                }
            }
            if seen.len() == before {
                break;
            }
        }
        self.signal_group(Signal::KILL);
        for process in self.members() {
            let _ = kill_process(process, Signal::KILL);
        }
    }

    /// Whether a process is left, be it one whose end nobody collects.
    pub fn exists(self) -> bool {
        !self.members().is_empty()
    }

    fn signal_group(self, signal: Signal) {
        if let Some(process) = Pid::from_raw(self.id)
            && !self.is_another()
        {
            let _ = kill_process_group(process, signal);
        }
    }

    /// Whether the number has passed to another session: a new one begins with a leader.
    fn is_another(self) -> bool {
        self.leaderless && Pid::from_raw(self.id).is_some_and(|leader| test_kill_process(leader).is_ok())
    }

    fn members(self) -> Vec<Pid> {
        if self.is_another() {
            return Vec::new();
        }
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let processes = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
        processes
            .filter(|process| getsid(Some(*process)).is_ok_and(|id| id.as_raw_nonzero().get() == self.id))
            .collect()
    }
}

fn group(process: Pid) -> Option<i32> {
    getpgid(Some(process)).ok().map(|group| group.as_raw_nonzero().get())
}
