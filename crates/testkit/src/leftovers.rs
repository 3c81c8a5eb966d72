//! What sandboxes may leave on a host, found by looking at the host and not by asking the server.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The kinds of things that a sandbox is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Process,
    Mount,
    Cgroup,
    Link,
    NetworkNamespace,
    LoopDevice,
    Socket,
    Directory,
    /// A table of packet rules.
    Rules,
}

/// Everything found at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leftovers(BTreeSet<(Kind, String)>);

impl Leftovers {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn count(&self, kind: Kind) -> usize {
        self.0.iter().filter(|(each, _)| *each == kind).count()
    }

    /// What is here and was not there before: for tests beside other servers on the same host.
    pub fn since(&self, before: &Leftovers) -> Leftovers {
        Leftovers(self.0.difference(&before.0).cloned().collect())
    }

    fn add(&mut self, kind: Kind, description: impl Into<String>) {
        self.0.insert((kind, description.into()));
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(kind, description)| writeln!(f, "{kind:?}: {description}"))
    }
}

/// Looks for everything of the server of one data directory and of its sandboxes. What lies
/// outside the directory bears a name made from its path, so other servers are not in the way.
pub fn leftovers(data_dir: &Path) -> Leftovers {
    let mut found = Leftovers::default();
    let name = data_dir.to_str().expect("tests use plain paths");
    let instance = nagaya_runtime::host::instance_name(data_dir);
    processes_and_mounts(name, &instance, &mut found);
    for root in cgroup_roots() {
        let own = root.join("nagaya").join(&instance);
        if own.exists() {
            found.add(Kind::Cgroup, own.display().to_string());
            cgroups(&own, &mut found);
        }
    }
    rules(&instance, &mut found);
    for (kind, directory) in [(Kind::Link, "/sys/class/net"), (Kind::NetworkNamespace, "/run/netns")] {
        for path in entries(Path::new(directory)) {
            let name = file_name(&path);
            if name.starts_with(&format!("ngy{instance}")) {
                found.add(kind, name);
            }
        }
    }
    for device in entries(Path::new("/sys/block")) {
        let backing = fs::read_to_string(device.join("loop/backing_file")).unwrap_or_default();
        if backing.starts_with(name) {
            found.add(Kind::LoopDevice, format!("{} of {}", file_name(&device), backing.trim()));
        }
    }
    for line in fs::read_to_string("/proc/net/unix").unwrap_or_default().lines() {
        if let Some(path) = line.split_whitespace().nth(7).filter(|path| path.trim_start_matches('@').starts_with(name))
        {
            found.add(Kind::Socket, path);
        }
    }
    for path in entries(&nagaya_runtime::host::storage_root(data_dir).join("sandboxes")) {
        found.add(Kind::Directory, path.display().to_string());
    }
    socket_files(data_dir, &mut found);
    found
}

/// Every process that belongs to a sandbox: by its cgroup, its command line, or by mounts in a
/// namespace other than ours that come from the data directory.
fn processes_and_mounts(data_dir: &str, instance: &str, found: &mut Leftovers) {
    let mut seen_namespaces = BTreeSet::new();
    let ours = fs::read_link("/proc/self/ns/mnt").ok();
    let this_process = std::process::id().to_string();
    for process in entries(Path::new("/proc")) {
        let pid = file_name(&process);
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || pid == this_process {
            continue;
        }
        // Any of these may vanish while we look: then there is nothing to report.
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let cgroup = fs::read_to_string(process.join("cgroup")).unwrap_or_default();
        let namespace = fs::read_link(process.join("ns/mnt")).ok();
        let mountinfo = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
        let mounts: Vec<&str> = mountinfo.lines().filter(|line| line.contains(data_dir)).collect();
        let foreign = namespace.is_some() && namespace != ours;
        if command.contains(data_dir)
            || cgroup.lines().any(|line| in_our_cgroup(line, instance))
            || (foreign && !mounts.is_empty())
        {
            found.add(Kind::Process, format!("{pid} {}", command.trim()));
        }
        if namespace.is_some() && seen_namespaces.insert(namespace.clone()) {
            let place = namespace.as_deref().map(|path| path.display().to_string()).unwrap_or_default();
            mounts.iter().for_each(|line| found.add(Kind::Mount, format!("{place}: {line}")));
        }
    }
    // Also when this process is alone in its namespace.
    if let Some(ours) = ours.filter(|ours| !seen_namespaces.contains(&Some(ours.clone()))) {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for line in mountinfo.lines().filter(|line| line.contains(data_dir)) {
            found.add(Kind::Mount, format!("{}: {line}", ours.display()));
        }
    }
}

