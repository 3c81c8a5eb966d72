//! What can go wrong, sorted as the contract's SDKs sort it.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use nagaya_api::error::Code;

use crate::transport::TransportError;
use crate::{Output, Session};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The status of an answer, as gRPC and Connect number them.
pub use connectrpc::ErrorCode as Status;

/// What a server said when it refused.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub status: Status,
    /// In the server's words. Servers of Nagaya end it with a stable code in brackets.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.message.is_empty() {
            true => f.write_str(self.status.as_str()),
            false => f.write_str(&self.message),
        }
    }
}

/// Why a call failed.
///
/// Variants with a [`Refusal`] are the server's answers. Servers tell them apart by a status and words
/// in the text only, so a variant is what the official SDKs make of the same answer;
/// [`Error::code`] is more exact where the server sends stable codes.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The session's data plane has no route yet.
    #[error("the session's data plane is not ready: {0}")]
    DataPlaneNotReady(Refusal),
    /// The credential is missing, unknown or expired.
    #[error("{0}")]
    Unauthorized(Refusal),
    #[error("{0}")]
    PermissionDenied(Refusal),
    #[error("{0}")]
    TemplateBuildNotFound(Refusal),
    #[error("{0}")]
    TemplateNotFound(Refusal),
    #[error("{0}")]
    RegistryImageNotFound(Refusal),
    /// No such file or directory in the sandbox.
    #[error("{0}")]
    FileNotFound(Refusal),
    #[error("{0}")]
    SessionNotFound(Refusal),
    #[error("{0}")]
    SnapshotNotFound(Refusal),
    #[error("{0}")]
    VolumeNotFound(Refusal),
    /// An artifact's time is over.
    #[error("{0}")]
    SessionExpired(Refusal),
    /// Something else does not exist; [`Error::code`] says what.
    #[error("{0}")]
    NotFound(Refusal),
    #[error("{0}")]
    TemplateExists(Refusal),
    /// A deadline passed, the call's or the command's.
    #[error("{0}")]
    DeadlineExceeded(Refusal),
    #[error("{0}")]
    PortLimitExceeded(Refusal),
    #[error("{0}")]
    VolumeLimitExceeded(Refusal),
    #[error("{0}")]
    RateLimited(Refusal),
    #[error("{0}")]
    CapacityUnavailable(Refusal),
    #[error("{0}")]
    QuotaExceeded(Refusal),
    #[error("{0}")]
    SnapshotNotDurable(Refusal),
    #[error("{0}")]
    TemplateBuildInProgress(Refusal),
    /// The session has ended.
    #[error("{0}")]
    SessionTerminated(Refusal),
    /// git ended with an error in the sandbox.
    #[error("{refusal}")]
    GitFailed {
        refusal: Refusal,
        exit_code: Option<i32>,
        /// What git wrote to stderr, where the server passed that on.
        stderr: Option<String>,
        /// Whether the cause is of the network, and trying again may help.
        transient: bool,
    },
    #[error("{0}")]
    VolumeSyncPending(Refusal),
    #[error("{0}")]
    VolumeInUse(Refusal),
    #[error("{0}")]
    InboundDisabled(Refusal),
    #[error("{0}")]
    SshUnavailable(Refusal),
    /// Not possible in the state that the session, volume or snapshot is in.
    #[error("{0}")]
    InvalidState(Refusal),
    /// The server refused for a reason that has no variant of its own.
    #[error("{0}")]
    Refused(Refusal),

    /// No answer: there was no connection, or it broke.
    #[error("{message}")]
    Unreachable {
        message: String,
        /// Whether the request cannot have reached the server.
        unsent: bool,
    },
    /// There is no credential.
    #[error("there is no credential: set TENKI_AUTH_TOKEN or TENKI_API_KEY, or give a token")]
    MissingToken,
    /// The credential cannot be sent in a header.
    #[error("the token holds characters that a credential cannot have")]
    InvalidToken,
    /// An option is not usable; nothing was sent.
    #[error("{0}")]
    InvalidOptions(String),
    /// Cores, memory or disk out of range; nothing was sent.
    #[error("{0}")]
    InvalidResources(String),
    /// The session did not become ready in time, or the wait broke. It still exists.
    #[error("session {} is not ready: {cause}", .session.id())]
    WaitReadyFailed { session: Session, cause: Box<Error> },
    /// What was waited for did not happen in time.
    #[error("{what} took longer than {} s", .after.as_secs_f64())]
    TimedOut { what: String, after: Duration },
    /// The session went back to sleep instead of resuming.
    #[error("the session could not be resumed: {0}")]
    ResumeFailed(String),
    #[error("the snapshot failed: {0}")]
    SnapshotFailed(String),
    /// The command ended with an exit code other than 0, or by a signal.
    #[error("{}", .output.describe_failure())]
    CommandFailed { output: Box<Output> },
    /// The command ran into its time limit.
    #[error("the command did not end within its time limit")]
    CommandTimedOut { output: Box<Output> },
    /// The command could not be started.
    #[error("the command could not be started: {reason}")]
    StartFailed { reason: String, errno: i32 },
    /// What was asked for is not offered by this server or this sandbox's driver.
    #[error("not available: {0}")]
    CapabilityUnavailable(String),
    /// The sandbox did not answer the opening of a stream in time.
    #[error("the sandbox did not answer in time: {0}")]
    PrimitiveTimeout(String),
    /// A stream ended before its end, or holds what it must not.
    #[error("the stream ended too early: {0}")]
    StreamClosed(String),
    /// The server answered against the protocol.
    #[error("the server's answer makes no sense: {0}")]
    BadAnswer(String),
    /// A list has no end: the server named the same page again.
    #[error("the server's list has no end: it named page {token:?} again")]
    PaginationStalled { token: String },
    /// A socket in the sandbox could not be reached, or the connection to it ended badly.
    #[error("dial: {reason}{}", with_detail(.detail))]
    DialClosed { reason: crate::DialReason, detail: String, errno: i32 },
    /// A tunnel could not be opened, or ended.
    #[error("the tunnel ended: {0}")]
    TunnelEnded(crate::TunnelEnd),
    /// An error of the local machine.
    #[error("{0}")]
    Io(Arc<io::Error>),
}

