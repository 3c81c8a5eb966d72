//! The life of sessions: create, list, get, pause, resume, extend, update, terminate, fork.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{ArgAction, Args};
use nagaya_client::{
    Client, CreateOptions, ForkOptions, ListOptions, Session, SessionInfo, SessionState, UpdateOptions, VolumeMount,
    Wait, WakeOnVisit,
};

use crate::errors::Failure;
use crate::output::{Fields, Screen, age, moment, print, span};
use crate::resolve::{self, Among, OneSession};
use crate::{connect, parse};

#[derive(Debug, Args)]
pub struct Create {
    /// A name to find it by.
    #[arg(long)]
    name: Option<String>,
    /// Processors [default: 2, or what the source has].
    #[arg(long, value_name = "CORES")]
    cpu: Option<u32>,
    /// Memory in MB, an even number [default: 4096, or what the source has].
    #[arg(long, value_name = "MB")]
    memory_mb: Option<u32>,
    /// Disk in GB [default: 5, or what the source has].
    #[arg(long, value_name = "GB", alias = "disk-size-gb")]
    disk_gb: Option<u32>,
    /// Let ports of it be exposed.
    #[arg(
        long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = false,
        default_missing_value = "true", hide_default_value = true, hide_possible_values = true,
        value_name = "BOOL",
    )]
    allow_inbound: bool,
    /// Let it reach the outside [default: true].
    #[arg(
        long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = true,
        default_missing_value = "true", hide_default_value = true, hide_possible_values = true,
        value_name = "BOOL",
    )]
    allow_outbound: bool,
    /// End it after this time, such as 2h.
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    max_duration: Option<Duration>,
    /// Pause it after this time without activity, in whole minutes; 0 is never.
    #[arg(long, value_name = "TIME", value_parser = parse::minutes)]
    idle_timeout: Option<Duration>,
    /// End it after it was paused this long.
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    pause_retention: Option<Duration>,
    /// Neither pause nor end it by time.
    #[arg(long)]
    sticky: bool,
    /// Begin with the disk of this snapshot.
    #[arg(long, value_name = "SNAPSHOT", group = "source")]
    snapshot: Option<String>,
    /// Begin with what this template builds.
    #[arg(long, value_name = "TEMPLATE", group = "source")]
    template: Option<String>,
    /// Begin with this image.
    #[arg(long, value_name = "IMAGE", group = "source")]
    image: Option<String>,
    /// Run it on this driver of the server.
    #[arg(long, value_name = "DRIVER")]
    driver: Option<String>,
    /// Let visits to its previews and by SSH resume it while it is stopped: never, idle (if it was paused because nobody
    /// used it) or always [default: as the server does].
    #[arg(long, value_name = "WHEN", value_parser = parse::visits)]
    wake_on_visit: Option<WakeOnVisit>,
    /// A note to keep with it (repeatable).
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::pair)]
    metadata: Vec<(String, String)>,
    /// A tag to find it by (repeatable, or several with commas).
    #[arg(long = "tag", alias = "tags", value_name = "TAG", value_delimiter = ',')]
    tags: Vec<String>,
    /// A variable for everything that runs in it (repeatable).
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse::pair)]
    env: Vec<(String, String)>,
    /// A public key that may log in by SSH (repeatable).
    #[arg(long, value_name = "KEY")]
    authorized_key: Vec<String>,
    /// A file of such keys, a line each (repeatable).
    #[arg(long, value_name = "FILE")]
    authorized_keys_file: Vec<PathBuf>,
    /// A volume and where to mount it, :ro for reading only (repeatable).
    #[arg(long, value_name = "VOLUME:PATH[:ro]", value_parser = parse::mount)]
    volume: Vec<VolumeMount>,
    /// The workspace that it belongs to.
    #[arg(long, value_name = "WORKSPACE")]
    workspace: Option<String>,
    /// Return at once.
    #[arg(long, conflicts_with = "wait_timeout")]
    no_wait: bool,
    /// How long it may take until it runs [default: 3m].
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    wait_timeout: Option<Duration>,
    /// Print its id only.
    #[arg(long, short)]
    quiet: bool,
}

