//! Unix sockets that the agent carries, and agents that lie about connections.

use nagaya_api::error::Code;
use nagaya_engine::ports::{Address, Bind};
use nagaya_guest::frame::{Frame, Kind};
use nagaya_guest::messages::{self, Arrived, EndOfContent, Event, Hello, Opened, Outcome, event};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::*;

fn unix(path: &str) -> Address {
    Address::Unix { path: path.into() }
}

#[tokio::test]
async fn a_dropped_connection_ends_after_what_was_written() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let path = agent.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    for shut_down in [true, false] {
        let mut stream = link.connect(&unix(&path)).await.unwrap();
        let (mut peer, _) = listener.accept().await.unwrap();
        stream.write_all(&vec![7; 200_000]).await.unwrap();
        if shut_down {
            stream.shutdown().await.unwrap();
        }
        drop(stream);
        let mut content = Vec::new();
        peer.read_to_end(&mut content).await.unwrap();
        assert_eq!(content.len(), 200_000);
    }
    // What waits for the agent is given up with its future, and leaves nothing in its way.
    drop(tokio::time::timeout(Duration::from_micros(1), link.connect(&unix(&path))).await);
    assert!(link.stat("/").await.unwrap().is_some());
}

#[tokio::test]
async fn a_lost_connection_to_the_agent_is_an_error_and_no_end() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let path = agent.path("socket");
    let mut listener = link.listen(&Bind::Unix { path: path.clone() }).await.unwrap();
    let mut stream = link.connect(&unix(&path)).await.unwrap();
    let mut accepted = listener.incoming.recv().await.unwrap().stream;
    link.mux.close("test");
    for stream in [&mut stream, &mut accepted] {
        assert!(stream.read(&mut [0; 8]).await.is_err());
    }
    assert!(listener.incoming.recv().await.is_none());
    until("the socket was removed", || !std::path::Path::new(&path).exists()).await;
}

#[tokio::test]
async fn a_peer_that_takes_nothing_more_may_still_speak() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let path = agent.path("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut ours = link.connect(&unix(&path)).await.unwrap();
    let peer = listener.accept().await.unwrap().0.into_std().unwrap();
    peer.shutdown(std::net::Shutdown::Read).unwrap();
    let mut peer = UnixStream::from_std(peer).unwrap();
    // Far more than all buffers on the way hold.
    ours.write_all(&vec![7; 4 << 20]).await.unwrap();
    peer.write_all(b"still here").await.unwrap();
    let mut heard = [0; 10];
    ours.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"still here");
    drop(peer);
    let block = vec![7; 64 * 1024];
    while ours.write_all(&block).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(link.stat("/").await.unwrap().is_some(), "nothing else is the matter");
}

pub(super) fn tell(stream: u32, kind: impl Into<event::Kind>) -> Frame {
    Frame { kind: Kind::Message, stream, payload: messages::encode(&Event { kind: Some(kind.into()) }) }
}

/// Plays an agent that greets properly, and answers the first request with these frames.
pub(super) async fn false_agent(frames: Vec<Frame>) -> (Arc<Link>, tokio::task::JoinHandle<UnixStream>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let hello = Hello { version_min: 1, version_max: 1, ..Default::default() };
    let greeting = Frame { kind: Kind::Hello, stream: 0, payload: messages::encode(&hello) };
    let mut wire = bytes::BytesMut::new();
    greeting.encode(&mut wire);
    theirs.write_all(&wire).await.unwrap();
    let link = Link::from_stream(ours).await.unwrap();
    wire.clear();
    frames.iter().for_each(|frame| frame.encode(&mut wire));
    let (mut reader, mut writer) = theirs.into_split();
    let mut header = [0; 9];
    let answering = tokio::spawn(async move {
        while header[4] != Kind::Open as u8 {
            reader.read_exact(&mut header).await.unwrap();
            let mut payload = vec![0; u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize];
            reader.read_exact(&mut payload).await.unwrap();
        }
        writer.write_all(&wire).await.unwrap();
        reader.reunite(writer).unwrap()
    });
    (link, answering)
}

#[tokio::test]
async fn what_a_lying_agent_says_about_connections_harms_nobody_else() {
    let data = |stream| Frame { kind: Kind::Data, stream, payload: bytes("data") };
    let end = Frame { kind: Kind::End, stream: 1, payload: messages::encode(&Outcome::default()) };
    let reset = Frame { kind: Kind::Reset, stream: 1, payload: Bytes::new() };
    for refused in [vec![data(1)], vec![end.clone()], vec![reset.clone()], vec![tell(1, EndOfContent::default())]] {
        let (link, _theirs) = false_agent(refused).await;
        let error = link.connect(&unix("/x")).await.map(drop).unwrap_err();
        assert_eq!(error.code, Code::GuestUnreachable, "{error:?}");
    }
    let opened = tell(1, Opened::default());
    let over = tell(1, EndOfContent::default());
    for (frames, text, fails) in [
        (vec![opened.clone(), data(1), end.clone()], "data", false),
        (vec![opened.clone(), data(1), over.clone()], "data", false),
        (vec![opened.clone(), data(1), reset.clone()], "data", true),
        (vec![opened.clone(), Frame { kind: Kind::ErrorData, ..data(1) }], "", true),
    ] {
        let (link, _theirs) = false_agent(frames).await;
        let mut stream = link.connect(&unix("/x")).await.unwrap();
        let mut content = String::new();
        let read = stream.read_to_string(&mut content).await;
        assert_eq!(read.is_err(), fails, "{read:?}");
        assert!(fails || content == text, "{content:?}");
    }
    let arrived = |number| tell(1, Arrived { number, ..Arrived::default() });
    let (link, _theirs) = false_agent(vec![opened, arrived(1), arrived(u64::MAX), reset]).await;
    let mut listener = link.listen(&Bind::Unix { path: "/x".into() }).await.unwrap();
    tokio::time::pause();
    assert!(listener.incoming.recv().await.is_none(), "peers that cannot be taken are none");
}

#[tokio::test]
async fn an_agent_that_never_answers_is_given_up() {
    let (link, _theirs) = false_agent(Vec::new()).await;
    tokio::time::pause();
    let error = link.connect(&unix("/x")).await.map(drop).unwrap_err();
    assert_eq!((error.code, error.errno), (Code::DeadlineExceeded, 110));
    let error = link.listen(&Bind::Unix { path: "/x".into() }).await.map(drop).unwrap_err();
    assert_eq!(error.code, Code::DeadlineExceeded);
}
