use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use tokio::io::{AsyncWriteExt, DuplexStream};

use super::*;
use crate::messages::{self, Hello};

type Requests = mpsc::UnboundedReceiver<Request>;

async fn start(stream: DuplexStream, role: Role) -> (Mux, Requests) {
    let (reader, writer) = tokio::io::split(stream);
    Mux::start(reader, writer, role, Handshake::default()).await.unwrap()
}

/// Both sides of a connection with little room in between.
async fn pair() -> (Mux, Mux, Requests) {
    let (host, agent) = tokio::io::duplex(1000);
    let ((host, _), (agent, requests)) = tokio::join!(start(host, Role::Host), start(agent, Role::Agent));
    (host, agent, requests)
}

fn zeros(length: usize) -> Bytes {
    vec![0; length].into()
}

#[tokio::test]
async fn a_request_and_its_answer_cross() {
    let (host, _agent, mut requests) = pair().await;
    let (_sender, mut receiver) = host.open(Bytes::from_static(b"question")).await.unwrap();
    let request = requests.recv().await.unwrap();
    assert_eq!(&request.payload[..], b"question");
    request.sender.message(Bytes::from_static(b"wait")).await.unwrap();
    request.sender.data(Kind::ErrorData, Bytes::from_static(b"data")).await.unwrap();
    request.sender.end(Bytes::from_static(b"answer"));
    assert_eq!(receiver.next().await, Some(Incoming::Message(Bytes::from_static(b"wait"))));
    assert_eq!(receiver.next().await, Some(Incoming::ErrorData(Bytes::from_static(b"data"))));
    assert_eq!(receiver.next().await, Some(Incoming::End(Bytes::from_static(b"answer"))));
    assert_eq!(receiver.next().await, None);
}

#[tokio::test]
async fn a_sender_waits_for_credit_and_other_streams_do_not() {
    let (host, _agent, mut requests) = pair().await;
    let (_slow_sender, mut slow) = host.open(Bytes::new()).await.unwrap();
    let (_fast_sender, mut fast) = host.open(Bytes::new()).await.unwrap();
    let (to_slow, to_fast) = (requests.recv().await.unwrap(), requests.recv().await.unwrap());
    let blocked = tokio::spawn(async move {
        for _ in 0..8 {
            to_slow.sender.data(Kind::Data, zeros(DATA_BYTES_MAX)).await.unwrap();
        }
    });
    for _ in 0..100 {
        to_fast.sender.data(Kind::Data, zeros(DATA_BYTES_MAX)).await.unwrap();
        let Some(Incoming::Data(data)) = fast.next().await else { panic!("no data") };
        fast.release(charge(data.len()));
    }
    assert!(!blocked.is_finished());
    for _ in 0..8 {
        let Some(Incoming::Data(data)) = slow.next().await else { panic!("no data") };
        slow.release(charge(data.len()));
    }
    blocked.await.unwrap();
}

#[tokio::test]
async fn tiny_chunks_and_messages_use_up_credit_too() {
    let (host, _agent, mut requests) = pair().await;
    let (sender, mut receiver) = host.open(Bytes::new()).await.unwrap();
    let mut request = requests.recv().await.unwrap();
    let tiny = tokio::spawn(async move {
        for _ in 0..2 * WINDOW_BYTES_INITIAL / CHARGE_BYTES_MIN {
            request.sender.data(Kind::Data, zeros(1)).await.unwrap();
        }
        request.sender.end(Bytes::new());
    });
    let messages = tokio::spawn(async move {
        for _ in 0..10 * WINDOW_MESSAGES_INITIAL {
            sender.message(zeros(1)).await.unwrap();
        }
        sender.end_content();
        sender
    });
    let mut received = 0;
    while let Some(Incoming::Message(_)) = request.receiver.next().await {
        received += 1;
    }
    assert_eq!(received, 10 * WINDOW_MESSAGES_INITIAL);
    assert!(!tiny.is_finished());
    let _sender = messages.await.unwrap();
    while let Some(Incoming::Data(data)) = receiver.next().await {
        receiver.release(charge(data.len()));
    }
    tiny.await.unwrap();
}

#[tokio::test]
async fn both_sides_can_send_much_at_once() {
    let (host, _agent, mut requests) = pair().await;
    let (sender, mut receiver) = host.open(Bytes::new()).await.unwrap();
    let mut request = requests.recv().await.unwrap();
    let echo = tokio::spawn(async move {
        while let Some(Incoming::Data(data)) = request.receiver.next().await {
            let cost = charge(data.len());
            request.sender.data(Kind::Data, data).await.unwrap();
            request.receiver.release(cost);
        }
        request.sender.end(Bytes::new());
    });
    let send = tokio::spawn(async move {
        for _ in 0..100 {
            sender.data(Kind::Data, zeros(DATA_BYTES_MAX)).await.unwrap();
        }
        sender.end_content();
        sender
    });
    let mut bytes = 0;
    while let Some(Incoming::Data(data)) = receiver.next().await {
        bytes += data.len();
        receiver.release(charge(data.len()));
    }
    assert_eq!(bytes, 100 * DATA_BYTES_MAX);
    echo.await.unwrap();
    drop(send.await.unwrap());
}

