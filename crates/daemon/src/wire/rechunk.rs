//! Cuts the messages of a WriteFileStream into smaller ones while their bytes arrive.
//!
//! The rpc layer hands a message on when it is complete, which for clients that send a whole file
//! as one message means holding that file in memory, in buffers too large to be reused. Data
//! messages in a row mean the same however they are cut, so each piece that arrives is made a
//! message of its own. Everything else passes as it is, malformed bytes included: what is wrong
//! with them is for the decoder to say.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use buffa::encoding::encode_varint;
use bytes::{BufMut, Bytes, BytesMut};
use hyper::body::{Body, Frame, Incoming};

/// Flags and length in front of every message.
const ENVELOPE_BYTES: usize = 5;
/// `frame`, field 1 of the message, and `data`, field 2 of the frame: both with a length.
const TAG_FRAME: u8 = 1 << 3 | 2;
const TAG_DATA: u8 = 2 << 3 | 2;
/// Two tags with lengths of at most five bytes.
const PREFIX_BYTES_MAX: usize = 12;
/// Largest piece that is made.
const PIECE_BYTES_MAX: usize = 64 * 1024;

/// A request body whose data messages are cut.
pub(crate) struct Rechunked {
    body: Incoming,
    cutter: Cutter,
    ready: VecDeque<Bytes>,
}

impl Rechunked {
    /// Messages that announce more than the given length are left to the decoder to refuse.
    pub(crate) fn new(body: Incoming, message_bytes_max: usize) -> Self {
        Self { body, cutter: Cutter::new(message_bytes_max), ready: VecDeque::new() }
    }
}

impl Body for Rechunked {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let me = &mut *self;
        loop {
            if let Some(bytes) = me.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            match ready!(Pin::new(&mut me.body).poll_frame(context)?) {
                Some(frame) => match frame.into_data() {
                    Ok(data) => me.cutter.push(data, &mut me.ready),
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                None => match me.cutter.finish() {
                    Some(rest) => me.ready.push_back(rest),
                    None => return Poll::Ready(None),
                },
            }
        }
    }
}

/// Where in the sequence of messages the next byte belongs.
struct Cutter {
    message_bytes_max: usize,
    state: State,
    /// The start of a message, as long as it is not known what it is.
    start: BytesMut,
}

#[derive(Default)]
enum State {
    #[default]
    Start,
    /// This many bytes of a data message's content are still to come.
    Data(usize),
    /// This many bytes of another message are still to come.
    Other(usize),
}

impl Cutter {
    fn new(message_bytes_max: usize) -> Self {
        Self { message_bytes_max, state: State::Start, start: BytesMut::new() }
    }

    fn push(&mut self, mut bytes: Bytes, out: &mut VecDeque<Bytes>) {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Start => {
                    let missing = (ENVELOPE_BYTES + PREFIX_BYTES_MAX).saturating_sub(self.start.len());
                    // Nothing of the next message may get in, so the length is looked at first.
                    let wanted = match announced(&self.start) {
                        None => ENVELOPE_BYTES - self.start.len(),
                        Some(length) => missing.min(ENVELOPE_BYTES + length - self.start.len()),
                    };
                    self.start.extend_from_slice(&bytes.split_to(wanted.min(bytes.len())));
                    if let Some(next) = recognise(&self.start, self.message_bytes_max) {
                        let start = self.start.split().freeze();
                        match next {
                            Start::Data { prefix, content } => {
                                self.state = State::Data(content);
                                let first = start.slice(ENVELOPE_BYTES + prefix..);
                                self.push(first, out);
                            }
                            Start::Other { rest } => {
                                self.state = State::Other(rest);
                                out.push_back(start);
                            }
                        }
                        self.end_if_complete();
                    }
                }
                State::Data(rest) => {
                    let piece = bytes.split_to(bytes.len().min(*rest).min(PIECE_BYTES_MAX));
                    *rest -= piece.len();
                    out.push_back(head(piece.len()));
                    out.push_back(piece);
                    self.end_if_complete();
                }
                State::Other(rest) => {
                    let piece = bytes.split_to(bytes.len().min(*rest));
                    *rest -= piece.len();
                    out.push_back(piece);
                    self.end_if_complete();
                }
            }
        }
    }

    fn end_if_complete(&mut self) {
        if matches!(self.state, State::Data(0) | State::Other(0)) {
            self.state = State::Start;
        }
    }

    /// What is left of a message that was never completed. Content that is missing is made up for
    /// by the start of a message without an end, so that the decoder notices as well.
    fn finish(&mut self) -> Option<Bytes> {
        if matches!(std::mem::take(&mut self.state), State::Data(_)) {
            self.start.put_u8(0);
        }
        (!self.start.is_empty()).then(|| self.start.split().freeze())
    }
}

