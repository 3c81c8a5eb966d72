//! Previews of services in real sandboxes, reached as browsers reach them.

use std::time::{Duration, Instant};

use nagaya_api::tenki::v1;
use nagaya_testkit::{Client, Running, Sandbox, Server, Wanted};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(60);

/// An echo server that knows only as much of WebSocket as a handshake, and then sends back every byte.
const ECHO: &str = "
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline().strip(): pass
        self.wfile.write(b'HTTP/1.1 101 Switching Protocols\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\n\\r\\n')
        while data := self.rfile.read1(65536): self.wfile.write(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(('127.0.0.1', 9000), Echo).serve_forever()
";

async fn sandbox(client: &Client) -> Sandbox {
    client.create(&Wanted { inbound: true, ..Wanted::default() }).await.unwrap()
}

/// `HOST:PORT` of a port's preview.
async fn expose(client: &Client, sandbox: &Sandbox, port: i32) -> String {
    let request = v1::ExposePortRequest { session_id: sandbox.id.clone(), port, ..Default::default() };
    let answer = client.control.expose_port(request).await.unwrap();
    answer.preview_url.strip_prefix("http://").unwrap().to_owned()
}

/// The whole answer to a request on a connection of its own; empty when nothing listens.
async fn get(address: &str, path: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(address).await else { return String::new() };
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("it answers");
    String::from_utf8_lossy(&answer).into_owned()
}

async fn get_until(address: &str, path: &str, start: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = get(address, path).await;
        if answer.starts_with(start) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{start} is not reached: {answer}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn serve(sandbox: &Sandbox, bind: &str, port: u16) -> Running {
    let port = port.to_string();
    sandbox.start(&["python3", "-m", "http.server", "-d", "/home/tenki", "-b", bind, &port], false).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_reached_wherever_it_listens() {
    let server = Server::start();
    let client = Client::of(&server);
    let sandbox = sandbox(&client).await;
    sandbox.write("note.txt", "hello from inside").await.unwrap();
    for (bind, port) in [("127.0.0.1", 8001), ("0.0.0.0", 8002), ("::1", 8003), ("::", 8004)] {
        let address = expose(&client, &sandbox, port.into()).await;
        let refused = get(&address, "/").await;
        assert!(refused.starts_with("HTTP/1.1 502") && refused.contains("service_not_listening"), "{refused}");
        let _running = serve(&sandbox, bind, port).await;
        let answer = get_until(&address, "/note.txt", "HTTP/1.1 200").await;
        assert!(answer.ends_with("hello from inside"), "{bind}: {answer}");
    }
    sandbox.terminate().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_leads_there_again_after_a_crash_of_the_server() {
    let mut server = Server::start();
    let client = Client::of(&server);
    let sandbox = sandbox(&client).await;
    let address = expose(&client, &sandbox, 8000).await;
    // As a child of a command that has ended, it goes on without the server.
    sandbox.shell("setsid python3 -m http.server -b 127.0.0.1 8000 >/dev/null 2>&1 </dev/null &", false).await;
    get_until(&address, "/", "HTTP/1.1 200").await;

    server.kill();
    assert_eq!(get(&address, "/").await, "");
    server.restart();
    let client = Client::of(&server);
    assert!(get(&address, "/").await.starts_with("HTTP/1.1 200"));
    assert_eq!(expose(&client, &sandbox, 8000).await, address);

    client.terminate(&sandbox.id).await.unwrap();
    // Gone, and soon the port with it.
    let answer = get(&address, "/").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 410") || answer.starts_with("HTTP/1.1 404"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_and_large_bodies_pass() {
    let server = Server::start();
    let client = Client::of(&server);
    let sandbox = sandbox(&client).await;
    sandbox.write("echo.py", ECHO).await.unwrap();
    let _echo = sandbox.start(&["python3", "echo.py"], false).await.unwrap();
    let address = expose(&client, &sandbox, 9000).await;
    get_until(&address, "/", "HTTP/1.1 502").await;
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        let request = format!("GET / HTTP/1.1\r\nhost: {address}\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).await.unwrap();
        if start.ends_with(b"101") {
            break stream;
        }
        assert!(Instant::now() < deadline, "{}", String::from_utf8_lossy(&start));
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    while stream.read_u8().await.unwrap() != b'\n' || stream.read_u8().await.unwrap() != b'\r' {}
    let mut rest = Vec::new();
    while !rest.ends_with(b"\n") {
        rest.push(stream.read_u8().await.unwrap());
    }
    let sent: Vec<u8> = (0..8 << 20).map(|number: u32| (number % 251) as u8).collect();
    let (mut read, mut write) = stream.into_split();
    let writing = tokio::spawn({
        let sent = sent.clone();
        async move {
            write.write_all(&sent).await.unwrap();
            write
        }
    });
    let mut received = vec![0; sent.len()];
    tokio::time::timeout(PATIENCE, read.read_exact(&mut received)).await.unwrap().unwrap();
    assert!(received == sent);
    drop(writing.await.unwrap());

    let _files = serve(&sandbox, "127.0.0.1", 8000).await;
    sandbox.shell("head -c 256M /dev/zero >large", false).await;
    let address = expose(&client, &sandbox, 8000).await;
    get_until(&address, "/", "HTTP/1.1 200").await;
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let request = format!("GET /large HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let (mut total, mut buffer) = (0, vec![0; 1 << 16]);
    loop {
        match stream.read(&mut buffer).await.unwrap() {
            0 => break,
            length => total += length,
        }
    }
    assert!((256 << 20..(256 << 20) + 1024).contains(&total), "{total}");
    sandbox.terminate().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_gives_previews_names_on_the_one_listener() {
    let server = Server::start_with("preview_domain = \"p.localhost\"\n[pools]\nslots_ready = 2\n");
    let client = Client::of(&server);
    let sandbox = sandbox(&client).await;
    let _files = serve(&sandbox, "127.0.0.1", 8000).await;
    let request = v1::ExposePortRequest { session_id: sandbox.id.clone(), port: 8000, ..Default::default() };
    let url = client.control.expose_port(request).await.unwrap().preview_url.clone();
    let listener = server.endpoint().strip_prefix("http://").unwrap();
    let (_, port) = listener.rsplit_once(':').unwrap();
    assert!(url.starts_with("http://p") && url.ends_with(&format!(".p.localhost:{port}")), "{url}");

    let host = url.strip_prefix("http://").unwrap();
    let ask = |host: String| async move {
        let mut stream = TcpStream::connect(listener).await.unwrap();
        let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let deadline = Instant::now() + PATIENCE;
    while !ask(host.to_owned()).await.starts_with("HTTP/1.1 200") {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(ask("unknown.p.localhost".into()).await.contains("preview_not_found"));
    assert!(ask(listener.to_owned()).await.contains("Nagaya"), "other hosts are the server's own");
    sandbox.terminate().await.unwrap();
}
