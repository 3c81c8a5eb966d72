//! The engine's view of the world: a store, a driver, a clock and a source of randomness.
//!
//! Implementations: `nagaya-store` (SQLite), `nagaya-runtime` (drivers), [`crate::fake`] (all of
//! them, for tests), `nagaya-daemon` (the host's clock and randomness).

use std::collections::BTreeMap;
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use nagaya_api::ids::{ExecutionId, ImageId, PreviewId, SessionId, SnapshotId, VolumeId, WorkspaceId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};

use crate::events::Event;
use crate::model::{
    ApiKey, Connection, Egress, Execution, Guarantees, Machine, Preview, PreviewKind, Session, SessionState, Snapshot,
    UnixMs, Volume, Workspace,
};

pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

// ---------------------------------------------------------------------------------------------
// Store

#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// There is no space to write to; nothing was changed.
    #[error("store: no space left on the host's disk")]
    Full,
    /// What is on the disk is not what was written.
    #[error("store: {0}")]
    Damaged(String),
    #[error("store: {0}")]
    Failed(String),
}

/// One row to insert or replace.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // most changes are sessions, and none lives long
pub enum Change {
    Workspace(Workspace),
    ApiKey(ApiKey),
    Session(Session),
    Execution(Execution),
    /// Forget an execution, e.g. because newer ones pushed it out.
    ForgetExecution(ExecutionId),
    Snapshot(Snapshot),
    ForgetSnapshot(SnapshotId),
    Volume(Volume),
    ForgetVolume(VolumeId),
    Preview(Preview),
    ForgetPreview(PreviewId),
    /// Appended to its session's events, of which the last `events_max` are kept.
    Event {
        event: Event,
        events_max: u32,
    },
    /// Forgets sessions that ended before that time, with their executions and events: the first ones, at most so many.
    ForgetEnded {
        ended_before: UnixMs,
        sessions_max: u32,
    },
    /// A named secret or setting of the server.
    Setting {
        name: String,
        value: Vec<u8>,
    },
}

/// Which sessions to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct SessionQuery {
    pub workspace_id: Option<WorkspaceId>,
    /// Text because callers may send anything; no match is an empty page.
    pub owner_id: Option<String>,
    pub state: Option<SessionState>,
    /// All of them must be on the session.
    pub tags: Vec<String>,
    pub sticky: Option<bool>,
    /// Also sessions in TERMINATED (TERMINATING ones are always listed).
    pub include_terminated: bool,
    /// Only sessions older than this one, by (created_at, id).
    pub before: Option<(UnixMs, SessionId)>,
    /// Rows at most.
    pub limit: u32,
}

/// Which snapshots to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct SnapshotQuery {
    pub workspace_id: Option<WorkspaceId>,
    pub session_id: Option<SessionId>,
    /// Only those whose session has ended.
    pub dangling: bool,
    /// Only snapshots older than this one, by (created_at, id).
    pub before: Option<(UnixMs, SnapshotId)>,
    /// Rows at most.
    pub limit: u32,
}

/// Which volumes to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct VolumeQuery {
    pub workspace_id: Option<WorkspaceId>,
    /// Only volumes older than this one, by (created_at, id).
    pub before: Option<(UnixMs, VolumeId)>,
    /// Rows at most.
    pub limit: u32,
}

/// Which previews to list, newest first.
#[derive(Debug, Clone, Default)]
pub struct PreviewQuery {
    pub workspace_id: Option<WorkspaceId>,
    pub kind: Option<PreviewKind>,
    /// Only those that lead to this session.
    pub session_id: Option<SessionId>,
    /// Only previews older than this one, by (created_at, id).
    pub before: Option<(UnixMs, PreviewId)>,
    /// Rows at most.
    pub limit: u32,
}

