//! Bytes to and from sandboxes: previews in browsers, and SSH; and who has a place to send them. Decides nothing about sessions: the engine does.

pub mod config;
pub mod places;
pub mod preview;
pub mod ssh;
pub mod strict;
mod traffic;

pub use traffic::Traffic;
