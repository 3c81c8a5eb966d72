//! Files and directories that a client has open.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::Dir;

use super::wire::{Failure, Request};

/// Handles of one connection, also told to clients.
pub const HANDLES_MAX: usize = 1_024;

pub enum Handle {
    File {
        file: File,
        /// Writes go to the end, whatever offset they name.
        append: bool,
    },
    Directory {
        /// For looking at entries.
        directory: OwnedFd,
        entries: Dir,
    },
}

#[derive(Default)]
pub struct Handles {
    open: BTreeMap<u32, Handle>,
    last: u32,
}

impl Handles {
    pub fn insert(&mut self, handle: Handle) -> Result<u32, Failure> {
        if self.open.len() >= HANDLES_MAX {
            return Err(Failure::TooManyHandles);
        }
        loop {
            self.last = self.last.wrapping_add(1);
            if !self.open.contains_key(&self.last) {
                self.open.insert(self.last, handle);
                return Ok(self.last);
            }
        }
    }

    pub fn remove(&mut self, request: &mut Request<'_>) -> Result<Handle, Failure> {
        self.open.remove(&number(request)?).ok_or(Failure::Handle)
    }

    /// The file of a handle, and whether it is written to at its end only.
    pub fn file(&self, request: &mut Request<'_>) -> Result<(&File, bool), Failure> {
        match self.open.get(&number(request)?) {
            Some(Handle::File { file, append }) => Ok((file, *append)),
            _ => Err(Failure::Handle),
        }
    }

    pub fn directory(&mut self, request: &mut Request<'_>) -> Result<(&OwnedFd, &mut Dir), Failure> {
        match self.open.get_mut(&number(request)?) {
            Some(Handle::Directory { directory, entries }) => Ok((directory, entries)),
            _ => Err(Failure::Handle),
        }
    }
}

fn number(request: &mut Request<'_>) -> Result<u32, Failure> {
    let bytes = request.string()?.try_into().map_err(|_| Failure::Handle)?;
    Ok(u32::from_be_bytes(bytes))
}
