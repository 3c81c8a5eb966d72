//! A proxy on a loopback socket, services that answer what a test says, and clients.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::ExecutionId;
use nagaya_engine::ports::*;
use nagaya_gateway::config::PreviewsConfig;
use nagaya_gateway::preview::{PreviewResolver, Proxy, Viewer, Visit};
use nagaya_gateway::strict::{self, Strict};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Nothing here takes this long; a test that waits for it has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const DOMAIN: &str = "p.example";
pub const HOST: &str = "web.p.example";

pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("happens soon")
}

/// A program that listens in a sandbox.
pub struct Service {
    pub address: SocketAddr,
    /// Connections that were made to it.
    pub connections: Arc<AtomicUsize>,
}

impl Service {
    /// Handles each connection with its number.
    pub async fn start<F>(handle: impl Fn(usize, TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(handle(counted.fetch_add(1, Ordering::SeqCst), stream));
            }
        });
        Self { address, connections }
    }

    /// Answers every request with these bytes and keeps the connection; what it read is sent to the test.
    pub async fn answering(answer: impl Into<Vec<u8>>) -> (Self, mpsc::UnboundedReceiver<String>) {
        let answer = Arc::new(answer.into());
        let (told, heard) = mpsc::unbounded_channel();
        let service = Self::start(move |_, mut stream| {
            let (answer, told) = (Arc::clone(&answer), told.clone());
            async move {
                while let Some(request) = read_request(&mut stream).await {
                    let _ = told.send(request);
                    if stream.write_all(&answer).await.is_err() {
                        return;
                    }
                }
            }
        })
        .await;
        (service, heard)
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// One request with its body, as text; `None` at the end of the connection.
pub async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut text = read_head(stream).await?;
    let lower = text.to_lowercase();
    if let Some(rest) = lower.split_once("content-length: ").map(|(_, rest)| rest) {
        let length: usize = rest.split("\r\n").next().unwrap().parse().unwrap();
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        text.push_str(&String::from_utf8_lossy(&body));
    } else if lower.contains("transfer-encoding: chunked") {
        while !(text.ends_with("\r\n\r\n") && text.contains("\r\n0\r\n")) {
            text.push(char::from(stream.read_u8().await.ok()?));
        }
    }
    Some(text)
}

pub async fn read_head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}

/// Connects to a service of the test, whatever port is asked for; everything else is refused.
struct TestGuest(SocketAddr);

fn refused<T>() -> Result<T, GuestError> {
    Err(GuestError { code: Code::Unimplemented, detail: String::new(), errno: 0 })
}

#[async_trait]
impl Guest for TestGuest {
    async fn run(&self, _: Command) -> Result<Process, GuestError> {
        refused()
    }
    async fn run_detached(&self, _: ExecutionId, _: Command) -> Result<u32, GuestError> {
        refused()
    }
    async fn follow(&self, _: ExecutionId) -> Result<mpsc::Receiver<ProcessEvent>, GuestError> {
        refused()
    }
    async fn forget(&self, _: ExecutionId) -> Result<(), GuestError> {
        refused()
    }
    async fn read_file(&self, _: &str, _: u64, _: u64, _: u32) -> Result<FileReader, GuestError> {
        refused()
    }
    async fn write_file(&self, _: &str, _: WriteOptions) -> Result<FileWriter, GuestError> {
        refused()
    }
    async fn stat(&self, _: &str) -> Result<Option<FileStat>, GuestError> {
        refused()
    }
    async fn make_directory(&self, _: &str, _: u32, _: bool) -> Result<i64, GuestError> {
        refused()
    }
    async fn remove(&self, _: &str, _: bool) -> Result<u64, GuestError> {
        refused()
    }
    async fn list_directory(&self, _: &str, _: bool, _: &dyn Room) -> Result<Vec<DirectoryEntry>, GuestError> {
        refused()
    }
    async fn connect(&self, _: &Address) -> Result<BoxStream, GuestError> {
        match TcpStream::connect(self.0).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(GuestError {
                code: Code::GuestUnreachable,
                detail: error.to_string(),
                errno: error.raw_os_error().unwrap_or(0),
            }),
        }
    }
    async fn listen(&self, _: &Bind) -> Result<Listener, GuestError> {
        refused()
    }
}

/// Knows one label, `web`. Its preview is private where a token is wanted.
pub struct Door {
    guest: Mutex<Arc<dyn Guest>>,
    pub token: Mutex<Option<String>>,
    pub error: Mutex<Option<Error>>,
    /// Visits under way.
    pub visits: Arc<AtomicUsize>,
}