enum Start {
    Data { prefix: usize, content: usize },
    Other { rest: usize },
}

/// The length in a message's envelope, once that is complete.
fn announced(start: &[u8]) -> Option<usize> {
    let (envelope, _) = start.split_first_chunk::<ENVELOPE_BYTES>()?;
    Some(u32::from_be_bytes([envelope[1], envelope[2], envelope[3], envelope[4]]) as usize)
}

/// What kind of message this is; `None` while that cannot be told.
fn recognise(start: &[u8], message_bytes_max: usize) -> Option<Start> {
    let length = announced(start)?;
    let message = &start[ENVELOPE_BYTES..];
    let other = Start::Other { rest: length - message.len().min(length) };
    // Small ones are not worth cutting, and compressed ones cannot be.
    if start[0] != 0 || !(PREFIX_BYTES_MAX + 1..=message_bytes_max).contains(&length) {
        return Some(other);
    }
    if message.len() < PREFIX_BYTES_MAX {
        return None;
    }
    Some(data_prefix(message, length).map_or(other, |(prefix, content)| Start::Data { prefix, content }))
}

/// The bytes in front of the content and the content's length, if the message is a data frame and
/// nothing else.
fn data_prefix(message: &[u8], length: usize) -> Option<(usize, usize)> {
    let (frame, frame_at) = field(message, 0, TAG_FRAME)?;
    let (content, content_at) = field(message, frame_at, TAG_DATA)?;
    (frame_at + frame == length && content_at + content == length && content > 0).then_some((content_at, content))
}

/// The length of a field with this tag, and where its content starts.
fn field(message: &[u8], at: usize, tag: u8) -> Option<(usize, usize)> {
    if *message.get(at)? != tag {
        return None;
    }
    let mut length = 0;
    for (index, byte) in message[at + 1..].iter().take(5).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Some((length, at + 2 + index));
        }
    }
    None
}

/// Envelope and prefix of a data message with so much content.
fn head(content: usize) -> Bytes {
    let mut frame = BytesMut::with_capacity(8);
    frame.put_u8(TAG_DATA);
    encode_varint(content as u64, &mut frame);
    let mut prefix = BytesMut::with_capacity(8);
    prefix.put_u8(TAG_FRAME);
    encode_varint((frame.len() + content) as u64, &mut prefix);
    let length = prefix.len() + frame.len() + content;
    let mut head = BytesMut::with_capacity(ENVELOPE_BYTES + PREFIX_BYTES_MAX);
    head.put_u8(0);
    head.put_u32(u32::try_from(length).expect("a piece is at most 64 KiB"));
    head.put(prefix);
    head.put(frame);
    head.freeze()
}

#[cfg(test)]
mod tests {
    use buffa::Message;
    use nagaya_api::tenki::v1 as wire;
    use nagaya_api::tenki::v1::write_file_stream_request::Payload;
    use proptest::prelude::*;

    use super::*;

    const MESSAGE_BYTES_MAX: usize = 1 << 20;

    fn envelope(flags: u8, message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![flags];
        bytes.extend_from_slice(&(message.len() as u32).to_be_bytes());
        bytes.extend_from_slice(message);
        bytes
    }

    fn message(payload: Payload) -> Vec<u8> {
        let frame = wire::WriteFileStreamRequest { payload: Some(payload) };
        let message = wire::SandboxSessionDataPlaneServiceWriteFileStreamRequest { frame: frame.into() };
        envelope(0, &message.encode_to_vec())
    }

    fn start() -> Payload {
        wire::WriteFileStreamStart { session_id: "s".repeat(36), path: "p".repeat(40), ..Default::default() }.into()
    }