fn with_detail(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(": {detail}") }
}

impl Error {
    /// What the server said, when this is its answer.
    pub fn refusal(&self) -> Option<&Refusal> {
        use Error::*;
        match self {
            DataPlaneNotReady(refusal)
            | Unauthorized(refusal)
            | PermissionDenied(refusal)
            | TemplateBuildNotFound(refusal)
            | TemplateNotFound(refusal)
            | RegistryImageNotFound(refusal)
            | FileNotFound(refusal)
            | SessionNotFound(refusal)
            | SnapshotNotFound(refusal)
            | VolumeNotFound(refusal)
            | SessionExpired(refusal)
            | NotFound(refusal)
            | TemplateExists(refusal)
            | DeadlineExceeded(refusal)
            | PortLimitExceeded(refusal)
            | VolumeLimitExceeded(refusal)
            | RateLimited(refusal)
            | CapacityUnavailable(refusal)
            | QuotaExceeded(refusal)
            | SnapshotNotDurable(refusal)
            | TemplateBuildInProgress(refusal)
            | SessionTerminated(refusal)
            | VolumeSyncPending(refusal)
            | VolumeInUse(refusal)
            | InboundDisabled(refusal)
            | SshUnavailable(refusal)
            | InvalidState(refusal)
            | Refused(refusal) => Some(refusal),
            GitFailed { refusal, .. } => Some(refusal),
            WaitReadyFailed { cause, .. } => cause.refusal(),
            _ => None,
        }
    }

    /// What went wrong, with the server's code in brackets where it sent one.
    pub fn message(&self) -> String {
        self.to_string()
    }

