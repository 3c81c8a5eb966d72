//! HostPortTunnel: a port of the sandbox that leads to a program on the client's machine.
//!
//! One stream carries all connections of a tunnel, each as a sub-stream. There is no credit per sub-stream in the
//! protocol, so what is sent to the client goes at the pace at which it takes the whole stream, and what comes from it
//! waits in a bounded buffer per sub-stream. While a buffer is full the rest waits too, for as long as something moves;
//! a sub-stream in which nothing moves while others wait is closed.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use connectrpc::{ConnectError, RequestContext, Response, ServiceResult, ServiceStream};
use futures::{FutureExt, StreamExt};
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::host_port_tunnel_request::Payload as Asked;
use nagaya_api::tenki::v1::host_port_tunnel_response::Payload;
use nagaya_api::tenki::v1::host_port_tunnel_terminated::Reason;
use nagaya_engine::ports::{Accepted, Bind, BoxStream, GuestError, Listener};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use super::answers::{AbortOnDrop, Answers};
use super::service::TenkiService;
use crate::rpc::parse::required;
use crate::wire::lifecycle::Phase;

type Request = wire::SandboxSessionDataPlaneServiceHostPortTunnelRequest;
type Answer = wire::SandboxSessionDataPlaneServiceHostPortTunnelResponse;
type Frames = mpsc::Sender<Result<Answer, ConnectError>>;

/// Characters in what the client says about itself.
const LABEL_CHARS_MAX: usize = 256;
/// Bytes in one frame; clients read with buffers of this size.
const FRAME_BYTES_MAX: usize = 32 * 1024;
/// Frames of a whole tunnel that wait for the client.
const FRAMES_MAX: usize = 16;
/// Connections at once; further ones wait in the sandbox.
const SUB_STREAMS_MAX: usize = 256;
/// What of one sub-stream waits for the program in the sandbox, bytes.
const BUFFER_BYTES: usize = 256 * 1024;
/// How long a sub-stream may take nothing while it holds up others.
const STALL_MAX: Duration = Duration::from_secs(5);
/// Between the end of what a sandbox's program sends and the closing of a connection that it does not read any more:
/// clients throw away what they have not passed on when a connection is closed.
const LINGER: Duration = Duration::from_secs(2);
/// How long a connection that the client closed may take to pass on what was sent before.
const FINISH_MAX: Duration = Duration::from_secs(30);
const BIND_TIMEOUT: Duration = Duration::from_secs(10);

impl TenkiService {
    pub(super) async fn host_port_tunnel(
        self: &Arc<Self>,
        context: &RequestContext,
        mut requests: ServiceStream<Request>,
    ) -> ServiceResult<ServiceStream<Answer>> {
        let first = tokio::select! {
            first = requests.next() => first.transpose()?,
            () = self.lifecycle.reached(Phase::Draining) => return Err(Error::from(Code::Draining).into()),
        };
        let Some(first) = first else { return Err(protocol("the stream ended before its open frame")) };
        let Some(Asked::Open(request)) = required(first.frame.into_option(), "frame")?.payload else {
            return Err(protocol("the first frame is not open"));
        };
        let bind = bind(&request)?;
        let open = self.open(context, &request.session_id).await?;
        let listening = match tokio::time::timeout(BIND_TIMEOUT, open.guest.listen(&bind)).await {
            Ok(listening) => listening.map_err(refused),
            Err(_) => Err(terminated(Reason::PlatformError, "the sandbox did not answer in time", 0)),
        };
        let listener = match listening {
            Ok(listener) => listener,
            Err(terminated) => return Response::stream_ok(futures::stream::iter([Ok(frame(terminated.into()))])),
        };
        let (frames, answers) = mpsc::channel(FRAMES_MAX);
        let opened = wire::HostPortTunnelOpened {
            sandbox_port: listener.port.into(),
            sandbox_address: address(&bind, listener.port),
        };
        let stopped = open.stopped();
        let draining = self.lifecycle.reached(Phase::Draining);
        let tunnel = Tunnel {
            frames: frames.clone(),
            subs: Arc::default(),
            finishing: Mutex::default(),
            heard: AtomicU64::new(0),
            held_up: AtomicBool::new(false),
            ping_interval: self.tunnel_ping_interval,
            ping_timeout: self.tunnel_ping_timeout,
        };
        let task = tokio::spawn(async move {
            if frames.send(Ok(frame(opened.into()))).await.is_err() {
                return;
            }
            let end = tokio::select! {
                biased;
                () = draining => Some(Ok(terminated(Reason::EngineDraining, "the server is shutting down", 0))),
                state = stopped => {
                    let detail = format!("session not RUNNING (state={})", state.name());
                    Some(Ok(terminated(Reason::SessionLost, detail, 0)))
                }
                end = tunnel.obey(&mut requests) => end.err().map(Err),
                () = tunnel.accept(listener) => Some(Ok(terminated(Reason::SessionLost, "the sandbox was lost", 0))),
                () = tunnel.keep_alive() => {
                    Some(Ok(terminated(Reason::KeepaliveTimeout, "the client does not answer pings", 0)))
                }
                () = frames.closed() => None,
            };
            // Connections end before the client is told, who may not listen any more.
            tunnel.subs.lock().clear();
            if let Some(end) = end {
                let _ = frames.send(end.map(|terminated| frame(terminated.into()))).await;
            }
            let _ = tokio::time::timeout(LINGER, tunnel.finish()).await;
        });
        Response::stream_ok(Answers { frames: answers, _task: AbortOnDrop(task), _open: open })
    }
}

