//! What an operator may set about the ways into sandboxes.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use nagaya_engine::SettingError;
use serde::Deserialize;

/// A certificate and its key, as files in PEM form.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TlsConfig {
    /// The certificate, followed by the intermediate ones.
    pub certificate_file: PathBuf,
    /// Its private key.
    pub key_file: PathBuf,
}

/// How services in sandboxes are reached from browsers.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PreviewsConfig {
    /// The certificate for `*.preview_domain`, as files in PEM form, where that of `tls` is not good for it too.
    pub tls: Option<TlsConfig>,
    /// The address of this machine that previews have their ports on while there is no `preview_domain`.
    pub loopback: IpAddr,
    /// For connecting to a service in a sandbox.
    pub connect_timeout_ms: u64,
    /// How long a service may take from the last piece of a request to the header of its answer.
    pub answer_timeout_ms: u64,
    /// Requests and WebSockets under way to one preview.
    pub exchanges_max: usize,
    /// Viewers' connections to previews, open at once; for a further one the longest idle is closed.
    pub connections_max: usize,
    /// Connections kept open to one preview's service for later requests.
    pub idle_connections_max: usize,
    /// How long they are kept.
    pub idle_timeout_ms: u64,
}

/// The server for SSH. Through the API's own listener it is always there.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SshConfig {
    /// Where plain SSH is spoken too, e.g. `0.0.0.0:2222`; port 0 picks a free one. Default: nowhere.
    pub listen: Option<SocketAddr>,
    /// Connections, open at once.
    pub connections_max: usize,
    /// Connections on which nobody is logged in yet.
    pub logins_max: usize,
    /// From connecting to being logged in.
    pub login_timeout_ms: u64,
    /// Commands, file servers and forwarded streams of one connection.
    pub channels_per_connection_max: usize,
    /// How long a certificate is good when its holder does not say.
    pub certificate_ttl_ms: u64,
    /// Longest life of a certificate, whatever is asked for.
    pub certificate_ttl_max_ms: u64,
}

impl Default for PreviewsConfig {
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

impl Default for SshConfig {
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

impl PreviewsConfig {
    /// Refuses ports that others than this machine could reach, and limits that let nothing through.
    pub fn validate(&self) -> Result<(), SettingError> {
        if !self.loopback.is_loopback() {
            let problem = "must be a loopback address: there is no other protection on these ports";
            return Err(SettingError::new("previews.loopback", problem));
        }
        SettingError::unless_positive(&[
            ("previews.connections_max", self.connections_max as u64),
            ("previews.connect_timeout_ms", self.connect_timeout_ms),
            ("previews.answer_timeout_ms", self.answer_timeout_ms),
            ("previews.exchanges_max", self.exchanges_max as u64),
            ("previews.idle_timeout_ms", self.idle_timeout_ms),
        ])
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(crate) fn answer_timeout(&self) -> Duration {
        Duration::from_millis(self.answer_timeout_ms)
    }

    pub(crate) fn idle_timeout(&self) -> Duration {
        Duration::from_millis(self.idle_timeout_ms)
    }
}

impl SshConfig {
    /// Refuses limits that let nobody in.
    pub fn validate(&self) -> Result<(), SettingError> {
        SettingError::unless_positive(&[
            ("ssh.connections_max", self.connections_max as u64),
            ("ssh.logins_max", self.logins_max as u64),
            ("ssh.login_timeout_ms", self.login_timeout_ms),
            ("ssh.channels_per_connection_max", self.channels_per_connection_max as u64),
            ("ssh.certificate_ttl_ms", self.certificate_ttl_ms),
            ("ssh.certificate_ttl_max_ms", self.certificate_ttl_max_ms),
        ])
    }

    pub(crate) fn login_timeout(&self) -> Duration {
        Duration::from_millis(self.login_timeout_ms)
    }

    pub(crate) fn certificate_ttl(&self, asked: Option<Duration>) -> Duration {
        let usual = Duration::from_millis(self.certificate_ttl_ms);
        asked.unwrap_or(usual).min(Duration::from_millis(self.certificate_ttl_max_ms))
    }
}
