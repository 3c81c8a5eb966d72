//! Files in a sandbox. What is large goes through in pieces, in constant memory.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use connectrpc::ConnectError;
use connectrpc::client::ServerStream;
use futures::StreamExt;
use futures::stream::BoxStream;
use hyper::body::Incoming;
use nagaya_api::tenki::client::Whole;
use nagaya_api::tenki::v1::write_file_stream_request::Payload;
use nagaya_api::tenki::v1::{self, SandboxSessionDataPlaneServiceWriteFileStreamRequest as WriteRequest};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::io::StreamReader;

use crate::pipe::{AbortOnDrop, Pipe, pipe};
use crate::settable::settable;
use crate::{Error, RefusalKind, Result, Session, Status, wire};

/// What fits into one message; more is written in pieces.
const WHOLE_BYTES_MAX: usize = 1 << 20;
/// A piece of a file that is written.
const PIECE_BYTES: usize = 256 << 10;

type Pieces = ServerStream<Incoming, Whole<v1::SandboxSessionDataPlaneServiceReadFileStreamResponse>>;

/// The files of one session. Relative paths begin at `/home/tenki`.
#[derive(Debug, Clone)]
pub struct Files {
    session: Session,
}

settable! {
    /// How a file is written.
    #[derive(Debug, Clone, Copy)]
    pub struct WriteOptions {
        /// Permissions of a new file; 0o644 by default.
        pub mode: u32,
        /// Whether the old content goes; true by default. Otherwise the new content is written over its beginning.
        pub truncate: bool,
        /// Whether the content is on the sandbox's disk when it is acknowledged; false by default.
        pub sync: bool,
    }
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self { mode: 0o644, truncate: true, sync: false }
    }
}

/// What is known about a path.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct FileStat {
    pub path: String,
    /// Bytes.
    pub size: u64,
    pub mode: u32,
    #[serde(serialize_with = "wire::serialize_time")]
    pub modified: SystemTime,
    pub is_dir: bool,
    pub is_symlink: bool,
    pub symlink_target: Option<String>,
}

/// One name in a directory.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct FileEntry {
    pub name: String,
    pub is_dir: bool,
    /// Bytes.
    pub size: u64,
    pub mode: u32,
    #[serde(serialize_with = "wire::serialize_time")]
    pub modified: SystemTime,
}

/// What [`Files::remove`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Whether there was anything.
    pub removed: bool,
    pub entries: u64,
}

impl Session {
    pub fn files(&self) -> Files {
        Files { session: self.clone() }
    }
}

/// One call of the data plane, whose messages are wrapped once more.
macro_rules! call {
    ($files:ident, $method:ident, $outer:ident, $request:expr) => {{
        let request = $request;
        let answer = $files.session.data().call(|data| {
            let request = v1::$outer { request: request.clone().into() };
            async move { data.$method(request).await }
        });
        answer.await?.response.into_option().ok_or_else(|| Error::bad_answer("it is empty"))
    }};
}

impl Files {
    fn id(&self) -> String {
        self.session.id().to_owned()
    }

    /// The whole content. Fails with [`RefusalKind::FileNotFound`](crate::RefusalKind::FileNotFound).
    pub async fn read(&self, path: &str) -> Result<Bytes> {
        let mut reader = self.open(path, 0, None).await?;
        let mut content = BytesMut::new();
        while let Some(piece) = reader.next_piece().await? {
            content.extend_from_slice(&piece);
        }
        Ok(content.freeze())
    }

    /// Replaces the content, or makes the file with mode 0644.
    pub async fn write(&self, path: &str, content: impl Into<Bytes>) -> Result<()> {
        self.write_with(path, content, WriteOptions::default()).await
    }

