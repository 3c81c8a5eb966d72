//! From a path of a request to a directory that is open and a name in it.
//!
//! The agent's root is the sandbox's root, so nothing outside can be named. Magic links, such as
//! those in `/proc/self/fd`, are never followed: they lead to the agent's own files. What `/proc` tells of the agent
//! itself is never opened.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nagaya_api::error::Code;
use nagaya_api::names;
use rustix::fs::{CWD, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use super::failure::Failure;
use crate::spawn::User;

/// Bytes a path may have.
pub const PATH_BYTES_MAX: usize = 4096;
/// Symbolic links followed at the end of a path.
const LINKS_MAX: usize = 40;
/// Attempts when somebody renames directories while a path is walked.
const RACES_MAX: usize = 64;

/// The sandbox's files, and where relative paths start.
#[derive(Debug)]
pub struct Root {
    root: OwnedFd,
    workdir: String,
    /// To whom new files belong.
    pub owner: (Uid, Gid),
}

/// A place in the file system where something is or could be.
#[derive(Debug)]
pub struct Place {
    pub directory: OwnedFd,
    /// One component, neither empty nor `.` nor `..`.
    pub name: CString,
    /// The path ended with a slash: only a directory can be meant.
    pub directory_meant: bool,
}

impl Root {
    pub fn open(user: &User) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let owner = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        Ok(Self { root: rustix::fs::open("/", flags, Mode::empty())?, workdir: user.workdir.clone(), owner })
    }

    /// The path from the root, as the bytes that its text stands for.
    pub fn absolute(&self, path: &str) -> Result<Vec<u8>, Failure> {
        let path = names::to_bytes(path);
        if path.is_empty() || path.len() > PATH_BYTES_MAX || path.contains(&0) {
            return Err(Failure::new(Code::InvalidPath, ""));
        }
        Ok(if path.starts_with(b"/") { path.into() } else { [self.workdir.as_bytes(), b"/", &path].concat() })
    }

    /// Opens what a path names.
    pub fn open_path(&self, path: &str, flags: OFlags) -> Result<OwnedFd, Failure> {
        Ok(self.open_at(self.root.as_fd(), &self.absolute(path)?, flags)?)
    }

    /// As [`Root::open_path`], for a path from the root.
    pub fn open_bytes(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        self.open_at(self.root.as_fd(), path, flags)
    }

    /// Finds the directory that holds a path's last component, which is not followed.
    pub fn place(&self, path: &str) -> Result<Option<Place>, Failure> {
        let path = self.absolute(path)?;
        Ok(self.place_at(self.root.as_fd(), &path)?)
    }

    /// As [`Root::place`], but where the last component is a symbolic link, the place it leads to.
    pub fn followed_place(&self, path: &str) -> Result<Option<Place>, Failure> {
        let Some(mut place) = self.place(path)? else { return Ok(None) };
        for _ in 0..LINKS_MAX {
            let target = match rustix::fs::readlinkat(&place.directory, &place.name, Vec::new()) {
                Ok(target) => target.into_bytes(),
                Err(_) => return Ok(Some(place)),
            };
            match self.place_at(place.directory.as_fd(), &target)? {
                Some(next) => place = next,
                None => return Ok(None),
            }
        }
        Err(Errno::LOOP.into())
    }

    /// `None` when the path ends with the root, `.` or `..`, which have no name of their own.
    fn place_at(&self, base: BorrowedFd<'_>, path: &[u8]) -> Result<Option<Place>, Errno> {
        let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
        let directory_meant = end < path.len();
        let path = &path[..end];
        let start = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
        let (parent, name) = path.split_at(start);
        if matches!(name, b"" | b"." | b"..") {
            return Ok(None);
        }
        let parent = if parent.is_empty() { b"." } else { parent };
        let directory = self.open_at(base, parent, OFlags::PATH | OFlags::DIRECTORY)?;
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        Ok(Some(Place { directory, name, directory_meant }))
    }

    /// Opens beneath a directory; an absolute path starts at the root.
    pub fn open_at(&self, base: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let (base, resolve) = match path.first() {
            Some(b'/') => (self.root.as_fd(), ResolveFlags::NO_MAGICLINKS | ResolveFlags::IN_ROOT),
            _ => (base, ResolveFlags::NO_MAGICLINKS),
        };
        for _ in 0..RACES_MAX {
            match rustix::fs::openat2(base, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                Ok(file) if is_our_own(&file)? => return Err(Errno::ACCESS),
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }
}

/// Whether this is something that `/proc` tells about this process: what it has open, and where its memory lies. Who
/// asks for a file has less rights to that than we have.
fn is_our_own(file: &OwnedFd) -> Result<bool, Errno> {
    if rustix::fs::fstatfs(file)?.f_type != rustix::fs::PROC_SUPER_MAGIC {
        return Ok(false);
    }
    let path = rustix::fs::readlinkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())?;
    let path = path.to_string_lossy();
    let inside = path.strip_prefix("/proc/").and_then(|rest| rest.split_once('/'));
    // The directory of a thread leads to all that the process has.
    let task = |id: u32| std::path::Path::new(&format!("/proc/self/task/{id}")).exists();
    Ok(inside.is_some_and(|(id, _)| id.parse::<u32>().is_ok_and(task)))
}
