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
        // Both lengths, and two equal ones (RFC 9112, section 6.1).
        format!("{head}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{second}"),
        format!("{head}transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n{second}"),
        format!("{head}content-length: 1\r\ncontent-length: 1\r\n\r\na{second}"),
        format!("{head}transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n{second}"),
        // Bare line feeds, as line ends and within a field.
        format!("GET / HTTP/1.1\nhost: web.p.example\nx: a\n\n{second}"),
        format!("GET / HTTP/1.1\r\nhost: web.p.example\nx: a\r\n\r\n{second}"),
        format!("GET / HTTP/1.1\r\nhost: web.p.example\r\nx: a\n\r\n{second}"),
        format!("GET / HTTP/1.1\r\nhost: web.p.example\r\nx: a\r\n\n{second}"),
        format!("GET / HTTP/1.1\r\nhost: web.p.example\r\nx: a\rb: c\r\n\r\n{second}"),
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
        assert!(answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 505"), "{request:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{request:?}: {answer}");
        let (_, reason) = answer.split_once("\r\n\r\n").unwrap();
        assert!(reason.len() > 10, "an answer with a reason: {request:?}: {answer}");
        assert!(heard.try_recv().is_err(), "{request:?}");
    }
}

/// Asks for the connection's end, so that a test sees all that is answered.
fn closing(request: &str) -> String {
    request.replacen("\r\n", "\r\nconnection: close\r\n", 1)
}

/// A refused request ends its connection, and those before it are answered first.
#[tokio::test]
async fn what_was_asked_before_a_refused_request_is_answered() {
    let (service, mut heard) = Service::answering(OK).await;
    let world = World::new(&service).await;
    let good = "GET /good HTTP/1.1\r\nhost: web.p.example\r\n\r\n";
    let answer = world.raw(format!("{good}{good}GET / HTTP/1.1\nhost: web.p.example\n\n{good}")).await;
    assert_eq!(answer.matches("HTTP/1.1 200").count(), 2, "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 400").count(), 1, "{answer}");
    assert!(answer.ends_with("lines of a header end with CR LF"), "{answer}");
    assert!(heard.recv().await.is_some() && heard.recv().await.is_some() && heard.try_recv().is_err());
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
    let world = World::with(service.address, config(), Some("web")).await;
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
        format!("{head}{}\r\n", "x: a\r\n".repeat(300)),
        format!("GET /{} HTTP/1.1\r\nhost: web.p.example\r\n\r\n", "a".repeat(1 << 20)),
    ] {
        let answer = world.raw(&request).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer:.100}");
        assert!(answer.split_once("\r\n\r\n").unwrap().1.len() > 10, "an answer with a reason: {answer}");
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

