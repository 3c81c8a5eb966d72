//! The one table of error codes. Façades, the command line and the documents are fed from it.

use std::fmt;

/// What an answer may say of an error, in the form that it travels in. gRPC carries it in header fields, of which clients
/// take 8 KiB gladly and 16 KiB at most, all of an answer's together.
pub const STATUS_BYTES_MAX: usize = 7 * 1024;
/// The rest is for the names of the fields and the status itself.
const TEXT_BYTES_MAX: usize = STATUS_BYTES_MAX - 256;
/// Stands where the rest of a text was left out.
pub(crate) const CUT_MARK: &str = "… (cut here: the whole is too long for an answer)";

/// The status codes that gRPC and Connect share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    InvalidArgument,
    Unauthenticated,
    PermissionDenied,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    ResourceExhausted,
    DeadlineExceeded,
    Unavailable,
    Unimplemented,
    Aborted,
    Internal,
}

impl Status {
    /// The nearest status of plain HTTP, for answers that are neither gRPC nor Connect.
    pub const fn http_status(self) -> u16 {
        match self {
            Self::InvalidArgument => 400,
            Self::Unauthenticated => 401,
            Self::PermissionDenied => 403,
            Self::NotFound => 404,
            Self::AlreadyExists | Self::FailedPrecondition | Self::Aborted => 409,
            Self::ResourceExhausted => 429,
            Self::Internal => 500,
            Self::Unimplemented => 501,
            Self::Unavailable => 503,
            Self::DeadlineExceeded => 504,
        }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident => $name:literal, $status:ident, $text:literal, $remedy:literal;)*) => {
        /// A stable code for everything that can go wrong. Never renamed, never reused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code {
            $($(#[$doc])* $variant,)*
        }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The code with this name.
            pub fn from_name(name: &str) -> Option<Code> {
                Self::ALL.iter().copied().find(|code| code.name() == name)
            }

            /// The stable name, as users see it in answers, logs and documents.
            pub const fn name(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            pub const fn status(self) -> Status {
                match self { $(Code::$variant => Status::$status,)* }
            }

            /// What happened. Must never be built from names or paths a user chose: families of clients
            /// match on parts of it.
            pub const fn text(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// What the reader can do about it.
            pub const fn remedy(self) -> &'static str {
                match self { $(Code::$variant => $remedy,)* }
            }
        }
    };
}

impl Code {
    /// The status of an answer in plain HTTP.
    pub const fn http_status(self) -> u16 {
        match self {
            Self::MessageTooLarge => 413,
            Self::DiskFull => 507,
            other => other.status().http_status(),
        }
    }

    /// With what the command line ends: the numbers of sysexits.h, which commands seldom use
    /// themselves, but for three that shells and `timeout` have made familiar.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::CommandTimedOut => 124,
            Self::InvalidCommand => 126,
            Self::CommandNotFound => 127,
            other => match other.status() {
                Status::InvalidArgument => 64,
                Status::NotFound => 66,
                Status::FailedPrecondition => 69,
                Status::Internal => 70,
                Status::AlreadyExists => 73,
                Status::ResourceExhausted | Status::DeadlineExceeded | Status::Unavailable | Status::Aborted => 75,
                Status::Unimplemented => 76,
                Status::Unauthenticated | Status::PermissionDenied => 77,
            },
        }
    }

    /// The code at the end of a text made by [`Error::coded_text`].
    pub fn in_wire_text(text: &str) -> Option<Code> {
        let (_, name) = text.strip_suffix(']')?.rsplit_once(" [")?;
        Self::from_name(name)
    }
}