#[tokio::test]
async fn dropping_a_stream_resets_it_and_wakes_its_sender() {
    let (host, _agent, mut requests) = pair().await;
    let stream = host.open(Bytes::new()).await.unwrap();
    let mut request = requests.recv().await.unwrap();
    let blocked = tokio::spawn(async move {
        while request.sender.data(Kind::Data, zeros(DATA_BYTES_MAX)).await.is_ok() {}
        request.sender.closed().await;
        request.receiver.next().await
    });
    drop(stream);
    assert_eq!(blocked.await.unwrap(), Some(Incoming::Reset));
    // And the other way round.
    let (sender, mut receiver) = host.open(Bytes::new()).await.unwrap();
    drop(requests.recv().await.unwrap());
    assert_eq!(receiver.next().await, Some(Incoming::Reset));
    assert_eq!(sender.data(Kind::Data, zeros(1)).await, Err(StreamClosed));
}

#[tokio::test]
async fn streams_and_requests_have_limits() {
    let (host, _agent, mut requests) = pair().await;
    assert!(matches!(host.open(zeros(OPEN_BYTES_MAX + 1)).await, Err(OpenError::TooLarge)));
    let mut open = Vec::new();
    for _ in 0..STREAMS_MAX {
        open.push(host.open(Bytes::new()).await.unwrap());
    }
    assert!(matches!(host.open(Bytes::new()).await, Err(OpenError::TooMany)));
    let mut answered = requests.recv().await.unwrap();
    answered.sender.end(Bytes::new());
    assert_eq!(open[0].1.next().await, Some(Incoming::End(Bytes::new())));
    assert!(host.open(Bytes::new()).await.is_ok());
    assert_eq!(answered.receiver.next().await, None);
}

#[tokio::test]
async fn closing_ends_all_streams_on_both_sides_with_the_reason() {
    let (host, agent, mut requests) = pair().await;
    let (sender, mut receiver) = host.open(Bytes::new()).await.unwrap();
    let mut request = requests.recv().await.unwrap();
    host.close("because");
    assert_eq!(receiver.next().await, None);
    assert_eq!(request.receiver.next().await, None);
    assert_eq!(sender.message(Bytes::new()).await, Err(StreamClosed));
    assert_eq!(&*agent.closed().await, "the other side left: because");
    assert!(matches!(host.open(Bytes::new()).await, Err(OpenError::Closed)));
    assert!(requests.recv().await.is_none());
}

/// Feeds hostile bytes to one side, after a proper greeting, and waits for its end.
async fn survive(role: Role, hostile: &[u8]) {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    let hello = Hello { version_min: 1, version_max: 1, ..Default::default() };
    let mut wire = BytesMut::new();
    Frame { kind: Kind::Hello, stream: 0, payload: messages::encode(&hello) }.encode(&mut wire);
    wire.put_slice(hostile);
    theirs.write_all(&wire).await.unwrap();
    let (mux, mut requests) = start(ours, role).await;
    let opened = match role {
        Role::Host => mux.open(Bytes::from_static(b"x")).await.ok(),
        Role::Agent => None,
    };
    drop(theirs);
    while let Some(mut request) = requests.recv().await {
        while request.receiver.next().await.is_some() {}
    }
    if let Some((_sender, mut receiver)) = opened {
        while receiver.next().await.is_some() {}
    }
    mux.closed().await;
}

fn hostile() -> impl Strategy<Value = Vec<u8>> {
    // Mostly plausible headers, so that more than the first check is reached.
    let frame = (0u32..40, 0u8..11, 0u32..4, prop::collection::vec(any::<u8>(), 0..40)).prop_map(
        |(length, kind, stream, payload)| {
            let mut bytes = Vec::new();
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.push(kind);
            bytes.extend_from_slice(&stream.to_le_bytes());
            bytes.extend(payload.into_iter().chain(std::iter::repeat(0)).take(length as usize));
            bytes
        },
    );
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..500),
        prop::collection::vec(frame, 0..12).prop_map(|frames| frames.concat()),
    ]
}

proptest! {
    #[test]
    fn no_bytes_make_either_side_panic_or_hang(bytes in hostile(), host in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(survive(if host { Role::Host } else { Role::Agent }, &bytes));
    }

    #[test]
    fn no_bytes_make_the_message_decoders_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = messages::decode::<messages::Request>(&bytes);
        let _ = messages::decode::<messages::Input>(&bytes);
        let _ = messages::decode::<messages::Event>(&bytes);
        let _ = messages::decode::<messages::Outcome>(&bytes);
        let _ = messages::decode::<Hello>(&bytes);
    }
}
