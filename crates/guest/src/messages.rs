//! The messages of `proto/nagaya/agent/v1/agent.proto`, and how they are decoded.

use std::net::{IpAddr, SocketAddr};

use buffa::{DecodeOptions, Message};
use bytes::Bytes;

mod generated {
    #![allow(warnings, clippy::all, clippy::unwrap_used)]
    include!("gen/nagaya.agent.v1.rs");
}

pub use generated::*;

/// Lists in one message take at most this much memory when decoded, bytes.
const ELEMENT_MEMORY_MAX: usize = 8 * 1024 * 1024;

/// The bytes are not the expected message, or it is too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("decode message: malformed or too large")]
pub struct MalformedMessage;

/// Decodes a message from hostile bytes. Fields this side does not know are skipped.
pub fn decode<M: Message>(bytes: &[u8]) -> Result<M, MalformedMessage> {
    DecodeOptions::new()
        .with_recursion_limit(8)
        .with_max_message_size(crate::frame::OPEN_BYTES_MAX)
        .with_unknown_field_limit(1024)
        .with_element_memory_limit(ELEMENT_MEMORY_MAX)
        .decode_from_slice(bytes)
        .map_err(|_| MalformedMessage)
}

/// Encodes a message for the payload of a frame.
pub fn encode(message: &impl Message) -> Bytes {
    message.encode_to_bytes()
}

/// The bytes of an address, as messages have it.
pub fn ip_bytes(ip: IpAddr) -> Bytes {
    match ip {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

/// The address and port of a message, which may hold anything.
pub fn socket_address(ip: &[u8], port: u32) -> Option<SocketAddr> {
    let ip = match ip.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(ip).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(ip).ok()?),
    };
    Some(SocketAddr::new(ip, u16::try_from(port).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood_and_nothing_else() {
        for text in ["127.0.0.1:80", "0.0.0.0:0", "[::1]:65535", "[2001:db8::7]:1"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(socket_address(&ip_bytes(address.ip()), address.port().into()), Some(address));
        }
        for length in [0, 3, 5, 15, 17, 1 << 20] {
            assert_eq!(socket_address(&vec![127; length], 80), None, "{length} bytes");
        }
        for port in [65_536, 65_536 + 80, u32::MAX] {
            assert_eq!(socket_address(&[127, 0, 0, 1], port), None, "port {port}");
        }
    }
}
