//! Bytes to and from sandboxes: previews in browsers, and SSH. Decides nothing about sessions: the engine does.

pub mod preview;
pub mod ssh;
pub mod strict;
mod traffic;

pub use traffic::Traffic;
