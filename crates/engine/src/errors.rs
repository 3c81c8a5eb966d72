//! Errors of the ports, as callers are told of them.

use nagaya_api::error::{Code, Error};

use crate::ports::{GuestError, StoreError};

/// The store's own words stay in the log: they may name files of the host.
pub(crate) fn store_error(error: StoreError) -> Error {
    tracing::error!(%error, "the store failed");
    match error {
        StoreError::Full => Error::new(Code::CapacityUnavailable, "space on the host's disk"),
        StoreError::Damaged(_) => Code::StoreDamaged.into(),
        StoreError::Failed(_) => Error::new(Code::Internal, "the server could not read or write its records"),
    }
}

/// A guest's error in the words of the table.
pub(crate) fn guest_error(error: GuestError) -> Error {
    Error::new(error.code, error.detail)
}
