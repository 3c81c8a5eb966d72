//! What runs in the sandbox: counted from `/proc`, which shows its own processes only.

use std::fs;

/// Clock ticks a second, in everything that the kernel tells in ticks.
pub const TICKS: u64 = 100;

/// All processes and threads at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Ticks that processes have had, those that have ended included.
    pub user: u64,
    pub system: u64,
    pub threads: u64,
    /// Threads that run, or would if there were a processor for them.
    pub running: u64,
    /// Threads that wait for a disk.
    pub waiting: u64,
    /// The newest process.
    pub newest: u32,
}

impl Count {
    pub fn take() -> Self {
        let mut count = Self::default();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // It may have ended meanwhile.
            let Ok(text) = fs::read_to_string(format!("/proc/{process}/stat")) else { continue };
            count.add(process, &text);
        }
        count
    }

    fn add(&mut self, process: u32, text: &str) {
        let Some(status) = Status::parse(text) else { return };
        self.newest = self.newest.max(process);
        self.user += status.children_user;
        self.system += status.children_system;
        // The agent is the machine's own, not the sandbox's: of it only those that it collected count.
        if process == std::process::id() {
            return;
        }
        self.user += status.user;
        self.system += status.system;
        self.threads += status.threads;
        if status.threads <= 1 {
            self.add_thread(status.state);
            return;
        }
        for thread in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            if let Some(status) = Status::parse(&text) {
                self.add_thread(status.state);
            }
        }
    }

    fn add_thread(&mut self, state: u8) {
        match state {
            b'R' => self.running += 1,
            b'D' => self.waiting += 1,
            _ => {}
        }
    }
}

/// The process that a thread belongs to.
pub fn of_thread(thread: u32) -> Option<u32> {
    number_in_status(&thread.to_string(), "Tgid:")
}

/// Filters of system calls that the sandbox's threads are under, beside those that all are under. What is inherited is
/// counted again for each. Looks no further when there are `enough`.
pub fn filters(of_all: u32, enough: u32) -> u32 {
    let own = |path: &str| number_in_status(path, "Seccomp_filters:").unwrap_or(0).saturating_sub(of_all);
    let mut sum: u32 = 0;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        for thread in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
            let Some(thread) = thread.file_name().to_str().map(|name| format!("{process}/task/{name}")) else {
                continue;
            };
            sum = sum.saturating_add(own(&thread));
            if sum >= enough {
                return sum;
            }
        }
    }
    sum
}

/// A number in `/proc/…/status`.
pub fn number_in_status(process: &str, name: &str) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

/// A line of `/proc/PID/stat`.
struct Status {
    state: u8,
    user: u64,
    system: u64,
    children_user: u64,
    children_system: u64,
    threads: u64,
}

impl Status {
    fn parse(text: &str) -> Option<Self> {
        // The name may hold anything, parentheses too.
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        Some(Self {
            state: *fields.first()?.as_bytes().first()?,
            user: number(11)?,
            system: number(12)?,
            children_user: number(13)?,
            children_system: number(14)?,
            threads: number(17)?,
        })
    }
}

/// The load averages of the last 1, 5 and 15 minutes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load(pub [f64; 3]);

impl Load {
    /// Goes on by some seconds, during which so many threads ran or waited for a disk.
    pub fn go_on(&mut self, seconds: f64, threads: f64) {
        for (average, minutes) in self.0.iter_mut().zip([1.0, 5.0, 15.0]) {
            let rest = (-seconds / (minutes * 60.0)).exp();
            *average = *average * rest + threads * (1.0 - rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_counted_whatever_its_name() {
        let mut count = Count::default();
        let line = |name: &str| {
            format!("7 ({name}) R 1 7 7 0 -1 4194560 100 0 0 0 12 3 40 5 20 0 1 0 8861 1000 10 18446744073709551615")
        };
        for name in ["sh", "a) S 1 1", "("] {
            count.add(u32::MAX, &line(name));
        }
        count.add(u32::MAX, "");
        count.add(u32::MAX, "7 (sh) R 1");
        let expected = Count { user: 156, system: 24, threads: 3, running: 3, waiting: 0, newest: u32::MAX };
        assert_eq!(count, expected);
    }

    #[test]
    fn load_rises_towards_what_runs_and_falls_when_nothing_does() {
        let mut load = Load::default();
        for _ in 0..60 {
            load.go_on(1.0, 2.0);
        }
        // 2 × (1 − 1/e) after one minute of the first average.
        assert!((load.0[0] - 1.2642).abs() < 0.001 && load.0[2] < load.0[1] && load.0[1] < load.0[0], "{load:?}");
        let mut at_once = Load::default();
        at_once.go_on(60.0, 2.0);
        assert!((at_once.0[0] - load.0[0]).abs() < 1e-9);
        load.go_on(3600.0, 0.0);
        assert!(load.0[0] < 0.001);
    }
}
