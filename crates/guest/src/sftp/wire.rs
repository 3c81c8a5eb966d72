//! Packets: numbers and strings, in and out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;

pub const INIT: u8 = 1;
pub const VERSION: u8 = 2;
pub const OPEN: u8 = 3;
pub const CLOSE: u8 = 4;
pub const READ: u8 = 5;
pub const WRITE: u8 = 6;
pub const LSTAT: u8 = 7;
pub const FSTAT: u8 = 8;
pub const SETSTAT: u8 = 9;
pub const FSETSTAT: u8 = 10;
pub const OPENDIR: u8 = 11;
pub const READDIR: u8 = 12;
pub const REMOVE: u8 = 13;
pub const MKDIR: u8 = 14;
pub const RMDIR: u8 = 15;
pub const REALPATH: u8 = 16;
pub const STAT: u8 = 17;
pub const RENAME: u8 = 18;
pub const READLINK: u8 = 19;
pub const SYMLINK: u8 = 20;
pub const STATUS: u8 = 101;
pub const HANDLE: u8 = 102;
pub const DATA: u8 = 103;
pub const NAME: u8 = 104;
pub const ATTRIBUTES: u8 = 105;
pub const EXTENDED: u8 = 200;
pub const EXTENDED_REPLY: u8 = 201;

/// Why a request is refused, in the protocol's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    EndOfFile,
    /// The packet is not what its kind asks for.
    Malformed,
    Unsupported,
    /// There is no such handle, or it is of the other kind.
    Handle,
    TooManyHandles,
    System(Errno),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::System(errno)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::System(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl Failure {
    /// The number, and the words that go with it.
    fn status(self) -> (u32, String) {
        match self {
            Self::EndOfFile => (1, "end of file".into()),
            Self::Malformed => (5, "malformed packet".into()),
            Self::Unsupported => (8, "operation unsupported".into()),
            Self::Handle => (4, "no such handle".into()),
            Self::TooManyHandles => (4, "too many open files".into()),
            Self::System(errno) => {
                let number = match errno {
                    Errno::NOENT | Errno::LOOP => 2,
                    Errno::ACCESS | Errno::PERM => 3,
                    Errno::NAMETOOLONG | Errno::INVAL => 5,
                    Errno::NOSYS | Errno::OPNOTSUPP => 8,
                    _ => 4,
                };
                (number, errno.to_string())
            }
        }
    }
}

/// What is left of a packet to be read.
#[derive(Debug)]
pub struct Request<'a>(&'a [u8]);

impl<'a> Request<'a> {
    /// The kind of a packet, and what follows.
    pub fn parse(packet: &'a [u8]) -> Option<(u8, Self)> {
        packet.split_first().map(|(kind, rest)| (*kind, Self(rest)))
    }

    pub fn number(&mut self) -> Result<u32, Failure> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Failure::Malformed)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*bytes))
    }

    pub fn long_number(&mut self) -> Result<u64, Failure> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Failure::Malformed)?;
        self.0 = rest;
        Ok(u64::from_be_bytes(*bytes))
    }

    pub fn string(&mut self) -> Result<&'a [u8], Failure> {
        let length = self.number()? as usize;
        let (string, rest) = self.0.split_at_checked(length).ok_or(Failure::Malformed)?;
        self.0 = rest;
        Ok(string)
    }

    /// A path; the empty one is where the server was started.
    pub fn path(&mut self) -> Result<&'a Path, Failure> {
        let bytes = self.string()?;
        if bytes.contains(&0) {
            return Err(Failure::Malformed);
        }
        Ok(Path::new(OsStr::from_bytes(if bytes.is_empty() { b"." } else { bytes })))
    }
}

/// A packet being written behind others.
pub struct Reply<'a> {
    answers: &'a mut Vec<u8>,
    start: usize,
    id: u32,
}

impl<'a> Reply<'a> {
    pub fn begin(answers: &'a mut Vec<u8>) -> Self {
        let start = answers.len();
        answers.extend_from_slice(&[0; 4]);
        Self { answers, start, id: 0 }
    }

    pub fn set_id(&mut self, id: u32) {
        self.id = id;
    }

    /// Forgets what was written of this packet.
    pub fn restart(&mut self, id: u32) {
        self.answers.truncate(self.start + 4);
        self.id = id;
    }

    pub fn abandon(self) {
        self.answers.truncate(self.start);
    }

    pub fn finish(self) {
        let length = (self.answers.len() - self.start - 4) as u32;
        self.answers[self.start..self.start + 4].copy_from_slice(&length.to_be_bytes());
    }

    pub fn byte(&mut self, byte: u8) {
        self.answers.push(byte);
    }

    pub fn number(&mut self, number: u32) {
        self.answers.extend_from_slice(&number.to_be_bytes());
    }

    pub fn long_number(&mut self, number: u64) {
        self.answers.extend_from_slice(&number.to_be_bytes());
    }

    pub fn string(&mut self, string: &[u8]) {
        self.number(string.len() as u32);
        self.answers.extend_from_slice(string);
    }

    /// The kind of the answer and the id of what it answers.
    pub fn head(&mut self, kind: u8) {
        self.byte(kind);
        self.number(self.id);
    }

    pub fn status(&mut self, failure: Failure) {
        let (number, text) = failure.status();
        self.write_status(number, &text);
    }

    pub fn done(&mut self) {
        self.write_status(0, "");
    }

    fn write_status(&mut self, number: u32, text: &str) {
        self.head(STATUS);
        self.number(number);
        self.string(text.as_bytes());
        self.string(b"en");
    }

    pub fn handle(&mut self, handle: u32) {
        self.head(HANDLE);
        self.string(&handle.to_be_bytes());
    }

    /// One name, as the answer to questions for a path.
    pub fn name(&mut self, name: &[u8]) {
        self.head(NAME);
        self.number(1);
        self.string(name);
        self.string(name);
        // No attributes.
        self.number(0);
    }

    /// What `read` puts into a buffer of this size, as the answer to READ.
    pub fn data(&mut self, size: usize, read: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> Result<(), Failure> {
        self.head(DATA);
        let length_at = self.answers.len();
        self.answers.resize(length_at + 4 + size, 0);
        let length = read(&mut self.answers[length_at + 4..])?;
        if length == 0 && size > 0 {
            return Err(Failure::EndOfFile);
        }
        self.answers.truncate(length_at + 4 + length);
        self.answers[length_at..length_at + 4].copy_from_slice(&(length as u32).to_be_bytes());
        Ok(())
    }

    /// Bytes of this packet so far.
    pub fn length(&self) -> usize {
        self.answers.len() - self.start
    }

    /// Leaves room for a number that is known later; where it is.
    pub fn room_for_number(&mut self) -> usize {
        self.number(0);
        self.answers.len() - 4
    }

    pub fn fill_number(&mut self, at: usize, number: u32) {
        self.answers[at..at + 4].copy_from_slice(&number.to_be_bytes());
    }
}
