//! What the agent tells the host when something cannot be done.

use nagaya_api::error::Code;
use rustix::io::Errno;

use crate::messages::{Error, Outcome};

/// A request that failed. The detail never holds a path or a name that a user chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    pub detail: String,
    /// 0 when the operating system had no part in it.
    pub errno: i32,
}

impl Failure {
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), errno: 0 }
    }

    pub fn with(code: Code, detail: impl Into<String>, errno: Errno) -> Self {
        Self { code, detail: detail.into(), errno: errno.raw_os_error() }
    }

    /// As the outcome of a stream.
    pub fn outcome(&self) -> Outcome {
        let error = Error { code: self.code.name().into(), detail: self.detail.clone(), errno: self.errno };
        Outcome { kind: error.into() }
    }
}

impl From<Errno> for Failure {
    /// The meaning of an error of the file system.
    fn from(errno: Errno) -> Self {
        let (code, detail) = match errno {
            Errno::NOENT => (Code::FileNotFound, ""),
            Errno::NOTDIR => (Code::NotADirectory, ""),
            Errno::ISDIR => (Code::IsADirectory, ""),
            Errno::EXIST => (Code::FileExists, ""),
            Errno::NOTEMPTY => (Code::DirectoryNotEmpty, ""),
            Errno::NOSPC | Errno::DQUOT => (Code::DiskFull, ""),
            Errno::ROFS => (Code::PermissionDenied, "read-only file system"),
            Errno::ACCESS | Errno::PERM => (Code::PermissionDenied, ""),
            Errno::NXIO => (Code::NotARegularFile, ""),
            Errno::NAMETOOLONG => (Code::InvalidPath, "a name is too long"),
            Errno::LOOP => (Code::FileSystem, "too many levels of symbolic links"),
            Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::AGAIN => {
                (Code::CapacityUnavailable, "files or memory in the sandbox")
            }
            other => {
                let reason = std::io::Error::from(other).to_string();
                return Self::with(Code::FileSystem, reason, other);
            }
        };
        Self::with(code, detail, errno)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(errno) => errno.into(),
            None => Self::new(Code::FileSystem, error.kind().to_string()),
        }
    }
}
