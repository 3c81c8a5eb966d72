//! TCP ports of the sandbox, through the server's own sockets and through the agent; and agents that lie about them. The
//! sandbox's network is the host's here.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nagaya_api::error::Code;
use nagaya_engine::ports::{Address, Bind, BoxStream, GuestError};
use nagaya_guest::frame::{Frame, Kind};
use nagaya_guest::messages::{self, Arrived, ConnectTcp, ListenTcp, Opened, Outcome, request};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::streams::{false_agent, tell};
use super::*;
use crate::agent_client::CARRIED_MAX;

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

fn use_shortcut(link: &Link, process: u32) {
    link.use_network_of(pidfd_open(Pid::from_raw(process as i32).unwrap(), PidfdFlags::empty()).unwrap());
}

/// Does the same with the shortcut and without it.
async fn either_way(test: impl AsyncFn(&Link)) {
    for shortcut in [true, false] {
        println!("with the shortcut: {shortcut}");
        let agent = Agent::start();
        let link = agent.connect().await;
        if shortcut {
            use_shortcut(&link, agent.process.id());
        }
        tokio::time::timeout(Duration::from_secs(60), test(&link)).await.expect("nothing here waits for long");
    }
}

async fn connect(link: &Link, port: u16) -> BoxStream {
    link.connect(&Address::Tcp { port }).await.unwrap()
}

fn port_of(listener: &TcpListener) -> u16 {
    listener.local_addr().unwrap().port()
}

/// A port on which nobody listens.
async fn free_port() -> u16 {
    port_of(&TcpListener::bind((V4, 0)).await.unwrap())
}

async fn converse(mut ours: BoxStream, mut theirs: BoxStream) {
    let question = vec![7; 1_000_000];
    let (_, heard) = tokio::join!(
        async {
            ours.write_all(&question).await.unwrap();
            ours.shutdown().await.unwrap();
        },
        async {
            let mut heard = Vec::new();
            theirs.read_to_end(&mut heard).await.unwrap();
            heard
        }
    );
    assert!(heard == question);
    // Half closed is not closed.
    theirs.write_all(b"answer").await.unwrap();
    drop(theirs);
    let mut answer = String::new();
    ours.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "answer");
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_side_ends_for_itself() {
    either_way(async |link| {
        let listener = TcpListener::bind((V4, 0)).await.unwrap();
        let ours = connect(link, port_of(&listener)).await;
        let theirs = Box::new(listener.accept().await.unwrap().0);
        converse(ours, theirs).await;
        let ours = connect(link, port_of(&listener)).await;
        let theirs = Box::new(listener.accept().await.unwrap().0);
        converse(theirs, ours).await;
    })
    .await;
}

#[tokio::test]
async fn loopback_is_either_of_two_addresses_and_a_named_one_is_no_other() {
    either_way(async |link| {
        let listener = TcpListener::bind((V6, 0)).await.unwrap();
        let port = port_of(&listener);
        drop(connect(link, port).await);
        drop(link.connect(&Address::Ip { ip: V6, port }).await.unwrap());
        let refused = link.connect(&Address::Ip { ip: V4, port }).await.map(drop).unwrap_err();
        assert_eq!(refused.code, Code::ConnectionRefused, "{refused:?}");
    })
    .await;
}

#[tokio::test]
async fn errors_are_the_same_either_way() {
    let taken = TcpListener::bind((V4, 0)).await.unwrap();
    let (free, taken) = (free_port().await, port_of(&taken));
    let nobodys: IpAddr = "192.0.2.1".parse().unwrap();
    let of_all: IpAddr = "224.0.0.1".parse().unwrap();
    let all = std::sync::Mutex::new(Vec::new());
    either_way(async |link| {
        let mut errors: Vec<GuestError> = Vec::new();
        for address in [
            Address::Tcp { port: free },
            Address::Tcp { port: 0 },
            Address::Ip { ip: V6, port: free },
            Address::Ip { ip: of_all, port: 80 },
        ] {
            errors.push(link.connect(&address).await.map(drop).unwrap_err());
        }
        for (ip, port) in [(V4, taken), (nobodys, 0)] {
            errors.push(link.listen(&Bind::Tcp { ip, port }).await.map(drop).unwrap_err());
        }
        let told = errors.into_iter().map(|error| (error.code, error.errno, error.detail));
        all.lock().unwrap().push(told.collect::<Vec<_>>());
    })
    .await;
    let all = all.into_inner().unwrap();
    assert_eq!(all[0], all[1]);
    let known: Vec<_> = all[1].iter().map(|(code, errno, _)| (*code, *errno)).collect();
    assert_eq!(known[0], (Code::ConnectionRefused, 111));
    assert_eq!(known[4..], [(Code::BindFailed, 98), (Code::BindFailed, 99)]);
}

