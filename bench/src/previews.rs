//! Requests to a service in a sandbox: through its preview, and without us. The same service (nginx with one worker,
//! 1 KiB of text) runs in the sandbox and on the host; Debian's nginx is also the peer that stands before it as a proxy.

use std::fs;
use std::net::TcpListener as StdListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nagaya_api::tenki::v1;
use nagaya_testkit::{Client, Sandbox, Server, Wanted};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Effort;
use crate::samples::{Report, milliseconds, percentile};

const NGINX: &str = "/usr/sbin/nginx";
const SERVICE_PORT: u16 = 8080;
const CONNECTIONS: usize = 32;
const IDLE_CONNECTIONS: usize = 1_000;

/// An nginx of ours. Dropping it ends it.
struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One worker that logs nothing and keeps connections open for ever.
fn configuration(directory: &str, http: &str) -> String {
    format!(
        "daemon off; master_process off; worker_processes 1; pid {directory}/pid; error_log {directory}/error;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600; client_body_temp_path {directory}/b; \
         proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; \
         scgi_temp_path {directory}/s;\n{http}\n}}\n"
    )
}

fn service(port: u16) -> String {
    format!("server {{ listen 127.0.0.1:{port}; location / {{ return 200 \"{}\"; }} }}", "x".repeat(1024))
}

/// As its manual has it for kept connections upstream.
fn proxy(port: u16, upstream: u16) -> String {
    format!(
        "upstream service {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000000; }}\n\
         server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://service; proxy_http_version 1.1; \
         proxy_set_header Connection \"\"; proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr; }} }}"
    )
}

fn start(place: &Path, name: &str, http: &str) -> Nginx {
    let directory = place.join(name);
    fs::create_dir(&directory).expect("a directory can be made");
    let file: PathBuf = directory.join("conf");
    fs::write(&file, configuration(&directory.display().to_string(), http)).expect("a file can be written");
    let mut command = Command::new(NGINX);
    command.arg("-c").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Nginx(command.spawn().expect("nginx starts"))
}