impl Create {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let keys = authorized_keys(self.authorized_key.clone(), &self.authorized_keys_file)?;
        let client = connect::client()?;
        let quiet = self.quiet;
        let options = self.options(&client, keys).await?;
        let session = client.create(options).await?;
        match quiet {
            true => print(&format!("{}\n", session.id())),
            false => screen.item(&known(&session).await?, fields),
        }
    }

    async fn options(self, client: &Client, ssh_authorized_keys: Vec<String>) -> Result<CreateOptions, Failure> {
        let mut volumes = self.volume;
        for volume in &mut volumes {
            volume.volume_id = resolve::volume(client, &volume.volume_id).await?;
        }
        let snapshot_id = match &self.snapshot {
            Some(text) => Some(resolve::snapshot(client, text).await?),
            None => None,
        };
        Ok(CreateOptions::default()
            .name(self.name)
            .cpu_cores(self.cpu)
            .memory_mb(self.memory_mb)
            .disk_size_gb(self.disk_gb)
            .driver(self.driver)
            .wake_on_visit(self.wake_on_visit)
            .allow_inbound(self.allow_inbound)
            .allow_outbound(self.allow_outbound)
            .max_duration(self.max_duration)
            .idle_timeout(self.idle_timeout)
            .pause_retention(self.pause_retention)
            .sticky(self.sticky)
            .metadata(self.metadata.into_iter().collect::<BTreeMap<_, _>>())
            .tags(self.tags)
            .env(self.env.into_iter().collect::<BTreeMap<_, _>>())
            .ssh_authorized_keys(ssh_authorized_keys)
            .volumes(volumes)
            .snapshot_id(snapshot_id)
            .template_spec_id(self.template)
            .image(self.image)
            .workspace_id(self.workspace)
            .wait(if self.no_wait { Wait::No } else { Wait::Ready })
            .wait_timeout(self.wait_timeout))
    }
}

/// The keys given and those of files, without blank lines and comments.
pub fn authorized_keys(mut keys: Vec<String>, files: &[PathBuf]) -> Result<Vec<String>, Failure> {
    for file in files {
        let text = read_text(file)?;
        let before = keys.len();
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        keys.extend(lines.map(str::to_owned));
        if keys.len() == before {
            let what = format!("{} holds no public key", file.display());
            return Err(Failure::usage(what, "It needs a line like `ssh-ed25519 AAAA… name` for every key."));
        }
    }
    Ok(keys)
}

fn read_text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| Failure::reading(path, &error))
}

#[derive(Debug, Args)]
pub struct List {
    /// Only those with this tag (repeatable, or several with commas: all of them).
    #[arg(long = "tag", alias = "tags", value_name = "TAG", value_delimiter = ',')]
    tags: Vec<String>,
    /// Only those in one of these states, such as running,paused.
    #[arg(long, value_name = "STATE", value_delimiter = ',')]
    state: Vec<String>,
    /// Ended ones too.
    #[arg(long, short)]
    all: bool,
    /// Only those of this workspace.
    #[arg(long, value_name = "WORKSPACE", default_value = "", hide_default_value = true)]
    workspace: String,
}

impl List {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let options = ListOptions::default().workspace_id(self.workspace).tags(self.tags).include_terminated(self.all);
        let sessions = connect::client()?.list(options).await?;
        let wanted: Vec<String> = self.state.iter().map(|state| state.trim().to_lowercase()).collect();
        let infos = sessions.into_iter().filter_map(|session| session.info());
        let infos: Vec<_> =
            infos.filter(|info| wanted.is_empty() || wanted.contains(&info.state.to_string())).collect();
        screen.list(&infos, &["ID", "NAME", "STATE", "CPU", "MEMORY", "DISK", "AGE"], |info| {
            vec![
                info.id.clone(),
                info.name.clone(),
                info.state.to_string(),
                info.cpu_cores.to_string(),
                format!("{} MB", info.memory_mb),
                format!("{} GB", info.disk_size_gb),
                age(info.created_at),
            ]
        })
    }
}

#[derive(Debug, Args)]
pub struct Get {
    #[command(flatten)]
    session: OneSession,
}

impl Get {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let session = self.session.find(Among::All).await?;
        screen.item(&session.refresh().await?, fields)
    }
}

