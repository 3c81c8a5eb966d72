//! HTTP/1.1 requests that have one meaning only.
//!
//! The HTTP library reads leniently: bare line feeds end lines, of two lengths one wins, and what it cannot read at all it
//! answers with a bare status or by closing. A stream wrapped in [`Strict`] gives it only requests that every parser reads
//! in the same way. The first other one is replaced by a harmless request, the connection's last, of which
//! [`Watch::next`] says why it has to be refused: so it is answered in its turn, with a reason.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures::task::AtomicWaker;
use http::{StatusCode, Uri};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// Header fields that a message may have. What reads it further has to be set to the same.
pub const FIELDS_MAX: usize = 256;
/// Bytes of a request's target.
const TARGET_BYTES_MAX: usize = 32 * 1024;
/// Read at a time while it is not certain what comes.
const READ_BYTES: usize = 8 * 1024;
/// Read at a time of a body.
const BODY_BYTES: usize = 64 * 1024;
/// Of a line with the size of a chunk, and of all trailers.
const CHUNK_LINE_BYTES_MAX: usize = 1024;
const TRAILERS_BYTES_MAX: usize = 16 * 1024;
/// Stands for a refused request.
const SUBSTITUTE: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";
/// How long and how much is read of what comes after a refused request, so that its sender gets to see the answer.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 4 << 20;

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    pub reason: &'static str,
}

const fn bad(reason: &'static str) -> Refusal {
    Refusal { status: StatusCode::BAD_REQUEST, reason }
}

const LINE_ENDS: Refusal = bad("lines of a header end with CR LF");
const TOO_LARGE: Refusal = Refusal {
    status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
    reason: "the header is longer than limits.request_header_bytes_max",
};
const TOO_MANY: Refusal =
    Refusal { status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, reason: "a header has at most 256 fields" };
const TARGET_TOO_LONG: Refusal =
    Refusal { status: StatusCode::URI_TOO_LONG, reason: "a target has at most 32768 bytes" };

#[derive(Default)]
struct Shared {
    /// Requests that have their answer.
    answered: AtomicU64,
    /// Another protocol is spoken now.
    switched: AtomicBool,
    waker: AtomicWaker,
    /// Which request is refused, counted from 1.
    refused: OnceLock<(u64, Refusal)>,
}

/// The service's side of a [`Strict`] stream.
pub struct Watch {
    shared: Arc<Shared>,
    served: AtomicU64,
}

impl Watch {
    /// To be asked once at the beginning of each request.
    pub fn next(&self) -> Result<(), Refusal> {
        let number = self.served.fetch_add(1, Ordering::Relaxed) + 1;
        match self.shared.refused.get() {
            Some((refused, refusal)) if *refused == number => Err(*refusal),
            _ => Ok(()),
        }
    }

    /// To be told of each answer: whether another protocol follows it.
    pub fn answered(&self, switches: bool) {
        self.shared.switched.store(switches, Ordering::Release);
        self.shared.answered.fetch_add(1, Ordering::Release);
        self.shared.waker.wake();
    }
}

/// A stream of HTTP/1.1 requests.
pub struct Strict<T> {
    io: T,
    shared: Arc<Shared>,
    header_bytes_max: usize,
    /// Bytes that were read and not passed on.
    raw: BytesMut,
    /// So many of them are good.
    verified: usize,
    /// Requests that began.
    heads: u64,
    state: State,
    linger: Option<Pin<Box<Sleep>>>,
    lingered: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A request's header is next; so many bytes of it are known to hold no end.
    Head {
        searched: usize,
    },
    /// This much of a body's current piece is still to come; then more chunks or the next request.
    Body {
        left: u64,
        chunked: bool,
        after: After,
    },
    /// The line end after a chunk's data.
    ChunkEnd {
        after: After,
    },
    ChunkSize {
        after: After,
    },
    Trailers {
        bytes: usize,
        after: After,
    },
    /// What follows depends on the answer.
    Asked,
    Tunnel,
    /// Nothing is passed on any more.
    Refused,
    /// A body that cannot be read.
    Broken,
}

/// What comes after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Next,
    Answer,
}

impl After {
    fn state(self) -> State {
        match self {
            Self::Next => State::Head { searched: 0 },
            Self::Answer => State::Asked,
        }
    }
}

