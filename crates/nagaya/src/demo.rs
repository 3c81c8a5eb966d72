//! `nagaya demo`: the first minute with Nagaya, and a test of the host.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use buffa::MessageField;
use connectrpc::client::{BidiStream, ClientConfig, HttpClient};
use nagaya_api::tenki::client::Whole;
use nagaya_api::tenki::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use v1::run_request::Payload as Input;
use v1::run_response::Payload as Output;

use crate::config::Config;
use crate::purge::purge;
use crate::server::Server;

const PROGRAM: &str = "import os, platform\n\
print('hello from', platform.node(), 'as', os.environ['USER'], 'with', len(os.sched_getaffinity(0)), 'processors')\n\
print('sum of squares below 1000:', sum(n * n for n in range(1000)))";

const PORT: i32 = 8000;
const SERVICE: &str = "
import http.server
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'served from the sandbox')
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(('127.0.0.1', 8000), Page)
print('listening', flush=True)
server.serve_forever()
";

pub fn run() -> anyhow::Result<ExitCode> {
    let directory = tempfile::Builder::new().prefix("nagaya-demo-").tempdir().context("make a temporary directory")?;
    let mut config = Config { data_dir: directory.path().join("data"), ..Config::default() };
    config.daemon.listen = ([127, 0, 0, 1], 0).into();
    crate::runtime()?.block_on(async {
        let shown = show(config.clone()).await;
        // Also after a failure nothing may stay.
        let purged = purge(&config).await;
        shown?;
        purged?;
        crate::say("  everything removed");
        crate::say("It works. Next: `nagaya serve`, and the README's first five minutes.");
        Ok(ExitCode::SUCCESS)
    })
}

async fn show(config: Config) -> anyhow::Result<()> {
    let server = timed("server started", Server::start(config)).await?;
    let shown = use_sandbox(&server).await;
    server.stop().await;
    shown
}

async fn timed<T, E: Into<anyhow::Error>>(what: &str, work: impl Future<Output = Result<T, E>>) -> anyhow::Result<T> {
    let start = Instant::now();
    let result = work.await.map_err(Into::into).with_context(|| what.to_owned())?;
    crate::say(format_args!("  {what} ({:.1} ms)", start.elapsed().as_secs_f64() * 1e3));
    Ok(result)
}

async fn use_sandbox(server: &Server) -> anyhow::Result<()> {
    let key = server.new_key.as_deref().context("a new server makes a key")?;
    let configuration = || -> anyhow::Result<ClientConfig> {
        Ok(ClientConfig::new(server.url().parse::<http::Uri>()?)
            .with_protocol(connectrpc::Protocol::Grpc)
            .with_default_timeout(Duration::from_secs(30)))
    };
    let control = v1::SandboxServiceClient::new(
        HttpClient::plaintext_http2_only(),
        configuration()?.with_default_header("authorization", format!("Bearer {key}")),
    );
    let created = timed(
        "sandbox created",
        control.create_session(v1::CreateSessionRequest {
            owner_id: "self".into(),
            owner_type: "SERVICE".into(),
            name: "demo".into(),
            allow_inbound: Some(true),
            allow_outbound: Some(false),
            wait_ready: true,
            ..Default::default()
        }),
    )
    .await?;
    let id = created.session.id.clone();
    ensure!(!created.credential.credential.is_empty(), "the sandbox is not ready: {}", created.session.terminal_error);
    let data = v1::SandboxSessionDataPlaneServiceClient::new(
        HttpClient::plaintext_http2_only(),
        configuration()?.with_default_header("x-tenki-session-cert", created.credential.credential.as_str()),
    );

    let output = timed("Python program run in it", run_python(&data, &id)).await?;
    for line in output.lines() {
        crate::say(format_args!("    │ {line}"));
    }
    let content = b"what is written is read".to_vec();
    let write =
        v1::WriteFileRequest { session_id: id.clone(), path: "note.txt".into(), content: content.clone().into() };
    let write = v1::SandboxSessionDataPlaneServiceWriteFileRequest { request: MessageField::some(write) };
    timed("file written", data.write_file(write)).await?;
    let read = v1::ReadFileRequest { session_id: id.clone(), path: "/home/tenki/note.txt".into() };
    let read = v1::SandboxSessionDataPlaneServiceReadFileRequest { request: MessageField::some(read) };
    let answer = timed("file read", data.read_file(read)).await?;
    ensure!(answer.response.content == content, "the file's content changed");

    // It ends when this goes.
    let _service = timed("web service started in it", start_service(&data, &id)).await?;
    let expose = v1::ExposePortRequest { session_id: id.clone(), port: PORT, ..Default::default() };
    let exposed = timed("port opened", control.expose_port(expose)).await?;
    let page = timed("page fetched through its preview URL", fetch(&exposed.preview_url)).await?;
    crate::say(format_args!("    │ {}: {page}", exposed.preview_url));

    let terminate = v1::TerminateSessionRequest { session_id: id };
    timed("sandbox terminated", control.terminate_session(terminate)).await?;
    Ok(())
}

