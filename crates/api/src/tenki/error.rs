//! Errors on the wire.

use connectrpc::{ConnectError, ErrorCode};

use super::words::wire_text;
use crate::error::{Error, Status};

impl From<Status> for ErrorCode {
    fn from(status: Status) -> Self {
        match status {
            Status::InvalidArgument => Self::InvalidArgument,
            Status::Unauthenticated => Self::Unauthenticated,
            Status::PermissionDenied => Self::PermissionDenied,
            Status::NotFound => Self::NotFound,
            Status::AlreadyExists => Self::AlreadyExists,
            Status::FailedPrecondition => Self::FailedPrecondition,
            Status::ResourceExhausted => Self::ResourceExhausted,
            Status::DeadlineExceeded => Self::DeadlineExceeded,
            Status::Unavailable => Self::Unavailable,
            Status::Unimplemented => Self::Unimplemented,
            Status::Aborted => Self::Aborted,
            Status::Internal => Self::Internal,
        }
    }
}

/// The one place where an error of ours becomes an answer.
impl From<Error> for ConnectError {
    fn from(error: Error) -> Self {
        ConnectError::new(error.code.status().into(), wire_text(&error))
    }
}
