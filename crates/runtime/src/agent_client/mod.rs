//! The host's end of the connection to the agent in a sandbox.
//!
//! Every byte that comes from there is taken as hostile: it may have been sent by whoever took over
//! the sandbox. The protocol itself is in `nagaya_guest`; see `docs/decisions/0002-agent-protocol.md`.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_engine::ports::{GuestError, ResourceUsage};
use nagaya_guest::handshake::{Handshake, HandshakeError};
use nagaya_guest::messages::{self, Error, Outcome, Request, event, outcome, request};
use nagaya_guest::mux::{Incoming, Mux, OpenError, Receiver, Role, STREAMS_MAX, Sender};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

mod files;
mod guest;
mod process;
mod sockets;
mod streams;
mod tcp;
#[cfg(test)]
mod tests;

/// Connections that the agent carries at a time: commands and files have the other streams.
const CARRIED_MAX: usize = STREAMS_MAX / 4 * 3;

/// A connection to the agent of one sandbox.
///
/// The agent does all that is asked for. Where the server can do something faster from outside, because the sandbox
/// shares its kernel, it is told how (`count_out_of_memory_kills`, `use_network_of`), and then the agent is not asked.
pub struct Link {
    mux: Mux,
    /// Places for connections that the agent carries.
    carried: Arc<Semaphore>,
    out_of_memory_kills: OnceLock<Counter>,
    network: OnceLock<Arc<sockets::Network>>,
}

