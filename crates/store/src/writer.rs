//! The one thread that writes.
//!
//! A flush to the disk costs the same for one commit as for many, so everything that waits when
//! the writer becomes free goes into one transaction. Callers hear of their commit only after that
//! transaction is on the disk.

use nagaya_engine::ports::{Change, StoreError};
use rusqlite::{Connection, ErrorCode, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use crate::rows;

/// Commits in one transaction, so that a flood cannot grow it without end.
const GROUP_MAX: usize = 256;

/// One caller's changes, and where to tell the outcome.
pub(crate) struct Commit {
    pub changes: Vec<Change>,
    pub done: oneshot::Sender<Result<(), StoreError>>,
}

/// Writes until the other end of the queue is dropped and everything in it has been written.
pub(crate) fn run(mut database: Connection, mut queue: mpsc::Receiver<Commit>) {
    let mut group = Vec::new();
    while let Some(first) = queue.blocking_recv() {
        group.push(first);
        while group.len() < GROUP_MAX
            && let Ok(next) = queue.try_recv()
        {
            group.push(next);
        }
        match write(&mut database, &group) {
            Ok(()) => group.drain(..).for_each(|commit| answer(commit, Ok(()))),
            // Somebody's changes cannot be written. Each commit on its own finds out whose, and
            // nobody else is hurt.
            Err(_) if group.len() > 1 => {
                for commit in group.drain(..) {
                    let outcome = write(&mut database, std::slice::from_ref(&commit));
                    answer(commit, outcome);
                }
            }
            Err(error) => group.drain(..).for_each(|commit| answer(commit, Err(error.clone()))),
        }
    }
}

fn write(database: &mut Connection, group: &[Commit]) -> Result<(), StoreError> {
    let fail = |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full,
        _ => StoreError::Failed(format!("write the database: {error}")),
    };
    // Dropped without a commit, a transaction is rolled back.
    let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fail)?;
    for change in group.iter().flat_map(|commit| &commit.changes) {
        rows::apply(&transaction, change).map_err(fail)?;
    }
    transaction.commit().map_err(fail)
}

fn answer(commit: Commit, outcome: Result<(), StoreError>) {
    // A caller that went away has no use for the answer; its changes stay written.
    let _ = commit.done.send(outcome);
}
