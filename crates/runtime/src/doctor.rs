//! What this host can do, what is missing, and what fixes it.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::cgroup::Cgroups;
use crate::host::{Limits, ceilings_lacking, has_pool, shares_blocks, storage_is_plain, storage_root};

/// Where programs are looked for, whatever the caller's PATH.
const PROGRAMS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How much a missing capability costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// No sandbox can be made without it.
    Required,
    /// Something is slower or not offered without it.
    Optional,
}

/// One thing that was looked at.
#[derive(Debug)]
pub struct Finding {
    pub name: &'static str,
    pub weight: Weight,
    /// What was found, when it is good; what is wrong, when it is not.
    pub outcome: Result<String, String>,
    /// The command or the change that fixes it; empty when there is none.
    pub remedy: &'static str,
}

/// Looks at everything, for as many sandboxes and processes as are allowed. Blocks for some ten milliseconds.
pub fn examine(data: &Path, limits: &Limits) -> Vec<Finding> {
    let required = |name, outcome, remedy| Finding { name, weight: Weight::Required, outcome, remedy };
    let optional = |name, outcome, remedy| Finding { name, weight: Weight::Optional, outcome, remedy };
    vec![
        required("root", root(), "run the server as root: sudo nagaya serve"),
        required("kernel", kernel(), "use Linux 5.19 or newer (id-mapped overlay layers)"),
        required("cgroups", cgroups(), "boot with cgroup v2, or with the v1 controllers cpu, memory, pids and freezer"),
        required("user namespaces", namespace("user"), "sysctl -w user.max_user_namespaces=65536"),
        required("network namespaces", namespace("net"), "use a kernel with CONFIG_NET_NS"),
        required("overlay", filesystem("overlay"), "modprobe overlay"),
        required("ext4", filesystem("ext4"), "modprobe ext4"),
        required("loop devices", device("/dev/loop-control"), "modprobe loop"),
        required("mkfs.ext4", program("mkfs.ext4", "-V"), "apt-get install e2fsprogs"),
        required("nft", program("nft", "--version"), "apt-get install nftables"),
        required(
            "nft_socket",
            rule("udp dport 53 socket mark 1 accept"),
            "modprobe nft_socket, or use a kernel with CONFIG_NFT_SOCKET",
        ),
        required(
            "nfnetlink_log",
            rule("log prefix \"nagaya\" group 65535 snaplen 64"),
            "modprobe nfnetlink_log nft_log, or use a kernel with CONFIG_NETFILTER_NETLINK_LOG and CONFIG_NFT_LOG",
        ),
        required(
            "nft_connlimit",
            rule("ct state new ct count over 1 drop"),
            "modprobe nft_connlimit, or use a kernel with CONFIG_NFT_CONNLIMIT",
        ),
        optional(
            "connections",
            connections(),
            "sysctl -w net.netfilter.nf_conntrack_max=262144, or the host's own connections may find no place",
        ),
        optional(
            "copies of disks",
            copies(data),
            "apt-get install xfsprogs, then begin a new data directory, or put that on XFS or btrfs: disks are copied in no time",
        ),
        optional(
            "socket memory",
            socket_memory(),
            "boot without cgroup.memory=nosocket: what sandboxes' sockets hold is bounded by nothing else",
        ),
        optional(
            "limits of the host",
            ceilings_lacking(limits.slots_max, limits.processes_max),
            "no more sandboxes are made than that; raise it with sysctl -w where the server may not, or lower namespace.slots_max or namespace.processes_max",
        ),
        optional(
            "core files",
            core_files(),
            "sysctl -w kernel.core_pattern=core, then restart the server, lets sandboxes have core files, in themselves",
        ),
        optional("kernel memory", kernel_memory(), "boot without cgroup.memory=nokmem"),
        optional("swap limit", swap_limit(), "boot with swapaccount=1, or switch swap off"),
        optional(
            "sudo",
            program("sudo", "--version"),
            "apt-get install sudo, and sandboxes of the host image have it too",
        ),
        optional("CRIU", program("criu", "--version"), "apt-get install criu (4.1 or newer)"),
        optional("runsc", program("runsc", "--version"), "apt-get install runsc"),
        optional("KVM", device("/dev/kvm"), "enable hardware virtualisation"),
    ]
}

fn root() -> Result<String, String> {
    if rustix::process::geteuid().is_root() { Ok("running as root".into()) } else { Err("not running as root".into()) }
}

fn kernel() -> Result<String, String> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0u32));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (5, 19) { Ok(format!("Linux {release}")) } else { Err(format!("Linux {release} is too old")) }
}

fn cgroups() -> Result<String, String> {
    Cgroups::detect().map(|version| format!("cgroup {version}")).map_err(|error| error.to_string())
}

fn namespace(kind: &str) -> Result<String, String> {
    let path = format!("/proc/sys/user/max_{kind}_namespaces");
    match fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(0) => Err("forbidden by the host".into()),
        Some(number) => Ok(format!("up to {number}")),
        None => Err("not offered by the kernel".into()),
    }
}

fn filesystem(name: &str) -> Result<String, String> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some(name)) {
        Ok("offered by the kernel".into())
    } else {
        Err("not offered by the kernel".into())
    }
}

fn device(path: &str) -> Result<String, String> {
    if Path::new(path).exists() { Ok(format!("{path} is there")) } else { Err(format!("{path} is missing")) }
}

