//! The listener: versions, TLS, limits, plain paths, and how it ends.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::ErrorCode;
use connectrpc::client::HttpClient;
use http::{Request, Response};
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::run_request;
use nagaya_daemon::config::TlsConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::*;

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).header("host", "localhost").body(Full::default()).unwrap()
}

fn text(response: &Response<Bytes>) -> &str {
    std::str::from_utf8(response.body()).unwrap()
}

#[tokio::test]
async fn plain_paths_answer_over_both_versions() {
    let world = World::new().await;
    world.session().await;
    for (path, expected) in [("/healthz", "ok"), ("/readyz", "ready"), ("/", "Nagaya")] {
        let response = world.http1(get(path)).await;
        assert_eq!(response.status(), 200);
        assert!(text(&response).contains(expected));
        let response = world.http2(get(&format!("{}{path}", world.url()))).await;
        assert_eq!(response.status(), 200);
    }
    let metrics = world.http1(get("/metrics")).await;
    for line in [
        "nagaya_rpc_calls_total{rpc=\"CreateSession\",code=\"ok\"} 1",
        "nagaya_session_create_seconds_count 1",
        "nagaya_sessions{state=\"RUNNING\"} 1",
    ] {
        assert!(text(&metrics).contains(line), "{line} is missing in {}", text(&metrics));
    }
}

#[tokio::test]
async fn a_head_request_on_the_root_succeeds() {
    let world = World::new().await;
    let request = Request::head("/").header("host", "x").body(Full::default()).unwrap();
    let response = world.http1(request).await;
    assert_eq!((response.status().as_u16(), response.body().len()), (200, 0));
}

#[tokio::test]
async fn an_unknown_path_is_a_404_that_names_what_exists() {
    let world = World::new().await;
    for path in
        ["/nothing", "/tenki.sandbox.v1.NoSuchService/Method", "/tenki.sandbox.v1.SandboxService", "/v1/sandboxes"]
    {
        let response = world.http1(get(path)).await;
        assert_eq!(response.status(), 404, "{path}");
        let error: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("tenki.sandbox.v1.SandboxService") && message.contains("/healthz"), "{message}");
    }
    let post = Request::post("/healthz").header("host", "x").body(Full::default()).unwrap();
    let response = world.http1(post).await;
    assert_eq!((response.status().as_u16(), &response.headers()["allow"]), (405, &"GET, HEAD".parse().unwrap()));
}

#[tokio::test]
async fn tls_offers_both_versions_by_alpn() {
    let issued = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (certificate_file, key_file) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
    std::fs::write(&certificate_file, issued.cert.pem()).unwrap();
    std::fs::write(&key_file, issued.signing_key.serialize_pem()).unwrap();
    let world = World::with(|config| config.tls = Some(TlsConfig { certificate_file, key_file })).await;

    let mut roots = rustls::RootCertStore::empty();
    roots.add(issued.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    for alpn in [&b"h2"[..], b"http/1.1"] {
        let mut client = client.clone();
        client.alpn_protocols = vec![alpn.to_vec()];
        let stream = TcpStream::connect(world.address()).await.unwrap();
        let name = "localhost".try_into().unwrap();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, stream).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn));
        let authority = format!("localhost:{}", world.address().port());
        let body = serde_json::json!({"ownerType": "USER", "ownerId": "self"}).to_string();
        let request = Request::post(format!("https://{authority}/tenki.sandbox.v1.SandboxService/CreateSession"))
            .header("host", &authority)
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {}", world.secret))
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let response = if alpn == b"h2" {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            sender.send_request(request).await.unwrap()
        } else {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            sender.send_request(request).await.unwrap()
        };
        let response = whole(response).await;
        assert_eq!(response.status(), 200, "{}", text(&response));
        let answer: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
        assert_eq!(answer["dataPlaneEndpoint"], format!("https://{authority}"));
    }
}

#[tokio::test]
async fn unusable_certificates_are_an_error_at_start() {
    let engine = nagaya_engine::fake::start(Default::default()).await.0;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("empty.pem");
    std::fs::write(&file, "").unwrap();
    for (certificate_file, key_file) in
        [(directory.path().join("none.pem"), file.clone()), (file.clone(), file.clone())]
    {
        let config = nagaya_daemon::config::Config {
            listen: ([127, 0, 0, 1], 0).into(),
            tls: Some(TlsConfig { certificate_file, key_file }),
            ..Default::default()
        };
        assert!(nagaya_daemon::Daemon::start(&config, engine.clone(), Default::default()).await.is_err());
    }
}

