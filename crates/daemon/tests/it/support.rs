//! A real server on a loopback socket, over an engine in a fake world; and clients for it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use connectrpc::client::{ClientConfig, HttpClient};
use connectrpc::{ConnectError, Protocol};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nagaya_api::ids::{ExecutionId, SessionId};
use nagaya_api::tenki::v1 as wire;
use nagaya_daemon::config::Config;
use nagaya_daemon::{Daemon, Hooks};
use nagaya_engine::fake::{FAKE_DRIVER, Fakes};
use nagaya_engine::model::{Capabilities, DiskOrigin, SandboxSpec};
use nagaya_engine::ports::*;
use nagaya_engine::{Engine, EngineConfig};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

pub type ControlClient = wire::SandboxServiceClient<HttpClient>;
pub type DataClient = wire::SandboxSessionDataPlaneServiceClient<HttpClient>;

/// Nothing here takes this long; a test that waits for it has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct World {
    pub daemon: Daemon,
    pub fakes: Fakes,
    /// The API key.
    pub secret: String,
    /// Commands that belong to a stream and run now.
    pub running: watch::Receiver<usize>,
    /// While it holds true, no sandbox becomes ready.
    pub hold_creations: watch::Sender<bool>,
}

impl World {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    pub async fn with(configure: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config { listen: SocketAddr::from(([127, 0, 0, 1], 0)), ..Config::default() };
        configure(&mut config);
        Self::start(config, EngineConfig::default()).await
    }

    pub async fn with_engine(configure: impl FnOnce(&mut EngineConfig)) -> Self {
        let mut engine = EngineConfig::default();
        configure(&mut engine);
        Self::start(Config { listen: SocketAddr::from(([127, 0, 0, 1], 0)), ..Config::default() }, engine).await
    }

    async fn start(config: Config, engine: EngineConfig) -> Self {
        let fakes = Fakes::new(1);
        // As the image that this family of clients expects.
        fakes.driver.set_user("tenki");
        let running = watch::Sender::new(0);
        let hold_creations = watch::Sender::new(false);
        let driver = WatchedDriver {
            inner: fakes.driver.clone(),
            running: running.clone(),
            hold_creations: hold_creations.clone(),
        };
        let drivers = Drivers::new(FAKE_DRIVER, [(FAKE_DRIVER.to_owned(), Arc::new(driver) as Arc<dyn Driver>)].into());
        let engine = Engine::start(engine, Ports { drivers, ..fakes.ports() }).await.unwrap();
        let secret = engine.first_start(None).await.unwrap().unwrap();
        let daemon = Daemon::start(&config, engine, Hooks::default()).await.unwrap();
        Self { daemon, fakes, secret, running: running.subscribe(), hold_creations }
    }

