//! Bodies: reading a request's within limits, and the one type of all responses.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use connectrpc::ConnectRpcBody;
use http::{HeaderMap, HeaderValue};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use nagaya_api::error::{Code, Error};
use nagaya_engine::ports::ImageReader;
use nagaya_gateway::places::Active;
use nagaya_gateway::preview;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::AbortHandle;

use super::lifecycle::Busy;
use super::measured::{BodyError, Measured};
use super::outcome;
use super::rechunk::Rechunked;
use crate::budget::{Held, SMALL_BYTES_MAX};

/// Flag byte and length of a gRPC message.
const GRPC_HEADER_BYTES: usize = 5;
/// Answers of this size are not worth watching whether they are read.
const UNWATCHED_BYTES_MAX: usize = 4 * 1024;
/// What is handed to a connection at once.
const PART_BYTES_MAX: usize = 256 * 1024;
/// No compressed message holds more in its format.
const GZIP_RATIO_MAX: usize = 1_032;

/// A request's body as the rpc layer reads it.
pub(crate) enum RequestBody {
    /// Read as a whole before the call, within the limits.
    Whole(Full<Bytes>),
    /// Read while the call runs.
    Stream(Measured<Incoming>),
    /// The same, with large messages cut into small ones.
    Rechunked(Measured<Rechunked>),
    /// The same, of a form in which messages are not told apart here.
    Text(Incoming),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Self::Whole(body) => Pin::new(body).poll_frame(context).map_err(|never| match never {}),
            Self::Stream(body) => Pin::new(body).poll_frame(context),
            Self::Rechunked(body) => Pin::new(body).poll_frame(context),
            Self::Text(body) => Pin::new(body).poll_frame(context).map_err(BodyError::Http),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Stream(body) => body.is_end_stream(),
            Self::Rechunked(_) => false,
            Self::Text(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Stream(_) | Self::Rechunked(_) | Self::Text(_) => SizeHint::default(),
        }
    }
}

/// How much is read, and how patiently.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadLimits {
    pub(crate) message_bytes_max: usize,
    pub(crate) idle_timeout: Duration,
    /// What must have come, or gone, after each idle timeout of a large message.
    pub(crate) bytes_per_idle_timeout: usize,
}

/// Reads a body that holds one message. What a peer announces (a content length, the length in
/// front of a gRPC message) is refused before any of it is read or room is made for it.
///
/// Memory is taken from the budget before the message is kept.
pub(crate) async fn read_whole(
    body: &mut Incoming,
    headers: &HeaderMap,
    limits: ReadLimits,
    held: &Held,
) -> Result<Bytes, Error> {
    let framed = is_framed(headers);
    let bytes_max = limits.message_bytes_max + if framed { GRPC_HEADER_BYTES } else { 0 };
    let announced = body.size_hint().exact();
    if announced.is_some_and(|bytes| bytes > bytes_max as u64) {
        return Err(too_large(limits));
    }

    let Some(mut first) = next_data(body, limits).await? else {
        return Ok(Bytes::new());
    };
    // The usual case: everything came in one piece, and no byte is moved.
    if body.is_end_stream() && first.len() <= bytes_max {
        check_announcement(framed, &first, limits)?;
        held.reserve(memory_for(first.len(), headers, limits)).await?;
        return Ok(first);
    }

    let announced = usize::try_from(announced.unwrap_or(0)).unwrap_or(usize::MAX);
    held.reserve(memory_for(announced.max(first.len()), headers, limits)).await?;
    let mut whole = BytesMut::with_capacity(announced.max(first.len()));
    let (mut looked, mut had) = (Instant::now(), 0);
    loop {
        if whole.len() + first.len() > bytes_max {
            return Err(too_large(limits));
        }
        let was_announced = whole.len() >= GRPC_HEADER_BYTES;
        let after = whole.len() + first.len();
        if after > held.granted() {
            // Nobody said how long it would be.
            held.reserve(memory_for(after.next_power_of_two().min(bytes_max), headers, limits)).await?;
        }
        whole.extend_from_slice(&first);
        if !was_announced && let Some(length) = check_announcement(framed, &whole, limits)? {
            held.reserve(memory_for(length, headers, limits)).await?;
            whole.reserve((GRPC_HEADER_BYTES + length).saturating_sub(whole.len()));
        }
        if looked.elapsed() >= limits.idle_timeout {
            if held.granted() > SMALL_BYTES_MAX && whole.len() - had < limits.bytes_per_idle_timeout {
                return Err(Error::new(
                    Code::DeadlineExceeded,
                    "the request came more slowly than message_bytes_per_s_min",
                ));
            }
            (looked, had) = (Instant::now(), whole.len());
        }
        match next_data(body, limits).await? {
            Some(next) => first = next,
            None => return Ok(whole.freeze()),
        }
    }
}

