//! A client of the Tenki sandbox protocol, and of what Nagaya offers beyond it.
//!
//! A [`Client`] is a caller at a server; a [`Session`] is one sandbox and its life. Both are cheap to clone and share
//! their connections. Everything is asynchronous and needs a tokio runtime with its I/O and time enabled.
//!
//! # First steps
//!
//! [`Client::from_env`] reads the variables of the official SDKs: `TENKI_API_KEY` and `TENKI_API_ENDPOINT`. Without an
//! endpoint it is [`DEFAULT_ENDPOINT`], where `nagaya serve` listens.
//!
//! ```no_run
#![doc = include_str!("../examples/first.rs")]
//! ```
//!
//! # Commands and files
//!
//! [`Session::command`] is like the standard library's: [`Command::output`] collects, [`Command::start`] gives a
//! [`Running`] one to talk with. Dropping a [`Running`] ends the command. [`Session::files`] moves files whole or
//! through [`FileReader`] and [`FileWriter`]; a writer that is dropped instead of shut down leaves the file as it was.
//!
//! ```no_run
#![doc = include_str!("../examples/streams.rs")]
//! ```
//!
//! # Network
//!
//! Ports become URLs ([`Session::expose_port`]), sockets are dialled ([`Session::dial`]), SSH is a stream
//! ([`Session::ssh`]), and tunnels lead out of a sandbox to this machine ([`Session::tunnel`], or
//! [`Session::resilient_tunnel`], which outlives lost connections).
//!
//! ```no_run
#![doc = include_str!("../examples/network.rs")]
//! ```
//!
//! # Errors
//!
//! [`Error`] has a variant for everything that the contract's SDKs tell apart. Servers of Nagaya also send a stable
//! [`Code`], found by [`Error::code`]; [`Error::retryable`] says whether waiting may help. Streams report
//! [`std::io::Error`]s, in which [`Error::in_io`] finds the reason.
//!
//! # What is done unasked
//!
//! - Certificates for a session's data plane are minted at the first use and renewed at half of their life, as long as
//!   a handle on the session exists. One that is refused is replaced once.
//! - Calls that a server did not begin with are repeated, also the opening of streams. Nothing that may have had an
//!   effect is.
//! - Dropping a [`Session`] does not end it; see [`Session::close`].

mod account;
mod client;
mod command;
pub mod constants;
mod create;
mod data_plane;
mod dial;
mod error;
mod facts;
mod files;
mod git;
mod images;
mod info;
mod observe;
mod options;
mod pipe;
mod previews;
mod session;
mod settable;
mod snapshots;
mod ssh;
mod transport;
mod tunnel;
mod volumes;
mod wait;
mod wire;

pub use account::{Change, UsageLimit, UsageUnit, WhoAmI, Workspace, WorkspaceSettings, WorkspaceSettingsUpdate};
pub use client::{Client, ListOptions, TerminateFailure, TerminateMany};
pub use command::{Command, CommandStatus, CommandStdin, Event, Output, Running, Signal, Signaller};
pub use create::{CreateOptions, OpenCodeProvider, VolumeMount, Wait, WakeOnVisit};
pub use dial::{DialReason, DialStream};
pub use error::{Error, RefusalKind, Result, Status};
pub use facts::{EventStream, Finding, SessionEvent};
pub use files::{FileEntry, FileReader, FileStat, FileWriter, Files, Removed, WriteOptions};
pub use git::{CloneOptions, DiffOptions, FetchPrOptions, Git, LogOptions};
pub use images::{FreedImages, Image, ImageLayer, LayerProgress, PullEvent, PullStream};
pub use info::{EgressPolicy, RuntimeState, SessionInfo, SessionState, VolumeAttachment};
pub use nagaya_api::error::Code;
pub use observe::{Connection, ForkOptions, Forked};
pub use options::{ClientOptions, DEFAULT_ENDPOINT};
pub use previews::{
    CreatePreviewUrlOptions, ExposeOptions, ExposedPort, ListPreviewUrlsOptions, OpenedPreview, PreviewUrl,
};
pub use session::{Session, UpdateOptions};
pub use snapshots::{
    CreateSnapshotOptions, DownloadUrl, Snapshot, SnapshotDurability, SnapshotKind, SnapshotState,
    UpdateSnapshotOptions,
};
pub use ssh::{SshCertificate, SshCertificateOptions, SshPermissions, SshStream};
pub use tunnel::{Backoff, ResilientTunnel, Tunnel, TunnelEnd, TunnelEndReason, TunnelOptions, TunnelState};
pub use volumes::{CreateVolumeOptions, DetachOptions, UpdateVolumeOptions, Volume, VolumeDetails, VolumeState};