impl<T> Strict<T> {
    pub fn new(io: T, header_bytes_max: usize) -> (Self, Watch) {
        let shared = Arc::new(Shared::default());
        let watch = Watch { shared: Arc::clone(&shared), served: 0.into() };
        let strict = Self {
            io,
            shared,
            header_bytes_max,
            raw: BytesMut::new(),
            verified: 0,
            heads: 0,
            state: State::Head { searched: 0 },
            linger: None,
            lingered: 0,
        };
        (strict, watch)
    }

    /// Looks at what was read, as far as that goes.
    fn verify(&mut self) {
        loop {
            let rest = &self.raw[self.verified..];
            match self.state {
                State::Head { searched } => {
                    if rest.starts_with(b"\r\n") {
                        // Some clients send an empty line after a body.
                        self.verified += 2;
                        continue;
                    }
                    let Some(length) = head_length(rest, searched) else {
                        if rest.len() > self.header_bytes_max {
                            self.refuse(TOO_LARGE);
                        } else if has_bare_line_feed(rest, searched) {
                            self.refuse(LINE_ENDS);
                        } else {
                            self.state = State::Head { searched: rest.len() };
                        }
                        return;
                    };
                    let head =
                        if length > self.header_bytes_max { Err(TOO_LARGE) } else { Head::read(&rest[..length]) };
                    match head {
                        Ok(head) => {
                            self.verified += length;
                            self.heads += 1;
                            let after = if head.upgrade { After::Answer } else { After::Next };
                            self.state = match head.length {
                                Length::None => after.state(),
                                Length::Bytes(0) => after.state(),
                                Length::Bytes(left) => State::Body { left, chunked: false, after },
                                Length::Chunked => State::ChunkSize { after },
                            };
                        }
                        Err(refusal) => return self.refuse(refusal),
                    }
                }
                State::Body { left, chunked, after } => {
                    let length = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    self.advance_body(length as u64, left, chunked, after);
                    self.verified += length;
                    if length as u64 != left {
                        return;
                    }
                }
                State::ChunkEnd { after } => match rest {
                    [b'\r', b'\n', ..] => {
                        self.verified += 2;
                        self.state = State::ChunkSize { after };
                    }
                    [] | [b'\r'] => return,
                    _ => self.state = State::Broken,
                },
                State::ChunkSize { after } => match line(rest, CHUNK_LINE_BYTES_MAX) {
                    Line::Whole(text) => match chunk_size(text) {
                        Some(size) => {
                            self.verified += text.len() + 2;
                            self.state = match size {
                                0 => State::Trailers { bytes: 0, after },
                                left => State::Body { left, chunked: true, after },
                            };
                        }
                        None => self.state = State::Broken,
                    },
                    Line::Part => return,
                    Line::Bad => self.state = State::Broken,
                },
                State::Trailers { bytes, after } => match line(rest, TRAILERS_BYTES_MAX - bytes) {
                    Line::Whole(text) => {
                        let length = text.len() + 2;
                        let end = text.is_empty();
                        self.verified += length;
                        self.state = match end {
                            true => after.state(),
                            false if bytes + length >= TRAILERS_BYTES_MAX => State::Broken,
                            false => State::Trailers { bytes: bytes + length, after },
                        };
                    }
                    Line::Part => return,
                    Line::Bad => self.state = State::Broken,
                },
                State::Asked if self.shared.answered.load(Ordering::Acquire) < self.heads => return,
                State::Asked => match self.shared.switched.load(Ordering::Acquire) {
                    false => self.state = State::Head { searched: 0 },
                    true => self.state = State::Tunnel,
                },
                State::Tunnel => {
                    self.verified = self.raw.len();
                    return;
                }
                State::Refused | State::Broken => return,
            }
        }
    }

    fn advance_body(&mut self, read: u64, left: u64, chunked: bool, after: After) {
        self.state = match left - read {
            0 if chunked => State::ChunkEnd { after },
            0 => after.state(),
            left => State::Body { left, chunked, after },
        };
    }

    fn refuse(&mut self, refusal: Refusal) {
        tracing::debug!(reason = refusal.reason, "a request is refused");
        self.raw.truncate(self.verified);
        self.raw.extend_from_slice(SUBSTITUTE);
        self.verified = self.raw.len();
        self.heads += 1;
        let _ = self.shared.refused.set((self.heads, refusal));
        self.state = State::Refused;
    }
}

