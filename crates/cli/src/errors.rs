//! What a person is told when a verb fails: what happened and why, what to do, a stable code; and with what number
//! the program ends.

use std::fmt::Display;
use std::io;
use std::path::Path;

use nagaya_api::error::Code;
use nagaya_client::{Error as ClientError, RefusalKind};

use crate::output::printable;

/// Codes for what never reaches a server. Never renamed, never reused; those of servers are [`Code`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Local {
    /// The command line itself is wrong.
    Usage,
    /// No session is named, and there is no default.
    NoSession,
    /// An abbreviation or a name fits more than one thing.
    Ambiguous,
    /// Nothing has this name or begins with this id.
    NotFound,
    /// There is no key to show to a server.
    NoCredential,
    /// No server answers at the address.
    NoServer,
    /// A file of this machine cannot be read.
    CannotRead,
    /// A file of this machine cannot be written.
    CannotWrite,
    /// A program of this machine is missing.
    ProgramMissing,
    /// The other side broke the protocol or went away in the middle.
    Broken,
}

impl Local {
    pub const ALL: [Self; 10] = [
        Self::Usage,
        Self::NoSession,
        Self::Ambiguous,
        Self::NotFound,
        Self::NoCredential,
        Self::NoServer,
        Self::CannotRead,
        Self::CannotWrite,
        Self::ProgramMissing,
        Self::Broken,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::NoSession => "no_session",
            Self::Ambiguous => "ambiguous",
            Self::NotFound => "not_found",
            Self::NoCredential => "no_credential",
            Self::NoServer => "no_server",
            Self::CannotRead => "cannot_read",
            Self::CannotWrite => "cannot_write",
            Self::ProgramMissing => "program_missing",
            Self::Broken => "broken",
        }
    }

    /// From sysexits.h, as [`Code::exit_code`].
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Usage | Self::NoSession | Self::Ambiguous => 64,
            Self::NotFound | Self::CannotRead => 66,
            Self::NoServer | Self::ProgramMissing => 69,
            Self::CannotWrite => 74,
            Self::Broken => 76,
            Self::NoCredential => 77,
        }
    }
}

/// Ends of a verb that are not success.
#[derive(Debug)]
pub enum Failure {
    /// Told on stderr.
    Told { what: String, remedy: String, code: &'static str, exit: u8 },
    /// Whoever read our output went away: nobody is left to tell.
    BrokenPipe,
}

/// What `kill -PIPE` would have made of it.
const BROKEN_PIPE_EXIT: u8 = 141;

const NO_SERVER_REMEDY: &str =
    "Start a server on this machine with `nagaya serve`, or set TENKI_API_ENDPOINT to the address of another.";

const UNTRUSTED_REMEDY: &str =
    "If that is your server, set NAGAYA_ROOT_CERTIFICATES to a file (PEM) with the authority of its certificate.";

const UNAUTHENTICATED_REMEDY: &str = "Set TENKI_API_KEY to a key of this server, or run `nagaya login`; `nagaya serve` \
     prints a key at its first start and keeps it in its data directory, in `api-key`.";

impl Failure {
    pub fn new(code: Local, what: impl Display, remedy: impl Display) -> Self {
        Self::Told { what: what.to_string(), remedy: remedy.to_string(), code: code.name(), exit: code.exit_code() }
    }

    pub fn usage(what: impl Display, remedy: impl Display) -> Self {
        Self::new(Local::Usage, what, remedy)
    }

    /// A file of this machine that could not be read.
    pub fn reading(path: &Path, error: &io::Error) -> Self {
        let what = format!("cannot read {}: {}", path.display(), reason(error));
        Self::new(Local::CannotRead, what, "Check the path and that you may read it.")
    }

