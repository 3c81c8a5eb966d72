//! `nagaya serve`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;
use crate::output;
use crate::server::Server;

/// How long the end of a server may take beyond `drain_timeout_ms`. Sandboxes do not need it: the next start takes them over,
/// however this one ended.
const END_MAX: Duration = Duration::from_secs(30);

pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    let end_max = Duration::from_millis(config.daemon.limits.drain_timeout_ms) + END_MAX;
    let runtime = crate::runtime()?;
    let served = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let server = tokio::select! {
            started = Server::start(config) => started?,
            // One that cannot get ready can be stopped all the same.
            _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
            _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
        };
        if let Some(key) = &server.new_key {
            output::announce(format_args!("new API key, also in {}: {key}", server.key_file.display()));
        }
        output::announce(format_args!("nagaya ready on {}", server.url()));
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; sandboxes live on");
        end_after(end_max);
        server.stop().await;
        Ok(ExitCode::SUCCESS)
    });
    // What still blocks is waited for only so long.
    runtime.shutdown_timeout(crate::RUNTIME_END_MAX);
    served
}

/// Ends the process for good when its orderly end takes longer than this, whatever it waits for.
fn end_after(limit: Duration) {
    let watch = std::thread::Builder::new().name("end".into()).spawn(move || {
        std::thread::sleep(limit);
        tracing::error!(
            ?limit,
            "the server did not come to an orderly end in time; it ends now, and sandboxes live on"
        );
        output::flush_log();
        std::process::exit(i32::from(nagaya_api::error::Code::Draining.exit_code()));
    });
    if let Err(error) = watch {
        tracing::warn!(%error, "nothing watches over the end of the server");
    }
}