    /// The stable code: the server's own, or the nearest one for what this client found out.
    /// `None` where neither is known, for example without a connection.
    pub fn code(&self) -> Option<Code> {
        if let Some(refusal) = self.refusal() {
            return Code::in_wire_text(&refusal.message);
        }
        Some(match self {
            Self::MissingToken | Self::InvalidToken => Code::Unauthenticated,
            Self::InvalidOptions(_) => Code::InvalidArgument,
            Self::InvalidResources(_) => Code::InvalidResources,
            Self::TimedOut { .. } | Self::PrimitiveTimeout(_) => Code::DeadlineExceeded,
            Self::CommandTimedOut { .. } => Code::CommandTimedOut,
            Self::ResumeFailed(_) => Code::ResumeFailed,
            Self::SnapshotFailed(_) => Code::SnapshotFailed,
            Self::CapabilityUnavailable(_) => Code::CapabilityUnavailable,
            Self::WaitReadyFailed { cause, .. } => return cause.code(),
            _ => return None,
        })
    }

    /// Whether the same call may succeed a little later, without anything changed.
    /// For calls that are not harmless to repeat, [`Error::Unreachable`] is only with `unsent`.
    pub fn retryable(&self) -> bool {
        match self {
            Self::DataPlaneNotReady(_)
            | Self::RateLimited(_)
            | Self::CapacityUnavailable(_)
            | Self::VolumeSyncPending(_)
            | Self::SnapshotNotDurable(_)
            | Self::PrimitiveTimeout(_) => true,
            Self::Unreachable { unsent, .. } => *unsent,
            Self::GitFailed { transient, .. } => *transient,
            Self::Refused(refusal) | Self::SshUnavailable(refusal) => refusal.status == Status::Unavailable,
            Self::WaitReadyFailed { cause, .. } => cause.retryable(),
            _ => false,
        }
    }

    /// The error of this kind that an I/O operation of this crate reported.
    pub fn in_io(error: &io::Error) -> Option<&Error> {
        error.get_ref()?.downcast_ref()
    }

    pub(crate) fn bad_answer(problem: impl Into<String>) -> Self {
        Self::BadAnswer(problem.into())
    }

    /// A stream that the server does not know is a capability that it lacks.
    pub(crate) fn or_capability(self) -> Self {
        match self {
            Self::Refused(Refusal { status: Status::Unimplemented, message }) => Self::CapabilityUnavailable(message),
            other => other,
        }
    }

    /// What a stream means that ended for want of a capability, with this detail.
    pub(crate) fn capability(detail: String) -> Self {
        match detail.starts_with("first_frame_timeout") {
            true => Self::PrimitiveTimeout(detail),
            false => Self::CapabilityUnavailable(detail),
        }
    }

    /// What an answer with this status and text means, decided from top to bottom.
    fn from_refusal(refusal: Refusal) -> Self {
        let text = refusal.message.to_lowercase();
        let has = |words: &str| text.contains(words);
        match refusal.status {
            Status::Unimplemented if is_edge_404(&text) => Self::DataPlaneNotReady(refusal),
            Status::Unauthenticated => Self::Unauthorized(refusal),
            Status::PermissionDenied => Self::PermissionDenied(refusal),
            Status::NotFound => not_found(refusal, &text),
            Status::AlreadyExists if has("template") => Self::TemplateExists(refusal),
            Status::DeadlineExceeded => Self::DeadlineExceeded(refusal),
            Status::ResourceExhausted if has("maximum exposed ports") => Self::PortLimitExceeded(refusal),
            Status::ResourceExhausted if has("volume") => Self::VolumeLimitExceeded(refusal),
            Status::ResourceExhausted if has("rate limit") => Self::RateLimited(refusal),
            Status::ResourceExhausted if has("capacity") => Self::CapacityUnavailable(refusal),
            Status::ResourceExhausted => Self::QuotaExceeded(refusal),
            Status::FailedPrecondition => failed_precondition(refusal, &text),
            Status::Unavailable if has("ssh") => Self::SshUnavailable(refusal),
            _ => Self::Refused(refusal),
        }
    }
}

/// Whether a proxy in front of the server answered in its place with a plain HTTP 404.
fn is_edge_404(text: &str) -> bool {
    text.split(|each: char| !each.is_ascii_alphanumeric()).any(|word| word == "404")
}

