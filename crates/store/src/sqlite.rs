//! [`SqliteStore`]: the store of one server on one machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use nagaya_api::ids::{ExecutionId, SessionId, SnapshotId, VolumeId, WorkspaceId};
use nagaya_engine::model::Event;
use nagaya_engine::model::{ApiKey, Execution, Preview, Session, Snapshot, Volume, Workspace, WorkspaceSettings};
use nagaya_engine::ports::{Change, PreviewQuery, SessionQuery, SnapshotQuery, Store, StoreError, VolumeQuery};
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, params_from_iter};
use tokio::sync::{mpsc, oneshot};

use crate::lock::DirectoryLock;
use crate::mirror::{Kind, Mirror};
use crate::reserve::Reserve;
use crate::writer::{self, Commit};
use crate::{health, lists, migrate, rows};

const READER_THREADS: usize = 2;
/// Requests that wait for the writer, and for the readers; more callers wait their turn.
const QUEUE_LENGTH: usize = 1024;
/// Only another program that looks into the file can make us wait at all.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

type Question = Box<dyn FnOnce(&Connection) + Send>;

/// A [`Store`] in one SQLite file. Dropping it waits until everything queued has been written.
#[derive(Debug)]
pub struct SqliteStore {
    // Both are `None` only while dropping.
    commits: Option<mpsc::Sender<Commit>>,
    questions: Option<mpsc::Sender<Question>>,
    threads: Vec<JoinHandle<()>>,
    mirror: Arc<Mirror>,
    /// Names of records that the second copy had and the database had not when it was opened.
    lost: BTreeMap<Kind, Vec<String>>,
    // The last field: it is released when the threads are done.
    _lock: DirectoryLock,
}

impl SqliteStore {
    /// Opens the database file, making it (mode 0600) and bringing its schema up to date as needed.
    ///
    /// Takes the lock of the file's directory: fails when another process uses that directory, when
    /// the file is no database of Nagaya's, when a newer version wrote it, or when it is damaged. It is unchanged then.
    /// See [`SqliteStore::lost`] for what to look at before anything is done on its word.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let lock = DirectoryLock::acquire(directory)?;
        make_private_file(path, directory)
            .map_err(|error| StoreError::Failed(format!("open {}: {error}", path.display())))?;
        migrate::check(path)?;

