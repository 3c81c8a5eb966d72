//! The server from outside: a real socket, the generated clients and raw HTTP; behind the engine a
//! fake world. One binary, so that it links once.
#![allow(clippy::unwrap_used)]

mod control;
mod data;
mod dial;
mod download;
mod facts;
mod life;
mod listener;
mod preview_hosts;
mod previews;
mod run;
mod sessions;
mod snapshots;
mod support;
mod transports;
mod tunnel;
mod volumes;
