//! Real servers for tests, and a look at what they leave on the host. Never shipped.
//!
//! Everything here panics with a description instead of returning errors: a test that cannot start
//! its server has failed, and the description is what its author needs.

#![allow(clippy::unwrap_used)]

mod chance;
mod client;
mod leftovers;
mod server;
mod small_disk;
mod suite;

pub use chance::{fresh_seed, number, settle};
pub use client::{Client, Finished, Running, Sandbox, Wanted};
pub use leftovers::{Kind, Leftovers, leftovers};
pub use nagaya_runtime::host::{instance_name, storage_root};
pub use server::{Server, binary};
pub use small_disk::SmallDisk;
pub use suite::{NotRun, Outcome, Suite, run_in_own_network};
