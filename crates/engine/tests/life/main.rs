//! What callers may rely on about the life of sessions and what they keep, one promise per test, and
//! every workflow run with a failure at each of its steps, each step repeated, and a crash after each.

// On a paused runtime tokio's time is virtual, and is what the fake clock shows.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

#[path = "../common/audit.rs"]
mod audit;
mod drivers;
mod egress;
mod events;
mod forks;
mod images;
mod names;
mod pause;
mod preview_workflows;
mod previews;
mod recovery;
mod snapshots;
mod steps;
mod support;
mod volumes;
mod workflows;
