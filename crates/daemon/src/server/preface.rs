//! Tells HTTP/2 with prior knowledge from HTTP/1.1 by a connection's first bytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// What every HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A header and a small body are sent as one piece: copying them costs less than what the kernel does for several.
const TOGETHER_MAX: usize = 2048;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Http1,
    Http2,
}

/// Reads until the version is certain. The bytes are not lost: the returned stream begins with
/// them. Fails with `UnexpectedEof` when the peer closes before it said anything that decides.
pub(crate) async fn read_version<T: AsyncRead + Unpin>(mut io: T) -> io::Result<(Version, Prefixed<T>)> {
    let mut prefix = BytesMut::with_capacity(1024);
    loop {
        if io.read_buf(&mut prefix).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let compared = prefix.len().min(PREFACE.len());
        if prefix[..compared] != PREFACE[..compared] {
            return Ok((Version::Http1, Prefixed { prefix, io }));
        }
        if compared == PREFACE.len() {
            return Ok((Version::Http2, Prefixed { prefix, io }));
        }
    }
}

/// A stream of which the first bytes were read already.
#[derive(Debug)]
pub(crate) struct Prefixed<T> {
    prefix: BytesMut,
    io: T,
}

impl<T: AsyncRead + Unpin> AsyncRead for Prefixed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.io).poll_read(context, buffer);
        }
        let taken = self.prefix.len().min(buffer.remaining());
        buffer.put_slice(&self.prefix[..taken]);
        self.prefix.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Prefixed<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        if length > TOGETHER_MAX {
            return Pin::new(&mut self.io).poll_write_vectored(context, slices);
        }
        let mut together = [0; TOGETHER_MAX];
        let mut rest = &mut together[..];
        for slice in slices {
            let (front, back) = rest.split_at_mut(slice.len());
            front.copy_from_slice(slice);
            rest = back;
        }
        Pin::new(&mut self.io).poll_write(context, &together[..length])
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is recognised when the bytes arrive in the given pieces, and all bytes read afterwards.
    async fn read(pieces: &[&[u8]]) -> (Version, Vec<u8>) {
        let mut io = tokio_test_pieces(pieces);
        let (version, mut rest) = read_version(&mut io).await.unwrap();
        let mut all = Vec::new();
        rest.read_to_end(&mut all).await.unwrap();
        (version, all)
    }

    fn tokio_test_pieces(pieces: &[&[u8]]) -> impl AsyncRead + Unpin + use<> {
        struct Pieces(std::collections::VecDeque<Vec<u8>>);
        impl AsyncRead for Pieces {
            fn poll_read(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
                buffer: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                if let Some(piece) = self.0.pop_front() {
                    buffer.put_slice(&piece);
                }
                Poll::Ready(Ok(()))
            }
        }
        Pieces(pieces.iter().map(|piece| piece.to_vec()).collect())
    }

    #[tokio::test]
    async fn the_preface_is_recognised_however_it_is_cut() {
        for cut in 1..PREFACE.len() {
            let (version, all) = read(&[&PREFACE[..cut], &PREFACE[cut..], b"more"]).await;
            assert_eq!(version, Version::Http2);
            assert_eq!(all, [PREFACE, b"more".as_slice()].concat());
        }
    }

    #[tokio::test]
    async fn anything_else_is_http_1_and_nothing_is_lost() {
        for text in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), b"POST /x HTTP/1.1\r\n\r\n", b"PRI * HTTP/1.1\r\n\r\n"] {
            let (version, all) = read(&[&text[..2], &text[2..]]).await;
            assert_eq!((version, all.as_slice()), (Version::Http1, text));
        }
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_is_an_error() {
        assert_eq!(read_version(&b""[..]).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