/// Records that survive the process. What `commit` acknowledged is on disk.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Applies all changes, or none.
    async fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError>;
    async fn workspaces(&self) -> Result<Vec<Workspace>, StoreError>;
    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError>;
    async fn setting(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError>;
    async fn session(&self, id: SessionId) -> Result<Option<Session>, StoreError>;
    async fn sessions(&self, query: SessionQuery) -> Result<Vec<Session>, StoreError>;
    /// Every session not in TERMINATED, of every workspace: what recovery starts from.
    async fn live_sessions(&self) -> Result<Vec<Session>, StoreError>;
    async fn execution(&self, id: ExecutionId) -> Result<Option<Execution>, StoreError>;
    /// Executions of a session, oldest first.
    async fn executions(&self, session_id: SessionId) -> Result<Vec<Execution>, StoreError>;
    async fn snapshot(&self, id: SnapshotId) -> Result<Option<Snapshot>, StoreError>;
    async fn snapshots(&self, query: SnapshotQuery) -> Result<Vec<Snapshot>, StoreError>;
    /// Every snapshot of every workspace.
    async fn all_snapshots(&self) -> Result<Vec<Snapshot>, StoreError>;
    async fn volume(&self, id: VolumeId) -> Result<Option<Volume>, StoreError>;
    async fn volumes(&self, query: VolumeQuery) -> Result<Vec<Volume>, StoreError>;
    /// Every volume of every workspace.
    async fn all_volumes(&self) -> Result<Vec<Volume>, StoreError>;
    async fn previews(&self, query: PreviewQuery) -> Result<Vec<Preview>, StoreError>;
    /// Every preview of every workspace.
    async fn all_previews(&self) -> Result<Vec<Preview>, StoreError>;
    /// Up to `limit` events of a session with greater sequences than `after`, in their order.
    async fn events(&self, session_id: SessionId, after: u64, limit: u32) -> Result<Vec<Event>, StoreError>;
}

// ---------------------------------------------------------------------------------------------
// Driver

#[derive(Debug, Clone, thiserror::Error)]
pub enum DriverError {
    /// Something finite ran out: the text is the limit's name, e.g. `network_slots_max`.
    #[error("limit reached: {0}")]
    Exhausted(String),
    /// There is no such sandbox (nor its disk), no such image or no such volume.
    #[error("no such sandbox")]
    Gone,
    /// Something in the sandbox uses it, e.g. a process has a file of the volume open.
    #[error("busy")]
    Busy,
    /// What was asked for cannot be, e.g. a mount over another mount; in words for the user.
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Failed(String),
}

/// Something happened that nobody asked for.
#[derive(Debug, Clone)]
pub enum DriverEvent {
    /// A running sandbox has no processes any more. Its disk is kept until `destroy`; the rest is
    /// released by `stop`.
    Ended {
        id: SessionId,
        /// The sandbox powered itself off. False: it was killed, or its host failed it.
        powered_off: bool,
        /// In words for the user, e.g. "the sandbox's first process was killed".
        cause: String,
    },
    /// The host is short of memory: paused sandboxes in RAM should be stopped.
    MemoryLow,
    /// Something that a sandbox did was refused at a limit. Told now and then, not each time.
    Refused {
        id: SessionId,
        /// What was refused, e.g. "a connection to the outside".
        request: String,
        /// The limit and its value.
        limit: String,
    },
}

/// What an earlier process left of a sandbox.
pub enum Adopted {
    Running(Arc<dyn Guest>),
    /// Frozen by `freeze`.
    Frozen(Arc<dyn Guest>),
    /// Only its disk is there.
    Stopped {
        /// The sandbox powered itself off while no server watched.
        powered_off: bool,
        /// The host was started again since the sandbox ran.
        host_restarted: bool,
    },
}

/// A volume's place in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub volume_id: VolumeId,
    /// Absolute and normal, as the sandbox sees it. Made (for `tenki`) when it is missing.
    pub path: String,
    pub readonly: bool,
}

/// What a running sandbox uses, of what it may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Load {
    /// Without what the kernel takes back when it needs it, such as cached files.
    pub memory_bytes: u64,
    pub memory_limit_bytes: u64,
    /// Processes killed because the limit was reached, since it was started.
    pub memory_kills: u64,
    /// Output of commands in the background that is kept on the disk.
    pub kept_output_bytes: u64,
    /// Processor time that all threads together had, and for which they had to wait, during a short window, and that
    /// window; microseconds.
    pub cpu_used_us: u64,
    pub cpu_waited_us: u64,
    pub cpu_window_us: u64,
    /// Spans of time in which it used processors, those of them in which it was halted for having used up its share,
    /// and for how long, microseconds; all since it was started.
    pub cpu_spans: u64,
    pub cpu_spans_throttled: u64,
    pub cpu_throttled_us: u64,
    /// Processes and threads.
    pub processes: u64,
    pub processes_max: u64,
    pub disk_used_bytes: u64,
    pub disk_size_bytes: u64,
    /// Its disk had errors, and takes no more writes until it is started again.
    pub disk_failed: bool,
    /// Its disk takes nothing new, because the host has no space.
    pub disk_held: bool,
    /// Its first process stands still, so that nothing can be asked of the sandbox.
    pub halted: bool,
}

