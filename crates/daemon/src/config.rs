//! The configuration: one tree, read from a TOML file, with a default for everything.
//!
//! Precedence is flag, environment, file, default. Flags and environment are parsed by the binary,
//! which hands what it found over as [`Overrides`]. An unknown key is an error, so that a typing
//! mistake never silently leaves a limit at its default.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use nagaya_engine::EngineConfig;
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use crate::tenki::Limits as TenkiLimits;
pub use crate::wire::limits::Limits;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read configuration file {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("parse configuration file {path}")]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("use configuration: {key} {problem}")]
    Value { key: &'static str, problem: String },
}

/// Everything an operator can set.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address and port of the one listener; port 0 picks a free one. Default 127.0.0.1:7070.
    pub listen: SocketAddr,
    /// Where everything that must survive is kept. Default /var/lib/nagaya for root, else
    /// ~/.local/share/nagaya.
    pub data_dir: PathBuf,
    /// The URL under which clients reach this server, where that is not the one they called, e.g.
    /// behind a proxy that terminates TLS. Scheme and authority only.
    pub public_url: Option<String>,
    /// Serves TLS instead of clear text.
    pub tls: Option<TlsConfig>,
    /// Previews have host names of one label below this domain, on the one listener; `*.DOMAIN` must lead here. Default:
    /// none, and each preview has a port of its own on the machine's loopback.
    pub preview_domain: Option<String>,
    /// An API key to accept besides those made by the server: `tk_` and at least 16 characters.
    pub api_key: Option<String>,
    pub limits: Limits,
    pub tenki: TenkiLimits,
    pub engine: EngineConfig,
    pub network: Network,
    pub drivers: Drivers,
    pub pools: Pools,
    pub namespace: Namespace,
    pub disks: Disks,
    pub blobs: Blobs,
    pub previews: Previews,
    pub ssh: Ssh,
}

/// Files in PEM form.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The server's certificate, followed by the intermediate ones.
    pub certificate_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// The network of the sandboxes.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    /// False: no sandbox gets a way out, and asking for one is an error. Default true.
    pub outbound: bool,
    /// Addresses for sandboxes, e.g. `10.213.0.0/16`. Default: a /16 of 10.192.0.0/10 that the host
    /// has no route into, chosen at the first start and kept in the data directory.
    pub cidr: Option<String>,
    /// Networks that sandboxes may reach although they are denied by default.
    pub allow: Vec<String>,
    /// Who answers sandboxes' questions for names, e.g. `9.9.9.9` or `127.0.0.1:5353`. Default: whom the host asks.
    pub name_server: Option<String>,
    /// Connections to the outside that one sandbox may have at a time; it begins a twentieth of them per second, after
    /// all of them at once. No more than a 64th of the host's table of connections (`nf_conntrack_max`). Default 4096.
    pub connections_max: u32,
}

/// What runs sandboxes.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Drivers {
    /// The driver of sessions that ask for none. Default `namespace`, which is the only one.
    pub default: String,
}

impl Default for Drivers {
    fn default() -> Self {
        Self { default: "namespace".into() }
    }
}

/// Pre-created resources, so that creating a sandbox does not wait for them.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pools {
    /// Slots (namespaces, disk of the default size, control group, address) kept ready. Default 16.
    pub slots_ready: usize,
    /// The same for sandboxes without outbound access. Default 2.
    pub isolated_slots_ready: usize,
}