fn protocol(problem: &str) -> ConnectError {
    Error::new(Code::StreamProtocol, problem).into()
}

fn frame(payload: Payload) -> Answer {
    let frame = wire::HostPortTunnelResponse { payload: Some(payload) };
    Answer { frame: frame.into() }
}

fn terminated(reason: Reason, detail: impl Into<String>, errno: i32) -> wire::HostPortTunnelTerminated {
    wire::HostPortTunnelTerminated { reason: reason.into(), detail: detail.into(), errno }
}

/// Where to listen, of what the client asked for.
fn bind(request: &wire::HostPortTunnelOpen) -> Result<Bind, Error> {
    let invalid = |problem: &str| Error::new(Code::InvalidArgument, problem);
    if request.host_dial_target_label.chars().count() > LABEL_CHARS_MAX {
        return Err(invalid("host_dial_target_label is longer than 256 characters"));
    }
    let port = u16::try_from(request.sandbox_port).map_err(|_| invalid("sandbox_port must be 0 to 65535"))?;
    let ip = match request.sandbox_bind_address.as_str() {
        "" | "localhost" => Ipv4Addr::LOCALHOST.into(),
        "*" => Ipv4Addr::UNSPECIFIED.into(),
        text => {
            let text = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
            text.parse().map_err(|_| invalid("sandbox_bind_address is not an IP address"))?
        }
    };
    Ok(Bind::Tcp { ip, port })
}

/// Where programs in the sandbox connect to.
fn address(bind: &Bind, port: u16) -> String {
    match bind {
        Bind::Tcp { ip, .. } => SocketAddr::new(if ip.is_unspecified() { local(ip) } else { *ip }, port).to_string(),
        Bind::Unix { path } => path.clone(),
    }
}

fn local(ip: &IpAddr) -> IpAddr {
    if ip.is_ipv6() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
}

fn refused(error: GuestError) -> wire::HostPortTunnelTerminated {
    let reason = match error.code {
        Code::BindFailed => Reason::BindFailed,
        Code::CapabilityUnavailable => Reason::CapabilityUnavailable,
        _ => Reason::PlatformError,
    };
    terminated(reason, Error::new(error.code, error.detail).to_string(), error.errno)
}

struct Tunnel {
    frames: Frames,
    subs: Arc<Subs>,
    /// Connections that the client closed.
    finishing: Mutex<JoinSet<()>>,
    /// Frames that came from the client.
    heard: AtomicU64,
    /// The client cannot be heard, because what it sent before is still waiting here.
    held_up: AtomicBool,
    ping_interval: Duration,
    ping_timeout: Duration,
}

/// The connections of a tunnel by their numbers.
#[derive(Default)]
struct Subs(Mutex<HashMap<u64, Sub>>);

struct Sub {
    input: mpsc::UnboundedSender<Input>,
    room: Arc<Semaphore>,
    task: AbortOnDrop,
}