/// A technology that runs sandboxes. Every call may be repeated after a crash between any two of
/// its steps; sandboxes live on when the process that made them dies. What a call acknowledges
/// about disks (`copy_disk`, volumes) is fsync'ed, names included.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    fn guarantees(&self) -> Guarantees;
    /// Makes a sandbox and returns when commands can run in it. Its disk is a fresh one, or `disk`,
    /// which it takes over and grows to the machine's size. On error nothing is left behind, or what is left
    /// is found by [`Driver::list`]; `disk` may be used up.
    async fn create(
        &self,
        id: SessionId,
        machine: &Machine,
        disk: Option<ImageId>,
    ) -> Result<Arc<dyn Guest>, DriverError>;
    /// Takes over a sandbox that an earlier process made. `Gone` when not even its disk is there.
    async fn adopt(&self, id: SessionId) -> Result<Adopted, DriverError>;
    /// Halts every process of the sandbox where it is; clocks of running commands' timeouts stand still.
    /// Calls on its guest may hang until `thaw`. Freezing a frozen one is no error; `Gone` when it has no processes.
    async fn freeze(&self, id: SessionId) -> Result<(), DriverError>;
    /// Lets a frozen sandbox go on. Thawing a running one is no error; `Gone` when it has no processes.
    async fn thaw(&self, id: SessionId) -> Result<(), DriverError>;
    /// Ends all processes and keeps the disk, everything written to it included, and nothing else.
    /// Volumes are unmounted and written back. Stopping a stopped one is no error.
    async fn stop(&self, id: SessionId) -> Result<(), DriverError>;
    /// Starts a stopped sandbox on its kept disk, without its volumes. After an error `stop` takes away what came up.
    async fn boot(&self, id: SessionId, machine: &Machine) -> Result<Arc<dyn Guest>, DriverError>;
    /// Ends a sandbox, also while another call about it hangs: what that still makes is destroyed again when it returns. On
    /// return none of its processes is alive; its disk and network are being
    /// released in the background and [`Driver::list`] names it until they are. Repeating it, or
    /// naming an unknown sandbox, is no error.
    async fn destroy(&self, id: SessionId) -> Result<(), DriverError>;
    /// Every sandbox of which anything exists on this host, alive, stopped or half removed, except
    /// those whose release is already under way in this process.
    async fn list(&self) -> Result<Vec<SessionId>, DriverError>;

    /// Copies a sandbox's disk, as it is at one moment, to these images, whatever state it is in.
    /// Returns how long its writes stood still, microseconds. Images that exist are replaced; on error none is left.
    async fn copy_disk(&self, id: SessionId, images: &[ImageId]) -> Result<u64, DriverError>;
    /// Where an image is, or can be made.
    fn image_path(&self, id: ImageId) -> PathBuf;
    /// Makes the empty file in which an image is about to be written, so that what the image needs can be ready when it is
    /// whole; `create` takes it then, and until then it is no image. A driver with nothing to make ready lets the image
    /// be made where it will be.
    async fn prepare_image(&self, id: ImageId) -> Result<PathBuf, DriverError> {
        Ok(self.image_path(id))
    }
    /// Removes an image, or what was prepared for one. Removing an unknown one is no error.
    async fn remove_image(&self, id: ImageId) -> Result<(), DriverError>;
    async fn images(&self) -> Result<Vec<ImageId>, DriverError>;

    /// Makes an empty volume. One that exists already is left as it is.
    async fn create_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError>;
    /// Makes it larger, mounted read-write or not at all; `Busy` where it is mounted read-only. On error it is as before,
    /// or grown nevertheless.
    async fn grow_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError>;
    /// How large it is; up to one block more than what was asked for.
    async fn volume_size(&self, id: VolumeId) -> Result<u64, DriverError>;
    /// Removing an unknown one is no error.
    async fn remove_volume(&self, id: VolumeId) -> Result<(), DriverError>;
    async fn volumes(&self) -> Result<Vec<VolumeId>, DriverError>;
    /// Mounts a volume in a running sandbox. Repeating it is no error. `Refused` when the path is a
    /// mount already, or not a directory.
    async fn attach_volume(&self, id: SessionId, mount: &Mount) -> Result<(), DriverError>;
    /// Unmounts a volume and writes it back; `Busy` while a process uses it, unless `force`: then its later
    /// reads and writes there fail. Unmounting what is not mounted is no error.
    async fn detach_volume(&self, id: SessionId, mount: &Mount, force: bool) -> Result<(), DriverError>;
    /// Waits until no sandbox has the volume mounted any more, after their ends, and until what they
    /// wrote is on disk.
    async fn settle_volume(&self, id: VolumeId) -> Result<(), DriverError>;

    /// Names the only destinations that a sandbox with outbound access reaches from now on, frozen or not; `None` lifts
    /// that. What the machine of `create` and `boot` names holds before the sandbox's first instruction, and outlives
    /// this process. On return connections to what is not allowed any more are cut. Repeating it is no error.
    async fn set_egress(&self, id: SessionId, egress: Option<&Egress>) -> Result<(), DriverError>;
    /// The last connections of a running or frozen sandbox to the outside, oldest first.
    async fn connections(&self, id: SessionId) -> Result<Vec<Connection>, DriverError>;

    /// What a running sandbox uses now; takes some tenths of a second. `Gone` when it has no processes.
    async fn load(&self, id: SessionId) -> Result<Load, DriverError>;

    /// Events of sandboxes that this process created or adopted. May be called once.
    fn events(&self) -> mpsc::UnboundedReceiver<DriverEvent>;
}