/// The namespace driver.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Namespace {
    /// Sandboxes that can exist at once, those of the pools included. Default 1024, at most 4096.
    pub slots_max: u32,
    /// Processes and threads of one sandbox. Default 1024.
    pub processes_max: u64,
    /// Output of commands in the background that one sandbox keeps on its disk for its readers, MiB; the oldest goes
    /// first. Default 256.
    pub kept_output_mb_max: u64,
    /// How long such output is kept after the command has ended, minutes; one minute once it was read. Default 60.
    pub kept_output_minutes_max: u64,
    /// Free space below which no sandbox is made, of the pool of disks where there is one, else of the data directory's
    /// file system; also what the pool leaves to the host when it grows, MiB. Default 256.
    pub disk_free_mb_min: u64,
    /// Available memory of the host below which no sandbox is made, MiB. Default 256.
    pub memory_available_mb_min: u64,
    /// Available memory of the host below which paused sandboxes give up theirs and keep their disks only,
    /// the longest paused first, MiB. Default 512.
    pub memory_low_mb: u64,
    /// Switch the host's cgroups to fast moves of processes (`favordynmods`), which saves some 8 ms
    /// for each command and stays on for the whole host. Default true.
    pub favor_cgroup_moves: bool,
}

/// Where disks, volumes and snapshots lie. Decided when a data directory is used for the first time.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Disks {
    /// `auto`: where the data directory's file system shares no blocks between copies, they lie in a pool: an XFS file
    /// system in a file. `off`: they are plain files always. Default off: a pool that is filled faster than it grows gives
    /// its sandboxes errors that the host's own file system would not.
    pub pool: DiskPool,
    /// What a pool begins with, MiB; at most half of what the host has left. It grows by itself. Default 4096.
    pub pool_first_mb: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskPool {
    Auto,
    Off,
}

/// Where snapshots are kept: in `blobs` of the data directory, and behind that where it is told.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Blobs {
    /// A bucket as the durable place; the directory then holds what this machine has of it.
    pub s3: Option<S3>,
}

/// A bucket of any store that speaks S3. The access key and its secret come from `credentials_file`,
/// else from the environment variables NAGAYA_S3_ACCESS_KEY_ID and NAGAYA_S3_SECRET_ACCESS_KEY.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3 {
    pub bucket: String,
    /// Stands before every key. No two servers may share one. Default: none.
    #[serde(default)]
    pub prefix: String,
    /// Default us-east-1.
    #[serde(default = "default_region")]
    pub region: String,
    /// For stores other than Amazon's, e.g. `https://s3.example.org`.
    pub endpoint: Option<String>,
    /// Lets the endpoint be `http://`: everything can be read on the way then. Default false.
    #[serde(default)]
    pub allow_http: bool,
    /// A file with the access key on its first line and the secret on its second.
    pub credentials_file: Option<PathBuf>,
}

fn default_region() -> String {
    "us-east-1".into()
}

/// How services in sandboxes are reached from browsers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Previews {
    /// The certificate for `*.preview_domain`, where that of `tls` is not good for it too.
    pub tls: Option<TlsConfig>,
    /// The address of this machine that previews have their ports on while there is no `preview_domain`. Default 127.0.0.1.
    pub loopback: IpAddr,
    /// For connecting to a service in a sandbox. Default 10,000.
    pub connect_timeout_ms: u64,
    /// How long a service may take from the last piece of a request to the header of its answer. Default 300,000.
    pub answer_timeout_ms: u64,
    /// Requests and WebSockets under way to one preview. Default 1024.
    pub exchanges_max: usize,
    /// Viewers' connections to previews, open at once; for a further one the longest idle is closed. Default 4096.
    pub connections_max: usize,
    /// Connections kept open to one preview's service for later requests. Default 32.
    pub idle_connections_max: usize,
    /// How long they are kept. Default 30,000.
    pub idle_timeout_ms: u64,
}

/// The server for SSH. Through the API's own listener it is always there.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ssh {
    /// Where plain SSH is spoken too, e.g. `0.0.0.0:2222`; port 0 picks a free one. Default: nowhere.
    pub listen: Option<SocketAddr>,
    /// Default 1024.
    pub connections_max: usize,
    /// Connections on which nobody is logged in yet. Default 128.
    pub logins_max: usize,
    /// From connecting to being logged in. Default 20,000.
    pub login_timeout_ms: u64,
    /// Commands, file servers and forwarded streams of one connection. Default 256.
    pub channels_per_connection_max: usize,
    /// How long a certificate is good when its holder does not say. Default 600,000.
    pub certificate_ttl_ms: u64,
    /// The longest that is given, whatever is asked for. Default 86,400,000.
    pub certificate_ttl_max_ms: u64,
}

