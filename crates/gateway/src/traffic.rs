//! How much passes: connections and bytes, counted on the streams themselves and read by whoever wants to know.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Numbers that only grow, but for the connections open now.
#[derive(Debug, Default)]
pub struct Traffic {
    opened: AtomicU64,
    closed: AtomicU64,
    to_sandboxes: AtomicU64,
    from_sandboxes: AtomicU64,
}

impl Traffic {
    /// Connections that were ever opened.
    pub fn connections(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    pub fn connections_open(&self) -> u64 {
        // In this order none can be closed that was not opened.
        let closed = self.closed.load(Ordering::Acquire);
        self.connections() - closed
    }

    pub fn bytes_to_sandboxes(&self) -> u64 {
        self.to_sandboxes.load(Ordering::Relaxed)
    }

    pub fn bytes_from_sandboxes(&self) -> u64 {
        self.from_sandboxes.load(Ordering::Relaxed)
    }
}

/// Which side of the server a stream leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Sandbox,
}

/// A stream that counts until it is dropped.
pub(crate) struct Counted<S> {
    stream: S,
    side: Side,
    traffic: Arc<Traffic>,
}

impl<S> Counted<S> {
    pub(crate) fn new(stream: S, side: Side, traffic: &Arc<Traffic>) -> Self {
        traffic.opened.fetch_add(1, Ordering::Relaxed);
        Self { stream, side, traffic: Arc::clone(traffic) }
    }

    fn read(&self, bytes: usize) {
        let count = match self.side {
            Side::Client => &self.traffic.to_sandboxes,
            Side::Sandbox => &self.traffic.from_sandboxes,
        };
        count.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn wrote(&self, bytes: usize) {
        let count = match self.side {
            Side::Client => &self.traffic.from_sandboxes,
            Side::Sandbox => &self.traffic.to_sandboxes,
        };
        count.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl<S> Drop for Counted<S> {
    fn drop(&mut self) {
        self.traffic.closed.fetch_add(1, Ordering::Release);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.read(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        self.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = Pin::new(&mut self.stream);
        let written = ready!(match slices {
            // The kernel does less for it. Most requests have no body.
            [only] => stream.poll_write(context, only),
            _ => stream.poll_write_vectored(context, slices),
        })?;
        self.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn bytes_are_counted_in_their_direction_and_connections_until_they_end() {
        let traffic = Arc::new(Traffic::default());
        for (side, to, from) in [(Side::Client, 5, 2), (Side::Sandbox, 7, 7)] {
            let (ours, mut theirs) = tokio::io::duplex(100);
            let mut counted = Counted::new(ours, side, &traffic);
            assert_eq!(traffic.connections_open(), 1);
            theirs.write_all(b"hello").await.unwrap();
            counted.read_exact(&mut [0; 5]).await.unwrap();
            counted.write_all(b"ok").await.unwrap();
            assert_eq!((traffic.bytes_to_sandboxes(), traffic.bytes_from_sandboxes()), (to, from), "{side:?}");
        }
        assert_eq!((traffic.connections(), traffic.connections_open()), (2, 0));
    }
}
