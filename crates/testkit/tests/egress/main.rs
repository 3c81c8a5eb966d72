//! Where sandboxes may go: allow-lists of names and networks, their name server, and the log of connections.
//!
//! The suite runs in a network namespace of its own with a second one behind it, which has addresses that
//! look public, a name server that lies where it should, and echoes. No packet leaves the machine.

#![allow(clippy::unwrap_used)]

mod kept;
mod lists;
mod resolving;
mod world;

use std::process::{Command, ExitCode};

use nagaya_testkit::Suite;
use world::World;

const INSIDE: &str = "NAGAYA_EGRESS_NAMESPACE";

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
    let listing = std::env::args().any(|argument| argument == "--list");
    if !rustix::process::geteuid().is_root() || listing {
        let mut suite = Suite::start("egress");
        for name in [lists::NAMES, resolving::NAMES, kept::NAMES].concat() {
            if listing {
                println!("{name}: test");
            } else {
                suite.skip(name, "only root can start the namespace driver");
            }
        }
        return suite.finish();
    }
    if std::env::var_os(INSIDE).is_none() {
        let status = Command::new("unshare")
            .args(["--net", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(std::env::args_os().skip(1))
            .env(INSIDE, "1")
            .status()
            .unwrap();
        return if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut suite = Suite::start("egress");
        let mut world = World::make();
        lists::run(&mut suite, &mut world).await;
        resolving::run(&mut suite, &mut world).await;
        kept::run(&mut suite, &mut world).await;
        world.close();
        suite.finish()
    })
}
