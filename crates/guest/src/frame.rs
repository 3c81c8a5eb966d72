//! Frames of the agent protocol: what both sides write to the stream between them.
//!
//! A frame is a header of nine bytes, little endian, and a payload:
//! `length of payload: u32, kind: u8, stream: u32`. See `docs/decisions/0002-agent-protocol.md`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes before every payload.
pub const HEADER_BYTES: usize = 9;
/// Largest payload of a DATA or ERROR_DATA frame, bytes.
pub const DATA_BYTES_MAX: usize = 64 * 1024;
/// Largest payload of an OPEN frame, bytes: a command with all its arguments and environment.
pub const OPEN_BYTES_MAX: usize = 1024 * 1024;
/// Largest payload of a MESSAGE or END frame, bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest payload of a HELLO or GOODBYE frame, bytes.
pub const HELLO_BYTES_MAX: usize = 4 * 1024;
/// Payload of a WINDOW frame: bytes granted, then messages granted, u32 each.
pub const WINDOW_BYTES: usize = 8;

/// What a frame is for. The numbers are on the wire and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First frame of either side, stream 0.
    Hello = 1,
    /// Opens a stream: a request of the host.
    Open = 2,
    /// A message within a stream.
    Message = 3,
    /// Content: a file's, standard input, standard output.
    Data = 4,
    /// Content of standard error; agent to host only.
    ErrorData = 5,
    /// The receiver may be sent more.
    Window = 6,
    /// No more from this side; from the agent also the outcome, and the end of the stream.
    End = 7,
    /// The stream is over at once, without an outcome.
    Reset = 8,
    /// The connection is about to be closed, and why. Stream 0.
    Goodbye = 9,
}

impl Kind {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Hello,
            2 => Self::Open,
            3 => Self::Message,
            4 => Self::Data,
            5 => Self::ErrorData,
            6 => Self::Window,
            7 => Self::End,
            8 => Self::Reset,
            9 => Self::Goodbye,
            _ => return None,
        })
    }

    /// Lengths that a payload of this kind may have.
    fn accepts(self, length: usize) -> bool {
        match self {
            Self::Hello | Self::Goodbye => length <= HELLO_BYTES_MAX,
            Self::Open => length <= OPEN_BYTES_MAX,
            Self::Message | Self::End => length <= MESSAGE_BYTES_MAX,
            Self::Data | Self::ErrorData => (1..=DATA_BYTES_MAX).contains(&length),
            Self::Window => length == WINDOW_BYTES,
            Self::Reset => length == 0,
        }
    }

    /// Whether frames of this kind belong to the connection instead of a stream.
    fn is_connection_wide(self) -> bool {
        matches!(self, Self::Hello | Self::Goodbye)
    }
}

/// One frame, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    /// 0 exactly for HELLO and GOODBYE.
    pub stream: u32,
    pub payload: Bytes,
}

impl Frame {
    /// The nine bytes that go before the payload.
    ///
    /// # Panics
    /// When the payload is longer than its kind allows: senders split content before.
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        assert!(self.kind.accepts(self.payload.len()), "{:?} frame of {} bytes", self.kind, self.payload.len());
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        header[4] = self.kind as u8;
        header[5..].copy_from_slice(&self.stream.to_le_bytes());
        header
    }

    /// Appends the frame to a buffer.
    pub fn encode(&self, buffer: &mut BytesMut) {
        buffer.put_slice(&self.header());
        buffer.put_slice(&self.payload);
    }

    pub fn window(stream: u32, bytes: u32, messages: u32) -> Self {
        let mut payload = BytesMut::with_capacity(WINDOW_BYTES);
        payload.put_u32_le(bytes);
        payload.put_u32_le(messages);
        Self { kind: Kind::Window, stream, payload: payload.freeze() }
    }

    /// Bytes and messages that a WINDOW frame grants.
    pub fn granted(&self) -> Option<(u32, u32)> {
        let mut payload = &self.payload[..];
        (self.kind == Kind::Window && payload.len() == WINDOW_BYTES)
            .then(|| (payload.get_u32_le(), payload.get_u32_le()))
    }
}

/// The other side broke the rules of framing; nothing after it can be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    #[error("{kind:?} frame of {length} bytes")]
    Length { kind: Kind, length: u32 },
    #[error("{kind:?} frame on stream {stream}")]
    Stream { kind: Kind, stream: u32 },
}

/// Cuts a stream of bytes into frames. Memory grows with the bytes that came, never with a length
/// that was only announced.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    /// Room to make for the next read, bytes.
    room: usize,
}