struct Hold(Arc<AtomicUsize>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Door {
    pub fn lead_to(&self, address: SocketAddr) {
        *self.guest.lock().unwrap() = Arc::new(TestGuest(address));
    }
}

impl PreviewResolver for Door {
    async fn enter(&self, label: &str, token: Option<&str>) -> Result<Visit, Error> {
        if let Some(error) = self.error.lock().unwrap().clone() {
            return Err(error);
        }
        if label != "web" {
            return Err(Code::PreviewNotFound.into());
        }
        let wanted = self.token.lock().unwrap().clone();
        if wanted.is_some_and(|wanted| token != Some(wanted.as_str())) {
            return Err(Code::PreviewPrivate.into());
        }
        self.visits.fetch_add(1, Ordering::SeqCst);
        let hold = Box::new(Hold(Arc::clone(&self.visits)));
        Ok(Visit { guest: Arc::clone(&self.guest.lock().unwrap()), port: 8080, hold })
    }
}

type Answered = http_body_util::combinators::UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

pub struct World {
    pub address: SocketAddr,
    pub door: Arc<Door>,
    pub proxy: Arc<Proxy<Door>>,
}

pub fn config() -> PreviewsConfig {
    let patience_ms = PATIENCE.as_millis() as u64;
    PreviewsConfig {
        connect_timeout_ms: patience_ms,
        answer_timeout_ms: patience_ms,
        exchanges_max: 1000,
        idle_connections_max: 8,
        idle_timeout_ms: patience_ms,
        ..PreviewsConfig::default()
    }
}

impl World {
    pub async fn new(service: &Service) -> Self {
        Self::with(service.address, config(), None).await
    }

    /// With a label the proxy is reached at a port of that preview's own.
    pub async fn with(service: SocketAddr, config: PreviewsConfig, label: Option<&str>) -> Self {
        let guest: Arc<dyn Guest> = Arc::new(TestGuest(service));
        let door = Arc::new(Door {
            guest: Mutex::new(guest),
            token: Mutex::default(),
            error: Mutex::default(),
            visits: Arc::default(),
        });
        let proxy = Proxy::start(door.clone(), Some(DOMAIN), config, &["api_session"]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (served, label) = (Arc::clone(&proxy), label.map(Arc::from));
        tokio::spawn(async move {
            while let Ok((stream, peer)) = listener.accept().await {
                tokio::spawn(serve(stream, peer.ip(), label.clone(), Arc::clone(&served)));
            }
        });
        Self { address, door, proxy }
    }

    pub async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Sends these bytes and reads until the answer's connection is closed.
    pub async fn raw(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = self.connect().await;
        // The proxy may close before it has read everything.
        let _ = stream.write_all(bytes.as_ref()).await;
        let mut answer = Vec::new();
        let _ = soon(stream.read_to_end(&mut answer)).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// One exchange over HTTP/1.1 on a connection of its own.
    pub async fn http1(&self, request: Request<Full<Bytes>>) -> Response<Bytes> {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.connect().await)).await.unwrap();
        tokio::spawn(connection);
        whole(soon(sender.send_request(request)).await.unwrap()).await
    }

    pub async fn get(&self, path: &str) -> Response<Bytes> {
        self.http1(Request::get(path).header("host", HOST).body(Full::default()).unwrap()).await
    }
}

/// There is room for everybody.
struct Everybody;

impl nagaya_gateway::preview::Connection for Everybody {
    fn admit(&self) -> bool {
        true
    }
}

async fn serve(stream: TcpStream, peer: IpAddr, label: Option<Arc<str>>, proxy: Arc<Proxy<Door>>) {
    let mut start = [0; 3];
    let viewer = Arc::new(Viewer::new(label, peer, false, Arc::new(Everybody)));
    let read = stream.peek(&mut start).await.unwrap_or(0);
    if start[..read] == b"PRI"[..read] && read > 0 {
        let service = service_fn(move |request| {
            let (proxy, viewer) = (Arc::clone(&proxy), Arc::clone(&viewer));
            async move { Ok::<_, std::convert::Infallible>(proxy.answer(request, &viewer).await) }
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .enable_connect_protocol()
            .serve_connection(TokioIo::new(stream), service);
        let _ = connection.await;
    } else {
        // As the server's own listener does it.
        let (stream, watch) = Strict::new(stream, 64 * 1024);
        let watch = Arc::new(watch);
        let service = service_fn(move |request| {
            let (proxy, viewer, watch) = (Arc::clone(&proxy), Arc::clone(&viewer), Arc::clone(&watch));
            async move {
                if let Err(refusal) = watch.next() {
                    let answer = Response::builder().status(refusal.status);
                    return Ok(answer
                        .body(Full::from(refusal.reason).map_err(|never| match never {}).boxed_unsync())
                        .unwrap());
                }
                let answer = proxy.answer(request, &viewer).await;
                watch.answered(answer.status() == http::StatusCode::SWITCHING_PROTOCOLS);
                Ok::<Response<Answered>, std::convert::Infallible>(answer.map(BodyExt::boxed_unsync))
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .max_headers(strict::FIELDS_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let _ = connection.await;
    }
}

/// The whole response; trailers are put beside the headers.
pub async fn whole(response: Response<hyper::body::Incoming>) -> Response<Bytes> {
    let (mut parts, body) = response.into_parts();
    let body = soon(body.collect()).await.unwrap();
    if let Some(trailers) = body.trailers() {
        parts.headers.extend(trailers.clone());
    }
    Response::from_parts(parts, body.to_bytes())
}

pub fn text(response: &Response<Bytes>) -> String {
    String::from_utf8_lossy(response.body()).into_owned()
}