    pub async fn write_with(&self, path: &str, content: impl Into<Bytes>, options: WriteOptions) -> Result<()> {
        let content: Bytes = content.into();
        let plain = options.mode == 0o644 && options.truncate && !options.sync;
        if plain && content.len() <= WHOLE_BYTES_MAX {
            let request = v1::WriteFileRequest { session_id: self.id(), path: path.to_owned(), content };
            let answer: Result<v1::WriteFileResponse> =
                call!(self, write_file, SandboxSessionDataPlaneServiceWriteFileRequest, request);
            return answer.map(drop);
        }
        let mut writer = self.writer(path, options).await?;
        // Why it cannot be written is what the server answers at the end.
        let _ = writer.write_all(&content).await;
        writer.finish().await.map(drop)
    }

    /// Reads the whole file in pieces. Fails with [`RefusalKind::FileNotFound`](crate::RefusalKind::FileNotFound).
    pub async fn reader(&self, path: &str) -> Result<FileReader> {
        self.reader_at(path, 0, None).await
    }

    /// Reads from this byte on, at most this many; `None`: to the end.
    pub async fn reader_at(&self, path: &str, offset: u64, length: Option<u64>) -> Result<FileReader> {
        if length == Some(0) {
            return Ok(FileReader { total_size: None, pieces: StreamReader::new(futures::stream::empty().boxed()) });
        }
        let reader = self.open(path, offset, length).await?;
        let total_size = reader.total_size;
        let pieces = futures::stream::try_unfold(reader, |mut reader| async move {
            let piece = reader.next_piece().await?;
            Ok(piece.map(|piece| (piece, reader)))
        });
        Ok(FileReader { total_size, pieces: StreamReader::new(pieces.boxed()) })
    }

    async fn open(&self, path: &str, offset: u64, length: Option<u64>) -> Result<PieceReader> {
        let number = |number: u64| {
            i64::try_from(number).map_err(|_| Error::InvalidOptions("offset and length: at most 2^63 - 1".into()))
        };
        let request = v1::ReadFileStreamRequest {
            session_id: self.id(),
            path: path.to_owned(),
            offset: number(offset)?,
            length: number(length.unwrap_or(0))?,
            chunk_bytes: 0,
        };
        let opened = self.session.data().call(|data| {
            let request = v1::SandboxSessionDataPlaneServiceReadFileStreamRequest { request: request.clone().into() };
            async move {
                let mut pieces = data.read_file_stream(request).await?;
                // Whether there is such a file shows in the first answer.
                let first = next(&mut pieces).await?;
                Ok((pieces, first))
            }
        });
        let (pieces, first) = opened.await?;
        let total_size = first.as_ref().map(|first| wire::unsigned(first.total_size));
        Ok(PieceReader { pieces, first, total_size, ended: false })
    }

    /// Writes a file in pieces. Nothing is acknowledged, and nothing can be seen of it, before the writer
    /// was shut down or [finished](FileWriter::finish); one that is dropped before leaves nothing.
    pub async fn writer(&self, path: &str, options: WriteOptions) -> Result<FileWriter> {
        let open = self.session.data().open().await?;
        let (pipe, pieces) = pipe(PIECE_BYTES);
        let (finish, finished) = oneshot::channel();
        let start = v1::WriteFileStreamStart {
            session_id: self.id(),
            path: path.to_owned(),
            mode: options.mode,
            truncate: options.truncate,
            sync: options.sync,
        };
        let requests = requests(start, pieces, finished);
        let task = tokio::spawn(async move {
            let answer = open.data.write_file_stream(requests).await.map_err(Error::of_rpc)?;
            Ok(answer.response.into_option().unwrap_or_default().bytes_written)
        });
        Ok(FileWriter { pipe, finish: Some(finish), task: AbortOnDrop(task), outcome: None })
    }

    /// Fails with [`RefusalKind::FileNotFound`](crate::RefusalKind::FileNotFound). Symbolic links are not followed.
    pub async fn stat(&self, path: &str) -> Result<FileStat> {
        let request = v1::StatRequest { session_id: self.id(), path: path.to_owned() };
        let stat: v1::StatResponse = call!(self, stat, SandboxSessionDataPlaneServiceStatRequest, request)?;
        if !stat.exists {
            let message = "no such file or directory [file_not_found]".to_owned();
            return Err(Error::refused(RefusalKind::FileNotFound, Status::NotFound, message));
        }
        Ok(FileStat {
            path: path.to_owned(),
            size: wire::unsigned(stat.size),
            mode: stat.mode,
            modified: wire::file_time(stat.modified_unix_ns),
            is_dir: stat.is_dir,
            is_symlink: stat.is_symlink,
            symlink_target: Some(stat.symlink_target).filter(|target| !target.is_empty()),
        })
    }

