//! What can go wrong around a server and its sandboxes: records that are lost, processes that hang, output that nobody takes,
//! disks that are full. Afterwards nothing may be lost, and every way on must be open.
//!
//! The suite runs in a network namespace of its own: names of servers' packet rules are shared on a host.

#![allow(clippy::unwrap_used)]

mod full_disk;
mod hung;
mod lost_records;
mod printing;

use std::process::ExitCode;

use nagaya_testkit::run_in_own_network;

/// The cases of one file.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        pub async fn run(suite: &mut nagaya_testkit::Suite) {
            $(suite.case(stringify!($name), $name()).await;)*
        }
    };
}

fn main() -> ExitCode {
    let names = [lost_records::NAMES, hung::NAMES, printing::NAMES, full_disk::NAMES].concat();
    run_in_own_network("faults", names.into_iter(), async |suite| {
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        lost_records::run(suite).await;
        hung::run(suite).await;
        printing::run(suite).await;
        full_disk::run(suite).await;
    })
}
