//! Looking at, making, listing and removing entries of directories.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use nagaya_api::error::Code;
use nagaya_api::names;
use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, RawMode, Stat, Uid};
use rustix::io::Errno;

use super::failure::Failure;
use super::paths::{Place, Root};
use crate::messages::{Entry, FileStatus, ListDirectory, Made, MakeDirectory, Remove, Removed};

/// Entries of a directory that are read by one visit to a blocking thread.
const ENTRIES_AT_ONCE: usize = 1024;
/// Directories that are open at once while a tree is removed.
const DEPTH_MAX: usize = 64;

fn modified_unix_ns(status: &Stat) -> i64 {
    (status.st_mtime).saturating_mul(1_000_000_000).saturating_add(status.st_mtime_nsec as i64)
}

/// What is at a path. A final symbolic link is not followed.
pub fn status(root: &Root, path: &str) -> Result<FileStatus, Failure> {
    let file = match root.open_path(path, OFlags::PATH | OFlags::NOFOLLOW) {
        Ok(file) => file,
        Err(failure) if matches!(failure.code, Code::FileNotFound | Code::NotADirectory) => {
            return Ok(FileStatus::default());
        }
        Err(failure) => return Err(failure),
    };
    let status = rustix::fs::fstat(&file)?;
    let is_symlink = FileType::from_raw_mode(status.st_mode) == FileType::Symlink;
    let target = match is_symlink {
        true => names::to_text(rustix::fs::readlinkat(&file, c"", Vec::new())?.to_bytes()).into_owned(),
        false => String::new(),
    };
    Ok(FileStatus {
        exists: true,
        size: status.st_size as u64,
        mode: status.st_mode,
        modified_unix_ns: modified_unix_ns(&status),
        is_dir: FileType::from_raw_mode(status.st_mode) == FileType::Directory,
        is_symlink,
        symlink_target: target,
    })
}

/// Makes a directory; with `recursive` also those above it, and one that is there is fine.
pub fn make(root: &Root, request: &MakeDirectory) -> Result<Made, Failure> {
    make_at(root, &root.absolute(&request.path)?, request)
}

fn make_at(root: &Root, path: &[u8], request: &MakeDirectory) -> Result<Made, Failure> {
    let mode = Mode::from_raw_mode(if request.mode == 0 { 0o755 } else { request.mode as RawMode & 0o7777 });
    let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let mut directory = root.open_path("/", flags)?;
    let mut existed = true;
    for (index, name) in names.iter().enumerate() {
        let is_last = index + 1 == names.len();
        existed = true;
        directory = match root.open_at(directory.as_fd(), name, flags) {
            Ok(next) => next,
            Err(Errno::NOENT) if request.recursive || is_last => {
                existed = false;
                make_one(&directory, &c_string(name)?, mode, root.owner)?
            }
            Err(Errno::NOTDIR) if is_last => return Err(Errno::EXIST.into()),
            Err(errno) => return Err(errno.into()),
        };
    }
    if existed && !request.recursive {
        return Err(Errno::EXIST.into());
    }
    Ok(Made { modified_unix_ns: modified_unix_ns(&rustix::fs::fstat(&directory)?) })
}

/// Makes the directories above a path that are missing.
pub fn make_parents(root: &Root, path: &str) -> Result<(), Failure> {
    let path = root.absolute(path)?;
    let parent = parent_of(&path);
    make_at(root, parent, &MakeDirectory { recursive: true, ..Default::default() }).map(drop)
}

/// The directory nearest above a path, where some of those above it are missing.
pub fn nearest(root: &Root, path: &str) -> Result<OwnedFd, Failure> {
    let path = root.absolute(path)?;
    let mut parent = parent_of(&path);
    loop {
        match root.open_bytes(parent, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) if parent.len() > 1 => parent = parent_of(parent),
            other => return Ok(other?),
        }
    }
}

/// All before the last part of an absolute path.
fn parent_of(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    let slash = path[..end].iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    &path[..slash.max(1)]
}

fn c_string(name: &[u8]) -> Result<CString, Failure> {
    CString::new(name).map_err(|_| Failure::new(Code::InvalidPath, ""))
}

fn make_one(parent: &OwnedFd, name: &CStr, mode: Mode, owner: (Uid, Gid)) -> Result<OwnedFd, Failure> {
    match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
        Ok(()) => {}
        // Made by somebody else meanwhile, or a symbolic link to nowhere.
        Err(Errno::EXIST) => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            return rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(|_| Errno::EXIST.into());
        }
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    rustix::fs::fchown(&made, Some(owner.0), Some(owner.1))?;
    rustix::fs::fchmod(&made, mode)?;
    Ok(made)
}

/// A directory whose entries are read in parts, in the order in which the file system has them.
pub struct Listing {
    directory: OwnedFd,
    entries: Dir,
    include_hidden: bool,
}

impl Listing {
    pub fn begin(root: &Root, request: &ListDirectory) -> Result<Self, Failure> {
        let directory = root.open_path(&request.path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK)?;
        let entries = Dir::read_from(&directory)?;
        Ok(Self { directory, entries, include_hidden: request.include_hidden })
    }