/// Memory that a message of this size on the wire takes until its call has ended.
fn memory_for(bytes: usize, headers: &HeaderMap, limits: ReadLimits) -> usize {
    let value = |name: &str| headers.get(name).map_or(&b""[..], HeaderValue::as_bytes);
    let compressed = ["grpc-encoding", "content-encoding", "connect-content-encoding"].map(value);
    let factor = match compressed.iter().find(|value| !matches!(**value, b"" | b"identity")) {
        // The most that its format can hold.
        Some(&b"gzip") => GZIP_RATIO_MAX,
        Some(_) => return limits.message_bytes_max,
        // JSON holds content as text, and it is there in both forms.
        None if value("content-type").windows(4).any(|part| part == b"json") => 2,
        None => 1,
    };
    bytes.saturating_mul(factor).min(limits.message_bytes_max * 2)
}

/// Reads and forgets the rest of a refused request, so that a client which sends everything before
/// it reads anything sees the answer instead of a reset connection.
pub(crate) fn discard(body: Incoming, at_most: Duration) {
    if body.is_end_stream() {
        return;
    }
    tokio::spawn(tokio::time::timeout(at_most, async move {
        let mut body = body;
        while let Some(Ok(_)) = body.frame().await {}
    }));
}

async fn next_data(body: &mut Incoming, limits: ReadLimits) -> Result<Option<Bytes>, Error> {
    loop {
        let frame = tokio::time::timeout(limits.idle_timeout, body.frame())
            .await
            .map_err(|_| Error::new(Code::DeadlineExceeded, "the rest of the request did not arrive in time"))?;
        match frame {
            None => return Ok(None),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "a request ended before its body was complete");
                return Err(Error::new(Code::InvalidArgument, "the request ended before its body was complete"));
            }
        }
    }
}

/// Whether messages have a length in front: gRPC, gRPC-Web and the streams of Connect.
pub(crate) fn is_framed(headers: &HeaderMap) -> bool {
    headers.get(http::header::CONTENT_TYPE).is_some_and(|kind| {
        let is_text = kind.as_bytes().starts_with(b"application/grpc-web-text");
        (kind.as_bytes().starts_with(b"application/grpc") && !is_text)
            || kind.as_bytes().starts_with(b"application/connect+")
    })
}

/// The length in front of a message, once it is there.
fn check_announcement(framed: bool, start: &[u8], limits: ReadLimits) -> Result<Option<usize>, Error> {
    let (true, [_, a, b, c, d, ..]) = (framed, start) else { return Ok(None) };
    match u32::from_be_bytes([*a, *b, *c, *d]) as usize {
        length if length > limits.message_bytes_max => Err(too_large(limits)),
        length => Ok(Some(length)),
    }
}

fn too_large(limits: ReadLimits) -> Error {
    Error::new(Code::MessageTooLarge, format!("message_bytes_max is {}", limits.message_bytes_max))
}

/// The body of every response.
pub(crate) struct ResponseBody {
    content: Content,
    /// Held until the last byte was handed to the connection.
    _busy: Option<Busy>,
    _active: Option<Active>,
}

enum Content {
    Rpc(ConnectRpcBody),
    Parts(Parts),
    Watched(Watched),
    Text(Full<Bytes>),
    Disk(Disk),
    Preview(preview::ResponseBody),
    /// The answer to HEAD: nothing, of which the length is told.
    EmptyOf(u64),
}

fn with_bounded_trailers(frame: Frame<Bytes>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(mut trailers) => {
            outcome::bound(&mut trailers);
            Frame::trailers(trailers)
        }
        Err(other) => other,
    }
}

