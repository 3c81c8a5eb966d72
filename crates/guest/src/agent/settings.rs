//! How the agent is started: arguments of the form `--name=value`.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::detached::KeptMax;
use crate::spawn::User;

/// Where the agent was told nothing else.
const KEPT_BYTES_MAX: u64 = 256 << 20;
const KEPT_SECONDS_MAX: u64 = 3_600;

/// What the agent was told by whoever started it. Descriptors are owned from here on.
#[derive(Debug)]
pub struct Settings {
    /// A listening stream socket: servers connect to it.
    pub listener: OwnedFd,
    /// Files in which every command writes `0`, to put itself under the sandbox's limits.
    pub cgroup_procs: Vec<OwnedFd>,
    /// Each command joins one of these as well.
    pub command_groups: Vec<CommandGroup>,
    /// Reads as the bytes of memory in use.
    pub memory_usage: Option<OwnedFd>,
    /// What the sandbox sees as `/proc/meminfo`.
    pub meminfo: Option<OwnedFd>,
    /// Reads as the bytes that may be used; anything but a number is no limit.
    pub memory_limit: Option<OwnedFd>,
    /// Reads as the kernel's statistics of that memory.
    pub memory_statistics: Option<OwnedFd>,
    /// Reads as what happened to that memory, with a line `oom_kill NUMBER`.
    pub memory_events: Option<OwnedFd>,
    /// Reads as the number of processes that there may be; anything but a number is no limit.
    pub processes_limit: Option<OwnedFd>,
    /// The directory that the sandbox sees as `/sys/devices/system/cpu`.
    pub processors: Option<OwnedFd>,
    /// This process's own `/proc/self/oom_score_adj`, which it may not open.
    pub oom_score: Option<OwnedFd>,
    /// The directory that the sandbox sees as `/sys/fs/cgroup`.
    pub cgroup: Option<OwnedFd>,
    /// What the sandbox sees as `/proc/stat`, `/proc/loadavg` and `/proc/cpuinfo`.
    pub stat: Option<OwnedFd>,
    pub loadavg: Option<OwnedFd>,
    pub cpuinfo: Option<OwnedFd>,
    /// The host's `/proc/cpuinfo`, see [`crate::spawn::PROCESSOR_TEXT_BYTES`].
    pub processor_texts: Option<OwnedFd>,
    /// Where calls wait for an answer; see [`super::gate`].
    pub calls: Option<OwnedFd>,
    /// A pipe with what the agent signs its own calls with; see [`crate::seccomp::Listener`].
    pub secret: Option<OwnedFd>,
    /// Until the first server connects, the end of this pipe is the end of the agent: a prepared
    /// sandbox goes with the server that prepared it.
    pub lifeline: Option<OwnedFd>,
    /// Gets one byte when the agent is ready.
    pub control: Option<OwnedFd>,
    /// Who commands run as that say nothing else.
    pub user: User,
    /// What commands have in their environment unless they say otherwise.
    pub env: Vec<(String, String)>,
    /// How much output of detached commands is kept.
    pub kept_max: KeptMax,
}

/// A control group that some of the commands share.
#[derive(Debug, Default)]
pub struct CommandGroup {
    /// Files in which a command writes `0`.
    pub procs: Vec<OwnedFd>,
    /// Reads as the number of processes in it.
    pub processes: Option<OwnedFd>,
}

/// The arguments are not what this agent understands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    #[error("argument `{0}` is unknown or malformed")]
    Argument(String),
    #[error("`--listen-fd=N` is missing")]
    NoListener,
    #[error("`--user=UID:GID:NAME` is missing")]
    NoUser,
    #[error("descriptor {0} is given twice, or is a standard stream")]
    Descriptor(RawFd),
}

