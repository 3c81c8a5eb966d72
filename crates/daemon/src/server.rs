//! The one listener: accepts connections, tells TLS, HTTP/2 and HTTP/1.1 apart, and ends them in
//! an orderly way. What is answered on them is the business of [`routes`].

mod listeners;
pub(crate) mod preface;
pub(crate) mod routes;
mod timer;
pub(crate) mod tls;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nagaya_gateway::places::Places;
use nagaya_gateway::preview::{Arrival, Connection, Viewer};
use nagaya_gateway::strict::{self, Strict, Watch};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::config::{Config, Limits};
use crate::metrics::Metrics;
use crate::wire::connection::{Open, UrlScheme, Via};
use crate::wire::lifecycle::{Lifecycle, Phase};
pub use listeners::{ListenError, Listeners};
use preface::Version;
use routes::Routes;
use timer::KeptTimer;

/// How long connections may take to hand over their last bytes after the last call has ended.
const FLUSH_TIME: Duration = Duration::from_secs(1);
/// How long no connection is accepted after accepting one failed, e.g. because no descriptor is free.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of answers one stream may hold back for a slow reader.
const SEND_BUFFER_BYTES: usize = 1024 * 1024;
/// How often a peer's machine is asked whether it is there, within `keep_alive_timeout_ms`.
const KEEP_ALIVE_PROBES: u32 = 4;
/// The kernel takes no longer times. Seconds.
const KEEP_ALIVE_S_MAX: u64 = 32_767;
/// Largest HTTP/2 frame accepted; a large one costs a peer and us less per byte.
const FRAME_BYTES_MAX: u32 = 256 * 1024;

/// A listener and all its connections.
#[derive(Debug)]
pub(crate) struct Server {
    local_addr: SocketAddr,
    lifecycle: Arc<Lifecycle>,
    accepting: JoinHandle<()>,
}

struct Shared {
    routes: Routes,
    limits: Limits,
    /// The viewer of a preview sees `https://` although a connection may be in clear text.
    secure_outside: bool,
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    tls: Option<TlsAcceptor>,
    /// For connections that have shown no right to anything yet: to the listener, and to ports of previews.
    strangers: Arc<Places>,
    preview_strangers: Arc<Places>,
    /// For those that have.
    callers: Arc<Places>,
    viewers: Arc<Places>,
}

/// A request came on a connection that is being closed. It is not carried out.
#[derive(Debug, thiserror::Error)]
#[error("the connection gave way to another")]
struct GaveWay;

/// Where a connection came from.
struct Peer {
    ip: IpAddr,
    /// The preview whose own port it came to.
    label: Option<Arc<str>>,
}

