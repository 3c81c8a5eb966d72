//! Numbers of the whole host under which all sandboxes together must stay, each at its own limit.
//!
//! A sandbox meets its own limit first only where the host has room for that limit of every sandbox. The server raises
//! what is too low, as these are counts without cost: what is counted takes memory, which a control group bounds.
//! Where it may not, it makes no more sandboxes than the host has room for.

use std::fs;
use std::path::Path;

/// Threads of an agent, beside the sandbox's own.
const AGENT_THREADS: u64 = 64;
/// As the spawner gives every sandbox; see `nagaya_guest::spawn`.
const TERMINALS: u64 = nagaya_guest::spawn::TERMINALS_MAX as u64;

/// One number of the host.
struct Ceiling {
    /// Below `/proc/sys`.
    file: &'static str,
    /// What the host needs for itself.
    host: u64,
    sandbox: u64,
    /// What the kernel takes.
    most: u64,
}

fn ceilings(processes_max: u64) -> [Ceiling; 4] {
    let threads = processes_max.saturating_add(AGENT_THREADS);
    [
        Ceiling { file: "kernel/pid_max", host: 4_096, sandbox: threads, most: 4_194_304 },
        Ceiling { file: "kernel/threads-max", host: 4_096, sandbox: threads, most: 0x3fff_ffff },
        Ceiling { file: "kernel/pty/max", host: 4_096, sandbox: TERMINALS, most: i32::MAX as u64 },
        // Open files are memory of their control groups, and nothing else; so the number for all is in the way only.
        Ceiling { file: "fs/file-max", host: i64::MAX as u64, sandbox: 0, most: i64::MAX as u64 },
    ]
}

impl Ceiling {
    fn wanted(&self, sandboxes: u32) -> u64 {
        self.host.saturating_add(self.sandbox.saturating_mul(sandboxes.into())).min(self.most)
    }

    /// For how many sandboxes a number has room.
    fn room(&self, number: u64) -> u32 {
        let room = number.saturating_sub(self.host).checked_div(self.sandbox).unwrap_or(u64::MAX);
        u32::try_from(room).unwrap_or(u32::MAX)
    }
}

/// Raises what is too low for that many sandboxes. Gives for how many there is room then, and says what is missing.
pub(crate) fn raise(sandboxes: u32, processes_max: u64) -> u32 {
    raise_below(Path::new("/proc/sys"), sandboxes, processes_max)
}

fn raise_below(top: &Path, sandboxes: u32, processes_max: u64) -> u32 {
    let mut room_for_all = u32::MAX;
    for ceiling in ceilings(processes_max) {
        let path = top.join(ceiling.file);
        // A kernel without the file has no such number.
        let Some(number) = read(&path) else { continue };
        let wanted = ceiling.wanted(sandboxes);
        if number < wanted {
            match fs::write(&path, wanted.to_string()) {
                Ok(()) => tracing::info!(file = ceiling.file, from = number, to = wanted, "raised a limit of the host"),
                Err(error) => {
                    tracing::warn!(%error, file = ceiling.file, number, wanted, "cannot raise a limit of the host")
                }
            }
        }
        let room = ceiling.room(read(&path).unwrap_or(number));
        if room < sandboxes {
            tracing::warn!(
                file = ceiling.file,
                sandboxes = room,
                slots_max = sandboxes,
                "the host has room for fewer sandboxes than slots_max; no more will be made"
            );
        }
        room_for_all = room_for_all.min(room);
    }
    room_for_all
}

/// What is too low for that many sandboxes and cannot be raised, in words, with the room there is.
pub(crate) fn lacking(sandboxes: u32, processes_max: u64) -> Result<String, String> {
    let mut short = Vec::new();
    for ceiling in ceilings(processes_max) {
        let path = Path::new("/proc/sys").join(ceiling.file);
        let Some(number) = read(&path) else { continue };
        let raisable = fs::OpenOptions::new().write(true).open(&path).is_ok();
        let reached = if raisable { ceiling.wanted(sandboxes).max(number) } else { number };
        if ceiling.room(reached) < sandboxes {
            let name = ceiling.file.replace('/', ".");
            short.push(format!("{name} = {reached} is enough for {} sandboxes", ceiling.room(reached)));
        }
    }
    if short.is_empty() { Ok(format!("enough for {sandboxes} sandboxes")) } else { Err(short.join("; ")) }
}

fn read(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(numbers: [&str; 4]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir_all(top.path().join("kernel/pty")).unwrap();
        fs::create_dir_all(top.path().join("fs")).unwrap();
        for (ceiling, number) in ceilings(1_024).iter().zip(numbers) {
            fs::write(top.path().join(ceiling.file), format!("{number}\n")).unwrap();
        }
        top
    }

    #[test]
    fn what_is_too_low_is_raised_and_what_is_enough_stays() {
        let top = host(["32768", "4000000", "4096", "100000"]);
        assert!(raise_below(top.path(), 1_024, 1_024) >= 1_024);
        let now = |file| read(&top.path().join(file)).unwrap();
        assert_eq!(now("kernel/pid_max"), 4_096 + 1_024 * 1_088);
        assert_eq!(now("kernel/threads-max"), 4_000_000);
        assert_eq!(now("kernel/pty/max"), 4_096 + 1_024 * TERMINALS);
        assert_eq!(now("fs/file-max"), i64::MAX as u64);
    }

    #[test]
    fn no_more_is_promised_than_the_kernel_can_count() {
        let top = host(["32768", "4000000", "4096", "100000"]);
        // 4,194,304 numbers for processes of up to 10,064 each.
        assert_eq!(raise_below(top.path(), 4_096, 10_000), (4_194_304 - 4_096) / 10_064);
        assert_eq!(read(&top.path().join("kernel/pid_max")), Some(4_194_304));
    }

    #[test]
    fn a_host_that_cannot_be_changed_bounds_the_sandboxes() {
        let pid_max = &ceilings(1_024)[0];
        assert_eq!(pid_max.room(32_768), 26);
        assert_eq!(pid_max.room(1_000), 0);
        assert_eq!(ceilings(1_024)[3].room(5), u32::MAX, "not counted by sandboxes");
    }
}
