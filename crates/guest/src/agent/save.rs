//! Writing files.
//!
//! The content is collected first, out of sight, and saved when it is complete: so a client that goes away in the
//! middle changes nothing. A file that is there is then written in place, as any program saves it: whatever leads to
//! it leads to the new content. A new one appears whole. See docs/decisions/0014-saving-files.md.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use nagaya_api::error::Code;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RawMode, Stat, StatxAttributes, StatxFlags, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::failure::Failure;
use super::files::{check_regular, gone, opened};
use super::paths::{Place, Root};
use super::{Agent, blocking, charge as memory, directories};
use crate::frame::DATA_BYTES_MAX;
use crate::messages::{Outcome, WriteFile, Written};
use crate::mux::{Incoming, Receiver, Sender, charge};

/// Content that is kept in memory until it is complete; more of it goes to a file without a name.
const HELD_BYTES_MAX: usize = 512 * 1024;
/// Chunks that are written by one visit to a blocking thread.
const CHUNKS_AT_ONCE: usize = 8;
/// Window beyond the initial one.
const WIDER_WINDOW_BYTES: u32 = 768 * 1024;
/// Attempts when a file comes and goes while it is saved.
const RACES_MAX: usize = 64;
/// Directories between one and the root of its file system.
const DEPTH_MAX: usize = 4096;

/// Two clients that save one file do it one after the other. A lock is for all files whose numbers have it in common.
static SAVING: [Mutex<()>; 32] = [const { Mutex::new(()) }; 32];

/// Receives the content of a file and saves it when it is complete.
pub async fn write(
    agent: &Arc<Agent>,
    request: WriteFile,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    let root = agent.clone();
    let mut save = blocking(move || Save::begin(&root.root, request)).await?;
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
        if !save.hold(&chunks) {
            save = blocking(move || save.draft(&chunks)).await?;
        }
        receiver.release(cost);
    }
    let root = agent.clone();
    let bytes = blocking(move || save.finish(&root.root)).await?;
    let written = Written { bytes };
    Ok(Outcome { kind: written.into() })
}

/// A file that is being received.
struct Save {
    request: WriteFile,
    /// `None` while directories above it are missing: they are made when the content is complete.
    place: Option<Place>,
    /// A directory of the file system that the file will be on.
    near: OwnedFd,
    /// The content so far, where there is no draft.
    held: Vec<u8>,
    draft: Option<Draft>,
}

/// Content in a file that nobody sees. Dropping it leaves no trace.
struct Draft {
    file: OwnedFd,
    bytes: u64,
    /// Where it lies, and its name where the file system makes no files without one.
    name: Option<(OwnedFd, CString)>,
}

fn is_a_directory() -> Failure {
    Failure::with(Code::IsADirectory, "", Errno::ISDIR)
}

impl Save {
    /// Finds out what can be wrong with the request. Nothing is changed.
    fn begin(root: &Root, request: WriteFile) -> Result<Self, Failure> {
        let (place, near) = match root.followed_place(&request.path) {
            Ok(Some(place)) => {
                check(&place)?;
                let near = place.directory.try_clone()?;
                (Some(place), near)
            }
            Ok(None) => return Err(is_a_directory()),
            Err(failure) if failure.code == Code::FileNotFound => {
                if matches!(request.path.rsplit('/').next(), Some("" | "." | "..")) {
                    return Err(is_a_directory());
                }
                (None, directories::nearest(root, &request.path)?)
            }
            Err(failure) => return Err(failure),
        };
        Ok(Self { request, place, near, held: Vec::new(), draft: None })
    }

    /// Keeps chunks in memory, if there is room.
    fn hold(&mut self, chunks: &[Bytes]) -> bool {
        let length: usize = chunks.iter().map(Bytes::len).sum();
        let fits = self.draft.is_none() && self.held.len() + length <= HELD_BYTES_MAX;
        if fits {
            chunks.iter().for_each(|chunk| self.held.extend_from_slice(chunk));
        }
        fits
    }

    fn draft(mut self, chunks: &[Bytes]) -> Result<Self, Failure> {
        let draft = self.drafted()?;
        memory::reserve(&draft.file, draft.bytes, chunks.iter().map(|chunk| chunk.len() as u64).sum())?;
        for chunk in chunks {
            write_at(&draft.file, chunk, draft.bytes)?;
            draft.bytes += chunk.len() as u64;
        }
        Ok(self)
    }

    /// The draft, with all content so far.
    fn drafted(&mut self) -> Result<&mut Draft, Failure> {
        let draft = match self.draft.take() {
            Some(draft) => draft,
            None => {
                let mut draft = Draft::begin(&self.near)?;
                memory::reserve(&draft.file, 0, self.held.len() as u64)?;
                write_at(&draft.file, &self.held, 0)?;
                draft.bytes = self.held.len() as u64;
                self.held = Vec::new();
                draft
            }
        };
        Ok(self.draft.insert(draft))
    }

