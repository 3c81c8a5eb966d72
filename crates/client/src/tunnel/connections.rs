//! The connections through one tunnel.
//!
//! The protocol has no credit per connection. What comes for a program that does not read waits in a bounded
//! queue; when that is full the whole tunnel waits, and a connection in which nothing moves for long is closed.

use std::collections::HashMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use nagaya_api::tenki::v1;
use nagaya_api::tenki::v1::host_port_tunnel_request::Payload as Asked;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::constants::DEFAULT_CONNECT_TIMEOUT;
use crate::pipe::FRAME_BYTES_MAX;

/// Connections at once; further ones are refused.
const CONNECTIONS_MAX: usize = 1_024;
/// Frames for one program that wait until it reads.
const QUEUE_FRAMES_MAX: usize = 64;
/// How long a program may read nothing while others wait for it.
const STALL_MAX: Duration = Duration::from_secs(5);

pub(super) struct Connections {
    target: String,
    frames: mpsc::Sender<Asked>,
    open: HashMap<u64, Connection>,
    /// Dropping it ends them all.
    tasks: JoinSet<()>,
}

struct Connection {
    /// `None` once the sandbox has no more to send.
    incoming: Option<mpsc::Sender<Bytes>>,
    /// Ends the direction towards the sandbox. What came from there is still delivered.
    closed: CancellationToken,
}

impl Connections {
    pub(super) fn new(target: String, frames: mpsc::Sender<Asked>) -> Self {
        Self { target, frames, open: HashMap::new(), tasks: JoinSet::new() }
    }

    pub(super) async fn accept(&mut self, id: u64) {
        while self.tasks.try_join_next().is_some() {}
        self.open.retain(|_, each| each.incoming.is_some() || !each.closed.is_cancelled());
        // The tunnel itself has number 0.
        if id == 0 {
            return;
        }
        if self.open.contains_key(&id) || self.tasks.len() >= CONNECTIONS_MAX {
            return send_close(&self.frames, id, "host_error").await;
        }
        let (incoming, received) = mpsc::channel(QUEUE_FRAMES_MAX);
        let closed = CancellationToken::new();
        let serve = serve(id, self.target.clone(), received, self.frames.clone(), closed.clone());
        self.tasks.spawn(serve);
        self.open.insert(id, Connection { incoming: Some(incoming), closed });
    }

    /// Hands bytes to the program. Those for a connection that is gone are forgotten.
    pub(super) async fn deliver(&mut self, id: u64, bytes: Bytes) {
        let Some(incoming) = self.open.get(&id).and_then(|connection| connection.incoming.as_ref()) else { return };
        match tokio::time::timeout(STALL_MAX, incoming.send(bytes)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => self.end_of_input(id),
            Err(_) => {
                self.close(id);
                send_close(&self.frames, id, "host_error").await;
            }
        }
    }

    /// The sandbox has no more to send.
    pub(super) fn end_of_input(&mut self, id: u64) {
        if let Some(connection) = self.open.get_mut(&id) {
            connection.incoming = None;
        }
    }

    /// The sandbox's connection is gone.
    pub(super) fn close(&mut self, id: u64) {
        if let Some(connection) = self.open.remove(&id) {
            connection.closed.cancel();
        }
    }
}

async fn send_close(frames: &mpsc::Sender<Asked>, id: u64, reason: &str) {
    let close = v1::HostPortTunnelClose { sub_stream_id: id, reason: reason.to_owned() };
    let _ = frames.send(Asked::Close(Box::new(close))).await;
}

/// One connection, from the attempt to reach the program to the end of both directions.
async fn serve(
    id: u64,
    target: String,
    received: mpsc::Receiver<Bytes>,
    frames: mpsc::Sender<Asked>,
    closed: CancellationToken,
) {
    let connecting = tokio::time::timeout(DEFAULT_CONNECT_TIMEOUT, TcpStream::connect(target));
    let Ok(Ok(program)) = connecting.await else {
        closed.cancel();
        return send_close(&frames, id, "host_error").await;
    };
    // It only costs speed.
    let _ = program.set_nodelay(true);
    let (from, to) = program.into_split();
    tokio::join!(to_program(to, received), from_program(id, from, &frames, &closed));
    closed.cancel();
}

