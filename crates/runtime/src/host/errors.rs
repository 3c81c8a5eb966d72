//! What failed, in words for users.

use std::time::Duration;

use nagaya_engine::ports::DriverError;

pub(crate) fn failed(step: &str, error: &dyn std::error::Error) -> DriverError {
    let mut text = format!("{step}: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    DriverError::Failed(text)
}

/// What is told of a step that was given up.
pub(crate) fn too_long(what: &str, limit: Duration) -> DriverError {
    DriverError::Failed(format!("{what} within {} s", limit.as_secs()))
}

pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("blocking work does not panic")
}
