//! A second copy of the records, `records/<kind>/<id>.json` beside the database, from which a lost one is rebuilt.
//!
//! It has what a server needs to find again what lies in its data directory: workspaces, keys, settings, live sessions,
//! snapshots, volumes and previews; not what has ended, nor what has happened. The database alone is believed. The copy
//! follows it: what ends leaves the copy before the database, what is new reaches it after. So a record that is in the
//! copy and not in the database was lost by the database, whenever a server was killed; nothing may be removed then
//! because no record names it. Files are not synced one by one: after a power cut some may be unreadable, which the
//! next start repairs from the database.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nagaya_engine::model::SessionState;
use nagaya_engine::ports::Change;
use rusqlite::{Connection, OptionalExtension};
use serde::{Deserialize, Serialize};

use crate::rows;

/// Name of the copy inside the data directory.
const DIRECTORY: &str = "records";
const SUFFIX: &str = "json";
/// A file that is being written.
const FRESH: &str = "new";
/// A file that could not be read when it was needed.
const UNREADABLE: &str = "unreadable";

/// What a record is of; the order is that in which they are put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Workspace,
    ApiKey,
    Setting,
    Session,
    Volume,
    Snapshot,
    Preview,
}

impl Kind {
    const ALL: [Self; 7] =
        [Self::Workspace, Self::ApiKey, Self::Setting, Self::Session, Self::Volume, Self::Snapshot, Self::Preview];

    const fn directory(self) -> &'static str {
        match self {
            Self::Workspace => "workspaces",
            Self::ApiKey => "keys",
            Self::Setting => "settings",
            Self::Session => "sessions",
            Self::Volume => "volumes",
            Self::Snapshot => "snapshots",
            Self::Preview => "previews",
        }
    }

    /// The row of this name, as the copy should have it; `None` when there is none.
    fn row(self, database: &Connection, name: &str) -> rusqlite::Result<Option<Change>> {
        let one = |columns: &str, table: &str, key: &str| {
            database.prepare_cached(&format!("SELECT {columns} FROM {table} WHERE {key} = ?1"))
        };
        match self {
            Self::Workspace => one(rows::WORKSPACE_COLUMNS, "workspaces", "id")?
                .query_row([name], |row| rows::read_workspace(row).map(Change::Workspace)),
            Self::ApiKey => one(rows::API_KEY_COLUMNS, "api_keys", "id")?
                .query_row([name], |row| rows::read_api_key(row).map(Change::ApiKey)),
            Self::Setting => one("value", "settings", "name")?
                .query_row([name], |row| Ok(Change::Setting { name: name.to_owned(), value: row.get(0)? })),
            Self::Session => one(rows::SESSION_COLUMNS, "sessions", "id")?
                .query_row([name], |row| rows::read_session(row).map(Change::Session)),
            Self::Volume => one(rows::VOLUME_COLUMNS, "volumes", "id")?
                .query_row([name], |row| rows::read_volume(row).map(Change::Volume)),
            Self::Snapshot => one(rows::SNAPSHOT_COLUMNS, "snapshots", "id")?
                .query_row([name], |row| rows::read_snapshot(row).map(Change::Snapshot)),
            Self::Preview => one(rows::PREVIEW_COLUMNS, "previews", "id")?
                .query_row([name], |row| rows::read_preview(row).map(Change::Preview)),
        }
        .optional()
    }

    fn names(self, database: &Connection) -> rusqlite::Result<Vec<String>> {
        // The literal lets SQLite use the index that leaves terminated sessions out.
        let sql = match self {
            Self::Workspace => "SELECT id FROM workspaces",
            Self::ApiKey => "SELECT id FROM api_keys",
            Self::Setting => "SELECT name FROM settings",
            Self::Session => "SELECT id FROM sessions WHERE state <> 6",
            Self::Volume => "SELECT id FROM volumes",
            Self::Snapshot => "SELECT id FROM snapshots",
            Self::Preview => "SELECT id FROM previews",
        };
        database.prepare(sql)?.query_map([], |row| row.get(0))?.collect()
    }

    fn read(self, path: &Path, name: &str) -> io::Result<Change> {
        let bytes = fs::read(path)?;
        let record = match self {
            Self::Workspace => from_slice(&bytes).map(Change::Workspace),
            Self::ApiKey => from_slice(&bytes).map(Change::ApiKey),
            Self::Setting => from_slice(&bytes).map(|Value { value }| Change::Setting { name: name.to_owned(), value }),
            Self::Session => from_slice(&bytes).map(Change::Session),
            Self::Volume => from_slice(&bytes).map(Change::Volume),
            Self::Snapshot => from_slice(&bytes).map(Change::Snapshot),
            Self::Preview => from_slice(&bytes).map(Change::Preview),
        }?;
        match placed(&record) {
            Some((kind, found)) if kind == self && found == name => Ok(record),
            _ => Err(io::Error::new(ErrorKind::InvalidData, "the record is of something else")),
        }
    }
}

fn from_slice<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(Into::into)
}

/// The content of a setting's file.
#[derive(Serialize, Deserialize)]
struct Value {
    value: Vec<u8>,
}

/// Where the copy has what a change writes; `None` for what it does not keep.
fn placed(change: &Change) -> Option<(Kind, String)> {
    Some(match change {
        Change::Workspace(of) => (Kind::Workspace, of.id.to_string()),
        Change::ApiKey(of) => (Kind::ApiKey, of.id.to_string()),
        Change::Setting { name, .. } if is_file_name(name) => (Kind::Setting, name.clone()),
        Change::Session(of) => (Kind::Session, of.id.to_string()),
        Change::Volume(of) => (Kind::Volume, of.id.to_string()),
        Change::Snapshot(of) => (Kind::Snapshot, of.id.to_string()),
        Change::Preview(of) => (Kind::Preview, of.id.to_string()),
        _ => return None,
    })
}

