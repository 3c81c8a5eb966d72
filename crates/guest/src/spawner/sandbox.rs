//! The birth of a sandbox: from a clone of the spawner to the agent as its first process.
//!
//! It happens in two stages. All that does not depend on the disk is done first, and the process waits for the disk;
//! so this part can be pre-created for disks that nobody knows yet.
//!
//! All namespaces but the user namespace are made while the process is still the host's root, and
//! so belong to the host: capabilities in the sandbox, which hold in its user namespace only, give
//! no power over mounts, network, host name or process ids.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, UnmountFlags};
use rustix::thread::{CapabilitySet, LinkNameSpaceType};

use super::process::{self, Clone, Exit};
use super::root::{COVERS, DEVICES, DISK, FIXED, LAYERS, NEW_ROOT, OVERLAY, PARTS, PROCESSOR_TEXTS, READY, SYSTEM};
use super::{Step, StepError, limits};
use crate::mount::{self, NO_DEVICES, NO_EXEC, NO_SUID, READ_ONLY};
use crate::seccomp;
use crate::spawn::{self, ChannelError, LAYERS_MAX, Sandbox};

const NAMESPACES: i32 = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// What root in a sandbox may still do, to its own files and processes.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::AUDIT_WRITE)
    .union(CapabilitySet::SETFCAP)
    // The agent's only: it takes it from everything that it starts.
    .union(CapabilitySet::SYS_PTRACE);

/// What /dev/shm may hold before the server has told how much memory the sandbox has.
const SHARED_MEMORY: [(&str, Option<&str>); 2] = [("size", Some("1m")), ("nr_inodes", Some("64"))];

/// What is left of /proc beside its processes. All else tells of the host and of whoever else is on it, or acts on them,
/// and is shown empty: also what a later kernel adds.
const SHOWN_IN_PROC: [&str; 20] = [
    "cpuinfo",
    "crypto",
    "devices",
    "filesystems",
    "loadavg",
    "locks",
    "meminfo",
    "misc",
    "mounts",
    "net",
    "self",
    "stat",
    "swaps",
    "sys",
    "sysvipc",
    "thread-self",
    "tty",
    "uptime",
    "version",
    "vmstat",
];
/// Files of /proc that the agent writes, and those that are the same in every sandbox.
const SHOWN_FILES: [&str; 4] = ["meminfo", "stat", "loadavg", "cpuinfo"];
const FIXED_FILES: [&str; 2] = ["swaps", "vmstat"];
/// Files below /proc/sys that count what the whole host has.
const COUNTED_FOR_ALL: [&str; 6] =
    ["fs/aio-nr", "fs/dentry-state", "fs/file-nr", "fs/inode-nr", "fs/inode-state", "kernel/pty/nr"];
/// Directories of /proc that can only be read; the agent's own among them, whose files would obey
/// root of the sandbox.
const READ_ONLY_DIRECTORIES: [&str; 2] = ["1", "sys"];

/// The request's descriptors by name; see [`Sandbox`] for their order.
struct Parts<'a> {
    error: BorrowedFd<'a>,
    lifeline: BorrowedFd<'a>,
    disk: BorrowedFd<'a>,
    user: BorrowedFd<'a>,
    network: BorrowedFd<'a>,
    agent_cgroups: Vec<BorrowedFd<'a>>,
    command_cgroups: Vec<BorrowedFd<'a>>,
    command_groups: Vec<(Vec<BorrowedFd<'a>>, BorrowedFd<'a>)>,
    memory_usage: BorrowedFd<'a>,
    memory_limit: BorrowedFd<'a>,
    memory_statistics: BorrowedFd<'a>,
    memory_events: BorrowedFd<'a>,
    processes_limit: BorrowedFd<'a>,
}

