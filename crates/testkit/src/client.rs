//! A client of a test server: sandboxes to create, commands to run, files to move.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::ConnectError;
use connectrpc::client::{BidiStream, ClientConfig, HttpClient};
use nagaya_api::nagaya::v1::NagayaServiceClient;
use nagaya_api::tenki::client::Whole;
use nagaya_api::tenki::v1::{
    self, SandboxServiceClient, SandboxSessionDataPlaneServiceClient, SshGatewayClientServiceClient,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use v1::run_request::Payload as Input;
use v1::run_response::Payload as Output;

use crate::Server;

/// Calls include commands that run as long as a whole suite; hanging ones are for the suite to end.
const CALL_TIMEOUT: Duration = Duration::from_secs(900);

/// The control plane, with the server's own key.
#[derive(Clone)]
pub struct Client {
    pub control: SandboxServiceClient<HttpClient>,
    /// What is offered beyond the contract.
    pub own: NagayaServiceClient<HttpClient>,
    /// Certificates for SSH, and where to go with them.
    pub gateways: SshGatewayClientServiceClient<HttpClient>,
    http: HttpClient,
    uri: http::Uri,
}

/// What to ask of a new sandbox; everything else is the server's choice.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub name: String,
    pub cpu_cores: i32,
    pub memory_mb: i32,
    pub outbound: bool,
    pub inbound: bool,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { name: String::new(), cpu_cores: 1, memory_mb: 512, outbound: false, inbound: false }
    }
}

/// A running sandbox and a certificate for it.
#[derive(Clone)]
pub struct Sandbox {
    pub id: String,
    pub data: SandboxSessionDataPlaneServiceClient<HttpClient>,
    pub client: Client,
}

/// What a command did.
#[derive(Debug, Clone, Default)]
pub struct Finished {
    pub stdout: Bytes,
    pub stderr: Bytes,
    pub exit: v1::RunExit,
}

impl Finished {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Both streams and the exit, for a failing test's message.
    pub fn describe(&self) -> String {
        format!(
            "exit {} {} {}\nstdout: {}\nstderr: {}",
            self.exit.exit_code,
            self.exit.signal,
            self.exit.reason,
            String::from_utf8_lossy(&self.stdout),
            String::from_utf8_lossy(&self.stderr)
        )
    }
}

/// A command that was started and is not awaited.
pub struct Running {
    pub pid: u64,
    stream: BidiStream<
        <HttpClient as connectrpc::client::ClientTransport>::ResponseBody,
        v1::SandboxSessionDataPlaneServiceRunRequest,
        Whole<v1::SandboxSessionDataPlaneServiceRunResponse>,
    >,
    finished: Finished,
}

impl Client {
    pub fn of(server: &Server) -> Self {
        Self::new(server.endpoint(), &server.api_key())
    }

    pub fn new(endpoint: &str, key: &str) -> Self {
        let uri: http::Uri = endpoint.parse().unwrap();
        let http = HttpClient::plaintext_http2_only();
        let config = configuration(&uri).with_default_header("authorization", format!("Bearer {key}"));
        Self {
            control: SandboxServiceClient::new(http.clone(), config.clone()),
            own: NagayaServiceClient::new(http.clone(), config.clone()),
            gateways: SshGatewayClientServiceClient::new(http.clone(), config),
            http,
            uri,
        }
    }

    /// A sandbox, once it is RUNNING.
    pub async fn create(&self, wanted: &Wanted) -> Result<Sandbox, ConnectError> {
        let request = v1::CreateSessionRequest {
            owner_id: "self".into(),
            owner_type: "SERVICE".into(),
            name: wanted.name.clone(),
            cpu_cores: Some(wanted.cpu_cores),
            memory_mb: Some(wanted.memory_mb),
            allow_outbound: Some(wanted.outbound),
            allow_inbound: Some(wanted.inbound),
            wait_ready: true,
            ..Default::default()
        };
        let answer = self.control.create_session(request).await?;
        if answer.session.state.as_known() != Some(v1::SessionState::Running) {
            return Err(ConnectError::internal(format!("not running: {}", answer.session.terminal_error)));
        }
        Ok(self.open(&answer.session.id, &answer.credential.credential))
    }