fn not_found(refusal: Refusal, text: &str) -> Error {
    let has = |words: &str| text.contains(words);
    if has("template build") {
        Error::TemplateBuildNotFound(refusal)
    } else if has("template") {
        Error::TemplateNotFound(refusal)
    } else if has("registry image") {
        Error::RegistryImageNotFound(refusal)
    } else if has("no such file or directory") {
        Error::FileNotFound(refusal)
    } else if has("session") && Code::in_wire_text(&refusal.message).is_none_or(|code| code == Code::SessionNotFound) {
        Error::SessionNotFound(refusal)
    } else if has("snapshot") {
        Error::SnapshotNotFound(refusal)
    } else if has("volume") {
        Error::VolumeNotFound(refusal)
    } else if has("artifact") {
        Error::SessionExpired(refusal)
    } else if Code::in_wire_text(&refusal.message).is_some() {
        Error::NotFound(refusal)
    } else {
        Error::SessionNotFound(refusal)
    }
}

fn failed_precondition(refusal: Refusal, text: &str) -> Error {
    let has = |words: &str| text.contains(words);
    if has("snapshot not yet durable") {
        Error::SnapshotNotDurable(refusal)
    } else if has("template build already in progress") || has("build in progress") {
        Error::TemplateBuildInProgress(refusal)
    } else if has("terminated") {
        Error::SessionTerminated(refusal)
    } else if let Some(failed) = crate::git::failure(&refusal) {
        failed
    } else if has("sync_pending") || has("sync pending") {
        Error::VolumeSyncPending(refusal)
    } else if has("volume is attached") || has("volume is in use") {
        Error::VolumeInUse(refusal)
    } else if has("inbound access is disabled") {
        Error::InboundDisabled(refusal)
    } else if has("ssh") {
        Error::SshUnavailable(refusal)
    } else {
        Error::InvalidState(refusal)
    }
}

impl From<ConnectError> for Error {
    fn from(error: ConnectError) -> Self {
        if let Some(transport) = error.source().and_then(|source| source.downcast_ref::<TransportError>()) {
            return Self::Unreachable {
                message: transport.to_string(),
                unsent: transport.unconnected || transport.refused,
            };
        }
        let message = error.message.unwrap_or_default();
        if let Some(why) = message.strip_prefix("failed to read response body: ") {
            return Self::Unreachable { message: format!("the connection to the server broke: {why}"), unsent: false };
        }
        if message == "stream ended without grpc-status" {
            return Self::StreamClosed("the server cut it off".into());
        }
        Self::from_refusal(Refusal { status: error.code, message })
    }
}

/// For what reads and writes streams: the error is found again with [`Error::in_io`].
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::FileNotFound(_) => io::ErrorKind::NotFound,
            Error::PermissionDenied(_) | Error::Unauthorized(_) => io::ErrorKind::PermissionDenied,
            Error::DialClosed { reason: crate::DialReason::Refused, .. } => io::ErrorKind::ConnectionRefused,
            Error::DialClosed { reason: crate::DialReason::PeerReset, .. } => io::ErrorKind::ConnectionReset,
            Error::DialClosed { reason: crate::DialReason::PathDenied, .. } => io::ErrorKind::PermissionDenied,
            Error::TimedOut { .. } | Error::DeadlineExceeded(_) => io::ErrorKind::TimedOut,
            Error::StreamClosed(_) => io::ErrorKind::UnexpectedEof,
            Error::Unreachable { .. } => io::ErrorKind::ConnectionAborted,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match Error::in_io(&error) {
            Some(own) => own.clone(),
            None => Self::Io(Arc::new(error)),
        }
    }
}

/// Whether an answer says that the call was not begun and may be repeated on a new stream.
pub(crate) fn is_refused_stream(error: &ConnectError) -> bool {
    let transport = error.source().and_then(|source| source.downcast_ref::<TransportError>());
    transport.is_some_and(|transport| transport.refused)
        || matches!(error.code, ErrorCode::Aborted | ErrorCode::Unavailable)
            && error.message.as_deref().is_some_and(|text| {
                let text = text.to_lowercase();
                ["connection reset", "socket hang up", "unexpected eof", "stream closed before headers"]
                    .iter()
                    .any(|words| text.contains(words))
            })
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