impl<T: AsyncRead + Unpin> Strict<T> {
    /// Reads what cannot be passed on yet; the number of bytes, 0 at the end.
    fn poll_more(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.raw.reserve(READ_BYTES);
        read_more(&mut self.io, &mut self.raw, context)
    }
}

/// Reads into the free room of a buffer.
fn read_more<T: AsyncRead + Unpin>(
    io: &mut T,
    into: &mut BytesMut,
    context: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    let mut space = [0; READ_BYTES];
    let mut buffer = ReadBuf::new(&mut space);
    ready!(Pin::new(io).poll_read(context, &mut buffer))?;
    into.extend_from_slice(buffer.filled());
    Poll::Ready(Ok(buffer.filled().len()))
}

impl<T: AsyncRead + Unpin> AsyncRead for Strict<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let me = &mut *self;
        loop {
            if me.verified == 0 && !me.raw.is_empty() {
                me.verify();
            }
            if me.verified > 0 {
                let length = me.verified.min(buffer.remaining());
                buffer.put_slice(&me.raw[..length]);
                me.raw.advance(length);
                me.verified -= length;
                return Poll::Ready(Ok(()));
            }
            match me.state {
                State::Body { left, chunked, after } if me.raw.is_empty() => {
                    // What is certain to be a body goes straight through.
                    let room = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.remaining()).min(BODY_BYTES);
                    let mut part = ReadBuf::new(buffer.initialize_unfilled_to(room));
                    ready!(Pin::new(&mut me.io).poll_read(context, &mut part))?;
                    let read = part.filled().len();
                    buffer.advance(read);
                    me.advance_body(read as u64, left, chunked, after);
                    return Poll::Ready(Ok(()));
                }
                State::Tunnel => return Pin::new(&mut me.io).poll_read(context, buffer),
                State::Broken => {
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a request's body is not chunked",
                    )));
                }
                // The end of the connection comes with the answer.
                State::Refused => return Poll::Pending,
                State::Asked => {
                    me.shared.waker.register(context.waker());
                    me.verify();
                    if me.state != State::Asked {
                        continue;
                    }
                    // Only its end is of interest now; what comes else waits for the answer.
                    if me.raw.len() >= READ_BYTES {
                        return Poll::Pending;
                    }
                }
                _ => {}
            }
            if ready!(me.poll_more(context))? == 0 {
                // What began and did not end is nothing.
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Strict<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    /// After a refusal the rest of what its sender sends is read first: closing before would take the answer away.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let me = &mut *self;
        ready!(Pin::new(&mut me.io).poll_shutdown(context))?;
        if me.state != State::Refused {
            return Poll::Ready(Ok(()));
        }
        let linger = me.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        let over = linger.as_mut().poll(context).is_ready();
        me.raw.clear();
        while !over && me.lingered < LINGER_BYTES_MAX {
            match ready!(read_more(&mut me.io, &mut me.raw, context)) {
                Ok(0) | Err(_) => break,
                Ok(length) => me.lingered += length,
            }
            me.raw.clear();
        }
        Poll::Ready(Ok(()))
    }
}

enum Line<'a> {
    /// Without its end.
    Whole(&'a [u8]),
    Part,
    Bad,
}

/// The line that the bytes begin with.
fn line(bytes: &[u8], bytes_max: usize) -> Line<'_> {
    match bytes.iter().take(bytes_max).position(|byte| *byte == b'\n') {
        Some(end) if end > 0 && bytes[end - 1] == b'\r' => match bytes[..end - 1].contains(&b'\r') {
            true => Line::Bad,
            false => Line::Whole(&bytes[..end - 1]),
        },
        None if bytes.len() < bytes_max => Line::Part,
        _ => Line::Bad,
    }
}

/// The size that a chunk's first line tells; what may follow it means nothing to anybody.
fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(line.len());
    let rest = &line[digits..];
    let rest = rest.trim_ascii_start();
    let allowed = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
    if digits == 0 || digits > 15 || !(rest.is_empty() || rest.starts_with(b";")) || !rest.iter().all(allowed) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(&line[..digits]).ok()?, 16).ok()
}