        let mut database = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        health::check(&database, path)?;
        migrate::run(&mut database)?;
        let copy_failed = |error: std::io::Error| {
            StoreError::Failed(format!("read the second copy of the records in {}: {error}", directory.display()))
        };
        let mirror = Arc::new(Mirror::open(directory).map_err(copy_failed)?);
        let lost = mirror.lost(&database).map_err(copy_failed)?;
        // Where records are lost the copy may be all that is known of them, and of others.
        if lost.is_empty()
            && let Err(error) = mirror.follow(&database)
        {
            tracing::warn!(%error, "the second copy of the records could not be brought up to date");
        }
        let readers = (0..READER_THREADS)
            .map(|_| connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY))
            .collect::<Result<Vec<_>, _>>()?;

        let reserve = Reserve::of(path);
        let (commits, commit_queue) = mpsc::channel(QUEUE_LENGTH);
        let (questions, question_queue) = mpsc::channel(QUEUE_LENGTH);
        let question_queue = Arc::new(Mutex::new(question_queue));
        let mut store = Self {
            commits: Some(commits),
            questions: Some(questions),
            threads: Vec::new(),
            mirror: mirror.clone(),
            lost,
            _lock: lock,
        };
        store.start("store-writer", move || writer::run(database, &mirror, reserve, commit_queue))?;
        for reader in readers {
            let queue = question_queue.clone();
            store.start("store-reader", move || answer_questions(&reader, &queue))?;
        }
        Ok(store)
    }

    /// The names of records that were lost: the second copy beside the database has them, the database has not. While
    /// there are any, nothing may be removed because no record names it.
    pub fn lost(&self) -> &BTreeMap<Kind, Vec<String>> {
        &self.lost
    }

    /// Puts everything of the second copy into the database: what was lost, and what the database has in another form,
    /// which is older where it was restored. Returns how many records there were, and how many could not be read.
    pub async fn put_back(&self) -> Result<(usize, usize), StoreError> {
        let read = self.mirror.read_all();
        let (records, unreadable) =
            read.map_err(|error| StoreError::Failed(format!("read the second copy of the records: {error}")))?;
        let known: BTreeSet<WorkspaceId> = self.workspaces().await?.into_iter().map(|of| of.id).collect();
        let named = records.iter().filter_map(workspace_of);
        let described: BTreeSet<WorkspaceId> = records.iter().filter_map(described_workspace).collect();
        let unknown: BTreeSet<WorkspaceId> =
            named.filter(|id| !known.contains(id) && !described.contains(id)).collect();
        let nameless = unknown.into_iter().map(|id| {
            let settings = WorkspaceSettings::default();
            Change::Workspace(Workspace { id, name: "recovered".to_owned(), created_at: 0, settings })
        });
        let count = records.len();
        let (alone, together): (Vec<Change>, Vec<Change>) = nameless
            .chain(records)
            // Their secrets and labels are unique: who came by one meanwhile keeps it.
            .partition(|record| matches!(record, Change::ApiKey(_) | Change::Preview(_)));
        self.commit(together).await?;
        for record in alone {
            if let Err(error) = self.commit(vec![record]).await {
                tracing::warn!(%error, "a key or preview was not put back: another one has its secret or name");
            }
        }
        Ok((count, unreadable))
    }

    /// Gives up the records that were lost.
    pub fn discard_lost(&self) -> Result<(), StoreError> {
        let discarded = self.mirror.discard(&self.lost);
        discarded.map_err(|error| StoreError::Failed(format!("remove the second copy of lost records: {error}")))
    }

    fn start(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), StoreError> {
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(work)
            .map_err(|error| StoreError::Failed(format!("start the thread {name}: {error}")))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Runs `ask` on a reader thread.
    async fn read<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let question: Question = Box::new(move |database| {
            // A caller that went away has no use for the answer.
            let _ = reply.send(ask(database));
        });
        let questions = self.questions.as_ref().expect("the queue lives as long as the store");
        questions.send(question).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?.map_err(|error| health::error("read the database", &error))
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.commits = None;
        self.questions = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already, and holds nothing any more.
            let _ = thread.join();
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let (done, outcome) = oneshot::channel();
        let commits = self.commits.as_ref().expect("the queue lives as long as the store");
        commits.send(Commit { changes, done }).await.map_err(|_| stopped())?;
        outcome.await.map_err(|_| stopped())?
    }

    async fn workspaces(&self) -> Result<Vec<Workspace>, StoreError> {
        let sql = format!("SELECT {} FROM workspaces ORDER BY created_at, id", rows::WORKSPACE_COLUMNS);
        self.read(move |database| all(database, &sql, Vec::new(), rows::read_workspace)).await
    }

    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        let sql = format!("SELECT {} FROM api_keys ORDER BY created_at, id", rows::API_KEY_COLUMNS);
        self.read(move |database| all(database, &sql, Vec::new(), rows::read_api_key)).await
    }

    async fn setting(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let name = name.to_string();
        self.read(move |database| {
            database
                .prepare_cached("SELECT value FROM settings WHERE name = ?1")?
                .query_row([name], |row| row.get(0))
                .optional()
        })
        .await
    }

    async fn session(&self, id: SessionId) -> Result<Option<Session>, StoreError> {
        let sql = format!("SELECT {} FROM sessions WHERE id = ?1", rows::SESSION_COLUMNS);
        self.read(move |database| one(database, &sql, id.to_string(), rows::read_session)).await
    }

    async fn sessions(&self, query: SessionQuery) -> Result<Vec<Session>, StoreError> {
        self.read(move |database| {
            let list = lists::sessions(&query)?;
            all(database, &list.sql, list.values, rows::read_session)
        })
        .await
    }

    async fn live_sessions(&self) -> Result<Vec<Session>, StoreError> {
        // The literal lets SQLite use the index that leaves terminated sessions out.
        let sql = format!("SELECT {} FROM sessions WHERE state <> 6 ORDER BY created_at, id", rows::SESSION_COLUMNS);
        self.read(move |database| all(database, &sql, Vec::new(), rows::read_session)).await
    }

    async fn execution(&self, id: ExecutionId) -> Result<Option<Execution>, StoreError> {
        let sql = format!("SELECT {} FROM executions WHERE id = ?1", rows::EXECUTION_COLUMNS);
        self.read(move |database| one(database, &sql, id.to_string(), rows::read_execution)).await
    }

    async fn executions(&self, session_id: SessionId) -> Result<Vec<Execution>, StoreError> {
        let sql =
            format!("SELECT {} FROM executions WHERE session_id = ?1 ORDER BY started_at, id", rows::EXECUTION_COLUMNS);
        self.read(move |database| all(database, &sql, vec![Value::Text(session_id.to_string())], rows::read_execution))
            .await
    }

    async fn snapshot(&self, id: SnapshotId) -> Result<Option<Snapshot>, StoreError> {
        let sql = format!("SELECT {} FROM snapshots WHERE id = ?1", rows::SNAPSHOT_COLUMNS);
        self.read(move |database| one(database, &sql, id.to_string(), rows::read_snapshot)).await
    }

    async fn snapshots(&self, query: SnapshotQuery) -> Result<Vec<Snapshot>, StoreError> {
        self.read(move |database| {
            let list = lists::snapshots(&query)?;
            all(database, &list.sql, list.values, rows::read_snapshot)
        })
        .await
    }

    async fn all_snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        let sql = format!("SELECT {} FROM snapshots ORDER BY created_at, id", rows::SNAPSHOT_COLUMNS);
        self.read(move |database| all(database, &sql, Vec::new(), rows::read_snapshot)).await
    }

    async fn volume(&self, id: VolumeId) -> Result<Option<Volume>, StoreError> {
        let sql = format!("SELECT {} FROM volumes WHERE id = ?1", rows::VOLUME_COLUMNS);
        self.read(move |database| one(database, &sql, id.to_string(), rows::read_volume)).await
    }

    async fn volumes(&self, query: VolumeQuery) -> Result<Vec<Volume>, StoreError> {
        self.read(move |database| {
            let list = lists::volumes(&query)?;
            all(database, &list.sql, list.values, rows::read_volume)
        })
        .await
    }

    async fn all_volumes(&self) -> Result<Vec<Volume>, StoreError> {
        let sql = format!("SELECT {} FROM volumes ORDER BY created_at, id", rows::VOLUME_COLUMNS);
        self.read(move |database| all(database, &sql, Vec::new(), rows::read_volume)).await
    }

    async fn previews(&self, query: PreviewQuery) -> Result<Vec<Preview>, StoreError> {
        self.read(move |database| {
            let list = lists::previews(&query)?;
            all(database, &list.sql, list.values, rows::read_preview)
        })
        .await
    }

    async fn all_previews(&self) -> Result<Vec<Preview>, StoreError> {
        let sql = format!("SELECT {} FROM previews ORDER BY created_at, id", rows::PREVIEW_COLUMNS);
        self.read(move |database| all(database, &sql, Vec::new(), rows::read_preview)).await
    }

    async fn events(&self, session_id: SessionId, after: u64, limit: u32) -> Result<Vec<Event>, StoreError> {
        let sql = format!(
            "SELECT {} FROM events WHERE session_id = ?1 AND sequence > ?2 ORDER BY sequence LIMIT ?3",
            rows::EVENT_COLUMNS
        );
        // None has a sequence that does not fit.
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let values = vec![Value::Text(session_id.to_string()), Value::Integer(after), Value::Integer(limit.into())];
        self.read(move |database| all(database, &sql, values, rows::read_event)).await
    }
}