    /// A sandbox that exists, with a new certificate.
    pub async fn attach(&self, id: &str) -> Result<Sandbox, ConnectError> {
        let request = v1::CreateSessionCredentialRequest { session_id: id.into() };
        let answer = self.control.create_session_credential(request).await?;
        Ok(self.open(id, &answer.credential.credential))
    }

    /// A sandbox as the holder of this certificate sees it.
    pub fn open(&self, id: &str, certificate: &str) -> Sandbox {
        let config = configuration(&self.uri).with_default_header("x-tenki-session-cert", certificate);
        let data = SandboxSessionDataPlaneServiceClient::new(self.http.clone(), config);
        Sandbox { id: id.to_owned(), data, client: self.clone() }
    }

    pub async fn session(&self, id: &str) -> Result<v1::SandboxSession, ConnectError> {
        let request = v1::GetSessionRequest { session_id: id.into() };
        let answer = self.control.get_session(request).await?;
        Ok(answer.session.as_option().cloned().unwrap_or_default())
    }

    /// Waits until a session is RUNNING; an error when it ended instead.
    pub async fn wait_running(&self, id: &str) -> Result<v1::SandboxSession, ConnectError> {
        let request = v1::WaitSessionRequest { session_id: id.into() };
        let mut states = self.control.wait_session(request).await?;
        let mut last = v1::SandboxSession::default();
        while let Some(message) = states.message().await? {
            last = message.session.as_option().cloned().unwrap_or_default();
        }
        match last.state.as_known() {
            Some(v1::SessionState::Running) => Ok(last),
            _ => Err(ConnectError::internal(format!("not running: {}", last.terminal_error))),
        }
    }

    /// The value of a line without labels in the server's metrics; `None` when there is no such line.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let authority = self.uri.authority().unwrap().as_str();
        let mut stream = TcpStream::connect(authority).await.unwrap();
        let request = format!("GET /metrics HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    pub async fn terminate(&self, id: &str) -> Result<(), ConnectError> {
        let request = v1::TerminateSessionRequest { session_id: id.into() };
        self.control.terminate_session(request).await.map(drop)
    }
}

fn configuration(uri: &http::Uri) -> ClientConfig {
    ClientConfig::new(uri.clone()).with_protocol(connectrpc::Protocol::Grpc).with_default_timeout(CALL_TIMEOUT)
}

fn frame(payload: Input) -> v1::SandboxSessionDataPlaneServiceRunRequest {
    v1::SandboxSessionDataPlaneServiceRunRequest { frame: v1::RunRequest { payload: Some(payload) }.into() }
}

impl Sandbox {
    /// Starts a command; returns when it runs.
    pub async fn start(&self, argv: &[&str], privileged: bool) -> Result<Running, ConnectError> {
        self.start_with(argv, privileged, false).await
    }

    /// The same as `tenki` in a terminal.
    pub async fn start_in_terminal(&self, argv: &[&str]) -> Result<Running, ConnectError> {
        self.start_with(argv, false, true).await
    }

    async fn start_with(&self, argv: &[&str], privileged: bool, pty: bool) -> Result<Running, ConnectError> {
        let start = v1::RunStart {
            pty,
            session_id: self.id.clone(),
            cmd: argv.iter().map(|argument| (*argument).to_owned()).collect(),
            env: BTreeMap::new(),
            privileged,
            stream_stdin: true,
            ..Default::default()
        };
        let mut stream = self.data.run().await?;
        stream.send(frame(Input::Start(Box::new(start)))).await?;
        let mut running = Running { pid: 0, stream, finished: Finished::default() };
        while running.pid == 0 {
            if !running.step().await? {
                return Err(ConnectError::internal(format!("it never started: {}", running.finished.describe())));
            }
        }
        Ok(running)
    }

    /// Runs a command to its end, with an empty stdin.
    pub async fn run_as(&self, argv: &[&str], privileged: bool) -> Result<Finished, ConnectError> {
        let mut running = self.start(argv, privileged).await?;
        running.close_stdin().await?;
        running.finish().await
    }

    pub async fn run(&self, argv: &[&str]) -> Result<Finished, ConnectError> {
        self.run_as(argv, false).await
    }