    pub fn address(&self) -> SocketAddr {
        self.daemon.local_addr()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    pub fn config(&self, protocol: Protocol) -> ClientConfig {
        ClientConfig::new(self.url().parse().unwrap()).with_protocol(protocol)
    }

    /// gRPC over HTTP/2, as the vendor's clients do it.
    pub fn control(&self) -> ControlClient {
        let config =
            self.config(Protocol::Grpc).with_default_header("authorization", format!("Bearer {}", self.secret));
        ControlClient::new(HttpClient::plaintext_http2_only(), config)
    }

    /// A client of the control plane with other headers than the usual ones.
    pub fn control_with(&self, headers: &[(&'static str, &str)]) -> ControlClient {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        let config = self.config(Protocol::Grpc).with_default_headers(map);
        ControlClient::new(HttpClient::plaintext_http2_only(), config)
    }

    pub fn data(&self, certificate: &str) -> DataClient {
        let config = self
            .config(Protocol::Grpc)
            .with_default_max_message_size(256 << 20)
            .with_default_header("x-tenki-session-cert", certificate);
        DataClient::new(HttpClient::plaintext_http2_only(), config)
    }

    /// A running session, and a client of its data plane.
    pub async fn session(&self) -> (String, DataClient) {
        let answer = self.control().create_session(create()).await.unwrap();
        let certificate = answer.credential.credential.clone();
        (answer.session.id.clone(), self.data(&certificate))
    }

    /// A fresh certificate for a running session.
    pub async fn certificate(&self, id: &str) -> String {
        let request = wire::CreateSessionCredentialRequest { session_id: id.into() };
        let answer = self.control().create_session_credential(request).await.unwrap();
        answer.credential.credential.clone()
    }

    /// One exchange over HTTP/1.1 on a connection of its own.
    pub async fn http1(&self, request: Request<Full<Bytes>>) -> Response<Bytes> {
        let stream = self.connect().await;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        whole(sender.send_request(request).await.unwrap()).await
    }

    /// A TCP connection as real clients make them: small writes are not held back.
    async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// One exchange over HTTP/2 with prior knowledge on a connection of its own.
    pub async fn http2(&self, request: Request<Full<Bytes>>) -> Response<Bytes> {
        let stream = self.connect().await;
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        whole(sender.send_request(request).await.unwrap()).await
    }

    /// A Connect call in JSON over HTTP/1.1, as plain HTTP clients make it.
    pub async fn json(&self, method: &str, body: serde_json::Value) -> (u16, serde_json::Value) {
        self.json_of("tenki.sandbox.v1.SandboxService", method, body).await
    }

    /// The same for any service.
    pub async fn json_of(&self, service: &str, method: &str, body: serde_json::Value) -> (u16, serde_json::Value) {
        let request = Request::post(format!("/{service}/{method}"))
            .header("host", self.address().to_string())
            .header("content-type", "application/json")
            .header("connect-protocol-version", "1")
            .header("authorization", format!("Bearer {}", self.secret))
            .body(Full::new(Bytes::from(body.to_string())))
            .unwrap();
        let response = self.http1(request).await;
        (response.status().as_u16(), serde_json::from_slice(response.body()).unwrap())
    }
}

/// The whole response; trailers are put beside the headers.
pub async fn whole(response: Response<hyper::body::Incoming>) -> Response<Bytes> {
    let (mut parts, body) = response.into_parts();
    let body = body.collect().await.unwrap();
    if let Some(trailers) = body.trailers() {
        parts.headers.extend(trailers.clone());
    }
    Response::from_parts(parts, body.to_bytes())
}

/// What the vendor's clients send at least.
pub fn create() -> wire::CreateSessionRequest {
    wire::CreateSessionRequest {
        owner_type: "SERVICE".into(),
        owner_id: "self".into(),
        allow_inbound: Some(true),
        allow_outbound: Some(true),
        ..Default::default()
    }
}

pub fn code<T>(result: Result<T, ConnectError>) -> connectrpc::ErrorCode {
    result.err().expect("an error").code
}

pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("happens soon")
}

/// Wraps the fake driver: counts what runs, and can hold creations back.
struct WatchedDriver {
    inner: Arc<nagaya_engine::fake::FakeDriver>,
    running: watch::Sender<usize>,
    hold_creations: watch::Sender<bool>,
}

/// Calls that are handed on as they are. (`async_trait` does not see what a macro makes inside its
/// block, so the futures are written as it would write them.)
macro_rules! delegated {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => {$(
        fn $name<'a, 'b>(
            &'a self,
            $($argument: $kind),*
        ) -> Pin<Box<dyn Future<Output = Result<$answer, DriverError>> + Send + 'b>>
        where
            'a: 'b,
            Self: 'b,
        {
            self.inner.$name($($argument),*)
        }
    )*};
}

#[async_trait]
impl Driver for WatchedDriver {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn start(&self, id: SessionId, spec: &SandboxSpec) -> Result<Arc<dyn Guest>, DriverError> {
        if spec.disk != DiskOrigin::Kept {
            let _ = self.hold_creations.subscribe().wait_for(|hold| !hold).await;
        }
        let inner = self.inner.start(id, spec).await?;
        Ok(self.watched(inner))
    }

    async fn adopt(&self, id: SessionId) -> Result<Adopted, DriverError> {
        self.inner.adopt(id).await
    }

    fn ends(&self) -> mpsc::UnboundedReceiver<Ended> {
        self.inner.ends()
    }

    async fn attach_volume(&self, id: SessionId, mount: &Mount) -> Result<(), DriverError> {
        self.inner.attach_volume(id, mount).await
    }

    async fn detach_volume(&self, id: SessionId, mount: &Mount, force: bool) -> Result<(), DriverError> {
        self.inner.detach_volume(id, mount, force).await
    }

    delegated! {
        freeze(id: SessionId) -> ();
        thaw(id: SessionId) -> ();
        stop(id: SessionId) -> ();
        destroy(id: SessionId) -> ();
        list() -> Vec<SessionId>;
        usage(id: SessionId) -> ResourceUsage;
    }
}

impl WatchedDriver {
    fn watched(&self, inner: Arc<dyn Guest>) -> Arc<dyn Guest> {
        Arc::new(WatchedGuest { inner, running: self.running.clone() })
    }
}

struct WatchedGuest {
    inner: Arc<dyn Guest>,
    running: watch::Sender<usize>,
}

#[async_trait]
impl Guest for WatchedGuest {
    async fn run(&self, command: Command) -> Result<Process, GuestError> {
        let mut process = self.inner.run(command).await?;
        let (sender, events) = mpsc::channel(4);
        let mut inner = std::mem::replace(&mut process.events, events);
        self.running.send_modify(|running| *running += 1);
        let running = self.running.clone();
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    () = sender.closed() => break,
                    event = inner.recv() => event,
                };
                let Some(event) = event else { break };
                if sender.send(event).await.is_err() {
                    break;
                }
            }
            drop(inner);
            running.send_modify(|running| *running -= 1);
        });
        Ok(process)
    }

    async fn run_detached(&self, id: ExecutionId, command: Command) -> Result<u32, GuestError> {
        self.inner.run_detached(id, command).await
    }

    async fn follow(&self, id: ExecutionId) -> Result<mpsc::Receiver<ProcessEvent>, GuestError> {
        self.inner.follow(id).await
    }

    async fn forget(&self, id: ExecutionId) -> Result<(), GuestError> {
        self.inner.forget(id).await
    }

    async fn read_file(
        &self,
        path: &str,
        offset: u64,
        length: u64,
        chunk_bytes: u32,
    ) -> Result<FileReader, GuestError> {
        self.inner.read_file(path, offset, length, chunk_bytes).await
    }

    async fn write_file(&self, path: &str, options: WriteOptions) -> Result<FileWriter, GuestError> {
        self.inner.write_file(path, options).await
    }

    async fn stat(&self, path: &str) -> Result<Option<FileStat>, GuestError> {
        self.inner.stat(path).await
    }

    async fn make_directory(&self, path: &str, mode: u32, recursive: bool) -> Result<i64, GuestError> {
        self.inner.make_directory(path, mode, recursive).await
    }

    async fn remove(&self, path: &str, recursive: bool) -> Result<u64, GuestError> {
        self.inner.remove(path, recursive).await
    }

    async fn list_directory(
        &self,
        path: &str,
        include_hidden: bool,
        room: &dyn Room,
    ) -> Result<Vec<DirectoryEntry>, GuestError> {
        self.inner.list_directory(path, include_hidden, room).await
    }

    async fn connect(&self, address: &Address) -> Result<BoxStream, GuestError> {
        self.inner.connect(address).await
    }

    async fn listen(&self, bind: &Bind) -> Result<Listener, GuestError> {
        self.inner.listen(bind).await
    }
}

pub fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}
