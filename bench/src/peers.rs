//! Peers from Debian's packages, doing equal work: the host's `/usr` read-only as the root, all
//! namespaces new, one run of `true`. None of them gives a disk of its own, a network or an API:
//! what they leave out is in their favour.

use std::fs;
use std::io::{Read, Seek};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use crate::Effort;
use crate::samples::{Report, milliseconds};

/// A peer that takes longer is named as not run.
const ATTEMPT_SECONDS_MAX: i64 = 60;

/// The first id of the range that containers get.
const FIRST_ID: u32 = 0x6000_0000;

pub fn run(report: &mut Report, effort: Effort) {
    bubblewrap(report, effort);
    for name in ["crun", "runc", "runsc"] {
        container(report, effort, name);
    }
    docker(report, effort);
}

fn installed(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|place| place.join(program).is_file()))
}

/// Links of the root into `/usr`, as this host has them.
fn links() -> Vec<(String, PathBuf)> {
    let names = ["bin", "sbin", "lib", "lib32", "lib64", "libx32"];
    names.iter().filter_map(|name| Some(((*name).to_owned(), fs::read_link(Path::new("/").join(name)).ok()?))).collect()
}

fn bubblewrap(report: &mut Report, effort: Effort) {
    let name = "bubblewrap: run true";
    if !installed("bwrap") {
        return report.not_run(name, "not installed");
    }
    let command = || {
        let mut command = Command::new("bwrap");
        command.args([
            "--unshare-all",
            "--ro-bind",
            "/usr",
            "/usr",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--tmpfs",
            "/tmp",
        ]);
        for (link, target) in links() {
            command.arg("--symlink").arg(target).arg(format!("/{link}"));
        }
        command.args(["--die-with-parent", "/bin/true"]);
        command
    };
    if measure(report, name, effort.of(100, 10), &mut || command()) {
        sustained(report, "bubblewrap: sustained run true", effort.of(400, 30), &|_| command());
    }
}

fn container(report: &mut Report, effort: Effort, runtime: &str) {
    let (run, exec) = (format!("{runtime}: run true"), format!("{runtime}: exec true"));
    if !installed(runtime) {
        report.not_run(&run, "not installed");
        return report.not_run(&exec, "not installed");
    }
    let place = tempfile::tempdir().expect("a directory can be made");
    let state = place.path().join("state");
    let base = |verb: &str| {
        let mut command = Command::new(runtime);
        command.arg("--root").arg(&state);
        if runtime == "runsc" {
            command.args(["--network=none", "--ignore-cgroups"]);
        }
        command.arg(verb);
        command
    };
    let once = bundle(place.path(), "once", &["/bin/true"], runtime);
    let start = |number: usize| {
        let mut command = base("run");
        command.arg("--bundle").arg(&once).arg(format!("bench-{}-{number}", std::process::id()));
        command
    };
    let mut numbers = 0..;
    if !measure(report, &run, effort.of(50, 5), &mut || start(numbers.next().unwrap_or_default())) {
        return report.not_run(&exec, "it runs nothing");
    }
    sustained(report, &format!("{runtime}: sustained run true"), effort.of(100, 10), &|number| {
        start(1_000_000 + number)
    });
    let long = bundle(place.path(), "long", &["/bin/sleep", "1000"], runtime);
    let id = format!("bench-{}-long", std::process::id());
    match attempt(base("run").arg("--detach").arg("--bundle").arg(&long).arg(&id)) {
        Err(reason) => report.not_run(&exec, &reason),
        Ok(_) => {
            measure(report, &exec, effort.of(100, 10), &mut || {
                let mut command = base("exec");
                command.args([&id, "/bin/true"]);
                command
            });
            let verb = |verb: &str| {
                let mut command = base(verb);
                command.arg(&id);
                command
            };
            let names = [format!("{runtime}: pause"), format!("{runtime}: resume")];
            in_turn(report, names.each_ref().map(String::as_str), effort.of(50, 5), &|index| {
                verb(["pause", "resume"][index])
            });
            if runtime == "runsc" {
                checkpoint(report, effort, place.path(), &long, &id, &base);
            }
            let _ = attempt(base("delete").arg("--force").arg(&id));
        }
    }
}