// ---------------------------------------------------------------------------------------------
// Blobs

#[derive(Debug, Clone, thiserror::Error)]
pub enum BlobError {
    /// A part of the image is not there: its digest.
    #[error("blob {0} is missing")]
    Missing(String),
    /// A part of the image is not what it was: its digest.
    #[error("blob {0} is corrupt")]
    Corrupt(String),
    /// The limit's name, e.g. "space on the host's disk".
    #[error("limit reached: {0}")]
    Exhausted(String),
    #[error("{0}")]
    Failed(String),
}

/// An image in the blob store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// Digest of its manifest, which names everything else.
    pub manifest: String,
    /// Bytes of the image that are not holes.
    pub size_bytes: u64,
    /// Bytes of all its blobs.
    pub stored_bytes: u64,
}

/// Disk images as content-addressed, checksummed parts. Parts are shared among images and never changed.
#[async_trait]
pub trait Blobs: Send + Sync + 'static {
    /// Keeps a copy of an image on this machine, fsync'ed. The image is only read.
    async fn store(&self, image: &Path) -> Result<StoredImage, BlobError>;
    /// Brings a stored image to the durable place. Returns at once where that is this machine.
    async fn upload(&self, manifest: &str) -> Result<(), BlobError>;
    /// Verifies all parts of an image, and makes it at this path, not yet fsync'ed. An empty file that is there is filled,
    /// what else is there is replaced. On error nothing is there, or a file as empty as it was.
    async fn restore(&self, manifest: &str, image: &Path) -> Result<(), BlobError>;
    /// Opens an image for reading it whole, holes included.
    async fn open(&self, manifest: &str) -> Result<ImageReader, BlobError>;
    /// Removes every blob that none of these images needs; returns the bytes freed. The caller sees to it that no
    /// `store` runs meanwhile.
    async fn retain(&self, manifests: &[String]) -> Result<u64, BlobError>;
}

/// An image being read.
#[derive(Debug)]
pub struct ImageReader {
    /// Size of the image with its holes, bytes.
    pub total_size: u64,
    /// Verified parts in order, then the end of the channel; an error is the last item.
    pub chunks: mpsc::Receiver<Result<Bytes, BlobError>>,
}

