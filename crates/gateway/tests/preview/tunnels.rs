//! WebSockets and other protocols after an upgrade.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Empty;
use hyper::ext::Protocol;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::*;

const UPGRADE: &str = "GET /ws HTTP/1.1\r\nhost: web.p.example\r\nConnection: keep-alive, Upgrade\r\n\
                       Upgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n";
const SWITCHED: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: y\r\n\r\n";

/// Switches, then sends back what it gets, and ends when the other side does.
async fn echo() -> Service {
    Service::start(|_, mut stream: TcpStream| async move {
        let request = read_head(&mut stream).await.unwrap().to_lowercase();
        assert!(request.contains("connection: upgrade\r\n") && request.contains("upgrade: websocket\r\n"), "{request}");
        assert!(request.contains("sec-websocket-key: "), "{request}");
        stream.write_all(SWITCHED).await.unwrap();
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    })
    .await
}

#[tokio::test]
async fn a_websocket_carries_bytes_both_ways_until_both_have_ended() {
    let service = echo().await;
    let world = World::new(&service).await;
    let mut stream = world.connect().await;
    stream.write_all(UPGRADE.as_bytes()).await.unwrap();
    let head = soon(read_head(&mut stream)).await.unwrap().to_lowercase();
    assert!(head.starts_with("http/1.1 101") && head.contains("sec-websocket-accept: y\r\n"), "{head}");
    assert!(head.contains("connection: upgrade\r\n") && head.contains("upgrade: websocket\r\n"), "{head}");
    stream.write_all(b"hello").await.unwrap();
    let mut echoed = [0; 5];
    soon(stream.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"hello");
    assert_eq!(world.door.visits.load(Ordering::SeqCst), 1, "the session is in use");
    stream.shutdown().await.unwrap();
    assert_eq!(soon(stream.read(&mut echoed)).await.unwrap(), 0);
    soon(async {
        while world.door.visits.load(Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_sent_right_behind_an_upgrade_is_not_lost() {
    let service = echo().await;
    let world = World::new(&service).await;
    let mut stream = world.connect().await;
    stream.write_all(format!("{UPGRADE}early").as_bytes()).await.unwrap();
    read_head(&mut stream).await.unwrap();
    let mut echoed = [0; 5];
    soon(stream.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"early");
}

#[tokio::test]
async fn a_stopping_server_ends_tunnels() {
    let service = echo().await;
    let world = World::new(&service).await;
    let mut stream = world.connect().await;
    stream.write_all(UPGRADE.as_bytes()).await.unwrap();
    read_head(&mut stream).await.unwrap();
    world.proxy.stop();
    assert_eq!(soon(stream.read(&mut [0])).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn a_viewer_who_never_reads_holds_the_service_back() {
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    let service = Service::start(move |_, mut stream: TcpStream| {
        let sent = Arc::clone(&counted);
        async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(SWITCHED).await.unwrap();
            while stream.write_all(&[0; 1 << 16]).await.is_ok() {
                sent.fetch_add(1 << 16, Ordering::SeqCst);
            }
        }
    })
    .await;
    let world = World::new(&service).await;
    let mut stream = world.connect().await;
    stream.write_all(UPGRADE.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = sent.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(sent.load(Ordering::SeqCst), before);
    assert!(before < 24 << 20, "{before}");
}

#[tokio::test]
async fn refused_upgrades_and_unwanted_ones() {
    let (service, _heard) = Service::answering("HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await;
    let answer = World::new(&service).await.raw(UPGRADE.replace("keep-alive", "close")).await;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.ends_with("no"), "{answer}");

    let (service, _heard) = Service::answering(SWITCHED).await;
    let answer = World::new(&service).await.get("/").await;
    assert_eq!(answer.status(), 502, "nobody asked for another protocol");

    // HTTP/2 in clear text would pass us by.
    let (service, mut heard) = Service::answering("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    let world = World::new(&service).await;
    let request = UPGRADE.replace("keep-alive", "close").replace("websocket", "h2c");
    assert!(world.raw(request).await.starts_with("HTTP/1.1 200"));
    assert!(!heard.recv().await.unwrap().to_lowercase().contains("upgrade:"));
}

#[tokio::test]
async fn websockets_over_http_2() {
    let service = echo().await;
    let world = World::new(&service).await;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(world.connect().await)).await.unwrap();
    tokio::spawn(connection);
    let request = || {
        Request::builder()
            .method(Method::CONNECT)
            .uri("http://web.p.example/ws")
            .extension(Protocol::from_static("websocket"))
            .header("sec-websocket-version", "13")
            .body(Empty::<Bytes>::new())
            .unwrap()
    };
    // The server's settings tell that it can do this; they may come a moment later.
    let answer = loop {
        match soon(sender.send_request(request())).await {
            Ok(answer) => break answer,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    assert_eq!(answer.status(), 200);
    assert!(!answer.headers().contains_key("upgrade"));
    let mut stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    stream.write_all(b"hello").await.unwrap();
    let mut echoed = [0; 5];
    soon(stream.read_exact(&mut echoed)).await.unwrap();
    assert_eq!(&echoed, b"hello");
}