fn program(name: &str, version: &str) -> Result<String, String> {
    let output = Command::new(name)
        .arg(version)
        .env("PATH", PROGRAMS)
        .stdin(Stdio::null())
        .output()
        .map_err(|_| "not installed".to_owned())?;
    let text = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or("installed").trim().to_owned())
}

/// Whether the kernel takes a rule of this kind, which is checked and not set. The kernel loads what it needs for that.
fn rule(expression: &str) -> Result<String, String> {
    let not_run = |error: std::io::Error| format!("nft cannot be run: {error}");
    let mut child = Command::new("nft")
        .args(["--check", "--file", "-"])
        .env("PATH", PROGRAMS)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(not_run)?;
    let table = "table inet nagaya_doctor { chain input { type filter hook input priority 0;";
    if let Some(mut stdin) = child.stdin.take() {
        // If nft does not read it, what it says tells more than the broken pipe.
        let _ = writeln!(stdin, "{table} {expression}; }}; }}");
    }
    let output = child.wait_with_output().map_err(not_run)?;
    if output.status.success() {
        return Ok("offered by the kernel".into());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let reason = text.lines().find_map(|line| line.split_once("Error: ")).map_or(text.trim(), |(_, reason)| reason);
    Err(format!("not offered by the kernel: {reason}"))
}

/// Whether memory that sockets hold is counted to their group.
fn socket_memory() -> Result<String, String> {
    const OFF: &str = "nosocket";
    let options = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let is_off = options.split_whitespace().filter_map(|option| option.strip_prefix("cgroup.memory="));
    let is_off = is_off.flat_map(|value| value.split(',')).any(|value| value == OFF);
    let is_limited = || match Cgroups::detect() {
        Ok("v1") => Path::new("/sys/fs/cgroup/memory/memory.kmem.tcp.limit_in_bytes").exists(),
        _ => true,
    };
    if !is_off && is_limited() { Ok("counted".into()) } else { Err("not counted by the kernel".into()) }
}

/// The host's table of connections, of which each sandbox has a share.
fn connections() -> Result<String, String> {
    const ENOUGH: u64 = 262_144;
    let setting = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max");
    match setting.ok().and_then(|text| text.trim().parse::<u64>().ok()) {
        None => Ok("the kernel's table is not set up yet".into()),
        Some(all) if all >= ENOUGH => Ok(format!("{all} at a time, {} for a sandbox", all / 64)),
        Some(all) => Err(format!("the kernel keeps {all} connections at a time; a sandbox may have {}", all / 64)),
    }
}

/// How disks are copied: in no time where copies share their blocks.
fn copies(data: &Path) -> Result<String, String> {
    let data = fs::canonicalize(data).unwrap_or_else(|_| data.to_owned());
    if has_pool(&data) {
        return Ok(format!("disks are in a pool, mounted at {}", storage_root(&data).display()));
    }
    let place = data.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    match shares_blocks(place) {
        Ok(true) => return Ok(format!("{} shares blocks between copies", place.display())),
        Ok(false) => {}
        Err(error) => return Err(format!("{} cannot be tried: {error}", place.display())),
    }
    if storage_is_plain(&data) {
        return Err(format!("{} was first used without a pool, and its disks stay plain files", data.display()));
    }
    let offered = |()| if modprobe_knows("xfs") { Ok(()) } else { filesystem("xfs").map(drop) };
    let made = program("mkfs.xfs", "-V").map(drop).and_then(offered);
    made.map(|()| format!("{} shares no blocks; a pool of disks would (disks.pool = \"auto\")", place.display()))
        .map_err(|why| format!("{} shares no blocks, and a pool needs XFS: {why}", place.display()))
}

/// A module that is not loaded yet counts as well.
fn modprobe_knows(module: &str) -> bool {
    let status =
        Command::new("modprobe").args(["-n", "-q", module]).env("PATH", PROGRAMS).stdin(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Where core files of crashes go; see `nagaya_guest`'s spawner.
fn core_files() -> Result<String, String> {
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    match pattern.trim().strip_prefix(['|', '@']) {
        Some(_) => Err("handed to a program of the host, so sandboxes make none".into()),
        None => Ok("stay in the sandbox".into()),
    }
}

fn kernel_memory() -> Result<String, String> {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let options = line.split_whitespace().filter_map(|option| option.strip_prefix("cgroup.memory="));
    match options.flat_map(|options| options.split(',')).any(|option| option == "nokmem") {
        true => Err("not counted: a sandbox can use more than its memory by what the kernel keeps for it".into()),
        false => Ok("counted with the sandbox's memory".into()),
    }
}

fn swap_limit() -> Result<String, String> {
    let swap = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swap.lines().count() <= 1 {
        return Ok("the host has no swap".into());
    }
    let counted = match Cgroups::detect() {
        // Where the limit's file would be depends on who makes groups; the group at the top has none.
        Ok("v2") => !fs::read_to_string("/proc/cmdline").unwrap_or_default().contains("swapaccount=0"),
        _ => Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists(),
    };
    if counted {
        Ok("swap is counted".into())
    } else {
        Err("the host swaps and does not count it: sandboxes can use more than their memory".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_tried_and_not_set() {
        assert_eq!(rule("accept"), Ok("offered by the kernel".into()), "as root, with nft");
        let refused = rule("nonsense").unwrap_err();
        assert!(refused.starts_with("not offered by the kernel: "), "{refused}");
        let tables = Command::new("nft").args(["list", "tables"]).env("PATH", PROGRAMS).output().unwrap();
        assert!(!String::from_utf8_lossy(&tables.stdout).contains("nagaya_doctor"));
    }
}