/// An answer that is there as a whole.
struct Parts {
    frames: VecDeque<Frame<Bytes>>,
    /// Data in them.
    bytes: usize,
    /// Whether `bytes` may be told as the length.
    sized: bool,
}

impl Parts {
    /// Takes what is there of an answer, which is all of a unary one.
    fn of(mut body: ConnectRpcBody) -> Result<Self, Box<ConnectRpcBody>> {
        if matches!(body, ConnectRpcBody::Streaming(_)) {
            return Err(Box::new(body));
        }
        let sized = matches!(body, ConnectRpcBody::Full(_));
        let (mut frames, mut bytes) = (VecDeque::new(), 0);
        let mut context = Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut body).poll_frame(&mut context) {
            bytes += frame.data_ref().map_or(0, Bytes::len);
            frames.push_back(with_bounded_trailers(frame));
        }
        Ok(Self { frames, bytes, sized })
    }

    /// The next part, which is never large: what is taken from here waits for its reader elsewhere.
    fn next(&mut self) -> Option<Frame<Bytes>> {
        let frame = self.frames.pop_front()?;
        let mut data = match frame.into_data() {
            Ok(data) => data,
            Err(other) => return Some(other),
        };
        if data.len() > PART_BYTES_MAX {
            let rest = data.split_off(PART_BYTES_MAX);
            self.frames.push_front(Frame::data(rest));
        }
        self.bytes -= data.len();
        Some(Frame::data(data))
    }

    fn size_hint(&self) -> SizeHint {
        if self.sized { SizeHint::with_exact(self.bytes as u64) } else { SizeHint::default() }
    }
}

type Kept = Mutex<Option<(Parts, Arc<Held>)>>;

fn locked(kept: &Kept) -> MutexGuard<'_, Option<(Parts, Arc<Held>)>> {
    kept.lock().expect("nothing panics while holding an answer")
}

/// An answer with its memory, which it gives up when its reader is too slow.
struct Watched {
    kept: Arc<Kept>,
    watch: AbortHandle,
}

impl Watched {
    fn new(parts: Parts, held: Arc<Held>, limits: ReadLimits) -> Self {
        let mut before = parts.bytes;
        let kept = Arc::new(Mutex::new(Some((parts, held))));
        let watched = Arc::clone(&kept);
        let watch = tokio::spawn(async move {
            loop {
                tokio::time::sleep(limits.idle_timeout).await;
                let mut content = locked(&watched);
                let Some(left) = content.as_ref().map(|(parts, _)| parts.bytes) else { return };
                if before - left < limits.bytes_per_idle_timeout.min(before) || left == before {
                    tracing::debug!("an answer was read more slowly than message_bytes_per_s_min, and is cut");
                    *content = None;
                    return;
                }
                before = left;
            }
        });
        Self { kept, watch: watch.abort_handle() }
    }

    fn poll_part(&self) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        Poll::Ready(match &mut *locked(&self.kept) {
            Some((parts, _)) => parts.next().map(Ok),
            None => Some(Err(CutOff)),
        })
    }

    fn size_hint(&self) -> SizeHint {
        locked(&self.kept).as_ref().map_or_else(SizeHint::default, |(parts, _)| parts.size_hint())
    }

    fn is_over(&self) -> bool {
        locked(&self.kept).as_ref().is_some_and(|(parts, _)| parts.frames.is_empty())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.watch.abort();
        if let Ok(mut kept) = self.kept.lock() {
            *kept = None;
        }
    }
}

/// A response that cannot be finished. The connection or stream is cut, so that nobody takes what
/// there is of it for the whole.
#[derive(Debug, thiserror::Error)]
#[error("the rest of the response cannot be read")]
pub(crate) struct CutOff;

/// The disk of a snapshot on its way out, a part at a time.
pub(crate) struct Disk {
    first: Option<Bytes>,
    reader: ImageReader,
    /// Bytes that are still to come.
    rest: u64,
    _place: OwnedSemaphorePermit,
}

impl Disk {
    pub(crate) fn new(first: Bytes, reader: ImageReader, place: OwnedSemaphorePermit) -> Self {
        Self { first: Some(first), rest: reader.total_size, reader, _place: place }
    }

