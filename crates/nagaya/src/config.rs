//! The configuration file: the settings of all crates, each of which owns its own.
//!
//! A setting lies with what it is about: there are its key, its default, its description and what is refused. Here the parts
//! become one file, where an unknown key is an error, so that a typing mistake never silently leaves a limit at its default.
//! Precedence is flag, environment, file, default. `docs/configuration.md` is made of the same parts.

#[cfg(test)]
mod document;
mod part;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use nagaya_engine::{EngineConfig, SettingError};
use nagaya_runtime::{host, namespace};
use serde::Deserialize;
use toml::de::DeTable;

use crate::server::NAMESPACE;

/// Everything that an operator can set.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Config {
    /// Where everything that must survive is kept. Default: `/var/lib/nagaya` for root, else `nagaya` in `$XDG_DATA_HOME` or
    /// `~/.local/share`.
    pub data_dir: PathBuf,
    /// An API key to accept besides those made by the server: `tk_` and at least 16 characters. Default: none.
    pub api_key: Option<String>,
    pub drivers: Drivers,
    pub engine: EngineConfig,
    pub blobs: nagaya_blobs::Config,
    pub images: nagaya_image::Config,
    /// The keys and sections of this part, and of those below, stand beside the ones above.
    #[serde(skip)]
    pub daemon: nagaya_daemon::config::Config,
    #[serde(skip)]
    pub host: host::Config,
    #[serde(skip)]
    pub namespace: namespace::Config,
}

/// What runs sandboxes.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Drivers {
    /// The driver of sessions that ask for none. There is one, `namespace`.
    pub default: String,
}

/// What the command line and the environment say; it wins over the file.
#[derive(Debug, Default, Args)]
pub struct Flags {
    /// Address and port to listen on; port 0 picks a free one [default: 127.0.0.1:7070].
    #[arg(long, env = "NAGAYA_LISTEN")]
    listen: Option<SocketAddr>,
    /// Where everything that must survive is kept [default: /var/lib/nagaya].
    #[arg(long, env = "NAGAYA_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Configuration file (TOML).
    #[arg(long, env = "NAGAYA_CONFIG")]
    config: Option<PathBuf>,
    /// An API key to accept besides those made by the server.
    #[arg(long, env = "NAGAYA_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Address and port on which plain SSH is spoken too, for clients with a certificate.
    #[arg(long, env = "NAGAYA_SSH_LISTEN")]
    ssh_listen: Option<SocketAddr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: default_data_dir(),
            api_key: None,
            drivers: Drivers::default(),
            engine: EngineConfig::default(),
            blobs: nagaya_blobs::Config::default(),
            images: nagaya_image::Config::default(),
            daemon: nagaya_daemon::config::Config::default(),
            host: host::Config::default(),
            namespace: namespace::Config::default(),
        }
    }
}

impl Default for Drivers {
    fn default() -> Self {
        Self { default: NAMESPACE.into() }
    }
}

impl Config {
    /// Reads the file, if one is named, puts the flags on top and checks the values.
    pub fn load(flags: Flags) -> anyhow::Result<Self> {
        let mut config = match &flags.config {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("read configuration file {}", path.display()))?;
                Self::parse(&text).with_context(|| format!("parse configuration file {}", path.display()))?
            }
            None => Self::default(),
        };
        config.daemon.listen = flags.listen.unwrap_or(config.daemon.listen);
        config.data_dir = flags.data_dir.unwrap_or(config.data_dir);
        config.api_key = flags.api_key.or(config.api_key);
        config.daemon.ssh.listen = flags.ssh_listen.or(config.daemon.ssh.listen);
        config.validate().context("use configuration")?;
        Ok(config)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let show_line = |mut error: toml::de::Error| {
            error.set_input(Some(text));
            error
        };
        let mut file = DeTable::parse(text).map_err(show_line)?.into_inner();
        nagaya_daemon::config::bring_up_to_date(&mut file)?;
        Ok(Self::of_parts(file).map_err(show_line)?)
    }

    fn of_parts(mut file: DeTable<'_>) -> Result<Self, toml::de::Error> {
        let (daemon, host, namespace) = (part::take(&mut file)?, part::take(&mut file)?, part::take(&mut file)?);
        let own: Self = part::take(&mut file)?;
        part::refuse_rest(file, &Self::keys())?;
        Ok(Self { daemon, host, namespace, ..own })
    }

    /// What may stand at the top of the file.
    fn keys() -> Vec<&'static str> {
        let of_others = [
            part::keys::<nagaya_daemon::config::Config>(),
            part::keys::<host::Config>(),
            part::keys::<namespace::Config>(),
        ];
        [part::keys::<Self>()].into_iter().chain(of_others).flatten().copied().collect()
    }

    fn validate(&self) -> Result<(), SettingError> {
        self.daemon.validate()?;
        self.engine.validate()?;
        self.host.validate()?;
        self.blobs.validate()?;
        self.images.validate().map_err(|refused| SettingError::new(refused.key, refused.problem))
    }
}

fn default_data_dir() -> PathBuf {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let is_root = rustix::process::geteuid().is_root();
    match (std::env::var_os("XDG_DATA_HOME"), home) {
        (Some(data_home), _) if !is_root => PathBuf::from(data_home).join("nagaya"),
        (None, Some(home)) if !is_root => home.join(".local/share/nagaya"),
        _ => PathBuf::from("/var/lib/nagaya"),
    }
}
