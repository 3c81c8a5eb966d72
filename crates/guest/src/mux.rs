//! Many streams over one connection, with credit per stream, so that a slow reader of one never
//! stalls another. Both sides use it: the host opens streams, the agent answers them.
//!
//! What each side holds in memory is bounded: received content by the credit it granted, content
//! waiting to be sent by [`OUTBOUND_BYTES_MAX`]. Reading never waits for writing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::frame::{DATA_BYTES_MAX, Frame, Kind, OPEN_BYTES_MAX};
use crate::handshake::{Handshake, HandshakeError, Peer, shake_hands};
use crate::writer;

mod receive;
#[cfg(test)]
mod tests;

/// Content that may be under way per stream and direction before more is granted, bytes.
pub const WINDOW_BYTES_INITIAL: u32 = 256 * 1024;
/// Messages that may be under way per stream and direction before more are granted.
pub const WINDOW_MESSAGES_INITIAL: u32 = 32;
/// Every content frame costs at least this much of the window, so that tiny frames are bounded too.
pub const CHARGE_BYTES_MIN: u32 = 1024;
/// Credit that one side may hold at most, bytes or messages.
pub const CREDIT_MAX: u32 = 1 << 24;
/// Streams that may be open at once on one connection.
pub const STREAMS_MAX: usize = 1024;
/// Content that waits for the socket, over all streams, bytes.
pub const OUTBOUND_BYTES_MAX: usize = 2 * 1024 * 1024;

/// What a content frame of this length costs of its stream's window, bytes.
pub fn charge(length: usize) -> u32 {
    (length as u32).max(CHARGE_BYTES_MIN)
}

/// The connection or the stream is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed")]
pub struct StreamClosed;

/// Why a stream could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("the connection is closed")]
    Closed,
    #[error("{STREAMS_MAX} streams are open already")]
    TooMany,
    #[error("the request is larger than {OPEN_BYTES_MAX} bytes")]
    TooLarge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Host,
    Agent,
}

/// What arrives on a stream, in the order it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    Message(Bytes),
    /// Costs [`charge`] of the window until [`Receiver::release`].
    Data(Bytes),
    /// As `Data`.
    ErrorData(Bytes),
    /// The last, but for `Reset`. From the host it ends its content, from the agent the stream.
    End(Bytes),
    /// The other side gave the stream up.
    Reset,
}

/// A request of the host, and the stream to answer it on.
#[derive(Debug)]
pub struct Request {
    pub payload: Bytes,
    pub sender: Sender,
    pub receiver: Receiver,
}

/// Credit of one stream.
#[derive(Debug)]
struct Slot {
    send_bytes: Semaphore,
    send_messages: Semaphore,
    /// Never has permits; closed when the stream is over.
    over: Semaphore,
    /// What the other side may still send.
    granted: Mutex<(u32, u32)>,
}

impl Slot {
    fn close(&self) {
        self.send_bytes.close();
        self.send_messages.close();
        self.over.close();
    }
}

#[derive(Debug)]
struct Entry {
    slot: Arc<Slot>,
    queue: mpsc::UnboundedSender<Incoming>,
    /// The host said that there is no more content.
    content_ended: bool,
}

#[derive(Debug)]
struct Table {
    entries: HashMap<u32, Entry>,
    closed: bool,
}

#[derive(Debug)]
pub(crate) struct Shared {
    role: Role,
    peer: Peer,
    table: Mutex<Table>,
    /// Highest stream id that was opened.
    last: AtomicU32,
    pub(crate) outbound: mpsc::UnboundedSender<Frame>,
    /// Room for content in `outbound`, bytes.
    pub(crate) room: Semaphore,
    closed: watch::Sender<Option<Arc<str>>>,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nothing panics while holding the table of streams")
    }

    /// Sends a frame that needs no room: there are few of them per stream.
    fn control(&self, kind: Kind, stream: u32) {
        // A closed queue means a closed connection, of which every stream learns on its own.
        let _ = self.outbound.send(Frame { kind, stream, payload: Bytes::new() });
    }

    pub(crate) fn close(&self, reason: &str) {
        let entries = {
            let mut table = self.table();
            if table.closed {
                return;
            }
            table.closed = true;
            std::mem::take(&mut table.entries)
        };
        for entry in entries.values() {
            entry.slot.close();
        }
        self.room.close();
        self.closed.send_replace(Some(reason.into()));
    }
}

/// One connection. Clones are the same connection; it stays open until [`Mux::close`] or an error.
#[derive(Debug, Clone)]
pub struct Mux {
    shared: Arc<Shared>,
}

