//! The sandbox's `/proc/meminfo`: its own limit instead of the host's memory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::Agent;

/// Between refreshes while commands run.
const REFRESH: Duration = Duration::from_secs(1);

/// Reads a small generated file from its start.
pub fn read_small(file: BorrowedFd<'_>) -> Option<String> {
    let mut buffer = Vec::with_capacity(4096);
    rustix::io::pread(file, rustix::buffer::spare_capacity(&mut buffer), 0).ok()?;
    String::from_utf8(buffer).ok()
}

/// Writes the file now, and once a second while commands run.
pub fn maintain(agent: Arc<Agent>) {
    if agent.settings.meminfo.is_none() {
        return;
    }
    write(&agent);
    tokio::spawn(async move {
        loop {
            agent.busy.notified().await;
            while agent.reaper.running() > 0 {
                write(&agent);
                agent.clock.sleep(REFRESH).await;
            }
            write(&agent);
        }
    });
}

/// Writes the file. A server calls for it when it takes the sandbox over, having set the limit.
pub fn write(agent: &Agent) {
    let Some(meminfo) = &agent.settings.meminfo else { return };
    let number = |file: &Option<OwnedFd>| -> Option<u64> { read_small(file.as_ref()?.as_fd())?.trim().parse().ok() };
    let limit = number(&agent.settings.memory_limit).unwrap_or(0);
    let used = number(&agent.settings.memory_usage).unwrap_or(0);
    // The text has the same length every time, so that a reader never sees the rest of a longer one.
    let _ = rustix::io::pwrite(meminfo, text(limit, used).as_bytes(), 0);
}

fn text(limit_bytes: u64, used_bytes: u64) -> String {
    let total = limit_bytes / 1024;
    let free = limit_bytes.saturating_sub(used_bytes) / 1024;
    let rows = [
        ("MemTotal", total),
        ("MemFree", free),
        ("MemAvailable", free),
        ("Buffers", 0),
        ("Cached", 0),
        ("SwapCached", 0),
        ("Active", 0),
        ("Inactive", 0),
        ("SwapTotal", 0),
        ("SwapFree", 0),
        ("Shmem", 0),
        ("Slab", 0),
        ("SReclaimable", 0),
        ("SUnreclaim", 0),
    ];
    rows.iter().map(|(name, kibibytes)| format!("{:<15} {kibibytes:>12} kB\n", format!("{name}:"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_the_limit_less_the_usage() {
        let text = text(1 << 30, 1 << 29);
        assert!(text.contains("MemTotal:            1048576 kB\n"), "{text}");
        assert!(text.contains("MemAvailable:         524288 kB\n"), "{text}");
        assert!(text.contains("SwapTotal:                 0 kB\n"), "{text}");
    }

    #[test]
    fn usage_above_the_limit_is_no_free_memory_and_lengths_never_change() {
        assert_eq!(text(1 << 30, 1 << 40).len(), text(1 << 40, 0).len());
        assert!(text(1 << 30, 1 << 40).contains("MemFree:                   0 kB\n"));
    }
}
