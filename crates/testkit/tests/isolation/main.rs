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
mod scenarios;
mod world;

use std::process::{Command, ExitCode};

use nagaya_testkit::Suite;
use world::World;

const INSIDE: &str = "NAGAYA_ISOLATION_NAMESPACE";

fn main() -> ExitCode {
    let listing = std::env::args().any(|argument| argument == "--list");
    if !rustix::process::geteuid().is_root() || listing {
        let mut suite = Suite::start("isolation");
        for name in attempts::names().chain(scenarios::NAMES.iter().copied()) {
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
        let mut suite = Suite::start("isolation");
        let world = World::make().await;
        attempts::run(&mut suite, &world).await;
        scenarios::run(&mut suite, &world).await;
        world.close().await;
        suite.finish()
    })
}