impl Settings {
    /// Parses the arguments after the program's name and takes the descriptors they name.
    ///
    /// Must be called once, before anything else opens descriptors. Arguments that begin with
    /// `--optional-` are skipped when unknown, so that a newer server can start an older agent.
    pub fn take(arguments: impl Iterator<Item = String>) -> Result<Self, SettingsError> {
        let mut taken = Vec::new();
        let mut take = |argument: &str, value: &str| {
            let fd: RawFd = value.parse().map_err(|_| SettingsError::Argument(argument.into()))?;
            if fd < 3 || taken.contains(&fd) {
                return Err(SettingsError::Descriptor(fd));
            }
            taken.push(fd);
            // SAFETY: the caller promises that this is the first use of inherited descriptors; each
            // is taken once.
            #[allow(unsafe_code)]
            Ok(unsafe { OwnedFd::from_raw_fd(fd) })
        };
        let mut listener = None;
        let mut settings = PartialSettings::default();
        let mut group = CommandGroup::default();
        for argument in arguments {
            let (name, value) = argument.split_once('=').ok_or_else(|| SettingsError::Argument(argument.clone()))?;
            match name {
                "--listen-fd" => listener = Some(take(&argument, value)?),
                "--cgroup-procs-fd" => settings.cgroup_procs.push(take(&argument, value)?),
                "--group-procs-fd" => group.procs.push(take(&argument, value)?),
                // The last of what belongs to a group.
                "--group-processes-fd" => {
                    group.processes = Some(take(&argument, value)?);
                    settings.command_groups.push(std::mem::take(&mut group));
                }
                "--memory-usage-fd" => settings.memory_usage = Some(take(&argument, value)?),
                "--meminfo-fd" => settings.meminfo = Some(take(&argument, value)?),
                "--control-fd" => settings.control = Some(take(&argument, value)?),
                "--memory-limit-fd" => settings.memory_limit = Some(take(&argument, value)?),
                "--oom-score-fd" => settings.oom_score = Some(take(&argument, value)?),
                "--processors-fd" => settings.processors = Some(take(&argument, value)?),
                "--memory-statistics-fd" => settings.memory_statistics = Some(take(&argument, value)?),
                "--memory-events-fd" => settings.memory_events = Some(take(&argument, value)?),
                "--processes-limit-fd" => settings.processes_limit = Some(take(&argument, value)?),
                "--cgroup-fd" => settings.cgroup = Some(take(&argument, value)?),
                "--stat-fd" => settings.stat = Some(take(&argument, value)?),
                "--loadavg-fd" => settings.loadavg = Some(take(&argument, value)?),
                "--cpuinfo-fd" => settings.cpuinfo = Some(take(&argument, value)?),
                "--processor-texts-fd" => settings.processor_texts = Some(take(&argument, value)?),
                "--calls-fd" => settings.calls = Some(take(&argument, value)?),
                "--secret-fd" => settings.secret = Some(take(&argument, value)?),
                "--lifeline-fd" => settings.lifeline = Some(take(&argument, value)?),
                "--kept-output-bytes-max" => settings.kept_bytes = Some(number(&argument, value)?),
                "--kept-output-seconds-max" => settings.kept_seconds = Some(number(&argument, value)?),
                "--home" if value.starts_with('/') => settings.home = Some(value.into()),
                "--workdir" if value.starts_with('/') => settings.workdir = Some(value.into()),
                "--env" => settings.env.push(variable(&argument, value)?),
                "--user" => settings.user = Some(user(&argument, value)?),
                _ if name.starts_with("--optional-") => {}
                _ => return Err(SettingsError::Argument(argument)),
            }
        }
        Ok(Self {
            listener: listener.ok_or(SettingsError::NoListener)?,
            cgroup_procs: settings.cgroup_procs,
            command_groups: settings.command_groups,
            memory_usage: settings.memory_usage,
            meminfo: settings.meminfo,
            memory_limit: settings.memory_limit,
            processors: settings.processors,
            oom_score: settings.oom_score,
            memory_statistics: settings.memory_statistics,
            memory_events: settings.memory_events,
            processes_limit: settings.processes_limit,
            cgroup: settings.cgroup,
            stat: settings.stat,
            loadavg: settings.loadavg,
            cpuinfo: settings.cpuinfo,
            processor_texts: settings.processor_texts,
            calls: settings.calls,
            secret: settings.secret,
            lifeline: settings.lifeline,
            control: settings.control,
            user: {
                let (uid, gid, name) = settings.user.ok_or(SettingsError::NoUser)?;
                let home = settings.home.unwrap_or_else(|| "/".into());
                let workdir = settings.workdir.unwrap_or_else(|| home.clone());
                User { name, uid, gid, home, workdir }
            },
            env: settings.env,
            kept_max: KeptMax {
                bytes: settings.kept_bytes.unwrap_or(KEPT_BYTES_MAX),
                time: Duration::from_secs(settings.kept_seconds.unwrap_or(KEPT_SECONDS_MAX)),
            },
        })
    }
}

#[derive(Default)]
struct PartialSettings {
    cgroup_procs: Vec<OwnedFd>,
    command_groups: Vec<CommandGroup>,
    memory_usage: Option<OwnedFd>,
    meminfo: Option<OwnedFd>,
    memory_limit: Option<OwnedFd>,
    processors: Option<OwnedFd>,
    oom_score: Option<OwnedFd>,
    memory_statistics: Option<OwnedFd>,
    memory_events: Option<OwnedFd>,
    processes_limit: Option<OwnedFd>,
    cgroup: Option<OwnedFd>,
    stat: Option<OwnedFd>,
    loadavg: Option<OwnedFd>,
    cpuinfo: Option<OwnedFd>,
    processor_texts: Option<OwnedFd>,
    calls: Option<OwnedFd>,
    secret: Option<OwnedFd>,
    lifeline: Option<OwnedFd>,
    control: Option<OwnedFd>,
    home: Option<String>,
    workdir: Option<String>,
    env: Vec<(String, String)>,
    user: Option<(u32, u32, String)>,
    kept_bytes: Option<u64>,
    kept_seconds: Option<u64>,
}

/// The name may hold anything, and comes last for that.
fn user(argument: &str, value: &str) -> Result<(u32, u32, String), SettingsError> {
    let parts = value.split_once(':').and_then(|(uid, rest)| Some((uid, rest.split_once(':')?)));
    let (uid, (gid, name)) = parts.ok_or_else(|| SettingsError::Argument(argument.into()))?;
    let id = |text: &str| text.parse().map_err(|_| SettingsError::Argument(argument.into()));
    Ok((id(uid)?, id(gid)?, name.into()))
}

fn variable(argument: &str, value: &str) -> Result<(String, String), SettingsError> {
    let (name, value) = value.split_once('=').ok_or_else(|| SettingsError::Argument(argument.into()))?;
    Ok((name.into(), value.into()))
}

fn number(argument: &str, value: &str) -> Result<u64, SettingsError> {
    value.parse().map_err(|_| SettingsError::Argument(argument.into()))
}
