//! Named attempts to get out of a sandbox, or to see too much from within; one that succeeds fails
//! the build.
//!
//! Every attempt is a payload in `payloads/`, run in a real sandbox of a real server, once as
//! `tenki` and once as root. Every one has a control: the same payload where it must get through
//! (on the host, on something of its own, in the sandbox that is being attacked). A payload that
//! gets through nowhere would prove nothing.
//!
//! The suite runs in a network namespace of its own, so that it can play cloud metadata services
//! and private networks without touching the host's network. Server, host and attacker's targets
//! are all in it.

#![allow(clippy::unwrap_used)]

mod attempts;
mod host;
mod resources;
mod scenarios;
mod world;

use std::process::ExitCode;

use nagaya_testkit::run_in_own_network;
use world::World;

fn main() -> ExitCode {
    let names = attempts::names().chain(resources::names()).chain(scenarios::NAMES.iter().copied());
    run_in_own_network("isolation", names, async |suite| {
        let world = World::make().await;
        attempts::run(suite, &world).await;
        resources::run(suite, &world).await;
        scenarios::run(suite, &world).await;
        world.close().await;
    })
}
