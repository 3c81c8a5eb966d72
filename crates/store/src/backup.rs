//! A copy of the database as it is at one moment, also while a server uses it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nagaya_engine::ports::StoreError;
use rusqlite::OpenFlags;

use crate::sqlite::connect;
use crate::{health, migrate};

/// Writes a consistent copy of the database to a new file, fsync'ed. On error there is no such file.
///
/// Needs no lock: readers do not stop the server's writer. The copy is one file; what the server has in its
/// write-ahead log is in it.
pub fn backup(database: &Path, target: &Path) -> Result<(), StoreError> {
    let failed = |action: &str, error: &dyn std::fmt::Display| StoreError::Failed(format!("{action}: {error}"));
    if !fs::metadata(database).is_ok_and(|found| found.len() > 0) {
        return Err(failed("back up", &format_args!("there is no database at {}", database.display())));
    }
    migrate::check(database)?;
    let source = connect(database, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let name = target.to_str().ok_or_else(|| failed("write the backup", &"its name must be UTF-8"))?;
    let place = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)
        .map_err(|error| failed(&format!("make {}", target.display()), &error))?;
    let written = source
        .execute("VACUUM INTO ?1", [name])
        .map_err(|error| health::error(&format!("back up to {}", target.display()), &error))
        .and_then(|_| health::check(&connect(target, OpenFlags::SQLITE_OPEN_READ_ONLY)?, target))
        .and_then(|()| {
            File::open(target)
                .and_then(|file| file.sync_all())
                .and_then(|()| File::open(place)?.sync_all())
                .map_err(|error| failed("sync the backup", &error))
        });
    if written.is_err() {
        let _ = fs::remove_file(target);
    }
    written
}
