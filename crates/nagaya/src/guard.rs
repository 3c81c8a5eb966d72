//! Keeps a start from removing what its database does not know because it is another one, or has lost it.

use std::fs;
use std::path::Path;

use anyhow::Context;
use nagaya_api::error::{Code, Error};
use nagaya_engine::ports::{Store, StoreError};
use nagaya_runtime::host::storage_root;
use nagaya_store::{Kind, SqliteStore};

use crate::server::{BLOBS, DATABASE};

/// What a data directory holds that only a database gives a meaning to, as far as that can be seen without mounting
/// anything.
struct Holdings(Vec<(usize, &'static str)>);

impl Holdings {
    fn of(data_dir: &Path) -> Self {
        let storage = storage_root(data_dir);
        let entries = |path: &Path| fs::read_dir(path).map_or(0, |entries| entries.flatten().count());
        let kept = |name| entries(&data_dir.join("records").join(name));
        let pooled = usize::from(storage != data_dir && entries(&storage) == 0);
        Self(vec![
            (entries(&storage.join("sandboxes")).max(kept("sessions")), "sandboxes"),
            (entries(&storage.join("volumes")).max(kept("volumes")), "volumes"),
            (entries(&storage.join(BLOBS).join("images")).max(kept("snapshots")), "snapshots"),
            (pooled, "pool of disks"),
        ])
    }

    fn lost(store: &SqliteStore) -> Self {
        let count = |kind| store.lost().get(&kind).map_or(0, Vec::len);
        Self(vec![
            (count(Kind::Session), "sandboxes"),
            (count(Kind::Volume), "volumes"),
            (count(Kind::Snapshot), "snapshots"),
            (count(Kind::Workspace) + count(Kind::ApiKey) + count(Kind::Setting), "workspaces, keys and settings"),
            (count(Kind::Preview), "previews"),
        ])
    }

    fn are_none(&self) -> bool {
        self.0.iter().all(|(count, _)| *count == 0)
    }

    fn tell(&self) -> String {
        let some = self.0.iter().filter(|(count, _)| *count > 0);
        some.map(|(count, what)| format!("{count} {what}")).collect::<Vec<_>>().join(", ")
    }
}

/// Refuses to make a database where there was one. Looks only, since opening it removes what a lost one has left.
pub fn before_opening(data_dir: &Path) -> anyhow::Result<()> {
    let database = data_dir.join(DATABASE);
    let is_there = fs::metadata(&database).is_ok_and(|found| found.len() > 0);
    let holdings = Holdings::of(data_dir);
    if is_there || holdings.are_none() {
        return Ok(());
    }
    let what = if database.exists() { "is empty" } else { "is missing" };
    Err(refusal(format!("{} {what}, and there are {} in {}", database.display(), holdings.tell(), data_dir.display())))
}

/// Refuses a database that has lost records, or that is as new as the data directory is not.
pub async fn after_opening(store: &SqliteStore, data_dir: &Path) -> anyhow::Result<()> {
    let lost = Holdings::lost(store);
    if !lost.are_none() {
        let database = data_dir.join(DATABASE);
        return Err(refusal(format!("{} lacks the records of {}", database.display(), lost.tell())));
    }
    if store.workspaces().await.map_err(store_error)?.is_empty() {
        let holdings = Holdings::of(data_dir);
        if !holdings.are_none() {
            return Err(refusal(format!(
                "the database is new, and there are {} in {}",
                holdings.tell(),
                data_dir.display()
            )));
        }
    }
    Ok(())
}

fn refusal(detail: String) -> anyhow::Error {
    coded(Error::new(Code::RecordsMissing, detail))
}

/// An error that ends a command, with its code and what to do.
fn coded(error: Error) -> anyhow::Error {
    anyhow::anyhow!("{error} [{}]\n{}", error.code.name(), error.code.remedy())
}

/// The same for an error of the store.
pub fn store_error(error: StoreError) -> anyhow::Error {
    match error {
        StoreError::Damaged(detail) => coded(Error::new(Code::StoreDamaged, detail)),
        other => other.into(),
    }
}

/// Opens the database of a data directory.
pub fn open_store(data_dir: &Path) -> anyhow::Result<SqliteStore> {
    SqliteStore::open(&data_dir.join(DATABASE)).map_err(store_error)
}

/// Gives up what was lost.
pub fn discard(store: &SqliteStore) -> anyhow::Result<()> {
    store.discard_lost().context("give up lost records")
}
