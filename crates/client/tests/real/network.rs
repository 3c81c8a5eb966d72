use std::time::Duration;

use nagaya_client::{
    Code, CreatePreviewUrlOptions, DialReason, Error, ExposeOptions, ListPreviewUrlsOptions, RefusalKind, Running,
    Session, SshCertificateOptions, TunnelEndReason, TunnelOptions,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::world::{World, say, small};

crate::cases!(
    ports_are_exposed_and_fetched,
    preview_urls_outlive_sessions,
    ssh_is_reached_through_the_gateway,
    sockets_are_dialled,
    a_tunnel_leads_to_this_machine,
);

/// Starts a program that says when it listens; it ends with what is returned.
async fn start(session: &Session, program: &str) -> Running {
    let mut running = session.command(["python3", "-c", program]).start().await.unwrap();
    assert!(running.next().await.unwrap().is_some(), "it says that it listens");
    running
}

const PAGE: &str = "
import http.server
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'a page')
    def log_message(self, *_): pass
server = http.server.HTTPServer(('127.0.0.1', 8000), Page)
print('listening', flush=True)
server.serve_forever()
";

async fn fetch(url: &str) -> String {
    let authority = url.strip_prefix("http://").unwrap().trim_end_matches('/');
    let mut stream = TcpStream::connect(authority).await.unwrap();
    stream.write_all(format!("GET / HTTP/1.0\r\nHost: {authority}\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.rsplit("\r\n\r\n").next().unwrap().to_owned()
}

async fn ports_are_exposed_and_fetched(world: &World) {
    let session = &world.session;
    let _service = start(session, PAGE).await;
    let ttl = Some(Duration::from_secs(600));
    let exposed = session.expose_port(8000, ExposeOptions::default().ttl(ttl).slug(None)).await.unwrap();
    assert_eq!(exposed.port, 8000);
    assert!(exposed.expires_at.is_some());
    assert_eq!(fetch(&exposed.preview_url).await, "a page");
    let ports = session.exposed_ports().await.unwrap();
    assert_eq!(ports.iter().map(|port| &port.preview_url).collect::<Vec<_>>(), [&exposed.preview_url]);
    session.unexpose_port(8000).await.unwrap();
    assert!(session.exposed_ports().await.unwrap().is_empty());

    let opened = session.open_preview(8000).await.unwrap();
    assert!(!opened.viewer_token.is_empty() && opened.expires_at.is_some());
    assert!(world.client.touch_preview(&opened.viewer_token).await.unwrap().is_some());

    let closed = small().allow_inbound(false);
    let closed = world.client.create(closed).await.unwrap();
    let refused = closed.expose_port(8000, ExposeOptions::default()).await.unwrap_err();
    assert!(matches!(refused, Error::Refused { kind: RefusalKind::InboundDisabled, .. }), "{refused:?}");
    closed.close().await.unwrap();
}

async fn preview_urls_outlive_sessions(world: &World) {
    let (client, session) = (&world.client, &world.session);
    let options = CreatePreviewUrlOptions::default().slug("client-suite".into());
    let url = client.create_preview_url(options.clone()).await.unwrap();
    assert_eq!((url.slug.as_str(), &url.session_id, url.port), ("client-suite", &None, None));
    let taken = client.create_preview_url(options).await.unwrap_err();
    assert_eq!(taken.code(), Some(Code::SlugTaken), "{taken:?}");
    let bound = client.bind_preview_url(&url.id, session.id(), 8000).await.unwrap();
    assert_eq!((bound.session_id.as_deref(), bound.port), (Some(session.id()), Some(8000)));
    assert_eq!(client.get_preview_url(&url.id).await.unwrap().port, Some(8000));
    assert_eq!(client.get_preview_url_by_slug("client-suite").await.unwrap().id, url.id);
    let of_session = ListPreviewUrlsOptions::default().session_id(Some(session.id().into()));
    assert!(client.list_preview_urls(of_session).await.unwrap().iter().any(|each| each.id == url.id));
    assert_eq!(client.unbind_preview_url(&url.id).await.unwrap().session_id, None);
    client.delete_preview_url(&url.id).await.unwrap();
    let gone = client.get_preview_url(&url.id).await.unwrap_err();
    assert!(
        matches!(gone, Error::Refused { kind: RefusalKind::NotFound, .. })
            && gone.code() == Some(Code::PreviewNotFound),
        "{gone:?}"
    );
}

async fn ssh_is_reached_through_the_gateway(world: &World) {
    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ test";
    let options = SshCertificateOptions::default()
        .public_key(KEY.into())
        .ttl(Some(Duration::from_secs(60)))
        .source_addresses(Vec::new());
    let certificate = world.session.issue_ssh_certificate(options).await.unwrap();
    assert!(certificate.certificate.starts_with("ssh-ed25519-cert-v01@openssh.com "), "{certificate:?}");
    assert!(certificate.authority.starts_with("ssh-ed25519 ") && certificate.permissions.pty);
    world.session.set_ssh_authorized_keys(vec![KEY.into()]).await.unwrap();

    let mut stream = world.session.ssh().await.unwrap();
    stream.write_all(b"SSH-2.0-test\r\n").await.unwrap();
    let mut greeting = [0; 8];
    stream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"SSH-2.0-");
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await.unwrap().unwrap();

    let unknown = world.client.session("0190a000-0000-7000-8000-000000000000").ssh().await.unwrap_err();
    assert!(matches!(unknown, Error::Refused { kind: RefusalKind::SessionNotFound, .. }), "{unknown:?}");
}

const ECHO: &str = "
import os, socket
path = '/home/tenki/echo.sock'
if os.path.exists(path): os.unlink(path)
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
print('listening', flush=True)
while True:
    peer, _ = server.accept()
    total = 0
    while data := peer.recv(65536):
        total += len(data)
        peer.sendall(data)
    peer.sendall(b' and %d bytes' % total)
    peer.close()
";

async fn sockets_are_dialled(world: &World) {
    let session = &world.session;
    let _echo = start(session, ECHO).await;
    let stream = session.dial("/home/tenki/echo.sock", Some(Duration::from_secs(5))).await.unwrap();
    let (mut from, mut to) = tokio::io::split(stream);
    let sending = tokio::spawn(async move {
        to.write_all(&vec![b'x'; 1 << 20]).await.unwrap();
        // It closes one direction only: the rest of the answer still comes.
        to.shutdown().await.unwrap();
        to
    });
    let mut answer = Vec::new();
    from.read_to_end(&mut answer).await.unwrap();
    drop(sending.await.unwrap());
    assert_eq!(answer.len(), (1 << 20) + b" and 1048576 bytes".len());
    assert!(answer.ends_with(b" and 1048576 bytes"));

    let reason = async |path| match session.dial(path, None).await {
        Err(Error::DialClosed { reason, .. }) => reason,
        other => panic!("{path}: {other:?}"),
    };
    assert_eq!(reason("/etc/passwd").await, DialReason::PathDenied);
    say(session, "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('dead.sock')\"").await;
    assert_eq!(reason("/home/tenki/dead.sock").await, DialReason::Refused);
}

/// Sends back what it gets, and at the end how much it was.
pub async fn echo_here() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut peer, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = peer.split();
                let count = tokio::io::copy(&mut from, &mut to).await.unwrap_or(0);
                let _ = to.write_all(format!(" and {count} bytes").as_bytes()).await;
                let _ = to.shutdown().await;
            });
        }
    });
    address
}