#[derive(Debug, Args)]
pub struct Pause {
    #[command(flatten)]
    session: OneSession,
}

impl Pause {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let session = self.session.find(Among::Live).await?;
        screen.done(&session.pause().await?, state_sentence)
    }
}

#[derive(Debug, Args)]
pub struct Resume {
    #[command(flatten)]
    session: OneSession,
    /// Return at once.
    #[arg(long)]
    no_wait: bool,
    /// How long it may take until it runs.
    #[arg(long, value_name = "TIME", value_parser = parse::duration, default_value = "3m")]
    wait_timeout: Duration,
}

impl Resume {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let session = self.session.find(Among::Live).await?;
        let mut info = session.resume().await?;
        if !self.no_wait && info.state != SessionState::Running {
            info = session.wait_resumed(self.wait_timeout).await?;
        }
        screen.done(&info, state_sentence)
    }
}

#[derive(Debug, Args)]
pub struct Extend {
    /// Session: an id, the beginning of one, or a name.
    #[arg(long, value_name = "SESSION")]
    session: Option<String>,
    /// By how much, such as 30m.
    #[arg(long, value_name = "TIME", value_parser = parse::duration, alias = "duration")]
    by: Option<Duration>,
    /// [SESSION] [TIME]
    #[arg(num_args = 0..=2, value_name = "SESSION")]
    words: Vec<String>,
}

impl Extend {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let (session, words) = resolve::split(self.session, self.words, usize::from(self.by.is_none()))?;
        let by = match (self.by, words.first()) {
            (Some(by), _) => by,
            (None, Some(word)) => {
                parse::duration(word).map_err(|why| Failure::usage(format!("{word:?}: {why}"), ""))?
            }
            (None, None) => return Err(Failure::usage("by how much is missing", "Write `extend SESSION 30m`.")),
        };
        let session = resolve::session(&connect::client()?, &session, Among::Live).await?;
        screen.done(&session.extend(by).await?, |info| match info.timeout_at {
            Some(_) => format!("{} ends at {}", info.id, moment(info.timeout_at)),
            None => format!("{} has no end", info.id),
        })
    }
}

#[derive(Debug, Args)]
pub struct Update {
    #[command(flatten)]
    session: OneSession,
    /// Another name.
    #[arg(long)]
    name: Option<String>,
    /// Its only tags from now on (repeatable, or several with commas).
    #[arg(long = "tag", alias = "tags", value_name = "TAG", value_delimiter = ',')]
    tags: Vec<String>,
    /// Take all tags away.
    #[arg(long, conflicts_with = "tags")]
    clear_tags: bool,
    /// Whether neither idleness nor time pauses or ends it.
    #[arg(
        long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        hide_possible_values = true, value_name = "BOOL",
    )]
    sticky: Option<bool>,
    /// End it after this time, such as 2h.
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    max_duration: Option<Duration>,
}

impl Update {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let tags = (self.clear_tags || !self.tags.is_empty()).then_some(self.tags);
        let options =
            UpdateOptions::default().name(self.name).tags(tags).sticky(self.sticky).max_duration(self.max_duration);
        if options.name.is_none()
            && options.tags.is_none()
            && options.sticky.is_none()
            && options.max_duration.is_none()
        {
            return Err(Failure::usage(
                "nothing to change",
                "Give --name, --tag, --clear-tags, --sticky or --max-duration.",
            ));
        }
        let session = self.session.find(Among::Live).await?;
        screen.item(&session.update(options).await?, fields)
    }
}

#[derive(Debug, Args)]
pub struct Terminate {
    /// Session: an id, the beginning of one, or a name.
    #[arg(long, value_name = "SESSION")]
    session: Option<String>,
    /// Sessions to end.
    #[arg(value_name = "SESSION")]
    sessions: Vec<String>,
}

