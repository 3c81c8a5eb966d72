//! From a command of the host to a running program with its standard streams.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nagaya_api::error::Code;
use nagaya_api::names;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::WaitStatus;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::account::Account;
use super::failure::Failure;
use super::groups;
use super::machine;
use super::memory;
use super::sys::{self, SpawnError, Step};
use super::{Agent, terminal};
use crate::messages::{Command, Terminal};
use crate::spawn::User;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The file server among the agent's own programs, see `crate::sftp`. Also what it is called as a process.
pub const SFTP: &str = "sftp";
/// The shell of the account.
pub const SHELL: &str = "shell";
/// This very program, as whoever is about to execute it sees it.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// Soft limit of open files that commands start with.
const OPEN_FILES_MAX: u64 = 65_536;

/// A program that runs, and our ends of its streams.
#[derive(Debug)]
pub struct Running {
    /// Also its process group and session.
    pub pid: i32,
    pub ended: oneshot::Receiver<WaitStatus>,
    /// By the agent's clock.
    pub started: Instant,
    /// How many had been killed because memory ran out, when it was started.
    pub memory_kills: u64,
    /// `None` when its standard input is empty.
    pub stdin: Option<pipe::Sender>,
    pub stdout: pipe::Receiver,
    /// `None` with a terminal.
    pub stderr: Option<pipe::Receiver>,
    pub terminal: Option<OwnedFd>,
    /// Whoever goes away leaves it alone.
    pub hang_up: bool,
}

/// Starts a command. All that can be wrong with it is found here.
pub async fn start(agent: &Arc<Agent>, command: Command) -> Result<Running, Failure> {
    agent.power.require_on()?;
    machine::freshen(agent);
    let agent = agent.clone();
    let hang_up = command.hang_up;
    // Loading a program may wait for the disk, and the process being made may be stopped by others.
    let spawned = tokio::task::spawn_blocking(move || spawn(&agent, &command)).await;
    let spawned = spawned.map_err(|_| Failure::new(Code::Internal, "starting a command ended abruptly"))??;
    let pipes = || -> std::io::Result<Running> {
        Ok(Running {
            pid: spawned.pid,
            ended: spawned.ended,
            started: spawned.started,
            memory_kills: spawned.memory_kills,
            stdin: spawned.stdin.map(pipe::Sender::from_owned_fd_unchecked).transpose()?,
            stdout: pipe::Receiver::from_owned_fd_unchecked(spawned.stdout)?,
            stderr: spawned.stderr.map(pipe::Receiver::from_owned_fd_unchecked).transpose()?,
            terminal: spawned.terminal,
            hang_up,
        })
    };
    pipes().map_err(Failure::from)
}

