//! What an operator may set about the host, whatever driver runs sandboxes on it.

use nagaya_engine::SettingError;
use serde::Deserialize;

use super::network::NetworkConfig;
use super::storage::Disks;

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

impl Config {
    /// Refuses what no host can be run with.
    pub fn validate(&self) -> Result<(), SettingError> {
        self.network.validate()
    }
}
