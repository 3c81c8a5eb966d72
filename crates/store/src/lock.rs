//! The lock that keeps two servers from sharing one data directory.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nagaya_engine::ports::StoreError;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Name of the lock file inside the data directory.
const FILE_NAME: &str = "nagaya.db.lock";

/// Exclusive use of a data directory, until it is dropped or the process dies.
#[derive(Debug)]
pub struct DirectoryLock {
    // The kernel releases the lock when the last descriptor of this opening is closed.
    file: File,
}

impl Drop for DirectoryLock {
    fn drop(&mut self) {
        // A process that is being started at this moment has a copy of the descriptor until it executes its program.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

impl DirectoryLock {
    /// Takes the lock at once, or says which process holds it.
    pub fn acquire(directory: &Path) -> Result<Self, StoreError> {
        let path = directory.join(FILE_NAME);
        let fail = |cause: &dyn std::fmt::Display| StoreError::Failed(format!("lock {}: {cause}", path.display()));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| fail(&error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(held(directory, &path, &mut file)),
            Err(error) => return Err(fail(&error)),
        }
        // The pid is for people only: it is the kernel's lock that counts, so a stale one is harmless.
        file.set_len(0).map_err(|error| fail(&error))?;
        file.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(|error| fail(&error))?;
        Ok(Self { file })
    }
}

fn held(directory: &Path, path: &Path, file: &mut File) -> StoreError {
    let mut pid = String::new();
    let readable = file.rewind().and_then(|()| file.take(32).read_to_string(&mut pid)).is_ok();
    let holder = match pid.trim().parse::<u32>() {
        Ok(pid) if readable => format!("process {pid}"),
        _ => "another process".to_string(),
    };
    StoreError::Failed(format!(
        "the data directory {} is in use by {holder} (lock file {}); stop that server, or choose another data directory",
        directory.display(),
        path.display(),
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_refused_and_told_who_holds_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let first = DirectoryLock::acquire(directory.path()).unwrap();
        let refused = DirectoryLock::acquire(directory.path()).unwrap_err();
        assert!(refused.to_string().contains(&format!("process {}", std::process::id())), "{refused}");
        drop(first);
        DirectoryLock::acquire(directory.path()).unwrap();
    }

    #[test]
    fn a_lock_ends_with_its_holder_although_a_child_has_its_descriptor_for_a_moment() {
        let directory = tempfile::tempdir().unwrap();
        let first = DirectoryLock::acquire(directory.path()).unwrap();
        let _as_in_a_child = first.file.try_clone().unwrap();
        drop(first);
        DirectoryLock::acquire(directory.path()).unwrap();
    }
}
