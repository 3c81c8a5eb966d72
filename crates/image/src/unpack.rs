//! From the archive of a layer, which a stranger made, to a directory that overlayfs can stack.
//!
//! What becomes of an entry:
//!
//! | entry | |
//! |---|---|
//! | file, directory, link, FIFO | made, with its owner (0 to 65535), permissions (set-user-id bits too), time, and its attributes `user.*` and `security.capability` |
//! | hard link | to something that this layer has already; else refused |
//! | device node | left out: no sandbox may have one, and a character device 0:0 would be a whiteout |
//! | `.wh.NAME` | a whiteout; if the layer has a directory of that name, that one hides what lower layers have in it |
//! | `.wh..wh..opq` | its directory hides what lower layers have in it |
//! | other `.wh..wh.…` | left out: old storage drivers kept notes in them |
//!
//! A later entry replaces an earlier one of the same path; only a directory stays, with the attributes of the later entry. The order of whiteouts
//! and other entries of a layer does not matter: whiteouts are about lower layers. Directories that are missing above an entry
//! belong to root and have the mode 0755, as with Docker and Podman.
//!
//! Set-user-id files with real owners lie on the host: the directory of the layers must not be reachable but for root, and mounts of it are
//! mapped to the ids of a sandbox.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use crate::archive::{Archive, ArchiveError, Entry, Kind};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::tree::{self, Attributes, IMPLIED, Problem, Tree, WHITEOUT, components, is_directory, is_whiteout, refused};

/// Sandboxes have this many ids.
const IDS: u64 = 1 << 16;
const WHITEOUT_META: &[u8] = b".wh..wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// Of file contents, at once.
const BUFFER_BYTES: usize = 128 << 10;
/// What Linux keeps of one file's attributes, roughly.
const ATTRIBUTES_MAX: usize = 128;

/// What one layer may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of the archive, uncompressed.
    pub bytes_max: u64,
    pub entries_max: u64,
    /// Of uncompressed to compressed bytes.
    pub ratio_max: u64,
}

/// What a layer turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unpacked {
    pub entries: u64,
    /// Of files, as far as they are no holes.
    pub bytes: u64,
    /// Device nodes that were left out.
    pub devices: u64,
}

/// Makes what an archive holds beneath `root`, an empty directory that nobody else writes to. The reader is left behind the end
/// of the archive, and may have more.
pub fn unpack<R: Read>(
    reader: R,
    root: BorrowedFd<'_>,
    limits: &Limits,
    layer: &Digest,
) -> Result<(Unpacked, R), ImageError> {
    let mut unpacker =
        Unpacker { tree: Tree::new(root), root, buffer: vec![0; BUFFER_BYTES], done: Unpacked::default() };
    let mut archive = Archive::new(reader);
    let mut last = String::from("its beginning");
    set_root(root, &IMPLIED).map_err(|problem| told(problem, layer, &last))?;
    loop {
        let entry = match archive.next() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(error) => return Err(unreadable(error, layer, &last)),
        };
        last = format!("entry {} ({})", unpacker.done.entries + 1, shown(&entry.path));
        if unpacker.done.entries == limits.entries_max {
            return Err(ImageError::TooLarge {
                what: format!("the layer {layer} at {last}"),
                limit: format!("{} entries", limits.entries_max),
                setting: "images.layer_entries_max",
            });
        }
        unpacker.done.entries += 1;
        unpacker.apply(entry, &mut archive).map_err(|failure| match failure {
            Failure::Archive(error) => unreadable(error, layer, &last),
            Failure::Problem(problem) => told(problem, layer, &last),
        })?;
    }
    unpacker.tree.leave().map_err(|problem| told(problem, layer, &last))?;
    Ok((unpacker.done, archive.into_inner()))
}

fn told(problem: Problem, layer: &Digest, entry: &str) -> ImageError {
    let problem = match problem {
        Problem::Refused(problem) => problem,
        Problem::Host(Errno::NOSPC | Errno::DQUOT) => return ImageError::NoSpace,
        Problem::Host(error @ Errno::IO) => {
            return ImageError::Io { doing: format!("unpack the layer {layer} at {entry}"), source: error.into() };
        }
        Problem::Host(error) => format!("the file system of the images refuses it: {error}"),
    };
    ImageError::InvalidLayer { layer: *layer, entry: entry.into(), problem }
}

fn unreadable(error: ArchiveError, layer: &Digest, last: &str) -> ImageError {
    let invalid = |problem| ImageError::InvalidLayer { layer: *layer, entry: format!("what follows {last}"), problem };
    match error {
        ArchiveError::Invalid(problem) => invalid(problem),
        // What is below the archive has errors of its own: a limit, a connection that broke.
        ArchiveError::Read(error) => match error.downcast::<ImageError>() {
            Ok(error) => error,
            Err(error) => invalid(format!("it cannot be decompressed: {error}")),
        },
    }
}

