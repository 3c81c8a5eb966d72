use bytes::BytesMut;
use nagaya_api::error::Code;
use nagaya_engine::ports::ProcessInput;
use nagaya_guest::frame::{Frame, Kind};
use nagaya_guest::handshake::{Handshake, HandshakeError};
use nagaya_guest::messages::{self, Hello, Request, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::agent_client::LinkError;

async fn raw(agent: &Agent) -> UnixStream {
    UnixStream::connect(agent.directory.path().join("socket")).await.unwrap()
}

fn wire(frames: &[Frame]) -> BytesMut {
    let mut wire = BytesMut::new();
    for frame in frames {
        frame.encode(&mut wire);
    }
    wire
}

fn hello(version_min: u32, version_max: u32) -> Frame {
    let hello = Hello { version_min, version_max, features: vec!["from-the-future".into()], ..Default::default() };
    Frame { kind: Kind::Hello, stream: 0, payload: messages::encode(&hello) }
}

/// Everything the agent says until it closes the connection.
async fn farewell(stream: &mut UnixStream) -> String {
    let mut received = Vec::new();
    // An error is a close, too: what we sent was not read to its end.
    let _ = stream.read_to_end(&mut received).await;
    String::from_utf8_lossy(&received).into_owned()
}

#[tokio::test]
async fn commands_run_on_when_the_connection_is_lost() {
    let agent = Agent::start();
    let link = agent.connect().await;
    // More output than all buffers on the way hold, then a trace.
    let script = format!("read go; yes | head -c 3000000; echo done > {}", agent.path("trace"));
    let mut wanted = shell(&script);
    wanted.stdin = true;
    let process = link.run(wanted).await.unwrap();
    // The task of the command holds the connection's streams; the link itself is what is cut.
    link.mux.close("test");
    until("the command has finished", || std::fs::read(agent.home().join("trace")).is_ok()).await;
    let (pid, mut events) = (process.pid, process.events);
    assert!(events.recv().await.is_none(), "no exit is invented");
    until("the command was collected", || !std::path::Path::new(&format!("/proc/{pid}")).exists()).await;
}

#[tokio::test]
async fn the_newest_connection_takes_over() {
    let agent = Agent::start();
    let first = agent.connect().await;
    let process = first.run(shell("sleep 1000")).await.unwrap();
    let second = agent.connect().await;
    assert!(first.closed().await.contains("a newer connection took over"));
    assert_eq!(run(&second, command(&["true"])).await.1.code, 0);
    assert!(is_alive(process.pid));
    let error = first.run(command(&["true"])).await.map(|_| ()).unwrap_err();
    assert_eq!(error.code, Code::GuestUnreachable);
    run(&second, shell(&format!("kill {}", process.pid))).await;
}

#[tokio::test]
async fn a_connection_that_says_nothing_disturbs_nobody() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let _silent = raw(&agent).await;
    let mut partial = raw(&agent).await;
    partial.write_all(&[0, 1]).await.unwrap();
    assert_eq!(run(&link, command(&["true"])).await.1.code, 0);
    assert!(!link.is_closed());
}

#[tokio::test]
async fn a_newer_server_that_still_speaks_our_version_is_served() {
    let agent = Agent::start();
    let stream = raw(&agent).await;
    let link =
        Link::with_handshake(stream, Handshake { version_min: 1, version_max: 9, powered_off: false }).await.unwrap();
    assert_eq!(run(&link, command(&["true"])).await.1.code, 0);
}

#[tokio::test]
async fn versions_without_overlap_are_refused_with_the_reason_on_both_sides() {
    let agent = Agent::start();
    let result =
        Link::with_handshake(raw(&agent).await, Handshake { version_min: 2, version_max: 9, powered_off: false }).await;
    assert!(matches!(result, Err(LinkError::Handshake(HandshakeError::Version { min: 1, max: 1 }))), "{result:?}");
    let mut stream = raw(&agent).await;
    stream.write_all(&wire(&[hello(2, 9)])).await.unwrap();
    let text = farewell(&mut stream).await;
    assert!(text.contains("speaks versions 2 to 9"), "{text:?}");
}

