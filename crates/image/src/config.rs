//! What an operator may set about images.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::reference::Reference;
use crate::unpack::Limits;

/// What the image is called that is made of the host's own programs. It is no image of the store.
pub const HOST_IMAGE: &str = "host";

/// When an image is fetched from its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum PullPolicy {
    /// Only when somebody pulls it.
    Never,
    /// When it is used and not on this host.
    #[default]
    Missing,
    /// Whenever it is used: the registry is asked what the name means now.
    Always,
}

/// Where images come from, and how large they may be.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Config {
    /// Short names, and the images that they stand for. `host` is the image that is made of this host's own programs.
    pub aliases: BTreeMap<String, String>,
    /// When an image is fetched: `never`, `missing` or `always`.
    pub pull: PullPolicy,
    /// Registries that images may come from, as `host` or `host:port`. Empty: all.
    pub registries_allowed: Vec<String>,
    /// Registries that are spoken to over plain HTTP. Everything can be read and changed on the way then, but for layers and manifests
    /// that are pinned by digest.
    pub registries_insecure: Vec<String>,
    /// Hosts that may have loopback, private or link-local addresses, as `host` or `host:port`: registries, and what they redirect to.
    /// Those of `registries_allowed` and `registries_insecure` may without being named here.
    pub private_hosts: Vec<String>,
    /// Docker's file with logins and credential helpers. Default: `.docker/config.json` in the home of the server's account.
    pub docker_config: Option<PathBuf>,
    /// Certificates in PEM form that are trusted beside those of the host. Default: none.
    pub ca_file: Option<PathBuf>,
    /// Layers of one image that are fetched at the same time.
    pub layers_at_once: usize,
    /// How long a connection may take to be made.
    pub connect_timeout_ms: u64,
    /// How long a registry may be silent within an answer.
    pub silence_timeout_ms: u64,
    /// How often a request is repeated that failed in a way that may pass, without anything having arrived.
    pub retries_max: u32,
    /// Before the first repetition; doubled for each further one, up to 30 seconds.
    pub retry_delay_ms: u64,
    /// The longest time to wait that a registry may ask for.
    pub retry_after_ms_max: u64,
    /// All layers of one image together, as its registry has them.
    pub image_mb_max: u64,
    /// The size of one layer as it is on disk.
    pub layer_mb_max: u64,
    /// Files, directories and links of one layer.
    pub layer_entries_max: u64,
    /// How much larger a layer may be than its compressed form, once it is larger than 1 GiB.
    pub compression_ratio_max: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            aliases: BTreeMap::from([("sandbox".to_owned(), HOST_IMAGE.to_owned())]),
            pull: PullPolicy::default(),
            registries_allowed: Vec::new(),
            registries_insecure: Vec::new(),
            private_hosts: Vec::new(),
            docker_config: None,
            ca_file: None,
            layers_at_once: 3,
            connect_timeout_ms: 10_000,
            silence_timeout_ms: 30_000,
            retries_max: 5,
            retry_delay_ms: 500,
            retry_after_ms_max: 120_000,
            image_mb_max: 64 << 10,
            layer_mb_max: 64 << 10,
            layer_entries_max: 1_000_000,
            compression_ratio_max: 200,
        }
    }
}

/// A value that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} {problem}")]
pub struct InvalidSetting {
    pub key: &'static str,
    pub problem: String,
}

impl Config {
    /// Refuses what cannot work, with its key.
    pub fn validate(&self) -> Result<(), InvalidSetting> {
        let positive = [
            ("images.layers_at_once", self.layers_at_once as u64),
            ("images.connect_timeout_ms", self.connect_timeout_ms),
            ("images.silence_timeout_ms", self.silence_timeout_ms),
            ("images.image_mb_max", self.image_mb_max),
            ("images.layer_mb_max", self.layer_mb_max),
            ("images.layer_entries_max", self.layer_entries_max),
            ("images.compression_ratio_max", self.compression_ratio_max),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(InvalidSetting { key, problem: "must not be 0".into() });
        }
        for (alias, meant) in &self.aliases {
            if meant != HOST_IMAGE && meant.parse::<Reference>().is_err() {
                let problem = format!("must name images, and {meant:?}, for {alias:?}, is no name of one");
                return Err(InvalidSetting { key: "images.aliases", problem });
            }
        }
        for (key, hosts) in [
            ("images.registries_allowed", &self.registries_allowed),
            ("images.registries_insecure", &self.registries_insecure),
            ("images.private_hosts", &self.private_hosts),
        ] {
            if let Some(host) = hosts.iter().find(|host| host.is_empty() || host.contains(['/', '@', ' '])) {
                let problem = format!("must be hosts with or without a port, and {host:?} is none");
                return Err(InvalidSetting { key, problem });
            }
        }
        Ok(())
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits {
            bytes_max: self.layer_mb_max.saturating_mul(1 << 20),
            entries_max: self.layer_entries_max,
            ratio_max: self.compression_ratio_max,
        }
    }

    pub(crate) fn is_insecure(&self, host: &str) -> bool {
        names(&self.registries_insecure, host)
    }

    pub(crate) fn is_allowed(&self, registry: &str) -> bool {
        self.registries_allowed.is_empty() || names(&self.registries_allowed, registry)
    }

    /// Whether this host, with its port where it has one, may have an inner address.
    pub(crate) fn may_be_inner(&self, host: &str) -> bool {
        [&self.registries_allowed, &self.registries_insecure, &self.private_hosts].iter().any(|list| names(list, host))
    }

    /// Doubled each time, with up to a quarter more, so that many that failed together do not return together.
    pub(crate) fn delay(&self, attempt: u32) -> Duration {
        let delay = self.retry_delay_ms.saturating_mul(1 << attempt.min(16)).min(30_000);
        Duration::from_millis(delay + fastrand::u64(0..=delay / 4))
    }
}

/// Whether a list names a host, with the port that it is asked for or without any.
fn names(list: &[String], host: &str) -> bool {
    let without_port = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    list.iter().any(|listed| listed.eq_ignore_ascii_case(host) || listed.eq_ignore_ascii_case(without_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_work_are_refused_with_their_key() {
        Config::default().validate().unwrap();
        let refused = Config { layers_at_once: 0, ..Config::default() }.validate().unwrap_err();
        assert_eq!(refused.to_string(), "images.layers_at_once must not be 0");
        let url = Config { private_hosts: vec!["http://x".into()], ..Config::default() }.validate().unwrap_err();
        assert_eq!(url.key, "images.private_hosts");
    }

    #[test]
    fn lists_name_hosts_with_one_port_or_with_any() {
        let list = ["a.example".to_owned(), "b.example:5000".to_owned(), "[::1]".to_owned()];
        for (host, named) in [
            ("a.example", true),
            ("A.example:443", true),
            ("b.example:5000", true),
            ("b.example", false),
            ("b.example:443", false),
            ("[::1]:80", true),
            ("x.a.example", false),
        ] {
            assert_eq!(names(&list, host), named, "{host}");
        }
    }
}
