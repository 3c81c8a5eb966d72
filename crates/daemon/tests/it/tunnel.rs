//! HostPortTunnel: ports of a sandbox that lead to programs of the client.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::host_port_tunnel_request::Payload as Ask;
use nagaya_api::tenki::v1::host_port_tunnel_response::Payload;
use nagaya_api::tenki::v1::host_port_tunnel_terminated::Reason;
use nagaya_engine::fake::FakeGuest;
use nagaya_engine::ports::{Address, BoxStream, Guest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::*;

type Stream = connectrpc::client::BidiStream<
    hyper::body::Incoming,
    wire::SandboxSessionDataPlaneServiceHostPortTunnelRequest,
    nagaya_api::tenki::client::Whole<wire::SandboxSessionDataPlaneServiceHostPortTunnelResponse>,
>;

/// A tunnel, seen from its client, and the sandbox that it begins in.
struct Tunnel {
    stream: Stream,
    guest: Arc<FakeGuest>,
    port: u16,
}

fn open(id: &str) -> wire::HostPortTunnelOpen {
    wire::HostPortTunnelOpen { session_id: id.into(), ..Default::default() }
}

async fn begin(client: &DataClient, open: wire::HostPortTunnelOpen) -> Stream {
    let mut stream = client.host_port_tunnel().await.unwrap();
    ask(&mut stream, open.into()).await;
    stream
}

async fn ask(stream: &mut Stream, payload: Ask) {
    let frame = wire::HostPortTunnelRequest { payload: Some(payload) };
    // The server may have ended already, which the next message tells.
    let _ = stream.send(wire::SandboxSessionDataPlaneServiceHostPortTunnelRequest { frame: frame.into() }).await;
}

async fn next(stream: &mut Stream) -> Result<Option<Payload>, ConnectError> {
    let message = soon(stream.message()).await?;
    Ok(message.map(|message| message.frame.payload.clone().expect("every frame has a payload")))
}

async fn tell(stream: &mut Stream) -> Payload {
    next(stream).await.unwrap().expect("a frame")
}

async fn terminated(stream: &mut Stream) -> wire::HostPortTunnelTerminated {
    let Payload::Terminated(terminated) = tell(stream).await else { panic!("not terminated") };
    assert_eq!(next(stream).await.unwrap(), None, "terminated is the last frame");
    *terminated
}

async fn tunnel(world: &World) -> (Tunnel, String) {
    let (id, client) = world.session().await;
    let mut stream = begin(&client, open(&id)).await;
    let Payload::Opened(opened) = tell(&mut stream).await else { panic!("not opened") };
    assert_eq!(opened.sandbox_address, format!("127.0.0.1:{}", opened.sandbox_port));
    let guest = world.fakes.driver.guest(id.parse().unwrap()).unwrap();
    (Tunnel { stream, guest, port: opened.sandbox_port as u16 }, id)
}

impl Tunnel {
    /// A program of the sandbox connects.
    async fn connect(&mut self) -> (u64, BoxStream) {
        let peer = soon(self.guest.connect(&Address::Tcp { port: self.port })).await.unwrap();
        let Payload::Accept(accept) = tell(&mut self.stream).await else { panic!("not accepted") };
        assert!(accept.sub_stream_id != 0 && accept.source_address.starts_with("127.0.0.1:"), "{accept:?}");
        (accept.sub_stream_id, peer)
    }

    async fn send(&mut self, sub_stream_id: u64, data: &[u8]) {
        let payload = bytes::Bytes::copy_from_slice(data);
        ask(&mut self.stream, wire::HostPortTunnelData { sub_stream_id, payload }.into()).await;
    }

    async fn close(&mut self, sub_stream_id: u64, reason: &str) {
        ask(&mut self.stream, wire::HostPortTunnelClose { sub_stream_id, reason: reason.into() }.into()).await;
    }
}

fn data(sub_stream_id: u64, text: &'static str) -> Payload {
    wire::HostPortTunnelData { sub_stream_id, payload: text.into() }.into()
}

fn half_close(sub_stream_id: u64, client_to_server: bool) -> wire::HostPortTunnelHalfClose {
    wire::HostPortTunnelHalfClose { sub_stream_id, client_to_server }
}

#[tokio::test]
async fn connections_are_carried_and_end_one_side_after_the_other() {
    let world = World::new().await;
    let (mut tunnel, _) = tunnel(&world).await;
    let (first, mut one) = tunnel.connect().await;
    let (second, mut two) = tunnel.connect().await;
    assert_ne!(first, second);
    one.write_all(b"ask one").await.unwrap();
    assert_eq!(tell(&mut tunnel.stream).await, data(first, "ask one"));
    two.write_all(b"ask two").await.unwrap();
    two.shutdown().await.unwrap();
    assert_eq!(tell(&mut tunnel.stream).await, data(second, "ask two"));
    assert_eq!(tell(&mut tunnel.stream).await, half_close(second, false).into());
    tunnel.send(second, b"told two").await;
    ask(&mut tunnel.stream, half_close(second, true).into()).await;
    let mut told = Vec::new();
    soon(two.read_to_end(&mut told)).await.unwrap();
    assert_eq!(told, b"told two");
    let closed = wire::HostPortTunnelClose { sub_stream_id: second, reason: "closed".into() };
    assert_eq!(tell(&mut tunnel.stream).await, closed.into());
    // What the client sends before it closes a connection arrives, however it closes it.
    tunnel.send(first, b"told one").await;
    tunnel.close(first, "host_closed").await;
    let mut told = Vec::new();
    soon(one.read_to_end(&mut told)).await.unwrap();
    assert_eq!(told, b"told one");
    // Frames for connections that are over, or never were, are nobody's loss.
    tunnel.send(first, b"late").await;
    tunnel.send(999, b"lost").await;
    let (third, mut three) = tunnel.connect().await;
    three.write_all(b"still here").await.unwrap();
    assert_eq!(tell(&mut tunnel.stream).await, data(third, "still here"));
}

#[tokio::test]
async fn closing_the_tunnel_ends_its_connections_and_frees_its_port() {
    let world = World::new().await;
    let (mut first, id) = tunnel(&world).await;
    let (_, mut peer) = first.connect().await;
    first.close(0, "sdk_closed").await;
    first.stream.close_send();
    assert_eq!(next(&mut first.stream).await.unwrap(), None);
    assert_eq!(soon(peer.read(&mut [0; 8])).await.unwrap(), 0);
    let client = world.data(&world.certificate(&id).await);
    let mut again = begin(&client, wire::HostPortTunnelOpen { sandbox_port: first.port.into(), ..open(&id) }).await;
    let Payload::Opened(opened) = tell(&mut again).await else { panic!("not opened") };
    assert_eq!(opened.sandbox_port, u32::from(first.port));
    // A client that vanishes frees it as well.
    drop(again);
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while first.guest.connect(&Address::Tcp { port: first.port }).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "the port is still listened on");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_cannot_be_opened_says_why() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let taken = wire::HostPortTunnelOpen { sandbox_port: 5_000, ..open(&id) };
    let mut first = begin(&client, taken.clone()).await;
    assert!(matches!(tell(&mut first).await, Payload::Opened(_)));
    let refused = terminated(&mut begin(&client, taken).await).await;
    assert_eq!((refused.reason.as_known(), refused.errno), (Some(Reason::BindFailed), 98), "{refused:?}");
    for wrong in [
        wire::HostPortTunnelOpen { sandbox_port: 65_536, ..open(&id) },
        wire::HostPortTunnelOpen { sandbox_bind_address: "nowhere".into(), ..open(&id) },
        wire::HostPortTunnelOpen { host_dial_target_label: "x".repeat(257), ..open(&id) },
        open("nonsense"),
    ] {
        let error = next(&mut begin(&client, wrong.clone()).await).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{wrong:?}");
    }
    for (address, expected) in [("", "127.0.0.1:"), ("0.0.0.0", "127.0.0.1:"), ("::", "[::1]:"), ("[::1]", "[::1]:")] {
        let label = "é".repeat(256);
        let wanted = wire::HostPortTunnelOpen {
            sandbox_bind_address: address.into(),
            host_dial_target_label: label,
            ..open(&id)
        };
        let Payload::Opened(opened) = tell(&mut begin(&client, wanted).await).await else { panic!("not opened") };
        assert!(opened.sandbox_address.starts_with(expected), "{opened:?}");
    }
    let mut stream = client.host_port_tunnel().await.unwrap();
    ask(&mut stream, wire::HostPortTunnelKeepalivePong { ping_id: 1 }.into()).await;
    assert_eq!(next(&mut stream).await.unwrap_err().code, ErrorCode::InvalidArgument);
    ask(&mut first, open(&id).into()).await;
    assert_eq!(next(&mut first).await.unwrap_err().code, ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn a_paused_or_ended_session_terminates_its_tunnels() {
    let world = World::new().await;
    let control = world.control();
    let (mut paused, id) = tunnel(&world).await;
    control.pause_session(wire::PauseSessionRequest { session_id: id.clone() }).await.unwrap();
    let lost = terminated(&mut paused.stream).await;
    assert_eq!(lost.reason.as_known(), Some(Reason::SessionLost));
    assert!(lost.detail.contains("PAUS"), "{lost:?}");
    control.resume_session(wire::ResumeSessionRequest { session_id: id.clone() }).await.unwrap();
    let client = world.data(&world.certificate(&id).await);
    let mut again = begin(&client, wire::HostPortTunnelOpen { sandbox_port: paused.port.into(), ..open(&id) }).await;
    assert!(matches!(tell(&mut again).await, Payload::Opened(_)));
    control.terminate_session(wire::TerminateSessionRequest { session_id: id }).await.unwrap();
    assert_eq!(terminated(&mut again).await.reason.as_known(), Some(Reason::SessionLost));
}

#[tokio::test]
async fn a_server_that_stops_says_so_in_the_tunnels_own_words() {
    let world = World::new().await;
    let (mut tunnel, _) = tunnel(&world).await;
    let (_, _peer) = tunnel.connect().await;
    let stopping = tokio::spawn(world.daemon.shut_down());
    assert_eq!(terminated(&mut tunnel.stream).await.reason.as_known(), Some(Reason::EngineDraining));
    soon(stopping).await.unwrap();
}

#[tokio::test]
async fn a_client_that_answers_pings_is_kept_and_one_that_does_not_is_let_go() {
    let world = World::with(|config| {
        config.limits.keep_alive_interval_ms = 100;
        config.limits.keep_alive_timeout_ms = 400;
    })
    .await;
    let (mut tunnel, _) = tunnel(&world).await;
    for expected in 1..=5 {
        let Payload::Ping(ping) = tell(&mut tunnel.stream).await else { panic!("not a ping") };
        assert_eq!(ping.ping_id, expected);
        ask(&mut tunnel.stream, wire::HostPortTunnelKeepalivePong { ping_id: ping.ping_id }.into()).await;
    }
    let lost = loop {
        match tell(&mut tunnel.stream).await {
            Payload::Ping(_) => {}
            Payload::Terminated(terminated) => break terminated,
            other => panic!("neither a ping nor the end: {other:?}"),
        }
    };
    assert_eq!(lost.reason.as_known(), Some(Reason::KeepaliveTimeout));
}

#[tokio::test]
async fn a_connection_in_which_nothing_moves_is_closed_when_it_holds_up_others() {
    let world = World::new().await;
    let (mut tunnel, _) = tunnel(&world).await;
    let (stalled, _nobody_reads) = tunnel.connect().await;
    let (moving, mut peer) = tunnel.connect().await;
    let begun = tokio::time::Instant::now();
    for _ in 0..64 {
        tunnel.send(stalled, &[0; 32 * 1024]).await;
    }
    tunnel.send(moving, b"after it").await;
    let Payload::Close(close) = tell(&mut tunnel.stream).await else { panic!("not closed") };
    assert_eq!((close.sub_stream_id, close.reason.as_str()), (stalled, "sandbox_stalled"));
    let mut told = [0; 8];
    soon(peer.read_exact(&mut told)).await.unwrap();
    assert_eq!(&told, b"after it");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn bulk_data_arrives_whole_both_ways_at_the_readers_pace() {
    let world = World::new().await;
    let (mut tunnel, _) = tunnel(&world).await;
    let (id, peer) = tunnel.connect().await;
    let (mut reader, mut writer) = tokio::io::split(peer);
    let block: Vec<u8> = (0..1 << 20).map(|index: usize| (index % 253) as u8).collect();
    let expected = block.clone();
    let inside = tokio::spawn(async move {
        for _ in 0..16 {
            writer.write_all(&expected).await.unwrap();
        }
        writer.shutdown().await.unwrap();
        let mut received = Vec::new();
        // Slower than the client sends, but alone: it waits, however long it takes.
        while received.len() < 16 << 20 {
            let mut piece = vec![0; 1 << 20];
            reader.read_exact(&mut piece).await.unwrap();
            received.extend_from_slice(&piece);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        received
    });
    let mut received = Vec::new();
    while received.len() < 16 << 20 {
        let Payload::Data(data) = tell(&mut tunnel.stream).await else { panic!("not data") };
        assert!(data.sub_stream_id == id && data.payload.len() <= 32 * 1024);
        received.extend_from_slice(&data.payload);
    }
    assert_eq!(tell(&mut tunnel.stream).await, half_close(id, false).into());
    for _ in 0..16 {
        tunnel.send(id, &block).await;
    }
    assert!(received == block.repeat(16));
    assert!(soon(inside).await.unwrap() == received);
}