async fn to_program(mut program: OwnedWriteHalf, mut received: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = received.recv().await {
        if program.write_all(&bytes).await.is_err() {
            return;
        }
    }
    let _ = program.shutdown().await;
}

async fn from_program(id: u64, mut program: OwnedReadHalf, frames: &mpsc::Sender<Asked>, closed: &CancellationToken) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(FRAME_BYTES_MAX);
        let read = tokio::select! {
            () = closed.cancelled() => return,
            read = program.read_buf(&mut buffer) => read,
        };
        let frame = match read {
            Ok(0) => {
                Asked::HalfClose(Box::new(v1::HostPortTunnelHalfClose { sub_stream_id: id, client_to_server: true }))
            }
            Ok(_) => {
                let length = buffer.len().min(FRAME_BYTES_MAX);
                let payload = buffer.split_to(length).freeze();
                Asked::Data(Box::new(v1::HostPortTunnelData { sub_stream_id: id, payload }))
            }
            Err(_) => return send_close(frames, id, "host_error").await,
        };
        let ended = matches!(frame, Asked::HalfClose(_));
        if frames.send(frame).await.is_err() || ended {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Connections to a program that the test is, and the frames that go to the server.
    async fn begin() -> (Connections, TcpListener, mpsc::Receiver<Asked>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let target = listener.local_addr().expect("it is bound").to_string();
        let (frames, sent) = mpsc::channel(16);
        (Connections::new(target, frames), listener, sent)
    }

    #[tokio::test]
    async fn both_directions_end_on_their_own() {
        let (mut connections, listener, mut sent) = begin().await;
        connections.accept(5).await;
        let (mut program, _) = listener.accept().await.expect("it connects");
        connections.deliver(5, Bytes::from_static(b"question")).await;
        connections.end_of_input(5);
        let mut question = Vec::new();
        program.read_to_end(&mut question).await.expect("a whole question");
        assert_eq!(question, b"question");
        program.write_all(b"answer").await.expect("it is read");
        assert!(matches!(sent.recv().await, Some(Asked::Data(data)) if data.payload == "answer"[..]));
        drop(program);
        assert!(matches!(sent.recv().await, Some(Asked::HalfClose(half)) if half.sub_stream_id == 5));
    }

    #[tokio::test]
    async fn what_cannot_be_served_is_closed() {
        let (mut connections, listener, mut sent) = begin().await;
        connections.accept(0).await;
        connections.accept(1).await;
        let _first = listener.accept().await.expect("it connects");
        connections.accept(1).await;
        assert!(matches!(sent.recv().await, Some(Asked::Close(close)) if close.sub_stream_id == 1));
        drop(listener);
        connections.accept(2).await;
        assert!(matches!(sent.recv().await, Some(Asked::Close(close)) if close.sub_stream_id == 2));
        // What is not known is forgotten.
        connections.deliver(9, Bytes::from_static(b"x")).await;
        connections.end_of_input(9);
        connections.close(9);
    }

    #[tokio::test]
    async fn what_came_before_the_close_is_delivered() {
        let (mut connections, listener, _sent) = begin().await;
        connections.accept(1).await;
        let (mut program, _) = listener.accept().await.expect("it connects");
        for _ in 0..QUEUE_FRAMES_MAX {
            connections.deliver(1, Bytes::from_static(b"12345678")).await;
        }
        connections.close(1);
        let mut all = Vec::new();
        program.read_to_end(&mut all).await.expect("to the end");
        assert_eq!(all.len(), 8 * QUEUE_FRAMES_MAX);
    }

    #[tokio::test]
    async fn a_program_that_does_not_read_holds_up_nobody_for_ever() {
        let (mut connections, listener, mut sent) = begin().await;
        connections.accept(1).await;
        let (_program, _) = listener.accept().await.expect("it connects");
        let started = tokio::time::Instant::now();
        let frame = Bytes::from(vec![0; 1 << 20]);
        while connections.open.contains_key(&1) {
            assert!(started.elapsed() < 4 * STALL_MAX, "it is still open");
            connections.deliver(1, frame.clone()).await;
        }
        assert!(matches!(sent.recv().await, Some(Asked::Close(close)) if close.sub_stream_id == 1));
    }
}
