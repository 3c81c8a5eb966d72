//! Ordinary requests, kept connections, and answers of our own.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use nagaya_api::error::{Code, Error};
use nagaya_engine::ports::Ingress;
use nagaya_gateway::config::PreviewsConfig;
use nagaya_gateway::preview::{DomainIngress, LoopbackIngress};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

use crate::support::*;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nserver: test\r\nconnection: x-hop\r\nx-hop: 1\r\n\r\nok";

#[tokio::test]
async fn requests_pass_on_one_kept_connection() {
    let (service, mut heard) = Service::answering(OK).await;
    let world = World::new(&service).await;
    for number in 0..10 {
        let answer = world.get(&format!("/a/b?c={number}")).await;
        assert_eq!((answer.status(), text(&answer).as_str()), (StatusCode::OK, "ok"));
        assert_eq!(answer.headers()["server"], "test");
        assert!(!answer.headers().contains_key("x-hop"));
        let request = heard.recv().await.unwrap();
        assert!(request.starts_with(&format!("GET /a/b?c={number} HTTP/1.1\r\n")), "{request}");
        assert!(request.contains("host: web.p.example\r\n"), "{request}");
        assert!(request.contains("x-forwarded-for: 127.0.0.1\r\n"), "{request}");
    }
    assert_eq!(service.connections(), 1);
    let traffic = world.proxy.traffic();
    assert_eq!((traffic.connections(), traffic.connections_open()), (1, 1));
    assert_eq!(traffic.bytes_from_sandboxes(), 10 * OK.len() as u64);
    assert!(traffic.bytes_to_sandboxes() > 10 * "GET /a/b?c=0 HTTP/1.1\r\nhost: web.p.example\r\n".len() as u64);
    assert_eq!((world.proxy.answers().of_services(), world.proxy.answers().of_its_own()), (10, 0));
    soon(async {
        while world.door.visits.load(std::sync::atomic::Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_restarted_sandbox_is_reached_on_a_fresh_connection() {
    let (old, _heard) = Service::answering(OK).await;
    let (new, _heard) = Service::answering(OK.replace("ok", "no")).await;
    let world = World::new(&old).await;
    assert_eq!(text(&world.get("/").await), "ok");
    world.door.lead_to(new.address);
    assert_eq!(text(&world.get("/").await), "no");
    assert_eq!((old.connections(), new.connections()), (1, 1));
}

/// Answers the first request of its first connection, and then closes without an answer.
async fn forgetful() -> Service {
    Service::start(|number, mut stream| async move {
        let mut answered = false;
        while read_request(&mut stream).await.is_some() {
            if number == 0 && answered {
                return;
            }
            answered = true;
            stream.write_all(OK.as_bytes()).await.unwrap();
        }
    })
    .await
}

#[tokio::test]
async fn what_changes_nothing_is_sent_again_when_a_kept_connection_was_closed() {
    let service = forgetful().await;
    let world = World::new(&service).await;
    assert_eq!(world.get("/").await.status(), 200);
    assert_eq!(world.get("/").await.status(), 200);
    assert_eq!(service.connections(), 2);
}

#[tokio::test]
async fn a_kept_connection_is_let_go_when_its_service_closes_it() {
    let close = Arc::new(Notify::new());
    let closed = Arc::clone(&close);
    let service = Service::start(move |_, mut stream| {
        let closed = Arc::clone(&closed);
        async move {
            read_request(&mut stream).await;
            stream.write_all(OK.as_bytes()).await.unwrap();
            closed.notified().await;
        }
    })
    .await;
    // Long after this test nobody looks after them by the clock.
    let config = PreviewsConfig { idle_timeout_ms: 3_600_000, ..config() };
    let world = World::with(service.address, config, None).await;
    assert_eq!(world.get("/").await.status(), 200);
    assert_eq!(world.proxy.traffic().connections_open(), 1);
    close.notify_one();
    soon(async {
        while world.proxy.traffic().connections_open() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_body_is_never_sent_twice() {
    for method in ["POST", "PUT"] {
        let service = forgetful().await;
        let world = World::new(&service).await;
        assert_eq!(world.get("/").await.status(), 200);
        let request = Request::builder().method(method).uri("/").header("host", HOST);
        let answer = world.http1(request.body(Full::new(Bytes::from_static(b"body"))).unwrap()).await;
        assert_eq!(answer.status(), 502, "{method}");
        assert!(text(&answer).contains("service_broken"));
        assert_eq!(service.connections(), 1, "{method}");
    }
}

#[tokio::test]
async fn what_goes_wrong_is_told_to_browsers_and_programs() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = listener.local_addr().unwrap();
    drop(listener);
    let world = World::with(nobody, config(), None).await;
    let answer = world.get("/").await;
    assert_eq!(answer.status(), 502);
    assert_eq!(answer.headers()["content-type"], "application/json");
    let told: serde_json::Value = serde_json::from_slice(answer.body()).unwrap();
    assert_eq!(told["code"], "service_not_listening");
    assert!(told["message"].as_str().unwrap().contains("8080"));
    assert!(told["remedy"].as_str().unwrap().contains("Start the service"));

    let request = Request::get("/").header("host", HOST).header("accept", "text/html,*/*;q=0.8");
    let page = world.http1(request.body(Full::default()).unwrap()).await;
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    assert!(text(&page).contains("service_not_listening"));
    let request = Request::head("/").header("host", HOST).body(Full::default()).unwrap();
    assert!(world.http1(request).await.body().is_empty());

    for (code, status) in [
        (Code::PreviewNotFound, 404),
        (Code::PreviewPrivate, 401),
        (Code::InboundDisabled, 403),
        (Code::SessionTerminated, 410),
        (Code::SessionNotRunning, 503),
        (Code::PreviewPaused, 404),
        (Code::PreviewUnbound, 503),
        (Code::ResumeFailed, 503),
        (Code::Draining, 503),
    ] {
        *world.door.error.lock().unwrap() = Some(Error::from(code));
        let answer = world.get("/").await;
        assert_eq!(answer.status(), status, "{}", code.name());
        assert!(text(&answer).contains(code.name()));
        assert_eq!(answer.headers()["cache-control"], "no-store");
    }
}

#[tokio::test]
async fn bad_services_get_a_502_and_silent_ones_a_504() {
    for answer in
        ["garbage\r\n\r\n", "HTTP/1.1 two hundred\r\n\r\n", "SSH-2.0-x\r\n", "HTTP/1.1 200 OK\r\nx y: 1\r\n\r\n", ""]
    {
        let service = Service::start(move |_, mut stream| async move {
            read_request(&mut stream).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        })
        .await;
        let answered = World::new(&service).await.get("/").await;
        assert_eq!(answered.status(), 502, "{answer:?}");
        assert!(text(&answered).contains("service_broken"));
    }
    let service = Service::start(|_, stream| async move {
        tokio::time::sleep(PATIENCE).await;
        drop(stream);
    })
    .await;
    let config = PreviewsConfig { answer_timeout_ms: 50, ..config() };
    let world = World::with(service.address, config, None).await;
    let answer = world.get("/").await;
    assert_eq!(answer.status(), 504);
    assert!(text(&answer).contains("service_timed_out"));
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_taken_for_a_whole_one() {
    for start in ["content-length: 10\r\n\r\nhalf", "transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"] {
        let service = Service::start(move |_, mut stream| async move {
            read_request(&mut stream).await;
            stream.write_all(format!("HTTP/1.1 200 OK\r\n{start}").as_bytes()).await.unwrap();
        })
        .await;
        let world = World::new(&service).await;
        let answer = world.raw("GET / HTTP/1.1\r\nhost: web.p.example\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        assert!(answer.contains("half") && !answer.ends_with("0\r\n\r\n"), "{answer}");
    }
}

#[tokio::test]
async fn an_upload_may_take_longer_than_an_answer() {
    let (service, _heard) = Service::answering(OK).await;
    let config = PreviewsConfig { answer_timeout_ms: 300, ..config() };
    let world = World::with(service.address, config, None).await;
    let mut stream = world.connect().await;
    stream.write_all(b"POST / HTTP/1.1\r\nhost: web.p.example\r\ncontent-length: 8\r\n\r\n").await.unwrap();
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stream.write_all(b"x").await.unwrap();
    }
    assert!(read_head(&mut stream).await.unwrap().starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn exchanges_with_one_preview_have_a_limit() {
    let service = Service::start(|_, stream| async move {
        tokio::time::sleep(PATIENCE).await;
        drop(stream);
    })
    .await;
    let config = PreviewsConfig { exchanges_max: 2, ..config() };
    let world = World::with(service.address, config, None).await;
    let (mut first, mut second) = (world.connect().await, world.connect().await);
    let get = b"GET / HTTP/1.1\r\nhost: web.p.example\r\n\r\n";
    first.write_all(get).await.unwrap();
    second.write_all(get).await.unwrap();
    soon(async {
        while service.connections() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let answer = world.get("/").await;
    assert_eq!(answer.status(), 503);
    assert!(text(&answer).contains("exchanges_max"));
    // Viewers who go away make room, and their connections to the service go too.
    drop((first, second));
    soon(async {
        while world.door.visits.load(std::sync::atomic::Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_viewer_token_moves_from_the_url_into_a_cookie() {
    let (service, mut heard) = Service::answering(OK).await;
    let world = World::new(&service).await;
    *world.door.token.lock().unwrap() = Some("nvt1.a.b".into());
    assert_eq!(world.get("/").await.status(), 401);
    assert_eq!(world.get("/?nagaya_viewer_token=other").await.status(), 401);

    let opened = |accept: &str| {
        let uri = "//x/y?a=1&nagaya_viewer_token=nvt1.a.b";
        Request::get(uri).header("host", HOST).header("accept", accept).body(Full::default()).unwrap()
    };
    let redirect = world.http1(opened("text/html")).await;
    assert_eq!(redirect.status(), 303);
    assert_eq!(redirect.headers()["location"], "/x/y?a=1", "never to another host");
    let cookie = redirect.headers()["set-cookie"].to_str().unwrap().to_owned();
    assert_eq!(cookie, "nagaya-viewer-web=nvt1.a.b; Path=/; HttpOnly; SameSite=Lax");

    let request = Request::get("/x").header("host", HOST).header("cookie", "own=1; nagaya-viewer-web=nvt1.a.b");
    assert_eq!(world.http1(request.body(Full::default()).unwrap()).await.status(), 200);
    let request = heard.recv().await.unwrap();
    assert!(request.contains("cookie: own=1\r\n") && !request.contains("nvt1"), "{request}");

    // Programs that follow no redirects or keep no cookies get what they asked for.
    let answer = world.http1(opened("*/*")).await;
    assert_eq!((answer.status(), answer.headers()["set-cookie"].to_str().unwrap()), (StatusCode::OK, cookie.as_str()));
    let request = heard.recv().await.unwrap();
    assert!(request.starts_with("GET //x/y?a=1 HTTP/1.1\r\n"), "{request}");
}

#[tokio::test]
async fn each_preview_has_a_loopback_port_and_keeps_it() {
    let (ingress, mut arrivals) = LoopbackIngress::new([127, 0, 0, 1].into());
    let first = ingress.publish("web", 0).await.unwrap();
    assert_eq!(first.url, format!("http://127.0.0.1:{}", first.port));
    assert!((20_000..30_000).contains(&first.port));
    assert_eq!(ingress.publish("web", 0).await.unwrap(), first, "repeating changes nothing");
    let mut stream = TcpStream::connect(("127.0.0.1", first.port)).await.unwrap();
    let arrival = soon(arrivals.recv()).await.unwrap();
    assert_eq!(&*arrival.label, "web");

    ingress.withdraw("web").await;
    ingress.withdraw("web").await;
    assert!(TcpStream::connect(("127.0.0.1", first.port)).await.is_err());
    drop(arrival);
    assert_eq!(soon(stream.read(&mut [0])).await.unwrap(), 0);

    // The next server gets the same port, unless somebody else took it meanwhile.
    let (next, _arrivals) = LoopbackIngress::new([127, 0, 0, 1].into());
    assert_eq!(next.publish("web", first.port).await.unwrap().port, first.port);
    let other = ingress.publish("web", first.port).await.unwrap().port;
    assert_ne!(other, first.port);
}

#[tokio::test]
async fn hundreds_of_previews_are_reachable_at_once() {
    let (ingress, mut arrivals) = LoopbackIngress::new([127, 0, 0, 1].into());
    for number in 0..300 {
        let label = format!("p{number}");
        let port = ingress.publish(&label, 0).await.unwrap().port;
        let _stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert_eq!(&*soon(arrivals.recv()).await.unwrap().label, label);
    }
}

#[tokio::test]
async fn names_below_a_domain_are_urls() {
    for (secure, port, url) in [
        (true, 443, "https://web.p.example"),
        (false, 80, "http://web.p.example"),
        (true, 80, "https://web.p.example:80"),
        (false, 7070, "http://web.p.example:7070"),
    ] {
        let published = DomainIngress::new(DOMAIN, secure, port).publish("web", 9).await.unwrap();
        assert_eq!((published.url.as_str(), published.port), (url, 0));
    }
}
