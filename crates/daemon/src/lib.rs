//! The server around the engine: configuration, the one listener, the wire façades, metrics.
//!
//! A façade translates between its clients' protocol and the engine and decides nothing. Nothing
//! here knows a driver, an isolation technology or a database.

pub mod config;
mod download;
pub mod host;
mod metrics;
mod server;
mod tenki;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nagaya_engine::Engine;

use config::Config;
use download::Downloads;
pub use metrics::{Level, Levels};
use metrics::{Metrics, Sources};
pub use server::ListenError;
use server::Server;
use server::lifecycle::{Lifecycle, Phase};
use server::routes::Routes;
pub use server::tls::TlsError;

/// What parts below the engine contribute to the server's surface.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Read at every scrape of `/metrics`: how many resources are ready in each pool.
    pub pools: Option<Levels>,
}

/// A running server.
pub struct Daemon {
    server: Server,
    engine: Engine,
    drain_timeout: Duration,
}

impl Daemon {
    /// Listens, and answers with the engine, which has recovered already. From here on the server
    /// is ready. Fails when the address cannot be bound or the certificate cannot be used.
    pub async fn start(config: &Config, engine: Engine, hooks: Hooks) -> Result<Self, ListenError> {
        let counted = engine.clone();
        let sessions: Levels = Arc::new(move || {
            let level = |(name, value): (&str, u64)| Level {
                name: name.into(),
                value: i64::try_from(value).unwrap_or(i64::MAX),
            };
            counted.session_counts().into_iter().map(level).collect()
        });
        let stopping = engine.clone();
        let metrics = Arc::new(Metrics::new(Sources {
            sessions: Some(sessions),
            pools: hooks.pools,
            source_stops_us: Some(Box::new(move || stopping.take_source_stops())),
        }));
        let lifecycle = Lifecycle::new();
        let downloads = Arc::new(Downloads::new(engine.clone(), Arc::clone(&lifecycle), &config.limits));
        let tenki = tenki::Facade::new(tenki::Parts {
            engine: engine.clone(),
            engine_config: config.engine.clone(),
            limits: config.limits.clone(),
            public_url: config.public_url.clone(),
            metrics: Arc::clone(&metrics),
            lifecycle: Arc::clone(&lifecycle),
            downloads: Arc::clone(&downloads),
        });
        let routes = Routes { tenki, downloads, lifecycle: Arc::clone(&lifecycle), metrics: Arc::clone(&metrics) };
        let server = Server::start(
            config.listen,
            config.tls.as_ref(),
            config.limits.clone(),
            routes,
            Arc::clone(&lifecycle),
            metrics,
        )
        .await?;
        lifecycle.advance(Phase::Serving);
        let drain_timeout = Duration::from_millis(config.limits.drain_timeout_ms);
        Ok(Self { server, engine, drain_timeout })
    }

    /// Where it listens; tells the port when the configuration asked for a free one.
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Stops in an orderly way: accepts nothing new, finishes calls for at most
    /// `drain_timeout_ms`, ends long streams, then stops the engine. Sandboxes keep running.
    pub async fn shut_down(self) {
        self.server.shut_down(self.drain_timeout).await;
        self.engine.shut_down().await;
    }
}
