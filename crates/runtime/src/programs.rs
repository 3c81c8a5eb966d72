//! The static programs that this binary carries: the spawner and the agent.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, Mode, SealFlags};

const AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nagaya-agent"));
const SPAWNER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/nagaya-spawner"));

/// The agent as a sealed memory file: one copy in memory for all sandboxes, which none of them can
/// write to, not even through /proc/1/exe.
///
/// Nor can they read it, so that the kernel takes the agent's memory for the host's: its files in /proc, those of all its
/// threads, belong to the host's root, whom nobody in a sandbox can act for.
pub(crate) fn agent() -> std::io::Result<OwnedFd> {
    sealed("nagaya-agent", AGENT, Mode::XUSR | Mode::XGRP | Mode::XOTH)
}

pub(crate) fn spawner() -> std::io::Result<OwnedFd> {
    sealed("nagaya-spawner", SPAWNER, Mode::RUSR | Mode::XUSR)
}

fn sealed(name: &str, content: &[u8], mode: Mode) -> std::io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(content)?;
    let fd = OwnedFd::from(file);
    rustix::fs::fchmod(&fd, mode)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(fd)
}
