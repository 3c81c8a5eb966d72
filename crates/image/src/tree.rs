//! A directory that is filled by strangers: every path is looked up beneath it, component by component, and every name is opened in
//! a directory that was opened before.
//!
//! Nobody else writes into it, so that what was looked at stays as it was. Everything here is of one layer: what exists
//! was made by it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::archive::PATH_BYTES_MAX;

/// Names that begin with it are no files, but say what becomes of lower layers.
pub(crate) const WHITEOUT: &[u8] = b".wh.";
/// Directories above a file. Some code holds a descriptor for each of them.
pub(crate) const DEPTH_MAX: usize = 128;
const NAME_BYTES_MAX: usize = 255;
/// As many as Linux follows.
const LINKS_MAX: usize = 40;
/// Of what overlayfs takes a directory for that hides the same one below.
pub(crate) const OPAQUE: &str = "trusted.overlay.opaque";

/// Why something cannot be made: the stranger's fault, or the host's word.
#[derive(Debug)]
pub(crate) enum Problem {
    Refused(String),
    Host(Errno),
}

impl From<Errno> for Problem {
    fn from(error: Errno) -> Self {
        Self::Host(error)
    }
}

pub(crate) fn refused<T>(problem: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Refused(problem.into()))
}

/// Owner, permissions and time of something that is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub modified: (i64, u32),
}

/// Of directories and whiteouts that a layer needs without having said so.
pub(crate) const IMPLIED: Attributes = Attributes { uid: 0, gid: 0, mode: 0o755, modified: (0, 0) };

impl Attributes {
    pub fn owner(&self) -> (Option<Uid>, Option<Gid>) {
        (Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))
    }

    pub fn mode(&self) -> Mode {
        Mode::from_raw_mode(self.mode)
    }

    pub fn times(&self) -> Timestamps {
        times(Timespec { tv_sec: self.modified.0, tv_nsec: self.modified.1.into() })
    }
}

fn times(modified: Timespec) -> Timestamps {
    Timestamps { last_access: modified, last_modification: modified }
}

/// The parts of a path as an archive has it: never absolute, never `..`. Empty is the root.
pub(crate) fn components(path: &[u8]) -> Result<Vec<&[u8]>, Problem> {
    if path.contains(&0) {
        return refused("its name has a byte 0");
    }
    if path.len() > PATH_BYTES_MAX {
        return refused(format!("its name has more than {PATH_BYTES_MAX} bytes"));
    }
    let parts: Vec<_> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return refused("its name leads out of a directory with '..'");
    }
    if parts.iter().any(|part| part.len() > NAME_BYTES_MAX) {
        return refused(format!("a part of its name has more than {NAME_BYTES_MAX} bytes"));
    }
    if parts.len() > DEPTH_MAX {
        return refused(format!("it lies in more than {DEPTH_MAX} directories"));
    }
    Ok(parts)
}

pub(crate) fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(&b'/')
}

const NO_PATH: &[u8] = b"\0";

/// The directory that entries are made in now. What is made in it changes its time, which is put back when it is left.
struct Parent {
    path: Vec<u8>,
    directory: OwnedFd,
    modified: Timespec,
}

