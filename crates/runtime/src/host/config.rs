//! What an operator may set about the host, whatever driver runs sandboxes on it.

use std::net::{IpAddr, SocketAddr};

use nagaya_engine::SettingError;
use serde::{Deserialize, Deserializer};

use super::network::{Cidr, is_range};

/// The sections about the host.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Config {
    pub network: NetworkConfig,
    // The section has its name from the driver that was there first.
    #[serde(rename = "namespace")]
    pub limits: Limits,
    pub disks: Disks,
}

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

/// What sandboxes may take of the host, and what is left to it.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Limits {
    /// Sandboxes that can exist at once, those of the pools included; at most 4096.
    pub slots_max: u32,
    /// Processes and threads of one sandbox.
    pub processes_max: u64,
    /// Output of commands in the background that one sandbox keeps on its disk for its readers; the oldest goes first.
    pub kept_output_mb_max: u64,
    /// How long such output is kept after the command has ended; one minute once it was read.
    pub kept_output_minutes_max: u64,
    /// Free space below which no sandbox is made, of the pool of disks where there is one, else of the data directory's
    /// file system; also what the pool leaves to the host when it grows.
    pub disk_free_mb_min: u64,
    /// Available memory of the host below which no sandbox is made.
    pub memory_available_mb_min: u64,
    /// Available memory of the host below which paused sandboxes give up theirs and keep their disks only,
    /// the longest paused first.
    pub memory_low_mb: u64,
    /// Switch the host's cgroups to fast moves of processes (`favordynmods`), which saves some 8 ms
    /// for each command and stays on for the whole host.
    pub favor_cgroup_moves: bool,
}

/// Where disks, volumes and snapshots lie. Decided when a data directory is used for the first time.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Disks {
    /// Whether a new data directory gets a pool of disks. One that is filled faster than it grows gives its sandboxes errors
    /// that the host's own file system would not.
    pub pool: DiskPool,
    /// What a pool begins with; at most half of what the host has left. It grows by itself.
    pub pool_first_mb: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "schema", derive(serde::Serialize, schemars::JsonSchema))]
pub enum DiskPool {
    /// Where the data directory's file system shares no blocks between copies, disks lie in a pool: an XFS file system in a
    /// file.
    Auto,
    /// Disks are plain files always.
    Off,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { outbound: true, cidr: None, allow: Vec::new(), name_server: None, connections_max: 4_096 }
    }
}

impl Default for Limits {
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

impl Default for Disks {
    fn default() -> Self {
        Self { pool: DiskPool::Off, pool_first_mb: 4_096 }
    }
}

impl Config {
    /// Refuses what no host can be run with.
    pub fn validate(&self) -> Result<(), SettingError> {
        if let Some(bad) = self.network.allow.iter().find(|text| !is_range(text)) {
            let allowed = "is neither an IPv4 address, nor a network such as 10.1.2.0/24, nor FIRST-LAST";
            return Err(SettingError::new("network.allow", format!("{bad:?} {allowed}")));
        }
        SettingError::unless_positive(&[("network.connections_max", self.network.connections_max.into())])
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