impl Server {
    /// Begins to answer. Needs a Tokio runtime.
    pub(crate) fn start(
        config: &Config,
        listeners: Listeners,
        routes: Routes,
        lifecycle: Arc<Lifecycle>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, ListenError> {
        let local_addr = listeners.local_addr;
        let shared = Arc::new(Shared {
            routes,
            strangers: Places::new(config.limits.strangers_max),
            preview_strangers: Places::new(config.limits.strangers_max),
            callers: Places::new(config.limits.connections_max),
            viewers: Places::new(config.previews.connections_max),
            limits: config.limits.clone(),
            secure_outside: config.public_url.as_ref().is_some_and(|url| url.starts_with("https:")),
            lifecycle: Arc::clone(&lifecycle),
            metrics,
            tls: tls::acceptor(config)?,
        });
        let accepting = tokio::spawn(accept(listeners.listener, listeners.arrivals, shared));
        Ok(Self { local_addr, lifecycle, accepting })
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Stops accepting, lets calls finish for at most the given time, and cuts what is left.
    pub(crate) async fn shut_down(mut self, drain_timeout: Duration) {
        self.lifecycle.advance(Phase::Draining);
        if !self.lifecycle.quiet(drain_timeout).await {
            tracing::warn!("calls are cut that did not end within drain_timeout_ms");
        }
        if tokio::time::timeout(FLUSH_TIME, &mut self.accepting).await.is_err() {
            self.lifecycle.advance(Phase::Stopped);
            let _ = self.accepting.await;
        }
        self.lifecycle.advance(Phase::Stopped);
    }
}

/// Runs until the server drains and the last connection is closed.
async fn accept(listener: TcpListener, mut arrivals: Option<mpsc::Receiver<Arrival>>, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    let mut draining = pin!(shared.lifecycle.reached(Phase::Draining));
    loop {
        let (stream, peer) = tokio::select! {
            biased;
            () = &mut draining => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => (stream, Peer { ip: peer.ip(), label: None }),
                Err(error) => {
                    tracing::warn!(%error, "failed to accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            Some(arrival) = next_arrival(&mut arrivals) => {
                (arrival.stream, Peer { ip: arrival.peer.ip(), label: Some(arrival.label) })
            }
        };
        let places = if peer.label.is_some() { &shared.preview_strangers } else { &shared.strangers };
        let seat = Arc::new(places.enter(peer.ip));
        let open = Open {
            seat,
            callers: Arc::clone(&shared.callers),
            viewers: Arc::clone(&shared.viewers),
            _metric: shared.metrics.connection_opened(),
        };
        connections.spawn(serve(stream, peer, Arc::new(open), Arc::clone(&shared)));
    }
    drop((listener, arrivals));
    while connections.join_next().await.is_some() {}
}

async fn next_arrival(arrivals: &mut Option<mpsc::Receiver<Arrival>>) -> Option<Arrival> {
    arrivals.as_mut()?.recv().await
}

async fn serve(stream: TcpStream, peer: Peer, open: Arc<Open>, shared: Arc<Shared>) {
    let at_most = Duration::from_millis(shared.limits.stranger_timeout_ms);
    tokio::select! {
        biased;
        () = open.given_up(at_most) => {
            shared.metrics.connection_refused();
            tracing::debug!(peer = %peer.ip, "a connection gave way, or showed no key in time");
        }
        () = serve_on(stream, &peer, &open, &shared) => open.seat.stay_active(),
    }
}

async fn serve_on(stream: TcpStream, peer: &Peer, open: &Arc<Open>, shared: &Arc<Shared>) {
    // Answers are small and waited for; holding them back would cost up to 40 ms each.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "failed to set TCP_NODELAY");
    }
    if peer.ip.is_loopback()
        // There is no path to probe, which the host's choice may do at a price for each packet.
        && let Err(error) = sockopt::set_tcp_congestion(&stream, "reno")
    {
        tracing::debug!(%error, "failed to choose the congestion control of a connection");
    }
    if let Err(error) = keep_alive(&stream, &shared.limits) {
        tracing::debug!(%error, "failed to have the kernel watch a connection");
    }
    let viewer = |secure| {
        let secure = (secure || shared.secure_outside) && peer.label.is_none();
        Viewer::new(peer.label.clone(), peer.ip, secure, Arc::clone(open) as Arc<dyn Connection>)
    };
    match &shared.tls {
        Some(acceptor) if peer.label.is_none() => {
            let handshake_timeout = Duration::from_millis(shared.limits.tls_handshake_timeout_ms);
            match tokio::time::timeout(handshake_timeout, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => serve_http(stream, UrlScheme::HTTPS, viewer(true), open, shared).await,
                Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                Err(_) => tracing::debug!("a TLS handshake took longer than tls_handshake_timeout_ms"),
            }
        }
        _ => serve_http(stream, UrlScheme::HTTP, viewer(false), open, shared).await,
    }
}

/// Has the kernel end a connection whose other end is gone without a word. On HTTP/1.1, and on what is spoken after it,
/// nobody else would notice, and what is open keeps its session in use.
fn keep_alive(stream: &TcpStream, limits: &Limits) -> io::Result<()> {
    let seconds = |milliseconds: u64| Duration::from_secs(milliseconds.div_ceil(1000).clamp(1, KEEP_ALIVE_S_MAX));
    sockopt::set_tcp_keepidle(stream, seconds(limits.keep_alive_interval_ms))?;
    sockopt::set_tcp_keepintvl(stream, seconds(limits.keep_alive_timeout_ms / u64::from(KEEP_ALIVE_PROBES)))?;
    sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_PROBES)?;
    Ok(sockopt::set_socket_keepalive(stream, true)?)
}

async fn serve_http<T>(stream: T, scheme: UrlScheme, viewer: Viewer, open: &Arc<Open>, shared: &Arc<Shared>)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = &shared.limits;
    let header_timeout = Duration::from_millis(limits.request_header_timeout_ms);
    let (version, stream) = tokio::select! {
        read = tokio::time::timeout(header_timeout, preface::read_version(stream)) => match read {
            Ok(Ok(read)) => read,
            Ok(Err(_)) | Err(_) => return,
        },
        () = shared.lifecycle.reached(Phase::Draining) => return,
    };

