//! The server around the engine: configuration, the one listener, the wire façades, metrics.
//!
//! A façade translates between its clients' protocol and the engine and decides nothing. Nothing
//! here knows a driver, an isolation technology or a database.

mod budget;
pub mod config;
mod download;
mod facade;
pub mod host;
mod metrics;
mod server;
mod tenki;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nagaya_engine::Engine;
use nagaya_gateway::preview::{self, Proxy};
use nagaya_gateway::ssh::{SshLimits, SshServer};

use budget::Budget;
pub use budget::GiveBack;
use config::Config;
use download::Downloads;
pub use metrics::{Level, Levels};
use metrics::{Metrics, Sources};
use server::Server;
use server::routes::Routes;
pub use server::tls::TlsError;
pub use server::{ListenError, Listeners};
use wire::lifecycle::{Lifecycle, Phase};

/// What parts below the engine contribute to the server's surface.
#[derive(Default)]
pub struct Hooks {
    /// Read at every scrape of `/metrics`: how many resources are ready in each pool.
    pub pools: Option<Levels>,
    /// Whose ingress the engine was given. Without it the server opens its own, and previews are not reached.
    pub listeners: Option<Listeners>,
    /// Called a moment after large messages.
    pub give_back: Option<GiveBack>,
}

/// A running server.
pub struct Daemon {
    server: Server,
    previews: Arc<Proxy<Engine>>,
    ssh: SshServer,
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
        let lifecycle = Lifecycle::new();
        let downloads = Arc::new(Downloads::new(engine.clone(), Arc::clone(&lifecycle), &config.limits));
        let ssh = SshServer::start(engine.clone(), ssh_limits(&config.ssh)).await.map_err(ListenError::Ssh)?;
        let ssh_address = match config.ssh.listen {
            Some(address) => Some(ssh.listen(address).await.map_err(|source| ListenError::Bind { address, source })?),
            None => None,
        };
        if let Some(address) = ssh_address {
            tracing::info!(%address, host_key = ssh.host_key_fingerprint(), "speaking SSH");
        }
        let previews =
            Proxy::start(Arc::new(engine.clone()), config.preview_domain.as_deref(), proxy_settings(&config.previews));
        let stopping = engine.clone();
        let metrics = Arc::new(Metrics::new(Sources {
            sessions: Some(sessions),
            pools: hooks.pools,
            source_stops_us: Some(Box::new(move || stopping.take_source_stops())),
            previews: Some(Arc::clone(&previews)),
            ssh: Some(Arc::clone(ssh.traffic())),
        }));
        let budget = Budget::new(&config.limits, hooks.give_back);
        let tenki = tenki::TenkiFacade::new(tenki::Dependencies {
            budget,
            engine: engine.clone(),
            engine_config: config.engine.clone(),
            limits: config.limits.clone(),
            public_url: config.public_url.clone(),
            metrics: Arc::clone(&metrics),
            lifecycle: Arc::clone(&lifecycle),
            downloads: Arc::clone(&downloads),
            ssh: ssh.clone(),
            ssh_address,
        });
        let routes = Routes {
            facades: vec![Box::new(tenki)],
            downloads,
            previews: Arc::clone(&previews),
            lifecycle: Arc::clone(&lifecycle),
            metrics: Arc::clone(&metrics),
        };
        let listeners = match hooks.listeners {
            Some(listeners) => listeners,
            None => Listeners::open(config).await?,
        };
        let server = Server::start(config, listeners, routes, Arc::clone(&lifecycle), metrics)?;
        lifecycle.advance(Phase::Serving);
        let drain_timeout = Duration::from_millis(config.limits.drain_timeout_ms);
        Ok(Self { server, previews, ssh, engine, drain_timeout })
    }

    /// Where it listens; tells the port when the configuration asked for a free one.
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// Stops in an orderly way: accepts nothing new, finishes calls for at most
    /// `drain_timeout_ms`, ends long streams, then stops the engine. Sandboxes keep running.
    pub async fn shut_down(self) {
        self.previews.stop();
        tokio::join!(self.ssh.shut_down(), self.server.shut_down(self.drain_timeout));
        self.engine.shut_down().await;
    }
}

fn ssh_limits(config: &config::Ssh) -> SshLimits {
    SshLimits {
        connections_max: config.connections_max,
        logins_max: config.logins_max,
        login_timeout: Duration::from_millis(config.login_timeout_ms),
        channels_per_connection_max: config.channels_per_connection_max,
        certificate_ttl_default: Duration::from_millis(config.certificate_ttl_ms),
        certificate_ttl_max: Duration::from_millis(config.certificate_ttl_max_ms),
    }
}

fn proxy_settings(config: &config::Previews) -> preview::Settings {
    preview::Settings {
        connect_timeout: Duration::from_millis(config.connect_timeout_ms),
        answer_timeout: Duration::from_millis(config.answer_timeout_ms),
        exchanges_max: config.exchanges_max,
        idle_connections_max: config.idle_connections_max,
        idle_timeout: Duration::from_millis(config.idle_timeout_ms),
        own_cookies: &tenki::COOKIE_NAMES,
    }
}