/// Two commands that undo each other, each timed.
fn in_turn(report: &mut Report, names: [&str; 2], rounds: usize, command: &dyn Fn(usize) -> Command) {
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for index in [0, 1] {
            match attempt(&mut command(index)) {
                Ok(time) => samples[index].push(time),
                Err(reason) => return names.into_iter().for_each(|name| report.not_run(name, &reason)),
            }
        }
    }
    for (name, samples) in names.into_iter().zip(samples) {
        report.timing(name, samples);
    }
}

/// Memory and processes of a sleeping program to a file, and back from it.
fn checkpoint(
    report: &mut Report,
    effort: Effort,
    place: &Path,
    bundle: &Path,
    id: &str,
    base: &dyn Fn(&str) -> Command,
) {
    let (name, restore) = ("runsc: checkpoint", "runsc: restore");
    let mut number = 0;
    let mut image = || {
        number += 1;
        place.join(format!("image-{number}"))
    };
    let take = |image: &Path| {
        let mut command = base("checkpoint");
        command.arg("--leave-running").arg("--image-path").arg(image).arg(id);
        command
    };
    let first = image();
    if let Err(reason) = attempt(&mut take(&first)) {
        report.not_run(name, &reason);
        return report.not_run(restore, &reason);
    }
    measure(report, name, effort.of(20, 3), &mut || take(&image()));
    let mut copies = Vec::new();
    measure(report, restore, effort.of(10, 2), &mut || {
        let copy = format!("{id}-copy-{}", copies.len());
        let mut command = base("restore");
        command.arg("--detach").arg("--image-path").arg(&first).arg("--bundle").arg(bundle).arg(&copy);
        copies.push(copy);
        command
    });
    for copy in copies {
        let _ = attempt(base("delete").arg("--force").arg(&copy));
    }
}

/// An OCI bundle whose root is the host's `/usr` and links into it.
fn bundle(place: &Path, name: &str, arguments: &[&str], runtime: &str) -> PathBuf {
    let bundle = place.join(name);
    let root = bundle.join("rootfs");
    for directory in ["usr", "proc", "dev", "tmp", "sys"] {
        fs::create_dir_all(root.join(directory)).expect("a directory can be made");
    }
    for (link, target) in links() {
        symlink(target, root.join(link)).expect("a link can be made");
    }
    let kinds = ["pid", "mount", "ipc", "uts", "network"];
    let mut namespaces: Vec<_> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
    let mut linux = json!({});
    // This runsc takes no id range together with a directory that other ids own.
    if runtime != "runsc" {
        namespaces.push(json!({ "type": "user" }));
        let map = json!([{ "containerID": 0, "hostID": FIRST_ID, "size": 65_536 }]);
        linux = json!({ "uidMappings": map, "gidMappings": map });
    }
    linux["namespaces"] = json!(namespaces);
    let mount = |target: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": target, "type": kind, "source": source, "options": options });
    let configuration = json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 }, "args": arguments, "cwd": "/",
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "bench",
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "mode=755"]),
            mount("/tmp", "tmpfs", "tmpfs", &["nosuid"]),
            mount("/usr", "bind", "/usr", &["bind", "ro"]),
        ],
        "linux": linux,
    });
    fs::write(bundle.join("config.json"), configuration.to_string()).expect("a file can be written");
    // The range's ids must be able to walk here.
    for path in [place, &bundle, &root] {
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(path, open).expect("permissions can be set");
    }
    bundle
}

fn docker(report: &mut Report, effort: Effort) {
    let name = "docker: run true";
    let names = [name, "docker: pause", "docker: unpause", "docker: commit, 10 MB dirty"];
    if !installed("docker") {
        return names.into_iter().for_each(|name| report.not_run(name, "not installed"));
    }
    if let Err(reason) = attempt(Command::new("docker").arg("info")) {
        return names.into_iter().for_each(|name| report.not_run(name, &reason));
    }
    // An image of nothing but a place to mount the host's programs at.
    let made = Command::new("sh").args(["-c", "tar -cf - -T /dev/null | docker import - nagaya-bench"]).output();
    if !made.is_ok_and(|output| output.status.success()) {
        return report.not_run(name, "docker could not import an empty image");
    }
    let command = || {
        let mut command = Command::new("docker");
        command.args(["run", "--rm", "--network=none", "-v", "/usr:/usr:ro"]);
        for (link, _) in links() {
            command.arg("-v").arg(format!("/{link}:/{link}:ro"));
        }
        command.args(["nagaya-bench", "/bin/true"]);
        command
    };
    measure(report, name, effort.of(20, 3), &mut || command());
    docker_life(report, effort);
}