#[tokio::test]
async fn unknown_fields_and_requests_of_a_newer_server_are_survived() {
    let agent = Agent::start();
    let link = agent.connect().await;
    // Field 1000 with a varint: a request this agent has never heard of.
    let (_sender, mut receiver) = link.mux.open(Bytes::from_static(&[0xc0, 0x3e, 1])).await.unwrap();
    let Some(nagaya_guest::mux::Incoming::End(end)) = receiver.next().await else { panic!("no outcome") };
    let error = crate::agent_client::finish(&end).unwrap_err();
    assert_eq!(error.code, Code::CapabilityUnavailable);

    let stat = messages::Stat { path: "/".into() };
    let mut payload = messages::encode(&Request { kind: request::Kind::from(stat).into() }).to_vec();
    payload.extend_from_slice(&[0xc0, 0x3e, 1]);
    let (_sender, mut receiver) = link.mux.open(payload.into()).await.unwrap();
    let Some(nagaya_guest::mux::Incoming::End(end)) = receiver.next().await else { panic!("no outcome") };
    assert!(crate::agent_client::finish(&end).unwrap().is_some());
}

#[tokio::test]
async fn whoever_breaks_the_rules_is_told_which_and_cut_off() {
    let agent = Agent::start();
    let open = |stream: u32| {
        let command = nagaya_guest::messages::Command {
            argv: vec!["cat".into()],
            stdin: true,
            cwd: "/".into(),
            ..Default::default()
        };
        let request = Request { kind: request::Kind::from(command).into() };
        Frame { kind: Kind::Open, stream, payload: messages::encode(&request) }
    };
    let frame =
        |kind: Kind, stream: u32, payload: &'static [u8]| Frame { kind, stream, payload: Bytes::from_static(payload) };
    let data = |length: usize| Frame { kind: Kind::Data, stream: 1, payload: vec![0; length].into() };
    let cases: Vec<(Vec<Frame>, &str)> = vec![
        (vec![frame(Kind::Reset, 1, b"")], "did not begin with a greeting"),
        (vec![hello(1, 1), hello(1, 1)], "a second greeting"),
        (vec![hello(1, 1), frame(Kind::Data, 7, b"x")], "never opened"),
        (vec![hello(1, 1), open(1), open(1)], "opened twice"),
        (vec![hello(1, 1), open(1), frame(Kind::ErrorData, 1, b"x")], "wrong side"),
        (vec![hello(1, 1), open(1), frame(Kind::End, 1, b""), frame(Kind::End, 1, b"")], "second end"),
        (vec![hello(1, 1), open(1), frame(Kind::End, 1, b""), frame(Kind::Data, 1, b"x")], "content after its end"),
        (vec![hello(1, 1), open(1), Frame::window(1, u32::MAX, 0)], "more credit"),
        ([vec![hello(1, 1), open(1)], vec![data(65_536); 5]].concat(), "more was sent than had been granted"),
        ([vec![hello(1, 1), open(1)], vec![data(1); 257]].concat(), "more was sent than had been granted"),
        (
            (0..=1024).map(|number| if number == 0 { hello(1, 1) } else { open(number) }).chain([open(1025)]).collect(),
            "too many streams",
        ),
    ];
    for (frames, reason) in cases {
        let mut stream = raw(&agent).await;
        let (mut reader, mut writer) = stream.split();
        let sent = wire(&frames);
        // The agent may hang up before it has read everything.
        let send = async {
            let _ = writer.write_all(&sent).await;
        };
        let mut received = Vec::new();
        let receive = async {
            let _ = reader.read_to_end(&mut received).await;
        };
        tokio::join!(send, receive);
        let text = String::from_utf8_lossy(&received);
        assert!(text.contains(reason), "{reason}: {text:?}");
    }
    let mut stream = raw(&agent).await;
    stream.write_all(&[wire(&[hello(1, 1)]).as_ref(), &[255; 64]].concat()).await.unwrap();
    assert!(farewell(&mut stream).await.contains("unknown frame kind"));
    assert_eq!(run(&*agent.connect().await, command(&["true"])).await.1.code, 0);
}

