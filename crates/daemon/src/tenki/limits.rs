//! What the contract leaves to the server.

use serde::Deserialize;

const MIB: u32 = 1024 * 1024;

/// For Tenki clients.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// How long CreateSession waits for RUNNING when it was not asked to wait, so that a fast
    /// sandbox is answered in one round trip. Default 50.
    pub create_hold_ms: u64,
    /// How long before a call's deadline a held answer is given. Default 2,000.
    pub deadline_margin_ms: u64,
    /// Announced to clients of Run as what they may send ahead on stdin, bytes. Default 1 MiB.
    pub stdin_window_bytes: u32,
    /// Size of a ReadFileStream message where the client leaves it to the server, bytes.
    /// Default 512 KiB.
    pub read_chunk_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { create_hold_ms: 50, deadline_margin_ms: 2_000, stdin_window_bytes: MIB, read_chunk_bytes: 512 * 1024 }
    }
}

impl Limits {
    /// The first key with a value that cannot be used, and why not.
    pub(crate) fn problem(&self) -> Option<(&'static str, &'static str)> {
        let usable = (1024..=8 * MIB).contains(&self.read_chunk_bytes);
        (!usable).then_some(("tenki.read_chunk_bytes", "must be between 1 KiB and 8 MiB"))
    }
}