    /// The bytes after cutting, when they arrive in pieces of the given sizes.
    fn cut(mut bytes: &[u8], sizes: &[usize]) -> Vec<u8> {
        let (mut cutter, mut out) = (Cutter::new(MESSAGE_BYTES_MAX), VecDeque::new());
        let mut sizes = sizes.iter().cycle();
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(bytes.len().min(*sizes.next().unwrap()));
            cutter.push(Bytes::copy_from_slice(piece), &mut out);
            bytes = rest;
        }
        out.extend(cutter.finish());
        out.iter().flat_map(|bytes| bytes.to_vec()).collect()
    }

    /// Reads messages back: whether each is a data message, and its content or its bytes; contents
    /// of data messages in a row are joined. `None` when the bytes end within a message.
    fn read(mut bytes: &[u8]) -> Option<Vec<(bool, Vec<u8>)>> {
        let mut messages: Vec<(bool, Vec<u8>)> = Vec::new();
        while !bytes.is_empty() {
            let length = announced(bytes)?;
            let message = bytes.get(ENVELOPE_BYTES..ENVELOPE_BYTES + length)?;
            let flags = bytes[0];
            bytes = &bytes[ENVELOPE_BYTES + length..];
            let decoded = wire::SandboxSessionDataPlaneServiceWriteFileStreamRequest::decode_from_slice(message);
            let payload = decoded.ok().and_then(|message| message.frame.into_option()).and_then(|frame| frame.payload);
            match (flags, payload, messages.last_mut()) {
                (0, Some(Payload::Data(data)), Some((true, content))) => content.extend_from_slice(&data),
                (0, Some(Payload::Data(data)), _) => messages.push((true, data.to_vec())),
                _ => messages.push((false, message.to_vec())),
            }
        }
        Some(messages)
    }

    #[test]
    fn a_large_message_becomes_many_small_ones_at_once() {
        let content = Bytes::from(vec![5; 200_000]);
        let bytes = message(Payload::Data(content.clone()));
        let (mut cutter, mut out) = (Cutter::new(MESSAGE_BYTES_MAX), VecDeque::new());
        // Only the first part has arrived, and its content is passed on already.
        cutter.push(Bytes::copy_from_slice(&bytes[..100_000]), &mut out);
        let early: usize = out.iter().map(Bytes::len).sum();
        assert!(early >= 99_000, "{early}");
        assert_eq!(read(&cut(&bytes, &[16_384])), Some(vec![(true, content.to_vec())]));
    }

    #[test]
    fn a_length_beyond_the_limit_is_passed_on_without_waiting_for_more() {
        let (mut cutter, mut out) = (Cutter::new(MESSAGE_BYTES_MAX), VecDeque::new());
        cutter.push(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]), &mut out);
        assert_eq!(out, [&[0, 0xff, 0xff, 0xff, 0xff][..]]);
    }

    #[test]
    fn other_messages_pass_unchanged() {
        for bytes in [
            message(start()),
            envelope(1, &[9; 500]),
            envelope(0, &[]),
            envelope(0, &[TAG_FRAME, 0xff, 0xff, 0xff, 0xff, 0x0f, TAG_DATA, 1, 1, 1, 1, 1, 1, 1]),
            envelope(0, &[TAG_FRAME; 40]),
            message(Payload::Data(Bytes::from(vec![0; MESSAGE_BYTES_MAX]))),
            [message(start()), envelope(1, b"compressed"), message(Payload::Data(Bytes::new()))].concat(),
        ] {
            assert_eq!(cut(&bytes, &[3, 7]), bytes);
        }
    }

    proptest! {
        #[test]
        fn cutting_changes_no_content_and_no_order(
            lengths in prop::collection::vec((0..200_000usize, any::<bool>(), any::<u8>()), 1..5),
            sizes in prop::collection::vec(1..40_000usize, 1..6),
        ) {
            let mut bytes = Vec::new();
            for (length, is_data, fill) in lengths {
                bytes.extend(if is_data { message(Payload::Data(vec![fill; length].into())) } else { message(start()) });
            }
            let whole = cut(&bytes, &sizes);
            prop_assert_eq!(read(&whole), read(&bytes));
            // A body that ends early is no complete one afterwards either.
            let early = &bytes[..bytes.len() - 1];
            if read(early).is_none() {
                prop_assert!(read(&cut(early, &sizes)).is_none());
            }
        }

        #[test]
        fn hostile_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), sizes in prop::collection::vec(1..50usize, 1..4)) {
            cut(&bytes, &sizes);
        }
    }
}