    /// A file of this machine that could not be written.
    pub fn writing(path: &Path, error: &io::Error) -> Self {
        let remedy = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "Make room on that disk; nothing was put in place of what was there."
            }
            _ => "Check that the directory exists and that you may write there.",
        };
        Self::new(Local::CannotWrite, format!("cannot write {}: {}", path.display(), reason(error)), remedy)
    }

    /// An error of writing to stdout or stderr.
    pub fn printing(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::writing(Path::new("the standard output"), error),
        }
    }

    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Told { exit, .. } => *exit,
            Self::BrokenPipe => BROKEN_PIPE_EXIT,
        }
    }

    /// Tells it on stderr, as `what [code]` and the remedy below it.
    pub fn tell(&self, colour: bool) {
        let Self::Told { what, remedy, code, .. } = self else { return };
        let (red, plain) = if colour { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
        let mut text = format!("{red}error:{plain} {} [{code}]\n", printable(what));
        if !remedy.is_empty() {
            text.push_str(&format!("  {remedy}\n"));
        }
        // Where stderr is gone nobody is left to tell.
        let _ = io::Write::write_all(&mut io::stderr(), text.as_bytes());
    }
}

/// The operating system's words in small letters.
fn reason(error: &io::Error) -> String {
    without_number(&error.to_string()).to_lowercase()
}

/// A message of the operating system without its number.
fn without_number(text: &str) -> &str {
    text.rfind(" (os error").map_or(text, |end| &text[..end])
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        if let ClientError::Unreachable { message, unsent } = &error {
            let what = without_number(message);
            return match unsent {
                true if message.contains("certificate") => Self::new(Local::NoServer, what, UNTRUSTED_REMEDY),
                true => Self::new(Local::NoServer, what, NO_SERVER_REMEDY),
                false => Self::new(Local::Broken, what, "See whether the server still runs, and try again."),
            };
        }
        if let ClientError::MissingToken = &error {
            let remedy = "Set TENKI_AUTH_TOKEN or TENKI_API_KEY, or run `nagaya login`.";
            return Self::new(Local::NoCredential, "there is no key for this server", remedy);
        }
        if let Some(code) = error.code() {
            let message = error.message();
            let ending = format!(" [{}]", code.name());
            let what = message.strip_suffix(&ending).unwrap_or(&message).to_owned();
            let remedy = match code {
                Code::Unauthenticated => UNAUTHENTICATED_REMEDY,
                code => code.remedy(),
            };
            return Self::Told { what, remedy: remedy.to_owned(), code: code.name(), exit: code.exit_code() };
        }
        without_code(&error)
    }
}

/// Errors of the SDK itself and of servers that send no code of ours.
fn without_code(error: &ClientError) -> Failure {
    let of = |code: Code| (code.name(), code.exit_code(), code.remedy());
    let (code, exit, remedy) = match error {
        ClientError::Refused { kind: RefusalKind::Unauthorized, .. } => {
            (Code::Unauthenticated.name(), Code::Unauthenticated.exit_code(), UNAUTHENTICATED_REMEDY)
        }
        ClientError::Refused { kind: RefusalKind::PermissionDenied, .. } => of(Code::PermissionDenied),
        ClientError::Refused { kind: RefusalKind::SessionNotFound, .. } => of(Code::SessionNotFound),
        ClientError::Refused { kind: RefusalKind::FileNotFound, .. } => of(Code::FileNotFound),
        other if other.retryable() => (Local::Broken.name(), 75, "Try again in a moment."),
        _ => (Local::Broken.name(), Local::Broken.exit_code(), ""),
    };
    Failure::Told { what: error.to_string(), remedy: remedy.to_owned(), code, exit }
}

/// The table of exit codes, for the manual.
pub fn exit_codes() -> String {
    let mut lines = vec![
        "0  success".to_owned(),
        "1 to 255 of `exec` and `ssh`: the command's own; 128 and the signal's number when one ended it".to_owned(),
    ];
    let mut numbers: Vec<u8> = Code::ALL.iter().map(|code| code.exit_code()).collect();
    numbers.extend(Local::ALL.map(Local::exit_code));
    numbers.sort_unstable();
    numbers.dedup();
    for number in numbers {
        let of_servers = Code::ALL.iter().filter(|code| code.exit_code() == number).map(|code| code.name());
        let ours = Local::ALL.into_iter().filter(|code| code.exit_code() == number).map(Local::name);
        lines.push(format!("{number}  {}", of_servers.chain(ours).collect::<Vec<_>>().join(", ")));
    }
    lines.push("130  interrupted three times before the command ended".to_owned());
    lines.push("141  whoever read the output went away".to_owned());
    lines.join("\n")
}
