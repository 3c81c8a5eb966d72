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
mod nagaya;
mod rpc;
mod server;
mod tenki;
mod waiting;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nagaya_engine::Engine;
use nagaya_gateway::preview::Proxy;
use nagaya_gateway::ssh::SshServer;

use budget::Budget;
pub use budget::GiveBack;
use config::Config;
use download::Downloads;
use facade::Facade;
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
        Self::start_with(config, engine, hooks, Vec::new()).await
    }

    async fn start_with(
        config: &Config,
        engine: Engine,
        hooks: Hooks,
        mut facades: Vec<Box<dyn Facade>>,
    ) -> Result<Self, ListenError> {
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
        let ssh =
            SshServer::start(engine.clone(), config.ssh.clone(), tenki::USER_NAME).await.map_err(ListenError::Ssh)?;
        let ssh_address = match config.ssh.listen {
            Some(address) => Some(ssh.listen(address).await.map_err(|source| ListenError::Bind { address, source })?),
            None => None,
        };
        if let Some(address) = ssh_address {
            tracing::info!(%address, host_key = ssh.host_key_fingerprint(), "speaking SSH");
        }
        let previews = Proxy::start(
            Arc::new(engine.clone()),
            config.preview_domain.as_deref(),
            config.previews.clone(),
            &rpc::auth::COOKIE_NAMES,
        );
        let stopping = engine.clone();
        let metrics = Arc::new(Metrics::new(Sources {
            sessions: Some(sessions),
            pools: hooks.pools,
            source_stops_us: Some(Box::new(move || stopping.take_source_stops())),
            previews: Some(Arc::clone(&previews)),
            ssh: Some(Arc::clone(ssh.traffic())),
        }));
        let shared = rpc::service::Shared {
            limits: config.limits.clone(),
            metrics: Arc::clone(&metrics),
            lifecycle: Arc::clone(&lifecycle),
            budget: Budget::new(
                config.limits.bytes_under_way_max,
                Duration::from_millis(config.limits.bytes_under_way_wait_ms),
                hooks.give_back,
            ),
        };
        let tenki = tenki::TenkiFacade::new(tenki::Dependencies {
            shared: shared.clone(),
            limits: config.tenki.clone(),
            engine: engine.clone(),
            public_url: config.public_url.clone(),
            downloads: Arc::clone(&downloads),
            ssh: ssh.clone(),
            ssh_address,
        });
        // The list of client families.
        facades.push(Box::new(tenki));
        // Forks are held back as long as creations.
        let create_hold = Duration::from_millis(config.tenki.create_hold_ms);
        facades.push(Box::new(nagaya::NagayaFacade::new(engine.clone(), shared, create_hold)));
        let routes = Routes {
            facades,
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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use http::{Request, Response, header};
    use hyper::body::Incoming;
    use nagaya_engine::fake;
    use nagaya_engine::{EngineConfig, NewSession};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::facade::Answer;
    use crate::wire::body::ResponseBody;
    use crate::wire::connection::Via;

    /// Tells what a file of a session holds, to whoever has a key: a family of clients of another kind.
    struct Reader(Engine);

    impl Facade for Reader {
        fn claims(&self, path: &str) -> bool {
            path.starts_with("/reader/")
        }

        fn call<'a>(&'a self, request: Request<Incoming>, _: Via<'a>) -> Answer<'a> {
            Box::pin(async move {
                let text = self.read(&request).await.unwrap_or_else(|error| error.code.name().to_owned());
                Response::new(ResponseBody::text(text))
            })
        }

        fn services(&self) -> &'static [&'static str] {
            &[]
        }

        fn paths(&self) -> &'static [&'static str] {
            &["GET /reader/SESSION"]
        }
    }

    impl Reader {
        async fn read(&self, request: &Request<Incoming>) -> Result<String, nagaya_api::error::Error> {
            let key = request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap_or_default());
            let caller = self.0.authenticate(key.unwrap_or_default())?;
            let id = request.uri().path().trim_start_matches("/reader/").parse().expect("an id");
            let open = self.0.open_session(&caller, id).await?;
            Ok(if open.guest.stat("/").await.is_ok() { "reached".to_owned() } else { "not reached".to_owned() })
        }
    }

    async fn get(address: SocketAddr, path: &str, key: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: {key}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.split("\r\n\r\n").nth(1).unwrap_or_default().to_owned()
    }

    #[tokio::test]
    async fn another_family_of_clients_is_one_entry_in_the_list() {
        let config = Config { listen: SocketAddr::from(([127, 0, 0, 1], 0)), ..Config::default() };
        let (engine, key, caller, _fakes) = fake::start(EngineConfig::default()).await;
        let session = engine.create_session(&caller, NewSession::default()).await.unwrap();
        let mut states = engine.watch_session(&caller, session.id).await.unwrap();
        states.wait_for(|session| session.ready_at.is_some()).await.unwrap();
        let reader: Vec<Box<dyn Facade>> = vec![Box::new(Reader(engine.clone()))];
        let daemon = Daemon::start_with(&config, engine.clone(), Hooks::default(), reader).await.unwrap();
        let path = format!("/reader/{}", session.id);
        assert_eq!(get(daemon.local_addr(), &path, &key).await, "reached");
        assert_eq!(get(daemon.local_addr(), &path, "tk_no").await, "unauthenticated");
        let offered = get(daemon.local_addr(), "/nothing", &key).await;
        let services = "tenki.sandbox.v1.SandboxService, tenki.sandbox.v1.SandboxSessionDataPlaneService, \
                        tenki.sandbox.v1.SSHGatewayClientService, nagaya.v1.NagayaService; GET /reader/SESSION";
        assert!(offered.contains(services), "{offered}");
        engine.terminate_session(&caller, session.id).await.unwrap();
        assert_eq!(get(daemon.local_addr(), &path, &key).await, "session_terminated");
        daemon.shut_down().await;
    }
}
