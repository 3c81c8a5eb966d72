//! `nagaya serve`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use nagaya_daemon::config::Config;
use tokio::signal::unix::{SignalKind, signal};

use crate::server::Server;

pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    crate::runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
        let server = Server::start(config).await?;
        if let Some(key) = &server.new_key {
            println!("new API key, also in {}: {key}", server.key_file.display());
        }
        println!("nagaya ready on {}", server.url());
        std::io::stdout().flush().context("write to standard output")?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; sandboxes live on");
        server.stop().await;
        Ok(ExitCode::SUCCESS)
    })
}