type DataPlane = v1::SandboxSessionDataPlaneServiceClient<HttpClient>;
type Run = BidiStream<
    <HttpClient as connectrpc::client::ClientTransport>::ResponseBody,
    v1::SandboxSessionDataPlaneServiceRunRequest,
    Whole<v1::SandboxSessionDataPlaneServiceRunResponse>,
>;

async fn start_python(data: &DataPlane, id: &str, program: &str) -> anyhow::Result<Run> {
    let start = v1::RunStart {
        session_id: id.to_owned(),
        cmd: vec!["python3".into(), "-c".into(), program.into()],
        ..Default::default()
    };
    let frame = MessageField::some(v1::RunRequest { payload: Some(Input::Start(Box::new(start))) });
    let mut run = data.run().await?;
    run.send(v1::SandboxSessionDataPlaneServiceRunRequest { frame }).await?;
    Ok(run)
}

async fn run_python(data: &DataPlane, id: &str) -> anyhow::Result<String> {
    let mut run = start_python(data, id, PROGRAM).await?;
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    while let Some(message) = run.message().await? {
        match message.frame.payload.clone() {
            Some(Output::Stdout(bytes)) => output.extend_from_slice(&bytes),
            Some(Output::Stderr(bytes)) => errors.extend_from_slice(&bytes),
            Some(Output::Exit(exit)) if exit.exit_code != 0 => {
                bail!("python3 ended with {} ({}): {}", exit.exit_code, exit.reason, String::from_utf8_lossy(&errors));
            }
            _ => {}
        }
    }
    Ok(String::from_utf8(output)?)
}

/// A web service that lasts as long as what this returns, and listens already.
async fn start_service(data: &DataPlane, id: &str) -> anyhow::Result<Run> {
    let mut run = start_python(data, id, SERVICE).await?;
    let mut said = Vec::new();
    while let Some(message) = run.message().await? {
        match message.frame.payload.clone() {
            Some(Output::Stdout(_)) => return Ok(run),
            Some(Output::Stderr(bytes)) => said.extend_from_slice(&bytes),
            _ => {}
        }
    }
    bail!("the web service ended: {}", String::from_utf8_lossy(&said));
}

/// The page at the root of an `http://HOST:PORT` URL.
async fn fetch(url: &str) -> anyhow::Result<String> {
    let authority = url.strip_prefix("http://").context("a preview without TLS")?.trim_end_matches('/');
    let mut stream = tokio::net::TcpStream::connect(authority).await?;
    // In HTTP/1.0 the answer ends with the connection, and has no other frames.
    let request = format!("GET / HTTP/1.0\r\nHost: {authority}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(1 << 20).read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer of HTTP")?;
    ensure!(head.split(' ').nth(1) == Some("200"), "{answer}");
    Ok(body.to_owned())
}
