//! Real servers for tests, and a look at what they leave on the host. Never shipped.
//!
//! Everything here panics with a description instead of returning errors: a test that cannot start
//! its server has failed, and the description is what its author needs.

#![allow(clippy::unwrap_used)]

mod leftovers;
mod server;

pub use leftovers::{Kind, Leftovers, leftovers};
pub use server::{Server, binary};