impl<'a> Parts<'a> {
    fn of(order: &Sandbox, descriptors: &'a [OwnedFd]) -> Option<Self> {
        let mut rest = descriptors.iter().map(AsFd::as_fd);
        let parts = Self {
            error: rest.next()?,
            lifeline: rest.next()?,
            disk: rest.next()?,
            user: rest.next()?,
            network: rest.next()?,
            agent_cgroups: rest.by_ref().take(order.agent_cgroups).collect(),
            command_cgroups: rest.by_ref().take(order.command_cgroups).collect(),
            command_groups: order
                .command_groups
                .iter()
                .map(|files| Some((rest.by_ref().take(*files).collect(), rest.next()?)))
                .collect::<Option<_>>()?,
            memory_usage: rest.next()?,
            memory_limit: rest.next()?,
            memory_statistics: rest.next()?,
            memory_events: rest.next()?,
            processes_limit: rest.next()?,
        };
        rest.next().is_none().then_some(parts)
    }
}

/// Starts the sandbox's first process; it reports its own failures to the error pipe.
pub(super) fn start(
    order: &Sandbox,
    descriptors: &[OwnedFd],
    agent: BorrowedFd<'_>,
    server: BorrowedFd<'_>,
) -> Result<(i32, OwnedFd), StepError> {
    let parts = Parts::of(order, descriptors).ok_or(StepError { step: "read the request", errno: Errno::INVAL })?;
    match process::clone(NAMESPACES).step("clone the first process")? {
        Clone::Parent { pid, pidfd } => Ok((pid, pidfd)),
        Clone::Child => {
            process::notice_children();
            // While this process held it too, the server would not notice the spawner's end.
            process::close(server);
            let Err(error) = become_sandbox(order, &parts, agent);
            let text = format!("{}: {}", error.step, std::io::Error::from(error.errno));
            let _ = rustix::io::write(parts.error, text.as_bytes());
            process::exit(Exit::Failed)
        }
    }
}

fn become_sandbox(
    order: &Sandbox,
    parts: &Parts<'_>,
    agent: BorrowedFd<'_>,
) -> Result<std::convert::Infallible, StepError> {
    for cgroup in &parts.agent_cgroups {
        rustix::io::write(cgroup, b"0").step("join the cgroup")?;
    }
    process::unshare(libc::CLONE_NEWCGROUP).step("unshare the cgroup namespace")?;
    enter_time_namespace().step("start the sandbox's clock")?;
    let pin_cores = limits::forbid_foreign_core_dumps()?;
    let (shown, sizes) = make_ready(order)?;
    let descriptors = [sizes.shared_memory.as_fd(), sizes.segments.as_fd()];
    if let Err(error) = spawn::send(parts.disk, &spawn::Sizes, &descriptors) {
        return Err(lost("tell what has a size", error));
    }
    drop(sizes);
    let Stand { disk, listen, layers, user, env } = await_disk(parts.disk)?;
    build_root(order, disk.as_fd(), &layers)?;

    // From here on the process gives away what it can do.
    rustix::thread::move_into_link_name_space(parts.network, Some(LinkNameSpaceType::Network))
        .step("enter the network namespace")?;
    rustix::thread::move_into_link_name_space(parts.user, Some(LinkNameSpaceType::User))
        .step("enter the user namespace")?;
    become_inner_root().step("become root of the sandbox")?;
    new_session_keyring().step("leave the host's keyring")?;
    limit_capabilities().step("drop capabilities")?;
    rustix::process::setsid().step("start a session")?;
    // The spawner's standard error is the server's; standard input is /dev/null already.
    rustix::stdio::dup2_stderr(rustix::stdio::stdin()).step("close standard error")?;
    let calls = install_filter(pin_cores).step("install the system call filter")?;
    run_agent(order, parts, (&user, &env), listen.as_fd(), &shown, calls, agent)
}

/// What a sandbox lives on; see [`spawn::Disk`].
struct Stand {
    disk: OwnedFd,
    listen: OwnedFd,
    /// By the directory of the root that each is the content of.
    layers: Vec<(String, OwnedFd)>,
    user: spawn::User,
    env: Vec<String>,
}

