//! Connections into the sandbox, and out of it, whose bytes the agent carries.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use nagaya_api::error::Code;
use nagaya_engine::ports::{Accepted, GuestError, Listener};
use nagaya_guest::frame::Kind;
use nagaya_guest::messages::{self, Arrived, ConnectTcp, ListenTcp, Opened, event, ip_bytes, request, socket_address};
use nagaya_guest::mux::{Incoming, Mux, OpenError, Receiver, Sender, charge};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::tcp::timed_out;
use super::{CARRIED_MAX, Link, event_of, finish, guest_error, unexpected};

/// Carried at once; both directions of a connection have a buffer of this size.
const CHUNK_BYTES: usize = 32 * 1024;
/// A hostile agent may never answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what was written before a connection was dropped may take to get to the agent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to a unix socket.
pub(super) async fn connect(link: &Link, path: &str, allowed: &[String]) -> Result<Stream, GuestError> {
    carried(link, messages::Connect { path: path.into(), allowed: allowed.into() }).await
}

pub(super) async fn connect_tcp(link: &Link, address: SocketAddr) -> Result<Stream, GuestError> {
    carried(link, ConnectTcp { ip: ip_bytes(address.ip()), port: address.port().into() }).await
}

async fn carried(link: &Link, request: impl Into<request::Kind>) -> Result<Stream, GuestError> {
    let connecting = async {
        let place = link.carried.clone().try_acquire_owned().map_err(|_| {
            guest_error(Code::CapacityUnavailable, &format!("{CARRIED_MAX} connections into the sandbox at a time"))
        })?;
        let (sender, mut receiver) = link.open(request).await?;
        opened(&mut receiver).await?;
        Ok(Stream::start(sender, receiver, place))
    };
    tokio::time::timeout(ANSWER_TIMEOUT, connecting).await.unwrap_or_else(|_| Err(timed_out()))
}

async fn opened(receiver: &mut Receiver) -> Result<Opened, GuestError> {
    match receiver.next().await {
        Some(Incoming::Message(message)) => match event_of(&message) {
            Some(event::Kind::Opened(opened)) => Ok(*opened),
            _ => Err(unexpected(Some(Incoming::Message(message)))),
        },
        Some(Incoming::End(end)) => Err(finish(&end).err().unwrap_or_else(|| unexpected(Some(Incoming::End(end))))),
        other => Err(unexpected(other)),
    }
}

/// Listens on a unix socket.
pub(super) async fn listen(link: &Link, path: &str) -> Result<Listener, GuestError> {
    let (sender, receiver, _) = listening(link, messages::Listen { path: path.into() }).await?;
    Ok(announced(link, sender, receiver, 0, |_| Some(String::new())))
}

pub(super) async fn listen_tcp(link: &Link, address: SocketAddr) -> Result<Listener, GuestError> {
    let wanted = address.port();
    let request = ListenTcp { ip: ip_bytes(address.ip()), port: wanted.into() };
    let (sender, receiver, opened) = listening(link, request).await?;
    let port = u16::try_from(opened.port).ok().filter(|port| *port != 0 && [0, *port].contains(&wanted));
    let port =
        port.ok_or_else(|| guest_error(Code::GuestUnreachable, "the sandbox's agent listens on another port"))?;
    Ok(announced(link, sender, receiver, port, |peer| {
        let source = socket_address(&peer.ip, peer.port)?;
        Some(SocketAddr::new(source.ip().to_canonical(), source.port()).to_string())
    }))
}

async fn listening(link: &Link, request: impl Into<request::Kind>) -> Result<(Sender, Receiver, Opened), GuestError> {
    let listening = async {
        let (sender, mut receiver) = link.open(request).await?;
        let opened = opened(&mut receiver).await?;
        Ok((sender, receiver, opened))
    };
    tokio::time::timeout(ANSWER_TIMEOUT, listening).await.unwrap_or_else(|_| Err(timed_out()))
}

/// What a peer is called; `None` when the agent lies about it.
type Source = fn(&Arrived) -> Option<String>;

/// The listener for the peers of which the agent tells.
fn announced(link: &Link, sender: Sender, receiver: Receiver, port: u16, source: Source) -> Listener {
    let (accepted, incoming) = mpsc::channel(1);
    let (mux, places) = (link.mux.clone(), link.carried.clone());
    tokio::spawn(async move {
        // Dropping the stream is what ends the listening in the sandbox.
        let _sender = sender;
        tokio::select! {
            () = accept(&mux, &places, receiver, source, &accepted) => {}
            () = accepted.closed() => {}
        }
    });
    Listener { port, incoming }
}

