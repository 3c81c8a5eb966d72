//! Viewers who mean no good.

use http::Request;
use http_body_util::Full;
use tokio::io::AsyncWriteExt;

use crate::support::*;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Every request that could mean one thing to us and another to the service is refused, or reaches the service in a
/// form with one meaning only.
#[tokio::test]
async fn no_request_is_smuggled() {
    let head = "POST / HTTP/1.1\r\nhost: web.p.example\r\n";
    let second = "GET /smuggled HTTP/1.1\r\nhost: web.p.example\r\n\r\n";
    let refused = [
        format!("{head}content-length: 1\r\ncontent-length: 2\r\n\r\nab"),
        format!("{head}content-length: 1, 2\r\n\r\nab"),
        format!("{head}content-length: +1\r\n\r\na"),
        format!("{head}content-length: -1\r\n\r\na"),
        format!("{head}content-length: 0x1\r\n\r\na"),
        format!("{head}content-length: 99999999999999999999\r\n\r\na"),
        format!("{head}content-length : 1\r\n\r\na"),
        format!("{head}transfer-encoding: identity\r\n\r\n"),
        format!("{head}transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        format!("{head}transfer-encoding: xchunked\r\n\r\n0\r\n\r\n"),
        format!("{head}x: a\r\n folded: b\r\n\r\n"),
        format!("{head}x\r\n\r\n"),
        format!("{head}: x\r\n\r\n"),
        format!("{head}x: a\0b\r\n\r\n"),
        format!("{head}host: other.p.example\r\n\r\n"),
        format!("POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\nhost: web.p.example\r\n\r\n0\r\n\r\n{second}"),
        "GET / HTTP/1.1\r\n\r\n".to_owned(),
        "GET /a b HTTP/1.1\r\nhost: web.p.example\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\nhost: web.p.example\r\n\r\n".to_owned(),
        "CONNECT web.p.example:80 HTTP/1.1\r\nhost: web.p.example\r\n\r\n".to_owned(),
        "CONNECT web.p.example:80 HTTP/1.1\r\nhost: web.p.example\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"
            .to_owned(),
    ];
    for request in refused {
        let (service, mut heard) = Service::answering(OK).await;
        let answer = World::new(&service).await.raw(closing(&request)).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{request:?}: {answer}");
        assert!(heard.try_recv().is_err(), "{request:?}");
    }
    // Both lengths: the chunks count (RFC 9112, section 6.1), and nothing more is read from the connection.
    for lengths in
        ["content-length: 5\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 5"]
    {
        let (service, mut heard) = Service::answering(OK).await;
        let answer = World::new(&service).await.raw(format!("{head}{lengths}\r\n\r\n0\r\n\r\n{second}")).await;
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
        let request = heard.recv().await.unwrap().to_lowercase();
        assert!(request.contains("transfer-encoding: chunked") && !request.contains("content-length"), "{request}");
        assert!(heard.try_recv().is_err());
    }
}

/// Asks for the connection's end, so that a test sees all that is answered.
fn closing(request: &str) -> String {
    request.replacen("\r\n", "\r\nconnection: close\r\n", 1)
}

#[tokio::test]
async fn a_bare_line_feed_ends_a_line_for_us_and_for_the_service() {
    let (service, mut heard) = Service::answering(OK).await;
    let world = World::new(&service).await;
    world.raw("GET / HTTP/1.1\nhost: web.p.example\nx: a\nconnection: close\n\n").await;
    let request = heard.recv().await.unwrap();
    assert!(request.contains("\r\nx: a\r\n"), "{request:?}");
    assert_eq!(request.matches('\n').count(), request.matches("\r\n").count(), "{request:?}");
}

#[tokio::test]
async fn broken_chunks_break_the_request_off() {
    for chunks in ["zz\r\n", "5\r\nabc\r\n0\r\n\r\n", "1;\nx\r\na\r\n", "ffffffffffffffff1\r\n", "1\r\nab\r\n"] {
        let (service, mut heard) = Service::answering(OK).await;
        let head = "POST / HTTP/1.1\r\nhost: web.p.example\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
        let world = World::new(&service).await;
        let mut stream = world.connect().await;
        stream.write_all(format!("{head}{chunks}").as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        let _ = soon(tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer)).await;
        assert!(!answer.starts_with("HTTP/1.1 200"), "{chunks:?}: {answer}");
        assert!(heard.try_recv().is_err(), "the service never sees a whole request: {chunks:?}");
    }
}

#[tokio::test]
async fn hosts_in_every_disguise() {
    let (service, mut heard) = Service::answering(OK).await;
    let world = World::new(&service).await;
    let long = "a".repeat(10_000);
    for (host, status) in [
        ("WEB.P.Example", 200),
        ("web.p.example.", 200),
        ("web.p.example:9", 200),
        ("other.p.example", 404),
        ("p.example", 404),
        ("a.web.p.example", 404),
        ("example.com", 421),
        ("webp.example", 421),
        ("[::1]:80", 421),
        ("127.0.0.1", 421),
        ("web.p.example:port", 400),
        ("web.p.example/x", 400),
        ("web.p.example, web.p.example", 400),
        (&format!("{long}.p.example"), 400),
        ("", 400),
    ] {
        let request = Request::get("/").header("host", host).body(Full::default()).unwrap();
        assert_eq!(world.http1(request).await.status(), status, "{host:.100}");
        if status == 200 {
            let request = heard.recv().await.unwrap();
            assert!(request.contains(&format!("host: {host}\r\n")), "as the viewer sent it: {request}");
        }
    }
    // An absolute target wins over the field, and services get the usual form.
    let request = Request::get("http://web.p.example/x?y").header("host", "other.p.example").body(Full::default());
    assert_eq!(world.http1(request.unwrap()).await.status(), 200);
    let request = heard.recv().await.unwrap();
    assert!(request.starts_with("GET /x?y HTTP/1.1\r\n") && request.contains("host: web.p.example\r\n"), "{request}");
}

#[tokio::test]
async fn a_page_of_another_site_cannot_reach_a_loopback_port() {
    let (service, _heard) = Service::answering(OK).await;
    let world = World::with(service.address, settings(), Some("web")).await;
    for (host, status) in [
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:20000", 200),
        ("[::1]:1", 200),
        ("evil.example", 421),
        ("web.p.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.2", 421),
        ("0.0.0.0", 421),
        ("169.254.169.254", 421),
    ] {
        let request = Request::get("/").header("host", host).body(Full::default()).unwrap();
        assert_eq!(world.http1(request).await.status(), status, "{host}");
    }
}

#[tokio::test]
async fn headers_have_an_end() {
    let (service, mut heard) = Service::answering(OK).await;
    let world = World::new(&service).await;
    let head = "GET / HTTP/1.1\r\nhost: web.p.example\r\n";
    for request in [
        format!("{head}x: {}\r\n\r\n", "a".repeat(1 << 20)),
        format!("{head}{}\r\n", "x: a\r\n".repeat(200)),
        format!("GET /{} HTTP/1.1\r\nhost: web.p.example\r\n\r\n", "a".repeat(1 << 20)),
    ] {
        let answer = world.raw(&request).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer:.100}");
        assert!(heard.try_recv().is_err());
    }
}

#[tokio::test]
async fn a_service_with_an_endless_header_is_given_up() {
    let service = Service::start(|_, mut stream| async move {
        read_request(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
        while stream.write_all(b"x: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n").await.is_ok() {}
    })
    .await;
    assert_eq!(World::new(&service).await.get("/").await.status(), 502);
}