    let from = Arc::new((viewer, Arc::clone(open), Arc::clone(shared)));
    let service = |watch: Option<Arc<Watch>>| {
        service_fn(move |request| {
            let (from, watch) = (Arc::clone(&from), watch.clone());
            async move {
                let (viewer, open, shared) = &*from;
                let via = Via { scheme, viewer, open };
                let active = open.begin().ok_or(GaveWay)?;
                let answer = match watch.as_deref().map(|watch| (watch, watch.next())) {
                    Some((_, Err(refusal))) => routes::refuse(&refusal),
                    Some((watch, Ok(()))) => {
                        let answer = shared.routes.answer(request, via).await;
                        watch.answered(answer.status() == StatusCode::SWITCHING_PROTOCOLS);
                        answer
                    }
                    None => shared.routes.answer(request, via).await,
                };
                Ok::<_, GaveWay>(answer.map(|body| body.held(active)))
            }
        })
    };
    let mut end = pin!(shared.lifecycle.reached(Phase::Draining));
    let mut told = false;
    // Both versions have the same methods but no trait in common.
    macro_rules! drive {
        ($connection:expr) => {{
            let mut connection = pin!($connection);
            loop {
                tokio::select! {
                    biased;
                    () = &mut end => {
                        if told {
                            break;
                        }
                        told = true;
                        end.set(shared.lifecycle.reached(Phase::Stopped));
                        connection.as_mut().graceful_shutdown();
                    }
                    ended = connection.as_mut() => {
                        if let Err(error) = ended {
                            tracing::debug!(%error, "a connection ended early");
                        }
                        break;
                    }
                }
            }
        }};
    }
    match version {
        Version::Http1 => {
            let (stream, watch) = Strict::new(stream, limits.request_header_bytes_max as usize);
            drive!(
                hyper::server::conn::http1::Builder::new()
                    .timer(KeptTimer::default())
                    .header_read_timeout(header_timeout)
                    .max_headers(strict::FIELDS_MAX)
                    .serve_connection(TokioIo::new(stream), service(Some(Arc::new(watch))))
                    .with_upgrades()
            )
        }
        Version::Http2 => drive!(
            hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .initial_stream_window_size(limits.stream_window_bytes)
                .initial_connection_window_size(limits.connection_window_bytes)
                .max_concurrent_streams(limits.streams_per_connection_max)
                .max_header_list_size(limits.request_header_bytes_max)
                .max_frame_size(FRAME_BYTES_MAX)
                .max_send_buf_size(SEND_BUFFER_BYTES)
                .keep_alive_interval(Some(Duration::from_millis(limits.keep_alive_interval_ms)))
                .keep_alive_timeout(Duration::from_millis(limits.keep_alive_timeout_ms))
                .enable_connect_protocol()
                .serve_connection(TokioIo::new(stream), service(None))
        ),
    }
}