/// Takes peers one after the other. Others wait in the sandbox: the agent may tell of a few only.
async fn accept(
    mux: &Mux,
    places: &Arc<Semaphore>,
    mut receiver: Receiver,
    source: Source,
    accepted: &mpsc::Sender<Accepted>,
) {
    while let Ok(turn) = accepted.reserve().await {
        let arrived = match receiver.next().await {
            Some(Incoming::Message(message)) => match event_of(&message) {
                Some(event::Kind::Arrived(arrived)) => arrived,
                _ => continue,
            },
            _ => return,
        };
        let Some(source) = source(&arrived) else { continue };
        let place = places.clone().acquire_owned().await.expect("never closed");
        let taking = async {
            let (sender, mut receiver) = open(mux, messages::Accept { number: arrived.number }).await.ok()?;
            opened(&mut receiver).await.ok()?;
            Some(Stream::start(sender, receiver, place))
        };
        // A peer that left meanwhile is nobody's loss.
        if let Ok(Some(stream)) = tokio::time::timeout(ANSWER_TIMEOUT, taking).await {
            turn.send(Accepted { stream: Box::new(stream), source });
        }
    }
}

async fn open(mux: &Mux, kind: impl Into<request::Kind>) -> Result<(Sender, Receiver), OpenError> {
    let request = messages::Request { kind: Some(kind.into()) };
    mux.open(messages::encode(&request)).await
}

/// A connection that the agent carries.
#[derive(Debug)]
pub(super) struct Stream {
    pipe: DuplexStream,
    /// Why it ended before its end.
    failure: Arc<OnceLock<io::ErrorKind>>,
    /// Its end is the end of this.
    _held: oneshot::Sender<()>,
}

impl Stream {
    fn start(sender: Sender, receiver: Receiver, place: OwnedSemaphorePermit) -> Self {
        let (pipe, theirs) = tokio::io::duplex(CHUNK_BYTES);
        let (held, dropped) = oneshot::channel();
        let failure = Arc::<OnceLock<_>>::default();
        let told = failure.clone();
        tokio::spawn(async move {
            carry(theirs, sender, receiver, dropped, &told).await;
            drop(place);
        });
        Self { pipe, failure, _held: held }
    }
}

/// Carries until the agent is through or the holder has gone. Dropping the stream's halves then tells the agent.
async fn carry(
    pipe: DuplexStream,
    sender: Sender,
    receiver: Receiver,
    mut dropped: oneshot::Receiver<()>,
    failure: &OnceLock<io::ErrorKind>,
) {
    let (reader, writer) = tokio::io::split(pipe);
    let mut up = std::pin::pin!(up(reader, &sender));
    let mut down = std::pin::pin!(down(receiver, writer));
    let mut sent = false;
    loop {
        tokio::select! {
            end = &mut down => {
                // Told before the pipe ends, with this function.
                if let Err(error) = end {
                    let _ = failure.set(error);
                }
                return;
            }
            () = &mut up, if !sent => sent = true,
            _ = &mut dropped => {
                if !sent {
                    // What was written goes before the end.
                    let _ = tokio::time::timeout(FLUSH_TIMEOUT, up).await;
                }
                return;
            }
        }
    }
}

async fn up(mut reader: ReadHalf<DuplexStream>, sender: &Sender) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK_BYTES);
        match reader.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return sender.end_content(),
            Ok(_) => {}
        }
        if sender.data(Kind::Data, buffer.split().freeze()).await.is_err() {
            return;
        }
    }
}

async fn down(mut receiver: Receiver, mut writer: WriteHalf<DuplexStream>) -> Result<(), io::ErrorKind> {
    loop {
        match receiver.next().await {
            Some(Incoming::Data(data)) => {
                writer.write_all(&data).await.map_err(|error| error.kind())?;
                receiver.release(charge(data.len()));
            }
            Some(Incoming::Message(message)) => {
                if let Some(event::Kind::EndOfContent(_)) = event_of(&message) {
                    writer.shutdown().await.map_err(|error| error.kind())?;
                }
            }
            Some(Incoming::End(end)) => return finish(&end).map(drop).map_err(|_| io::ErrorKind::ConnectionReset),
            Some(Incoming::ErrorData(_) | Incoming::Reset) | None => return Err(io::ErrorKind::ConnectionAborted),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.pipe).poll_read(context, buffer))?;
        let ended = buffer.filled().len() == before && buffer.remaining() > 0;
        Poll::Ready(match self.failure.get() {
            Some(failure) if ended => Err((*failure).into()),
            _ => Ok(()),
        })
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(context)
    }
}
