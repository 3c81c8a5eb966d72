//! The client against a real server with real sandboxes.

#![allow(clippy::unwrap_used)]

mod commands;
mod examples;
mod files;
mod interrupted;
mod network;
mod recorded;
mod resources;
mod sessions;
mod world;

use std::process::ExitCode;

use nagaya_testkit::Suite;
use world::World;

/// The cases of one file.
#[macro_export]
macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        pub async fn run(suite: &mut nagaya_testkit::Suite, world: &$crate::world::World) {
            $(suite.case(stringify!($name), async { $name(world).await; Ok(()) }).await;)*
        }
    };
}

fn main() -> ExitCode {
    let listing = std::env::args().any(|argument| argument == "--list");
    // Only root has this user id; the server makes sandboxes for root only.
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if !is_root || listing {
        let mut suite = Suite::start("client");
        let all = [
            examples::NAMES,
            sessions::NAMES,
            commands::NAMES,
            files::NAMES,
            network::NAMES,
            resources::NAMES,
            recorded::NAMES,
            interrupted::NAMES,
        ];
        for name in all.concat() {
            if listing {
                println!("{name}: test");
            } else {
                suite.skip(name, "only root can start the namespace driver");
            }
        }
        return suite.finish();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut suite = Suite::start("client");
        let world = World::make().await;
        examples::run(&mut suite, &world).await;
        sessions::run(&mut suite, &world).await;
        commands::run(&mut suite, &world).await;
        files::run(&mut suite, &world).await;
        network::run(&mut suite, &world).await;
        resources::run(&mut suite, &world).await;
        recorded::run(&mut suite, &world).await;
        interrupted::run(&mut suite, &world).await;
        suite.finish()
    })
}
