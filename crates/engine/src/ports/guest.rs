//! A running sandbox, seen from outside. Each driver gives one for each of its sandboxes.

use std::collections::BTreeMap;
use std::net::IpAddr;

use async_trait::async_trait;
use bytes::Bytes;
use nagaya_api::ids::ExecutionId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};

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
    pub user: User,
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

/// Who a command runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum User {
    /// The image's own.
    #[default]
    Image,
    Root,
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

/// How a command came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExitReason {
    #[default]
    Exited,
    Signaled,
    /// Its time was up, and TERM was enough.
    TimedOut,
    /// Its time was up, and it took KILL.
    KilledAfterGrace,
    OutOfMemory,
    /// Whoever held it went away; see [`WhenLeft::HangUp`].
    HungUp,
    /// The sandbox ended first.
    SessionEnded,
}

impl ExitReason {
    pub const ALL: [Self; 7] = [
        Self::Exited,
        Self::Signaled,
        Self::TimedOut,
        Self::KilledAfterGrace,
        Self::OutOfMemory,
        Self::HungUp,
        Self::SessionEnded,
    ];

    /// Under which agents and users are told of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exited => "exit",
            Self::Signaled => "signaled",
            Self::TimedOut => "timeout",
            Self::KilledAfterGrace => "grace_timeout",
            Self::OutOfMemory => "out_of_memory",
            Self::HungUp => "hung_up",
            Self::SessionEnded => "session_terminated",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExitStatus {
    /// −1 when a signal ended it.
    pub code: i32,
    /// Name of that signal, e.g. `SIGKILL`; else empty.
    pub signal: String,
    pub timed_out: bool,
    pub duration_ms: u64,
    pub reason: ExitReason,
    pub errno: i32,
    /// Of a command that failed: processes of the sandbox that were killed because memory ran out while it ran.
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
    /// A new unix socket of the image's user, by its absolute path in the sandbox.
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
/// the home of the image's user. File calls act as the sandbox's root; what they make new belongs to that user.
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