/// Something of the client for a connection in the sandbox.
enum Input {
    /// The permit is its room in the buffer.
    Data(Bytes, OwnedSemaphorePermit),
    HalfClose,
}

impl Subs {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Sub>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    fn input(&self, id: u64) -> Option<(mpsc::UnboundedSender<Input>, Arc<Semaphore>)> {
        self.lock().get(&id).map(|sub| (sub.input.clone(), Arc::clone(&sub.room)))
    }
}

impl Tunnel {
    /// Takes connections until the listener ends, which it does with the sandbox.
    async fn accept(&self, mut listener: Listener) {
        let places = Arc::new(Semaphore::new(SUB_STREAMS_MAX));
        for id in 1.. {
            let place = Arc::clone(&places).acquire_owned().await.expect("never closed");
            let Some(Accepted { stream, source }) = listener.incoming.recv().await else {
                // The session's state tells more, when it is known.
                return tokio::time::sleep(LINGER).await;
            };
            let (input, inputs) = mpsc::unbounded_channel();
            let (frames, subs) = (self.frames.clone(), Arc::clone(&self.subs));
            let mut table = self.subs.lock();
            let task = tokio::spawn(async move {
                let _place = place;
                let accept = wire::HostPortTunnelAccept { sub_stream_id: id, source_address: source };
                if frames.send(Ok(frame(accept.into()))).await.is_ok()
                    && let Some(reason) = carry(id, stream, inputs, &frames).await
                {
                    close(&frames, id, reason).await;
                }
                subs.lock().remove(&id);
            });
            let room = Arc::new(Semaphore::new(BUFFER_BYTES));
            table.insert(id, Sub { input, room, task: AbortOnDrop(task) });
        }
    }

    /// Follows the client's frames until it closes the tunnel or says no more.
    async fn obey(&self, requests: &mut ServiceStream<Request>) -> Result<(), ConnectError> {
        while let Some(message) = requests.next().await.transpose()? {
            self.heard.fetch_add(1, Ordering::Relaxed);
            match required(message.frame.into_option(), "frame")?.payload {
                Some(Asked::Open(_)) => return Err(protocol("a second open frame")),
                Some(Asked::Data(data)) => self.pass_on(data.sub_stream_id, data.payload).await,
                Some(Asked::HalfClose(half_close)) => {
                    if let Some((input, _)) = self.subs.input(half_close.sub_stream_id) {
                        let _ = input.send(Input::HalfClose);
                    }
                }
                Some(Asked::Close(close)) if close.sub_stream_id == 0 => return Ok(()),
                Some(Asked::Close(close)) => {
                    // What was sent before is still passed on.
                    if let Some(sub) = self.subs.lock().remove(&close.sub_stream_id) {
                        let mut finishing = self.finishing.lock().expect("no holder of this lock panics");
                        while finishing.try_join_next().is_some() {}
                        finishing.spawn(finish(sub));
                    }
                }
                // Pongs count as any frame does. The rest are kinds of frames that this server does not know.
                Some(Asked::Pong(_)) | None => {}
            }
        }
        Ok(())
    }

