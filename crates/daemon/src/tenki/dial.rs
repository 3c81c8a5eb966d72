//! Dial: a unix socket in the sandbox, as a stream of the data plane.

use std::io;
use std::path::{Component, Path};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use connectrpc::{ConnectError, RequestContext, Response, ServiceResult, ServiceStream};
use futures::{FutureExt, StreamExt};
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::dial_closed::Reason;
use nagaya_api::tenki::v1::{dial_open, dial_request, dial_response};
use nagaya_engine::OpenSession;
use nagaya_engine::model::SessionState;
use nagaya_engine::ports::{Address, BoxStream, GuestError};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::answers::{AbortOnDrop, Answers};
use super::service::TenkiService;
use crate::rpc::parse::{check_path, required};

type Request = wire::SandboxSessionDataPlaneServiceDialRequest;
type Answer = wire::SandboxSessionDataPlaneServiceDialResponse;

/// Where sockets may lie: with symbolic links followed, one of these, or below one of them.
const ALLOWED: [&str; 3] = ["/home/tenki", "/var/run/docker.sock", "/run/docker.sock"];
/// What is meant by a relative path.
const HOME: &str = "/home/tenki";
/// Bytes in one frame; clients read with buffers of this size.
const FRAME_BYTES_MAX: usize = 32 * 1024;
/// Frames that wait for the client.
const FRAMES_MAX: usize = 4;
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(60);
/// A client that ended its side without a word may have lost interest. It counts as gone when nothing could be sent
/// to it for this long.
const ABANDONED_AFTER: Duration = Duration::from_secs(30);

impl TenkiService {
    pub(super) async fn dial(
        self: &Arc<Self>,
        context: &RequestContext,
        mut requests: ServiceStream<Request>,
    ) -> ServiceResult<ServiceStream<Answer>> {
        let Some(first) = requests.next().await.transpose()? else {
            return Err(protocol("the stream ended before its open frame"));
        };
        let Some(dial_request::Payload::Open(request)) = required(first.frame.into_option(), "frame")?.payload else {
            return Err(protocol("the first frame is not open"));
        };
        let dial_open::Target::UnixSocketPath(path) = required(request.target, "unix_socket_path")?;
        check_path(&path)?;
        let open = self.open(context, &request.session_id).await?;
        let patience = match request.connect_timeout_ms {
            0 => CONNECT_TIMEOUT_DEFAULT,
            asked => Duration::from_millis(asked.into()).min(CONNECT_TIMEOUT_MAX),
        };
        let stream = match connect(&open, &path, patience).await {
            Ok(stream) => stream,
            Err(closed) => return Response::stream_ok(futures::stream::iter([Ok(frame(closed.into()))])),
        };
        let (reader, writer) = tokio::io::split(stream);
        let (told, client) = oneshot::channel();
        let pump = AbortOnDrop(tokio::spawn(async move {
            // Nobody listens any more when the other direction has ended.
            let _ = told.send(pump(&mut requests, writer).await);
        }));
        let (frames, answers) = mpsc::channel(FRAMES_MAX);
        let stopped = open.stopped();
        let opened = wire::DialOpened { sandbox_address: path };
        let carry = tokio::spawn(async move {
            let mut client = Client { end: Some(client), silent: false, frames, _pump: pump };
            if client.send(frame(opened.into())).await.is_err() {
                return;
            }
            let end = match carry(reader, &mut client).await {
                Ok(read) => Ok(frame(last(read, stopped).into())),
                Err(Gone(Some(error))) => Err(error),
                Err(Gone(None)) => return,
            };
            let _ = client.frames.send(end).await;
        });
        Response::stream_ok(Answers { frames: answers, _task: AbortOnDrop(carry), _open: open })
    }
}

fn protocol(problem: &str) -> ConnectError {
    Error::new(Code::StreamProtocol, problem).into()
}

fn frame(payload: dial_response::Payload) -> Answer {
    let frame = wire::DialResponse { payload: Some(payload) };
    Answer { frame: frame.into() }
}

fn closed(reason: Reason, detail: impl Into<String>, errno: i32) -> wire::DialClosed {
    wire::DialClosed { reason: reason.into(), detail: detail.into(), errno }
}

async fn connect(open: &OpenSession, path: &str, patience: Duration) -> Result<BoxStream, wire::DialClosed> {
    let path = if path.starts_with('/') { path.to_owned() } else { format!("{HOME}/{path}") };
    // The guest looks at where the path really leads; what is denied here is not even looked for.
    let goes_up = Path::new(&path).components().any(|part| part == Component::ParentDir);
    if goes_up || !ALLOWED.iter().any(|allowed| Path::new(&path).starts_with(allowed)) {
        return Err(denied());
    }
    let address = Address::UnixWithin { path, allowed: ALLOWED.map(str::to_owned).into() };
    match tokio::time::timeout(patience, open.guest.connect(&address)).await {
        Ok(connected) => connected.map_err(refused),
        Err(_) => Err(closed(Reason::Timeout, "the connection was not accepted in time", ETIMEDOUT)),
    }
}

/// As the sandbox's system has them.
const EACCES: i32 = 13;
const ECONNRESET: i32 = 104;
const ETIMEDOUT: i32 = 110;

