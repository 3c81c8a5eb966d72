//! What each kind of request does.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::attributes::Attributes;
use super::handles::Handle;
use super::wire::{self, Failure, Reply, Request};
use super::{DATA_BYTES_MAX, Server};

const OPEN_READ: u32 = 1;
const OPEN_WRITE: u32 = 2;
const OPEN_APPEND: u32 = 4;
const OPEN_CREATE: u32 = 8;
const OPEN_TRUNCATE: u32 = 16;
const OPEN_EXCLUSIVE: u32 = 32;

/// The answer to INIT, which has no id: the version that is spoken, and what is offered beside it.
pub fn version(mut reply: Reply<'_>) {
    reply.byte(wire::VERSION);
    reply.number(3);
    for (name, version) in super::extended::OFFERED {
        reply.string(name.as_bytes());
        reply.string(version.as_bytes());
    }
    reply.finish();
}

impl Server {
    pub fn serve(&mut self, kind: u8, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<(), Failure> {
        match kind {
            wire::OPEN => self.open(request, reply),
            wire::READ => self.read(request, reply),
            wire::OPENDIR => self.open_directory(request, reply),
            wire::READDIR => self.read_directory(request, reply),
            wire::FSTAT => {
                let (file, _) = self.handles.file(request)?;
                answer_status(reply, rustix::fs::fstat(file)?)
            }
            wire::STAT => answer_status(reply, rustix::fs::statat(CWD, request.path()?, AtFlags::empty())?),
            wire::LSTAT => answer_status(reply, rustix::fs::statat(CWD, request.path()?, AtFlags::SYMLINK_NOFOLLOW)?),
            wire::REALPATH => {
                reply.name(real_path(request.path()?)?.as_os_str().as_bytes());
                Ok(())
            }
            wire::READLINK => {
                reply.name(rustix::fs::readlinkat(CWD, request.path()?, Vec::new())?.as_bytes());
                Ok(())
            }
            wire::EXTENDED => self.extended(request, reply),
            _ => {
                self.change(kind, request)?;
                reply.done();
                Ok(())
            }
        }
    }

    /// Requests that are answered with nothing but success.
    fn change(&mut self, kind: u8, request: &mut Request<'_>) -> Result<(), Failure> {
        match kind {
            wire::CLOSE => drop(self.handles.remove(request)?),
            wire::WRITE => self.write(request)?,
            wire::SETSTAT => {
                let path = request.path()?;
                Attributes::read(request)?.apply_to_path(path, true)?;
            }
            wire::FSETSTAT => {
                let (file, _) = self.handles.file(request)?;
                Attributes::read(request)?.apply_to_file(file)?;
            }
            wire::REMOVE => rustix::fs::unlinkat(CWD, request.path()?, AtFlags::empty())?,
            wire::RMDIR => rustix::fs::unlinkat(CWD, request.path()?, AtFlags::REMOVEDIR)?,
            wire::MKDIR => {
                let path = request.path()?;
                rustix::fs::mkdirat(CWD, path, Attributes::read(request)?.mode_or(0o777))?;
            }
            wire::RENAME => rename(request.path()?, request.path()?)?,
            // OpenSSH has the two the other way round than the draft, and everybody follows it.
            wire::SYMLINK => {
                let target = request.path()?;
                rustix::fs::symlinkat(target, CWD, request.path()?)?;
            }
            _ => return Err(Failure::Unsupported),
        }
        Ok(())
    }

    fn open(&mut self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<(), Failure> {
        let path = request.path()?;
        let wanted = request.number()?;
        let attributes = Attributes::read(request)?;
        let append = wanted & OPEN_APPEND != 0;
        let mut flags = match (wanted & OPEN_READ != 0, wanted & OPEN_WRITE != 0 || append) {
            (true, true) => OFlags::RDWR,
            (false, true) => OFlags::WRONLY,
            (true, false) => OFlags::RDONLY,
            (false, false) => return Err(Failure::Malformed),
        };
        for (bit, flag) in [
            (OPEN_APPEND, OFlags::APPEND),
            (OPEN_CREATE, OFlags::CREATE),
            (OPEN_TRUNCATE, OFlags::TRUNC),
            (OPEN_EXCLUSIVE, OFlags::EXCL),
        ] {
            flags.set(flag, wanted & bit != 0);
        }
        // Opening a pipe that nobody has at its other end must not end the service.
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::openat(CWD, path, flags, attributes.mode_or(0o666))?);
        if file.metadata()?.is_dir() {
            return Err(Errno::ISDIR.into());
        }
        let handle = self.handles.insert(Handle::File { file, append })?;
        reply.handle(handle);
        Ok(())
    }

    fn read(&mut self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<(), Failure> {
        let (file, _) = self.handles.file(request)?;
        let offset = request.long_number()?;
        let length = (request.number()? as usize).min(DATA_BYTES_MAX);
        reply.data(length, |buffer| rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *buffer, offset)))
    }

    fn write(&mut self, request: &mut Request<'_>) -> Result<(), Failure> {
        let (file, append) = self.handles.file(request)?;
        let mut offset = request.long_number()?;
        let mut data = request.string()?;
        while !data.is_empty() {
            let written = rustix::io::retry_on_intr(|| match append {
                true => rustix::io::write(file, data),
                false => rustix::io::pwrite(file, data, offset),
            })?;
            data = &data[written..];
            offset = offset.saturating_add(written as u64);
        }
        Ok(())
    }

    fn open_directory(&mut self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<(), Failure> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, request.path()?, flags, Mode::empty())?;
        let entries = Dir::read_from(&directory)?;
        let handle = self.handles.insert(Handle::Directory { directory, entries })?;
        reply.handle(handle);
        Ok(())
    }
}

fn answer_status(reply: &mut Reply<'_>, status: rustix::fs::Stat) -> Result<(), Failure> {
    reply.head(wire::ATTRIBUTES);
    reply.attributes(&status);
    Ok(())
}

/// The path without `..` and links. Its last part may be missing: clients ask before they make something.
pub fn real_path(path: &Path) -> Result<PathBuf, Failure> {
    match (std::fs::canonicalize(path), path.file_name()) {
        (Ok(real), _) => Ok(real),
        (Err(error), Some(name)) if error.kind() == std::io::ErrorKind::NotFound => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Ok(std::fs::canonicalize(parent)?.join(name))
        }
        (Err(error), _) => Err(error.into()),
    }
}

/// This version of the protocol never replaces what is there.
fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system does not know the flag.
        Err(Errno::INVAL | Errno::NOSYS) => match rustix::fs::statat(CWD, to, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST.into()),
            Err(Errno::NOENT) => Ok(rustix::fs::renameat(CWD, from, CWD, to)?),
            Err(errno) => Err(errno.into()),
        },
        other => Ok(other?),
    }
}
