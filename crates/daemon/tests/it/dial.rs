//! Dial: unix sockets of a sandbox.

use std::sync::Arc;

use bytes::Bytes;
use connectrpc::{ConnectError, ErrorCode};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::dial_closed::Reason;
use nagaya_api::tenki::v1::{dial_open, dial_request, dial_response};
use nagaya_engine::ports::{Bind, Guest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

type Stream = connectrpc::client::BidiStream<
    hyper::body::Incoming,
    wire::SandboxSessionDataPlaneServiceDialRequest,
    nagaya_api::tenki::client::Whole<wire::SandboxSessionDataPlaneServiceDialResponse>,
>;

const ECHO: &str = "/home/tenki/echo.sock";

fn frame(payload: dial_request::Payload) -> wire::SandboxSessionDataPlaneServiceDialRequest {
    let frame = wire::DialRequest { payload: Some(payload) };
    wire::SandboxSessionDataPlaneServiceDialRequest { frame: frame.into() }
}

fn open(id: &str, path: &str) -> dial_request::Payload {
    let target = Some(dial_open::Target::UnixSocketPath(path.into()));
    wire::DialOpen { session_id: id.into(), connect_timeout_ms: 0, target }.into()
}

async fn dial(client: &DataClient, open: dial_request::Payload) -> Stream {
    let mut stream = client.dial().await.unwrap();
    // The server may have refused already, which the next message tells.
    let _ = stream.send(frame(open)).await;
    stream
}

async fn next(stream: &mut Stream) -> Result<Option<dial_response::Payload>, ConnectError> {
    let message = soon(stream.message()).await?;
    Ok(message.map(|message| message.frame.payload.clone().expect("every frame has a payload")))
}

async fn opened(client: &DataClient, id: &str, path: &str) -> Stream {
    let mut stream = dial(client, open(id, path)).await;
    match next(&mut stream).await.unwrap() {
        Some(dial_response::Payload::Opened(opened)) => assert_eq!(opened.sandbox_address, path),
        other => panic!("not opened: {other:?}"),
    }
    stream
}

/// What is sent until the end, and how that is told.
async fn rest(stream: &mut Stream) -> (Vec<u8>, wire::DialClosed) {
    let mut content = Vec::new();
    loop {
        match next(stream).await.unwrap() {
            Some(dial_response::Payload::Data(data)) => {
                assert!(data.len() <= 32 * 1024);
                content.extend_from_slice(&data);
            }
            Some(dial_response::Payload::Closed(closed)) => {
                assert_eq!(next(stream).await.unwrap(), None, "closed is the last frame");
                return (content, *closed);
            }
            other => panic!("neither data nor the end: {other:?}"),
        }
    }
}

async fn send(stream: &mut Stream, data: impl Into<Bytes>) {
    stream.send(frame(dial_request::Payload::Data(data.into()))).await.unwrap();
}

#[tokio::test]
async fn bytes_go_both_ways_until_the_client_half_closes() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let mut stream = opened(&client, &id, ECHO).await;
    send(&mut stream, "one").await;
    assert_eq!(next(&mut stream).await.unwrap(), Some(dial_response::Payload::Data("one".into())));
    let large: Bytes = (0..110_000).map(|number: u32| number as u8).collect::<Vec<_>>().into();
    send(&mut stream, large.clone()).await;
    stream.send(frame(dial_request::Payload::HalfClose(true))).await.unwrap();
    let (content, closed) = rest(&mut stream).await;
    assert!(content == large);
    assert_eq!((closed.reason.as_known(), closed.errno), (Some(Reason::Clean), 0));
}

#[tokio::test]
async fn the_end_of_the_peer_is_the_end_of_the_stream() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let guest = guest(&world, &id);
    let mut listener = guest.listen(&Bind::Unix { path: "/home/tenki/app.sock".into() }).await.unwrap();
    // A relative path starts at the home directory.
    let mut stream = dial(&client, open(&id, "app.sock")).await;
    assert!(matches!(next(&mut stream).await.unwrap(), Some(dial_response::Payload::Opened(_))));
    let mut peer = soon(listener.incoming.recv()).await.unwrap().stream;
    send(&mut stream, "ask").await;
    let mut asked = [0; 3];
    soon(peer.read_exact(&mut asked)).await.unwrap();
    peer.write_all(b"told").await.unwrap();
    drop(peer);
    let (content, closed) = rest(&mut stream).await;
    assert_eq!((&content[..], closed.reason.as_known()), (&b"told"[..], Some(Reason::Clean)));
}

fn guest(world: &World, id: &str) -> Arc<nagaya_engine::fake::FakeGuest> {
    world.fakes.driver.guest(id.parse().unwrap()).unwrap()
}

#[tokio::test]
async fn a_client_that_only_ends_its_side_still_gets_the_answer() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let mut stream = opened(&client, &id, ECHO).await;
    send(&mut stream, "question").await;
    stream.close_send();
    let (content, closed) = rest(&mut stream).await;
    assert_eq!((&content[..], closed.reason.as_known()), (&b"question"[..], Some(Reason::Clean)));
}

