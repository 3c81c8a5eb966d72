//! Where sandboxes may go: allow-lists of names and networks, their name server, and the log of connections.
//!
//! The suite runs in a network namespace of its own with a second one behind it, which has addresses that
//! look public, a name server that lies where it should, and echoes. No packet leaves the machine.

#![allow(clippy::unwrap_used)]

mod kept;
mod lists;
mod resolving;
mod shares;
mod world;

use std::process::ExitCode;

use nagaya_testkit::run_in_own_network;
use world::World;

/// The cases of one file.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        pub async fn run(suite: &mut nagaya_testkit::Suite, world: &mut $crate::world::World) {
            $(suite.case(stringify!($name), $name(world)).await;)*
        }
    };
}

fn main() -> ExitCode {
    let names = [lists::NAMES, resolving::NAMES, shares::NAMES, kept::NAMES].concat();
    run_in_own_network("egress", names.into_iter(), async |suite| {
        let mut world = World::make();
        lists::run(suite, &mut world).await;
        resolving::run(suite, &mut world).await;
        shares::run(suite, &mut world).await;
        kept::run(suite, &mut world).await;
        world.close();
    })
}
