//! Bytes that a caller writes, on their way to the task that sends them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::PollSender;

/// Bytes in one frame of a stream.
pub(crate) const FRAME_BYTES_MAX: usize = 32 * 1024;
/// Frames that wait to be sent.
const FRAMES_MAX: usize = 4;

/// Where a caller writes. Its end, by shutdown or by being dropped, is the end of what the task receives.
pub(crate) struct Pipe {
    frames: PollSender<Bytes>,
    frame_bytes_max: usize,
}

/// A pipe, and what comes out of it in frames of at most this many bytes.
pub(crate) fn pipe(frame_bytes_max: usize) -> (Pipe, mpsc::Receiver<Bytes>) {
    let (sender, receiver) = mpsc::channel(FRAMES_MAX);
    (Pipe { frames: PollSender::new(sender), frame_bytes_max }, receiver)
}

fn closed<E>(_: E) -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.frames.poll_reserve(context)).map_err(closed)?;
        let length = bytes.len().min(self.frame_bytes_max);
        self.frames.send_item(Bytes::copy_from_slice(&bytes[..length])).map_err(closed)?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.frames.close();
        Poll::Ready(Ok(()))
    }
}

/// A task that ends when this goes.
pub(crate) struct AbortOnDrop<T>(pub(crate) JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