/// What a change takes out of the copy.
fn removed(change: &Change) -> Option<(Kind, String)> {
    match change {
        Change::Session(of) if of.state == SessionState::Terminated => Some((Kind::Session, of.id.to_string())),
        Change::ForgetVolume(id) => Some((Kind::Volume, id.to_string())),
        Change::ForgetSnapshot(id) => Some((Kind::Snapshot, id.to_string())),
        Change::ForgetPreview(id) => Some((Kind::Preview, id.to_string())),
        _ => None,
    }
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

fn content(change: &Change) -> io::Result<Vec<u8>> {
    let text = match change {
        Change::Workspace(of) => serde_json::to_vec(of),
        Change::ApiKey(of) => serde_json::to_vec(of),
        Change::Setting { value, .. } => serde_json::to_vec(&Value { value: value.clone() }),
        Change::Session(of) => serde_json::to_vec(of),
        Change::Volume(of) => serde_json::to_vec(of),
        Change::Snapshot(of) => serde_json::to_vec(of),
        Change::Preview(of) => serde_json::to_vec(of),
        _ => return Err(ErrorKind::Unsupported.into()),
    };
    text.map_err(Into::into)
}

/// The copy of one data directory.
#[derive(Debug, Clone)]
pub(crate) struct Mirror {
    root: PathBuf,
}

impl Mirror {
    pub fn open(data: &Path) -> io::Result<Self> {
        let root = data.join(DIRECTORY);
        for kind in Kind::ALL {
            DirBuilder::new().recursive(true).mode(0o700).create(root.join(kind.directory()))?;
        }
        Ok(Self { root })
    }

    fn path(&self, kind: Kind, name: &str) -> PathBuf {
        self.root.join(kind.directory()).join(format!("{name}.{SUFFIX}"))
    }

    /// Before these changes are committed: what ends leaves the copy.
    pub fn before<'a>(&self, changes: impl Iterator<Item = &'a Change>) {
        for (kind, name) in changes.filter_map(removed) {
            // What stays is judged by the database at the next start.
            let _ = fs::remove_file(self.path(kind, &name));
        }
    }

    /// After these changes were committed: what is new reaches the copy. What fails is made good by the next change, or
    /// by the next start.
    pub fn after<'a>(&self, changes: impl Iterator<Item = &'a Change>) {
        for change in changes {
            if removed(change).is_some() {
                self.before(std::iter::once(change));
            } else if let Some((kind, name)) = placed(change)
                && let Err(error) = self.write(kind, &name, change)
            {
                tracing::warn!(%error, "the second copy of a record was not written; the database has it");
            }
        }
    }

    fn write(&self, kind: Kind, name: &str, change: &Change) -> io::Result<()> {
        let path = self.path(kind, name);
        let fresh = path.with_extension(FRESH);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        let written = file.write_all(&content(change)?).and_then(|()| fs::rename(&fresh, path));
        if written.is_err() {
            let _ = fs::remove_file(fresh);
        }
        written
    }

    /// The records that the copy has and the database has not: it lost them.
    pub fn lost(&self, database: &Connection) -> io::Result<BTreeMap<Kind, Vec<String>>> {
        let mut lost = BTreeMap::new();
        for kind in Kind::ALL {
            for name in self.names(kind)? {
                match kind.row(database, &name).map_err(io::Error::other)? {
                    None => lost.entry(kind).or_insert_with(Vec::new).push(name),
                    // Its removal from the copy failed.
                    Some(row) => self.before(std::iter::once(&row)),
                }
            }
        }
        Ok(lost)
    }

    fn names(&self, kind: Kind) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.root.join(kind.directory()))? {
            let path = entry?.path();
            match (path.file_stem().and_then(|name| name.to_str()), path.extension()) {
                (Some(name), Some(suffix)) if suffix == SUFFIX => names.push(name.to_owned()),
                (_, Some(suffix)) if suffix == FRESH => fs::remove_file(&path)?,
                _ => {}
            }
        }
        names.sort();
        Ok(names)
    }

    /// Brings the copy up to date with the database, which is right.
    pub fn follow(&self, database: &Connection) -> io::Result<()> {
        for kind in Kind::ALL {
            for name in kind.names(database).map_err(io::Error::other)? {
                let Some(row) = kind.row(database, &name).map_err(io::Error::other)? else { continue };
                if placed(&row).is_some() && fs::read(self.path(kind, &name)).ok() != Some(content(&row)?) {
                    self.write(kind, &name, &row)?;
                }
            }
        }
        Ok(())
    }

    /// Everything in the copy, in an order in which it can be put back, and how many files could not be read. Those are
    /// set aside: what they were of is found without them.
    pub fn read_all(&self) -> io::Result<(Vec<Change>, usize)> {
        let (mut records, mut unreadable) = (Vec::new(), 0);
        for kind in Kind::ALL {
            for name in self.names(kind)? {
                let path = self.path(kind, &name);
                match kind.read(&path, &name) {
                    Ok(record) => records.push(record),
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => {
                        tracing::warn!(%error, path = %path.display(), "a record cannot be read; it is set aside");
                        fs::rename(&path, path.with_extension(UNREADABLE))?;
                        unreadable += 1;
                    }
                }
            }
        }
        Ok((records, unreadable))
    }

    pub fn discard(&self, lost: &BTreeMap<Kind, Vec<String>>) -> io::Result<()> {
        for (kind, names) in lost {
            for name in names {
                fs::remove_file(self.path(*kind, name))?;
            }
        }
        Ok(())
    }
}
