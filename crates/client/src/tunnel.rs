//! Tunnels: a port in a sandbox that leads to a program on the caller's machine.

mod connections;
mod resilient;

use std::fmt;
use std::time::Duration;

use connectrpc::client::{BidiRecvHalf, BidiSendHalf};
use hyper::body::Incoming;
use nagaya_api::tenki::client::Whole;
use nagaya_api::tenki::v1::host_port_tunnel_request::Payload as Asked;
use nagaya_api::tenki::v1::host_port_tunnel_response::Payload as Answer;
use nagaya_api::tenki::v1::host_port_tunnel_terminated::Reason;
use nagaya_api::tenki::v1::{self, SandboxSessionDataPlaneServiceHostPortTunnelRequest as Request};
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use self::connections::Connections;
pub use self::resilient::{Backoff, ResilientTunnel, TunnelState};
use crate::pipe::AbortOnDrop;
use crate::settable::settable;
use crate::{Error, Result, Session};

/// Frames that wait to be sent to the server.
const FRAMES_MAX: usize = 16;
/// How long the last words of a tunnel that is closed may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

type Answers = BidiRecvHalf<Incoming, Whole<v1::SandboxSessionDataPlaneServiceHostPortTunnelResponse>>;

settable! {
    /// Where a tunnel listens in the sandbox.
    #[derive(Debug, Clone, Default)]
    pub struct TunnelOptions {
        /// An address of the sandbox; its own loopback by default.
        pub bind_address: String,
        /// 0: any free one.
        pub sandbox_port: u16,
        /// What the server's records call the tunnel's target, at most 256 characters.
        pub label: String,
    }
}

/// Why a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TunnelEndReason {
    /// It was closed on this side.
    Closed,
    /// The connection to the server broke.
    TransportError,
    /// The session stopped running, or the server gave the tunnel up.
    EngineTerminated,
    /// The server is shutting down.
    EngineDraining,
    /// This side did not answer in time.
    Timeout,
    /// The sandbox cannot listen there, or not at all.
    HostError,
}

/// How a tunnel ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TunnelEnd {
    pub reason: TunnelEndReason,
    pub detail: String,
}

/// A tunnel that is open until it ends or is dropped.
pub struct Tunnel {
    sandbox_port: u16,
    sandbox_address: String,
    ended: watch::Receiver<Option<TunnelEnd>>,
    close: Option<oneshot::Sender<()>>,
    _task: AbortOnDrop<()>,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("sandbox_address", &self.sandbox_address).finish_non_exhaustive()
    }
}

impl Session {
    /// Lets connections to a port in the sandbox reach `target`, a `HOST:PORT` of this machine.
    ///
    /// Fails with [`Error::TunnelEnded`] when the sandbox cannot listen there.
    pub async fn tunnel(&self, target: &str, options: TunnelOptions) -> Result<Tunnel> {
        if !target.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
            return Err(Error::InvalidOptions(format!("target {target:?}: write HOST:PORT")));
        }
        let open = v1::HostPortTunnelOpen {
            session_id: self.id().to_owned(),
            sandbox_bind_address: options.bind_address,
            sandbox_port: options.sandbox_port.into(),
            host_dial_target_label: options.label,
        };
        let opened = self.data().call(|data| {
            let open = request(Asked::Open(Box::new(open.clone())));
            async move {
                let mut stream = data.host_port_tunnel().await?;
                // When it cannot be sent, the answer says why.
                let _ = stream.send(open).await;
                let first = stream.message().await?;
                Ok((stream, first.and_then(|message| message.frame.payload.clone())))
            }
        });
        let (stream, first) = opened.await.map_err(Error::or_capability)?;
        let opened = match first {
            Some(Answer::Opened(opened)) => opened,
            Some(Answer::Terminated(terminated)) => return Err(not_opened(*terminated)),
            _ => return Err(Error::StreamClosed("the server did not say whether the tunnel is open".into())),
        };
        let sandbox_port = u16::try_from(opened.sandbox_port)
            .map_err(|_| Error::bad_answer(format!("{} is not a port", opened.sandbox_port)))?;
        let (requests, answers) = stream.into_split();
        let (close, closed) = oneshot::channel();
        let (end, ended) = watch::channel(None);
        let target = target.to_owned();
        let task = tokio::spawn(async move {
            let outcome = carry(requests, answers, target, closed).await;
            end.send_replace(Some(outcome));
        });
        Ok(Tunnel {
            sandbox_port,
            sandbox_address: opened.sandbox_address,
            ended,
            close: Some(close),
            _task: AbortOnDrop(task),
        })
    }
}

impl Tunnel {
    /// Where it listens in the sandbox.
    pub fn sandbox_port(&self) -> u16 {
        self.sandbox_port
    }

    /// The same as `ADDRESS:PORT`.
    pub fn sandbox_address(&self) -> &str {
        &self.sandbox_address
    }

    /// Waits until the tunnel has ended.
    pub async fn ended(&mut self) -> TunnelEnd {
        let gone = TunnelEnd { reason: TunnelEndReason::TransportError, detail: "its task was cancelled".into() };
        match self.ended.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or(gone),
            Err(_) => gone,
        }
    }

    /// Ends the tunnel and every connection through it.
    pub async fn close(mut self) {
        drop(self.close.take());
        self.ended().await;
    }
}

fn request(payload: Asked) -> Request {
    Request { frame: v1::HostPortTunnelRequest { payload: Some(payload) }.into() }
}

