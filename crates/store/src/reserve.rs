//! Space on the host's disk that is the store's before it needs it, so that records can be written when the disk is full.
//!
//! The blocks are allocated in place, beyond the ends of the database and of its write-ahead log: nobody else can have
//! them, and writing there takes no new ones.

use std::fs::{File, OpenOptions};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// Beyond the end of either file. A record is a few KiB, and an end writes three.
const RESERVE_BYTES: u64 = 8 << 20;

pub(crate) struct Reserve {
    paths: [PathBuf; 2],
    files: [Option<Held>; 2],
}

struct Held {
    /// Never closed: with it the process would lose the locks that SQLite has on the same file.
    file: ManuallyDrop<File>,
    /// The blocks up to here are the file's.
    until: u64,
}

impl Reserve {
    pub fn of(database: &Path) -> Self {
        let log = PathBuf::from(format!("{}-wal", database.display()));
        Self { paths: [database.to_owned(), log], files: [None, None] }
    }

    /// Takes what is missing. On a full disk that is left for later.
    pub fn keep(&mut self) {
        for (path, held) in self.paths.iter().zip(&mut self.files) {
            if held.is_none() {
                // The log is made with the first record.
                let Ok(file) = OpenOptions::new().write(true).open(path) else { continue };
                *held = Some(Held { file: ManuallyDrop::new(file), until: 0 });
            }
            if let Some(held) = held {
                held.keep();
            }
        }
    }
}

impl Held {
    fn keep(&mut self) {
        let Ok(length) = self.file.metadata().map(|found| found.len()) else { return };
        if length + RESERVE_BYTES / 2 <= self.until {
            return;
        }
        match rustix::fs::fallocate(&*self.file, FallocateFlags::KEEP_SIZE, length, RESERVE_BYTES) {
            Ok(()) => self.until = length + RESERVE_BYTES,
            Err(Errno::NOSPC | Errno::DQUOT | Errno::INTR) => {}
            Err(errno) => {
                tracing::warn!(error = %errno, "this file system reserves no space: on a full disk records cannot be written");
                self.until = u64::MAX;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn blocks_are_held_beyond_the_end_and_follow_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("database");
        std::fs::write(&path, "x").expect("write");
        let mut reserve = Reserve::of(&path);
        let blocks = || std::fs::metadata(&path).expect("metadata").blocks() * 512;
        reserve.keep();
        assert_eq!(std::fs::metadata(&path).expect("metadata").len(), 1, "its length is its own");
        assert!(blocks() >= RESERVE_BYTES, "{}", blocks());
        std::fs::OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(RESERVE_BYTES)).expect("grow");
        reserve.keep();
        assert!(blocks() >= 2 * RESERVE_BYTES - 4096, "{}", blocks());
    }
}