codes! {
    InvalidArgument => "invalid_argument", InvalidArgument, "invalid argument", "Correct the named field and send the request again.";
    InvalidId => "invalid_id", InvalidArgument, "invalid argument: not a UUID", "Ids are UUIDs in the hyphenated form; use one that this server returned.";
    InvalidResources => "invalid_resources", InvalidArgument, "invalid argument: resources out of range", "Ask for an amount in the range that the message names.";
    InvalidCommand => "invalid_command", InvalidArgument, "invalid argument: command", "Send at least one argument; arguments, environment and directory must not hold NUL bytes.";
    InvalidPath => "invalid_path", InvalidArgument, "invalid argument: path", "Paths must not be empty or hold NUL bytes, and no longer than 4096 bytes.";
    PathRefused => "path_refused", InvalidArgument, "invalid argument: mount path", "Use an absolute path without `..`, outside /proc, /sys, /dev and /run, that neither is nor holds nor lies below another mount.";
    StreamProtocol => "stream_protocol", InvalidArgument, "invalid argument: frames out of order", "The first frame of a stream is its start frame, and there is exactly one.";
    Unauthenticated => "unauthenticated", Unauthenticated, "missing or unknown credential", "Send an API key of this server as `Authorization: Bearer tk_…`; `nagaya serve` prints one at its first start.";
    InvalidCertificate => "invalid_certificate", Unauthenticated, "missing, expired or foreign session certificate", "Ask for a new certificate for this session.";
    PreviewPrivate => "preview_private", Unauthenticated, "missing, expired or foreign viewer token", "This preview is private: open it with a URL that was made for viewing it lately.";
    SessionNotFound => "session_not_found", NotFound, "session not found", "Check the id; sessions of other workspaces look the same as unknown ones.";
    WorkspaceNotFound => "workspace_not_found", NotFound, "workspace not found", "Name the workspace of your API key, or none.";
    ExecutionNotFound => "execution_not_found", NotFound, "execution not found in this session", "Use the execution id that was returned when the command was started.";
    FileNotFound => "file_not_found", NotFound, "no such file or directory", "Check the path; relative paths start in the home directory of the sandbox's user.";
    CommandNotFound => "command_not_found", NotFound, "command not found: no such file or directory", "Give an absolute path, or a name that is on the sandbox's PATH.";
    TemplateNotFound => "template_not_found", NotFound, "template not found", "Check the id; templates of other workspaces look the same as unknown ones.";
    TemplateBuildNotFound => "template_build_not_found", NotFound, "template build not found", "Use the build id that was returned when the build was started.";
    RegistryImageNotFound => "registry_image_not_found", NotFound, "registry image not found", "Check the reference, and that it may be seen from here; `nagaya image ls` tells what is on this host.";
    SnapshotNotFound => "snapshot_not_found", NotFound, "snapshot not found", "Check the id; deleted snapshots look the same as unknown ones.";
    VolumeNotFound => "volume_not_found", NotFound, "volume not found", "Check the id; deleted volumes look the same as unknown ones.";
    PreviewNotFound => "preview_not_found", NotFound, "preview URL not found", "Check the id, slug or token; deleted and expired preview URLs look the same as unknown ones.";
    ArtifactExpired => "artifact_expired", NotFound, "artifact not found or expired", "Ask for a new URL.";
    SessionTerminated => "session_terminated", FailedPrecondition, "session is terminated", "Create a new session.";
    SessionNotRunning => "session_not_running", FailedPrecondition, "session not RUNNING", "Wait until the session is RUNNING.";
    InboundDisabled => "inbound_disabled", FailedPrecondition, "inbound access is disabled for this session", "Create the session with inbound access allowed.";
    PreviewUnbound => "preview_unbound", FailedPrecondition, "preview URL is not bound to a sandbox", "Bind it to a sandbox's port, or expose the port under this slug.";
    PreviewPaused => "preview_paused", FailedPrecondition, "the sandbox behind this preview is paused", "Resume its session (`nagaya sandbox resume`), and load this again.";
    SshUnavailable => "ssh_unavailable", FailedPrecondition, "SSH is not available for this session", "Wait until the session is RUNNING; the message names the cause.";
    SshGatewayUnavailable => "ssh_gateway_unavailable", Unavailable, "no SSH gateway is ready", "Try again in a moment.";
    SnapshotNotDurable => "snapshot_not_durable", FailedPrecondition, "snapshot not yet durable", "Wait until the snapshot is durable.";
    SnapshotInUse => "snapshot_in_use", FailedPrecondition, "snapshot is in use", "End the sessions that were made from it first; a pause's snapshot goes when its session is resumed or ends.";
    SnapshotNotReady => "snapshot_not_ready", FailedPrecondition, "snapshot is not ready", "Wait until the snapshot's state is READY.";
    SnapshotDamaged => "snapshot_damaged", FailedPrecondition, "snapshot is damaged", "A part of it is missing or changed in the blob store; restore that part from a backup, or use another snapshot.";
    PauseFailed => "pause_failed", FailedPrecondition, "the session could not be paused", "It runs on; try again, and look at the server's log if it stays so.";
    RootUnavailable => "root_unavailable", FailedPrecondition, "the image under the disk is not on this host", "Bring the image that the message names back to the host; a disk is never started over another one.";
    RootMismatch => "root_mismatch", FailedPrecondition, "the disk was written over another image", "Start it over the image that the message names first: what is on a disk means nothing over another one.";
    ImageInvalid => "image_invalid", InvalidArgument, "not an image that can run here", "The message names what is wrong with it; check the name, and that the image is made for this host's platform.";
    ImageRefused => "image_refused", FailedPrecondition, "the server's operator does not allow this image", "The message names the setting of section [images] that says so.";
    ImageUnavailable => "image_unavailable", Unavailable, "the registry did not give the image", "Try again later; what has arrived as a whole is not fetched again.";
    ResumeFailed => "resume_failed", FailedPrecondition, "the session could not be resumed", "Its disk is intact; remove the cause that the message names and resume it again.";
    TemplateBuildInProgress => "template_build_in_progress", FailedPrecondition, "template build already in progress", "Wait for the build, or cancel it.";
    VolumeInUse => "volume_in_use", FailedPrecondition, "volume is in use", "Detach it from every session first.";
    VolumeBusy => "volume_busy", FailedPrecondition, "volume is in use: a process has files open", "Close the files, or detach it by force: then the process's later reads and writes there fail.";
    VolumeSyncPending => "volume_sync_pending", FailedPrecondition, "volume sync pending", "Try again when the last write-back has ended.";
    IsADirectory => "is_a_directory", FailedPrecondition, "is a directory", "Name a file.";
    NotADirectory => "not_a_directory", FailedPrecondition, "not a directory", "Name a directory.";
    NotARegularFile => "not_a_regular_file", FailedPrecondition, "not a regular file", "Only regular files can be read and written through the file API; use a command for others.";
    DirectoryNotEmpty => "directory_not_empty", FailedPrecondition, "directory not empty", "Ask for a recursive removal.";
    TemplateExists => "template_exists", AlreadyExists, "template already exists", "Choose another name.";
    SlugTaken => "slug_taken", AlreadyExists, "slug already in use", "Choose another slug; slugs are unique on a server.";
    SessionNameTaken => "session_name_taken", AlreadyExists, "session name already in use", "Choose another name, or end the session that has it: this name is to be unique in its workspace.";
    FileExists => "file_exists", AlreadyExists, "file exists", "Choose another path, or remove what is there.";
    FileSystem => "file_system", FailedPrecondition, "the file system refused", "The message names the operating system's reason.";
    GitFailed => "git_failed", FailedPrecondition, "git operation failed", "The message has what git said; check the repository, the reference and the access token.";
    PermissionDenied => "permission_denied", PermissionDenied, "permission denied", "The sandbox's kernel refused; read-only places cannot be written.";
    DiskFull => "disk_full", ResourceExhausted, "no space left on the sandbox's disk", "Remove files, or create a session with a larger disk.";
    QuotaExceeded => "quota_exceeded", ResourceExhausted, "workspace quota reached", "Terminate sessions that are no longer needed, or ask the operator for a higher limit.";
    CapacityUnavailable => "capacity_unavailable", ResourceExhausted, "no capacity left on this server", "Try again when other sandboxes have ended; the message names the limit, which the operator can raise.";
    PortLimit => "port_limit", ResourceExhausted, "maximum exposed ports reached", "Unexpose ports that are no longer needed.";
    VolumeLimit => "volume_limit", ResourceExhausted, "volume limit reached", "Delete volumes that are no longer needed, or ask the operator for a higher limit.";
    RateLimited => "rate_limited", ResourceExhausted, "rate limit reached", "Send fewer requests at a time and try again in a moment.";
    MessageTooLarge => "message_too_large", ResourceExhausted, "message larger than the server accepts", "Use the streaming form of the call.";
    CommandTimedOut => "command_timed_out", DeadlineExceeded, "command timed out", "Give it more time, or find out why it hangs.";
    DeadlineExceeded => "deadline_exceeded", DeadlineExceeded, "deadline exceeded", "Give the call more time.";
    Draining => "draining", Unavailable, "the server is shutting down", "Try again in a moment.";
    PreviewFailed => "preview_failed", Unavailable, "the server cannot make the port reachable", "The message names what is missing on the server; nothing was changed. Try again once that is there.";
    ServiceNotListening => "service_not_listening", Unavailable, "nothing listens on this port of the sandbox", "Start the service there, on 0.0.0.0, 127.0.0.1 or [::1], and load this again.";
    ServiceBroken => "service_broken", Unavailable, "the service in the sandbox did not give a valid HTTP answer", "Look at the service's log; it must speak HTTP/1.1, without TLS.";
    ServiceTimedOut => "service_timed_out", Unavailable, "the service in the sandbox did not answer in time", "Look at the service's log; the operator can raise previews.answer_timeout_ms.";
    HostRefused => "host_refused", InvalidArgument, "the request names no host that is served here", "Open the URL as it was returned, with one valid Host field.";
    GuestUnreachable => "guest_unreachable", Unavailable, "the sandbox does not answer", "Try again; if it stays so, terminate the session and look at the server's log.";
    ConnectionRefused => "connection_refused", Unavailable, "connection refused in the sandbox", "Nothing listens at this port or path; start the service, or look at where it listens.";
    BindFailed => "bind_failed", FailedPrecondition, "the sandbox cannot listen there", "The message names the operating system's reason; choose another port, address or path.";
    TransportUnfit => "transport_unfit", Unimplemented, "gRPC needs HTTP/2, or HTTP/1.1 with `TE: trailers`", "Use an HTTP/2 client for gRPC, or speak Connect or gRPC-Web; nothing was done.";
    CapabilityUnavailable => "capability_unavailable", Unimplemented, "not offered by this sandbox's driver", "Use a session on a driver that offers it.";
    Unimplemented => "unimplemented", Unimplemented, "not implemented by this server yet", "See docs/roadmap.md for what works.";
    SnapshotFailed => "snapshot_failed", Internal, "the snapshot failed", "The session is as it was; remove the cause that the message names and take it again.";
    VolumeRefused => "volume_refused", FailedPrecondition, "the host cannot change this volume now", "Its content is intact; the message names the cause and what to do.";
    VolumeFailed => "volume_failed", Internal, "the volume could not be changed", "Its content is intact; the message names the cause.";
    RecordsMissing => "records_missing", FailedPrecondition, "the data directory holds what its database does not name", "Nothing was removed. `nagaya recover` puts the records back from the copies beside the database, or restore a backup of it first; `nagaya serve --discard` removes what has no record, for good.";
    StoreDamaged => "store_damaged", Internal, "the server's records are damaged", "Stop the server and run `nagaya recover`: it sets the damaged database aside and rebuilds the records from their copies in the data directory; a backup may be restored before that.";
    Internal => "internal", Internal, "internal error", "This is a bug in Nagaya; please report it with the server's log.";
}