impl Terminate {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let mut texts: Vec<String> = self.session.into_iter().chain(self.sessions).collect();
        if texts.is_empty() {
            texts.push(resolve::default_session()?);
        }
        let client = connect::client()?;
        // All are found before the first one ends.
        let mut sessions = Vec::new();
        for text in &texts {
            sessions.push(resolve::session(&client, text, Among::All).await?);
        }
        for session in sessions {
            screen.line(&session.close().await?, state_sentence)?;
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
pub struct Fork {
    #[command(flatten)]
    session: OneSession,
    /// How many.
    #[arg(long, short = 'n', default_value_t = 1)]
    count: u32,
    /// The name of every one of them [default: the source's, with a number].
    #[arg(long)]
    name: Option<String>,
    /// Return at once.
    #[arg(long)]
    no_wait: bool,
}

impl Fork {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let source = self.session.find(Among::Live).await?;
        let forked = source.fork(ForkOptions::default().count(self.count).name(self.name)).await?;
        let mut infos = Vec::new();
        for session in &forked.sessions {
            let info = known(session).await?;
            infos.push(match self.no_wait || info.is_ready() {
                true => info,
                false => session.wait_ready(nagaya_client::constants::DEFAULT_CREATE_TIMEOUT).await?,
            });
        }
        screen.list(&infos, &["ID", "NAME", "STATE"], |info| {
            vec![info.id.clone(), info.name.clone(), info.state.to_string()]
        })
    }
}

/// What is known of a session, asked for where nothing is.
pub async fn known(session: &Session) -> Result<SessionInfo, Failure> {
    match session.info() {
        Some(info) => Ok(info),
        None => Ok(session.refresh().await?),
    }
}

fn state_sentence(info: &SessionInfo) -> String {
    format!("{} is {}", info.id, info.state)
}

pub fn fields(info: &SessionInfo) -> Fields {
    let yes = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
    let pairs = |map: &BTreeMap<String, String>| {
        map.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
    };
    let volume = |volume: &nagaya_client::VolumeAttachment| {
        let ending = if volume.read_only { ":ro" } else { "" };
        format!("{}:{}{ending} ({})", volume.volume_id, volume.mount_path, volume.state.to_lowercase())
    };
    vec![
        ("id", info.id.clone()),
        ("name", info.name.clone()),
        ("state", info.state.to_string()),
        ("why", info.terminal_error.clone()),
        ("resume error", info.last_resume_error.clone()),
        ("driver", info.driver.clone()),
        ("isolation", info.isolation.clone()),
        ("wake on visit", info.wake_on_visit.clone().unwrap_or_default()),
        ("cpu", info.cpu_cores.to_string()),
        ("memory", format!("{} MB", info.memory_mb)),
        ("disk", format!("{} GB", info.disk_size_gb)),
        ("inbound", yes(info.inbound_enabled)),
        ("outbound", yes(info.outbound_enabled)),
        ("sticky", if info.sticky { yes(true) } else { String::new() }),
        ("tags", info.tags.join(" ")),
        ("metadata", pairs(&info.metadata)),
        ("volumes", info.volumes.iter().map(volume).collect::<Vec<_>>().join(" ")),
        ("snapshot", info.source_snapshot_id.clone().unwrap_or_default()),
        ("image", info.source_registry_ref.clone().unwrap_or_default()),
        ("created", moment(info.created_at)),
        ("ready", moment(info.ready_at)),
        ("paused", moment(info.paused_at)),
        ("pause ends", moment(info.pause_expires_at)),
        ("idle timeout", info.idle_timeout.filter(|time| !time.is_zero()).map(span).unwrap_or_default()),
        ("ends", moment(info.timeout_at)),
        ("ended", moment(info.terminated_at)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_files_are_lines_that_say_something() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("keys");
        fs::write(&file, "# mine\n\n  ssh-ed25519 AAAA me \r\nssh-rsa BBBB\n").unwrap();
        let keys = authorized_keys(vec!["given".into()], std::slice::from_ref(&file)).unwrap();
        assert_eq!(keys, ["given", "ssh-ed25519 AAAA me", "ssh-rsa BBBB"]);
        fs::write(&file, "# nothing\n").unwrap();
        assert_eq!(authorized_keys(Vec::new(), &[file]).unwrap_err().exit_code(), 64);
        let missing = authorized_keys(Vec::new(), &[directory.path().join("missing")]).unwrap_err();
        assert_eq!(missing.exit_code(), 66);
    }
}
