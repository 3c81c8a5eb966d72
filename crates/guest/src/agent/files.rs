//! Reading the content of files.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use nagaya_api::error::Code;
use rustix::fs::{FileType, OFlags, Stat};
use rustix::io::Errno;

use super::failure::Failure;
use super::paths::Root;
use super::{Agent, blocking};
use crate::frame::{DATA_BYTES_MAX, Kind};
use crate::messages::{Event, Opened, Outcome, ReadFile, encode};
use crate::mux::Sender;

/// Chunks that are read by one visit to a blocking thread.
const CHUNKS_AT_ONCE: usize = 8;

pub async fn opened(sender: &Sender, total_size: u64) -> Result<(), Failure> {
    let event = Event { kind: Opened { total_size, ..Opened::default() }.into() };
    sender.message(encode(&event)).await.map_err(|_| gone())
}

/// Nobody listens any more, so the text does not matter.
pub fn gone() -> Failure {
    Failure::new(Code::GuestUnreachable, "")
}

/// Answers with the content of a file.
pub async fn read(agent: &Arc<Agent>, request: ReadFile, sender: &Sender) -> Result<Outcome, Failure> {
    let root = agent.clone();
    let (file, size) = blocking(move || open_to_read(&root.root, &request.path)).await?;
    let file = Arc::new(file);
    opened(sender, size).await?;
    let chunk_bytes = match request.chunk_bytes {
        0 => DATA_BYTES_MAX,
        wished => (wished as usize).min(DATA_BYTES_MAX),
    };
    let end = if request.length == 0 { u64::MAX } else { request.offset.saturating_add(request.length) };
    let read_from = |offset| {
        let file = file.clone();
        blocking(move || read_chunks(&file, offset, end, chunk_bytes))
    };
    let mut offset = request.offset;
    let mut chunks = read_from(offset).await?;
    while !chunks.is_empty() {
        offset += chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        // The next chunks are read while these are under way.
        let send = async {
            for chunk in chunks.drain(..) {
                sender.data(Kind::Data, chunk).await.map_err(|_| gone())?;
            }
            Ok::<_, Failure>(())
        };
        let (sent, next) = tokio::join!(send, read_from(offset));
        sent?;
        chunks = next?;
    }
    Ok(Outcome::default())
}

fn open_to_read(root: &Root, path: &str) -> Result<(OwnedFd, u64), Failure> {
    // Not blocking, so that a FIFO without a writer or a device does not stop us here.
    let file = root.open_path(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
    let status = rustix::fs::fstat(&file)?;
    check_regular(&status)?;
    Ok((file, status.st_size as u64))
}

pub fn check_regular(status: &Stat) -> Result<(), Failure> {
    match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(Failure::with(Code::IsADirectory, "", Errno::ISDIR)),
        _ => Err(Failure::new(Code::NotARegularFile, "")),
    }
}

/// Some chunks from an offset on; none at the end.
fn read_chunks(file: &OwnedFd, mut offset: u64, end: u64, chunk_bytes: usize) -> Result<Vec<Bytes>, Failure> {
    let mut chunks = Vec::with_capacity(CHUNKS_AT_ONCE);
    while chunks.len() < CHUNKS_AT_ONCE && offset < end {
        let length = (end - offset).min(chunk_bytes as u64) as usize;
        let mut chunk = Vec::with_capacity(length);
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut chunk), offset) {
            Ok(0) => break,
            Ok(read) => offset += read as u64,
            Err(Errno::INTR) => continue,
            // An offset beyond what the kernel can count is beyond the end.
            Err(Errno::INVAL | Errno::OVERFLOW) if offset > i64::MAX as u64 / 2 => break,
            Err(errno) => return Err(errno.into()),
        }
        chunks.push(chunk.into());
    }
    Ok(chunks)
}