/// What a caller is told: a stable code, and what exactly happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    pub code: Code,
    /// Particulars, such as the field or the limit. May be empty. Must follow the rule of [`Code::text`].
    pub detail: String,
}

impl Error {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }
}

impl Error {
    /// Text, detail and `[code]`.
    pub fn coded_text(&self) -> String {
        format!("{self} [{}]", self.code.name())
    }
}

/// The text with its middle left out, if it is too long for an answer. A code at its end stays.
pub fn bounded(text: &str) -> Option<String> {
    if fits(text) {
        return None;
    }
    let code = Code::in_wire_text(text).map(|code| format!(" [{}]", code.name()));
    let end = format!("{CUT_MARK}{}", code.unwrap_or_default());
    let (mut encoded, mut plain, mut kept) = (encoded_bytes(&end), end.len(), 0);
    for character in text.chars() {
        encoded += encoded_bytes(character.encode_utf8(&mut [0; 4]));
        plain += character.len_utf8();
        if carried_bytes(encoded, plain) > TEXT_BYTES_MAX {
            break;
        }
        kept += character.len_utf8();
    }
    Some(format!("{}{end}", &text[..kept]))
}

fn fits(text: &str) -> bool {
    // Most are far shorter, whatever is in them.
    text.len() < TEXT_BYTES_MAX / 10 || carried_bytes(encoded_bytes(text), text.len()) <= TEXT_BYTES_MAX
}

/// What a text takes in an answer by gRPC without a message: it stands in the header, once more in the trailers, both times
/// percent-encoded, and in the status there, in base64.
fn carried_bytes(encoded: usize, plain: usize) -> usize {
    2 * encoded + (plain * 4).div_ceil(3)
}

/// Of a text when it is percent-encoded as gRPC asks.
fn encoded_bytes(text: &str) -> usize {
    text.bytes().map(|byte| if (b' '..=b'~').contains(&byte) && byte != b'%' { 1 } else { 3 }).sum()
}

impl From<Code> for Error {
    fn from(code: Code) -> Self {
        Self { code, detail: String::new() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code.text())?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
