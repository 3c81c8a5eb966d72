//! Where previews are reached: a loopback port for each, or a host name below the operator's domain.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nagaya_engine::ports::{Ingress, Published};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

/// Ports that are tried for a preview. They lie below those that Linux takes for outgoing connections, so that a port
/// is still free when the server comes back after a crash.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
/// How many of them are tried before the kernel chooses any.
const PORTS_TRIED_MAX: u32 = 100;
/// Accepted connections that wait for the server to take them.
const ARRIVALS_MAX: usize = 64;
/// How long no connection is accepted after accepting one failed, e.g. because no descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection to a preview's own port.
#[derive(Debug)]
pub struct Arrival {
    pub stream: TcpStream,
    pub peer: SocketAddr,
    pub label: Arc<str>,
}

/// Gives every preview a port of its own on the machine's loopback.
pub struct LoopbackIngress {
    ip: IpAddr,
    arrivals: mpsc::Sender<Arrival>,
    listeners: Mutex<HashMap<String, Listening>>,
}

struct Listening {
    port: u16,
    accepting: JoinHandle<()>,
}

impl LoopbackIngress {
    /// What connects waits until it is taken from the channel. Dropping the receiver ends the accepting.
    pub fn new(ip: IpAddr) -> (Arc<Self>, mpsc::Receiver<Arrival>) {
        let (arrivals, taken) = mpsc::channel(ARRIVALS_MAX);
        (Arc::new(Self { ip, arrivals, listeners: Mutex::default() }), taken)
    }

    async fn bind(&self, label: &str, port: u16) -> io::Result<TcpListener> {
        let kept = (port != 0).then_some(port);
        for port in kept.into_iter().chain(candidates(label)) {
            match TcpListener::bind((self.ip, port)).await {
                Err(error) if matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) => {}
                other => return other,
            }
        }
        TcpListener::bind((self.ip, 0)).await
    }
}

/// The ports to try for a label: the same ones after every start.
fn candidates(label: &str) -> impl Iterator<Item = u16> {
    // FNV-1a spreads short texts well enough.
    let first = label.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let count = PORTS.end - PORTS.start;
    (0..PORTS_TRIED_MAX).map(move |step| PORTS.start + (first.wrapping_add(step) % u32::from(count)) as u16)
}

#[async_trait]
impl Ingress for LoopbackIngress {
    async fn publish(&self, label: &str, port: u16) -> Result<Published, String> {
        let mut listeners = self.listeners.lock().await;
        let port = match listeners.get(label) {
            Some(listening) => listening.port,
            None => {
                let failed = |error| format!("no port of {} can be opened for a preview: {error}", self.ip);
                let listener = self.bind(label, port).await.map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                let accepting = tokio::spawn(accept(listener, label.into(), self.arrivals.clone()));
                listeners.insert(label.to_owned(), Listening { port, accepting });
                port
            }
        };
        Ok(Published { url: format!("http://{}", SocketAddr::new(self.ip, port)), port })
    }

    async fn withdraw(&self, label: &str) {
        if let Some(listening) = self.listeners.lock().await.remove(label) {
            listening.accepting.abort();
            // The port is free when this returns.
            let _ = listening.accepting.await;
        }
    }
}

async fn accept(listener: TcpListener, label: Arc<str>, arrivals: mpsc::Sender<Arrival>) {
    loop {
        match listener.accept().await {
            // While the server takes none, the next ones wait in the kernel.
            Ok((stream, peer)) => {
                let arrival = Arrival { stream, peer, label: Arc::clone(&label) };
                if arrivals.send(arrival).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection to a preview");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Gives every preview a host name below a domain; the server's own listener takes the connections.
#[derive(Debug)]
pub struct DomainIngress {
    domain: String,
    /// `http` or `https`.
    scheme: &'static str,
    /// Empty, or a colon and the port.
    port: String,
}

impl DomainIngress {
    pub fn new(domain: &str, secure: bool, port: u16) -> Self {
        let (scheme, usual) = if secure { ("https", 443) } else { ("http", 80) };
        let port = if port == usual { String::new() } else { format!(":{port}") };
        Self { domain: domain.to_owned(), scheme, port }
    }
}

#[async_trait]
impl Ingress for DomainIngress {
    async fn publish(&self, label: &str, _: u16) -> Result<Published, String> {
        let Self { domain, scheme, port } = self;
        Ok(Published { url: format!("{scheme}://{label}.{domain}{port}"), port: 0 })
    }

    async fn withdraw(&self, _: &str) {}
}