fn denied() -> wire::DialClosed {
    let detail = format!("path_denied: only sockets below {} and {} can be dialled", ALLOWED[0], ALLOWED[1]);
    closed(Reason::PathDenied, detail, EACCES)
}

/// Why there is no connection. Clients search these texts for `denied` and `refused`.
fn refused(error: GuestError) -> wire::DialClosed {
    let text = Error::new(error.code, error.detail).to_string();
    match error.code {
        Code::PermissionDenied => denied(),
        Code::ConnectionRefused => closed(Reason::Refused, text, error.errno),
        Code::FileNotFound | Code::NotADirectory => {
            closed(Reason::Refused, format!("connection refused: {text}"), error.errno)
        }
        Code::DeadlineExceeded => closed(Reason::Timeout, text, ETIMEDOUT),
        Code::CapabilityUnavailable => closed(Reason::CapabilityUnavailable, text, error.errno),
        _ => closed(Reason::PlatformError, text, error.errno),
    }
}

/// How a client's side ended.
enum End {
    HalfClosed,
    /// It said nothing more.
    Silent,
    Failed(ConnectError),
}

/// Carries a client's frames to the socket until the client has no more.
async fn pump(requests: &mut ServiceStream<Request>, writer: WriteHalf<BoxStream>) -> End {
    let mut writer = Some(writer);
    let mut end = End::Silent;
    while let Some(message) = requests.next().await {
        let frame = match message.and_then(|message| Ok(required(message.frame.into_option(), "frame")?)) {
            Ok(frame) => frame,
            Err(error) => return End::Failed(error),
        };
        match frame.payload {
            Some(dial_request::Payload::Open(_)) => return End::Failed(protocol("a second open frame")),
            Some(dial_request::Payload::Data(data)) => {
                // What cannot be written is dropped: the reading side tells how the connection ended.
                if let Some(open) = &mut writer
                    && open.write_all(&data).await.is_err()
                {
                    writer = None;
                }
            }
            Some(dial_request::Payload::HalfClose(true)) => {
                end = End::HalfClosed;
                shut_down(writer.take()).await;
            }
            // Kinds of frames that this server does not know.
            Some(dial_request::Payload::HalfClose(false)) | None => {}
        }
    }
    shut_down(writer).await;
    end
}

async fn shut_down(writer: Option<WriteHalf<BoxStream>>) {
    if let Some(mut writer) = writer {
        let _ = writer.shutdown().await;
    }
}

/// The client, to whom frames are sent as it takes them.
struct Client {
    /// How its side ended, as long as that is not known.
    end: Option<oneshot::Receiver<End>>,
    silent: bool,
    frames: mpsc::Sender<Result<Answer, ConnectError>>,
    _pump: AbortOnDrop,
}

/// The client takes nothing more; it is told why, where there is a reason.
struct Gone(Option<ConnectError>);

impl Client {
    /// Completes when the client's side has failed. Learns on the way of its end.
    async fn failed(&mut self) -> ConnectError {
        if let Some(end) = &mut self.end {
            match end.await {
                Ok(End::Failed(error)) => return error,
                Ok(End::Silent) => self.silent = true,
                Ok(End::HalfClosed) | Err(_) => {}
            }
            self.end = None;
        }
        std::future::pending().await
    }

    async fn send(&mut self, frame: Answer) -> Result<(), Gone> {
        let frames = self.frames.clone();
        loop {
            let was_silent = self.silent;
            tokio::select! {
                biased;
                place = frames.reserve() => {
                    place.map_err(|_| Gone(None))?.send(Ok(frame));
                    return Ok(());
                }
                error = self.failed() => return Err(Gone(Some(error))),
                () = tokio::time::sleep(ABANDONED_AFTER) => if was_silent {
                    return Err(Gone(None));
                },
            }
        }
    }
}

/// Carries what the socket sends to the client, to its end.
async fn carry(mut reader: ReadHalf<BoxStream>, client: &mut Client) -> Result<io::Result<()>, Gone> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(FRAME_BYTES_MAX);
        let read = tokio::select! {
            read = reader.read_buf(&mut buffer) => read,
            error = client.failed() => return Err(Gone(Some(error))),
        };
        match read {
            Ok(0) => return Ok(Ok(())),
            Ok(_) => {
                while !buffer.is_empty() {
                    let data = buffer.split_to(buffer.len().min(FRAME_BYTES_MAX)).freeze();
                    client.send(frame(dial_response::Payload::Data(data))).await?;
                }
            }
            Err(error) => return Ok(Err(error)),
        }
    }
}

/// The last frame, after the socket has ended.
fn last(read: io::Result<()>, stopped: impl Future<Output = SessionState>) -> wire::DialClosed {
    // What ends a session is recorded before it happens.
    let state = stopped.now_or_never();
    match (read, state) {
        (_, Some(state)) => closed(Reason::PlatformError, format!("session not RUNNING (state={})", state.name()), 0),
        (Ok(()), None) => closed(Reason::Clean, "", 0),
        (Err(error), None) => {
            closed(Reason::PeerReset, error.kind().to_string(), error.raw_os_error().unwrap_or(ECONNRESET))
        }
    }
}