pub(crate) struct Tree<'a> {
    root: BorrowedFd<'a>,
    parent: Option<Parent>,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl<'a> Tree<'a> {
    pub fn new(root: BorrowedFd<'a>) -> Self {
        Self { root, parent: None }
    }

    /// Opens a directory that something is to be made in; it is made where it is missing. Links of the layer itself are followed, as
    /// they lead when the layer is the root.
    pub fn enter(&mut self, path: &[&[u8]]) -> Result<(), Problem> {
        let path = join(path);
        if self.parent.as_ref().is_some_and(|parent| parent.path == path) {
            return Ok(());
        }
        self.leave()?;
        let directory = self.directory(&path, true)?;
        let modified = modified_of(&rustix::fs::fstat(&directory)?);
        self.parent = Some(Parent { path, directory, modified });
        Ok(())
    }

    /// Puts the time of the directory back that was entered.
    pub fn leave(&mut self) -> Result<(), Problem> {
        if let Some(parent) = self.parent.take() {
            rustix::fs::futimens(&parent.directory, &times(parent.modified))?;
        }
        Ok(())
    }

    /// The directory that was entered.
    pub fn parent(&self) -> BorrowedFd<'_> {
        self.parent.as_ref().map_or(self.root, |parent| parent.directory.as_fd())
    }

    /// What has this name in the directory that was entered.
    pub fn look(&self, name: &[u8]) -> Result<Option<Stat>, Problem> {
        look(self.parent(), name)
    }

    /// Removes what has this name, with all that is in it.
    pub fn remove(&mut self, name: &[u8], found: &Stat) -> Result<(), Problem> {
        match is_directory(found) {
            true => remove_directory(self.parent(), name)?,
            false => rustix::fs::unlinkat(self.parent(), name, AtFlags::empty())?,
        }
        // A path may have led here through what is gone: the next one is looked up, also if it is the same.
        if let Some(parent) = &mut self.parent {
            parent.path = NO_PATH.to_vec();
        }
        Ok(())
    }

    /// Opens a directory of the layer; `None` stands for what is not there, unless it is to be made.
    fn directory(&self, path: &[u8], make: bool) -> Result<OwnedFd, Problem> {
        let here = if path.is_empty() { b"." } else { path };
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        match rustix::fs::openat2(self.root, here, DIRECTORY, Mode::empty(), resolve) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => self.walk(path, make),
            outcome => Ok(outcome?),
        }
    }

    /// The same, one part after the other: follows links and makes what is missing.
    fn walk(&self, path: &[u8], make: bool) -> Result<OwnedFd, Problem> {
        let parts = |path: &[u8]| -> Vec<Vec<u8>> {
            let named = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
            named.map(<[u8]>::to_vec).collect()
        };
        let mut todo: VecDeque<_> = parts(path).into();
        // Where the walk is, as directories that are none but that: `..` needs those above.
        let mut opened: Vec<(Vec<u8>, OwnedFd)> = Vec::new();
        let mut links = 0;
        while let Some(part) = todo.pop_front() {
            if part == b".." {
                opened.pop();
                continue;
            }
            let at = opened.last().map_or(self.root, |(_, directory)| directory.as_fd());
            let found = look(at, &part)?;
            match &found {
                Some(found) if is_directory(found) => {}
                Some(found) if FileType::from_raw_mode(found.st_mode) == FileType::Symlink => {
                    links += 1;
                    if links > LINKS_MAX {
                        return refused("too many links lead to it");
                    }
                    let target = rustix::fs::readlinkat(at, part.as_slice(), Vec::new())?.into_bytes();
                    if target.starts_with(b"/") {
                        opened.clear();
                    }
                    for part in parts(&target).into_iter().rev() {
                        todo.push_front(part);
                    }
                    continue;
                }
                Some(found) if make && is_whiteout(found) => {
                    keeping_time(at, || {
                        rustix::fs::unlinkat(at, part.as_slice(), AtFlags::empty())?;
                        let directory = make_directory(at, &part, &IMPLIED)?;
                        hide_below(directory.as_fd())
                    })?;
                }
                None if make && part.starts_with(WHITEOUT) => return refused("a link leads it below a whiteout"),
                None if make => keeping_time(at, || make_directory(at, &part, &IMPLIED).map(drop))?,
                Some(_) => return refused(format!("{:?} above it is no directory", String::from_utf8_lossy(&part))),
                None => return refused(format!("{:?} above it is not in this layer", String::from_utf8_lossy(&part))),
            }
            let directory = rustix::fs::openat(at, part.as_slice(), DIRECTORY, Mode::empty())?;
            opened.push((part, directory));
            let length = opened.iter().map(|(part, _)| part.len() + 1).sum::<usize>();
            if opened.len() > DEPTH_MAX || length > PATH_BYTES_MAX {
                return refused(format!(
                    "links lead it into more than {DEPTH_MAX} directories or {PATH_BYTES_MAX} bytes"
                ));
            }
        }
        match opened.pop() {
            Some((_, directory)) => Ok(directory),
            None => Ok(rustix::fs::openat(self.root, ".", DIRECTORY, Mode::empty())?),
        }
    }

    /// Opens the directory of something that the layer has already.
    pub fn existing(&self, path: &[&[u8]]) -> Result<OwnedFd, Problem> {
        self.directory(&join(path), false)
    }
}

/// Makes a directory, and gives it.
pub(crate) fn make_directory(at: BorrowedFd<'_>, name: &[u8], attributes: &Attributes) -> Result<OwnedFd, Problem> {
    rustix::fs::mkdirat(at, name, Mode::RWXU)?;
    let directory = rustix::fs::openat(at, name, DIRECTORY, Mode::empty())?;
    set_attributes(directory.as_fd(), attributes)?;
    rustix::fs::futimens(&directory, &attributes.times())?;
    Ok(directory)
}

/// Owner and permissions, in this order: a new owner takes set-user-id bits away.
pub(crate) fn set_attributes(of: BorrowedFd<'_>, attributes: &Attributes) -> Result<(), Problem> {
    let (uid, gid) = attributes.owner();
    rustix::fs::fchown(of, uid, gid)?;
    Ok(rustix::fs::fchmod(of, attributes.mode())?)
}

/// Makes a directory hide what lower layers have in it.
pub(crate) fn hide_below(directory: BorrowedFd<'_>) -> Result<(), Problem> {
    Ok(rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())?)
}

/// Makes a whiteout, as overlayfs knows it: a character device 0:0.
pub(crate) fn make_whiteout(at: BorrowedFd<'_>, name: &[u8]) -> Result<(), Problem> {
    rustix::fs::mknodat(at, name, FileType::CharacterDevice, Mode::empty(), 0)?;
    let (uid, gid) = IMPLIED.owner();
    rustix::fs::chownat(at, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(rustix::fs::utimensat(at, name, &IMPLIED.times(), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn keeping_time(directory: BorrowedFd<'_>, change: impl FnOnce() -> Result<(), Problem>) -> Result<(), Problem> {
    let modified = modified_of(&rustix::fs::fstat(directory)?);
    change()?;
    Ok(rustix::fs::futimens(directory, &times(modified))?)
}

fn look(at: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>, Problem> {
    match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn modified_of(stat: &Stat) -> Timespec {
    Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ }
}

pub(crate) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// As deep as [`DEPTH_MAX`] at most.
fn remove_directory(at: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let directory = rustix::fs::openat(at, name, DIRECTORY, Mode::empty())?;
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        let found = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match is_directory(&found) {
            true => remove_directory(directory.as_fd(), name)?,
            false => rustix::fs::unlinkat(&directory, name, AtFlags::empty())?,
        }
    }
    rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR)
}
