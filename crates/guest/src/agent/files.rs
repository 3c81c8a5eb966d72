//! Reading and writing the content of files.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use nagaya_api::error::Code;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, RawMode, Stat, Uid};
use rustix::io::Errno;

use super::failure::Failure;
use super::paths::{Place, Root};
use super::program::TENKI;
use super::{Agent, blocking};
use crate::frame::{DATA_BYTES_MAX, Kind};
use crate::messages::{Event, Opened, Outcome, ReadFile, WriteFile, Written, encode};
use crate::mux::{Incoming, Receiver, Sender, charge};

/// Chunks that are read or written by one visit to a blocking thread.
const CHUNKS_AT_ONCE: usize = 8;
/// Window beyond the initial one for content that comes in.
const WIDER_WINDOW_BYTES: u32 = 768 * 1024;

async fn opened(sender: &Sender, total_size: u64) -> Result<(), Failure> {
    let event = Event { kind: Opened { total_size }.into() };
    sender.message(encode(&event)).await.map_err(|_| gone())
}

/// Nobody listens any more, so the text does not matter.
fn gone() -> Failure {
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

fn check_regular(status: &Stat) -> Result<(), Failure> {
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

/// Receives the content of a file and puts it in place at once, when it is complete.
pub async fn write(
    agent: &Arc<Agent>,
    request: WriteFile,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    let root = agent.clone();
    let (sync, mut offset) = (request.sync, 0);
    let draft = Arc::new(blocking(move || Draft::begin(&root.root, &request)).await?);
    opened(sender, 0).await?;
    receiver.widen(WIDER_WINDOW_BYTES);
    let mut complete = false;
    while !complete {
        let mut chunks = Vec::new();
        let mut next = receiver.next().await;
        while let Some(incoming) = next {
            match incoming {
                Incoming::Data(chunk) => chunks.push(chunk),
                Incoming::End(_) => {
                    complete = true;
                    break;
                }
                Incoming::Message(_) => {}
                Incoming::Reset | Incoming::ErrorData(_) => return Err(gone()),
            }
            next = if chunks.len() < CHUNKS_AT_ONCE { receiver.try_next() } else { None };
        }
        if chunks.is_empty() && !complete {
            return Err(gone());
        }
        let cost = chunks.iter().map(|chunk| charge(chunk.len())).sum();
        let length = chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
        let draft = draft.clone();
        blocking(move || draft.write(&chunks, offset)).await?;
        offset += length;
        receiver.release(cost);
    }
    blocking(move || draft.publish(sync)).await?;
    let written = Written { bytes: offset };
    Ok(Outcome { kind: written.into() })
}

/// The new content of a file, before anybody can see it. Dropping it leaves no trace.
struct Draft {
    file: OwnedFd,
    place: Place,
    /// A file is there already, to be replaced.
    replaces: bool,
    /// The draft's own name, where the file system makes no files without one.
    name: Option<CString>,
}

impl Draft {
    fn begin(root: &Root, request: &WriteFile) -> Result<Self, Failure> {
        let is_a_directory = || Failure::with(Code::IsADirectory, "", Errno::ISDIR);
        let place = root.followed_place(&request.path)?.ok_or_else(is_a_directory)?;
        let existing = match rustix::fs::statat(&place.directory, &place.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) => {
                check_regular(&status)?;
                Some(status)
            }
            Err(Errno::NOENT) => None,
            Err(errno) => return Err(errno.into()),
        };
        if place.directory_meant {
            return Err(if existing.is_some() { Errno::NOTDIR.into() } else { is_a_directory() });
        }
        let (file, name) = unnamed_file(&place)?;
        let draft = Self { file, place, replaces: existing.is_some(), name };
        draft.prepare(root, existing, request)?;
        Ok(draft)
    }

    fn prepare(&self, root: &Root, existing: Option<Stat>, request: &WriteFile) -> Result<(), Failure> {
        let (owner, group, mode) = match &existing {
            Some(status) => (status.st_uid, status.st_gid, status.st_mode as RawMode & 0o7777),
            None => (TENKI, TENKI, if request.mode == 0 { 0o644 } else { request.mode as RawMode & 0o7777 }),
        };
        rustix::fs::fchown(&self.file, Some(Uid::from_raw(owner)), Some(Gid::from_raw(group)))?;
        // After the owner, whose change takes away set-user-id bits.
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(mode))?;
        if existing.is_some() && !request.truncate {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY;
            let old = root.open_at(self.place.directory.as_fd(), self.place.name.as_bytes(), flags)?;
            check_regular(&rustix::fs::fstat(&old)?)?;
            copy(&old, &self.file)?;
        }
        Ok(())
    }

    fn write(&self, chunks: &[Bytes], mut offset: u64) -> Result<(), Failure> {
        for chunk in chunks {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                match rustix::io::pwrite(&self.file, rest, offset) {
                    Ok(written) => {
                        rest = &rest[written..];
                        offset += written as u64;
                    }
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        Ok(())
    }

    /// Gives the draft the file's name.
    fn publish(&self, sync: bool) -> Result<(), Failure> {
        if sync {
            rustix::fs::fsync(&self.file)?;
        }
        let Place { directory, name, .. } = &self.place;
        match &self.name {
            Some(draft) => rustix::fs::renameat(directory, draft, directory, name)?,
            None if self.replaces => self.replace()?,
            None => match link(&self.file, directory, name) {
                // Somebody was faster; the later writer wins.
                Err(Errno::EXIST) => self.replace()?,
                other => other?,
            },
        }
        if sync {
            let directory = rustix::fs::openat(
                directory,
                c".",
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            rustix::fs::fsync(directory)?;
        }
        Ok(())
    }

    /// A name can only be taken over by renaming, so the draft needs one for a moment.
    fn replace(&self) -> Result<(), Errno> {
        let Place { directory, name, .. } = &self.place;
        let draft = draft_name();
        link(&self.file, directory, &draft)?;
        rustix::fs::renameat(directory, &draft, directory, name).inspect_err(|_| {
            let _ = rustix::fs::unlinkat(directory, &draft, AtFlags::empty());
        })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // After it was published there is nothing of that name, which is as well.
            let _ = rustix::fs::unlinkat(&self.place.directory, name, AtFlags::empty());
        }
    }
}

fn draft_name() -> CString {
    CString::new(format!(".nagaya-{:016x}", super::random())).expect("digits hold no NUL")
}

fn unnamed_file(place: &Place) -> Result<(OwnedFd, Option<CString>), Failure> {
    let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    match rustix::fs::openat(&place.directory, c".", flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok((file, None)),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    let name = draft_name();
    let file =
        rustix::fs::openat(&place.directory, &name, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
    Ok((file, Some(name)))
}

fn link(file: &OwnedFd, directory: &OwnedFd, name: &CString) -> Result<(), Errno> {
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, itself, directory, name, AtFlags::SYMLINK_FOLLOW) {
        // Without /proc there is another way, which older kernels keep for themselves.
        Err(Errno::NOENT) => rustix::fs::linkat(file, c"", directory, name, AtFlags::EMPTY_PATH),
        other => other,
    }
}

fn copy(from: &OwnedFd, to: &OwnedFd) -> Result<(), Failure> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let mut offset = 0;
    loop {
        let chunks = read_chunks(from, offset, u64::MAX, DATA_BYTES_MAX)?;
        if chunks.is_empty() {
            return Ok(());
        }
        for chunk in chunks {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let written = rustix::io::pwrite(to, rest, offset)?;
                rest = &rest[written..];
                offset += written as u64;
            }
        }
    }
}