/// What went wrong inside a sandbox, or on the way to it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{code}: {detail}", code = code.name())]
pub struct GuestError {
    pub code: nagaya_api::error::Code,
    /// Particulars without user-chosen names or paths; see `nagaya_api::error::Code::text`.
    pub detail: String,
    /// The operating system's error number where there is one, else 0.
    pub errno: i32,
}

/// Where memory is taken from for an answer of unknown size.
#[async_trait]
pub trait Room: Send + Sync {
    /// Waits for room for so many bytes more; the error says which limit is reached.
    async fn grow(&self, bytes: usize) -> Result<(), GuestError>;
}

/// Room without a limit.
#[async_trait]
impl Room for () {
    async fn grow(&self, _: usize) -> Result<(), GuestError> {
        Ok(())
    }
}

/// A command to start in a sandbox.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// At least one; the first is looked up on PATH unless it has a slash.
    pub argv: Vec<String>,
    /// The complete environment but for HOME, USER, LOGNAME, SHELL and PATH, which the guest
    /// fills in for the user when they are not given.
    pub env: BTreeMap<String, String>,
    /// Relative ones start at the home directory; empty is the home directory.
    pub cwd: String,
    /// Run as root instead of `tenki`.
    pub privileged: bool,
    /// Give it a terminal: one output stream, stdin is the terminal.
    pub pty: bool,
    /// False: stdin is empty from the start.
    pub stdin: bool,
    /// TERM after this long, KILL 5 s later. 0 is no limit. Milliseconds.
    pub timeout_ms: u64,
    /// Start this in place of what `argv` names, which is only for sandboxes that are too old to have it.
    pub builtin: Option<Builtin>,
    /// With `pty`: how the terminal is from the start.
    pub terminal: Terminal,
    pub when_left: WhenLeft,
}

/// What becomes of a command whose holder has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenLeft {
    /// TERM to its process group, and KILL 5 s later.
    #[default]
    End,
    /// Its streams are closed and its terminal hangs up, as when a connection of SSH breaks. What does not mind goes on.
    HangUp,
}

/// How a terminal is set up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terminal {
    /// `None` leaves it without a size.
    pub size: Option<TerminalSize>,
    /// Opcodes and values of RFC 4254, section 8. What is not named is as terminals are, with UTF-8.
    pub modes: Vec<(u8, u32)>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TerminalSize {
    /// Character cells.
    pub columns: u16,
    pub rows: u16,
    /// 0 where it is not known.
    pub width_px: u16,
    pub height_px: u16,
}

/// Programs that every sandbox has, whatever its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Builtin {
    /// Serves the files that the command's user may reach, in SFTP over standard input and output.
    Sftp,
    /// The shell of the command's account, with the arguments after the first; for a login when that is `-l` alone.
    Shell,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Term,
    Kill,
    Int,
    Hup,
    Usr1,
    Usr2,
}