    fn bytes(&self) -> u64 {
        self.draft.as_ref().map_or(self.held.len() as u64, |draft| draft.bytes)
    }

    /// Saves the content, which is complete; its length.
    fn finish(mut self, root: &Root) -> Result<u64, Failure> {
        let place = match self.place.take() {
            Some(place) => place,
            None => {
                directories::make_parents(root, &self.request.path)?;
                let place = root.followed_place(&self.request.path)?.ok_or_else(is_a_directory)?;
                check(&place)?;
                place
            }
        };
        for _ in 0..RACES_MAX {
            match open_existing(&place) {
                Ok(file) => self.save_over(&file)?,
                // A program that runs, or a lease: the name can have another file.
                Err(errno @ (Errno::TXTBSY | Errno::AGAIN)) => self.replace(&place, errno)?,
                Err(Errno::NOENT) => match self.appear(root, &place) {
                    // Somebody was faster.
                    Err(failure) if failure.errno == Errno::EXIST.raw_os_error() => continue,
                    other => other?,
                },
                Err(errno) => return Err(errno.into()),
            }
            return Ok(self.bytes());
        }
        Err(Errno::EXIST.into())
    }

    /// Writes the content over that of a file.
    fn save_over(&self, file: &OwnedFd) -> Result<(), Failure> {
        let bytes = self.bytes();
        let number = rustix::fs::fstat(file)?.st_ino;
        let _alone = SAVING[number as usize % SAVING.len()].lock().unwrap_or_else(PoisonError::into_inner);
        let before = rustix::fs::fstat(file)?;
        let power = Power::of(file, &before);
        reserve(file, &before, bytes)?;
        match &self.draft {
            Some(draft) => copy(&draft.file, file, bytes)?,
            None => write_at(file, &self.held, 0)?,
        }
        // Also for nothing over nothing, which is a change of the file to those who watch it.
        if self.request.truncate && (bytes < before.st_size as u64 || bytes == 0) {
            rustix::fs::ftruncate(file, bytes)?;
        }
        power.give_back(file)?;
        if self.request.sync {
            rustix::fs::fsync(file)?;
        }
        Ok(())
    }

    /// Gives the content a name that nothing has.
    fn appear(&mut self, root: &Root, place: &Place) -> Result<(), Failure> {
        let (mode, sync) = (if self.request.mode == 0 { 0o644 } else { self.request.mode }, self.request.sync);
        let draft = self.drafted()?;
        draft.belong_to(root.owner, mode as RawMode)?;
        if sync {
            rustix::fs::fsync(&draft.file)?;
        }
        match &draft.name {
            Some((directory, name)) => {
                let flags = rustix::fs::RenameFlags::NOREPLACE;
                rustix::fs::renameat_with(directory, name, &place.directory, &place.name, flags)?;
                draft.name = None;
            }
            None => link(&draft.file, &place.directory, &place.name)?,
        }
        // Those who watch for the end of a save hear of it.
        drop(open_existing(place));
        if sync { sync_directory(place) } else { Ok(()) }
    }

    /// Gives the name of a file that cannot be written now to the content.
    fn replace(&mut self, place: &Place, why: Errno) -> Result<(), Failure> {
        if !self.request.truncate {
            return Err(why.into());
        }
        let before = rustix::fs::statat(&place.directory, &place.name, AtFlags::SYMLINK_NOFOLLOW)?;
        check_regular(&before)?;
        let sync = self.request.sync;
        let draft = self.drafted()?;
        let owner = (Uid::from_raw(before.st_uid), Gid::from_raw(before.st_gid));
        draft.belong_to(owner, before.st_mode as RawMode)?;
        if sync {
            rustix::fs::fsync(&draft.file)?;
        }
        let Place { directory, name, .. } = place;
        match &draft.name {
            Some((from, old_name)) => {
                rustix::fs::renameat(from, old_name, directory, name)?;
                draft.name = None;
            }
            None => {
                // A name can only be taken over by renaming, so the draft needs one for a moment.
                let passing = draft_name();
                link(&draft.file, directory, &passing)?;
                rustix::fs::renameat(directory, &passing, directory, name).inspect_err(|_| {
                    let _ = rustix::fs::unlinkat(directory, &passing, AtFlags::empty());
                })?;
            }
        }
        if sync { sync_directory(place) } else { Ok(()) }
    }
}