fn one<T>(
    database: &Connection,
    sql: &str,
    id: String,
    read: fn(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Option<T>> {
    database.prepare_cached(sql)?.query_row([id], read).optional()
}

fn all<T>(
    database: &Connection,
    sql: &str,
    values: Vec<Value>,
    read: fn(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    database.prepare_cached(sql)?.query_map(params_from_iter(values), read)?.collect()
}

fn answer_questions(database: &Connection, queue: &Mutex<mpsc::Receiver<Question>>) {
    loop {
        // The guard is dropped before the question is answered, so that the others can take the next one.
        let next = queue.lock().expect("no reader panics while it takes a question").blocking_recv();
        match next {
            Some(question) => question(database),
            None => return,
        }
    }
}

fn workspace_of(record: &Change) -> Option<WorkspaceId> {
    match record {
        Change::ApiKey(of) => Some(of.workspace_id),
        Change::Session(of) => Some(of.workspace_id),
        Change::Volume(of) => Some(of.workspace_id),
        Change::Snapshot(of) => Some(of.workspace_id),
        Change::Preview(of) => Some(of.workspace_id),
        _ => None,
    }
}

fn described_workspace(record: &Change) -> Option<WorkspaceId> {
    match record {
        Change::Workspace(of) => Some(of.id),
        _ => None,
    }
}

pub(crate) fn connect(path: &Path, access: OpenFlags) -> Result<Connection, StoreError> {
    let fail = |error: rusqlite::Error| health::error(&format!("open {}", path.display()), &error);
    let database = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX).map_err(fail)?;
    database.busy_timeout(BUSY_TIMEOUT).map_err(fail)?;
    database.set_prepared_statement_cache_capacity(64);
    database.pragma_update(None, "foreign_keys", true).map_err(fail)?;
    if access.contains(OpenFlags::SQLITE_OPEN_READ_WRITE) {
        let mode: String =
            database.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0)).map_err(fail)?;
        if mode != "wal" {
            return Err(StoreError::Failed(format!(
                "open {}: this file system cannot hold a write-ahead log",
                path.display()
            )));
        }
        database.pragma_update(None, "synchronous", "full").map_err(fail)?;
    }
    Ok(database)
}

/// Makes the file when it is missing; tightens the mode of one that others may read.
fn make_private_file(path: &Path, directory: &Path) -> std::io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        file.set_permissions(Permissions::from_mode(0o600))?;
    }
    // The name must be as lasting as what will be written under it.
    File::open(directory)?.sync_all()
}

fn stopped() -> StoreError {
    StoreError::Failed("the store's threads have stopped; see the log for the first error".into())
}