/// Waits for the disk, the layers under it, and the socket to listen on. A server that ended sends none, and
/// nobody is left who would read of an error.
fn await_disk(socket: BorrowedFd<'_>) -> Result<Stand, StepError> {
    let (spawn::Disk { layers: places, user, env }, descriptors) =
        spawn::receive(socket).map_err(|error| lost("wait for the disk", error))?;
    let mut descriptors = descriptors.into_iter();
    let (disk, listen) = (descriptors.next(), descriptors.next());
    let known = |place: &String| place.is_empty() || spawn::PLACES.contains(&place.as_str());
    match (disk, listen) {
        (Some(disk), Some(listen))
            if descriptors.len() == places.len() && places.len() <= LAYERS_MAX && places.iter().all(known) =>
        {
            Ok(Stand { disk, listen, layers: places.into_iter().zip(descriptors).collect(), user, env })
        }
        _ => Err(StepError { step: "read what the disk is", errno: Errno::INVAL }),
    }
}

/// What an error on the server's socket means: a server that ended, or wants no sandbox any more, needs no report.
fn lost(step: &'static str, error: ChannelError) -> StepError {
    match error {
        ChannelError::Closed => process::exit(Exit::Done),
        ChannelError::System(errno) => StepError { step, errno },
        ChannelError::Malformed => StepError { step, errno: Errno::INVAL },
    }
}

/// Lets the clocks that count from the host's start count from now on: uptime, and the age of processes.
fn enter_time_namespace() -> Result<(), Errno> {
    const CLONE_NEWTIME: i32 = 0x80;
    let namespace = "/proc/self/ns/time_for_children";
    // A kernel without such namespaces tells the host's uptime.
    if !fs::exists(namespace).unwrap_or(false) {
        return Ok(());
    }
    process::unshare(CLONE_NEWTIME)?;
    // The smaller of the two, so that neither begins before 0.
    let since = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec;
    let offsets = format!("monotonic -{since} 0\nboottime -{since} 0\n");
    // A server in a container may lack the right; then the clocks are the host's.
    let _ = fs::write("/proc/self/timens_offsets", offsets);
    let namespace = fs::File::open(namespace).map_err(errno_of)?;
    rustix::thread::move_into_link_name_space(namespace.as_fd(), None)
}