/// What flags and environment say; wins over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    pub listen: Option<SocketAddr>,
    pub data_dir: Option<PathBuf>,
    pub public_url: Option<String>,
    pub api_key: Option<String>,
    pub ssh_listen: Option<SocketAddr>,
}

/// Keys that stood in `[limits]` before `[tenki]` was there, and may still stand there.
const ONCE_IN_LIMITS: [(&str, &str); 4] = [
    ("create_hold_ms", "tenki.create_hold_ms"),
    ("deadline_margin_ms", "tenki.deadline_margin_ms"),
    ("stdin_window_bytes", "tenki.stdin_window_bytes"),
    ("read_chunk_bytes", "tenki.read_chunk_bytes"),
];

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            data_dir: default_data_dir(),
            public_url: None,
            tls: None,
            preview_domain: None,
            api_key: None,
            limits: Limits::default(),
            tenki: TenkiLimits::default(),
            engine: EngineConfig::default(),
            network: Network::default(),
            drivers: Drivers::default(),
            pools: Pools::default(),
            namespace: Namespace::default(),
            disks: Disks::default(),
            blobs: Blobs::default(),
            previews: Previews::default(),
            ssh: Ssh::default(),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self { outbound: true, cidr: None, allow: Vec::new(), name_server: None, connections_max: 4_096 }
    }
}

impl Default for Pools {
    fn default() -> Self {
        Self { slots_ready: 16, isolated_slots_ready: 2 }
    }
}

impl Default for Previews {
    fn default() -> Self {
        Self {
            tls: None,
            loopback: IpAddr::from([127, 0, 0, 1]),
            connect_timeout_ms: 10_000,
            answer_timeout_ms: 300_000,
            exchanges_max: 1024,
            connections_max: 4096,
            idle_connections_max: 32,
            idle_timeout_ms: 30_000,
        }
    }
}

impl Default for Disks {
    fn default() -> Self {
        Self { pool: DiskPool::Off, pool_first_mb: 4_096 }
    }
}

impl Default for Ssh {
    fn default() -> Self {
        Self {
            listen: None,
            connections_max: 1024,
            logins_max: 128,
            login_timeout_ms: 20_000,
            channels_per_connection_max: 256,
            certificate_ttl_ms: 600_000,
            certificate_ttl_max_ms: 86_400_000,
        }
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self {
            slots_max: 1_024,
            processes_max: 1_024,
            kept_output_mb_max: 256,
            kept_output_minutes_max: 60,
            disk_free_mb_min: 256,
            memory_available_mb_min: 256,
            memory_low_mb: 512,
            favor_cgroup_moves: true,
        }
    }
}

