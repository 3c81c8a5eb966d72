//! The messages of `proto/nagaya/agent/v1/agent.proto`, and how they are decoded.

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
