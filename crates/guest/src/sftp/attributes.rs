//! What the protocol says about a file.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Gid, Mode, Stat, Timespec, Timestamps, Uid};

use super::wire::{Failure, Reply, Request};

const SIZE: u32 = 1;
const OWNER: u32 = 2;
const PERMISSIONS: u32 = 4;
const TIMES: u32 = 8;
const EXTENDED: u32 = 0x8000_0000;
/// Permission bits that a client may set.
const MODE_BITS: u32 = 0o7777;

/// Attributes that a client gave.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub size: Option<u64>,
    pub owner: Option<(u32, u32)>,
    pub mode: Option<u32>,
    /// Last access and last change of the content, seconds since 1970.
    pub times: Option<(u32, u32)>,
}

impl Attributes {
    pub fn read(request: &mut Request<'_>) -> Result<Self, Failure> {
        let flags = request.number()?;
        let mut attributes = Self::default();
        if flags & SIZE != 0 {
            attributes.size = Some(request.long_number()?);
        }
        if flags & OWNER != 0 {
            attributes.owner = Some((request.number()?, request.number()?));
        }
        if flags & PERMISSIONS != 0 {
            attributes.mode = Some(request.number()? & MODE_BITS);
        }
        if flags & TIMES != 0 {
            attributes.times = Some((request.number()?, request.number()?));
        }
        if flags & EXTENDED != 0 {
            for _ in 0..request.number()? {
                request.string()?;
                request.string()?;
            }
        }
        Ok(attributes)
    }

    /// The mode for something new.
    pub fn mode_or(&self, default: u32) -> Mode {
        Mode::from_raw_mode(self.mode.unwrap_or(default))
    }

    /// Sets what is given on an open file.
    pub fn apply_to_file(&self, file: impl AsFd) -> Result<(), Failure> {
        if let Some(size) = self.size {
            rustix::fs::ftruncate(&file, size)?;
        }
        if let Some(mode) = self.mode {
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
        }
        if let Some(times) = self.timestamps() {
            rustix::fs::futimens(&file, &times)?;
        }
        if let Some((user, group)) = self.owner {
            rustix::fs::fchown(&file, owner(user, Uid::from_raw), owner(group, Gid::from_raw))?;
        }
        Ok(())
    }

    /// Sets what is given on what a path leads to, or on the link itself where `follow` is false.
    pub fn apply_to_path(&self, path: &Path, follow: bool) -> Result<(), Failure> {
        let flags = if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
        match (self.size, follow) {
            (Some(size), true) => std::fs::OpenOptions::new().write(true).open(path)?.set_len(size)?,
            (Some(_), false) => return Err(Failure::Unsupported),
            (None, _) => {}
        }
        if let Some(mode) = self.mode {
            rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(mode), flags)?;
        }
        if let Some(times) = self.timestamps() {
            rustix::fs::utimensat(CWD, path, &times, flags)?;
        }
        if let Some((user, group)) = self.owner {
            rustix::fs::chownat(CWD, path, owner(user, Uid::from_raw), owner(group, Gid::from_raw), flags)?;
        }
        Ok(())
    }

    fn timestamps(&self) -> Option<Timestamps> {
        let at = |seconds: u32| Timespec { tv_sec: seconds.into(), tv_nsec: 0 };
        self.times.map(|(access, change)| Timestamps { last_access: at(access), last_modification: at(change) })
    }
}

/// The number that the system calls take for "leave it" is no owner.
fn owner<T>(id: u32, make: fn(u32) -> T) -> Option<T> {
    (id != u32::MAX).then(|| make(id))
}

impl Reply<'_> {
    /// What is known of a file.
    pub fn attributes(&mut self, status: &Stat) {
        self.number(SIZE | OWNER | PERMISSIONS | TIMES);
        self.long_number(status.st_size as u64);
        self.number(status.st_uid);
        self.number(status.st_gid);
        self.number(status.st_mode);
        self.number(status.st_atime as u32);
        self.number(status.st_mtime as u32);
    }
}
