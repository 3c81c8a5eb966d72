//! Whether the host has room for one more sandbox.
//!
//! Disks are sparse and memory is not set aside, so that a host holds more sandboxes than their
//! limits add up to. This keeps the last of both for those that run already: a full host would
//! break their disks, and kill processes that are in nobody's way.

use std::fs;
use std::io;
use std::path::Path;

use nagaya_engine::model::Limit;
use nagaya_engine::ports::DriverError;

use super::errors::failed;

/// What new sandboxes leave to those that are there, MiB.
pub(crate) struct Minimums {
    pub disk_free_mb: u64,
    pub memory_available_mb: u64,
}

/// The name of the limit that a new sandbox would break, if any. What cannot be read is no reason
/// to refuse.
pub(crate) fn lacking(least: &Minimums, storage: &Path) -> Option<Limit> {
    breaks(least, free_disk_mb(storage), available_memory_mb())
}

fn breaks(least: &Minimums, disk_mb: Option<u64>, memory_mb: Option<u64>) -> Option<Limit> {
    let below = |found: Option<u64>, least: u64| found.is_some_and(|found| found < least);
    if below(disk_mb, least.disk_free_mb) {
        Some(Limit::DiskFreeMin)
    } else if below(memory_mb, least.memory_available_mb) {
        Some(Limit::MemoryAvailableMin)
    } else {
        None
    }
}

/// What a failed step of the driver means: a limit's name where it ran into one.
pub(crate) fn refusal(step: &str, error: &(dyn std::error::Error + 'static)) -> DriverError {
    match limit_of(error) {
        Some(limit) => DriverError::Exhausted(limit),
        None => failed(step, error),
    }
}

/// The limit that an error of the operating system stands for.
pub(crate) fn limit_of(error: &(dyn std::error::Error + 'static)) -> Option<Limit> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        match error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            Some(libc::ENOSPC | libc::EDQUOT) => return Some(Limit::HostDisk),
            Some(libc::ENOMEM) => return Some(Limit::HostMemory),
            Some(libc::EMFILE | libc::ENFILE) => return Some(Limit::HostOpenFiles),
            _ => cause = error.source(),
        }
    }
    None
}

pub(crate) fn free_disk_mb(path: &Path) -> Option<u64> {
    Some(free_bytes(path)? >> 20)
}

pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let status = rustix::fs::statvfs(path).ok()?;
    Some(status.f_bavail.saturating_mul(status.f_frsize))
}

pub(crate) fn available_memory_mb() -> Option<u64> {
    memory_mb(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn memory_mb(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_broken_below_it_and_named() {
        let least = Minimums { disk_free_mb: 100, memory_available_mb: 50 };
        assert_eq!(breaks(&least, Some(100), Some(50)), None);
        assert_eq!(breaks(&least, Some(99), Some(50)), Some(Limit::DiskFreeMin));
        assert_eq!(breaks(&least, Some(100), Some(49)), Some(Limit::MemoryAvailableMin));
        assert_eq!(breaks(&least, None, None), None);
    }

    #[test]
    fn the_hosts_own_numbers_can_be_read() {
        assert!(free_disk_mb(Path::new("/")).is_some());
        assert!(available_memory_mb().is_some_and(|megabytes| megabytes > 0));
        assert_eq!(memory_mb("MemTotal: 1 kB\nMemAvailable:   2048 kB\n"), Some(2));
        assert_eq!(memory_mb("nonsense"), None);
    }

    #[test]
    fn a_full_disk_is_a_limit_wherever_it_is_in_the_chain() {
        #[derive(Debug, thiserror::Error)]
        #[error("copy")]
        struct Outer(#[source] io::Error);
        assert_eq!(limit_of(&Outer(io::Error::from_raw_os_error(libc::ENOSPC))), Some(Limit::HostDisk));
        assert_eq!(limit_of(&Outer(io::Error::from_raw_os_error(libc::EACCES))), None);
    }
}
