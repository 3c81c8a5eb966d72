//! What an operator may set about the network.

use std::net::{IpAddr, SocketAddr};

use nagaya_engine::SettingError;
use serde::{Deserialize, Deserializer};

use super::{Cidr, ranges};

/// The network of the sandboxes.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NetworkConfig {
    /// False: no sandbox gets a way out, and asking for one is an error.
    pub outbound: bool,
    /// Addresses for sandboxes, e.g. `10.213.0.0/16`. Default: a /16 of 10.192.0.0/10 that the host
    /// has no route into, chosen at the first start and kept in the data directory.
    #[cfg_attr(feature = "schema", schemars(with = "Option<String>"))]
    pub cidr: Option<Cidr>,
    /// Private networks that sandboxes may reach although they are denied by default, e.g. `10.1.2.0/24`.
    pub allow: Vec<String>,
    /// Who answers sandboxes' questions for names, e.g. `9.9.9.9` or `127.0.0.1:5353`. Default: whom the host asks.
    #[serde(deserialize_with = "name_server")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<SocketAddr>"))]
    pub name_server: Option<SocketAddr>,
    /// Connections to the outside that one sandbox may have at a time; it begins a twentieth of them per second, after
    /// all of them at once. No more than a 64th of the host's table of connections (`nf_conntrack_max`).
    pub connections_max: u32,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { outbound: true, cidr: None, allow: Vec::new(), name_server: None, connections_max: 4_096 }
    }
}

impl NetworkConfig {
    /// Refuses what cannot be allowed, and a limit that lets nothing through.
    pub(crate) fn validate(&self) -> Result<(), SettingError> {
        if let Some(bad) = self.allow.iter().find(|text| ranges::parse(text).is_none()) {
            let allowed = "is neither an IPv4 address, nor a network such as 10.1.2.0/24, nor FIRST-LAST";
            return Err(SettingError::new("network.allow", format!("{bad:?} {allowed}")));
        }
        SettingError::unless_positive(&[("network.connections_max", self.connections_max.into())])
    }
}

/// An address, with port 53 unless it names another.
fn name_server<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    let address = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::from((ip, 53))));
    let refused =
        |_| serde::de::Error::custom(format_args!("network.name_server {text:?} is neither ADDRESS nor ADDRESS:PORT"));
    address.map(Some).map_err(refused)
}
