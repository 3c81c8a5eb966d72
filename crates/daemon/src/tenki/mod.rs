//! The façade for Tenki clients: `tenki.sandbox.v1` over gRPC, gRPC-Web and Connect.
//!
//! It translates and decides nothing: what is allowed, what exists and what happens is the
//! engine's. What it has of its own is the wire: who called, how large a message may be, which
//! frame may follow which. Rpcs that are not built yet answer `unimplemented` inside a normal
//! response, never an HTTP 404, which clients take for a route that is not ready.

mod answers;
mod certificate;
mod control;
mod data;
mod dial;
mod facade;
mod files;
mod git;
mod limits;
mod messages;
mod ports;
mod previews;
mod ranges;
mod resources;
mod run;
mod service;
#[rustfmt::skip]
mod services;
mod settings;
mod snapshots;
mod ssh;
mod tunnel;
mod volumes;
mod wait;
mod zero_copy;

/// What this family calls the user that commands run as.
pub(crate) const USER_NAME: &str = "tenki";

pub(crate) use facade::{Dependencies, TenkiFacade};
pub use limits::Limits;
