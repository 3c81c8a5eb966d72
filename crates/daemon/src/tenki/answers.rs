//! Streams of answers that tasks send.

use std::pin::Pin;
use std::task::{Context, Poll};

use connectrpc::ConnectError;
use futures::Stream;
use nagaya_engine::OpenSession;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A task that ends with its holder.
pub(super) struct AbortOnDrop(pub(super) JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a task sends, as the answers of a stream. Dropping it ends the task.
pub(super) struct Answers<T> {
    pub(super) frames: mpsc::Receiver<Result<T, ConnectError>>,
    pub(super) _task: AbortOnDrop,
    /// Keeps the session in use.
    pub(super) _open: OpenSession,
}

impl<T> Stream for Answers<T> {
    type Item = Result<T, ConnectError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.frames.poll_recv(context)
    }
}