impl Mux {
    /// Exchanges greetings and starts the tasks that read and write. The agent's side receives
    /// requests from the second part; the host's side never gets any.
    pub async fn start<R, W>(
        mut reader: R,
        mut writer: W,
        role: Role,
        handshake: Handshake,
    ) -> Result<(Self, mpsc::UnboundedReceiver<Request>), HandshakeError>
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let (decoder, peer) = shake_hands(&mut reader, &mut writer, handshake).await?;
        let (outbound, outbound_queue) = mpsc::unbounded_channel();
        let (requests, requests_queue) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            role,
            peer,
            table: Mutex::new(Table { entries: HashMap::new(), closed: false }),
            last: AtomicU32::new(0),
            outbound,
            room: Semaphore::new(OUTBOUND_BYTES_MAX),
            closed: watch::Sender::new(None),
        });
        tokio::spawn(writer::write(writer, shared.clone(), outbound_queue, shared.closed.subscribe()));
        tokio::spawn(receive::read(reader, decoder, shared.clone(), requests));
        Ok((Self { shared }, requests_queue))
    }

    /// Opens a stream with a request.
    pub async fn open(&self, payload: Bytes) -> Result<(Sender, Receiver), OpenError> {
        if payload.len() > OPEN_BYTES_MAX {
            return Err(OpenError::TooLarge);
        }
        let room = room_for(payload.len());
        self.shared.room.acquire_many(room).await.map_err(|_| OpenError::Closed)?.forget();
        let mut table = self.shared.table();
        if table.closed {
            return Err(OpenError::Closed);
        }
        if table.entries.len() >= STREAMS_MAX {
            self.shared.room.add_permits(room as usize);
            return Err(OpenError::TooMany);
        }
        let Some(id) = self.shared.last.load(Ordering::Relaxed).checked_add(1) else {
            drop(table);
            self.close("out of stream numbers");
            return Err(OpenError::Closed);
        };
        self.shared.last.store(id, Ordering::Relaxed);
        let stream = insert(&self.shared, &mut table, id);
        // Under the lock, so that streams open in the order of their numbers.
        let _ = self.shared.outbound.send(Frame { kind: Kind::Open, stream: id, payload });
        Ok(stream)
    }

    /// What the other side said when the connection began.
    pub fn peer(&self) -> Peer {
        self.shared.peer
    }

    /// Ends the connection; the other side is told why.
    pub fn close(&self, reason: &str) {
        self.shared.close(reason);
    }

    /// Completes when the connection has ended, with the reason.
    pub async fn closed(&self) -> Arc<str> {
        let mut closed = self.shared.closed.subscribe();
        let reason = closed.wait_for(Option::is_some).await.expect("the sender lives as long as the connection");
        reason.clone().expect("just checked")
    }

    pub fn is_closed(&self) -> bool {
        self.shared.closed.borrow().is_some()
    }
}

/// Room that a frame takes in the outbound queue.
pub(crate) fn room_for(length: usize) -> u32 {
    charge(length)
}

fn insert(shared: &Arc<Shared>, table: &mut Table, id: u32) -> (Sender, Receiver) {
    let slot = Arc::new(Slot {
        send_bytes: Semaphore::new(WINDOW_BYTES_INITIAL as usize),
        send_messages: Semaphore::new(WINDOW_MESSAGES_INITIAL as usize),
        over: Semaphore::new(0),
        granted: Mutex::new((WINDOW_BYTES_INITIAL, WINDOW_MESSAGES_INITIAL)),
    });
    let (queue, receiver) = mpsc::unbounded_channel();
    table.entries.insert(id, Entry { slot: slot.clone(), queue, content_ended: false });
    let handle = Arc::new(Handle { shared: shared.clone(), slot, id, finished: AtomicBool::new(false) });
    (Sender { handle: handle.clone() }, Receiver { handle, queue: receiver, bytes: 0, messages: 0 })
}

/// Both ends of a stream. When the last is dropped before the stream's end, the other side gets a
/// RESET.
#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    slot: Arc<Slot>,
    id: u32,
    finished: AtomicBool,
}

impl Handle {
    /// Returns whether this call finished the stream.
    fn finish(&self) -> bool {
        if self.finished.swap(true, Ordering::AcqRel) {
            return false;
        }
        self.slot.close();
        // Not there when the other side or the connection was first.
        self.shared.table().entries.remove(&self.id).is_some()
    }