    pub async fn exists(&self, path: &str) -> Result<bool> {
        match self.stat(path).await {
            Ok(_) => Ok(true),
            Err(Error::Refused { kind: RefusalKind::FileNotFound, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes a directory with mode 0755, and those above it. One that exists is left as it is.
    pub async fn mkdir(&self, path: &str) -> Result<()> {
        let request = v1::MkdirRequest { session_id: self.id(), path: path.to_owned(), mode: 0o755, recursive: true };
        let made: Result<v1::MkdirResponse> = call!(self, mkdir, SandboxSessionDataPlaneServiceMkdirRequest, request);
        made.map(drop)
    }

    /// Removes a file, or a directory with everything below it.
    pub async fn remove(&self, path: &str) -> Result<Removed> {
        let request = v1::RemoveRequest { session_id: self.id(), path: path.to_owned(), recursive: true };
        let answer: v1::RemoveResponse = call!(self, remove, SandboxSessionDataPlaneServiceRemoveRequest, request)?;
        Ok(Removed { removed: answer.removed, entries: wire::unsigned(answer.entries_removed) })
    }

    /// What is in a directory, by name; names with a dot in front only if asked for.
    pub async fn list(&self, path: &str, include_hidden: bool) -> Result<Vec<FileEntry>> {
        let request = v1::ListRequest { session_id: self.id(), path: path.to_owned(), include_hidden };
        let answer: v1::ListResponse = call!(self, list, SandboxSessionDataPlaneServiceListRequest, request)?;
        let entries = answer.entries.into_iter().map(|entry| FileEntry {
            name: entry.name,
            is_dir: entry.is_dir,
            size: wire::unsigned(entry.size),
            mode: entry.mode,
            modified: wire::file_time(entry.modified_unix_ns),
        });
        Ok(entries.collect())
    }
}

async fn next(pieces: &mut Pieces) -> Result<Option<v1::ReadFileStreamResponse>, ConnectError> {
    let message = pieces.message().await?;
    Ok(message.map(|message| message.response.as_option().cloned().unwrap_or_default()))
}

/// The pieces of one file, from its beginning.
struct PieceReader {
    pieces: Pieces,
    first: Option<v1::ReadFileStreamResponse>,
    total_size: Option<u64>,
    ended: bool,
}

impl PieceReader {
    async fn next_piece(&mut self) -> Result<Option<Bytes>> {
        while !self.ended {
            let answer = match self.first.take() {
                Some(first) => Some(first),
                None => next(&mut self.pieces).await.map_err(Error::of_rpc)?,
            };
            let Some(answer) = answer else { break };
            self.ended = answer.eof;
            if !answer.data.is_empty() {
                return Ok(Some(answer.data));
            }
        }
        Ok(None)
    }
}

/// Reads a file of a sandbox.
pub struct FileReader {
    total_size: Option<u64>,
    pieces: StreamReader<BoxStream<'static, io::Result<Bytes>>, Bytes>,
}

impl FileReader {
    /// Bytes in the whole file when it was opened, where the server said it.
    pub fn total_size(&self) -> Option<u64> {
        self.total_size
    }
}

impl fmt::Debug for FileReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileReader").field("total_size", &self.total_size).finish_non_exhaustive()
    }
}

impl AsyncRead for FileReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pieces).poll_read(context, buffer)
    }
}