    fn poll_part(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        if self.rest == 0 {
            return Poll::Ready(None);
        }
        let part = match self.first.take() {
            Some(first) => Some(Ok(first)),
            None => ready!(self.reader.chunks.poll_recv(context)),
        };
        Poll::Ready(Some(match part {
            Some(Ok(part)) if part.len() as u64 <= self.rest => {
                self.rest -= part.len() as u64;
                Ok(Frame::data(part))
            }
            Some(Err(error)) => {
                tracing::error!(%error, "a snapshot's disk cannot be read to its end");
                Err(CutOff)
            }
            Some(Ok(_)) | None => {
                tracing::error!("a snapshot's disk is not as long as its manifest says");
                Err(CutOff)
            }
        }))
    }
}

impl ResponseBody {
    /// Keeps the connection from giving way until the last byte was handed to it.
    pub(crate) fn held(self, active: Active) -> Self {
        Self { _active: Some(active), ..self }
    }

    pub(crate) fn rpc(body: ConnectRpcBody, busy: Option<Busy>) -> Self {
        Self { content: Content::Rpc(body), _busy: busy, _active: None }
    }

    /// The answer to a call that is answered as a whole. It keeps what the call took from the budget until it is read,
    /// unless it is tiny; the error says that there is no memory for it.
    pub(crate) async fn whole(
        body: ConnectRpcBody,
        busy: Option<Busy>,
        held: Arc<Held>,
        limits: ReadLimits,
    ) -> Result<Self, Error> {
        let parts = match Parts::of(body) {
            Ok(parts) => parts,
            Err(streamed) => return Ok(Self::rpc(*streamed, busy)),
        };
        held.reserve(parts.bytes).await?;
        let content = match parts.bytes > UNWATCHED_BYTES_MAX {
            true => Content::Watched(Watched::new(parts, held, limits)),
            false => Content::Parts(parts),
        };
        Ok(Self { content, _busy: busy, _active: None })
    }

    pub(crate) fn disk(disk: Disk, busy: Busy) -> Self {
        Self { content: Content::Disk(disk), _busy: Some(busy), _active: None }
    }

    pub(crate) fn preview(body: preview::ResponseBody, busy: Busy) -> Self {
        Self { content: Content::Preview(body), _busy: Some(busy), _active: None }
    }

    pub(crate) fn empty_of(length: u64) -> Self {
        Self { content: Content::EmptyOf(length), _busy: None, _active: None }
    }

    pub(crate) fn text(text: impl Into<Bytes>) -> Self {
        Self { content: Content::Text(Full::new(text.into())), _busy: None, _active: None }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = CutOff;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        match &mut self.get_mut().content {
            Content::Rpc(body) => {
                let polled = Pin::new(body).poll_frame(context).map_err(|never| match never {});
                polled.map_ok(with_bounded_trailers)
            }
            Content::Parts(parts) => Poll::Ready(parts.next().map(Ok)),
            Content::Watched(watched) => watched.poll_part(),
            Content::Text(body) => Pin::new(body).poll_frame(context).map_err(|never| match never {}),
            Content::Disk(disk) => disk.poll_part(context),
            Content::Preview(body) => Pin::new(body).poll_frame(context).map_err(|error| {
                tracing::debug!(%error, "a preview's answer broke off");
                CutOff
            }),
            Content::EmptyOf(_) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Rpc(ConnectRpcBody::Full(body)) | Content::Text(body) => body.is_end_stream(),
            Content::Rpc(_) => false,
            Content::Parts(parts) => parts.frames.is_empty(),
            Content::Watched(watched) => watched.is_over(),
            Content::Disk(disk) => disk.rest == 0,
            Content::Preview(body) => body.is_end_stream(),
            Content::EmptyOf(_) => true,
        }
    }

    /// Known for unary Connect answers, which then carry a content length.
    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Rpc(ConnectRpcBody::Full(body)) | Content::Text(body) => body.size_hint(),
            Content::Rpc(_) => SizeHint::default(),
            Content::Parts(parts) => parts.size_hint(),
            Content::Watched(watched) => watched.size_hint(),
            Content::Disk(disk) => SizeHint::with_exact(disk.rest),
            Content::Preview(body) => body.size_hint(),
            Content::EmptyOf(length) => SizeHint::with_exact(*length),
        }
    }
}