    /// Runs a shell script that must succeed; its output without the last line break.
    pub async fn shell(&self, script: &str, privileged: bool) -> String {
        let finished = self.run_as(&["/bin/sh", "-c", script], privileged).await;
        let finished = finished.unwrap_or_else(|error| panic!("{script}: {error}"));
        assert_eq!(finished.exit.exit_code, 0, "{script}\n{}", finished.describe());
        finished.text()
    }

    pub async fn read(&self, path: &str) -> Result<Bytes, ConnectError> {
        let request = v1::ReadFileRequest { session_id: self.id.clone(), path: path.into() };
        let request = v1::SandboxSessionDataPlaneServiceReadFileRequest { request: request.into() };
        Ok(self.data.read_file(request).await?.response.content.clone())
    }

    pub async fn write(&self, path: &str, content: impl Into<Bytes>) -> Result<(), ConnectError> {
        let request = v1::WriteFileRequest { session_id: self.id.clone(), path: path.into(), content: content.into() };
        let request = v1::SandboxSessionDataPlaneServiceWriteFileRequest { request: request.into() };
        self.data.write_file(request).await.map(drop)
    }

    pub async fn stat(&self, path: &str) -> Result<v1::StatResponse, ConnectError> {
        let request = v1::StatRequest { session_id: self.id.clone(), path: path.into() };
        let request = v1::SandboxSessionDataPlaneServiceStatRequest { request: request.into() };
        Ok(self.data.stat(request).await?.response.as_option().cloned().unwrap_or_default())
    }

    /// Names in a directory, hidden ones too.
    pub async fn list(&self, path: &str) -> Result<Vec<String>, ConnectError> {
        let request = v1::ListRequest { session_id: self.id.clone(), path: path.into(), include_hidden: true };
        let request = v1::SandboxSessionDataPlaneServiceListRequest { request: request.into() };
        let answer = self.data.list(request).await?;
        Ok(answer.response.entries.iter().map(|entry| entry.name.clone()).collect())
    }

    pub async fn remove(&self, path: &str) -> Result<(), ConnectError> {
        let request = v1::RemoveRequest { session_id: self.id.clone(), path: path.into(), recursive: true };
        let request = v1::SandboxSessionDataPlaneServiceRemoveRequest { request: request.into() };
        self.data.remove(request).await.map(drop)
    }

    pub async fn terminate(&self) -> Result<(), ConnectError> {
        self.client.terminate(&self.id).await
    }
}

impl Running {
    pub async fn write(&mut self, bytes: impl Into<Bytes>) -> Result<(), ConnectError> {
        self.stream.send(frame(Input::Stdin(bytes.into()))).await
    }

    pub async fn close_stdin(&mut self) -> Result<(), ConnectError> {
        self.stream.send(frame(Input::StdinClose(true))).await
    }

    /// Waits until this line is on stdout; panics when the command ends without it.
    pub async fn wait_for(&mut self, line: &str) {
        while !String::from_utf8_lossy(&self.finished.stdout).lines().any(|each| each == line) {
            assert!(self.step().await.unwrap(), "it ended without saying {line}: {}", self.finished.describe());
        }
    }

    /// Waits for a whole line on stdout that begins so; panics when the command ends without it.
    pub async fn wait_for_line(&mut self, start: &str) -> String {
        loop {
            let text = String::from_utf8_lossy(&self.finished.stdout).into_owned();
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(line) = whole.lines().find(|line| line.starts_with(start)) {
                return line.to_owned();
            }
            assert!(self.step().await.unwrap(), "it ended without saying {start}: {}", self.finished.describe());
        }
    }

    pub async fn finish(mut self) -> Result<Finished, ConnectError> {
        while self.step().await? {}
        Ok(self.finished)
    }

    /// Takes one message; false at the end of the stream.
    async fn step(&mut self) -> Result<bool, ConnectError> {
        let Some(message) = self.stream.message().await? else { return Ok(false) };
        let append = |whole: &mut Bytes, bytes: &Bytes| *whole = [whole.as_ref(), bytes.as_ref()].concat().into();
        match &message.frame.payload {
            Some(Output::Started(started)) => self.pid = started.pid,
            Some(Output::Stdout(bytes)) => append(&mut self.finished.stdout, bytes),
            Some(Output::Stderr(bytes)) => append(&mut self.finished.stderr, bytes),
            Some(Output::Exit(exit)) => self.finished.exit = exit.as_ref().clone(),
            _ => {}
        }
        Ok(true)
    }
}