/// Refuses a place where no file can be written.
fn check(place: &Place) -> Result<(), Failure> {
    match rustix::fs::statat(&place.directory, &place.name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(status) => {
            check_regular(&status)?;
            if place.directory_meant { Err(Errno::NOTDIR.into()) } else { Ok(()) }
        }
        Err(Errno::NOENT) if place.directory_meant => Err(is_a_directory()),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn open_existing(place: &Place) -> Result<OwnedFd, Errno> {
    // Not blocking, for whatever took the file's place meanwhile.
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&place.directory, &place.name, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(Errno::NXIO);
    }
    // What is in /proc acts on processes, this one among them, with the agent's rights.
    if rustix::fs::fstatfs(&file)?.f_type == rustix::fs::PROC_SUPER_MAGIC {
        return Err(Errno::ACCESS);
    }
    Ok(file)
}

/// What a file grants to whoever executes it. Writing takes that away; its owner wished it to stay.
struct Power {
    mode: Option<Mode>,
    capabilities: Option<Vec<u8>>,
}

const CAPABILITIES: &str = "security.capability";

impl Power {
    fn of(file: &OwnedFd, status: &Stat) -> Self {
        let mode = status.st_mode as RawMode & 0o7777;
        let mut capabilities = [0u8; 64];
        let length = rustix::fs::fgetxattr(file, CAPABILITIES, &mut capabilities[..]).ok();
        Self {
            mode: (mode & 0o6000 != 0).then(|| Mode::from_raw_mode(mode)),
            capabilities: length.map(|length| capabilities[..length].to_vec()),
        }
    }

    fn give_back(&self, file: &OwnedFd) -> Result<(), Errno> {
        if let Some(mode) = self.mode {
            rustix::fs::fchmod(file, mode)?;
        }
        if let Some(capabilities) = &self.capabilities {
            rustix::fs::fsetxattr(file, CAPABILITIES, capabilities, XattrFlags::empty())?;
        }
        Ok(())
    }
}

/// Takes the space that a file will need, so that a full disk is found out before anything is written over.
fn reserve(file: &OwnedFd, status: &Stat, bytes: u64) -> Result<(), Failure> {
    if bytes <= status.st_blocks as u64 * 512 {
        return Ok(());
    }
    memory::reserve(file, 0, bytes)?;
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, bytes) {
        // This file system cannot tell before.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        other => Ok(other?),
    }
}

impl Draft {
    fn begin(near: &OwnedFd) -> Result<Self, Failure> {
        let directory = root_of_filesystem(near)?;
        let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        match rustix::fs::openat(&directory, c".", flags | OFlags::TMPFILE, mode) {
            Ok(file) => return Ok(Self { file, bytes: 0, name: None }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
        let name = draft_name();
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&directory, &name, flags, mode)?;
        Ok(Self { file, bytes: 0, name: Some((directory, name)) })
    }

    fn belong_to(&self, (user, group): (Uid, Gid), mode: RawMode) -> Result<(), Errno> {
        rustix::fs::fchown(&self.file, Some(user), Some(group))?;
        // After the owner, whose change takes away set-user-id bits.
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(mode & 0o7777))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some((directory, name)) = &self.name {
            let _ = rustix::fs::unlinkat(directory, name, AtFlags::empty());
        }
    }
}

/// Drafts lie in the root of their file system: whoever watches a directory hears of files without a name in it, too.
fn root_of_filesystem(near: &OwnedFd) -> Result<OwnedFd, Errno> {
    let mut directory = near.try_clone().map_err(|_| Errno::MFILE)?;
    for _ in 0..DEPTH_MAX {
        let found = rustix::fs::statx(&directory, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
        if found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            break;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        directory = rustix::fs::openat(&directory, c"..", flags, Mode::empty())?;
    }
    Ok(directory)
}

fn draft_name() -> CString {
    CString::new(format!(".nagaya-{:016x}", super::random())).expect("digits hold no NUL")
}

fn link(file: &OwnedFd, directory: &OwnedFd, name: &CString) -> Result<(), Errno> {
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, itself, directory, name, AtFlags::SYMLINK_FOLLOW) {
        // Without /proc there is another way, which older kernels keep for themselves.
        Err(Errno::NOENT) => rustix::fs::linkat(file, c"", directory, name, AtFlags::EMPTY_PATH),
        other => other,
    }
}

fn sync_directory(place: &Place) -> Result<(), Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(&place.directory, c".", flags, Mode::empty())?;
    Ok(rustix::fs::fsync(directory)?)
}

fn write_at(file: &OwnedFd, content: &[u8], mut offset: u64) -> Result<(), Errno> {
    let mut rest = content;
    while !rest.is_empty() {
        match rustix::io::pwrite(file, rest, offset) {
            Ok(written) => {
                rest = &rest[written..];
                offset += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Copies within the kernel, where it can.
fn copy(from: &OwnedFd, to: &OwnedFd, bytes: u64) -> Result<(), Errno> {
    let (mut read, mut written) = (0, 0);
    while read < bytes {
        let length = usize::try_from(bytes - read).unwrap_or(usize::MAX).min(1 << 30);
        match rustix::fs::copy_file_range(from.as_fd(), Some(&mut read), to.as_fd(), Some(&mut written), length) {
            Ok(0) => return Err(Errno::IO),
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return copy_by_hand(from, to, read),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &OwnedFd, to: &OwnedFd, mut offset: u64) -> Result<(), Errno> {
    let mut buffer = vec![0; DATA_BYTES_MAX];
    loop {
        match rustix::io::pread(from, &mut buffer[..], offset) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                write_at(to, &buffer[..length], offset)?;
                offset += length as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
