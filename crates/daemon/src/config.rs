//! What an operator may set about the listener and what is spoken on it.

use std::net::SocketAddr;

use nagaya_engine::SettingError;
pub use nagaya_gateway::config::{PreviewsConfig, SshConfig, TlsConfig};
use serde::{Deserialize, Deserializer};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use crate::tenki::Limits as TenkiLimits;
pub use crate::wire::limits::Limits;

/// The keys and sections about the listener.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Config {
    /// Address and port of the one listener; port 0 picks a free one.
    pub listen: SocketAddr,
    /// The URL under which clients reach this server, where that is not the one they called, e.g.
    /// behind a proxy that terminates TLS. Scheme and authority only. Default: the one they called.
    #[serde(deserialize_with = "url")]
    pub public_url: Option<String>,
    /// Previews have host names of one label below this domain, on the one listener; `*.DOMAIN` must lead here. Default:
    /// none, and each preview has a port of its own on the machine's loopback.
    #[serde(deserialize_with = "lower_case")]
    pub preview_domain: Option<String>,
    /// Serves TLS instead of clear text, with files in PEM form.
    pub tls: Option<TlsConfig>,
    pub limits: Limits,
    pub tenki: TenkiLimits,
    pub previews: PreviewsConfig,
    pub ssh: SshConfig,
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
            public_url: None,
            preview_domain: None,
            tls: None,
            limits: Limits::default(),
            tenki: TenkiLimits::default(),
            previews: PreviewsConfig::default(),
            ssh: SshConfig::default(),
        }
    }
}

impl Config {
    /// Refuses what cannot be served.
    pub fn validate(&self) -> Result<(), SettingError> {
        if self.public_url.as_ref().is_some_and(|url| !is_origin(url)) {
            return Err(SettingError::new("public_url", "must be http:// or https:// with a host, and no path"));
        }
        self.validate_previews()?;
        self.limits.validate()?;
        self.tenki.validate()?;
        self.ssh.validate()
    }

    fn validate_previews(&self) -> Result<(), SettingError> {
        let refuse = |key, problem: &str| Err(SettingError::new(key, problem));
        self.previews.validate()?;
        let Some(domain) = &self.preview_domain else {
            return match self.previews.tls {
                Some(_) => refuse("previews.tls", "needs preview_domain"),
                None => Ok(()),
            };
        };
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
}

/// Moves what stands in `[limits]` as it once did to where it stands now.
pub fn bring_up_to_date(file: &mut DeTable<'_>) -> Result<(), SettingError> {
    for (name, key) in ONCE_IN_LIMITS {
        let Some(DeValue::Table(limits)) = file.get_mut("limits").map(Spanned::as_mut) else { break };
        let Some((name, value)) = limits.remove_entry(name) else { continue };
        let empty = || Spanned::new(name.span(), DeValue::Table(DeTable::new()));
        let tenki = file.entry(Spanned::new(name.span(), "tenki".into())).or_insert_with(empty);
        // What is no table is refused as such.
        let DeValue::Table(tenki) = tenki.as_mut() else { break };
        if tenki.insert(name, value).is_some() {
            return Err(SettingError::new(key, "stands in [limits] too; keep the one in [tenki]"));
        }
    }
    Ok(())
}

/// A URL without the slash at its end.
fn url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let url = Option::<String>::deserialize(deserializer)?;
    Ok(url.map(|url| url.trim_end_matches('/').to_owned()))
}

fn lower_case<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    Ok(text.map(|text| text.to_ascii_lowercase()))
}

fn is_origin(url: &str) -> bool {
    url.parse::<http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.authority().is_some_and(|authority| !authority.host().is_empty())
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none()
    })
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
