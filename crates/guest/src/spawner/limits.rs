//! What bounds the kernel's resources that a control group does not count.
//!
//! The kernel keeps three kinds of accounts: of the sandbox's own namespaces (System V objects, POSIX queues, terminals),
//! of users, and of the whole host. What is counted for a user is charged to the user inside, and to whoever made the
//! user namespace: there the limits apply that are lowered here, and the host's own of `user.max_*`. What is counted
//! for the whole host only is refused by the filter, see `crate::seccomp`.

use std::fs::{self, OpenOptions};
use std::os::fd::OwnedFd;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Step, StepError};

/// Limits of every process in a sandbox, and of all of its users together where the kernel counts users. None is raised.
const LIMITS: [(Resource, u64); 5] = [
    // Queued signals and timers.
    (Resource::Sigpending, 16_384),
    // Bytes of POSIX message queues, which stay when all processes have ended.
    (Resource::Msgqueue, 819_200),
    (Resource::Memlock, 64 << 20),
    // Whoever started the server may have been allowed to go before all others.
    (Resource::Nice, 0),
    (Resource::Rtprio, 0),
];

/// System V objects stay when all processes have ended, and hold memory. Of an IPC namespace: message queues, of
/// 16 KiB each; and semaphores: in one set, in all, operations at once, sets.
const SYSTEM_V: [(&str, &str); 2] = [("msgmni", "32"), ("sem", "32000 65536 500 1024")];

/// Lowers the limits of this process, which all that it starts inherits.
pub(super) fn lower_own() -> Result<(), StepError> {
    for (resource, most) in LIMITS {
        let old = getrlimit(resource);
        let least = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
        let new = Rlimit { current: least(old.current), maximum: least(old.maximum) };
        setrlimit(resource, new).step("lower a limit")?;
    }
    Ok(())
}

/// Bounds what the calling process's IPC namespace may hold. Gives the file of what is left: the pages that all
/// segments of shared memory may have.
pub(super) fn bound_system_v() -> Result<OwnedFd, StepError> {
    for (name, value) in SYSTEM_V {
        fs::write(format!("/proc/sys/kernel/{name}"), value).step("bound System V objects")?;
    }
    let segments = OpenOptions::new().write(true).open("/proc/sys/kernel/shmall");
    segments.map(OwnedFd::from).step("bound shared memory")
}

/// Sees to it that a crash inside starts nothing of the host's and writes none of its files. True where the limit of
/// core files must stay as it is now.
pub(super) fn forbid_foreign_core_dumps() -> Result<bool, StepError> {
    let pattern = fs::read("/proc/sys/kernel/core_pattern").step("read where core files go")?;
    let set_user_id = fs::read("/proc/sys/fs/suid_dumpable").step("read where core files go")?;
    if !leave_the_sandbox(&pattern, &set_user_id) {
        return Ok(false);
    }
    // A program that takes core files is started whatever the limit is, 0 included. Only 1 keeps the kernel from it.
    setrlimit(Resource::Core, Rlimit { current: Some(1), maximum: Some(1) }).step("forbid core files")?;
    Ok(true)
}

/// Whether core files go to a program (`|`) or socket (`@`) of the host's or, those of set-user-id programs, to a path
/// below the host's root.
fn leave_the_sandbox(core_pattern: &[u8], suid_dumpable: &[u8]) -> bool {
    match core_pattern.first() {
        Some(b'|' | b'@') => true,
        Some(b'/') => suid_dumpable.first() == Some(&b'2'),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_files_stay_inside_unless_the_pattern_leads_out() {
        for (pattern, suid_dumpable, leaves) in [
            ("core\n", "0\n", false),
            ("core\n", "2\n", false),
            ("/var/crash/core.%p\n", "0\n", false),
            ("/var/crash/core.%p\n", "2\n", true),
            ("|/usr/share/apport/apport %p\n", "0\n", true),
            ("@/run/cores.sock\n", "1\n", true),
            ("\n", "2\n", false),
        ] {
            assert_eq!(leave_the_sandbox(pattern.as_bytes(), suid_dumpable.as_bytes()), leaves, "{pattern}");
        }
    }
}
