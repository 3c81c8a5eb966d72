//! What a sandbox has of memory, and how it is told.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use super::machine::read_small;
use super::settings::Settings;

/// Bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    pub total: u64,
    pub free: u64,
    /// Content of files, with what is in `/dev/shm`.
    pub cached: u64,
    pub shared: u64,
    active_anonymous: u64,
    inactive_anonymous: u64,
    active_file: u64,
    inactive_file: u64,
    anonymous: u64,
    mapped: u64,
    dirty: u64,
    reclaimable: u64,
    unreclaimable: u64,
}

impl Memory {
    pub fn read(settings: &Settings) -> Self {
        let statistics = settings.memory_statistics.as_ref().and_then(|file| read_small(file.as_fd()));
        Self::of(limit(settings), number(&settings.memory_usage), &statistics.unwrap_or_default())
    }

    /// From what a control group tells, of version 1 or 2.
    fn of(limit: u64, used: u64, statistics: &str) -> Self {
        // Version 1 tells of the group itself first, and then of it with those below it.
        let figure = |names: [&str; 2]| {
            let lines = || statistics.lines().filter_map(|line| line.split_once(' '));
            let find = |wanted: &str| lines().find(|(name, _)| *name == wanted)?.1.trim().parse().ok();
            names.into_iter().find_map(find).unwrap_or(0)
        };
        Self {
            total: limit,
            free: limit.saturating_sub(used),
            cached: figure(["total_cache", "file"]),
            shared: figure(["total_shmem", "shmem"]),
            active_anonymous: figure(["total_active_anon", "active_anon"]),
            inactive_anonymous: figure(["total_inactive_anon", "inactive_anon"]),
            active_file: figure(["total_active_file", "active_file"]),
            inactive_file: figure(["total_inactive_file", "inactive_file"]),
            anonymous: figure(["total_rss", "anon"]),
            mapped: figure(["total_mapped_file", "file_mapped"]),
            dirty: figure(["total_dirty", "file_dirty"]),
            reclaimable: figure(["slab_reclaimable", "slab_reclaimable"]),
            unreclaimable: figure(["slab_unreclaimable", "slab_unreclaimable"]),
        }
    }

    /// What programs could have without anybody being ended for it: the kernel takes cached files back.
    pub fn available(&self) -> u64 {
        (self.free + self.active_file + self.inactive_file + self.reclaimable).min(self.total)
    }

    /// As `/proc/meminfo`. The text has the same length every time, so that a reader never sees the rest of a longer one.
    pub fn text(&self) -> String {
        let rows = [
            ("MemTotal", self.total),
            ("MemFree", self.free),
            ("MemAvailable", self.available()),
            ("Buffers", 0),
            ("Cached", self.cached),
            ("SwapCached", 0),
            ("Active", self.active_anonymous + self.active_file),
            ("Inactive", self.inactive_anonymous + self.inactive_file),
            ("Active(anon)", self.active_anonymous),
            ("Inactive(anon)", self.inactive_anonymous),
            ("Active(file)", self.active_file),
            ("Inactive(file)", self.inactive_file),
            ("Unevictable", 0),
            ("Mlocked", 0),
            ("SwapTotal", 0),
            ("SwapFree", 0),
            ("Dirty", self.dirty),
            ("Writeback", 0),
            ("AnonPages", self.anonymous),
            ("Mapped", self.mapped),
            ("Shmem", self.shared),
            ("KReclaimable", self.reclaimable),
            ("Slab", self.reclaimable + self.unreclaimable),
            ("SReclaimable", self.reclaimable),
            ("SUnreclaim", self.unreclaimable),
            ("CommitLimit", self.total),
            ("Committed_AS", self.anonymous + self.shared),
        ];
        rows.iter().map(|(name, bytes)| format!("{:<15} {:>12} kB\n", format!("{name}:"), bytes / 1024)).collect()
    }
}

/// Bytes in use, without cached files, which the kernel takes back when it needs to, and bytes that may be used. Without
/// a control group that is a matter of the whole machine, which then is the sandbox's own.
pub fn in_use(settings: &Settings) -> (u64, u64) {
    if settings.memory_usage.is_none() {
        return in_use_of_all(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
    }
    let Memory { total, active_file, inactive_file, .. } = Memory::read(settings);
    (number(&settings.memory_usage).saturating_sub(active_file + inactive_file), total)
}

/// By the text of a `/proc/meminfo`.
fn in_use_of_all(text: &str) -> (u64, u64) {
    let bytes = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(rest.split_whitespace().next()?.parse::<u64>().ok()?.saturating_mul(1024))
    };
    let total = bytes("MemTotal:").unwrap_or(0);
    (total.saturating_sub(bytes("MemAvailable:").unwrap_or(total)), total)
}

/// Processes that were killed because memory ran out, since the sandbox was started.
pub fn kills(settings: &Settings) -> u64 {
    let text = match &settings.memory_events {
        Some(file) => read_small(file.as_fd()),
        None => fs::read_to_string("/proc/vmstat").ok(),
    };
    let text = text.unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

/// Bytes that the sandbox may use; 0 where there is no limit.
pub fn limit(settings: &Settings) -> u64 {
    number(&settings.memory_limit)
}

fn number(file: &Option<OwnedFd>) -> u64 {
    let text = file.as_ref().and_then(|file| read_small(file.as_fd()));
    text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn cached_files_are_available_in_both_versions_of_control_groups() {
        let first = "cache 1\nactive_file 1\ntotal_cache 314572800\ntotal_shmem 10485760\ntotal_rss 52428800\n\
                     total_active_file 209715200\ntotal_inactive_file 94371840\n";
        let second = "anon 52428800\nfile 314572800\nshmem 10485760\nactive_file 209715200\ninactive_file 94371840\n";
        for statistics in [first, second] {
            let memory = Memory::of(512 * MIB, 400 * MIB, statistics);
            assert_eq!((memory.free, memory.cached, memory.shared), (112 * MIB, 300 * MIB, 10 * MIB));
            assert_eq!((memory.available(), memory.anonymous), (402 * MIB, 50 * MIB));
        }
    }

    #[test]
    fn a_machine_of_its_own_tells_what_is_in_use() {
        let text = "MemTotal:        2048 kB\nMemFree:          100 kB\nMemAvailable:    1536 kB\n";
        assert_eq!(in_use_of_all(text), (512 << 10, 2 << 20));
        assert_eq!(in_use_of_all("MemTotal: 2048 kB\n"), (0, 2 << 20), "what is not told is not in use");
        assert_eq!(in_use_of_all("MemTotal: x\nMemAvailable:"), (0, 0));
    }

    #[test]
    fn usage_above_the_limit_is_no_free_memory_and_lengths_never_change() {
        let (little, much) = (Memory::of(1 << 30, 1 << 40, ""), Memory::of(1 << 40, 0, "file 1099511627776\n"));
        assert_eq!(little.text().len(), much.text().len());
        assert!(little.text().contains("MemFree:                   0 kB\n"));
        assert!(Memory::of(1 << 30, 0, "active_file 1099511627776\n").available() == 1 << 30);
    }
}
