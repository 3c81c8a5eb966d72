//! Connections to Unix sockets in a sandbox.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::{BidiRecvHalf, BidiSendHalf};
use futures::StreamExt;
use futures::stream::BoxStream;
use hyper::body::Incoming;
use nagaya_api::tenki::client::Whole;
use nagaya_api::tenki::v1::dial_closed::Reason;
use nagaya_api::tenki::v1::dial_open::Target;
use nagaya_api::tenki::v1::dial_request::Payload as Asked;
use nagaya_api::tenki::v1::dial_response::Payload as Answer;
use nagaya_api::tenki::v1::{self, SandboxSessionDataPlaneServiceDialRequest as Request};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::io::StreamReader;

use crate::pipe::{AbortOnDrop, FRAME_BYTES_MAX, Pipe, pipe};
use crate::wire::wire_enum;
use crate::{Error, Result, Session};

type Answers = BidiRecvHalf<Incoming, Whole<v1::SandboxSessionDataPlaneServiceDialResponse>>;

wire_enum! {
    /// Why a connection into a sandbox ended or was not made.
    DialReason, v1::dial_closed::Reason {
        Unspecified = "unspecified",
        Clean = "clean",
        /// Nothing listens there.
        Refused = "refused",
        Timeout = "timeout",
        PeerReset = "peer_reset",
        /// The path is outside of what may be dialled.
        PathDenied = "path_denied",
        PlatformError = "platform_error",
        CapabilityUnavailable = "capability_unavailable",
    }
}

/// A connection to a socket in a sandbox. Shutting it down closes the direction towards the sandbox; dropping it ends it.
pub struct DialStream {
    incoming: StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>,
    outgoing: Pipe,
    _pump: AbortOnDrop<()>,
}

impl fmt::Debug for DialStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DialStream").finish_non_exhaustive()
    }
}

impl Session {
    /// Connects to a Unix socket. Fails with [`Error::DialClosed`]; without a timeout the server's counts.
    pub async fn dial(&self, path: &str, connect_timeout: Option<Duration>) -> Result<DialStream> {
        let milliseconds = connect_timeout.map_or(0, |limit| limit.as_millis().max(1));
        let open = v1::DialOpen {
            session_id: self.id().to_owned(),
            connect_timeout_ms: u32::try_from(milliseconds).unwrap_or(u32::MAX),
            target: Some(Target::UnixSocketPath(path.to_owned())),
        };
        let opened = self.data().call(|data| {
            let open = request(Asked::Open(Box::new(open.clone())));
            async move {
                let mut stream = data.dial().await?;
                // When it cannot be sent, the answer says why.
                let _ = stream.send(open).await;
                let first = stream.message().await?;
                Ok((stream, first.and_then(|message| message.frame.payload.clone())))
            }
        });
        let (stream, first) = opened.await.map_err(Error::or_capability)?;
        match first {
            Some(Answer::Opened(_)) => {}
            Some(Answer::Closed(closed)) => return Err(refused(*closed)),
            _ => return Err(Error::StreamClosed("the server did not say whether it connected".into())),
        }
        let (requests, answers) = stream.into_split();
        let (outgoing, pieces) = pipe(FRAME_BYTES_MAX);
        let incoming = futures::stream::try_unfold(answers, |mut answers| async move {
            let bytes = next(&mut answers).await?;
            Ok(bytes.map(|bytes| (bytes, answers)))
        });
        Ok(DialStream {
            incoming: StreamReader::new(incoming.boxed()),
            outgoing,
            _pump: AbortOnDrop(tokio::spawn(pump(requests, pieces))),
        })
    }
}

fn request(payload: Asked) -> Request {
    Request { frame: v1::DialRequest { payload: Some(payload) }.into() }
}

fn refused(closed: v1::DialClosed) -> Error {
    let reason = DialReason::of_wire(closed.reason);
    if reason == DialReason::CapabilityUnavailable {
        return Error::capability(closed.detail);
    }
    Error::DialClosed { reason, detail: closed.detail, errno: closed.errno }
}

/// The bytes that came next; `None` at the end that the other side chose.
async fn next(answers: &mut Answers) -> Result<Option<Bytes>> {
    loop {
        let Some(message) = answers.message().await.map_err(Error::of_rpc)? else {
            return Err(Error::StreamClosed("the server did not say how the connection ended".into()));
        };
        match message.frame.payload.clone() {
            Some(Answer::Data(bytes)) if bytes.is_empty() => {}
            Some(Answer::Data(bytes)) => return Ok(Some(bytes)),
            Some(Answer::Closed(closed)) if closed.reason.as_known() == Some(Reason::Clean) => return Ok(None),
            Some(Answer::Closed(closed)) => return Err(refused(*closed)),
            _ => {}
        }
    }
}

async fn pump(mut requests: BidiSendHalf<Request>, mut pieces: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = pieces.recv().await {
        if requests.send(request(Asked::Data(bytes))).await.is_err() {
            return;
        }
    }
    if requests.send(request(Asked::HalfClose(true))).await.is_ok() {
        // The other direction lasts until its own end; the end of this call's requests would close both.
        std::future::pending().await
    }
}

impl AsyncRead for DialStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.incoming).poll_read(context, buffer)
    }
}

impl AsyncWrite for DialStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.outgoing).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.outgoing).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.outgoing).poll_shutdown(context)
    }
}