fn not_opened(terminated: v1::HostPortTunnelTerminated) -> Error {
    if terminated.reason.as_known() == Some(Reason::CapabilityUnavailable) {
        return Error::capability(terminated.detail);
    }
    Error::TunnelEnded(end_of(terminated))
}

fn end_of(terminated: v1::HostPortTunnelTerminated) -> TunnelEnd {
    let reason = match terminated.reason.as_known() {
        Some(Reason::KeepaliveTimeout) => TunnelEndReason::Timeout,
        Some(Reason::EngineDraining) => TunnelEndReason::EngineDraining,
        Some(Reason::BindFailed | Reason::PlatformError | Reason::CapabilityUnavailable) => TunnelEndReason::HostError,
        _ => TunnelEndReason::EngineTerminated,
    };
    TunnelEnd { reason, detail: terminated.detail }
}

/// Carries a tunnel to its end.
async fn carry(
    requests: BidiSendHalf<Request>,
    mut answers: Answers,
    target: String,
    closed: oneshot::Receiver<()>,
) -> TunnelEnd {
    let (frames, outgoing) = mpsc::channel(FRAMES_MAX);
    let (pongs, urgent) = mpsc::channel(FRAMES_MAX);
    let mut pump = AbortOnDrop(tokio::spawn(pump(requests, outgoing, urgent)));
    let mut connections = Connections::new(target, frames.clone());
    let end = tokio::select! {
        _ = closed => TunnelEnd { reason: TunnelEndReason::Closed, detail: String::new() },
        end = obey(&mut answers, &mut connections, &pongs) => end,
    };
    drop(connections);
    if end.reason == TunnelEndReason::Closed {
        let close = v1::HostPortTunnelClose { sub_stream_id: 0, reason: "sdk_closed".into() };
        let last_words = async {
            let _ = frames.send(Asked::Close(Box::new(close))).await;
            drop((frames, pongs));
            let _ = (&mut pump.0).await;
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, last_words).await;
    }
    end
}

/// Does what the server says until the tunnel ends.
async fn obey(answers: &mut Answers, connections: &mut Connections, pongs: &mpsc::Sender<Asked>) -> TunnelEnd {
    let broken = |detail: String| TunnelEnd { reason: TunnelEndReason::TransportError, detail };
    loop {
        let payload = match answers.message().await {
            Ok(Some(message)) => message.frame.payload.clone(),
            Ok(None) => return broken("the server ended the stream".into()),
            Err(error) => return broken(Error::of_rpc(error).to_string()),
        };
        match payload {
            Some(Answer::Accept(accept)) => connections.accept(accept.sub_stream_id).await,
            Some(Answer::Data(data)) => connections.deliver(data.sub_stream_id, data.payload).await,
            Some(Answer::HalfClose(half)) => connections.end_of_input(half.sub_stream_id),
            Some(Answer::Close(close)) => connections.close(close.sub_stream_id),
            Some(Answer::Ping(ping)) => {
                let pong = v1::HostPortTunnelKeepalivePong { ping_id: ping.ping_id };
                // While so many wait to be sent, one more says nothing new.
                let _ = pongs.try_send(Asked::Pong(Box::new(pong)));
            }
            Some(Answer::Terminated(terminated)) => return end_of(*terminated),
            Some(Answer::Opened(_)) | None => {}
        }
    }
}

/// Sends frames; answers to pings go first.
async fn pump(
    mut requests: BidiSendHalf<Request>,
    mut frames: mpsc::Receiver<Asked>,
    mut urgent: mpsc::Receiver<Asked>,
) {
    loop {
        let payload = tokio::select! {
            biased;
            Some(pong) = urgent.recv() => pong,
            Some(frame) = frames.recv() => frame,
            else => return,
        };
        if requests.send(request(payload)).await.is_err() {
            return;
        }
    }
}

impl fmt::Display for TunnelEndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Closed => "closed",
            Self::TransportError => "transport_error",
            Self::EngineTerminated => "engine_terminated",
            Self::EngineDraining => "engine_draining",
            Self::Timeout => "timeout",
            Self::HostError => "host_error",
        })
    }
}

impl fmt::Display for TunnelEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.detail.is_empty() {
            true => write!(f, "{}", self.reason),
            false => write!(f, "{}: {}", self.reason, self.detail),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_reasons_are_the_contracts() {
        let of = |reason: Reason| {
            end_of(v1::HostPortTunnelTerminated { reason: reason.into(), ..Default::default() }).reason
        };
        assert_eq!(of(Reason::KeepaliveTimeout), TunnelEndReason::Timeout);
        assert_eq!(of(Reason::SessionLost), TunnelEndReason::EngineTerminated);
        assert_eq!(of(Reason::EngineDraining), TunnelEndReason::EngineDraining);
        assert_eq!(of(Reason::BindFailed), TunnelEndReason::HostError);
        assert_eq!(of(Reason::PlatformError), TunnelEndReason::HostError);
        let unset = end_of(v1::HostPortTunnelTerminated::default());
        assert_eq!(unset.reason, TunnelEndReason::EngineTerminated);
    }

    #[test]
    fn what_cannot_be_opened_is_typed() {
        let of = |detail: &str| {
            not_opened(v1::HostPortTunnelTerminated {
                reason: Reason::CapabilityUnavailable.into(),
                detail: detail.into(),
                ..Default::default()
            })
        };
        assert!(matches!(of("no such thing"), Error::CapabilityUnavailable(_)));
        assert!(matches!(of("first_frame_timeout: agent"), Error::PrimitiveTimeout(_)));
    }
}
