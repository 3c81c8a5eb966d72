//! Lets sandboxes meet the end of their disks before the host meets that of its own.
//!
//! Disks are sparse: all of them together may hold more than the host has. A host that is full breaks every disk that is
//! written to, those of neighbours too. So when little is left, the file systems of disks and volumes are told to keep all
//! that is free in them for themselves: whoever writes there gets "no space left" as from any full disk, and what is written
//! already, read, removed or overwritten is in nobody's way. Those that use more than their share come first, all others when
//! it is nearly too late. When space is back, everything goes on by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A fast disk takes a few hundred megabytes meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What is left for those that use less than their share, bytes; and of what the host has, the part that it takes at most.
const SHARE_BYTES: u64 = 1 << 30;
const SHARE_OF_HOST: u64 = 8;
const BLOCK_BYTES: u64 = 4096;
const SECTOR_BYTES: u64 = 512;
/// What a file system keeps for itself when nobody says otherwise, clusters: that much at most, and a fiftieth of it.
const KEPT_DEFAULT_MAX: u64 = 4096;
const KEPT_DEFAULT_PART: u64 = 50;

/// Below which free bytes of the host writers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lines {
    /// Those with more than their share.
    greedy: u64,
    /// All of them.
    all: u64,
}

/// Who is to be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hold {
    Nobody,
    Greedy,
    All,
}

impl Lines {
    fn of(disk_free_mb_min: u64, host_bytes: u64) -> Self {
        let all = disk_free_mb_min << 20;
        Self { greedy: all + SHARE_BYTES.min(host_bytes / SHARE_OF_HOST), all }
    }

    /// Who is held goes on only when clearly more is left than what was too little.
    fn judge(self, free: u64, held: Hold) -> Hold {
        let slack = (self.greedy - self.all) / 4;
        let line = |line: u64, hold: Hold| if held >= hold { line + slack } else { line };
        if free < line(self.all, Hold::All) {
            Hold::All
        } else if free < line(self.greedy, Hold::Greedy) {
            Hold::Greedy
        } else {
            Hold::Nobody
        }
    }
}

/// A mounted file system on a loop device over a file of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    name: String,
    /// Of the host's disk.
    used: u64,
}

/// Which of these are to be held.
fn chosen(devices: &[Device], hold: Hold) -> BTreeSet<String> {
    let mean = devices.iter().map(|device| device.used).sum::<u64>() / (devices.len() as u64).max(1);
    let is_chosen = |device: &&Device| match hold {
        Hold::Nobody => false,
        Hold::Greedy => device.used >= mean,
        Hold::All => true,
    };
    devices.iter().filter(is_chosen).map(|device| device.name.clone()).collect()
}

/// The thread that watches over the host's disk, until this is dropped.
pub(crate) struct Brake {
    stopped: Arc<(Mutex<bool>, Condvar)>,
}

