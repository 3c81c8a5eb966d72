//! The engine's view of the world: a store, a driver, a clock and a source of randomness.
//!
//! Implementations: `nagaya-store` (SQLite), `nagaya-runtime` (drivers), [`crate::fake`] (all of
//! them, for tests), `nagaya-daemon` (the host's clock and randomness).

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use nagaya_api::ids::{ExecutionId, SessionId, WorkspaceId};
use tokio::sync::{mpsc, oneshot};

use crate::model::{ApiKey, Execution, Guarantees, Machine, Session, SessionState, UnixMs, Workspace};

pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

// ---------------------------------------------------------------------------------------------
// Store

#[derive(Debug, thiserror::Error)]
#[error("store: {0}")]
pub struct StoreError(pub String);

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
}

// ---------------------------------------------------------------------------------------------
// Driver

#[derive(Debug, Clone, thiserror::Error)]
pub enum DriverError {
    /// Something finite ran out: the text is the limit's name, e.g. `network_slots_max`.
    #[error("limit reached: {0}")]
    Exhausted(String),
    /// There is no such sandbox, or it is dead.
    #[error("no such sandbox")]
    Gone,
    #[error("{0}")]
    Failed(String),
}

/// A sandbox ended without being asked to.
#[derive(Debug, Clone)]
pub struct SandboxExit {
    pub id: SessionId,
    /// In words for the user, e.g. "the sandbox's first process was killed".
    pub cause: String,
}

/// A technology that runs sandboxes. Every call may be repeated after a crash between any two of
/// its steps; sandboxes live on when the process that made them dies.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    fn guarantees(&self) -> Guarantees;
    /// Makes a sandbox and returns when commands can run in it. On error nothing is left behind,
    /// or what is left is found by [`Driver::list`].
    async fn create(&self, id: SessionId, machine: &Machine) -> Result<Arc<dyn Guest>, DriverError>;
    /// Takes over a sandbox that an earlier process made. `Gone` when it does not run any more.
    async fn adopt(&self, id: SessionId) -> Result<Arc<dyn Guest>, DriverError>;
    /// Ends a sandbox. On return none of its processes is alive; its disk and network are being
    /// released in the background and [`Driver::list`] names it until they are. Repeating it, or
    /// naming an unknown sandbox, is no error.
    async fn destroy(&self, id: SessionId) -> Result<(), DriverError>;
    /// Every sandbox of which anything exists on this host, alive or half removed, except those
    /// whose release is already under way in this process.
    async fn list(&self) -> Result<Vec<SessionId>, DriverError>;
    /// Unasked ends of sandboxes that this process created or adopted. May be called once.
    fn exits(&self) -> mpsc::UnboundedReceiver<SandboxExit>;
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
    /// Terminal size in character cells.
    Resize {
        columns: u16,
        rows: u16,
    },
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
}

/// A running command that belongs to its holder: dropping `events` sends TERM to its process
/// group, and KILL 5 s later. A slow reader stalls only this command.
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
    async fn list_directory(&self, path: &str, include_hidden: bool) -> Result<Vec<DirectoryEntry>, GuestError>;
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