/// The beginning of a path, for people.
fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(&path[..path.len().min(200)]).into_owned();
    let cut = if path.len() > 200 { "…" } else { "" };
    format!("{:?}{cut}", text)
}

enum Failure {
    Problem(Problem),
    Archive(ArchiveError),
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Self::Problem(Problem::Host(error))
    }
}

impl From<ArchiveError> for Failure {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error)
    }
}

struct Unpacker<'a> {
    tree: Tree<'a>,
    root: BorrowedFd<'a>,
    buffer: Vec<u8>,
    done: Unpacked,
}

impl Unpacker<'_> {
    fn apply<R: Read>(&mut self, entry: Entry, archive: &mut Archive<R>) -> Result<(), Failure> {
        let path = components(&entry.path)?;
        let (parent, name) = match path.split_last() {
            Some((name, parent)) => (parent, *name),
            None => return self.root(&entry),
        };
        if path.iter().any(|part| part.starts_with(WHITEOUT_META) && *part != WHITEOUT_OPAQUE) {
            return Ok(());
        }
        if parent.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(Problem::Refused("it lies below a whiteout".into()).into());
        }
        if name == WHITEOUT_OPAQUE {
            self.tree.enter(parent)?;
            return Ok(tree::hide_below(self.tree.parent())?);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            self.tree.enter(parent)?;
            return Ok(self.whiteout(hidden)?);
        }
        if entry.kind == Kind::Device {
            self.done.devices += 1;
            return Ok(());
        }
        let attributes = attributes_of(&entry)?;
        self.tree.enter(parent)?;
        match entry.kind {
            Kind::File => self.file(name, &entry, &attributes, archive),
            Kind::Directory => Ok(self.directory(name, &entry, &attributes)?),
            Kind::HardLink => Ok(self.hard_link(name, &entry.link)?),
            Kind::SymbolicLink => Ok(self.symbolic_link(name, &entry.link, &attributes)?),
            Kind::Fifo => Ok(self.fifo(name, &attributes)?),
            Kind::Device => Ok(()),
        }
    }

    /// The entry of the root itself, `./`.
    fn root(&mut self, entry: &Entry) -> Result<(), Failure> {
        if entry.kind != Kind::Directory {
            return Err(Problem::Refused("the root can only be a directory".into()).into());
        }
        let attributes = attributes_of(entry)?;
        self.tree.leave()?;
        set_extended(self.root, entry)?;
        Ok(set_root(self.root, &attributes)?)
    }

    fn whiteout(&mut self, hidden: &[u8]) -> Result<(), Problem> {
        if matches!(hidden, b"" | b"." | b"..") {
            return refused("it is a whiteout of no name");
        }
        match self.tree.look(hidden)? {
            None => tree::make_whiteout(self.tree.parent(), hidden),
            Some(found) if is_directory(&found) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory = rustix::fs::openat(self.tree.parent(), hidden, flags, Mode::empty())?;
                tree::hide_below(directory.as_fd())
            }
            // The layer's own file hides the lower one already.
            Some(_) => Ok(()),
        }
    }

    /// Makes room for something that is no directory.
    fn replace(&mut self, name: &[u8]) -> Result<(), Problem> {
        match self.tree.look(name)? {
            Some(found) => self.tree.remove(name, &found),
            None => Ok(()),
        }
    }

    fn directory(&mut self, name: &[u8], entry: &Entry, attributes: &Attributes) -> Result<(), Problem> {
        let found = self.tree.look(name)?;
        let hides = found.as_ref().is_some_and(is_whiteout);
        let directory = match found {
            Some(found) if is_directory(&found) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory = rustix::fs::openat(self.tree.parent(), name, flags, Mode::empty())?;
                tree::set_attributes(directory.as_fd(), attributes)?;
                directory
            }
            Some(found) => {
                self.tree.remove(name, &found)?;
                tree::make_directory(self.tree.parent(), name, attributes)?
            }
            None => tree::make_directory(self.tree.parent(), name, attributes)?,
        };
        if hides {
            tree::hide_below(directory.as_fd())?;
        }
        set_extended(directory.as_fd(), entry)?;
        Ok(rustix::fs::futimens(&directory, &attributes.times())?)
    }

    fn file<R: Read>(
        &mut self,
        name: &[u8],
        entry: &Entry,
        attributes: &Attributes,
        archive: &mut Archive<R>,
    ) -> Result<(), Failure> {
        self.replace(name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(self.tree.parent(), name, flags, Mode::RUSR | Mode::WUSR)?);
        let whole = [(0, entry.size)];
        let parts = entry.sparse.as_ref().map_or(&whole[..], |sparse| &sparse.parts);
        for &(offset, length) in parts {
            let (mut at, end) = (offset, offset + length);
            while at < end {
                let most = (end - at).min(BUFFER_BYTES as u64) as usize;
                let read = archive.read(&mut self.buffer[..most])?;
                if read == 0 {
                    return Err(ArchiveError::Invalid("the archive ends in the middle of a file".into()).into());
                }
                let wrote = file.write_all_at(&self.buffer[..read], at);
                wrote.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
                at += read as u64;
                self.done.bytes += read as u64;
            }
        }
        if let Some(sparse) = &entry.sparse {
            rustix::fs::ftruncate(&file, sparse.size)?;
        }
        tree::set_attributes(file.as_fd(), attributes)?;
        set_extended(file.as_fd(), entry)?;
        Ok(rustix::fs::futimens(&file, &attributes.times())?)
    }

    fn hard_link(&mut self, name: &[u8], target: &[u8]) -> Result<(), Problem> {
        let absent = || {
            let problem = "a hard link to something that this layer does not have; links into lower layers are not supported, \
                nor are they by Docker's overlay2: the tool that made the image has to put the file into the layer";
            refused(format!("{} is {problem}", shown(target)))
        };
        let path = components(target)?;
        let Some((target_name, parent)) = path.split_last() else { return refused("a hard link to the root") };
        let directory = match self.tree.existing(parent) {
            Ok(directory) => directory,
            Err(Problem::Refused(_)) => return absent(),
            Err(other) => return Err(other),
        };
        let found = match rustix::fs::statat(&directory, *target_name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => found,
            Err(Errno::NOENT) => return absent(),
            Err(error) => return Err(error.into()),
        };
        if is_directory(&found) {
            return refused("a hard link to a directory");
        }
        if is_whiteout(&found) {
            return absent();
        }
        if let Some(own) = self.tree.look(name)? {
            if (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino) {
                return Ok(());
            }
            if is_directory(&own) {
                return refused("a hard link in the place of a directory");
            }
            self.tree.remove(name, &own)?;
        }
        Ok(rustix::fs::linkat(&directory, *target_name, self.tree.parent(), name, AtFlags::empty())?)
    }

    fn symbolic_link(&mut self, name: &[u8], target: &[u8], attributes: &Attributes) -> Result<(), Problem> {
        if target.is_empty() || target.contains(&0) {
            return refused("a symbolic link to nothing");
        }
        self.replace(name)?;
        let at = self.tree.parent();
        rustix::fs::symlinkat(target, at, name)?;
        let (uid, gid) = attributes.owner();
        rustix::fs::chownat(at, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(rustix::fs::utimensat(at, name, &attributes.times(), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn fifo(&mut self, name: &[u8], attributes: &Attributes) -> Result<(), Problem> {
        self.replace(name)?;
        let at = self.tree.parent();
        rustix::fs::mknodat(at, name, FileType::Fifo, Mode::empty(), 0)?;
        let (uid, gid) = attributes.owner();
        rustix::fs::chownat(at, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        rustix::fs::chmodat(at, name, attributes.mode(), AtFlags::empty())?;
        Ok(rustix::fs::utimensat(at, name, &attributes.times(), AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

fn set_root(root: BorrowedFd<'_>, attributes: &Attributes) -> Result<(), Problem> {
    tree::set_attributes(root, attributes)?;
    Ok(rustix::fs::futimens(root, &attributes.times())?)
}

fn attributes_of(entry: &Entry) -> Result<Attributes, Problem> {
    if entry.uid >= IDS || entry.gid >= IDS {
        return refused(format!(
            "it belongs to {}:{}, and sandboxes have the ids 0 to {} only",
            entry.uid,
            entry.gid,
            IDS - 1
        ));
    }
    // What every file system of Linux can hold.
    let modified = (entry.modified.0.clamp(-(1 << 31), (1 << 33) - 1), entry.modified.1);
    Ok(Attributes { uid: entry.uid as u32, gid: entry.gid as u32, mode: entry.mode, modified })
}

/// Whether an image may set this attribute. Those of overlayfs would change what other layers show, and those of security modules are
/// the host's business.
fn is_kept(name: &[u8]) -> bool {
    name == b"security.capability" || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}

fn set_extended(of: BorrowedFd<'_>, entry: &Entry) -> Result<(), Problem> {
    for (name, value) in entry.attributes.iter().filter(|(name, _)| is_kept(name)).take(ATTRIBUTES_MAX) {
        if name.contains(&0) || name.len() > 255 {
            return refused("an extended attribute without a usable name");
        }
        let set = rustix::fs::fsetxattr(of, name.as_slice(), value, XattrFlags::empty());
        if let Err(error) = set {
            let name = String::from_utf8_lossy(name).into_owned();
            // ext4 also says "no space" of a value that is too long for one file.
            return refused(format!("the extended attribute {name:?} of {} bytes cannot be set: {error}", value.len()));
        }
    }
    Ok(())
}