/// An idle connection waits with this much room, bytes: there may be a thousand of them.
const ROOM_BYTES_MIN: usize = 4 * 1024;
/// A busy one with this much.
const ROOM_BYTES_MAX: usize = 128 * 1024;

impl Default for Decoder {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), room: ROOM_BYTES_MIN }
    }
}

impl Decoder {
    /// The buffer to append received bytes to, with room for some.
    pub fn buffer(&mut self) -> &mut BytesMut {
        if self.buffer.is_empty() {
            // What is left of an old one may be held by a payload that somebody keeps.
            self.buffer = BytesMut::new();
        }
        if self.buffer.capacity() - self.buffer.len() < self.room / 4 {
            self.buffer.reserve(self.room);
        }
        &mut self.buffer
    }

    /// Learns from how much came at once how much room the next read should have.
    pub fn received(&mut self, bytes: usize) {
        if bytes >= self.room / 2 {
            self.room = (self.room * 4).min(ROOM_BYTES_MAX);
        } else if bytes < self.room / 8 {
            self.room = (self.room / 2).max(ROOM_BYTES_MIN);
        }
    }

    /// The next whole frame, or `None` until more bytes have come.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(mut header) = self.buffer.get(..HEADER_BYTES) else {
            return Ok(None);
        };
        let length = header.get_u32_le();
        let number = header.get_u8();
        let stream = header.get_u32_le();
        let kind = Kind::from_number(number).ok_or(FrameError::UnknownKind(number))?;
        if !kind.accepts(length as usize) {
            return Err(FrameError::Length { kind, length });
        }
        if kind.is_connection_wide() != (stream == 0) {
            return Err(FrameError::Stream { kind, stream });
        }
        let end = HEADER_BYTES + length as usize;
        if self.buffer.len() < end {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        let payload = self.buffer.split_to(length as usize).freeze();
        Ok(Some(Frame { kind, stream, payload }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> impl Strategy<Value = Frame> {
        (1u8..=9, 1u32.., prop::collection::vec(any::<u8>(), 1..300)).prop_map(|(number, stream, content)| {
            let kind = Kind::from_number(number).expect("a known kind");
            let stream = if kind.is_connection_wide() { 0 } else { stream };
            match kind {
                Kind::Window => Frame::window(stream, content.len() as u32, 1),
                Kind::Reset => Frame { kind, stream, payload: Bytes::new() },
                _ => Frame { kind, stream, payload: content.into() },
            }
        })
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            sent in prop::collection::vec(frames(), 0..8),
            cut in 1usize..50,
        ) {
            let mut wire = BytesMut::new();
            for frame in &sent {
                frame.encode(&mut wire);
            }
            let mut decoder = Decoder::default();
            let mut received = Vec::new();
            for piece in wire.chunks(cut) {
                decoder.buffer().put_slice(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    received.push(frame);
                }
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn garbage_never_panics_and_never_makes_oversized_frames(garbage in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            decoder.buffer().put_slice(&garbage);
            while let Ok(Some(frame)) = decoder.next_frame() {
                prop_assert!(frame.payload.len() <= garbage.len());
            }
        }
    }

    #[test]
    fn an_announced_length_allocates_nothing() {
        let mut decoder = Decoder::default();
        decoder.buffer.extend_from_slice(&[0, 0, 16, 0, Kind::Open as u8, 1, 0, 0, 0]);
        let before = decoder.buffer.capacity();
        assert_eq!(decoder.next_frame(), Ok(None));
        assert_eq!(decoder.buffer.capacity(), before);
    }

    #[test]
    fn lengths_and_streams_outside_the_rules_are_refused() {
        let refused = |length: u32, kind: u8, stream: u32| {
            let mut decoder = Decoder::default();
            decoder.buffer().put_u32_le(length);
            decoder.buffer().put_u8(kind);
            decoder.buffer().put_u32_le(stream);
            decoder.next_frame().is_err()
        };
        for kind in 1..=9 {
            assert!(refused(u32::MAX, kind, 1), "kind {kind}");
            assert!(refused(OPEN_BYTES_MAX as u32 + 1, kind, 1), "kind {kind}");
        }
        assert!(refused(0, 0, 1));
        assert!(refused(0, 10, 1));
        assert!(refused(5, Kind::Hello as u8, 1));
        assert!(refused(5, Kind::Data as u8, 0));
        assert!(refused(0, Kind::Data as u8, 1));
        assert!(refused(7, Kind::Window as u8, 1));
        assert!(!refused(8, Kind::Window as u8, 1));
    }
}