impl Config {
    /// Reads the file, if one is named, puts the overrides on top and checks the values.
    pub fn load(file: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let mut config = match file {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
                Self::parse(&text, path)?
            }
            None => Self::default(),
        };
        let Overrides { listen, data_dir, public_url, api_key, ssh_listen } = overrides;
        config.listen = listen.unwrap_or(config.listen);
        config.data_dir = data_dir.unwrap_or(config.data_dir);
        config.public_url = public_url.or(config.public_url);
        config.api_key = api_key.or(config.api_key);
        config.ssh.listen = ssh_listen.or(config.ssh.listen);
        config.check()?;
        Ok(config)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let refuse = |mut source: toml::de::Error| {
            // Without it the error does not show the line that it is about.
            source.set_input(Some(text));
            ConfigError::Parse { path: path.to_owned(), source: Box::new(source) }
        };
        let mut file = DeTable::parse(text).map_err(refuse)?;
        move_to_tenki(file.get_mut())?;
        Self::deserialize(toml::de::Deserializer::from(file)).map_err(refuse)
    }

    fn check_previews(&mut self) -> Result<(), ConfigError> {
        let refuse = |key, problem: &str| Err(ConfigError::Value { key, problem: problem.into() });
        if !self.previews.loopback.is_loopback() {
            return refuse(
                "previews.loopback",
                "must be a loopback address: there is no other protection on these ports",
            );
        }
        let Some(domain) = &mut self.preview_domain else {
            return match self.previews.tls {
                Some(_) => refuse("previews.tls", "needs preview_domain"),
                None => Ok(()),
            };
        };
        domain.make_ascii_lowercase();
        if !is_domain(domain) {
            return refuse("preview_domain", "must be a domain name, e.g. previews.example.com");
        }
        if self.previews.tls.is_some() && self.tls.is_none() {
            return refuse("previews.tls", "needs tls: one listener serves both");
        }
        let own = self.public_url.as_ref().and_then(|url| url.parse::<http::Uri>().ok());
        let own = own.as_ref().and_then(http::Uri::host).unwrap_or_default().to_ascii_lowercase();
        if own.strip_suffix(domain.as_str()).is_some_and(|front| front.is_empty() || front.ends_with('.')) {
            // Pages of previews could act there in the name of whoever looks at them.
            return refuse("preview_domain", "must not be the domain that public_url lies in");
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), ConfigError> {
        let refuse = |key, problem: &str| Err(ConfigError::Value { key, problem: problem.into() });
        if let Some(url) = &mut self.public_url {
            url.truncate(url.trim_end_matches('/').len());
            let parsed = url.parse::<http::Uri>().ok();
            let usable = parsed.as_ref().is_some_and(|uri| {
                matches!(uri.scheme_str(), Some("http" | "https"))
                    && uri.authority().is_some_and(|authority| !authority.host().is_empty())
                    && matches!(uri.path(), "" | "/")
                    && uri.query().is_none()
            });
            if !usable {
                return refuse("public_url", "must be http:// or https:// with a host, and no path");
            }
        }
        self.check_previews()?;
        if let Some((key, problem)) = self.limits.problem().or_else(|| self.tenki.problem()) {
            return refuse(key, problem);
        }
        for (key, count) in [
            ("network.connections_max", self.network.connections_max.into()),
            ("previews.connections_max", self.previews.connections_max as u64),
            ("previews.connect_timeout_ms", self.previews.connect_timeout_ms),
            ("previews.answer_timeout_ms", self.previews.answer_timeout_ms),
            ("previews.exchanges_max", self.previews.exchanges_max as u64),
            ("previews.idle_timeout_ms", self.previews.idle_timeout_ms),
            ("engine.forks_max", self.engine.forks_max.into()),
            ("engine.sessions_max", self.engine.sessions_max.into()),
            ("engine.certificate_ttl_ms", self.engine.certificate_ttl_ms),
            ("engine.wake_timeout_ms", self.engine.wake_timeout_ms),
            ("engine.previews_max", self.engine.previews_max.into()),
            ("engine.exposed_ports_max", self.engine.exposed_ports_max.into()),
            ("engine.private_preview_ttl_ms", self.engine.private_preview_ttl_ms),
            ("engine.viewer_token_ttl_max_ms", self.engine.viewer_token_ttl_max_ms),
            ("ssh.connections_max", self.ssh.connections_max as u64),
            ("ssh.logins_max", self.ssh.logins_max as u64),
            ("ssh.login_timeout_ms", self.ssh.login_timeout_ms),
            ("ssh.channels_per_connection_max", self.ssh.channels_per_connection_max as u64),
            ("ssh.certificate_ttl_ms", self.ssh.certificate_ttl_ms),
            ("ssh.certificate_ttl_max_ms", self.ssh.certificate_ttl_max_ms),
        ] {
            if count == 0 {
                return refuse(key, "must not be 0");
            }
        }
        if let Some(s3) = &self.blobs.s3 {
            if s3.bucket.is_empty() {
                return refuse("blobs.s3.bucket", "must not be empty");
            }
            if !s3.allow_http && s3.endpoint.as_ref().is_some_and(|endpoint| !endpoint.starts_with("https://")) {
                return refuse("blobs.s3.endpoint", "must be https:// unless allow_http is set");
            }
        }
        Ok(())
    }
}