/// A request written by hand, so that it can announce what it does not send.
async fn raw(world: &World, request: &str) -> String {
    let mut stream = TcpStream::connect(world.address()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let read = soon(stream.read(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

#[tokio::test]
async fn a_body_that_announces_too_much_is_refused_before_it_is_sent() {
    let world = World::new().await;
    let head = format!(
        "POST /tenki.sandbox.v1.SandboxService/CreateSession HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer {}\r\ncontent-length: 1073741824\r\n\r\n{{",
        world.secret
    );
    let answer = raw(&world, &head).await;
    assert!(answer.starts_with("HTTP/1.1 429"), "{answer}");
    assert!(answer.contains("resource_exhausted") && answer.contains("message_bytes_max"), "{answer}");
}

#[tokio::test]
async fn a_large_body_without_a_token_is_refused_before_it_is_sent() {
    let world = World::new().await;
    let head = "POST /tenki.sandbox.v1.SandboxService/CreateSession HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100000000\r\n\r\n{";
    let answer = raw(&world, head).await;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
}

#[tokio::test]
async fn a_client_that_sends_everything_first_still_gets_its_refusal() {
    let world = World::with(|config| config.limits.message_bytes_max = 1 << 20).await;
    for chunked in [false, true] {
        let request = Request::post("/tenki.sandbox.v1.SandboxService/CreateSession")
            .header("host", "x")
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {}", world.secret));
        let request = if chunked { request.header("transfer-encoding", "chunked") } else { request };
        let response = world.http1(request.body(Full::new(Bytes::from(vec![b' '; 64 << 20]))).unwrap()).await;
        assert_eq!(response.status(), 429, "{}", text(&response));
    }
}

#[tokio::test]
async fn a_message_that_announces_four_gibibytes_is_refused_at_its_header() {
    let world = World::new().await;
    let certificate = world.certificate(&world.session().await.0).await;
    // The request stays open: the answer does not wait for what was announced.
    for (service, method) in [
        ("SandboxService", "GetSession"),
        ("SandboxService", "WaitSession"),
        ("SandboxSessionDataPlaneService", "WriteFile"),
        ("SandboxSessionDataPlaneService", "Run"),
        ("SandboxSessionDataPlaneService", "WriteFileStream"),
    ] {
        let stream = TcpStream::connect(world.address()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let frames = futures::StreamExt::chain(
            connectrpc_frame(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff])),
            futures::stream::pending(),
        );
        let request = Request::post(format!("{}/tenki.sandbox.v1.{service}/{method}", world.url()))
            .header("content-type", "application/grpc")
            .header("authorization", format!("Bearer {}", world.secret))
            .header("x-tenki-session-cert", &certificate)
            .body(http_body_util::StreamBody::new(frames))
            .unwrap();
        let response = soon(sender.send_request(request)).await.unwrap();
        let response = soon(whole(response)).await;
        assert_eq!(response.headers()["grpc-status"], "8", "{method}");
    }
}

type Frames = futures::stream::Iter<std::vec::IntoIter<Result<hyper::body::Frame<Bytes>, std::convert::Infallible>>>;

fn connectrpc_frame(bytes: Bytes) -> Frames {
    futures::stream::iter(vec![Ok(hyper::body::Frame::data(bytes))])
}

#[tokio::test]
async fn a_request_that_stops_in_its_middle_is_given_up() {
    let world = World::with(|config| config.limits.request_body_idle_timeout_ms = 30).await;
    let head = format!(
        "POST /tenki.sandbox.v1.SandboxService/WhoAmI HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer {}\r\ncontent-length: 10\r\n\r\n{{",
        world.secret
    );
    let answer = raw(&world, &head).await;
    assert!(answer.contains("deadline_exceeded"), "{answer}");
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let world = World::with(|config| config.limits.request_header_timeout_ms = 30).await;
    for said in ["", "PRI * HT", "GET / HTTP/1.1\r\nhost:"] {
        let mut stream = TcpStream::connect(world.address()).await.unwrap();
        stream.write_all(said.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        // An error is a close as well.
        let _ = soon(stream.read_to_end(&mut rest)).await;
    }
}

#[tokio::test]
async fn shutting_down_finishes_calls_and_ends_streams() {
    let mut world = World::new().await;
    let (id, data) = world.session().await;
    let control = world.control();

    // A long stream, whose command must end.
    let mut stream = data.run().await.unwrap();
    let start =
        wire::RunStart { session_id: id.clone(), cmd: vec!["hang".into()], stream_stdin: true, ..Default::default() };
    let frame = wire::RunRequest { payload: Some(run_request::Payload::from(start)) };
    stream.send(wire::SandboxSessionDataPlaneServiceRunRequest { frame: frame.into() }).await.unwrap();
    soon(stream.message()).await.unwrap();

    // A call under way, which is finished.
    world.hold_creations.send_replace(true);
    let created = tokio::spawn({
        let control = control.clone();
        async move { control.create_session(wire::CreateSessionRequest { wait_ready: true, ..create() }).await }
    });
    let creating = || world.fakes.store.all_sessions().len() == 2;
    soon(async {
        while !creating() {
            tokio::task::yield_now().await;
        }
    })
    .await;

    let address = world.address();
    let hold = world.hold_creations.clone();
    let daemon = world.daemon;
    let stopping = tokio::spawn(daemon.shut_down());
    let error = soon(stream.message()).await.err().expect("the stream ends with an error");
    assert_eq!(error.code, ErrorCode::Unavailable);
    soon(world.running.wait_for(|running| *running == 0)).await.unwrap();
    assert!(!stopping.is_finished(), "it waits for the call");
    hold.send_replace(false);
    let answer = soon(created).await.unwrap().unwrap();
    assert_eq!(answer.session.state, wire::SessionState::Running);
    soon(stopping).await.unwrap();
    assert!(TcpStream::connect(address).await.is_err(), "nothing listens any more");
    assert_eq!(world.fakes.driver.sandboxes().len(), 2, "sandboxes keep running");
}

#[tokio::test]
async fn a_call_that_does_not_end_is_cut_when_the_time_is_over() {
    let world = World::with(|config| config.limits.drain_timeout_ms = 30).await;
    world.hold_creations.send_replace(true);
    let control = world.control();
    let created = tokio::spawn(async move {
        control.create_session(wire::CreateSessionRequest { wait_ready: true, ..create() }).await
    });
    soon(async {
        while world.fakes.store.all_sessions().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let hold = world.hold_creations.clone();
    let stopping = tokio::spawn(world.daemon.shut_down());
    assert!(soon(created).await.unwrap().is_err());
    // The engine finishes what it began.
    hold.send_replace(false);
    soon(stopping).await.unwrap();
}

#[tokio::test]
async fn a_deadline_of_the_client_ends_its_stream() {
    let world = World::new().await;
    world.hold_creations.send_replace(true);
    let id = world.control().create_session(create()).await.unwrap().session.id.clone();
    let request = Request::post(format!("{}/tenki.sandbox.v1.SandboxService/WaitSession", world.url()))
        .header("content-type", "application/grpc")
        .header("grpc-timeout", "50m")
        .header("authorization", format!("Bearer {}", world.secret))
        .body(Full::new(Bytes::from([&[0, 0, 0, 0, 38, 10, 36], id.as_bytes()].concat())))
        .unwrap();
    let response = tokio::time::timeout(Duration::from_secs(10), world.http2(request)).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "4");
    world.hold_creations.send_replace(false);
}

#[tokio::test]
async fn answers_are_not_compressed_and_compressed_requests_are_read() {
    let world = World::new().await;
    let config = world
        .config(connectrpc::Protocol::Grpc)
        .with_default_header("authorization", format!("Bearer {}", world.secret))
        .compress_requests("gzip");
    let client = ControlClient::new(HttpClient::plaintext_http2_only(), config);
    let request =
        wire::CreateSessionRequest { name: "x".repeat(64), metadata: pairs(&[("k", &"v".repeat(5_000))]), ..create() };
    let id = client.create_session(request).await.unwrap().session.id.clone();
    let request = Request::post(format!("{}/tenki.sandbox.v1.SandboxService/GetSession", world.url()))
        .header("content-type", "application/grpc")
        .header("grpc-accept-encoding", "gzip,br")
        .header("authorization", format!("Bearer {}", world.secret))
        .body(Full::new(Bytes::from([&[0, 0, 0, 0, 38, 10, 36], id.as_bytes()].concat())))
        .unwrap();
    let response = world.http2(request).await;
    assert_eq!(response.headers()["grpc-status"], "0");
    assert_eq!(response.body()[0], 0, "the message is not compressed");
    assert!(response.body().len() > 5_000, "the metadata is in it as it is");
}
