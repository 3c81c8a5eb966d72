//! Whether a database is what was written, and what SQLite's errors mean for the engine.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use nagaya_engine::ports::StoreError;
use rusqlite::{Connection, ErrorCode};

/// How long a start may look for damage. That is hundreds of megabytes; what lies beyond is met when it is read.
const CHECK_MAX: Duration = Duration::from_millis(500);

/// What an error of SQLite means, told with what was being done.
pub(crate) fn error(action: &str, error: &rusqlite::Error) -> StoreError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            StoreError::Damaged(format!("{action}: the database is damaged ({error})"))
        }
        _ => StoreError::Failed(format!("{action}: {error}")),
    }
}

/// Refuses a database with damaged pages, as far as that can be seen in the time that there is.
pub(crate) fn check(database: &Connection, path: &Path) -> Result<(), StoreError> {
    let interrupt = database.get_interrupt_handle();
    let (done, watched) = mpsc::channel::<()>();
    let watch = std::thread::Builder::new().name("store-check".into()).spawn(move || {
        if watched.recv_timeout(CHECK_MAX) == Err(mpsc::RecvTimeoutError::Timeout) {
            interrupt.interrupt();
        }
    });
    let found = database.query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0));
    drop(done);
    if let Ok(watch) = watch {
        // It ends with the channel.
        let _ = watch.join();
    }
    let damaged =
        |what: &str| StoreError::Damaged(format!("open {}: the database is damaged ({})", path.display(), what.trim()));
    match found {
        Ok(answer) if answer == "ok" => Ok(()),
        Ok(answer) => Err(damaged(&answer)),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted) => Ok(()),
        Err(error) => Err(self::error(&format!("open {}", path.display()), &error)),
    }
}