/// Moves what stands in `[limits]` as it once did to where it stands now.
fn move_to_tenki(file: &mut DeTable<'_>) -> Result<(), ConfigError> {
    for (name, key) in ONCE_IN_LIMITS {
        let Some(DeValue::Table(limits)) = file.get_mut("limits").map(Spanned::as_mut) else { break };
        let Some((name, value)) = limits.remove_entry(name) else { continue };
        let empty = || Spanned::new(name.span(), DeValue::Table(DeTable::new()));
        let tenki = file.entry(Spanned::new(name.span(), "tenki".into())).or_insert_with(empty);
        // What is no table is refused as such.
        let DeValue::Table(tenki) = tenki.as_mut() else { break };
        if tenki.insert(name, value).is_some() {
            return Err(ConfigError::Value { key, problem: "stands in [limits] too; keep the one in [tenki]".into() });
        }
    }
    Ok(())
}

fn is_domain(name: &str) -> bool {
    let is_label = |label: &str| {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // What ends with a digit could be an address.
    name.len() <= 180 && name.split('.').all(is_label) && !name.ends_with(|last: char| last.is_ascii_digit())
}

fn default_data_dir() -> PathBuf {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    match (std::env::var_os("XDG_DATA_HOME"), home) {
        (Some(data_home), _) if !is_root() => PathBuf::from(data_home).join("nagaya"),
        (None, Some(home)) if !is_root() => home.join(".local/share/nagaya"),
        _ => PathBuf::from("/var/lib/nagaya"),
    }
}

/// Root owns its own entry in /proc; asking there needs no unsafe call.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(Some(file.path()), Overrides::default())
    }

    fn problem(text: &str) -> String {
        let error = parse(text).unwrap_err();
        match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:7070");
        assert_eq!(config.limits.message_bytes_max, 128 << 20);
        assert_eq!(config.engine.certificate_ttl_ms, 600_000);
    }

    #[test]
    fn the_readmes_configuration_is_one() {
        let readme = include_str!("../../../README.md");
        let (_, rest) = readme.split_once("```toml\n").unwrap();
        let config = parse(rest.split_once("```").unwrap().0).unwrap();
        assert_eq!(config.engine.idle_timeout_default_minutes, Some(30));
        assert_eq!(config.blobs.s3.unwrap().prefix, "server-1");
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_it() {
        for (text, key) in [
            ("listn = '127.0.0.1:1'", "listn"),
            ("[limits]\nmessage_bytes = 1", "message_bytes"),
            ("[limits]\ncreate_hold_ms = 1\nmessage_bytes = 1", "message_bytes"),
            ("[tenki]\nconnections_max = 1", "connections_max"),
            ("[tls]\nkey = 'x'", "key"),
            ("[network]\ncdir = ''", "cdir"),
        ] {
            let problem = problem(text);
            assert!(problem.contains(&format!("unknown field `{key}`")), "{problem}");
            assert!(problem.contains(&format!("| {}", text.lines().last().unwrap())), "no line is shown: {problem}");
        }
    }

    #[test]
    fn limits_of_tenki_clients_are_read_where_they_once_stood_too() {
        let said = "create_hold_ms = 1\ndeadline_margin_ms = 2\nstdin_window_bytes = 3\nread_chunk_bytes = 4096";
        for text in [
            format!("[tenki]\n{said}"),
            format!("[limits]\nconnections_max = 7\n{said}"),
            "tenki = { create_hold_ms = 1, deadline_margin_ms = 2 }\n\
             [limits]\nstdin_window_bytes = 3\nread_chunk_bytes = 4096"
                .into(),
        ] {
            let tenki = parse(&text).unwrap().tenki;
            let read = [tenki.create_hold_ms, tenki.deadline_margin_ms];
            assert_eq!((read, tenki.stdin_window_bytes, tenki.read_chunk_bytes), ([1, 2], 3, 4096), "{text}");
        }
        assert_eq!(parse("[limits]\nconnections_max = 7\ncreate_hold_ms = 1").unwrap().limits.connections_max, 7);
        let twice = problem("[limits]\ncreate_hold_ms = 1\n[tenki]\ncreate_hold_ms = 1");
        assert!(twice.contains("tenki.create_hold_ms stands in [limits] too"), "{twice}");
        let refused = problem("[limits]\ncreate_hold_ms = 'x'");
        assert!(refused.contains("| create_hold_ms = 'x'"), "no line is shown: {refused}");
    }

    #[test]
    fn overrides_win_over_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "listen = '127.0.0.1:1'\napi_key = 'tk_file'\ndata_dir = '/a'").unwrap();
        let overrides = Overrides {
            listen: Some("127.0.0.1:2".parse().unwrap()),
            api_key: Some("tk_flag".into()),
            ..Overrides::default()
        };
        let config = Config::load(Some(file.path()), overrides).unwrap();
        assert_eq!(config.listen.port(), 2);
        assert_eq!(config.api_key.as_deref(), Some("tk_flag"));
        assert_eq!(config.data_dir, PathBuf::from("/a"));
    }

    #[test]
    fn a_value_out_of_range_is_an_error_that_names_its_key() {
        for (text, key) in [
            ("public_url = 'ftp://x'", "public_url"),
            ("public_url = 'http://x/path'", "public_url"),
            ("public_url = 'x:7070'", "public_url"),
            ("[limits]\nmessage_bytes_max = 10", "limits.message_bytes_max"),
            ("[limits]\nbytes_under_way_max = 134217728", "limits.bytes_under_way_max"),
            ("[limits]\nstream_window_bytes = 1", "limits.stream_window_bytes"),
            ("[limits]\nconnections_max = 0", "limits.connections_max"),
            ("[engine]\nsessions_max = 0", "engine.sessions_max"),
            ("[limits]\ndownloads_max = 0", "limits.downloads_max"),
            ("[limits]\nread_chunk_bytes = 0", "tenki.read_chunk_bytes"),
            ("preview_domain = 'p_q.example'", "preview_domain"),
            ("preview_domain = '127.0.0.1'", "preview_domain"),
            ("preview_domain = 'example.com'\npublic_url = 'https://api.example.com'", "preview_domain"),
            ("[previews]\nloopback = '0.0.0.0'", "previews.loopback"),
            ("[previews]\nanswer_timeout_ms = 0", "previews.answer_timeout_ms"),
            ("[previews.tls]\ncertificate_file = 'c'\nkey_file = 'k'", "previews.tls"),
            ("preview_domain = 'p.example'\n[previews.tls]\ncertificate_file = 'c'\nkey_file = 'k'", "previews.tls"),
            ("[blobs.s3]\nbucket = ''", "blobs.s3.bucket"),
            ("[blobs.s3]\nbucket = 'b'\nendpoint = 'http://x'", "blobs.s3.endpoint"),
        ] {
            let problem = problem(text);
            assert!(problem.contains(key), "{text}: {problem}");
        }
    }

    #[test]
    fn the_public_url_loses_its_trailing_slash() {
        assert_eq!(
            parse("public_url = 'https://sandboxes.example/'").unwrap().public_url.unwrap(),
            "https://sandboxes.example"
        );
    }
}