#[derive(Debug)]
pub enum ProcessInput {
    /// At most 64 KiB each.
    Stdin(Bytes),
    StdinClose,
    Signal(Signal),
    Resize(TerminalSize),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessEvent {
    /// At most 64 KiB each, as all output.
    Stdout(Bytes),
    Stderr(Bytes),
    /// The last event.
    Exit(ExitStatus),
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExitStatus {
    /// −1 when a signal ended it.
    pub code: i32,
    /// Name of that signal, e.g. `SIGKILL`; else empty.
    pub signal: String,
    pub timed_out: bool,
    pub duration_ms: u64,
    /// `exit`, `signaled`, `timeout` (TERM was enough), `grace_timeout` (it took KILL),
    /// `out_of_memory`, or `session_terminated:<cause>` when the sandbox ended first.
    pub reason: String,
    pub errno: i32,
    /// Of a command that failed: processes of the sandbox that were killed for want of memory while it ran.
    pub memory_kills: u64,
}

/// A running command that belongs to its holder: when `events` is dropped, what [`Command::when_left`] says happens. A slow
/// reader stalls only this command.
#[derive(Debug)]
pub struct Process {
    pub pid: u32,
    /// Bounded: a send waits while the command does not read its stdin.
    pub input: mpsc::Sender<ProcessInput>,
    /// Bounded: the command waits while nobody reads. Ends after `Exit`, or without it when the
    /// connection to the sandbox is lost.
    pub events: mpsc::Receiver<ProcessEvent>,
}

/// The content of a file being read. Dropping it ends the reading.
#[derive(Debug)]
pub struct FileReader {
    /// Size of the whole file when it was opened, bytes. 0 for generated files such as /proc's.
    pub total_size: u64,
    /// Chunks in order, then the end of the channel; an error is the last item.
    pub chunks: mpsc::Receiver<Result<Bytes, GuestError>>,
}

#[derive(Debug, Clone)]
pub struct WriteOptions {
    /// Permission bits of a file that is made new; 0 means 0644.
    pub mode: u32,
    /// True: the content replaces the file's, all at once when the writing is finished.
    /// False: it is written over the start of the file, the rest stays.
    pub truncate: bool,
    /// fsync file and directory before finishing.
    pub sync: bool,
}

/// A file being written. Nothing is visible under its name until `finish`; dropping it without
/// finishing leaves everything as it was.
#[derive(Debug)]
pub struct FileWriter {
    /// At most 64 KiB each. A closed channel means that writing failed: `finish` tells why.
    pub chunks: mpsc::Sender<Bytes>,
    finish: oneshot::Sender<oneshot::Sender<Result<u64, GuestError>>>,
}

impl FileWriter {
    /// The second part of the pair receives one message, when the caller finishes: where to send
    /// the outcome. It is dropped without a message when the caller gives up.
    pub fn new(chunks: mpsc::Sender<Bytes>) -> (Self, oneshot::Receiver<oneshot::Sender<Result<u64, GuestError>>>) {
        let (finish, finished) = oneshot::channel();
        (Self { chunks, finish }, finished)
    }

    /// Makes what was written visible; returns the number of bytes written.
    pub async fn finish(self) -> Result<u64, GuestError> {
        let lost = || GuestError {
            code: nagaya_api::error::Code::GuestUnreachable,
            detail: "the connection to the sandbox was lost while writing".into(),
            errno: 0,
        };
        let (reply, outcome) = oneshot::channel();
        drop(self.chunks);
        self.finish.send(reply).map_err(|_| lost())?;
        outcome.await.map_err(|_| lost())?
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileStat {
    pub size: u64,
    /// Type and permission bits, as `st_mode`.
    pub mode: u32,
    pub modified_unix_ns: i64,
    pub is_dir: bool,
    pub is_symlink: bool,
    /// Empty unless it is a symbolic link.
    pub symlink_target: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryEntry {
    pub name: String,
    pub size: u64,
    pub mode: u32,
    pub modified_unix_ns: i64,
    pub is_dir: bool,
}

/// A place in a sandbox that streams lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A port of its own loopback: 127.0.0.1, and [::1] when nothing listens there.
    Tcp { port: u16 },
    /// A port of one of its own addresses, and of no other.
    Ip { ip: IpAddr, port: u16 },
    /// A unix socket, by its absolute path in the sandbox.
    Unix { path: String },
    /// The same, refused with `permission_denied` unless it is one of the allowed paths or lies below one of them,
    /// when all symbolic links have been followed.
    UnixWithin { path: String, allowed: Vec<String> },
}

/// Where to listen in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bind {
    /// Port 0 chooses a free one.
    Tcp { ip: IpAddr, port: u16 },
    /// A new unix socket of `tenki`, by its absolute path in the sandbox.
    Unix { path: String },
}

/// Bytes both ways. Shutting the writing side down is the end of what is sent; dropping it closes it.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

pub type BoxStream = Box<dyn Stream>;

/// A listening socket in a sandbox. Dropping it ends the listening; accepted streams go on.
#[derive(Debug)]
pub struct Listener {
    /// The port that was chosen; 0 for a unix socket.
    pub port: u16,
    /// Bounded: further peers wait in the sandbox while nobody accepts. Ends when the sandbox does.
    pub incoming: mpsc::Receiver<Accepted>,
}

/// A peer in the sandbox that connected to a [`Listener`].
pub struct Accepted {
    pub stream: BoxStream,
    /// `IP:PORT` of the peer; empty for unix sockets.
    pub source: String,
}

impl std::fmt::Debug for Accepted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accepted").field("source", &self.source).finish_non_exhaustive()
    }
}

/// A running sandbox, seen from outside. All paths are the sandbox's own; relative ones start at
/// `/home/tenki`. File calls act as the sandbox's root; what they make new belongs to `tenki`.
#[async_trait]
pub trait Guest: Send + Sync + 'static {
    /// Starts a command that belongs to the returned value.
    async fn run(&self, command: Command) -> Result<Process, GuestError>;
    /// Starts a command that belongs to the sandbox; its output is kept for [`Guest::follow`].
    /// Repeating it with the same id does not start it twice.
    async fn run_detached(&self, id: ExecutionId, command: Command) -> Result<u32, GuestError>;
    /// The output of a detached command from its beginning, then live, then its `Exit`.
    async fn follow(&self, id: ExecutionId) -> Result<mpsc::Receiver<ProcessEvent>, GuestError>;
    /// As [`Guest::follow`], but where the guest can, without the output, which is not taken for read by that.
    async fn follow_exit(&self, id: ExecutionId) -> Result<mpsc::Receiver<ProcessEvent>, GuestError> {
        self.follow(id).await
    }
    /// Drops a finished detached command's output, or ends one that still runs.
    async fn forget(&self, id: ExecutionId) -> Result<(), GuestError>;