/// Something that only ever grows.
type Counter = Arc<dyn Fn() -> u64 + Send + Sync>;

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("mux", &self.mux).finish_non_exhaustive()
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("connect to the sandbox's agent: {0}")]
    Connect(#[from] io::Error),
    #[error("greet the sandbox's agent: {0}")]
    Handshake(#[from] HandshakeError),
}

impl Link {
    /// Connects to the socket on which an agent listens. An older connection to it ends.
    pub async fn connect(path: &Path) -> Result<Arc<Self>, LinkError> {
        Self::from_stream(UnixStream::connect(path).await?).await
    }

    /// Greets the agent at the other end of a stream.
    pub async fn from_stream(stream: UnixStream) -> Result<Arc<Self>, LinkError> {
        Self::with_handshake(stream, Handshake::default()).await
    }

    async fn with_handshake(stream: UnixStream, handshake: Handshake) -> Result<Arc<Self>, LinkError> {
        let (reader, writer) = stream.into_split();
        let (mux, _) = Mux::start(reader, writer, Role::Host, handshake).await?;
        let carried = Arc::new(Semaphore::new(CARRIED_MAX));
        Ok(Arc::new(Self { mux, carried, out_of_memory_kills: OnceLock::new(), network: OnceLock::new() }))
    }

    /// Completes when the connection has ended, with the reason in words for the log.
    pub async fn closed(&self) -> Arc<str> {
        self.mux.closed().await
    }

    /// Ends the connection, whoever else still holds it.
    pub fn close(&self) {
        self.mux.close("the server let go of the sandbox");
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.mux.is_closed()
    }

    /// Whether the sandbox had powered itself off when the connection began.
    pub fn powered_off(&self) -> bool {
        self.mux.peer().powered_off
    }

    /// Completes when the sandbox has powered itself off: true. False when the connection is lost before, or when
    /// the agent is too old to tell.
    pub async fn await_power_off(&self) -> bool {
        self.ask(messages::AwaitPowerOff::default()).await.is_ok()
    }

    /// Lets timeouts and graces of commands stand still.
    pub async fn suspend(&self) -> Result<(), GuestError> {
        self.ask(messages::Suspend::default()).await.map(drop)
    }

    /// Lets them go on.
    pub async fn go_on(&self) -> Result<(), GuestError> {
        self.ask(messages::Continue::default()).await.map(drop)
    }

    /// Output of detached commands that is kept, bytes.
    pub async fn kept_output(&self) -> Result<u64, GuestError> {
        match self.ask(messages::KeptOutput::default()).await? {
            Some(outcome::Kind::Kept(kept)) => Ok(kept.bytes),
            _ => Err(guest::unexpected_outcome()),
        }
    }

    /// What the sandbox uses, of what it may, as far as its agent can tell: not whether its processors were throttled,
    /// nor what only the host knows of its disk. Takes a quarter of a second.
    pub async fn usage(&self) -> Result<ResourceUsage, GuestError> {
        match self.ask_briefly(messages::MeasureUsage::default()).await? {
            Some(outcome::Kind::Usage(usage)) => Ok(ResourceUsage {
                memory_bytes: usage.memory_bytes,
                memory_limit_bytes: usage.memory_limit_bytes,
                memory_kills: usage.memory_kills,
                processes: usage.processes,
                processes_max: usage.processes_max,
                disk_used_bytes: usage.disk_used_bytes,
                disk_size_bytes: usage.disk_size_bytes,
                kept_output_bytes: usage.kept_output_bytes,
                cpu_used_us: usage.cpu_used_us,
                cpu_waited_us: usage.cpu_waited_us,
                cpu_window_us: usage.cpu_window_us,
                ..ResourceUsage::default()
            }),
            _ => Err(guest::unexpected_outcome()),
        }
    }

    /// Tells how many processes of the sandbox were killed because memory ran out so far, so that a command killed that
    /// way ends with the reason `out_of_memory`; else the agent's count is believed. Only the first call counts.
    pub fn count_out_of_memory_kills(&self, count: impl Fn() -> u64 + Send + Sync + 'static) {
        let _ = self.out_of_memory_kills.set(Arc::new(count));
    }

    /// Tells by the pidfd of its first process where the sandbox's network is: TCP goes there without the agent from now
    /// on. Only the first call counts.
    pub fn use_network_of(&self, process: OwnedFd) {
        let network = Arc::new(sockets::Network::new(process));
        if self.network.set(network.clone()).is_ok() {
            let mux = self.mux.clone();
            tokio::spawn(async move { network.cut_with(mux).await });
        }
    }

    /// Sends a request.
    async fn open(&self, kind: impl Into<request::Kind>) -> Result<(Sender, Receiver), GuestError> {
        let request = Request { kind: Some(kind.into()) };
        self.mux.open(messages::encode(&request)).await.map_err(|error| match error {
            OpenError::Closed => unreachable_guest(),
            OpenError::TooMany => guest_error(Code::CapacityUnavailable, "streams to the sandbox"),
            OpenError::TooLarge => guest_error(Code::MessageTooLarge, "arguments and environment"),
        })
    }

    /// Sends a request whose one answer takes no time to speak of.
    async fn ask_briefly(&self, kind: impl Into<request::Kind>) -> Result<Option<outcome::Kind>, GuestError> {
        briefly(self.ask(kind)).await
    }

    /// Sends a request that has one answer.
    async fn ask(&self, kind: impl Into<request::Kind>) -> Result<Option<outcome::Kind>, GuestError> {
        let (_sender, mut receiver) = self.open(kind).await?;
        match receiver.next().await {
            Some(Incoming::End(end)) => finish(&end),
            other => Err(unexpected(other)),
        }
    }
}

/// How long an agent that works may take to begin with something, on a host that is as busy as can be.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Gives up what an agent does not answer: one that hangs shall not keep callers for ever.
async fn briefly<T>(answer: impl Future<Output = Result<T, GuestError>>) -> Result<T, GuestError> {
    let late = |_| {
        guest_error(Code::GuestUnreachable, "its first process does not answer; terminate the session if it stays so")
    };
    tokio::time::timeout(ANSWER_MAX, answer).await.map_err(late)?
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

fn guest_error(code: Code, detail: &str) -> GuestError {
    GuestError { code, detail: detail.into(), errno: 0 }
}

fn unreachable_guest() -> GuestError {
    guest_error(Code::GuestUnreachable, "the connection to the sandbox was lost")
}

/// The agent did not keep to the protocol; or the stream or the connection is gone.
fn unexpected(incoming: Option<Incoming>) -> GuestError {
    match incoming {
        None => unreachable_guest(),
        Some(Incoming::Reset) => guest_error(Code::GuestUnreachable, "the sandbox's agent gave the request up"),
        Some(_) => guest_error(Code::GuestUnreachable, "the sandbox's agent answered something else"),
    }
}

/// What an END frame says.
fn finish(payload: &[u8]) -> Result<Option<outcome::Kind>, GuestError> {
    match messages::decode::<Outcome>(payload) {
        Ok(Outcome { kind: Some(outcome::Kind::Error(error)), .. }) => Err(from_error(*error)),
        Ok(outcome) => Ok(outcome.kind),
        Err(_) => Err(guest_error(Code::GuestUnreachable, "the sandbox's agent sent a malformed answer")),
    }
}

/// What a MESSAGE frame says.
fn event_of(payload: &[u8]) -> Option<event::Kind> {
    messages::decode::<messages::Event>(payload).ok()?.kind
}

fn from_error(error: Error) -> GuestError {
    /// Characters of a detail that are passed on.
    const DETAIL_CHARS_MAX: usize = 200;
    let known = Code::ALL.iter().copied().find(|code| code.name() == error.code);
    let detail = error.detail.chars().filter(|character| !character.is_control()).take(DETAIL_CHARS_MAX).collect();
    // A code of a newer agent: its detail is all there is to tell.
    GuestError { code: known.unwrap_or(Code::FileSystem), detail, errno: error.errno }
}
