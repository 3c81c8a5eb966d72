//! The addresses that the server is reached at, open before there is an engine to answer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use nagaya_engine::ports::Ingress;
use nagaya_gateway::preview::{Arrival, DomainIngress, LoopbackIngress};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::tls::TlsError;
use crate::config::Config;

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("listen on {address}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("serve TLS")]
    Tls(#[from] TlsError),
    #[error("prepare for SSH")]
    Ssh(#[source] nagaya_api::error::Error),
}

/// The listener and the ingress. The engine needs the ingress to start; who connects meanwhile waits.
pub struct Listeners {
    pub(super) listener: TcpListener,
    pub(super) local_addr: SocketAddr,
    /// Connections to the ports that previews have of their own.
    pub(super) arrivals: Option<mpsc::Receiver<Arrival>>,
    ingress: Arc<dyn Ingress>,
}

impl Listeners {
    /// Binds the address. Needs a Tokio runtime.
    pub async fn open(config: &Config) -> Result<Self, ListenError> {
        let bind = |source| ListenError::Bind { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(bind)?;
        let local_addr = listener.local_addr().map_err(bind)?;
        let (ingress, arrivals): (Arc<dyn Ingress>, _) = match &config.preview_domain {
            Some(domain) => {
                let (secure, port) = outside(config, local_addr.port());
                (Arc::new(DomainIngress::new(domain, secure, port)), None)
            }
            None => {
                let (ingress, arrivals) = LoopbackIngress::new(config.previews.loopback);
                (ingress, Some(arrivals))
            }
        };
        Ok(Self { listener, local_addr, arrivals, ingress })
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Where the engine's previews are reached.
    pub fn ingress(&self) -> Arc<dyn Ingress> {
        Arc::clone(&self.ingress)
    }
}

/// Whether clients see `https://`, and on which port.
fn outside(config: &Config, local_port: u16) -> (bool, u16) {
    match config.public_url.as_ref().and_then(|url| url.parse::<http::Uri>().ok()) {
        Some(url) => {
            let secure = url.scheme_str() == Some("https");
            (secure, url.port_u16().unwrap_or(if secure { 443 } else { 80 }))
        }
        None => (config.tls.is_some(), local_port),
    }
}