    /// `length` 0 is to the end. `chunk_bytes` 0 is the guest's choice.
    async fn read_file(&self, path: &str, offset: u64, length: u64, chunk_bytes: u32)
    -> Result<FileReader, GuestError>;
    async fn write_file(&self, path: &str, options: WriteOptions) -> Result<FileWriter, GuestError>;
    /// `None` when nothing is there. Does not follow a final symbolic link.
    async fn stat(&self, path: &str) -> Result<Option<FileStat>, GuestError>;
    /// Returns the directory's modification time, ns. With `recursive` an existing one is fine.
    async fn make_directory(&self, path: &str, mode: u32, recursive: bool) -> Result<i64, GuestError>;
    /// Number of entries removed; 0 when nothing was there. Never crosses a symbolic link.
    async fn remove(&self, path: &str, recursive: bool) -> Result<u64, GuestError>;
    /// Sorted by name.
    /// Each part takes its room before it is kept.
    async fn list_directory(
        &self,
        path: &str,
        include_hidden: bool,
        room: &dyn Room,
    ) -> Result<Vec<DirectoryEntry>, GuestError>;

    /// Connects to something that listens in the sandbox. The error's `errno` is the operating system's, e.g.
    /// `ECONNREFUSED` when nothing listens there. Dropping the future gives up.
    async fn connect(&self, address: &Address) -> Result<BoxStream, GuestError>;
    /// Listens in the sandbox, until the listener is dropped or the server ends.
    async fn listen(&self, bind: &Bind) -> Result<Listener, GuestError>;
}

// ---------------------------------------------------------------------------------------------
// Edge

/// Where a preview can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// What a browser opens, without a slash at its end.
    pub url: String,
    /// The loopback port that is the preview's own; 0 where previews are told apart by their host names.
    pub port: u16,
}

/// The outside of the server, where previews are reached under their labels (one DNS label each).
#[async_trait]
pub trait Edge: Send + Sync + 'static {
    /// Makes a preview reachable. `port` is the one it had before, kept while it is free; 0 for none. Repeating it is no error.
    /// The error says what is missing, in words for the user.
    async fn publish(&self, label: &str, port: u16) -> Result<Published, String>;
    /// Ends that; connections under way may go on to their end. Withdrawing an unknown one is no error.
    async fn withdraw(&self, label: &str);
}

// ---------------------------------------------------------------------------------------------
// Clock and randomness

/// Wall-clock time. Deadlines are wall-clock times, so that they mean the same after a restart.
pub trait Clock: Send + Sync + 'static {
    fn now(&self) -> UnixMs;
    /// Completes at or after the given time, also when the wall clock jumps past it.
    fn sleep_until(&self, at: UnixMs) -> BoxFuture<()>;
}

pub trait Entropy: Send + Sync + 'static {
    fn fill(&self, bytes: &mut [u8]);
}
