//! The link against the real agent, which runs as an ordinary process of the host here: commands and
//! files are the host's own, so everything happens below a temporary directory.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nagaya_engine::ports::{Command, ExitStatus, Guest, Process, ProcessEvent};
use tempfile::TempDir;

use super::Link;

mod boot;
mod commands;
mod connections;
mod detached;
mod directories;
mod endings;
mod files;
mod streams;
mod tcp;
mod usage;

/// Held while descriptors can be inherited, so that only the intended program does.
static SPAWNING: Mutex<()> = Mutex::new(());

/// An agent, and a home directory for the user it runs commands as.
struct Agent {
    process: Child,
    directory: TempDir,
}

impl Agent {
    fn start() -> Self {
        Self::start_with(&[])
    }

    /// Also hands it descriptors, each with the name of its argument.
    fn start_with(descriptors: &[(&str, BorrowedFd<'_>)]) -> Self {
        Self::start_as(&[], descriptors)
    }

    /// Also with further arguments.
    fn start_as(arguments: &[&str], descriptors: &[(&str, BorrowedFd<'_>)]) -> Self {
        let directory = TempDir::new().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let home = directory.path().join("home");
        std::fs::create_dir(&home).unwrap();
        std::os::unix::fs::chown(&home, Some(1000), Some(1000)).unwrap();
        let program = crate::programs::agent().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let mut command = std::process::Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command.args(["--user=1000:1000:user".to_owned(), format!("--home={}", home.display())]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.args(arguments);
        let _alone = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, descriptor) in descriptors.iter().chain(&[("listen", listener.as_fd())]) {
            rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::empty()).unwrap();
            command.arg(format!("--{name}-fd={}", descriptor.as_raw_fd()));
        }
        let process = command.spawn().unwrap();
        for (_, descriptor) in descriptors.iter().chain(&[("listen", listener.as_fd())]) {
            rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC).unwrap();
        }
        Self { process, directory }
    }

    fn path(&self, name: &str) -> String {
        self.home().join(name).to_str().unwrap().into()
    }

    fn home(&self) -> PathBuf {
        self.directory.path().join("home")
    }

    /// The pages of its program do not count: all agents of a server have the same.
    fn own_memory_kib(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.process.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("Anonymous:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    async fn connect(&self) -> Arc<Link> {
        Link::connect(&self.directory.path().join("socket")).await.unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Commands outlive the agent here, where it is not process 1.
        for child in children(self.process.id()) {
            if let Some(child) = rustix::process::Pid::from_raw(child) {
                let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
            }
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// All processes below one, which collects their orphans.
fn children(pid: u32) -> Vec<i32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let direct: Vec<i32> =
        lists.flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect();
    let below: Vec<i32> = direct.iter().flat_map(|child| children(*child as u32)).collect();
    [direct, below].concat()
}

fn command(argv: &[&str]) -> Command {
    Command { argv: argv.iter().map(|argument| (*argument).into()).collect(), cwd: "/".into(), ..Default::default() }
}

fn shell(script: &str) -> Command {
    command(&["/bin/sh", "-c", script])
}

/// Everything a command put out, and how it ended.
#[derive(Debug, Default)]
struct Ended {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Option<ExitStatus>,
}

async fn collect(events: &mut tokio::sync::mpsc::Receiver<ProcessEvent>) -> Ended {
    let mut ended = Ended::default();
    while let Some(event) = events.recv().await {
        assert!(ended.exit.is_none(), "the exit is the last event");
        match event {
            ProcessEvent::Stdout(data) => ended.stdout.extend_from_slice(&data),
            ProcessEvent::Stderr(data) => ended.stderr.extend_from_slice(&data),
            ProcessEvent::Exit(exit) => ended.exit = Some(exit),
        }
    }
    ended
}

async fn finish(mut process: Process) -> (Ended, ExitStatus) {
    let mut ended = collect(&mut process.events).await;
    let exit = ended.exit.take().expect("an exit");
    (ended, exit)
}

async fn run(link: &Link, command: Command) -> (Ended, ExitStatus) {
    finish(link.run(command).await.unwrap()).await
}

/// Waits for something that has no event of its own.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(15);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn is_alive(pid: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !status.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z')
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}