/// What an answer says in two ways means nothing: the viewer hears why, instead of a closed connection. What depends on
/// nothing of it passes.
#[tokio::test]
async fn answers_with_two_lengths_are_a_502_with_a_reason() {
    let chunks = "2\r\nok\r\n0\r\n\r\n";
    for (lengths, body) in [
        ("content-length: 2\r\ntransfer-encoding: chunked", chunks),
        ("transfer-encoding: chunked\r\ncontent-length: 2", chunks),
        ("content-length: 99\r\ntransfer-encoding: chunked", chunks),
        ("content-length: x\r\ntransfer-encoding: chunked", chunks),
        ("content-length: 2\r\ntransfer-encoding: identity", "ok"),
        ("content-length: 2\r\ncontent-length: 3", "ok"),
        ("content-length: 2, 3", "ok"),
        ("content-length: two", "ok"),
    ] {
        let (service, _heard) = Service::answering(format!("HTTP/1.1 200 OK\r\n{lengths}\r\n\r\n{body}")).await;
        let world = World::new(&service).await;
        let answer = world.get("/").await;
        assert_eq!(answer.status(), 502, "{lengths}");
        assert!(text(&answer).contains("service_broken"), "{lengths}: {}", text(&answer));
        // It is not kept: what comes after such an answer belongs to nobody.
        assert_eq!(world.get("/").await.status(), 502);
        assert_eq!(service.connections(), 2);
    }
    let same = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nContent-Length: 2, 2\r\n\r\nok";
    let (service, _heard) = Service::answering(same).await;
    let answer = World::new(&service).await.raw(closing("GET / HTTP/1.1\r\nhost: web.p.example\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("ok"), "{answer}");
    assert_eq!(answer.matches("content-length").count(), 1, "{answer}");
    assert!(answer.contains("content-length: 2\r\n"), "{answer}");
    for lengths in [
        "content-length: 2\r\ntransfer-encoding: chunked",
        "content-length: 2\r\ncontent-length: 2",
        "content-length: x",
    ] {
        let (service, _heard) = Service::answering(format!("HTTP/1.1 200 OK\r\n{lengths}\r\n\r\n")).await;
        let answer = World::new(&service).await.raw(closing("HEAD / HTTP/1.1\r\nhost: web.p.example\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{lengths}: {answer}");
    }
}

/// What is unusual and allowed reaches the service as it was sent, and its answer the viewer.
#[tokio::test]
async fn what_is_unusual_and_valid_passes() {
    let (service, mut heard) = Service::answering(OK).await;
    let world = World::new(&service).await;
    for target in [
        "/?",
        "//",
        "//a//b/",
        "/.",
        "/../x",
        "/%",
        "/%zz",
        "/%00",
        "/a|b",
        "/{a}",
        "/[a]",
        "/a^b",
        "/a\\b",
        "/\"a\"",
        "/:80",
        "/@a",
        "/;a=b",
        "/a?b?c",
        "/?a={b:[1]}",
        "/é/長",
        "/!$&'()*+,;=",
        "/~a",
    ] {
        let answer =
            world.raw(format!("GET {target} HTTP/1.1\r\nhost: web.p.example\r\nconnection: close\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{target}: {answer}");
        let request = heard.recv().await.unwrap();
        assert!(request.starts_with(&format!("GET {target} HTTP/1.1\r\n")), "{target}: {request}");
    }
    for target in ["/<a>", "/`a`", "/a b", "/?a=\"b\""] {
        let answer = world.raw(format!("GET {target} HTTP/1.1\r\nhost: web.p.example\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 400") && answer.len() > 100, "{target}: {answer}");
    }
    // Methods nobody knows, and the asterisk.
    for line in ["PROPFIND /x", "M-SEARCH /x", "OPTIONS *"] {
        let answer = world.raw(format!("{line} HTTP/1.1\r\nhost: web.p.example\r\nconnection: close\r\n\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{line}: {answer}");
        assert!(heard.recv().await.unwrap().starts_with(&format!("{line} HTTP/1.1\r\n")));
    }
}

#[tokio::test]
async fn many_header_fields_pass_both_ways() {
    let fields: String = (0..240).map(|number| format!("x-{number}: {number}\r\n")).collect();
    let cookies: String = (0..200).map(|number| format!("set-cookie: c{number}=1\r\n")).collect();
    let (service, mut heard) =
        Service::answering(format!("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{cookies}\r\nok")).await;
    let world = World::new(&service).await;
    let answer = world.raw(format!("GET / HTTP/1.1\r\nhost: web.p.example\r\nconnection: close\r\n{fields}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:.200}");
    assert_eq!(answer.matches("set-cookie").count(), 200);
    assert_eq!(heard.recv().await.unwrap().matches("\r\nx-").count(), 240 + 3, "three tell of the viewer");
}

/// Answers that announce themselves: hints and progress go no further, the answer does.
#[tokio::test]
async fn early_hints_do_not_stand_in_for_the_answer() {
    let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n";
    for before in [hints.to_owned(), hints.repeat(3), format!("HTTP/1.1 102 Processing\r\n\r\n{hints}")] {
        for pause in [false, true] {
            let before = before.clone();
            let service = Service::start(move |_, mut stream| {
                let before = before.clone();
                async move {
                    while let Some(request) = read_request(&mut stream).await {
                        stream.write_all(before.as_bytes()).await.unwrap();
                        if pause {
                            // The answer comes with a packet of its own.
                            tokio::task::yield_now().await;
                            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                        }
                        let answer = if request.starts_with("HEAD") { OK.trim_end_matches("ok") } else { OK };
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                }
            })
            .await;
            let world = World::new(&service).await;
            for method in ["GET", "HEAD"] {
                let request = Request::builder().method(method).uri("/").header("host", HOST);
                let answer = world.http1(request.body(Full::default()).unwrap()).await;
                assert_eq!(answer.status(), 200, "{method}");
                assert!(!answer.headers().contains_key("link"));
            }
            let upload = Request::post("/").header("host", HOST).body(Full::from("body")).unwrap();
            assert_eq!(world.http1(upload).await.status(), 200);
        }
    }
}

/// The API takes a cookie as a key. Where previews share its domain, a browser sends it to them as well.
#[tokio::test]
async fn the_servers_own_cookie_passes_in_neither_direction() {
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nset-cookie: a=1\r\nset-cookie: api_session=forged; Domain=p.example\r\nset-cookie: =api_session=forged\r\n\r\nok";
    let (service, mut heard) = Service::answering(answer).await;
    let world = World::new(&service).await;
    let request = Request::get("/").header("host", HOST).header("cookie", "b=2; api_session=secret");
    let answer = world.http1(request.body(Full::default()).unwrap()).await;
    let set: Vec<_> = answer.headers().get_all("set-cookie").iter().map(|value| value.to_str().unwrap()).collect();
    assert_eq!(set, ["a=1"]);
    let request = heard.recv().await.unwrap();
    assert!(request.contains("cookie: b=2\r\n") && !request.contains("secret"), "{request}");
}