    /// Hands data to a connection, when it has room for it.
    async fn pass_on(&self, id: u64, mut data: Bytes) {
        let Some((input, room)) = self.subs.input(id) else { return };
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(FRAME_BYTES_MAX));
            let Some(place) = self.place(&room, piece.len()).await else {
                self.subs.lock().remove(&id);
                return close(&self.frames, id, "sandbox_stalled").await;
            };
            if input.send(Input::Data(piece, place)).is_err() {
                return;
            }
        }
    }

    /// Waits for room; `None` when others wait for a connection in which nothing moves.
    async fn place(&self, room: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let acquire = || Arc::clone(room).acquire_many_owned(bytes as u32);
        if let Some(place) = acquire().now_or_never() {
            return place.ok();
        }
        self.held_up.store(true, Ordering::Relaxed);
        let place = loop {
            let before = room.available_permits();
            match tokio::time::timeout(STALL_MAX, acquire()).await {
                Ok(place) => break place.ok(),
                Err(_) if room.available_permits() == before && self.subs.lock().len() > 1 => break None,
                Err(_) => {}
            }
        };
        self.held_up.store(false, Ordering::Relaxed);
        place
    }

    /// Waits until closed connections have passed on what was sent before.
    async fn finish(self) {
        let mut finishing = self.finishing.into_inner().expect("no holder of this lock panics");
        while finishing.join_next().await.is_some() {}
    }

    /// Ends when the client takes pings no more, or answers nothing.
    async fn keep_alive(&self) {
        for ping_id in 1.. {
            tokio::time::sleep(self.ping_interval).await;
            let heard = self.heard.load(Ordering::Relaxed);
            let ping = wire::HostPortTunnelKeepalivePing { ping_id };
            let answered = async {
                let _ = self.frames.send(Ok(frame(ping.into()))).await;
                tokio::time::sleep(self.ping_timeout).await;
            };
            let _ = tokio::time::timeout(self.ping_timeout, answered).await;
            if self.heard.load(Ordering::Relaxed) == heard && !self.held_up.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}

/// Lets a connection that the client closed take what was sent before.
async fn finish(sub: Sub) {
    let Sub { input, room, mut task } = sub;
    drop((input, room));
    let _ = tokio::time::timeout(FINISH_MAX, &mut task.0).await;
}

/// Carries one connection to its end. Tells with what reason the client is to close it, unless it did so itself.
async fn carry(
    id: u64,
    stream: BoxStream,
    inputs: mpsc::UnboundedReceiver<Input>,
    frames: &Frames,
) -> Option<&'static str> {
    let (reader, writer) = tokio::io::split(stream);
    let (told, mut half_closed) = oneshot::channel();
    let mut up = pin!(up(id, reader, frames));
    let mut down = pin!(down(writer, inputs, told));
    let (mut sandbox_ended, mut client_ended, mut unread) = (false, false, false);
    loop {
        tokio::select! {
            // The end of writing is looked at before the half close, whose teller goes with it.
            biased;
            end = &mut up, if !sandbox_ended => match end {
                Ok(()) => sandbox_ended = true,
                Err(reason) => return reason,
            },
            closed = &mut down, if !unread => match closed {
                Ok(()) => return None,
                Err(_) => unread = true,
            },
            _ = &mut half_closed, if !client_ended => client_ended = true,
        }
        match (sandbox_ended, client_ended, unread) {
            (true, true, false) => return Some("closed"),
            (true, _, true) => {
                tokio::time::sleep(LINGER).await;
                return Some("sandbox_closed");
            }
            _ => {}
        }
    }
}

/// Sends what the sandbox's program sends. An error is the reason for which to close the connection at once, if any.
async fn up(id: u64, mut reader: ReadHalf<BoxStream>, frames: &Frames) -> Result<(), Option<&'static str>> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(FRAME_BYTES_MAX);
        match reader.read_buf(&mut buffer).await {
            Ok(0) => break,
            Ok(_) => {}
            Err(_) => return Err(Some("sandbox_reset")),
        }
        while !buffer.is_empty() {
            let payload = buffer.split_to(buffer.len().min(FRAME_BYTES_MAX)).freeze();
            let data = wire::HostPortTunnelData { sub_stream_id: id, payload };
            frames.send(Ok(frame(data.into()))).await.map_err(|_| None)?;
        }
    }
    let half_close = wire::HostPortTunnelHalfClose { sub_stream_id: id, client_to_server: false };
    frames.send(Ok(frame(half_close.into()))).await.map_err(|_| None)
}

/// Writes what the client sends, until it closes the connection. An error means that nobody reads it.
async fn down(
    mut writer: WriteHalf<BoxStream>,
    mut inputs: mpsc::UnboundedReceiver<Input>,
    half_closed: oneshot::Sender<()>,
) -> io::Result<()> {
    let mut half_closed = Some(half_closed);
    while let Some(input) = inputs.recv().await {
        match input {
            Input::Data(data, _place) => writer.write_all(&data).await?,
            Input::HalfClose => {
                if let Some(told) = half_closed.take() {
                    writer.shutdown().await?;
                    let _ = told.send(());
                }
            }
        }
    }
    writer.shutdown().await
}

async fn close(frames: &Frames, id: u64, reason: &str) {
    let close = wire::HostPortTunnelClose { sub_stream_id: id, reason: reason.into() };
    let _ = frames.send(Ok(frame(close.into()))).await;
}