/// What a program in the sandbox gets back when it sends this many bytes there.
pub async fn echoed(session: &Session, port: u16, bytes: u64) -> String {
    let program = format!(
        "
import socket, sys, threading
peer = socket.create_connection(('127.0.0.1', {port}))
def send():
    peer.sendall(b'x' * {bytes})
    peer.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
got = b''
while data := peer.recv(65536): got += data
print(len(got), got[-20:].lstrip(b'x').decode().strip())
"
    );
    let output = session.command(["python3", "-c", &program]).output().await.unwrap().check().unwrap();
    output.stdout_text().trim().to_owned()
}

async fn a_tunnel_leads_to_this_machine(world: &World) {
    let target = echo_here().await;
    let session = &world.session;
    let mut tunnel = session.tunnel(&target, TunnelOptions::default()).await.unwrap();
    let port = tunnel.sandbox_port();
    assert!(tunnel.sandbox_address().ends_with(&format!(":{port}")));
    assert_eq!(echoed(session, port, 3).await, "15 and 3 bytes");
    let (first, second) = tokio::join!(echoed(session, port, 1 << 20), echoed(session, port, 3 << 20));
    assert!(first.ends_with("and 1048576 bytes") && second.ends_with("and 3145728 bytes"), "{first} {second}");

    let taken = TunnelOptions::default().sandbox_port(port);
    let refused = session.tunnel(&target, taken).await.unwrap_err();
    assert!(matches!(&refused, Error::TunnelEnded(end) if end.reason == TunnelEndReason::HostError), "{refused:?}");
    assert!(matches!(session.tunnel("nowhere", TunnelOptions::default()).await, Err(Error::InvalidOptions(_))));
    tokio::select! {
        end = tunnel.ended() => panic!("{end}"),
        () = tokio::time::sleep(Duration::from_millis(50)) => {}
    }
    tunnel.close().await;
    let listens = "python3 -c \"import socket; socket.create_connection(('127.0.0.1', PORT))\"";
    let closed = session.shell(listens.replace("PORT", &port.to_string())).output().await.unwrap();
    assert!(!closed.is_success(), "nothing listens any more");
}
