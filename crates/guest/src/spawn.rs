//! What the server and its spawner say to each other, over a SOCK_SEQPACKET pair.
//!
//! One request, one answer, in order. Both ends come from the same build, so there are no versions:
//! a new server starts its own spawner. Descriptors travel beside the message, in the order the
//! message's documentation gives.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Descriptor numbers a freshly started spawner finds.
pub const SPAWNER_SOCKET_FD: i32 = 3;
pub const SPAWNER_AGENT_FD: i32 = 4;

/// Host uids and gids of one sandbox: 0 to 65,535 inside.
pub const IDS_PER_SANDBOX: u32 = 65_536;

/// Pseudo-terminals of one sandbox. The host has one number for all, which the server raises.
pub const TERMINALS_MAX: u32 = 256;
/// What `/proc/cpuinfo` has on a processor lies at its number times this in the file that agents get.
pub const PROCESSOR_TEXT_BYTES: usize = 8192;

/// More than any message has.
const DESCRIPTORS_MAX: usize = 160;
const MESSAGE_BYTES_MAX: usize = 144 * 1024;

#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Make a user namespace that maps 0..65,536 to `first_id..`, and a network namespace that it
    /// does not own. Answered with the two descriptors: network, user.
    Namespaces { first_id: u32 },
    /// Start a sandbox. Answered with its pidfd as soon as its first process exists, which then waits for a [`Disk`];
    /// what happens to that process is read from the error pipe.
    Sandbox(Box<Sandbox>),
    /// Attach a file system in a running sandbox.
    Mount(Mount),
    /// Take one out again.
    Unmount(Unmount),
}

/// Descriptors, in this order: outcome pipe (write end), pidfd of the sandbox's first process, the file
/// system (a detached mount). Answered as soon as a process works on it, which writes one
/// [`MountOutcome`] to the pipe.
#[derive(Debug, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute, as the sandbox sees it. Directories that are missing are made.
    pub path: String,
    /// Host uid and gid of the directories that are made.
    pub owner: u32,
}

/// Descriptors: outcome pipe (write end), pidfd of the sandbox's first process. Answered as
/// [`Mount`] is.
#[derive(Debug, Serialize, Deserialize)]
pub struct Unmount {
    /// The block device of the file system; where it is attached may have been renamed.
    pub major: u32,
    pub minor: u32,
    /// Also while it is in use: then it goes when its last user does.
    pub lazy: bool,
}

/// What became of a [`Mount`] or [`Unmount`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountOutcome {
    /// Also when there was nothing to unmount.
    Done,
    Busy,
    /// Why the path cannot have it, in words for the user.
    Refused(String),
    /// The step that failed, and the operating system's error number.
    Failed {
        step: String,
        errno: i32,
    },
}

/// Descriptors, in this order: error pipe (write end), lifeline pipe (read end), the socket for the [`Disk`], user
/// namespace, network namespace, `agent_cgroups` files,
/// `command_cgroups` files, for each of `command_groups` as many files and one that reads as the number of its
/// processes, and the files of memory usage, memory limit, memory statistics, memory events and the limit of processes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sandbox {
    /// Number of cgroup files that the first process writes itself into.
    pub agent_cgroups: usize,
    /// Number of cgroup files that the agent writes each command into.
    pub command_cgroups: usize,
    /// Groups of which the agent chooses one for each command: the number of cgroup files that it writes the command
    /// into.
    pub command_groups: Vec<usize>,
    /// The first host uid and gid of the sandbox.
    pub first_id: u32,
    pub hostname: String,
    /// Output of detached commands that the agent keeps: bytes, and seconds after the command has ended.
    pub kept_output_bytes_max: u64,
    pub kept_output_seconds_max: u64,
}

/// What a sandbox may keep in memory without a process has to follow from its memory, which its server knows last. The
/// first process sends it before it waits for its disk. Descriptors: the context of the file system at `/dev/shm`, and
/// the file in which the pages are written that all System V segments may have.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sizes;

/// What a sandbox lives on, sent to its first process. Descriptors: the disk (a detached mount), the socket that its agent
/// listens on, and a detached mount for each layer. Without it the process ends with the server.
#[derive(Debug, Serialize, Deserialize)]
pub struct Disk {
    /// The directory of the root that each layer is the content of: one of [`PLACES`], or empty for the root itself. The
    /// uppermost comes first.
    pub layers: Vec<String>,
    pub user: User,
    /// `NAME=value` for each variable that commands have unless they say otherwise.
    pub env: Vec<String>,
}

/// Who commands run as that say nothing else: what the image says of its user. The rest is in the sandbox's own files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub name: String,
    /// As the sandbox counts them.
    pub uid: u32,
    pub gid: u32,
    /// Absolute.
    pub home: String,
    /// Where commands start that do not say where, and relative paths; absolute.
    pub workdir: String,
}

/// What the variables of an image may have together, bytes.
pub const ENV_BYTES_MAX: usize = 64 * 1024;

/// Layers of a root file system at most.
pub const LAYERS_MAX: usize = 128;

/// Directories of a root that layers may be the content of. Each has an overlay of its own.
pub const PLACES: [&str; 7] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"];

/// The names of all overlays that a root may have, under which a disk holds what was written to them.
pub fn overlays() -> impl Iterator<Item = &'static str> {
    std::iter::once(ROOT_OVERLAY).chain(PLACES)
}

/// The overlay of the root itself.
pub const ROOT_OVERLAY: &str = "root";

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Namespaces,
    Sandbox {
        pid: i32,
    },
    /// The outcome follows through the pipe.
    Begun,
    /// The step that failed, and the operating system's error number.
    Failed {
        step: String,
        errno: i32,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("the other end is gone")]
    Closed,
    #[error("system call on the spawner's socket")]
    System(#[from] Errno),
    #[error("a message that is not ours")]
    Malformed,
}

pub fn send<M: Serialize>(
    socket: BorrowedFd<'_>,
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), ChannelError> {
    let bytes = serde_json::to_vec(message).map_err(|_| ChannelError::Malformed)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(ChannelError::Malformed);
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Closed),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Waits for the next message. Its descriptors are closed on exec.
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> Result<(M, Vec<OwnedFd>), ChannelError> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
            other => break other?,
        }
    };
    if received.bytes == 0 {
        return Err(ChannelError::Closed);
    }
    let descriptors = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let message = serde_json::from_slice(&bytes[..received.bytes]).map_err(|_| ChannelError::Malformed)?;
    Ok((message, descriptors))
}
