//! The one thread that writes.
//!
//! A flush to the disk costs the same for one commit as for many, so everything that waits when
//! the writer becomes free goes into one transaction. Callers hear of their commit only after that
//! transaction is on the disk.

use nagaya_engine::ports::{Change, StoreError};
use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{mpsc, oneshot};

use crate::mirror::Mirror;
use crate::reserve::Reserve;
use crate::{health, rows};

/// Commits in one transaction, so that a flood cannot grow it without end.
const GROUP_MAX: usize = 256;

/// One caller's changes, and where to tell the outcome.
pub(crate) struct Commit {
    pub changes: Vec<Change>,
    pub done: oneshot::Sender<Result<(), StoreError>>,
}

/// Writes until the other end of the queue is dropped and everything in it has been written.
pub(crate) fn run(mut database: Connection, mirror: &Mirror, mut reserve: Reserve, mut queue: mpsc::Receiver<Commit>) {
    reserve.keep();
    let mut group = Vec::new();
    while let Some(first) = queue.blocking_recv() {
        group.push(first);
        while group.len() < GROUP_MAX
            && let Ok(next) = queue.try_recv()
        {
            group.push(next);
        }
        match write(&mut database, mirror, &group) {
            Ok(()) => acknowledge(mirror, group.drain(..)),
            // Somebody's changes cannot be written. Each commit on its own finds out whose, and
            // nobody else is hurt.
            Err(_) if group.len() > 1 => {
                for commit in group.drain(..) {
                    match write(&mut database, mirror, std::slice::from_ref(&commit)) {
                        Ok(()) => acknowledge(mirror, std::iter::once(commit)),
                        Err(error) => answer(commit.done, Err(error)),
                    }
                }
            }
            Err(error) => group.drain(..).for_each(|commit| answer(commit.done, Err(error.clone()))),
        }
        reserve.keep();
    }
}

fn write(database: &mut Connection, mirror: &Mirror, group: &[Commit]) -> Result<(), StoreError> {
    let fail = |error: rusqlite::Error| health::error("write the database", &error);
    let changes = || group.iter().flat_map(|commit| &commit.changes);
    // Dropped without a commit, a transaction is rolled back.
    let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate).map_err(fail)?;
    for change in changes() {
        rows::apply(&transaction, change).map_err(fail)?;
    }
    mirror.before(changes());
    transaction.commit().map_err(fail)
}

/// Nobody waits for the second copy.
fn acknowledge(mirror: &Mirror, group: impl Iterator<Item = Commit>) {
    let mut changes = Vec::new();
    for commit in group {
        answer(commit.done, Ok(()));
        changes.extend(commit.changes);
    }
    mirror.after(changes.iter());
}

fn answer(done: oneshot::Sender<Result<(), StoreError>>, outcome: Result<(), StoreError>) {
    // A caller that went away has no use for the answer; its changes stay written.
    let _ = done.send(outcome);
}
