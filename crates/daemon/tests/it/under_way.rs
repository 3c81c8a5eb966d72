//! Memory for messages under way: one budget for all, whoever does not read, does not send, or sends slowly.

use std::time::Duration;

use buffa::Message;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nagaya_api::tenki::v1 as wire;
use nagaya_daemon::config::Limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::*;

const MIB: usize = 1024 * 1024;

/// Seven MiB are for messages that are large.
fn small_budget(limits: &mut Limits) {
    limits.message_bytes_max = 4 * MIB;
    limits.bytes_under_way_max = 8 * MIB;
    limits.bytes_under_way_wait_ms = 300;
}

/// A session with a file of three MiB, and what its data plane wants to see.
async fn with_file(world: &World) -> (String, String) {
    let (id, data) = world.session().await;
    let request =
        wire::WriteFileRequest { session_id: id.clone(), path: "file".into(), content: vec![7; 3 * MIB].into() };
    data.write_file(wire::SandboxSessionDataPlaneServiceWriteFileRequest { request: request.into() }).await.unwrap();
    (id.clone(), world.certificate(&id).await)
}

/// Asks for the file, and takes nothing of it but the header of the answer.
async fn ask(world: &World, id: &str, certificate: &str) -> Response<Incoming> {
    let stream = TcpStream::connect(world.address()).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(1_024)
        .handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = wire::ReadFileRequest { session_id: id.into(), path: "file".into() };
    let message = wire::SandboxSessionDataPlaneServiceReadFileRequest { request: request.into() }.encode_to_vec();
    let framed = [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat();
    let request = Request::post(format!("{}/tenki.sandbox.v1.SandboxSessionDataPlaneService/ReadFile", world.url()))
        .header("content-type", "application/grpc")
        .header("x-tenki-session-cert", certificate)
        .body(Full::new(Bytes::from(framed)))
        .unwrap();
    soon(sender.send_request(request)).await.unwrap()
}

fn refusal(response: &Response<Incoming>) -> String {
    let text = |name| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
    format!("{} {}", text("grpc-status"), text("grpc-message"))
}

#[tokio::test]
async fn answers_that_nobody_reads_hold_no_more_than_the_budget() {
    let world = World::with(|config| small_budget(&mut config.limits)).await;
    let (id, certificate) = with_file(&world).await;
    let mut unread = Vec::new();
    for _ in 0..2 {
        let answer = ask(&world, &id, &certificate).await;
        assert_eq!(refusal(&answer), " ", "it is under way");
        unread.push(answer);
    }
    let refused = refusal(&ask(&world, &id, &certificate).await);
    assert!(refused.starts_with("8 ") && refused.contains("limits.bytes_under_way_max"), "{refused}");
    // Small messages have a share of their own.
    world.control().who_am_i(wire::WhoAmIRequest::default()).await.unwrap();
    unread.pop();
    let answer = ask(&world, &id, &certificate).await;
    assert_eq!(refusal(&answer), " ", "what one gave back another one has");
}

#[tokio::test]
async fn an_answer_that_is_not_read_gives_up_its_memory() {
    let world = World::with(|config| {
        small_budget(&mut config.limits);
        config.limits.bytes_under_way_wait_ms = 20_000;
        config.limits.request_body_idle_timeout_ms = 300;
    })
    .await;
    let (id, certificate) = with_file(&world).await;
    let mut unread = Vec::new();
    for _ in 0..6 {
        let answer = ask(&world, &id, &certificate).await;
        assert_eq!(refusal(&answer), " ");
        unread.push(answer);
    }
    let first = http_body_util::BodyExt::collect(unread.swap_remove(0).into_body());
    assert!(soon(first).await.is_err(), "it is cut, and nobody takes what there is for the whole");
}

/// Announces a message of three MiB; nothing of it is sent.
async fn announce(world: &World) -> TcpStream {
    let mut stream = TcpStream::connect(world.address()).await.unwrap();
    let head = format!(
        "POST /tenki.sandbox.v1.SandboxService/CreateSession HTTP/1.1\r\nhost: x\r\ncontent-type: application/proto\r\n\
         authorization: Bearer {}\r\ncontent-length: {}\r\n\r\n\x0a",
        world.secret,
        3 * MIB
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

async fn answer(stream: &mut TcpStream) -> String {
    let mut answer = vec![0; 4096];
    let read = soon(stream.read(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

#[tokio::test]
async fn messages_that_do_not_come_hold_no_more_than_the_budget() {
    let world = World::with(|config| small_budget(&mut config.limits)).await;
    let mut unsent = [announce(&world).await, announce(&world).await, announce(&world).await];
    let (first, second, third) = {
        let [first, second, third] = &mut unsent;
        let one = |stream| tokio::time::timeout(Duration::from_secs(2), answer(stream));
        tokio::join!(one(first), one(second), one(third))
    };
    let refused: Vec<String> = [first, second, third].into_iter().flatten().collect();
    let [refused] = &refused[..] else { panic!("one is refused, and two wait for their bodies: {refused:?}") };
    assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("limits.bytes_under_way_max"), "{refused}");
    world.control().who_am_i(wire::WhoAmIRequest::default()).await.unwrap();
}

#[tokio::test]
async fn a_message_that_comes_too_slowly_gives_up_its_memory() {
    let world = World::with(|config| {
        small_budget(&mut config.limits);
        config.limits.request_body_idle_timeout_ms = 300;
    })
    .await;
    let stream = announce(&world).await;
    let (mut reader, mut writer) = stream.into_split();
    let dribble = async {
        while writer.write_all(&[0]).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        std::future::pending::<()>().await;
    };
    let mut told = vec![0; 4096];
    let read = soon(async {
        tokio::select! {
            read = reader.read(&mut told) => read.unwrap(),
            () = dribble => unreachable!(),
        }
    })
    .await;
    let told = String::from_utf8_lossy(&told[..read]).into_owned();
    assert!(told.contains("deadline_exceeded") && told.contains("message_bytes_per_s_min"), "{told}");
}
