//! Requests of OpenSSH that go beyond version 3.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatVfs, StatVfsMountFlags};

use super::attributes::Attributes;
use super::handles::HANDLES_MAX;
use super::requests::real_path;
use super::wire::{EXTENDED_REPLY, Failure, Reply, Request};
use super::{DATA_BYTES_MAX, PACKET_BYTES_MAX, Server};

/// What is told to clients at the beginning.
pub const OFFERED: [(&str, &str); 8] = [
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
    ("expand-path@openssh.com", "1"),
];

impl Server {
    pub(super) fn extended(&mut self, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<(), Failure> {
        match request.string()? {
            b"posix-rename@openssh.com" => rustix::fs::renameat(CWD, request.path()?, CWD, request.path()?)?,
            b"hardlink@openssh.com" => {
                rustix::fs::linkat(CWD, request.path()?, CWD, request.path()?, AtFlags::empty())?;
            }
            b"fsync@openssh.com" => {
                let (file, _) = self.handles.file(request)?;
                rustix::fs::fsync(file)?;
            }
            b"lsetstat@openssh.com" => {
                let path = request.path()?;
                Attributes::read(request)?.apply_to_path(path, false)?;
            }
            b"statvfs@openssh.com" => {
                write_space(reply, &rustix::fs::statvfs(request.path()?)?);
                return Ok(());
            }
            b"fstatvfs@openssh.com" => {
                let (file, _) = self.handles.file(request)?;
                write_space(reply, &rustix::fs::fstatvfs(file)?);
                return Ok(());
            }
            b"limits@openssh.com" => {
                reply.head(EXTENDED_REPLY);
                for limit in [PACKET_BYTES_MAX, DATA_BYTES_MAX, DATA_BYTES_MAX, HANDLES_MAX] {
                    reply.long_number(limit as u64);
                }
                return Ok(());
            }
            b"expand-path@openssh.com" => {
                reply.name(real_path(&expanded(request.string()?)?)?.as_os_str().as_bytes());
                return Ok(());
            }
            _ => return Err(Failure::Unsupported),
        }
        reply.done();
        Ok(())
    }
}

/// A path in which a leading `~` stands for the user's home; of other users' homes nothing is known.
fn expanded(path: &[u8]) -> Result<PathBuf, Failure> {
    if path.contains(&0) {
        return Err(Failure::Malformed);
    }
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    match path {
        b"" => Ok(PathBuf::from(".")),
        b"~" => Ok(home()),
        [b'~', b'/', rest @ ..] => Ok(home().join(Path::new(OsStr::from_bytes(rest.trim_ascii_start())))),
        [b'~', ..] => Err(Failure::Unsupported),
        _ => Ok(PathBuf::from(OsStr::from_bytes(path))),
    }
}

fn write_space(reply: &mut Reply<'_>, space: &StatVfs) {
    const READ_ONLY: u64 = 1;
    const NO_SUID: u64 = 2;
    let flag = |flag, bit| if space.f_flag.contains(flag) { bit } else { 0 };
    reply.head(EXTENDED_REPLY);
    for number in [
        space.f_bsize,
        space.f_frsize,
        space.f_blocks,
        space.f_bfree,
        space.f_bavail,
        space.f_files,
        space.f_ffree,
        space.f_favail,
        space.f_fsid,
        flag(StatVfsMountFlags::RDONLY, READ_ONLY) | flag(StatVfsMountFlags::NOSUID, NO_SUID),
        space.f_namemax,
    ] {
        reply.long_number(number);
    }
}