impl Brake {
    /// `None` where the operator wants no limit.
    pub fn start(storage: PathBuf, disk_free_mb_min: u64) -> Option<Self> {
        if disk_free_mb_min == 0 {
            return None;
        }
        let stopped = Arc::new((Mutex::new(false), Condvar::new()));
        let seen = stopped.clone();
        let watch = move || {
            let mut watcher = DiskWatcher { storage, disk_free_mb_min, held: BTreeMap::new(), hold: Hold::Nobody };
            watcher.find_held();
            loop {
                watcher.look();
                let guard = seen.0.lock().expect("the flag is changed without panics");
                let waited = seen.1.wait_timeout_while(guard, LOOK_EVERY, |stopped| !*stopped);
                if *waited.expect("the flag is changed without panics").0 {
                    // Whoever comes next lets go of what is held, when there is space.
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("disk-brake".into()).spawn(watch) {
            tracing::warn!(%error, "nothing keeps sandboxes from filling the host's disk");
        }
        Some(Self { stopped })
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        *self.stopped.0.lock().expect("the flag is changed without panics") = true;
        self.stopped.1.notify_all();
    }
}

struct DiskWatcher {
    storage: PathBuf,
    disk_free_mb_min: u64,
    /// What those that are held kept for themselves before.
    held: BTreeMap<String, u64>,
    hold: Hold,
}

impl DiskWatcher {
    /// What an earlier server held, which was killed.
    fn find_held(&mut self) {
        for device in devices(&self.storage) {
            if is_held(&device.name) {
                let usual = (blocks(&device.name) / KEPT_DEFAULT_PART).min(KEPT_DEFAULT_MAX);
                self.held.insert(device.name, usual);
                self.hold = Hold::All;
            }
        }
    }

    fn look(&mut self) {
        let Ok(host) = rustix::fs::statvfs(&self.storage) else { return };
        let lines = Lines::of(self.disk_free_mb_min, host.f_blocks.saturating_mul(host.f_frsize));
        let free = host.f_bavail.saturating_mul(host.f_frsize);
        // What programs have written may not be on the host's disk yet. All of that is an upper bound for what is ours.
        if self.held.is_empty() && lines.judge(free.saturating_sub(unwritten_bytes()), self.hold) == Hold::Nobody {
            self.hold = Hold::Nobody;
            return;
        }
        let devices = devices(&self.storage);
        let promised: u64 = devices.iter().map(|device| promised_bytes(&device.name)).sum();
        let hold = lines.judge(free.saturating_sub(promised), self.hold);
        if hold != self.hold {
            let free_mb = free >> 20;
            match hold {
                Hold::Nobody => tracing::info!(free_mb, "the host's disk has space again"),
                Hold::Greedy => tracing::warn!(
                    free_mb,
                    "the host's disk is nearly full: disks that use most of it take nothing new"
                ),
                Hold::All => tracing::warn!(
                    free_mb,
                    "the host's disk is full but for what the host needs: disks take nothing new"
                ),
            }
            self.hold = hold;
        }
        let wanted = chosen(&devices, hold);
        let gone: Vec<String> = self.held.keys().filter(|name| !wanted.contains(*name)).cloned().collect();
        for name in gone {
            if let Some(before) = self.held.remove(&name) {
                // One that is unmounted keeps nothing.
                let _ = fs::write(kept_file(&name), before.to_string());
            }
        }
        for name in wanted {
            if self.held.contains_key(&name) {
                continue;
            }
            match hold_back(&name) {
                Ok(before) => drop(self.held.insert(name, before)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::debug!(%error, "a disk cannot be held"),
            }
        }
    }
}

/// Everything of ours that is mounted.
fn devices(storage: &Path) -> Vec<Device> {
    let names = fs::read_dir("/sys/fs/ext4").into_iter().flatten().flatten();
    let device = |name: String| {
        let backing = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
        let path = Path::new(backing.trim_end());
        let used = fs::metadata(path).map_or(0, |file| file.blocks() * SECTOR_BYTES);
        path.starts_with(storage).then_some(Device { name, used })
    };
    names.filter_map(|entry| entry.file_name().into_string().ok()).filter_map(device).collect()
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn kept_file(name: &str) -> String {
    format!("/sys/fs/ext4/{name}/reserved_clusters")
}

/// What its programs have written and it has not, bytes.
fn promised_bytes(name: &str) -> u64 {
    number(&format!("/sys/fs/ext4/{name}/delayed_allocation_blocks")).unwrap_or(0).saturating_mul(BLOCK_BYTES)
}

fn blocks(name: &str) -> u64 {
    number(&format!("/sys/block/{name}/size")).unwrap_or(0) * SECTOR_BYTES / BLOCK_BYTES
}

/// Whether a file system takes nothing new because the host has no space.
pub(crate) fn is_held(name: &str) -> bool {
    let all = blocks(name);
    all > 0 && number(&kept_file(name)).is_some_and(|kept| kept > all / 2)
}

/// Lets a file system keep all that is free in it for itself; what it kept before.
fn hold_back(name: &str) -> io::Result<u64> {
    let before = number(&kept_file(name)).ok_or(io::ErrorKind::NotFound)?;
    let mut kept = blocks(name).saturating_sub(1);
    loop {
        match fs::write(kept_file(name), kept.to_string()) {
            // It may be smaller than its device.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && kept > 1 => kept = kept * 9 / 10,
            written => return written.map(|()| before),
        }
    }
}

/// Bytes that any program wrote and no disk has yet.
fn unwritten_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    unwritten(&text)
}

fn unwritten(meminfo: &str) -> u64 {
    let figure = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    (figure("Dirty") + figure("Writeback")) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_greedy_are_held_first_and_all_when_it_is_nearly_too_late() {
        let lines = Lines::of(256, 100 << 30);
        assert_eq!(lines, Lines { greedy: (256 + 1024) * MIB, all: 256 * MIB });
        assert_eq!(lines.judge(2048 * MIB, Hold::Nobody), Hold::Nobody);
        assert_eq!(lines.judge(1000 * MIB, Hold::Nobody), Hold::Greedy);
        assert_eq!(lines.judge(255 * MIB, Hold::Nobody), Hold::All);
        // Nobody goes on for a handful of blocks.
        assert_eq!(lines.judge(1281 * MIB, Hold::Greedy), Hold::Greedy);
        assert_eq!(lines.judge(1600 * MIB, Hold::Greedy), Hold::Nobody);
        assert_eq!(lines.judge(300 * MIB, Hold::All), Hold::All);
        assert_eq!(lines.judge(600 * MIB, Hold::All), Hold::Greedy);
        // A small host keeps an eighth.
        assert_eq!(Lines::of(64, 1 << 30), Lines { greedy: (64 + 128) * MIB, all: 64 * MIB });
    }

    #[test]
    fn who_uses_more_than_the_mean_is_greedy() {
        let device = |name: &str, used: u64| Device { name: name.into(), used };
        let devices = [device("a", 10), device("b", 10), device("c", 100)];
        assert_eq!(chosen(&devices, Hold::Greedy), BTreeSet::from(["c".to_owned()]));
        assert_eq!(chosen(&devices, Hold::All).len(), 3);
        assert!(chosen(&devices, Hold::Nobody).is_empty());
        assert_eq!(chosen(&devices[..1], Hold::Greedy).len(), 1);
        assert!(chosen(&[], Hold::All).is_empty());
    }

    #[test]
    fn what_is_not_written_yet_is_read() {
        assert_eq!(unwritten("MemFree: 1 kB\nDirty:       8 kB\nWriteback:   2 kB\nWritebackTmp: 9 kB\n"), 10 << 10);
        assert_eq!(unwritten(""), 0);
    }
}
