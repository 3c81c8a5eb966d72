//! Who may keep connections open: strangers only at the cost of strangers, and nobody at the cost of who is at work.

use std::time::Duration;

use bytes::Bytes;
use connectrpc::ErrorCode;
use http::Request;
use http_body_util::Full;
use hyper_util::rt::TokioIo;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::run_request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::life::metrics;
use crate::support::*;

/// What an HTTP/2 client sends before its first request.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

/// A connection that says this and nothing more.
async fn stranger(world: &World, says: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(world.address()).await.unwrap();
    // It may be closed already.
    let _ = stream.write_all(says).await;
    stream
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 1024];
    loop {
        match soon(stream.read(&mut buffer)).await {
            Ok(0) | Err(_) => return true,
            Ok(_) => {}
        }
    }
}

async fn who_am_i(client: &ControlClient) -> Result<(), connectrpc::ConnectError> {
    client.who_am_i(wire::WhoAmIRequest::default()).await.map(drop)
}

/// A command that runs until its stream ends.
macro_rules! running {
    ($data:expr, $id:expr) => {{
        let mut stream = $data.run().await.unwrap();
        let start = wire::RunStart {
            session_id: $id.clone(),
            cmd: vec!["hang".into()],
            stream_stdin: true,
            ..Default::default()
        };
        let frame = wire::RunRequest { payload: Some(run_request::Payload::from(start)) };
        stream.send(wire::SandboxSessionDataPlaneServiceRunRequest { frame: frame.into() }).await.unwrap();
        soon(stream.message()).await.unwrap();
        stream
    }};
}

#[tokio::test]
async fn strangers_keep_nobody_out_whatever_they_say() {
    for says in [&b""[..], b"P", PREFACE, b"POST /x HTTP/1.1\r\nhost:", HEALTH] {
        let world = World::with(|config| {
            config.limits.connections_max = 8;
            config.limits.strangers_max = 8;
        })
        .await;
        let (id, data) = world.session().await;
        let early = world.control();
        who_am_i(&early).await.unwrap();
        let mut running = running!(data, id);
        let mut crowd = Vec::new();
        for _ in 0..32 {
            crowd.push(stranger(&world, says).await);
        }
        who_am_i(&world.control()).await.unwrap();
        assert!(is_closed(&mut crowd[0]).await, "the first ones gave way");
        who_am_i(&early).await.unwrap();
        assert_eq!(*world.running.borrow(), 1, "a command was ended");
        running.close_send();
        drop(crowd);
    }
}

#[tokio::test]
async fn a_connection_that_shows_no_key_has_its_time() {
    let world = World::with(|config| config.limits.stranger_timeout_ms = 200).await;
    let (id, data) = world.session().await;
    let client = world.control();
    who_am_i(&client).await.unwrap();
    let running = running!(data, id);
    let wrong =
        b"POST /tenki.sandbox.v1.SandboxService/WhoAmI HTTP/1.1\r\nhost: x\r\nauthorization: Bearer tk_wrong\r\n\
                  content-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    for says in [&b""[..], PREFACE, HEALTH, wrong] {
        let mut stream = stranger(&world, says).await;
        assert!(is_closed(&mut stream).await, "{says:?}");
    }
    who_am_i(&client).await.unwrap();
    assert_eq!(*world.running.borrow(), 1, "what showed a key stays");
    drop(running);
    assert!(metrics(&world).await.contains("nagaya_connections_refused_total 4"), "{}", metrics(&world).await);
}

#[tokio::test]
async fn of_those_with_a_key_the_longest_idle_gives_way_and_who_is_at_work_never() {
    let world = World::with(|config| config.limits.connections_max = 2).await;
    let (id, data) = world.session().await;
    let _running = running!(data, id);
    let head = format!(
        "POST /tenki.sandbox.v1.SandboxService/WhoAmI HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}",
        world.secret
    );
    let mut idle = stranger(&world, head.as_bytes()).await;
    let mut answer = [0; 4096];
    assert!(soon(idle.read(&mut answer)).await.unwrap() > 0);
    let second = world.control();
    who_am_i(&second).await.unwrap();
    assert!(is_closed(&mut idle).await, "it gave way");

    // Now the only other one is at work too.
    let second_data = world.data(&world.certificate(&id).await);
    let _second_running = running!(second_data, id);
    let (status, answer) = world.json("WhoAmI", serde_json::json!({})).await;
    assert_eq!(status, 429, "{answer}");
    assert!(answer.to_string().contains("limits.connections_max"), "{answer}");
    assert_eq!(code(who_am_i(&world.control()).await), ErrorCode::ResourceExhausted);
    assert_eq!(*world.running.borrow(), 2);
}

#[tokio::test]
async fn previews_and_the_api_do_not_take_each_others_places() {
    let world = World::with(|config| {
        config.preview_domain = Some("p.example".into());
        config.limits.connections_max = 1;
        config.previews.connections_max = 1;
    })
    .await;
    let (id, _) = world.session().await;
    let request =
        wire::ExposePortRequest { session_id: id.clone(), port: 7, slug: Some("shop".into()), ..Default::default() };
    let client = world.control();
    client.expose_port(request).await.unwrap();
    let view = async |sender: &mut hyper::client::conn::http1::SendRequest<Full<Bytes>>| {
        let request = Request::get("/").header("host", "shop.p.example").body(Full::default()).unwrap();
        sender.send_request(request).await.map(|answer| answer.status().as_u16())
    };
    let mut senders = Vec::new();
    for _ in 0..3 {
        let stream = TcpStream::connect(world.address()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        // Port 7 echoes, which is no answer in HTTP.
        assert_eq!(soon(view(&mut sender)).await.unwrap(), 502);
        // The client of the API keeps its one place meanwhile.
        who_am_i(&client).await.unwrap();
        senders.push(sender);
    }
    assert!(soon(senders[0].ready()).await.is_err(), "the first one gave way");
    assert_eq!(soon(view(&mut senders[2])).await.unwrap(), 502);
}

#[tokio::test]
async fn clients_of_ssh_that_do_not_log_in_keep_nobody_out() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let world = World::with(|config| {
        config.ssh.listen = Some(free);
        config.ssh.logins_max = 4;
    })
    .await;
    let _ = &world;
    let mut crowd = Vec::new();
    for _ in 0..16 {
        let mut stream = TcpStream::connect(free).await.unwrap();
        let mut greeting = [0; 8];
        soon(stream.read_exact(&mut greeting)).await.expect("the newest is greeted");
        assert_eq!(&greeting, b"SSH-2.0-");
        crowd.push(stream);
    }
    assert!(is_closed(&mut crowd[0]).await, "the first ones gave way");
    tokio::time::timeout(Duration::from_millis(200), is_closed(&mut crowd[15])).await.expect_err("the last one stays");
}
