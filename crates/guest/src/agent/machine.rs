//! The machine as the sandbox sees it: its own limits and what it uses itself, as a machine of that size would tell it.
//!
//! What the kernel would tell of the host is covered by small files that are written here, at most once a second and
//! only while commands run: an idle sandbox costs no processor time. `sysinfo(2)` is answered when it is called. See
//! docs/decisions/0015-what-a-sandbox-sees.md.

use std::fmt::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

use super::Agent;
use super::memory::{self, Memory};
use super::processes::{Count, Load, TICKS};
use crate::spawn::PROCESSOR_TEXT_BYTES;

/// Between refreshes while commands run.
const REFRESH: Duration = Duration::from_secs(1);
/// Counting many processes takes long; this many times as long nothing is counted after it.
const REST_AFTER_COUNTING: u32 = 100;

/// What was told last.
#[derive(Debug, Default)]
pub struct Machine {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The numbers of the processors that were shown.
    processors: Vec<usize>,
    counted_at: Option<Instant>,
    counting_took: Duration,
    count: Count,
    load: Load,
    /// Ticks in which no processor did anything; they never become fewer.
    idle: u64,
}

/// Reads a small generated file from its start.
pub fn read_small(file: BorrowedFd<'_>) -> Option<String> {
    let mut buffer = Vec::with_capacity(4096);
    rustix::io::pread(file, rustix::buffer::spare_capacity(&mut buffer), 0).ok()?;
    String::from_utf8(buffer).ok()
}

/// Writes the files once a second while commands run, and once after the last of them.
pub fn maintain(agent: Arc<Agent>) {
    if agent.settings.meminfo.is_none() {
        return;
    }
    write(&agent);
    tokio::spawn(async move {
        loop {
            agent.busy.notified().await;
            while agent.reaper.running() > 0 {
                agent.clock.sleep(REFRESH).await;
                write(&agent);
            }
            write(&agent);
        }
    });
}

/// Shows the sandbox its machine, whose limits a server sets before it connects.
pub fn show(agent: &Agent) {
    if agent.settings.meminfo.is_none() {
        return;
    }
    show_processors(agent);
    show_limits(agent);
    write(agent);
}

/// Writes the files if they are old: for a command that starts after a quiet time.
pub fn freshen(agent: &Agent) {
    let counted_at = agent.machine.state().counted_at;
    if agent.settings.meminfo.is_some() && counted_at.is_none_or(|at| at.elapsed() >= REFRESH) {
        write(agent);
    }
}

fn write(agent: &Agent) {
    let memory = Memory::read(&agent.settings);
    put(&agent.settings.meminfo, &memory.text());
    let mut state = agent.machine.state();
    state.count();
    put(&agent.settings.loadavg, &state.load_text());
    put(&agent.settings.stat, &state.stat_text());
}

/// A reader in between sees some of the old text and some of the new one.
fn put(file: &Option<OwnedFd>, text: &str) {
    if let Some(file) = file {
        let _ = rustix::io::pwrite(file, text.as_bytes(), 0);
        let _ = rustix::fs::ftruncate(file, text.len() as u64);
    }
}

/// `sysinfo(2)`, as the sandbox's own machine.
pub fn sysinfo(agent: &Agent) -> libc::sysinfo {
    let memory = Memory::read(&agent.settings);
    let state = agent.machine.state();
    // SAFETY: all zero is valid for a structure of numbers.
    #[allow(unsafe_code)]
    let mut told: libc::sysinfo = unsafe { std::mem::zeroed() };
    told.uptime = uptime().as_secs() as _;
    for (told, average) in told.loads.iter_mut().zip(state.load.0) {
        *told = (average * 65_536.0) as _;
    }
    told.totalram = memory.total as _;
    told.freeram = memory.free as _;
    told.sharedram = memory.shared as _;
    told.procs = state.count.threads.min(u64::from(u16::MAX)) as _;
    told.mem_unit = 1;
    told
}

/// Since the sandbox's first process was made, where it has a clock of its own.
fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec.clamp(0, 999_999_999) as u32)
}

impl Machine {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn count(&mut self) {
        let begin = Instant::now();
        if self.counted_at.is_some_and(|at| at.elapsed() < self.counting_took * REST_AFTER_COUNTING) {
            return;
        }
        let count = Count::take();
        // In a long quiet time nothing ran; else what runs now stands for the time since.
        let since = self.counted_at.map_or(Duration::ZERO, |at| begin - at);
        let threads = if since > 2 * REFRESH + self.counting_took * REST_AFTER_COUNTING {
            0
        } else {
            count.running + count.waiting
        };
        self.load.go_on(since.as_secs_f64(), threads as f64);
        self.count =
            Count { user: count.user.max(self.count.user), system: count.system.max(self.count.system), ..count };
        let all = ticks(uptime()) * self.processors.len().max(1) as u64;
        self.idle = self.idle.max(all.saturating_sub(self.count.user + self.count.system));
        self.counted_at = Some(begin);
        self.counting_took = begin.elapsed();
    }

    fn load_text(&self) -> String {
        let [one, five, fifteen] = self.load.0;
        let Count { running, threads, newest, .. } = self.count;
        format!("{one:.2} {five:.2} {fifteen:.2} {running}/{threads} {newest}\n")
    }