fn free_port() -> u16 {
    let listener = StdListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

pub async fn run(report: &mut Report, effort: Effort) {
    if !Path::new(NGINX).exists() {
        return report.not_run("requests to previews", "nginx is the service and the peer, and is not installed");
    }
    let server = Server::start_with("[pools]\nslots_ready = 2\n");
    let client = Client::of(&server);
    let sandbox = client.create(&Wanted { cpu_cores: 2, inbound: true, ..Wanted::default() }).await;
    let sandbox = sandbox.expect("the server has room");
    let _inside = start_inside(&sandbox).await;
    let request =
        v1::ExposePortRequest { session_id: sandbox.id.clone(), port: SERVICE_PORT.into(), ..Default::default() };
    let exposed = client.control.expose_port(request).await.expect("ports can be exposed");
    let preview = exposed.preview_url.trim_start_matches("http://").to_owned();

    let place = TempDir::new().expect("a temporary directory can be made");
    let (on_host, before_it) = (free_port(), free_port());
    let _service = start(place.path(), "service", &service(on_host));
    let _proxy = start(place.path(), "proxy", &proxy(before_it, on_host));
    let (direct, peer) = (format!("127.0.0.1:{on_host}"), format!("127.0.0.1:{before_it}"));
    for address in [&direct, &peer, &preview] {
        wait_for(address).await;
    }
    latency(report, [&direct, &peer, &preview], effort.of(5_000, 200)).await;
    throughput(report, [&direct, &peer, &preview], Duration::from_secs(effort.of(8, 1) as u64), effort.of(3, 1)).await;
    idle(report, &server, &preview).await;
    sandbox.terminate().await.expect("terminating works");
}

/// nginx is there because the default image has the host's /usr.
async fn start_inside(sandbox: &Sandbox) -> nagaya_testkit::Running {
    let text = configuration("/home/tenki", &service(SERVICE_PORT));
    sandbox.write("/home/tenki/conf", text.into_bytes()).await.expect("files can be written");
    let argv = [NGINX, "-e", "/home/tenki/error", "-c", "/home/tenki/conf"];
    sandbox.start(&argv, false).await.expect("nginx starts in the sandbox")
}

async fn wait_for(address: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Ok(mut connection) = Connection::open(address).await
            && connection.get().await.is_ok()
        {
            return;
        }
        assert!(Instant::now() < deadline, "nothing answers on {address}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

const NAMES: [&str; 3] = ["direct", "nginx", "preview"];

/// One request at a time; the three take turns, so that the machine's moods hit all.
async fn latency(report: &mut Report, addresses: [&String; 3], rounds: usize) {
    let mut connections = Vec::new();
    for address in addresses {
        connections.push(Connection::open(address).await.expect("it listens"));
    }
    let mut samples = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..rounds + 100 {
        for (connection, samples) in connections.iter_mut().zip(&mut samples) {
            let start = Instant::now();
            connection.get().await.expect("it answers");
            if round >= 100 {
                samples.push(milliseconds(start.elapsed()));
            }
        }
    }
    let [direct, nginx, preview] = samples.each_ref().map(|samples| percentile(samples, 50.0));
    for (name, samples) in NAMES.iter().zip(samples) {
        report.timing(&format!("request, one at a time: {name}"), samples);
    }
    report.figure("latency added by the preview, p50", preview - direct, "ms");
    report.figure("latency added by nginx, p50", nginx - direct, "ms");
}

async fn throughput(report: &mut Report, addresses: [&String; 3], time: Duration, rounds: usize) {
    let mut best = [0.0_f64; 3];
    for _ in 0..rounds {
        for (address, best) in addresses.into_iter().zip(&mut best) {
            *best = best.max(requests_per_second(address, time).await);
        }
    }
    for (name, best) in NAMES.iter().zip(best) {
        report.figure(&format!("requests/s on {CONNECTIONS} connections: {name}"), best, "/s");
    }
    report.figure("throughput of the preview, part of nginx's", best[2] / best[1], "x");
}

async fn requests_per_second(address: &str, time: Duration) -> f64 {
    let start = Instant::now();
    let workers: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let address = address.to_owned();
            tokio::spawn(async move {
                let (mut connection, mut count) = (Connection::open(&address).await.expect("it listens"), 0_u64);
                while start.elapsed() < time {
                    connection.get().await.expect("it answers");
                    count += 1;
                }
                count
            })
        })
        .collect();
    let mut count = 0;
    for worker in workers {
        count += worker.await.expect("no worker panics");
    }
    count as f64 / start.elapsed().as_secs_f64()
}

/// What the server holds for viewers who have asked once and stay.
async fn idle(report: &mut Report, server: &Server, preview: &str) {
    let before = private_kib(server.pid());
    let mut connections = Vec::new();
    for _ in 0..IDLE_CONNECTIONS {
        let mut connection = Connection::open(preview).await.expect("it listens");
        connection.get().await.expect("it answers");
        connections.push(connection);
    }
    let held = private_kib(server.pid()).saturating_sub(before) as f64;
    for connection in &mut connections {
        connection.get().await.expect("it was kept open while others came");
    }
    report.figure("memory of 1000 idle preview connections", held / 1024.0, "MiB");
}

fn private_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let value = |line: &str| line.split_whitespace().nth(1).and_then(|value| value.parse::<u64>().ok());
    text.lines().filter(|line| line.starts_with("Private_")).filter_map(value).sum()
}

/// A kept connection that asks for `/`.
struct Connection {
    stream: TcpStream,
    request: String,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: &str) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n");
        Ok(Self { stream, request, buffer: vec![0; 16 * 1024] })
    }

    async fn get(&mut self) -> std::io::Result<()> {
        self.stream.write_all(self.request.as_bytes()).await?;
        let mut read = 0;
        loop {
            let length = self.stream.read(&mut self.buffer[read..]).await?;
            if length == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            read += length;
            let text = &self.buffer[..read];
            if let Some(head) = text.windows(4).position(|window| window == b"\r\n\r\n") {
                if !text.starts_with(b"HTTP/1.1 200") {
                    return Err(std::io::Error::other(String::from_utf8_lossy(text).into_owned()));
                }
                if read >= head + 4 + 1024 {
                    return Ok(());
                }
            }
        }
    }
}
