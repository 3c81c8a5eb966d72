//! The spawner's own, almost empty root: what every sandbox is copied from.
//!
//! It is a tmpfs with mount points for a sandbox's parts, a ready-made `/dev` and `/sys`, and the
//! host's `/proc` (for id maps; no sandbox gets to see it).

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, symlink};

use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags};

use super::{Step, StepError, process};
use crate::mount;
use crate::spawn::{LAYERS_MAX, PROCESSOR_TEXT_BYTES};

/// Where a sandbox's disk, layers and finished root are attached.
pub(super) const DISK: &str = "/disk";
pub(super) const LAYERS: &str = "/layers";
pub(super) const NEW_ROOT: &str = "/root";
/// Where an overlay is mounted before it is moved to its place.
pub(super) const OVERLAY: &str = "/overlay";
/// Where the parts of a root wait that need no disk, by their names in it.
pub(super) const READY: &str = "/ready";
pub(super) const DEVICES: &str = "/dev";
pub(super) const SYSTEM: &str = "/sys";
/// Where a sandbox's small files are made that cover others.
pub(super) const COVERS: &str = "/covers";
/// Files of `/proc` that are the same in every sandbox.
pub(super) const FIXED: &str = "/fixed";
/// What `/proc/cpuinfo` has on each processor.
pub(super) const PROCESSOR_TEXTS: &str = "/processors";
pub(super) const PARTS: [&str; 3] = ["dev", "proc", "sys"];

/// Character devices of every sandbox: name, major, minor.
const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

pub(super) fn prepare() -> Result<(), StepError> {
    process::unshare(libc::CLONE_NEWNS).step("unshare the mount namespace")?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .step("make mounts private")?;
    let root =
        mount::new_filesystem("tmpfs", &[("mode", Some("0700")), ("size", Some("16m"))], MountAttrFlags::empty())
            .step("make the spawner's root")?;
    let proc = mount::clone_tree(CWD, "/proc", false).step("copy /proc")?;
    // Any directory will do: the mount moves to the top at once.
    mount::attach(root.as_fd(), "/proc").step("attach the spawner's root")?;
    std::env::set_current_dir("/proc").step("enter the spawner's root")?;
    for directory in ["proc", "disk", "layers", "overlay", "root", "ready", "dev", "sys", "covers", "fixed"] {
        fs::create_dir(directory).step("fill the spawner's root")?;
    }
    for index in 0..LAYERS_MAX {
        fs::create_dir(format!("layers/{index}")).step("fill the spawner's root")?;
    }
    for part in PARTS {
        fs::create_dir(format!("ready/{part}")).step("fill the spawner's root")?;
    }
    mount::attach(proc.as_fd(), "proc").step("attach /proc")?;
    rustix::process::pivot_root(".", ".").step("change the root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step("leave the host's root")?;
    std::env::set_current_dir("/").step("enter the new root")?;
    make_devices()?;
    make_system()?;
    for (name, text) in FIXED_FILES {
        fs::write(format!("{FIXED}/{name}"), text).step("make files of /proc")?;
    }
    keep_processor_texts().step("keep what is known of processors")
}

/// A machine without swap on which nothing was counted yet.
const FIXED_FILES: [(&str, &str); 2] = [
    ("swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"),
    ("vmstat", "pgpgin 0\npgpgout 0\npswpin 0\npswpout 0\npgfault 0\npgmajfault 0\noom_kill 0\n"),
];

/// Reading this of a large host takes longer than making a sandbox, so it is read once.
fn keep_processor_texts() -> std::io::Result<()> {
    let file = fs::File::create(PROCESSOR_TEXTS)?;
    for text in fs::read_to_string("/proc/cpuinfo")?.split_inclusive("\n\n") {
        let text = text.trim_end_matches('\n');
        let number = text.strip_prefix("processor").and_then(|rest| {
            let (_, rest) = rest.split_once(": ")?;
            rest.lines().next()?.trim().parse::<usize>().ok()
        });
        // Some architectures have a part on the machine, too.
        let Some(number) = number else { continue };
        let text = format!("{text}\n");
        let end = text.len().min(PROCESSOR_TEXT_BYTES);
        file.write_all_at(&text.as_bytes()[..end], (number * PROCESSOR_TEXT_BYTES) as u64)?;
    }
    Ok(())
}

fn make_devices() -> Result<(), StepError> {
    rustix::process::umask(Mode::empty());
    for (name, major, minor) in NODES {
        let device = rustix::fs::makedev(major, minor);
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(CWD, format!("/dev/{name}"), FileType::CharacterDevice, mode, device)
            .step("make devices")?;
    }
    for directory in ["pts", "shm"] {
        fs::create_dir(format!("/dev/{directory}")).step("make devices")?;
    }
    let links = [
        ("pts/ptmx", "ptmx"),
        // Where the sandbox's first process listens, on its own disk, until a log of its own does.
        ("/run/dev-log", "log"),
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ];
    for (target, name) in links {
        symlink(target, format!("/dev/{name}")).step("make devices")?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}

/// The `/sys` of all sandboxes: places for what is a sandbox's own.
fn make_system() -> Result<(), StepError> {
    for directory in ["devices/system/cpu", "fs/cgroup"] {
        fs::create_dir_all(format!("{SYSTEM}/{directory}")).step("make /sys")?;
    }
    Ok(())
}
