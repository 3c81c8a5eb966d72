//! Bodies that stream: large ones, slow ones, endless ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

/// More than all buffers on the way together.
const LARGE: usize = 64 << 20;

#[tokio::test]
async fn large_bodies_pass_both_ways() {
    let service = Service::start(|_, mut stream| async move {
        read_head(&mut stream).await.unwrap();
        let (mut read, mut buffer, mut sum) = (0, vec![0; 1 << 16], 0u64);
        while read < LARGE {
            let length = stream.read(&mut buffer).await.unwrap();
            sum += buffer[..length].iter().map(|byte| u64::from(*byte)).sum::<u64>();
            read += length;
        }
        let head = format!("HTTP/1.1 200 OK\r\nsum: {sum}\r\ncontent-length: {LARGE}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        for part in vec![7; LARGE].chunks(1 << 16) {
            stream.write_all(part).await.unwrap();
        }
    })
    .await;
    let world = World::new(&service).await;
    let body = Bytes::from(vec![3; LARGE]);
    let request = Request::post("/").header("host", HOST).body(Full::new(body)).unwrap();
    let answer = world.http1(request).await;
    assert_eq!(answer.headers()["sum"], (3 * LARGE as u64).to_string());
    assert!(answer.body().len() == LARGE && answer.body().iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn an_upload_goes_on_while_its_viewer_takes_no_answer() {
    let (whole, received) = tokio::sync::oneshot::channel();
    let whole = std::sync::Mutex::new(Some(whole));
    let service = Service::start(move |_, mut stream| {
        let whole = whole.lock().unwrap().take().unwrap();
        async move {
            read_head(&mut stream).await.unwrap();
            let (mut reading, mut writing) = stream.into_split();
            tokio::spawn(async move {
                let _ = writing.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
                while writing.write_all(&[0; 1 << 16]).await.is_ok() {}
            });
            let mut left = vec![0; LARGE];
            reading.read_exact(&mut left).await.unwrap();
            whole.send(()).unwrap();
        }
    })
    .await;
    let mut viewer = World::new(&service).await.connect().await;
    let head = format!("POST / HTTP/1.1\r\nhost: web.p.example\r\ncontent-length: {LARGE}\r\n\r\n");
    viewer.write_all(head.as_bytes()).await.unwrap();
    soon(viewer.write_all(&vec![0; LARGE])).await.unwrap();
    soon(received).await.unwrap();
}

/// What gets through while the other side does not read: socket buffers and a little of ours.
#[tokio::test]
async fn the_slower_side_holds_the_faster_one_back() {
    const HELD_MAX: usize = 24 << 20;
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    let service = Service::start(move |_, mut stream| {
        let sent = Arc::clone(&counted);
        async move {
            let head = read_head(&mut stream).await.unwrap();
            if head.starts_with("POST") {
                return tokio::time::sleep(PATIENCE).await;
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            while stream.write_all(&[0; 1 << 16]).await.is_ok() {
                sent.fetch_add(1 << 16, Ordering::SeqCst);
            }
        }
    })
    .await;
    let world = World::new(&service).await;
    let mut viewer = world.connect().await;
    viewer.write_all(b"GET / HTTP/1.1\r\nhost: web.p.example\r\n\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = sent.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(before > 0 && before < HELD_MAX, "{before} bytes are held");
    assert_eq!(sent.load(Ordering::SeqCst), before, "the service stands still");

    let mut uploader = world.connect().await;
    uploader.write_all(b"POST / HTTP/1.1\r\nhost: web.p.example\r\ncontent-length: 1073741824\r\n\r\n").await.unwrap();
    let mut uploaded = 0;
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(300), uploader.write(&[0; 1 << 16])).await {
        uploaded += written.unwrap();
        assert!(uploaded < HELD_MAX, "nothing holds the viewer back");
    }
}

#[tokio::test]
async fn events_arrive_as_they_are_sent_and_end_with_the_server() {
    let service = Service::start(|_, mut stream| async move {
        read_head(&mut stream).await.unwrap();
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        for number in 0..3 {
            stream.write_all(format!("9\r\ndata: {number}\n\n\r\n").as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::sleep(PATIENCE).await;
    })
    .await;
    let world = World::new(&service).await;
    let mut stream = world.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: web.p.example\r\n\r\n").await.unwrap();
    read_head(&mut stream).await.unwrap();
    let mut read = String::new();
    while !read.contains("data: 2") {
        read.push(char::from(soon(stream.read_u8()).await.unwrap()));
    }
    world.proxy.stop();
    let mut rest = String::new();
    while !rest.ends_with("0\r\n\r\n") {
        rest.push(char::from(soon(stream.read_u8()).await.unwrap()));
    }
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let answer =
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n2\r\nok\r\n0\r\nx-sum: 9\r\n\r\n";
    let (service, mut heard) = Service::answering(answer).await;
    let world = World::new(&service).await;
    let request = "POST / HTTP/1.1\r\nhost: web.p.example\r\nte: trailers\r\nconnection: te, close\r\ntrailer: x-in\r\n\
                   transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-in: 1\r\n\r\n";
    let answered = world.raw(request).await;
    assert!(answered.ends_with("0\r\nx-sum: 9\r\n\r\n"), "{answered}");
    let request = heard.recv().await.unwrap();
    assert!(request.ends_with("1\r\na\r\n0\r\nx-in: 1\r\n\r\n"), "{request}");
    assert!(request.contains("te: trailers\r\n"));
}

#[tokio::test]
async fn the_service_decides_whether_it_wants_a_body() {
    let head = "POST / HTTP/1.1\r\nhost: web.p.example\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    let service = Service::start(|_, mut stream| async move {
        let request = read_head(&mut stream).await.unwrap();
        assert!(request.contains("expect: 100-continue"), "{request}");
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await.unwrap();
        let mut body = [0; 4];
        stream.read_exact(&mut body).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n").await.unwrap();
        stream.write_all(&body).await.unwrap();
    })
    .await;
    let world = World::new(&service).await;
    let mut stream = world.connect().await;
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(soon(read_head(&mut stream)).await.unwrap(), "HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"body").await.unwrap();
    assert!(soon(read_head(&mut stream)).await.unwrap().starts_with("HTTP/1.1 200"));

    let service = Service::start(|_, mut stream| async move {
        read_head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0, "no byte of the body comes");
    })
    .await;
    let answer = World::new(&service).await.raw(head).await;
    assert!(answer.starts_with("HTTP/1.1 413") && !answer.contains("100 Continue"), "{answer}");
}

#[tokio::test]
async fn http_2_viewers_reach_http_1_services() {
    let (service, mut heard) =
        Service::answering("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nkeep-alive: timeout=5\r\n\r\nok").await;
    let world = World::new(&service).await;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(world.connect().await)).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..2 {
        let request = Request::post("http://web.p.example/x").header("cookie", "a=1").header("cookie", "b=2");
        let request = request.body(Full::new(Bytes::from_static(b"body"))).unwrap();
        let answer = soon(sender.send_request(request)).await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.version()), (200, Version::HTTP_2));
        assert!(!answer.headers().contains_key("keep-alive"));
        assert_eq!(answer.collect().await.unwrap().to_bytes(), "ok");
        let request = heard.recv().await.unwrap();
        assert!(request.starts_with("POST /x HTTP/1.1\r\n") && request.ends_with("\r\n\r\nbody"), "{request}");
        assert!(request.contains("cookie: a=1; b=2\r\n") && request.contains("host: web.p.example\r\n"), "{request}");
    }
    assert_eq!(service.connections(), 1);
}