    /// As `/proc/stat`. Who used which processor is not counted: each has its part of the sum.
    fn stat_text(&self) -> String {
        let Count { user, system, running, waiting, newest, .. } = self.count;
        let idle = self.idle;
        let mut text = format!("cpu  {user} 0 {system} {idle} 0 0 0 0 0 0\n");
        let parts = self.processors.len().max(1) as u64;
        for number in &self.processors {
            let (user, system, idle) = (user / parts, system / parts, idle / parts);
            let _ = writeln!(text, "cpu{number} {user} 0 {system} {idle} 0 0 0 0 0 0");
        }
        let booted = clock_gettime(ClockId::Realtime).tv_sec - uptime().as_secs() as i64;
        let _ = write!(
            text,
            "intr 0\nctxt 0\nbtime {booted}\nprocesses {newest}\nprocs_running {running}\nprocs_blocked {waiting}\n\
             softirq 0 0 0 0 0 0 0 0 0 0 0\n"
        );
        text
    }
}

fn ticks(time: Duration) -> u64 {
    (time.as_millis() as u64).saturating_mul(TICKS) / 1000
}

/// Shows the processors that the sandbox may use; they keep the host's numbers.
fn show_processors(agent: &Agent) {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return };
    let numbers: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|number| set.is_set(*number)).collect();
    let old = std::mem::replace(&mut agent.machine.state().processors, numbers.clone());
    if old == numbers {
        return;
    }
    if let Some(directory) = &agent.settings.processors {
        // What cannot be shown stays away: nothing else depends on it.
        let _ = fill_processors(directory, &old, &numbers);
    }
    if let (Some(source), Some(_)) = (&agent.settings.processor_texts, &agent.settings.cpuinfo) {
        let texts: Vec<String> = numbers.iter().filter_map(|number| processor_text(source, *number)).collect();
        put(&agent.settings.cpuinfo, &texts.concat());
    }
}

/// Shows the limits in the words of control groups, for programs that read nothing else.
fn show_limits(agent: &Agent) {
    let Some(directory) = &agent.settings.cgroup else { return };
    let processors = agent.machine.state().processors.len();
    let limits = [
        ("memory.max", format!("{}\n", memory::limit(&agent.settings))),
        ("cpu.max", format!("{} 100000\n", processors * 100_000)),
    ];
    for (name, text) in limits {
        put(&open_shown(directory, name).ok(), &text);
    }
}

fn open_shown(directory: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o444))
}

/// Makes `/sys/devices/system/cpu`: a directory for each processor, and the lists that programs count.
fn fill_processors(directory: &OwnedFd, old: &[usize], numbers: &[usize]) -> Result<(), Errno> {
    for number in old.iter().filter(|number| !numbers.contains(number)) {
        rustix::fs::unlinkat(directory, format!("cpu{number}"), AtFlags::REMOVEDIR)?;
    }
    for number in numbers.iter().filter(|number| !old.contains(number)) {
        match rustix::fs::mkdirat(directory, format!("cpu{number}"), Mode::from_raw_mode(0o555)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    let list = open_shown(directory, "online")?;
    let text = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",") + "\n";
    put(&Some(list), &text);
    // All are there, all can be there and all are on: one file under three names.
    for name in ["possible", "present"] {
        match rustix::fs::linkat(directory, "online", directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// What `/proc/cpuinfo` has on one processor.
fn processor_text(source: &OwnedFd, number: usize) -> Option<String> {
    let mut buffer = Vec::with_capacity(PROCESSOR_TEXT_BYTES);
    let offset = number as u64 * PROCESSOR_TEXT_BYTES as u64;
    rustix::io::pread(source, rustix::buffer::spare_capacity(&mut buffer), offset).ok()?;
    let text = String::from_utf8(buffer).ok()?;
    let text = text.trim_end_matches('\0');
    (!text.is_empty()).then(|| format!("{text}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_reads_like_the_kernels() {
        let state = State {
            processors: vec![1, 3],
            count: Count { user: 100, system: 50, threads: 4, running: 2, waiting: 1, newest: 77 },
            load: Load([1.5, 0.25, 0.0]),
            idle: 1000,
            ..State::default()
        };
        assert_eq!(state.load_text(), "1.50 0.25 0.00 2/4 77\n");
        let text = state.stat_text();
        let expected = "cpu  100 0 50 1000 0 0 0 0 0 0\ncpu1 50 0 25 500 0 0 0 0 0 0\ncpu3 50 0 25 500 0 0 0 0 0 0\n";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.contains("\nprocesses 77\nprocs_running 2\nprocs_blocked 1\n"), "{text}");
    }

    #[test]
    fn processors_are_shown_and_taken_away() {
        let place = tempfile::tempdir().unwrap();
        let directory: OwnedFd = std::fs::File::open(place.path()).unwrap().into();
        let shown = || {
            let mut names: Vec<_> = std::fs::read_dir(place.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            (names.join(" "), std::fs::read_to_string(place.path().join("possible")).unwrap())
        };
        fill_processors(&directory, &[], &[0, 2, 11]).unwrap();
        assert_eq!(shown(), ("cpu0 cpu11 cpu2 online possible present".into(), "0,2,11\n".into()));
        fill_processors(&directory, &[0, 2, 11], &[2]).unwrap();
        assert_eq!(shown(), ("cpu2 online possible present".into(), "2\n".into()));
    }
}