/// Where the empty line ends that ends a header. `searched` bytes are known not to hold it.
fn head_length(bytes: &[u8], searched: usize) -> Option<usize> {
    let from = searched.saturating_sub(3);
    bytes[from..].windows(4).position(|window| window == b"\r\n\r\n").map(|at| from + at + 4)
}

fn has_bare_line_feed(bytes: &[u8], searched: usize) -> bool {
    let news = &bytes[searched.saturating_sub(1)..];
    news.windows(2).any(|pair| pair[1] == b'\n' && pair[0] != b'\r') || (searched == 0 && news.first() == Some(&b'\n'))
}

#[derive(Debug, PartialEq, Eq)]
enum Length {
    None,
    Bytes(u64),
    Chunked,
}

/// What decides where a request ends and what comes then.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    length: Length,
    /// It asks for another protocol.
    upgrade: bool,
}

impl Head {
    /// Reads a whole header, its empty line included.
    fn read(bytes: &[u8]) -> Result<Self, Refusal> {
        let text = &bytes[..bytes.len() - 2];
        let mut lines = text.split_inclusive(|byte| *byte == b'\n').map(|line| match line.strip_suffix(b"\r\n") {
            Some(line) if !line.contains(&b'\r') => Ok(line),
            _ => Err(LINE_ENDS),
        });
        let is_11 = request_line(lines.next().unwrap_or(Ok(b""))?)?;
        let mut head = Self { length: Length::None, upgrade: false };
        for (number, line) in lines.enumerate() {
            if number >= FIELDS_MAX {
                return Err(TOO_MANY);
            }
            let line = line?;
            let (name, value) = field(line)?;
            if name.eq_ignore_ascii_case(b"content-length") {
                if !value.iter().all(u8::is_ascii_digit) {
                    return Err(bad("Content-Length is one number"));
                }
                let number = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
                let number = number.ok_or(bad("Content-Length is one number"))?;
                match head.length {
                    Length::None => head.length = Length::Bytes(number),
                    Length::Bytes(_) => return Err(bad("a request has one Content-Length")),
                    Length::Chunked => return Err(bad("a request has Content-Length or Transfer-Encoding, not both")),
                }
            } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
                match head.length {
                    Length::None if !is_11 => return Err(bad("HTTP/1.0 has no Transfer-Encoding")),
                    Length::None if value.eq_ignore_ascii_case(b"chunked") => head.length = Length::Chunked,
                    Length::None => return Err(bad("the only Transfer-Encoding here is `chunked`")),
                    Length::Bytes(_) => return Err(bad("a request has Content-Length or Transfer-Encoding, not both")),
                    Length::Chunked => return Err(bad("a request has one Transfer-Encoding")),
                }
            } else if name.eq_ignore_ascii_case(b"upgrade") {
                head.upgrade = is_11;
            }
        }
        Ok(head)
    }
}

/// Whether it is one of HTTP/1.1, not 1.0.
fn request_line(line: &[u8]) -> Result<bool, Refusal> {
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(bad("a request begins with a method, a target and a version, with one space between them"));
    };
    if method.is_empty() || !method.iter().copied().all(is_token) {
        return Err(bad("the method is not a word"));
    }
    if target.len() > TARGET_BYTES_MAX {
        return Err(TARGET_TOO_LONG);
    }
    if Uri::try_from(target).is_err() {
        return Err(bad("the target holds characters that have to be percent-encoded, or is no URL"));
    }
    match version {
        b"HTTP/1.1" => Ok(true),
        b"HTTP/1.0" => Ok(false),
        _ => Err(Refusal {
            status: StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            reason: "the versions of HTTP that are spoken here are 1.0, 1.1 and 2",
        }),
    }
}

/// Name and value of a field.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or(bad("a header field has a colon after its name"))?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if name.is_empty() || !name.iter().copied().all(is_token) {
        return Err(bad("the name of a header field is a word, with nothing before it and a colon after it"));
    }
    if value.iter().any(|byte| (*byte < b' ' && *byte != b'\t') || *byte == 0x7f) {
        return Err(bad("a header field holds a control character"));
    }
    Ok((name, value.trim_ascii()))
}

/// Of the characters of a word (RFC 9110, section 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
#[path = "strict_tests.rs"]
mod tests;