#[tokio::test]
async fn what_cannot_be_reached_is_closed_with_the_reason() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    for (path, reason, words) in [
        ("/etc/passwd", Reason::PathDenied, "denied"),
        ("/home/tenkis/x.sock", Reason::PathDenied, "denied"),
        ("/home/tenki/../../etc/x.sock", Reason::PathDenied, "denied"),
        ("../x.sock", Reason::PathDenied, "denied"),
        ("/run/docker.sock.d", Reason::PathDenied, "denied"),
        ("/home/tenki/nothing.sock", Reason::Refused, "refused"),
        ("/var/run/docker.sock", Reason::Refused, "refused"),
        ("/run/docker.sock", Reason::Refused, "refused"),
    ] {
        let mut stream = dial(&client, open(&id, path)).await;
        let (content, closed) = rest(&mut stream).await;
        assert_eq!((content.len(), closed.reason.as_known()), (0, Some(reason)), "{path}: {closed:?}");
        assert!(closed.detail.to_lowercase().contains(words), "{path}: {closed:?}");
        assert_ne!(closed.errno, 0, "{path}");
    }
}

#[tokio::test]
async fn a_peer_that_accepts_nobody_is_given_up_in_the_time_the_client_gave() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let path = "/home/tenki/full.sock";
    let _listener = guest(&world, &id).listen(&Bind::Unix { path: path.into() }).await.unwrap();
    let target = Some(dial_open::Target::UnixSocketPath(path.into()));
    let mut held = Vec::new();
    let closed = loop {
        let request = wire::DialOpen { session_id: id.clone(), connect_timeout_ms: 100, target: target.clone() };
        let mut stream = dial(&client, request.into()).await;
        match next(&mut stream).await.unwrap() {
            Some(dial_response::Payload::Opened(_)) => held.push(stream),
            Some(dial_response::Payload::Closed(closed)) => break closed,
            other => panic!("neither opened nor closed: {other:?}"),
        }
        assert!(held.len() < 10, "the queue has no end");
    };
    assert_eq!((closed.reason.as_known(), closed.errno), (Some(Reason::Timeout), 110), "{closed:?}");
}

#[tokio::test]
async fn frames_out_of_order_and_strangers_are_refused() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    for first in [dial_request::Payload::Data("x".into()), dial_request::Payload::HalfClose(true)] {
        let mut stream = dial(&client, first).await;
        assert_eq!(next(&mut stream).await.unwrap_err().code, ErrorCode::InvalidArgument);
    }
    let mut stream = opened(&client, &id, ECHO).await;
    stream.send(frame(open(&id, ECHO))).await.unwrap();
    assert_eq!(next(&mut stream).await.unwrap_err().code, ErrorCode::InvalidArgument);
    for (id, path, code) in [
        ("nonsense", ECHO, ErrorCode::InvalidArgument),
        (id.as_str(), "", ErrorCode::InvalidArgument),
        (id.as_str(), "/home/tenki/\0", ErrorCode::InvalidArgument),
        ("01980000-0000-7000-8000-000000000000", ECHO, ErrorCode::Unauthenticated),
    ] {
        let mut stream = dial(&client, open(id, path)).await;
        assert_eq!(next(&mut stream).await.unwrap_err().code, code, "{id} {path}");
    }
    world.control().pause_session(wire::PauseSessionRequest { session_id: id.clone() }).await.unwrap();
    let mut stream = dial(&client, open(&id, ECHO)).await;
    assert_eq!(next(&mut stream).await.unwrap_err().code, ErrorCode::FailedPrecondition);
}

#[tokio::test]
async fn the_end_of_the_session_ends_its_streams_and_says_so() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let mut stream = opened(&client, &id, ECHO).await;
    world.control().terminate_session(wire::TerminateSessionRequest { session_id: id.clone() }).await.unwrap();
    let (_, closed) = rest(&mut stream).await;
    assert_eq!(closed.reason.as_known(), Some(Reason::PlatformError), "{closed:?}");
    assert!(closed.detail.contains("state=TERMINAT"), "{closed:?}");
}

#[tokio::test]
async fn a_client_that_reads_slowly_gets_everything() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let mut listener = guest(&world, &id).listen(&Bind::Unix { path: "/home/tenki/much.sock".into() }).await.unwrap();
    let mut stream = opened(&client, &id, "/home/tenki/much.sock").await;
    let mut peer = soon(listener.incoming.recv()).await.unwrap().stream;
    let block = vec![7; 1 << 20];
    let (written, told) = tokio::sync::watch::channel(0);
    tokio::spawn(async move {
        for count in 1..=64 {
            peer.write_all(&block).await.unwrap();
            let _ = written.send(count);
        }
    });
    // While nobody reads, no more than the windows hold is taken from the peer.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert!(*told.borrow() < 32, "{} MiB are held for a client that reads nothing", *told.borrow());
    let (content, closed) = rest(&mut stream).await;
    assert_eq!((content.len(), closed.reason.as_known()), (64 << 20, Some(Reason::Clean)));
}
