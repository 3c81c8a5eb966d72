//! What can go wrong, sorted as the contract's SDKs sort it.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, ErrorCode};
use nagaya_api::error::Code;

use crate::Output;
use crate::transport::TransportError;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The status of an answer, as gRPC and Connect name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Status {
    Cancelled,
    Unknown,
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    ResourceExhausted,
    FailedPrecondition,
    Aborted,
    OutOfRange,
    Unimplemented,
    Internal,
    Unavailable,
    DataLoss,
    Unauthenticated,
}

impl Status {
    /// The name on the wire, such as `not_found`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cancelled => "canceled",
            Self::Unknown => "unknown",
            Self::InvalidArgument => "invalid_argument",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::NotFound => "not_found",
            Self::AlreadyExists => "already_exists",
            Self::PermissionDenied => "permission_denied",
            Self::ResourceExhausted => "resource_exhausted",
            Self::FailedPrecondition => "failed_precondition",
            Self::Aborted => "aborted",
            Self::OutOfRange => "out_of_range",
            Self::Unimplemented => "unimplemented",
            Self::Internal => "internal",
            Self::Unavailable => "unavailable",
            Self::DataLoss => "data_loss",
            Self::Unauthenticated => "unauthenticated",
        }
    }

    pub(crate) const fn of(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Canceled => Self::Cancelled,
            ErrorCode::InvalidArgument => Self::InvalidArgument,
            ErrorCode::DeadlineExceeded => Self::DeadlineExceeded,
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::AlreadyExists => Self::AlreadyExists,
            ErrorCode::PermissionDenied => Self::PermissionDenied,
            ErrorCode::ResourceExhausted => Self::ResourceExhausted,
            ErrorCode::FailedPrecondition => Self::FailedPrecondition,
            ErrorCode::Aborted => Self::Aborted,
            ErrorCode::OutOfRange => Self::OutOfRange,
            ErrorCode::Unimplemented => Self::Unimplemented,
            ErrorCode::Internal => Self::Internal,
            ErrorCode::Unavailable => Self::Unavailable,
            ErrorCode::DataLoss => Self::DataLoss,
            ErrorCode::Unauthenticated => Self::Unauthenticated,
            _ => Self::Unknown,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a server refused, or why.
///
/// Servers tell refusals apart by a status and words in the text only, so this is what the official SDKs
/// make of the same answer; [`Error::code`] is more exact where the server sends stable codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RefusalKind {
    /// The session's data plane has no route yet.
    DataPlaneNotReady,
    /// The credential is missing, unknown or expired.
    Unauthorized,
    PermissionDenied,
    TemplateBuildNotFound,
    TemplateNotFound,
    RegistryImageNotFound,
    /// No such file or directory in the sandbox.
    FileNotFound,
    SessionNotFound,
    SnapshotNotFound,
    VolumeNotFound,
    /// An artifact's time is over.
    SessionExpired,
    /// Something else does not exist; [`Error::code`] says what.
    NotFound,
    TemplateExists,
    /// A deadline passed, the call's or the command's.
    DeadlineExceeded,
    PortLimitExceeded,
    VolumeLimitExceeded,
    RateLimited,
    CapacityUnavailable,
    QuotaExceeded,
    SnapshotNotDurable,
    TemplateBuildInProgress,
    /// The session has ended.
    SessionTerminated,
    VolumeSyncPending,
    VolumeInUse,
    InboundDisabled,
    SshUnavailable,
    /// Not possible in the state that the session, volume or snapshot is in.
    InvalidState,
    /// A reason that has no name of its own here.
    Other,
}

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server refused.
    #[error("{}", refusal_text(*.kind, *.status, .message))]
    Refused {
        kind: RefusalKind,
        /// The server's stable code, where it sends one.
        code: Option<Code>,
        status: Status,
        /// In the server's words. Servers of Nagaya end it with the code in brackets.
        message: String,
    },
    /// git ended with an error in the sandbox.
    #[error("{message}")]
    GitFailed {
        message: String,
        exit_code: Option<i32>,
        /// What git wrote to stderr, where the server passed that on.
        stderr: Option<String>,
        /// Whether the cause is of the network, and trying again may help.
        transient: bool,
    },

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
    #[error("session {session_id} is not ready: {cause}")]
    WaitReadyFailed { session_id: String, cause: Box<Error> },
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

fn refusal_text(kind: RefusalKind, status: Status, message: &str) -> String {
    let text = if message.is_empty() { status.as_str() } else { message };
    match kind {
        RefusalKind::DataPlaneNotReady => format!("the session's data plane is not ready: {text}"),
        _ => text.to_owned(),
    }
}

fn with_detail(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(": {detail}") }
}

impl Error {
    /// A refusal in these words; the code is read from them.
    pub(crate) fn refused(kind: RefusalKind, status: Status, message: impl Into<String>) -> Self {
        let message = message.into();
        Self::Refused { kind, code: Code::in_wire_text(&message), status, message }
    }

    /// What the server refused, when this is its answer.
    pub fn kind(&self) -> Option<RefusalKind> {
        match self {
            Self::Refused { kind, .. } => Some(*kind),
            Self::WaitReadyFailed { cause, .. } => cause.kind(),
            _ => None,
        }
    }