struct Spawned {
    pid: i32,
    ended: oneshot::Receiver<WaitStatus>,
    started: Instant,
    memory_kills: u64,
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

fn spawn(agent: &Agent, command: &Command) -> Result<Spawned, Failure> {
    let account = agent.accounts.look_up(command.privileged, &agent.settings.user);
    let Strings { candidates, argv, env, cwd } = strings(agent, command, &account)?;
    let cgroup_procs = groups::choose(&agent.settings, &agent.turn);
    let program = |streams: [BorrowedFd<'_>; 3], terminal: bool| {
        agent.reaper.spawn(|| {
            sys::spawn(&sys::Program {
                candidates: candidates.clone(),
                argv: argv.clone(),
                env: env.clone(),
                cwd: cwd.clone(),
                streams,
                terminal,
                user: (account.uid != 0).then_some((account.uid, account.gid)),
                groups: &account.groups,
                umask: account.umask,
                limits: &account.limits,
                cgroup_procs: &cgroup_procs,
                oom_score: agent.settings.oom_score.as_ref().map(|file| file.as_fd()),
                open_files_max: OPEN_FILES_MAX,
            })
        })
    };
    let (started, memory_kills) = (agent.clock.now(), memory::kills(&agent.settings));
    if command.pty {
        let plain = Terminal::default();
        let wanted = command.terminal.as_option().unwrap_or(&plain);
        let (ours, theirs) = terminal::open(account.uid, wanted)?;
        let (pid, ended) = program([theirs.as_fd(); 3], true).map_err(refusal)?;
        let again = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
        let stdin = Some(again(&ours)?);
        let stdout = again(&ours)?;
        return Ok(Spawned { pid, ended, started, memory_kills, stdin, stdout, stderr: None, terminal: Some(ours) });
    }
    let (stdin_theirs, stdin) = match command.stdin {
        true => {
            let (theirs, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            (Some(theirs), Some(nonblocking(ours)?))
        }
        false => (None, None),
    };
    let (stdout, stdout_theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, stderr_theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let stdin_theirs = stdin_theirs.as_ref().unwrap_or(&agent.null);
    let streams = [stdin_theirs.as_fd(), stdout_theirs.as_fd(), stderr_theirs.as_fd()];
    let (pid, ended) = program(streams, false).map_err(refusal)?;
    let (stdout, stderr) = (nonblocking(stdout)?, Some(nonblocking(stderr)?));
    Ok(Spawned { pid, ended, started, memory_kills, stdin, stdout, stderr, terminal: None })
}

/// Only our end: commands expect blocking streams.
pub fn nonblocking(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

struct Strings {
    candidates: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
}

fn strings(agent: &Agent, command: &Command, account: &Account) -> Result<Strings, Failure> {
    let invalid = |detail: &str| Failure::new(Code::InvalidCommand, detail);
    let c_string = |text: &str| sys::c_string(text).ok_or_else(|| invalid("NUL byte"));
    let first = || command.argv.first().map(String::as_str).ok_or_else(|| invalid("no arguments"));
    let arguments = |first: String, rest: &[String]| -> Result<Vec<CString>, Failure> {
        std::iter::once(&first).chain(rest).map(|argument| c_string(argument)).collect()
    };
    let (name, argv) = match command.builtin.as_str() {
        SFTP => (OWN_PROGRAM, vec![c_string(SFTP)?]),
        SHELL => (account.shell.as_str(), shell_arguments(&account.shell, &command.argv, arguments)?),
        _ => {
            let first = first()?;
            (first, arguments(first.to_owned(), &command.argv[1..])?)
        }
    };

    let (user, home) = (account.name.as_str(), account.home.as_str());
    // Where programs go that a user installs for itself.
    let path = match account.uid {
        0 => DEFAULT_PATH.to_owned(),
        _ => format!("{home}/.local/bin:{DEFAULT_PATH}"),
    };
    let of_image = &agent.settings.env;
    let mut env = Vec::with_capacity(command.env.len() + of_image.len() + 7);
    for variable in &command.env {
        if variable.name.is_empty() || variable.name.contains('=') {
            return Err(invalid("name of an environment variable"));
        }
        env.push(c_string(&format!("{}={}", variable.name, variable.value))?);
    }
    let given =
        |name: &str| command.env.iter().find(|variable| variable.name == name).map(|variable| variable.value.as_str());
    let in_image = |wanted: &str| of_image.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
    let path = in_image("PATH").unwrap_or(&path);
    for (name, value) in of_image.iter().filter(|(name, _)| given(name).is_none()) {
        env.push(c_string(&format!("{name}={value}"))?);
    }
    let mut defaults = vec![
        ("HOME", home),
        ("USER", user),
        ("LOGNAME", user),
        ("SHELL", account.shell.as_str()),
        ("PATH", path),
        ("LANG", "C.UTF-8"),
    ];
    if command.pty {
        defaults.push(("TERM", "xterm-256color"));
    }
    for (name, value) in defaults {
        if given(name).is_none() && in_image(name).is_none() {
            env.push(c_string(&format!("{name}={value}"))?);
        }
    }

    let candidates = if command.builtin == SHELL {
        // An image without the account's shell has the one that was found for it.
        vec![c_string(name)?, c_string(first()?)?]
    } else if name.contains('/') {
        vec![c_string(name)?]
    } else if name.is_empty() {
        Vec::new()
    } else {
        let directories = given("PATH").unwrap_or(path).split(':');
        let in_directory = |directory: &str| match directory {
            "" => c_string(&format!("./{name}")),
            _ => c_string(&format!("{directory}/{name}")),
        };
        directories.map(in_directory).collect::<Result<_, _>>()?
    };
    let cwd = match command.cwd.as_str() {
        "" => {
            // Root has a home of its own, but starts where the image says where it says that. A command without a wish
            // still runs when somebody removed the directory.
            let User { home: of_user, workdir, .. } = &agent.settings.user;
            let start = if workdir == of_user { home } else { workdir };
            c_string(if std::path::Path::new(start).is_dir() { start } else { "/" })?
        }
        path => {
            let path = names::to_bytes(path);
            let workdir = agent.settings.user.workdir.as_bytes();
            let absolute = if path.starts_with(b"/") { path.into_owned() } else { [workdir, b"/", &path].concat() };
            sys::c_string(absolute).ok_or_else(|| invalid("NUL byte"))?
        }
    };
    Ok(Strings { candidates, argv, env, cwd })
}

/// A shell for a login is called by its name with a dash, which every shell understands.
fn shell_arguments(
    shell: &str,
    given: &[String],
    arguments: impl Fn(String, &[String]) -> Result<Vec<CString>, Failure>,
) -> Result<Vec<CString>, Failure> {
    let name = shell.rsplit('/').next().unwrap_or(shell);
    match given {
        [_, login] if login == "-l" => arguments(format!("-{name}"), &[]),
        [_, rest @ ..] => arguments(name.to_owned(), rest),
        [] => arguments(name.to_owned(), &[]),
    }
}

/// What a refused start means to the user.
fn refusal(error: SpawnError) -> Failure {
    let SpawnError { step, errno } = error;
    let (code, detail) = match (step, errno) {
        (Step::Clone | Step::Cgroup, _) | (_, Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE) => {
            (Code::CapacityUnavailable, "processes or memory in the sandbox")
        }
        (Step::Prepare | Step::User, _) => (Code::Internal, "preparing the process"),
        (Step::Directory, Errno::NOENT) => (Code::FileNotFound, "working directory"),
        (Step::Directory, Errno::ACCESS) => (Code::PermissionDenied, "working directory"),
        (Step::Directory, Errno::NOTDIR) => (Code::InvalidCommand, "the working directory is not a directory"),
        (Step::Directory, _) => (Code::InvalidCommand, "working directory"),
        (Step::Execute, Errno::NOENT | Errno::NOTDIR) => (Code::CommandNotFound, ""),
        (Step::Execute, Errno::ACCESS | Errno::PERM | Errno::ISDIR) => {
            (Code::PermissionDenied, "the command cannot be executed")
        }
        (Step::Execute, Errno::NOEXEC) => (Code::InvalidCommand, "not in an executable format"),
        (Step::Execute, Errno::TOOBIG) => (Code::InvalidCommand, "arguments and environment are too long"),
        (Step::Execute, _) => (Code::InvalidCommand, "the command cannot be executed"),
    };
    Failure::with(code, detail, errno)
}