    fn reset(&self) {
        if self.finish() {
            self.shared.control(Kind::Reset, self.id);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.reset();
    }
}

/// The sending half of a stream.
#[derive(Debug, Clone)]
pub struct Sender {
    handle: Arc<Handle>,
}

impl Sender {
    async fn send(&self, kind: Kind, payload: Bytes) -> Result<(), StreamClosed> {
        let room = room_for(payload.len());
        self.handle.shared.room.acquire_many(room).await.map_err(|_| StreamClosed)?.forget();
        self.handle.shared.outbound.send(Frame { kind, stream: self.handle.id, payload }).map_err(|_| StreamClosed)
    }

    /// Sends a message; waits while the other side has too many to look at.
    pub async fn message(&self, payload: Bytes) -> Result<(), StreamClosed> {
        self.handle.slot.send_messages.acquire().await.map_err(|_| StreamClosed)?.forget();
        self.send(Kind::Message, payload).await
    }

    /// Sends content, at most [`DATA_BYTES_MAX`] at once; waits for credit.
    pub async fn data(&self, kind: Kind, payload: Bytes) -> Result<(), StreamClosed> {
        self.reserve(payload.len()).await?;
        self.reserved(kind, payload).await
    }

    /// Waits until content of this length may be sent, and takes the credit for it.
    pub async fn reserve(&self, length: usize) -> Result<(), StreamClosed> {
        debug_assert!(length <= DATA_BYTES_MAX);
        self.handle.slot.send_bytes.acquire_many(charge(length)).await.map_err(|_| StreamClosed)?.forget();
        Ok(())
    }

    /// Gives back credit that was reserved and not used.
    pub fn unreserve(&self, reserved: usize, used: usize) {
        let used = if used == 0 { 0 } else { charge(used) };
        self.handle.slot.send_bytes.add_permits((charge(reserved) - used) as usize);
    }

    /// Sends content whose credit was taken before.
    pub async fn reserved(&self, kind: Kind, payload: Bytes) -> Result<(), StreamClosed> {
        if payload.is_empty() {
            return Ok(());
        }
        self.send(kind, payload).await
    }

    /// Host: no more content. The stream goes on until the agent ends it.
    pub fn end_content(&self) {
        if !self.handle.finished.load(Ordering::Acquire) {
            self.handle.shared.control(Kind::End, self.handle.id);
        }
    }

    /// Agent: the outcome, and the end of the stream.
    pub fn end(&self, outcome: Bytes) {
        if self.handle.finish() {
            let _ =
                self.handle.shared.outbound.send(Frame { kind: Kind::End, stream: self.handle.id, payload: outcome });
        }
    }

    /// Completes when the stream or the connection is over.
    pub async fn closed(&self) {
        let _ = self.handle.slot.over.acquire().await;
    }

    /// Gives the stream up.
    pub fn reset(&self) {
        self.handle.reset();
    }
}

/// The receiving half of a stream.
#[derive(Debug)]
pub struct Receiver {
    handle: Arc<Handle>,
    queue: mpsc::UnboundedReceiver<Incoming>,
    /// Released and not yet told to the other side.
    bytes: u32,
    messages: u32,
}

impl Receiver {
    /// The next thing that arrives. `None` when the connection is lost, or after the stream's end.
    pub async fn next(&mut self) -> Option<Incoming> {
        let incoming = self.queue.recv().await?;
        self.took(&incoming);
        Some(incoming)
    }

    /// As [`Receiver::next`], when something is there already.
    pub fn try_next(&mut self) -> Option<Incoming> {
        let incoming = self.queue.try_recv().ok()?;
        self.took(&incoming);
        Some(incoming)
    }

    fn took(&mut self, incoming: &Incoming) {
        if matches!(incoming, Incoming::Message(_)) {
            self.messages += 1;
            if self.messages >= WINDOW_MESSAGES_INITIAL / 4 {
                self.grant();
            }
        }
    }

    /// Content that cost this much (see [`charge`]) has been used: as much may be sent again.
    pub fn release(&mut self, charged: u32) {
        self.bytes += charged;
        if self.bytes >= WINDOW_BYTES_INITIAL / 2 {
            self.grant();
        }
    }

    /// Allows more content than the initial window from the start, for bulk transfers.
    pub fn widen(&mut self, bytes: u32) {
        self.bytes += bytes;
        self.grant();
    }

    fn grant(&mut self) {
        let (bytes, messages) = (std::mem::take(&mut self.bytes), std::mem::take(&mut self.messages));
        if self.handle.finished.load(Ordering::Acquire) {
            return;
        }
        {
            let mut granted = self.handle.slot.granted.lock().expect("nothing panics while holding the credit");
            granted.0 = granted.0.saturating_add(bytes);
            granted.1 = granted.1.saturating_add(messages);
        }
        let _ = self.handle.shared.outbound.send(Frame::window(self.handle.id, bytes, messages));
    }
}