#[tokio::test]
async fn garbage_after_the_greeting_never_hurts_the_agent() {
    let agent = Agent::start();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..200 {
        let mut garbage = Vec::new();
        for _ in 0..100 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            garbage.extend_from_slice(&random.to_le_bytes());
        }
        // A plausible header, so that the payload is looked at as well.
        garbage[..9].copy_from_slice(&[200, 0, 0, 0, (random % 9 + 1) as u8, 1, 0, 0, 0]);
        let mut stream = raw(&agent).await;
        stream.write_all(&wire(&[hello(1, 1)])).await.unwrap();
        let _ = stream.write_all(&garbage).await;
    }
    assert_eq!(run(&*agent.connect().await, command(&["true"])).await.1.code, 0);
}

/// Plays an agent that greets properly and then sends what it likes.
async fn false_agent(after_greeting: Vec<u8>) -> (Arc<Link>, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&wire(&[hello(1, 1)])).await.unwrap();
    let link = Link::from_stream(ours).await.unwrap();
    theirs.write_all(&after_greeting).await.unwrap();
    (link, theirs)
}

#[tokio::test]
async fn a_lying_agent_loses_its_link_and_callers_learn_of_it() {
    let end = Frame { kind: Kind::End, stream: 1, payload: Bytes::new() };
    for (frames, reason) in [
        (vec![hello(1, 1)], "a second greeting"),
        (vec![end.clone()], "never opened"),
        (vec![Frame { kind: Kind::Open, stream: 1, payload: Bytes::new() }], "wrong side"),
        (vec![Frame { kind: Kind::Goodbye, stream: 0, payload: bytes("bye") }], "the other side left: bye"),
    ] {
        let (link, _theirs) = false_agent(wire(&frames).to_vec()).await;
        assert!(link.closed().await.contains(reason), "{reason}");
        assert_eq!(link.stat("/").await.unwrap_err().code, Code::GuestUnreachable);
    }
}

#[tokio::test]
async fn answers_that_make_no_sense_are_errors() {
    let (link, mut theirs) = false_agent(Vec::new()).await;
    let error = |code: &str| {
        let error = messages::Error { code: code.into(), detail: format!("a\u{7}{}", "x".repeat(1000)), errno: -5 };
        messages::encode(&messages::Outcome { kind: error.into() })
    };
    let answers = [
        (Kind::End, Bytes::from_static(&[255; 20]), Code::GuestUnreachable),
        (Kind::End, Bytes::new(), Code::GuestUnreachable),
        (Kind::Data, bytes("data"), Code::GuestUnreachable),
        (Kind::Reset, Bytes::new(), Code::GuestUnreachable),
        (Kind::End, error("file_not_found"), Code::FileNotFound),
        (Kind::End, error("from_the_future"), Code::FileSystem),
    ];
    for (stream, (kind, payload, code)) in answers.into_iter().enumerate() {
        let answer = wire(&[Frame { kind, stream: stream as u32 + 1, payload }]);
        let (outcome, _) = tokio::join!(link.stat("/"), async {
            // The stream exists once its request has been read.
            let mut header = [0; 9];
            while header[4] != Kind::Open as u8 {
                theirs.read_exact(&mut header).await.unwrap();
                let mut payload = vec![0; u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize];
                theirs.read_exact(&mut payload).await.unwrap();
            }
            theirs.write_all(&answer).await.unwrap();
        });
        let error = outcome.unwrap_err();
        assert_eq!(error.code, code, "answer {stream}");
        assert!(error.detail.chars().count() <= 200 && !error.detail.contains('\u{7}'), "{error:?}");
    }
    assert!(!link.is_closed());
}

#[tokio::test]
async fn an_agent_that_never_greets_is_given_up() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    tokio::time::pause();
    let result = Link::from_stream(ours).await;
    assert!(matches!(result, Err(LinkError::Handshake(HandshakeError::TimedOut))), "{result:?}");
}

#[tokio::test]
async fn stdin_is_closed_when_the_connection_is_lost() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell(&format!("cat; echo over > {}", agent.path("trace")));
    wanted.stdin = true;
    let process = link.run(wanted).await.unwrap();
    process.input.send(ProcessInput::Stdin(bytes("x"))).await.unwrap();
    drop(link);
    drop(agent.connect().await);
    until("cat has ended", || std::fs::read(agent.home().join("trace")).is_ok()).await;
}