/// Pauses and commits of one long-lived container.
fn docker_life(report: &mut Report, effort: Effort) {
    let id = format!("nagaya-bench-{}", std::process::id());
    let docker = |arguments: &[&str]| {
        let mut command = Command::new("docker");
        command.args(arguments);
        command
    };
    let mut start = docker(&["run", "--detach", "--network=none", "-v", "/usr:/usr:ro", "--name", &id]);
    for (link, _) in links() {
        start.arg("-v").arg(format!("/{link}:/{link}:ro"));
    }
    let begun = attempt(start.args(["nagaya-bench", "/bin/sleep", "1000"]));
    let (pause, unpause, commit) = ("docker: pause", "docker: unpause", "docker: commit, 10 MB dirty");
    if let Err(reason) = begun {
        return [pause, unpause, commit].into_iter().for_each(|name| report.not_run(name, &reason));
    }
    in_turn(report, [pause, unpause], effort.of(20, 3), &|index| docker(&[["pause", "unpause"][index], &id]));
    match attempt(&mut docker(&["exec", &id, "/bin/sh", "-c", "head -c 10M /dev/urandom >/dirty"])) {
        Err(reason) => report.not_run(commit, &reason),
        Ok(_) => {
            measure(report, commit, effort.of(10, 2), &mut || docker(&["commit", &id, "nagaya-bench-commit"]));
        }
    }
    let _ = attempt(&mut docker(&["rm", "--force", &id]));
    let _ = attempt(&mut docker(&["image", "rm", "nagaya-bench-commit"]));
}

/// Runs a command again and again, one after the other, after a first time that does not count. False, and said
/// so, where it does not work.
fn measure(report: &mut Report, name: &str, rounds: usize, command: &mut dyn FnMut() -> Command) -> bool {
    let samples: Result<Vec<f64>, String> = (0..=rounds).map(|_| attempt(&mut command())).collect();
    match samples {
        Ok(samples) => report.timing(name, samples[1..].to_vec()),
        Err(reason) => {
            report.not_run(name, &reason);
            return false;
        }
    }
    true
}

/// As many as eight at a time give, per second: what our own sustained creates compare with.
fn sustained(report: &mut Report, name: &str, count: usize, command: &(dyn Fn(usize) -> Command + Sync)) {
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    let worker = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            attempt(&mut command(number))?;
        }
    };
    let outcome: Result<(), String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..8).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("workers do not panic"))
    });
    match outcome {
        Ok(()) => report.figure(name, count as f64 / start.elapsed().as_secs_f64(), "per second"),
        Err(reason) => report.not_run(name, &reason),
    }
}

/// How long a command took, milliseconds; or why it does not work here.
fn attempt(command: &mut Command) -> Result<f64, String> {
    // Output goes to a file: a detached container would keep a pipe open.
    let mut errors = tempfile::tempfile().map_err(|error| error.to_string())?;
    let kept = errors.try_clone().map_err(|error| error.to_string())?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(kept);
    let start = Instant::now();
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(|error| error.to_string())?;
    let limit = Timespec { tv_sec: ATTEMPT_SECONDS_MAX, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).map_err(|error| error.to_string())?;
    if ended == 0 {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    let time = milliseconds(start.elapsed());
    if ended == 0 {
        return Err(format!("no end after {ATTEMPT_SECONDS_MAX} s"));
    }
    if status.success() {
        return Ok(time);
    }
    let mut text = String::new();
    let _ = errors.rewind();
    let _ = errors.read_to_string(&mut text);
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    Err(format!("{status}: {}", last.chars().take(200).collect::<String>()))
}
