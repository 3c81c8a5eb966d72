//! The limits of the listener and of messages on it.

use nagaya_engine::SettingError;
use serde::Deserialize;

const MIB: u32 = 1024 * 1024;

/// What every client meets, whatever it speaks.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Limits {
    /// Largest request or response message, bytes; also the largest file that ReadFile and WriteFile move in one piece.
    pub message_bytes_max: usize,
    /// Messages under way in the whole server, bytes: those that are read, made, or wait to be read by a client. An
    /// eighth is for messages of at most 64 KiB. At least twice message_bytes_max.
    pub bytes_under_way_max: usize,
    /// How long a message may wait for that.
    pub bytes_under_way_wait_ms: u64,
    /// What a client sends or takes at least of a message larger than 64 KiB, bytes per second; looked at once in
    /// request_body_idle_timeout_ms.
    pub message_bytes_per_s_min: u64,
    /// Connections that have shown a key, open at once; for a further one the longest idle is closed. Previews have
    /// `previews.connections_max` of their own.
    pub connections_max: usize,
    /// Connections that have shown no key yet, open at once, and the same for ports of previews; for a further one the
    /// oldest of the address with most of them is closed.
    pub strangers_max: usize,
    /// From the opening of a connection to its first request with a valid key, or to a preview.
    pub stranger_timeout_ms: u64,
    /// Calls at once on one HTTP/2 connection.
    pub streams_per_connection_max: u32,
    /// Header fields of one HTTP/2 request, bytes in sum; HTTP/1.1 has about 400 KiB and 100 fields.
    pub request_header_bytes_max: u32,
    /// From the opening of a connection, or the end of the last HTTP/1.1 exchange on it, to the end of the next
    /// request's header.
    pub request_header_timeout_ms: u64,
    /// For the TLS handshake.
    pub tls_handshake_timeout_ms: u64,
    /// Between two pieces of a request that is read as a whole.
    pub request_body_idle_timeout_ms: u64,
    /// How long the body of a refused request is read and thrown away, so that its sender gets to see the answer.
    pub refused_body_drain_ms: u64,
    /// A silent HTTP/2 connection is pinged this often, and the client of a host-port tunnel; after this long the
    /// kernel asks for the peer of any silent connection (TCP keepalive, in whole seconds).
    pub keep_alive_interval_ms: u64,
    /// How long a peer may take to answer that before it counts as gone.
    pub keep_alive_timeout_ms: u64,
    /// What an HTTP/2 peer may send ahead on one stream, bytes.
    pub stream_window_bytes: u32,
    /// What an HTTP/2 peer may send ahead on one connection, bytes.
    pub connection_window_bytes: u32,
    /// How long calls may go on after the server was told to stop.
    pub drain_timeout_ms: u64,
    /// How long a download URL of a snapshot may be opened.
    pub download_url_ttl_ms: u64,
    /// Downloads of snapshots at once, each of which holds a few MiB.
    pub downloads_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes_max: 128 * MIB as usize,
            bytes_under_way_max: 256 * MIB as usize,
            bytes_under_way_wait_ms: 20_000,
            message_bytes_per_s_min: 65_536,
            connections_max: 4096,
            strangers_max: 1024,
            stranger_timeout_ms: 10_000,
            streams_per_connection_max: 1000,
            request_header_bytes_max: 64 * 1024,
            request_header_timeout_ms: 30_000,
            tls_handshake_timeout_ms: 10_000,
            request_body_idle_timeout_ms: 30_000,
            refused_body_drain_ms: 10_000,
            keep_alive_interval_ms: 30_000,
            keep_alive_timeout_ms: 20_000,
            stream_window_bytes: 4 * MIB,
            connection_window_bytes: 16 * MIB,
            drain_timeout_ms: 10_000,
            download_url_ttl_ms: 900_000,
            downloads_max: 32,
        }
    }
}

impl Limits {
    /// Refuses what the protocols do not allow, and limits that let nothing through.
    pub(crate) fn validate(&self) -> Result<(), SettingError> {
        let refuse = |key, problem: &str| Err(SettingError::new(key, problem));
        if !(1024 * 1024..=i32::MAX as usize).contains(&self.message_bytes_max) {
            return refuse("limits.message_bytes_max", "must be between 1 MiB and 2 GiB");
        }
        if self.bytes_under_way_max < 2 * self.message_bytes_max {
            return refuse("limits.bytes_under_way_max", "must be at least twice limits.message_bytes_max");
        }
        for (key, window) in [
            ("limits.stream_window_bytes", self.stream_window_bytes),
            ("limits.connection_window_bytes", self.connection_window_bytes),
        ] {
            if !(65_535..=i32::MAX as u32).contains(&window) {
                return refuse(key, "must be between 65535 and 2147483647, as HTTP/2 has it");
            }
        }
        if !(4 * 1024..=MIB).contains(&self.request_header_bytes_max) {
            return refuse("limits.request_header_bytes_max", "must be between 4 KiB and 1 MiB");
        }
        SettingError::unless_positive(&[
            ("limits.connections_max", self.connections_max as u64),
            ("limits.bytes_under_way_wait_ms", self.bytes_under_way_wait_ms),
            ("limits.strangers_max", self.strangers_max as u64),
            ("limits.stranger_timeout_ms", self.stranger_timeout_ms),
            ("limits.streams_per_connection_max", self.streams_per_connection_max.into()),
            ("limits.request_header_timeout_ms", self.request_header_timeout_ms),
            ("limits.tls_handshake_timeout_ms", self.tls_handshake_timeout_ms),
            ("limits.request_body_idle_timeout_ms", self.request_body_idle_timeout_ms),
            ("limits.keep_alive_interval_ms", self.keep_alive_interval_ms),
            ("limits.keep_alive_timeout_ms", self.keep_alive_timeout_ms),
            ("limits.download_url_ttl_ms", self.download_url_ttl_ms),
            ("limits.downloads_max", self.downloads_max as u64),
        ])
    }
}