fn in_our_cgroup(line: &str, instance: &str) -> bool {
    let path = line.splitn(3, ':').nth(2).unwrap_or_default();
    Path::new(path).starts_with(Path::new("/nagaya").join(instance))
}

/// The server's table of packet rules, where the host has `nft` to ask.
fn rules(instance: &str, found: &mut Leftovers) {
    let output = Command::new("nft").args(["list", "tables"]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output();
    let tables = output.map(|output| output.stdout).unwrap_or_default();
    for line in String::from_utf8_lossy(&tables).lines().filter(|line| line.ends_with(&format!("nagaya_{instance}"))) {
        found.add(Kind::Rules, line);
    }
}

/// The mount points of all cgroup hierarchies, v1 and v2.
fn cgroup_roots() -> BTreeSet<PathBuf> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mountinfo
        .lines()
        .filter(|line| line.contains(" - cgroup ") || line.contains(" - cgroup2 "))
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .collect()
}

/// Every cgroup below one of ours.
fn cgroups(directory: &Path, found: &mut Leftovers) {
    for child in entries(directory).into_iter().filter(|path| path.is_dir() && !path.is_symlink()) {
        found.add(Kind::Cgroup, child.display().to_string());
        cgroups(&child, found);
    }
}

fn socket_files(directory: &Path, found: &mut Leftovers) {
    for path in entries(directory) {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        if metadata.file_type().is_socket() {
            found.add(Kind::Socket, path.display().to_string());
        } else if metadata.is_dir() {
            socket_files(&path, found);
        }
    }
}

/// The entries of a directory; none when it cannot be read, for what is not there leaves nothing.
fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn an_untouched_directory_has_no_leftovers_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let found = leftovers(directory.path());
        for kind in [Kind::Process, Kind::Mount, Kind::LoopDevice, Kind::Socket, Kind::Directory] {
            assert_eq!(found.count(kind), 0, "{found}");
        }
    }

    #[test]
    fn a_process_a_socket_and_a_directory_are_found_and_then_gone() {
        let directory = tempfile::tempdir().unwrap();
        let before = leftovers(directory.path());
        fs::create_dir_all(directory.path().join("sandboxes/one")).unwrap();
        let socket = UnixListener::bind(directory.path().join("sandboxes/agent.sock")).unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "echo started; read _", directory.path().to_str().unwrap()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // The program has been loaded when it speaks; before that its command line is still ours.
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0; 8]).unwrap();

        let found = leftovers(directory.path()).since(&before);
        assert_eq!(found.count(Kind::Process), 1, "{found}");
        assert!(found.count(Kind::Socket) >= 1, "{found}");
        assert_eq!(found.count(Kind::Directory), 2, "{found}");

        child.kill().unwrap();
        child.wait().unwrap();
        drop(socket);
        fs::remove_dir_all(directory.path().join("sandboxes")).unwrap();
        let after = leftovers(directory.path()).since(&before);
        for kind in [Kind::Process, Kind::Socket, Kind::Directory] {
            assert_eq!(after.count(kind), 0, "{after}");
        }
    }

    #[test]
    fn mounts_in_a_namespace_of_their_own_are_found_with_their_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        let script = r#"mount -t tmpfs tmpfs "$DIRECTORY" && echo mounted && read _"#;
        let Ok(mut child) = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
            .env("DIRECTORY", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            eprintln!("not run: there is no unshare on this host");
            return;
        };
        let mut word = [0; 8];
        if std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut word).is_err() {
            child.wait().unwrap();
            eprintln!("not run: this host lets nobody make a mount namespace");
            return;
        }
        let found = leftovers(directory.path());
        assert_eq!(found.count(Kind::Mount), 1, "{found}");
        assert!(found.count(Kind::Process) >= 1, "{found}");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn cgroup_lines_are_told_apart() {
        assert!(in_our_cgroup("0::/nagaya/12ab/slot-3/commands", "12ab"));
        assert!(in_our_cgroup("4:cpu,cpuacct:/nagaya/12ab", "12ab"));
        assert!(!in_our_cgroup("4:cpu,cpuacct:/nagaya/12ac/slot-3", "12ab"));
        assert!(!in_our_cgroup("0::/user.slice/my-nagaya-shell", "12ab"));
        assert!(!in_our_cgroup("1:name=systemd:/", "12ab"));
    }
}