/// Start, then all pieces, then the end. A writer that was dropped instead of finished never gets
/// there: the call is cancelled, because its end would acknowledge what was written so far.
fn requests(
    start: v1::WriteFileStreamStart,
    pieces: mpsc::Receiver<Bytes>,
    finished: oneshot::Receiver<()>,
) -> impl futures::Stream<Item = WriteRequest> + Send + 'static {
    let frame = |payload| WriteRequest { frame: v1::WriteFileStreamRequest { payload: Some(payload) }.into() };
    let first = frame(Payload::Start(Box::new(start)));
    let rest = futures::stream::unfold((pieces, Some(finished)), move |(mut pieces, mut finished)| async move {
        if let Some(bytes) = pieces.recv().await {
            return Some((frame(Payload::Data(bytes)), (pieces, finished)));
        }
        match finished.take()?.await {
            Ok(()) => None,
            Err(_) => std::future::pending().await,
        }
    });
    futures::stream::once(async move { first }).chain(rest)
}

/// Writes a file of a sandbox. Shutting it down, or [`FileWriter::finish`], acknowledges the content;
/// dropped before, it leaves the file as it was.
pub struct FileWriter {
    pipe: Pipe,
    finish: Option<oneshot::Sender<()>>,
    task: AbortOnDrop<Result<i64>>,
    outcome: Option<Result<u64>>,
}

impl fmt::Debug for FileWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileWriter").field("outcome", &self.outcome).finish_non_exhaustive()
    }
}

impl FileWriter {
    /// Ends the file and waits until the server has it; answers the bytes written.
    pub async fn finish(mut self) -> Result<u64> {
        std::future::poll_fn(|context| self.poll_finish(context)).await
    }

    fn poll_finish(&mut self, context: &mut Context<'_>) -> Poll<Result<u64>> {
        if let Some(outcome) = &self.outcome {
            return Poll::Ready(outcome.clone());
        }
        // Only in this order: a pipe that ends without the mark is a writer that was dropped.
        if let Some(finish) = self.finish.take() {
            let _ = finish.send(());
        }
        ready!(Pin::new(&mut self.pipe).poll_shutdown(context))?;
        self.poll_outcome(context)
    }

    fn poll_outcome(&mut self, context: &mut Context<'_>) -> Poll<Result<u64>> {
        let outcome = match ready!(Pin::new(&mut self.task.0).poll(context)) {
            Ok(outcome) => outcome.map(wire::unsigned),
            Err(_) => Err(Error::StreamClosed("the task that writes the file was cancelled".into())),
        };
        self.outcome = Some(outcome.clone());
        Poll::Ready(outcome)
    }
}

impl AsyncWrite for FileWriter {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(outcome) = &self.outcome {
            let after_end = io::Error::from(io::ErrorKind::BrokenPipe);
            return Poll::Ready(Err(outcome.clone().err().map_or(after_end, Into::into)));
        }
        match ready!(Pin::new(&mut self.pipe).poll_write(context, bytes)) {
            Ok(written) => Poll::Ready(Ok(written)),
            // The call has ended, so its answer says why.
            Err(closed) => Poll::Ready(Err(ready!(self.poll_outcome(context)).err().map_or(closed, Into::into))),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_finish(context).map(|outcome| outcome.map(drop).map_err(Into::into))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn written(finish: bool) -> Vec<Option<WriteRequest>> {
        let (mut pipe, pieces) = pipe(PIECE_BYTES);
        let (finished, end) = oneshot::channel();
        let mut requests = Box::pin(requests(v1::WriteFileStreamStart::default(), pieces, end));
        let writing = pipe.write_all(b"content").now_or_never();
        assert!(writing.is_some_and(|written| written.is_ok()));
        if finish {
            finished.send(()).expect("somebody waits for it");
        } else {
            drop(finished);
        }
        drop(pipe);
        std::iter::from_fn(|| requests.next().now_or_never()).take(3).collect()
    }

    #[test]
    fn only_a_finished_file_ends() {
        let finished = written(true);
        assert!(matches!(finished[..], [Some(_), Some(_), None]), "{finished:?}");
        let dropped = written(false);
        assert!(matches!(dropped[..], [Some(_), Some(_)]), "then nothing comes, not even an end: {dropped:?}");
    }
}
