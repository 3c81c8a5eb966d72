//! Bodies: reading a request's within limits, and the one type of all responses.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use connectrpc::ConnectRpcBody;
use http::HeaderMap;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use nagaya_api::error::{Code, Error};
use nagaya_engine::ports::ImageReader;
use nagaya_gateway::preview;
use tokio::sync::OwnedSemaphorePermit;

use super::lifecycle::Busy;
use crate::tenki::reframe::Reframed;
use crate::tenki::transport;

/// Flag byte and length of a gRPC message.
const GRPC_HEADER_BYTES: usize = 5;
/// Memory taken on the word of a peer that announces a large body; more only as it arrives.
const ANNOUNCED_BYTES_TRUSTED_MAX: usize = 1024 * 1024;

/// A request's body as the rpc layer reads it.
pub(crate) enum RequestBody {
    /// Read as a whole before the call, within the limits.
    Whole(Full<Bytes>),
    /// Read while the call runs.
    Stream(Incoming),
    /// The same, with large messages cut into small ones.
    Reframed(Reframed),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Whole(body) => Pin::new(body).poll_frame(context).map_err(|never| match never {}),
            Self::Stream(body) => Pin::new(body).poll_frame(context),
            Self::Reframed(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(body) => body.is_end_stream(),
            Self::Stream(body) => body.is_end_stream(),
            Self::Reframed(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => body.size_hint(),
            Self::Stream(body) => body.size_hint(),
            Self::Reframed(_) => SizeHint::default(),
        }
    }
}

/// How much is read, and how patiently.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadLimits {
    pub(crate) message_bytes_max: usize,
    pub(crate) idle_timeout: Duration,
}

/// Reads a body that holds one message. What a peer announces (a content length, the length in
/// front of a gRPC message) is refused before any of it is read or room is made for it.
pub(crate) async fn read_whole(body: &mut Incoming, headers: &HeaderMap, limits: ReadLimits) -> Result<Bytes, Error> {
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
        return Ok(first);
    }

    let announced = usize::try_from(announced.unwrap_or(0)).unwrap_or(usize::MAX);
    let mut whole = BytesMut::with_capacity(announced.min(ANNOUNCED_BYTES_TRUSTED_MAX).max(first.len()));
    loop {
        if whole.len() + first.len() > bytes_max {
            return Err(too_large(limits));
        }
        let was_announced = whole.len() >= GRPC_HEADER_BYTES;
        whole.extend_from_slice(&first);
        if !was_announced {
            check_announcement(framed, &whole, limits)?;
        }
        match next_data(body, limits).await? {
            Some(next) => first = next,
            None => return Ok(whole.freeze()),
        }
    }
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
fn is_framed(headers: &HeaderMap) -> bool {
    headers.get(http::header::CONTENT_TYPE).is_some_and(|kind| {
        kind.as_bytes().starts_with(b"application/grpc") || kind.as_bytes().starts_with(b"application/connect+")
    })
}

fn check_announcement(framed: bool, start: &[u8], limits: ReadLimits) -> Result<(), Error> {
    if let (true, [_, a, b, c, d, ..]) = (framed, start)
        && u32::from_be_bytes([*a, *b, *c, *d]) as usize > limits.message_bytes_max
    {
        return Err(too_large(limits));
    }
    Ok(())
}

fn too_large(limits: ReadLimits) -> Error {
    Error::new(Code::MessageTooLarge, format!("message_bytes_max is {}", limits.message_bytes_max))
}

/// The body of every response.
pub(crate) struct ResponseBody {
    content: Content,
    /// Held until the last byte was handed to the connection.
    _busy: Option<Busy>,
}

enum Content {
    Rpc(ConnectRpcBody),
    Text(Full<Bytes>),
    Disk(Disk),
    Preview(preview::ResponseBody),
    /// The answer to HEAD: nothing, of which the length is told.
    EmptyOf(u64),
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
    pub(crate) fn rpc(body: ConnectRpcBody, busy: Option<Busy>) -> Self {
        Self { content: Content::Rpc(body), _busy: busy }
    }

    pub(crate) fn disk(disk: Disk, busy: Busy) -> Self {
        Self { content: Content::Disk(disk), _busy: Some(busy) }
    }

    pub(crate) fn preview(body: preview::ResponseBody, busy: Busy) -> Self {
        Self { content: Content::Preview(body), _busy: Some(busy) }
    }

    pub(crate) fn empty_of(length: u64) -> Self {
        Self { content: Content::EmptyOf(length), _busy: None }
    }

    pub(crate) fn text(text: impl Into<Bytes>) -> Self {
        Self { content: Content::Text(Full::new(text.into())), _busy: None }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = CutOff;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, CutOff>>> {
        match &mut self.get_mut().content {
            Content::Rpc(body) => {
                let polled = Pin::new(body).poll_frame(context).map_err(|never| match never {});
                polled.map_ok(|frame| match frame.into_trailers() {
                    Ok(mut trailers) => {
                        transport::bound(&mut trailers);
                        Frame::trailers(trailers)
                    }
                    Err(other) => other,
                })
            }
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
            Content::Disk(disk) => SizeHint::with_exact(disk.rest),
            Content::Preview(body) => body.size_hint(),
            Content::EmptyOf(length) => SizeHint::with_exact(*length),
        }
    }
}
