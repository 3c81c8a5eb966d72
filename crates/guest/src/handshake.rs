//! The greeting at the start of a connection: which version both sides speak.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::frame::{Decoder, Frame, FrameError, Kind};
use crate::messages::{self, Hello, MalformedMessage};

/// The version of the protocol that this build speaks.
pub const VERSION: u32 = 1;
/// The oldest version that this build understands.
pub const VERSION_MIN: u32 = 1;
/// How long either side waits for the other's greeting.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// What this side says about itself.
#[derive(Debug, Clone)]
pub struct Handshake {
    pub version_min: u32,
    pub version_max: u32,
    /// Only an agent says so.
    pub powered_off: bool,
}

/// What the other side said about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The sandbox has powered itself off.
    pub powered_off: bool,
}

impl Default for Handshake {
    fn default() -> Self {
        Self { version_min: VERSION_MIN, version_max: VERSION, powered_off: false }
    }
}

/// Why the greeting failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("the other side closed the connection before its greeting")]
    Closed,
    #[error("the other side did not greet in time")]
    TimedOut,
    #[error("the other side speaks versions {min} to {max} of the agent protocol, this one others")]
    Version { min: u32, max: u32 },
    #[error("the other side left: {0}")]
    Refused(String),
    #[error("the other side did not begin with a greeting")]
    NotAGreeting,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Message(#[from] MalformedMessage),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Sends our greeting and waits for the other one. What follows the greeting stays in the decoder.
pub(crate) async fn shake_hands<R, W>(
    reader: &mut R,
    writer: &mut W,
    ours: Handshake,
) -> Result<(Decoder, Peer), HandshakeError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let greeting = Hello {
        version_min: ours.version_min,
        version_max: ours.version_max,
        build: env!("CARGO_PKG_VERSION").into(),
        powered_off: ours.powered_off,
        ..Default::default()
    };
    let exchange = async {
        send(writer, Kind::Hello, messages::encode(&greeting)).await?;
        let mut decoder = Decoder::default();
        let frame = loop {
            if let Some(frame) = decoder.next_frame()? {
                break frame;
            }
            if reader.read_buf(decoder.buffer()).await? == 0 {
                return Err(HandshakeError::Closed);
            }
        };
        match frame.kind {
            Kind::Hello => {}
            Kind::Goodbye => {
                let reason = String::from_utf8_lossy(&frame.payload).chars().take(200).collect();
                return Err(HandshakeError::Refused(reason));
            }
            _ => return Err(HandshakeError::NotAGreeting),
        }
        let theirs: Hello = messages::decode(&frame.payload)?;
        let version = ours.version_max.min(theirs.version_max);
        if version < ours.version_min || version < theirs.version_min {
            return Err(HandshakeError::Version { min: theirs.version_min, max: theirs.version_max });
        }
        Ok((decoder, Peer { powered_off: theirs.powered_off }))
    };
    let result = match tokio::time::timeout(GREETING_TIMEOUT, exchange).await {
        Ok(result) => result,
        Err(_) => Err(HandshakeError::TimedOut),
    };
    if let Err(error) = &result {
        // The other side may be gone or never read; it is only a courtesy.
        let farewell = send(writer, Kind::Goodbye, error.to_string().into());
        let _ = tokio::time::timeout(Duration::from_millis(100), farewell).await;
    }
    result
}

async fn send<W: AsyncWrite + Unpin>(writer: &mut W, kind: Kind, payload: Bytes) -> std::io::Result<()> {
    let mut wire = BytesMut::new();
    Frame { kind, stream: 0, payload }.encode(&mut wire);
    writer.write_all(&wire).await
}
