//! What the contract leaves to the server.

use nagaya_engine::SettingError;
use serde::Deserialize;

const MIB: u32 = 1024 * 1024;
const READ_CHUNK_BYTES_MAX: u32 = 8 * MIB;

/// For Tenki clients. These keys are read in `[limits]` too, where they once stood; the same one in both is refused.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Limits {
    /// How long CreateSession waits for RUNNING when it was not asked to wait, so that a fast sandbox is answered in
    /// one round trip.
    pub create_hold_ms: u64,
    /// How long before a call's deadline a held answer is given.
    pub deadline_margin_ms: u64,
    /// Announced to clients of Run as what they may send ahead on stdin, bytes.
    pub stdin_window_bytes: u32,
    /// Size of a ReadFileStream message where the client leaves it to the server, bytes.
    pub read_chunk_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { create_hold_ms: 50, deadline_margin_ms: 2_000, stdin_window_bytes: MIB, read_chunk_bytes: 512 * 1024 }
    }
}

impl Limits {
    /// Refuses pieces of files that are too small to be worth a message, or too large for one.
    pub(crate) fn validate(&self) -> Result<(), SettingError> {
        match self.read_chunk_bytes {
            1024..=READ_CHUNK_BYTES_MAX => Ok(()),
            _ => Err(SettingError::new("tenki.read_chunk_bytes", "must be between 1 KiB and 8 MiB")),
        }
    }
}