fn errno_of(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Files that the agent writes: what the sandbox sees as its share of what the kernel tells of the host, and one more.
struct Shown {
    /// Its `/proc/1/oom_score_adj`, which it has no right to open.
    oom_score: OwnedFd,
    meminfo: OwnedFd,
    stat: OwnedFd,
    loadavg: OwnedFd,
    cpuinfo: OwnedFd,
    /// The directories `/sys/devices/system/cpu` and `/sys/fs/cgroup`.
    processors: OwnedFd,
    cgroup: OwnedFd,
    /// What there is to be told of processors.
    processor_texts: OwnedFd,
}

/// What follows from the sandbox's memory, which is not known yet; see [`spawn::Sizes`].
struct Sizes {
    shared_memory: OwnedFd,
    segments: OwnedFd,
}

/// Makes everything that needs no disk.
fn make_ready(order: &Sandbox) -> Result<(Shown, Sizes), StepError> {
    let segments = limits::bound_system_v()?;
    rustix::system::sethostname(order.hostname.as_bytes()).step("set the host name")?;
    let shared_memory = build_devices(order)?;
    let tree = mount::clone_tree(rustix::fs::CWD, SYSTEM, false).step("copy /sys")?;
    mount::set_attributes(tree.as_fd(), READ_ONLY | NO_SUID | NO_DEVICES | NO_EXEC, None).step("protect /sys")?;
    mount::attach(tree.as_fd(), &ready("sys")).step("attach /sys")?;
    Ok((build_proc(order)?, Sizes { shared_memory, segments }))
}

/// Where a part of the root is made.
fn ready(path: &str) -> String {
    format!("{READY}/{path}")
}

/// Assembles the file system and makes it the root.
fn build_root(order: &Sandbox, disk: BorrowedFd<'_>, layers: &[(String, OwnedFd)]) -> Result<(), StepError> {
    mount::attach(disk, DISK).step("attach the disk")?;
    for (index, (_, layer)) in layers.iter().enumerate() {
        mount::attach(layer.as_fd(), &format!("{LAYERS}/{index}")).step("attach a layer")?;
    }
    let at = |place: &str| -> Vec<String> {
        let of_place = layers.iter().enumerate().filter(|(_, (of, _))| of == place);
        of_place.map(|(index, _)| format!("{LAYERS}/{index}")).collect()
    };
    // An overlay works on its disk as whoever mounted it. The disk knows the sandbox's ids only, so
    // that has to be the sandbox's root.
    act_as(order.first_id).step("act as the sandbox's root")?;
    let of_root = at("");
    overlay(&of_root, spawn::ROOT_OVERLAY, NEW_ROOT)?;
    for place in spawn::PLACES {
        let of_place = at(place);
        if !of_place.is_empty() {
            // What the root's own layers hold in that directory lies over it.
            let over: Vec<String> = of_root.iter().map(|layer| format!("{layer}/{place}")).collect();
            overlay(&[over, of_place].concat(), place, &format!("{NEW_ROOT}/{place}"))?;
        }
    }
    act_as(0).step("act as the host's root")?;
    for part in PARTS {
        mount::move_attached(&ready(part), &format!("{NEW_ROOT}/{part}")).step("move a part of the root")?;
    }
    std::env::set_current_dir(NEW_ROOT).step("enter the new root")?;
    rustix::process::pivot_root(".", ".").step("change the root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step("leave the old root")?;
    std::env::set_current_dir("/").step("enter the new root")
}

/// Uses another id for files, and keeps all capabilities.
pub(super) fn act_as(id: u32) -> Result<(), Errno> {
    // SAFETY: takes no pointers; the process has one thread.
    unsafe {
        if libc::prctl(libc::PR_SET_SECUREBITS, process::KEEP_CAPABILITIES) != 0 {
            return Err(mount::last_errno());
        }
        libc::setfsgid(id);
        libc::setfsuid(id);
        // These calls tell success only by what a second one finds.
        if libc::setfsgid(id) as u32 != id || libc::setfsuid(id) as u32 != id {
            return Err(Errno::PERM);
        }
    }
    Ok(())
}

/// Mounts `lower`, the uppermost directory first, under the disk's upper directory of that name.
fn overlay(lower: &[String], name: &str, target: &str) -> Result<(), StepError> {
    let lower = lower.join(":");
    // Without `redirect_dir`, renaming a directory of the image fails with EXDEV.
    let options = format!("lowerdir={lower},upperdir={DISK}/{name}/upper,workdir={DISK}/{name}/work,redirect_dir=on");
    let options = CString::new(options).map_err(|_| Errno::INVAL).step("name the layers")?;
    // The calls that make a detached mount take options of 255 bytes, which is too few for the layers of some images. This
    // one follows links in its target: it gets a place of ours, and the mount goes from there to where it belongs.
    rustix::mount::mount("nagaya", OVERLAY, "overlay", MountFlags::NODEV, options.as_c_str())
        .step("mount an overlay")?;
    mount::move_attached(OVERLAY, target).step("attach an overlay")
}

/// Gives the context through which /dev/shm gets its size.
fn build_devices(order: &Sandbox) -> Result<OwnedFd, StepError> {
    let devices = mount::clone_tree(rustix::fs::CWD, DEVICES, false).step("copy /dev")?;
    mount::set_attributes(devices.as_fd(), READ_ONLY | NO_SUID | NO_EXEC, None).step("protect /dev")?;
    mount::attach(devices.as_fd(), &ready("dev")).step("attach /dev")?;
    let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    // Group 5 is `tty` in the sandbox; the option takes the host's number for it.
    let group = (order.first_id + 5).to_string();
    let most = spawn::TERMINALS_MAX.to_string();
    let terminals = mount::new_filesystem(
        "devpts",
        &[("ptmxmode", Some("0666")), ("mode", Some("0620")), ("gid", Some(&group)), ("max", Some(&most))],
        quiet,
    )
    .step("make /dev/pts")?;
    mount::attach(terminals.as_fd(), &ready("dev/pts")).step("attach /dev/pts")?;
    let owner = order.first_id.to_string();
    let owner = [("mode", Some("1777")), ("uid", Some(owner.as_str())), ("gid", Some(owner.as_str()))];
    let (shared, context) = mount::new_adjustable_filesystem(
        "tmpfs",
        &[owner.as_slice(), SHARED_MEMORY.as_slice()].concat(),
        quiet | MountAttrFlags::MOUNT_ATTR_NODEV,
    )
    .step("make /dev/shm")?;
    mount::attach(shared.as_fd(), &ready("dev/shm")).step("attach /dev/shm")?;
    Ok(context)
}

fn build_proc(order: &Sandbox) -> Result<Shown, StepError> {
    let quiet =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC | MountAttrFlags::MOUNT_ATTR_NODEV;
    let proc = mount::new_filesystem("proc", &[], quiet).step("make /proc")?;
    mount::attach(proc.as_fd(), &ready("proc")).step("attach /proc")?;
    // Nothing in a sandbox is less likely to be killed than the host's own programs, whatever the server's score is. The
    // agent raises its own for a moment; see `agent::score`.
    let mut oom_score =
        fs::OpenOptions::new().write(true).open(ready("proc/1/oom_score_adj")).step("open the own score")?;
    oom_score.write_all(b"0").step("set the own score")?;

    let read_only = |path: &str, target: &str| -> Result<(), StepError> {
        let copy = mount::clone_tree(rustix::fs::CWD, path, false).step("copy a part of /proc")?;
        mount::set_attributes(copy.as_fd(), READ_ONLY | NO_SUID | NO_DEVICES | NO_EXEC, None)
            .step("protect a part of /proc")?;
        mount::attach(copy.as_fd(), target).step("attach a part of /proc")
    };
    for name in READ_ONLY_DIRECTORIES {
        let path = ready(&format!("proc/{name}"));
        if fs::exists(&path).step("look into /proc")? {
            read_only(&path, &path)?;
        }
    }
    let empty = mount::new_filesystem("tmpfs", &[("size", Some("256k")), ("mode", Some("0555"))], quiet)
        .step("make an empty place")?;
    // Linux before 6.15 copies no parts of a mount that is attached nowhere.
    mount::attach(empty.as_fd(), COVERS).step("attach an empty place")?;
    let make = |name: &str| {
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::openat(&empty, name, flags, rustix::fs::Mode::from_raw_mode(0o444))
    };
    let nothing = make("nothing").step("make an empty file")?;
    rustix::fs::mkdirat(&empty, "directory", rustix::fs::Mode::from_raw_mode(0o555)).step("make an empty directory")?;
    // The agent fills these, as the sandbox's root.
    let owner = Some(rustix::fs::Uid::from_raw(order.first_id));
    for name in ["cpu", "cgroup"] {
        rustix::fs::mkdirat(&empty, name, rustix::fs::Mode::from_raw_mode(0o755)).step("make a directory of /sys")?;
        rustix::fs::chownat(&empty, name, owner, None, rustix::fs::AtFlags::empty())
            .step("give a directory of /sys away")?;
    }
    let open = |directory: BorrowedFd<'_>, path: &str, flags: rustix::fs::OFlags| {
        rustix::fs::openat(directory, path, flags | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())
    };
    let made = |name: &str| make(name).step("make a file of /proc");
    let shown = Shown {
        oom_score: oom_score.into(),
        meminfo: made("meminfo")?,
        stat: made("stat")?,
        loadavg: made("loadavg")?,
        cpuinfo: made("cpuinfo")?,
        processors: open(empty.as_fd(), "cpu", rustix::fs::OFlags::DIRECTORY).step("open a directory of /sys")?,
        cgroup: open(empty.as_fd(), "cgroup", rustix::fs::OFlags::DIRECTORY).step("open a directory of /sys")?,
        processor_texts: open(rustix::fs::CWD, PROCESSOR_TEXTS, rustix::fs::OFlags::RDONLY)
            .step("open what is known of processors")?,
    };
    drop(nothing);
    // A boot of its own, as by this name machines are told apart.
    let mut boot_id = fs::File::from(make("boot_id").step("make a boot id")?);
    let random = fs::read("/proc/sys/kernel/random/uuid").step("make a boot id")?;
    boot_id.write_all(&random).step("make a boot id")?;
    drop(boot_id);
    let show = |path: &str, target: &str| -> Result<(), StepError> {
        let file = mount::clone_tree(rustix::fs::CWD, path, false).step("copy an empty place")?;
        mount::set_attributes(file.as_fd(), READ_ONLY, None).step("protect an empty place")?;
        mount::attach(file.as_fd(), target).step("cover a part of /proc")
    };
    for entry in fs::read_dir(ready("proc")).step("list /proc")? {
        let entry = entry.step("list /proc")?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_process = name.bytes().all(|byte| byte.is_ascii_digit());
        if !is_process && !SHOWN_IN_PROC.contains(&&*name) {
            let is_directory = entry.file_type().step("look into /proc")?.is_dir();
            let cover = if is_directory { "directory" } else { "nothing" };
            show(&format!("{COVERS}/{cover}"), &ready(&format!("proc/{name}")))?;
        }
    }
    for name in COUNTED_FOR_ALL {
        let path = ready(&format!("proc/sys/{name}"));
        if fs::exists(&path).step("look into /proc/sys")? {
            show(&format!("{COVERS}/nothing"), &path)?;
        }
    }
    show(&format!("{COVERS}/boot_id"), &ready("proc/sys/kernel/random/boot_id"))?;
    for (place, names) in [(COVERS, &SHOWN_FILES[..]), (FIXED, &FIXED_FILES[..])] {
        for name in names {
            let path = ready(&format!("proc/{name}"));
            if fs::exists(&path).step("look into /proc")? {
                show(&format!("{place}/{name}"), &path)?;
            }
        }
    }
    show(&format!("{COVERS}/cpu"), &ready("sys/devices/system/cpu"))?;
    show(&format!("{COVERS}/cgroup"), &ready("sys/fs/cgroup"))?;
    Ok(shown)
}

fn become_inner_root() -> Result<(), Errno> {
    // SAFETY: the process has one thread, so the raw calls change all of it; no pointers but an
    // empty list are passed.
    unsafe {
        if libc::setgroups(0, std::ptr::null()) != 0 || libc::setresgid(0, 0, 0) != 0 || libc::setresuid(0, 0, 0) != 0 {
            return Err(mount::last_errno());
        }
    }
    Ok(())
}

fn new_session_keyring() -> Result<(), Errno> {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    match unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) } {
        -1 => match mount::last_errno() {
            // A kernel without keyrings has none to leave.
            Errno::NOSYS => Ok(()),
            errno => Err(errno),
        },
        _ => Ok(()),
    }
}