    /// The status of the server's answer, when this is one.
    pub fn status(&self) -> Option<Status> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            Self::GitFailed { .. } => Some(Status::FailedPrecondition),
            Self::WaitReadyFailed { cause, .. } => cause.status(),
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
        Some(match self {
            Self::Refused { code, .. } => return *code,
            Self::GitFailed { message, .. } => return Code::in_wire_text(message),
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
            Self::Refused { kind, status, .. } => match kind {
                RefusalKind::DataPlaneNotReady
                | RefusalKind::RateLimited
                | RefusalKind::CapacityUnavailable
                | RefusalKind::VolumeSyncPending
                | RefusalKind::SnapshotNotDurable => true,
                RefusalKind::Other | RefusalKind::SshUnavailable => *status == Status::Unavailable,
                _ => false,
            },
            Self::PrimitiveTimeout(_) => true,
            Self::Unreachable { unsent, .. } => *unsent,
            Self::GitFailed { transient, .. } => *transient,
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
            Self::Refused { kind: RefusalKind::Other, status: Status::Unimplemented, message, .. } => {
                Self::CapabilityUnavailable(message)
            }
            other => other,
        }
    }

    /// What a stream means that ended because a capability is missing, with this detail.
    pub(crate) fn capability(detail: String) -> Self {
        match detail.starts_with("first_frame_timeout") {
            true => Self::PrimitiveTimeout(detail),
            false => Self::CapabilityUnavailable(detail),
        }
    }

    /// What an answer with this status and text means, decided from top to bottom.
    fn from_refusal(status: Status, message: String) -> Self {
        let text = message.to_lowercase();
        let has = |words: &str| text.contains(words);
        let kind = match status {
            Status::Unimplemented if is_edge_404(&text) => RefusalKind::DataPlaneNotReady,
            Status::Unauthenticated => RefusalKind::Unauthorized,
            Status::PermissionDenied => RefusalKind::PermissionDenied,
            Status::NotFound => not_found(Code::in_wire_text(&message), &text),
            Status::AlreadyExists if has("template") => RefusalKind::TemplateExists,
            Status::DeadlineExceeded => RefusalKind::DeadlineExceeded,
            Status::ResourceExhausted if has("maximum exposed ports") => RefusalKind::PortLimitExceeded,
            Status::ResourceExhausted if has("volume") => RefusalKind::VolumeLimitExceeded,
            Status::ResourceExhausted if has("rate limit") => RefusalKind::RateLimited,
            Status::ResourceExhausted if has("capacity") => RefusalKind::CapacityUnavailable,
            Status::ResourceExhausted => RefusalKind::QuotaExceeded,
            Status::FailedPrecondition => return failed_precondition(message, &text),
            Status::Unavailable if has("ssh") => RefusalKind::SshUnavailable,
            _ => RefusalKind::Other,
        };
        Self::refused(kind, status, message)
    }
}

/// Whether a proxy in front of the server answered in its place with a plain HTTP 404.
fn is_edge_404(text: &str) -> bool {
    text.split(|each: char| !each.is_ascii_alphanumeric()).any(|word| word == "404")
}

fn not_found(code: Option<Code>, text: &str) -> RefusalKind {
    let has = |words: &str| text.contains(words);
    if has("template build") {
        RefusalKind::TemplateBuildNotFound
    } else if has("template") {
        RefusalKind::TemplateNotFound
    } else if has("registry image") {
        RefusalKind::RegistryImageNotFound
    } else if has("no such file or directory") {
        RefusalKind::FileNotFound
    } else if has("session") && code.is_none_or(|code| code == Code::SessionNotFound) {
        RefusalKind::SessionNotFound
    } else if has("snapshot") {
        RefusalKind::SnapshotNotFound
    } else if has("volume") {
        RefusalKind::VolumeNotFound
    } else if has("artifact") {
        RefusalKind::SessionExpired
    } else if code.is_some() {
        RefusalKind::NotFound
    } else {
        RefusalKind::SessionNotFound
    }
}

fn failed_precondition(message: String, text: &str) -> Error {
    let has = |words: &str| text.contains(words);
    let kind = if has("snapshot not yet durable") {
        RefusalKind::SnapshotNotDurable
    } else if has("template build already in progress") || has("build in progress") {
        RefusalKind::TemplateBuildInProgress
    } else if has("terminated") {
        RefusalKind::SessionTerminated
    } else if let Some(failed) = crate::git::failure(&message) {
        return failed;
    } else if has("sync_pending") || has("sync pending") {
        RefusalKind::VolumeSyncPending
    } else if has("volume is attached") || has("volume is in use") {
        RefusalKind::VolumeInUse
    } else if has("inbound access is disabled") {
        RefusalKind::InboundDisabled
    } else if has("ssh") {
        RefusalKind::SshUnavailable
    } else {
        RefusalKind::InvalidState
    };
    Error::refused(kind, Status::FailedPrecondition, message)
}

/// Not `From`, which everybody outside of this crate would see too.
impl Error {
    pub(crate) fn of_rpc(error: ConnectError) -> Self {
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
        Self::from_refusal(Status::of(error.code), message)
    }
}

/// For what reads and writes streams: the error is found again with [`Error::in_io`].
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Refused { kind: RefusalKind::FileNotFound, .. } => io::ErrorKind::NotFound,
            Error::Refused { kind: RefusalKind::PermissionDenied | RefusalKind::Unauthorized, .. } => {
                io::ErrorKind::PermissionDenied
            }
            Error::DialClosed { reason: crate::DialReason::Refused, .. } => io::ErrorKind::ConnectionRefused,
            Error::DialClosed { reason: crate::DialReason::PeerReset, .. } => io::ErrorKind::ConnectionReset,
            Error::DialClosed { reason: crate::DialReason::PathDenied, .. } => io::ErrorKind::PermissionDenied,
            Error::TimedOut { .. } | Error::Refused { kind: RefusalKind::DeadlineExceeded, .. } => {
                io::ErrorKind::TimedOut
            }
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