    /// Some entries; none at the end.
    pub fn read(&mut self) -> Result<Vec<Entry>, Failure> {
        let mut part = Vec::new();
        while part.len() < ENTRIES_AT_ONCE
            && let Some(entry) = self.entries.next()
        {
            let entry = entry?;
            let name = entry.file_name();
            let bytes = name.to_bytes();
            if !matches!(bytes, b"." | b"..") && (self.include_hidden || !bytes.starts_with(b".")) {
                part.push(describe(&self.directory, name, entry.file_type()));
            }
        }
        Ok(part)
    }
}

/// An entry that cannot be looked at is listed with what the directory itself says about it.
fn describe(directory: &OwnedFd, name: &CStr, kind: FileType) -> Entry {
    let name_text = names::to_text(name.to_bytes()).into_owned();
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(status) => Entry {
            name: name_text,
            size: status.st_size as u64,
            mode: status.st_mode,
            modified_unix_ns: modified_unix_ns(&status),
            is_dir: FileType::from_raw_mode(status.st_mode) == FileType::Directory,
        },
        Err(_) => Entry {
            name: name_text,
            mode: kind.as_raw_mode(),
            is_dir: kind == FileType::Directory,
            ..Default::default()
        },
    }
}

/// Removes what is at a path, never through a symbolic link.
pub fn remove(root: &Root, request: &Remove) -> Result<Removed, Failure> {
    let place = match root.place(&request.path) {
        Ok(Some(place)) => place,
        Ok(None) => return Err(Failure::new(Code::InvalidPath, "this directory cannot be removed")),
        Err(failure) if matches!(failure.code, Code::FileNotFound | Code::NotADirectory) => {
            return Ok(Removed::default());
        }
        Err(failure) => return Err(failure),
    };
    let entries = remove_place(&place, request.recursive)?;
    Ok(Removed { entries })
}

fn remove_place(place: &Place, recursive: bool) -> Result<u64, Failure> {
    let Place { directory, name, directory_meant } = place;
    if !directory_meant {
        match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) => return Ok(1),
            Err(Errno::NOENT) => return Ok(0),
            Err(Errno::ISDIR) => {}
            // Some file systems refuse to unlink a directory this way.
            Err(Errno::PERM) if is_directory(directory, name) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
        Ok(()) => return Ok(1),
        Err(Errno::NOENT) => return Ok(0),
        Err(Errno::NOTEMPTY | Errno::EXIST) if recursive => {}
        Err(errno) => return Err(errno.into()),
    }
    remove_tree(directory, name)
}

fn is_directory(directory: &OwnedFd, name: &CStr) -> bool {
    rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|status| FileType::from_raw_mode(status.st_mode) == FileType::Directory)
}

/// A directory whose entries are being removed.
struct Level {
    directory: OwnedFd,
    name: CString,
    entries: Vec<CString>,
}

impl Level {
    fn open(parent: &OwnedFd, name: CString) -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(parent, &name, flags, Mode::empty())?;
        let mut level = Self { directory, name, entries: Vec::new() };
        level.refill()?;
        Ok(level)
    }

    /// Reads some of the entries; true when there are any.
    fn refill(&mut self) -> Result<bool, Errno> {
        for entry in Dir::read_from(&self.directory)? {
            let name = entry?.file_name().to_owned();
            if !matches!(name.to_bytes(), b"." | b"..") {
                self.entries.push(name);
            }
            if self.entries.len() == ENTRIES_AT_ONCE {
                break;
            }
        }
        Ok(!self.entries.is_empty())
    }
}

/// Removes a directory and all below it. Trees deeper than [`DEPTH_MAX`] are flattened on the way,
/// so that the number of open directories is bounded.
fn remove_tree(parent: &OwnedFd, name: &CStr) -> Result<u64, Failure> {
    let mut removed = 0;
    let mut levels = vec![Level::open(parent, name.into())?];
    // Somebody who keeps adding entries must not keep us here for ever.
    let mut refills = 0;
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.entries.pop() else {
            let above = levels.len().checked_sub(2).map_or(parent, |index| &levels[index].directory);
            let level = &levels[levels.len() - 1];
            match rustix::fs::unlinkat(above, &level.name, AtFlags::REMOVEDIR) {
                Ok(()) => removed += 1,
                Err(Errno::NOENT) => {}
                Err(Errno::NOTEMPTY | Errno::EXIST) if refills < 1_000_000 => {
                    refills += 1;
                    if levels.last_mut().is_some_and(|level| matches!(level.refill(), Ok(true))) {
                        continue;
                    }
                    return Err(Errno::NOTEMPTY.into());
                }
                Err(errno) => return Err(errno.into()),
            }
            levels.pop();
            continue;
        };
        match rustix::fs::unlinkat(&level.directory, &entry, AtFlags::empty()) {
            Ok(()) => removed += 1,
            Err(Errno::NOENT) => {}
            Err(Errno::ISDIR | Errno::PERM) if is_directory(&level.directory, &entry) => {
                if levels.len() < DEPTH_MAX {
                    let next = match Level::open(&levels[levels.len() - 1].directory, entry) {
                        Ok(next) => next,
                        Err(Errno::NOENT) => continue,
                        Err(errno) => return Err(errno.into()),
                    };
                    levels.push(next);
                } else {
                    let flat = CString::new(format!(".nagaya-{:016x}", super::random())).expect("digits hold no NUL");
                    let (top, deep) = (&levels[0], &levels[levels.len() - 1]);
                    rustix::fs::renameat(&deep.directory, &entry, &top.directory, &flat)?;
                    levels[0].entries.push(flat);
                }
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(removed)
}