fn limit_capabilities() -> Result<(), Errno> {
    for number in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if CAPABILITIES.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Past the last capability that this kernel knows.
            Err(Errno::INVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

/// Where calls wait for the agent's answers, and a pipe with what it signs its own with; see [`seccomp::Listener`].
struct Calls {
    waiting: OwnedFd,
    secret: OwnedFd,
}

/// Exec keeps, of what root has, only what the bounding set allows: no step for that is needed.
fn install_filter(pin_cores: bool) -> Result<Option<Calls>, Errno> {
    let mut secret = [0; 8];
    rustix::rand::getrandom(&mut secret[..], rustix::rand::GetRandomFlags::empty())?;
    let listener = seccomp::Listener { secret: u64::from_ne_bytes(secret) };
    match install(&seccomp::program(pin_cores, Some(listener)), libc::SECCOMP_FILTER_FLAG_NEW_LISTENER) {
        // Whoever started the server listens to such calls already, and there can be one only.
        Err(Errno::BUSY) => install(&seccomp::program(pin_cores, None), 0).map(|_| None),
        Err(errno) => Err(errno),
        Ok(waiting) => {
            let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            rustix::io::write(writer, &secret)?;
            // SAFETY: on success the kernel made a new descriptor that nobody else owns.
            let waiting = unsafe { OwnedFd::from_raw_fd(waiting as RawFd) };
            Ok(Some(Calls { waiting, secret: reader }))
        }
    }
}

fn install(program: &[libc::sock_filter], flags: libc::c_ulong) -> Result<libc::c_long, Errno> {
    let header = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the header points to `program`, which outlives the call; the kernel copies it.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const header) };
    if result >= 0 { Ok(result) } else { Err(mount::last_errno()) }
}