#[tokio::test]
async fn peers_of_a_listener_come_with_their_addresses_in_turn() {
    either_way(async |link| {
        let mut listener = link.listen(&Bind::Tcp { ip: V4, port: 0 }).await.unwrap();
        let port = listener.port;
        let mut peers = Vec::new();
        for _ in 0..40 {
            peers.push(TcpStream::connect((V4, port)).await.unwrap());
        }
        let mut taken = Vec::new();
        for peer in peers {
            let accepted = listener.incoming.recv().await.unwrap();
            assert_eq!(accepted.source, peer.local_addr().unwrap().to_string());
            taken.push((peer, accepted.stream));
        }
        // What was taken goes on without the listener.
        drop(listener);
        while TcpStream::connect((V4, port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (peer, stream) = taken.pop().unwrap();
        converse(Box::new(peer), stream).await;
        // The port is free again, though connections of it are left.
        let again = link.listen(&Bind::Tcp { ip: V4, port }).await.unwrap();
        assert_eq!(again.port, port);
    })
    .await;
}

#[tokio::test]
async fn writing_to_a_peer_that_has_gone_fails() {
    either_way(async |link| {
        let listener = TcpListener::bind((V4, 0)).await.unwrap();
        let mut ours = connect(link, port_of(&listener)).await;
        drop(listener.accept().await.unwrap());
        let block = vec![1; 64 * 1024];
        while ours.write_all(&block).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(run(link, command(&["true"])).await.1.code, 0, "nothing else is the matter");
    })
    .await;
}

#[tokio::test]
async fn connections_and_listeners_end_with_the_link() {
    either_way(async |link| {
        let mut listener = link.listen(&Bind::Tcp { ip: V4, port: 0 }).await.unwrap();
        let mut ours = connect(link, listener.port).await;
        let mut theirs = listener.incoming.recv().await.unwrap().stream;
        link.mux.close("test");
        for stream in [&mut ours, &mut theirs] {
            // An error, or an end as when the machine at the other end goes.
            assert!(!matches!(stream.read(&mut [0; 8]).await, Ok(1..)));
        }
        assert!(listener.incoming.recv().await.is_none());
        assert!(link.connect(&Address::Tcp { port: listener.port }).await.is_err());
    })
    .await;
}

#[tokio::test]
async fn carried_connections_are_bounded_and_leave_room_for_commands() {
    let agent = Agent::start();
    let link = agent.connect().await;
    // Nobody accepts: they wait in the kernel, and take no descriptors here.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((V4, 0).into()).unwrap();
    let listener = socket.listen(CARRIED_MAX as u32 + 10).unwrap();
    let port = port_of(&listener);
    let mut held = Vec::new();
    let refused = loop {
        match link.connect(&Address::Tcp { port }).await {
            Ok(stream) => held.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!((held.len(), refused.code), (CARRIED_MAX, Code::CapacityUnavailable), "{refused:?}");
    assert_eq!(run(&link, command(&["true"])).await.1.code, 0);
    // Peers of a listener wait for a place, too.
    let mut served = link.listen(&Bind::Tcp { ip: V4, port: 0 }).await.unwrap();
    let _peer = TcpStream::connect((V4, served.port)).await.unwrap();
    let waiting = tokio::time::timeout(Duration::from_millis(200), served.incoming.recv()).await;
    assert!(waiting.is_err(), "there is no place");
    held.pop();
    let accepted = tokio::time::timeout(Duration::from_secs(10), served.incoming.recv()).await;
    assert!(accepted.is_ok_and(|peer| peer.is_some()), "there is a place again");
    // What was dropped is gone, though no peer has said a word.
    held.clear();
    until("its memory is given back", || agent.own_memory_kib() <= 768).await;
}

#[tokio::test]
async fn what_a_lying_agent_says_of_ports_is_not_believed() {
    let opened = |port| tell(1, Opened { port, ..Opened::default() });
    for (asked, told) in [(0, 0), (0, 65_536 + 80), (80, 81), (80, 65_536 + 80), (80, 0)] {
        let (link, _theirs) = false_agent(vec![opened(told)]).await;
        let error = link.listen(&Bind::Tcp { ip: V4, port: asked }).await.map(drop).unwrap_err();
        assert_eq!(error.code, Code::GuestUnreachable, "{told} for {asked}: {error:?}");
    }
    let arrived = |ip: &'static [u8], port| tell(1, Arrived { number: 1, ip: Bytes::from_static(ip), port });
    let reset = Frame { kind: Kind::Reset, stream: 1, payload: Bytes::new() };
    let lies = vec![opened(80), arrived(b"", 0), arrived(b"local", 80), arrived(&[127, 0, 0, 1], 70_000), reset];
    let (link, theirs) = false_agent(lies).await;
    let mut listener = link.listen(&Bind::Tcp { ip: V4, port: 80 }).await.unwrap();
    assert!(listener.incoming.recv().await.is_none(), "peers without an address are none");
    // Nor are they asked for: the next thing that the agent hears is something else.
    let mut theirs = theirs.await.unwrap();
    drop(tokio::time::timeout(Duration::from_millis(50), link.stat("/")).await);
    let mut wire = vec![0; 4096];
    let read = theirs.read(&mut wire).await.unwrap();
    let kinds = frames(&wire[..read]).into_iter().filter(|frame| frame.kind == Kind::Open);
    let asked = kinds.map(|frame| messages::decode::<messages::Request>(&frame.payload).unwrap().kind.unwrap());
    assert!(matches!(asked.collect::<Vec<_>>()[..], [request::Kind::Stat(_)]));
}

fn frames(wire: &[u8]) -> Vec<Frame> {
    let mut decoder = nagaya_guest::frame::Decoder::default();
    decoder.buffer().extend_from_slice(wire);
    std::iter::from_fn(|| decoder.next_frame().unwrap()).collect()
}

#[tokio::test]
async fn an_agent_takes_no_address_that_is_none() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let ip = |bytes: &'static [u8]| Bytes::from_static(bytes);
    let wrong = [(ip(&[127, 0, 0, 1]), 65_536 + 80), (ip(b""), 80), (ip(b"127.0.0.1"), 80)];
    for (ip, port) in wrong {
        let requests: [request::Kind; 2] =
            [ConnectTcp { ip: ip.clone(), port }.into(), ListenTcp { ip: ip.clone(), port }.into()];
        for request in requests {
            let error = link.ask(request).await.unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument, "{ip:?} {port}: {error:?}");
        }
    }
}

#[tokio::test]
async fn an_older_agent_is_gone_round_where_there_is_a_way() {
    let unknown = || {
        let code = Code::CapabilityUnavailable.name().into();
        let error = messages::Error { code, ..Default::default() };
        let payload = messages::encode(&Outcome { kind: error.into() });
        false_agent(vec![Frame { kind: Kind::End, stream: 1, payload }])
    };
    let listener = TcpListener::bind((V4, 0)).await.unwrap();
    let (address, bind) = (Address::Tcp { port: port_of(&listener) }, Bind::Tcp { ip: V4, port: 0 });
    let (link, _theirs) = unknown().await;
    assert_eq!(link.connect(&address).await.map(drop).unwrap_err().code, Code::CapabilityUnavailable);
    let (link, _theirs) = unknown().await;
    assert_eq!(link.listen(&bind).await.map(drop).unwrap_err().code, Code::CapabilityUnavailable);
    let (link, _theirs) = unknown().await;
    assert_eq!(link.usage().await.unwrap_err().code, Code::CapabilityUnavailable);

    let (link, _theirs) = unknown().await;
    use_shortcut(&link, std::process::id());
    let ours = link.connect(&address).await.unwrap();
    converse(ours, Box::new(listener.accept().await.unwrap().0)).await;
    assert_ne!(link.listen(&bind).await.unwrap().port, 0);
}

#[tokio::test]
async fn a_connection_that_is_reset_is_an_error_and_no_end() {
    either_way(async |link| {
        let listener = TcpListener::bind((V4, 0)).await.unwrap();
        let mut ours = connect(link, port_of(&listener)).await;
        let (theirs, _) = listener.accept().await.unwrap();
        theirs.set_zero_linger().unwrap();
        drop(theirs);
        assert_eq!(ours.read(&mut [0; 8]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    })
    .await;
}