fn run_agent(
    order: &Sandbox,
    parts: &Parts<'_>,
    (user, env): (&spawn::User, &[String]),
    listen: BorrowedFd<'_>,
    shown: &Shown,
    calls: Option<Calls>,
    agent: BorrowedFd<'_>,
) -> Result<std::convert::Infallible, StepError> {
    let named = [
        ("lifeline", parts.lifeline),
        ("listen", listen),
        ("memory-usage", parts.memory_usage),
        ("memory-limit", parts.memory_limit),
        ("memory-statistics", parts.memory_statistics),
        ("memory-events", parts.memory_events),
        ("processes-limit", parts.processes_limit),
        ("oom-score", shown.oom_score.as_fd()),
        ("meminfo", shown.meminfo.as_fd()),
        ("stat", shown.stat.as_fd()),
        ("loadavg", shown.loadavg.as_fd()),
        ("cpuinfo", shown.cpuinfo.as_fd()),
        ("processors", shown.processors.as_fd()),
        ("cgroup", shown.cgroup.as_fd()),
        ("processor-texts", shown.processor_texts.as_fd()),
    ];
    let calls = calls.iter().flat_map(|calls| [("calls", calls.waiting.as_fd()), ("secret", calls.secret.as_fd())]);
    let cgroups = parts.command_cgroups.iter().map(|fd| ("cgroup-procs", *fd));
    let groups = parts.command_groups.iter().flat_map(|(join, processes)| {
        join.iter().map(|fd| ("group-procs", *fd)).chain([("group-processes", *processes)])
    });
    let mut arguments = vec![
        "nagaya-agent".to_owned(),
        format!("--kept-output-bytes-max={}", order.kept_output_bytes_max),
        format!("--kept-output-seconds-max={}", order.kept_output_seconds_max),
        format!("--user={}:{}:{}", user.uid, user.gid, user.name),
        format!("--home={}", user.home),
        format!("--workdir={}", user.workdir),
    ];
    arguments.extend(env.iter().map(|variable| format!("--env={variable}")));
    for (name, fd) in named.into_iter().chain(calls).chain(cgroups).chain(groups) {
        arguments.push(format!("--{name}-fd={}", fd.as_raw_fd()));
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).step("keep a descriptor")?;
    }
    let arguments: Vec<_> = arguments
        .into_iter()
        .map(|argument| CString::new(argument).map_err(|_| Errno::INVAL))
        .collect::<Result<_, _>>()
        .step("make arguments")?;
    let pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).chain([std::ptr::null()]).collect();
    let environment = [std::ptr::null::<libc::c_char>()];
    let empty: &CStr = c"";
    // SAFETY: all pointers are to null-terminated data that outlives the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            agent.as_raw_fd(),
            empty.as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Err(StepError { step: "start the agent", errno: mount::last_errno() })
}
