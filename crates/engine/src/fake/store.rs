use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nagaya_api::ids::{ExecutionId, KeyId, PreviewId, SessionId, SnapshotId, VolumeId, WorkspaceId};

use super::Faults;
use crate::model::{ApiKey, Execution, Preview, Session, SessionState, Snapshot, UnixMs, Volume, Workspace};
use crate::model::{Event, ImageDigest};
use crate::ports::{Change, PreviewQuery, SessionQuery, SnapshotQuery, Store, StoreError, VolumeQuery};

/// A store in memory. It outlives the engine that writes to it.
pub struct FakeStore {
    faults: Arc<Faults>,
    tables: Mutex<Tables>,
    commits: AtomicU64,
    fail_commits: AtomicBool,
    full: AtomicBool,
}

#[derive(Default, Clone)]
struct Tables {
    workspaces: BTreeMap<WorkspaceId, Workspace>,
    keys: BTreeMap<KeyId, ApiKey>,
    sessions: BTreeMap<SessionId, Session>,
    executions: BTreeMap<ExecutionId, Execution>,
    snapshots: BTreeMap<SnapshotId, Snapshot>,
    volumes: BTreeMap<VolumeId, Volume>,
    previews: BTreeMap<PreviewId, Preview>,
    events: BTreeMap<SessionId, Vec<Event>>,
    settings: BTreeMap<String, Vec<u8>>,
}

impl FakeStore {
    pub fn new(faults: Arc<Faults>) -> Self {
        Self {
            faults,
            tables: Mutex::default(),
            commits: AtomicU64::new(0),
            fail_commits: AtomicBool::new(false),
            full: AtomicBool::new(false),
        }
    }

    fn with<T>(&self, action: impl FnOnce(&mut Tables) -> T) -> T {
        action(&mut self.tables.lock().expect("no holder of this lock panics"))
    }

    async fn read<T>(&self, action: impl FnOnce(&mut Tables) -> T) -> Result<T, StoreError> {
        if self.faults.effect().await {
            return Err(StoreError::Failed("a read failed, as this test asked for".to_owned()));
        }
        Ok(self.with(action))
    }

    /// Commits so far.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }

    /// While this is so, nothing can be written.
    pub fn fail_commits(&self, fail: bool) {
        self.fail_commits.store(fail, Ordering::Relaxed);
    }

    /// While this is so, there is no space to write to.
    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    /// Every session, live or not, without faults.
    pub fn all_sessions(&self) -> Vec<Session> {
        self.with(|tables| tables.sessions.values().cloned().collect())
    }

    /// Every execution, without faults.
    pub fn all_executions(&self) -> Vec<Execution> {
        self.with(|tables| tables.executions.values().cloned().collect())
    }

    /// Every snapshot, without faults.
    pub fn snapshots_now(&self) -> Vec<Snapshot> {
        self.with(|tables| tables.snapshots.values().cloned().collect())
    }

    /// Every volume, without faults.
    pub fn volumes_now(&self) -> Vec<Volume> {
        self.with(|tables| tables.volumes.values().cloned().collect())
    }

    /// Every preview, without faults.
    pub fn previews_now(&self) -> Vec<Preview> {
        self.with(|tables| tables.previews.values().cloned().collect())
    }

    /// Every event of a session, without faults.
    pub fn events_now(&self, id: SessionId) -> Vec<Event> {
        self.with(|tables| tables.events.get(&id).cloned().unwrap_or_default())
    }

    /// Records become such as servers wrote that knew one image only.
    pub fn forget_roots(&self) {
        self.with(|tables| {
            tables.sessions.values_mut().for_each(|session| session.machine.root = ImageDigest::default());
            tables.snapshots.values_mut().for_each(|snapshot| snapshot.machine.root = ImageDigest::default());
        });
    }

    /// Loses the newest session record, as a store that does not sync would: for tests of tests.
    pub fn lose_newest_session(&self) {
        self.with(|tables| tables.sessions.pop_last());
    }

    /// Loses the newest session's newest event: for tests of tests.
    pub fn lose_newest_event(&self) {
        self.with(|tables| tables.events.last_entry().and_then(|mut events| events.get_mut().pop()));
    }
}

impl Tables {
    fn apply(&mut self, change: Change) {
        match change {
            Change::Workspace(workspace) => {
                self.workspaces.insert(workspace.id, workspace);
            }
            Change::ApiKey(key) => {
                self.keys.insert(key.id, key);
            }
            Change::Session(session) => {
                self.sessions.insert(session.id, session);
            }
            Change::Execution(execution) => {
                self.executions.insert(execution.id, execution);
            }
            Change::ForgetExecution(id) => {
                self.executions.remove(&id);
            }
            Change::Snapshot(snapshot) => {
                self.snapshots.insert(snapshot.id, snapshot);
            }
            Change::ForgetSnapshot(id) => {
                self.snapshots.remove(&id);
            }
            Change::Volume(volume) => {
                self.volumes.insert(volume.id, volume);
            }
            Change::ForgetVolume(id) => {
                self.volumes.remove(&id);
            }
            Change::Preview(preview) => {
                self.previews.insert(preview.id, preview);
            }
            Change::ForgetPreview(id) => {
                self.previews.remove(&id);
            }
            Change::Event { event, events_max } => {
                let events = self.events.entry(event.session_id).or_default();
                let sequence = events.last().map_or(1, |last| last.sequence + 1);
                events.push(Event { sequence, ..event });
                events.retain(|kept| kept.sequence + u64::from(events_max) > sequence);
            }
            Change::ForgetEnded { ended_before, sessions_max } => {
                self.forget_ended(ended_before, sessions_max as usize)
            }
            Change::Setting { name, value } => {
                self.settings.insert(name, value);
            }
        }
    }

    fn forget_ended(&mut self, before: UnixMs, sessions_max: usize) {
        let ended = self.sessions.values().filter(|session| session.state == SessionState::Terminated);
        let mut over: Vec<(UnixMs, SessionId)> = ended
            .filter_map(|session| Some((session.terminated_at?, session.id)))
            .filter(|(at, _)| *at < before)
            .collect();
        over.sort_unstable();
        for (_, id) in over.into_iter().take(sessions_max) {
            self.sessions.remove(&id);
            self.events.remove(&id);
            self.executions.retain(|_, execution| execution.session_id != id);
        }
    }

    fn sessions(&self, query: &SessionQuery) -> Vec<Session> {
        let mut found: Vec<&Session> = self
            .sessions
            .values()
            .filter(|session| query.workspace_id.is_none_or(|id| session.workspace_id == id))
            .filter(|session| query.owner_id.as_ref().is_none_or(|id| session.owner_id.to_string() == *id))
            .filter(|session| query.state.is_none_or(|state| session.state == state))
            .filter(|session| query.tags.iter().all(|tag| session.tags.contains(tag)))
            .filter(|session| query.sticky.is_none_or(|sticky| session.sticky == sticky))
            .filter(|session| query.include_terminated || session.state != SessionState::Terminated)
            .filter(|session| query.before.is_none_or(|before| (session.created_at, session.id) < before))
            .collect();
        found.sort_by_key(|session| std::cmp::Reverse((session.created_at, session.id)));
        found.into_iter().take(query.limit as usize).cloned().collect()
    }

    fn snapshots(&self, query: &SnapshotQuery) -> Vec<Snapshot> {
        let lives = |id: &SessionId| self.sessions.get(id).is_some_and(|s| s.state != SessionState::Terminated);
        let mut found: Vec<&Snapshot> = self
            .snapshots
            .values()
            .filter(|snapshot| query.workspace_id.is_none_or(|id| snapshot.workspace_id == id))
            .filter(|snapshot| query.session_id.is_none_or(|id| snapshot.session_id == id))
            .filter(|snapshot| !query.dangling || !lives(&snapshot.session_id))
            .filter(|snapshot| query.before.is_none_or(|before| (snapshot.created_at, snapshot.id) < before))
            .collect();
        found.sort_by_key(|snapshot| std::cmp::Reverse((snapshot.created_at, snapshot.id)));
        found.into_iter().take(query.limit as usize).cloned().collect()
    }

    fn volumes(&self, query: &VolumeQuery) -> Vec<Volume> {
        let mut found: Vec<&Volume> = self
            .volumes
            .values()
            .filter(|volume| query.workspace_id.is_none_or(|id| volume.workspace_id == id))
            .filter(|volume| query.before.is_none_or(|before| (volume.created_at, volume.id) < before))
            .collect();
        found.sort_by_key(|volume| std::cmp::Reverse((volume.created_at, volume.id)));
        found.into_iter().take(query.limit as usize).cloned().collect()
    }

    fn previews(&self, query: &PreviewQuery) -> Vec<Preview> {
        let leads_to = |preview: &&Preview, id| preview.binding.is_some_and(|binding| binding.session_id == id);
        let mut found: Vec<&Preview> = self
            .previews
            .values()
            .filter(|preview| query.workspace_id.is_none_or(|id| preview.workspace_id == id))
            .filter(|preview| query.kind.is_none_or(|kind| preview.kind == kind))
            .filter(|preview| query.session_id.is_none_or(|id| leads_to(preview, id)))
            .filter(|preview| query.before.is_none_or(|before| (preview.created_at, preview.id) < before))
            .collect();
        found.sort_by_key(|preview| std::cmp::Reverse((preview.created_at, preview.id)));
        found.into_iter().take(query.limit as usize).cloned().collect()
    }
}

#[async_trait]
impl Store for FakeStore {
    async fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        if self.faults.effect().await || self.fail_commits.load(Ordering::Relaxed) {
            return Err(StoreError::Failed("a commit failed, as this test asked for".to_owned()));
        }
        if self.full.load(Ordering::Relaxed) {
            return Err(StoreError::Full);
        }
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.with(|tables| changes.into_iter().for_each(|change| tables.apply(change)));
        // Written, but whoever asked does not know yet. What is written cannot fail any more.
        self.faults.effect().await;
        Ok(())
    }

    async fn workspaces(&self) -> Result<Vec<Workspace>, StoreError> {
        self.read(|tables| tables.workspaces.values().cloned().collect()).await
    }

    async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        self.read(|tables| tables.keys.values().cloned().collect()).await
    }

    async fn setting(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(|tables| tables.settings.get(name).cloned()).await
    }

    async fn session(&self, id: SessionId) -> Result<Option<Session>, StoreError> {
        self.read(|tables| tables.sessions.get(&id).cloned()).await
    }

    async fn sessions(&self, query: SessionQuery) -> Result<Vec<Session>, StoreError> {
        self.read(|tables| tables.sessions(&query)).await
    }

    async fn live_sessions(&self) -> Result<Vec<Session>, StoreError> {
        let live = |session: &&Session| session.state != SessionState::Terminated;
        self.read(|tables| tables.sessions.values().filter(live).cloned().collect()).await
    }

    async fn execution(&self, id: ExecutionId) -> Result<Option<Execution>, StoreError> {
        self.read(|tables| tables.executions.get(&id).cloned()).await
    }

    async fn executions(&self, session_id: SessionId) -> Result<Vec<Execution>, StoreError> {
        let of = |execution: &&Execution| execution.session_id == session_id;
        self.read(|tables| tables.executions.values().filter(of).cloned().collect()).await
    }

    async fn snapshot(&self, id: SnapshotId) -> Result<Option<Snapshot>, StoreError> {
        self.read(|tables| tables.snapshots.get(&id).cloned()).await
    }

    async fn snapshots(&self, query: SnapshotQuery) -> Result<Vec<Snapshot>, StoreError> {
        self.read(|tables| tables.snapshots(&query)).await
    }

    async fn all_snapshots(&self) -> Result<Vec<Snapshot>, StoreError> {
        self.read(|tables| tables.snapshots.values().cloned().collect()).await
    }

    async fn volume(&self, id: VolumeId) -> Result<Option<Volume>, StoreError> {
        self.read(|tables| tables.volumes.get(&id).cloned()).await
    }

    async fn volumes(&self, query: VolumeQuery) -> Result<Vec<Volume>, StoreError> {
        self.read(|tables| tables.volumes(&query)).await
    }

    async fn all_volumes(&self) -> Result<Vec<Volume>, StoreError> {
        self.read(|tables| tables.volumes.values().cloned().collect()).await
    }

    async fn previews(&self, query: PreviewQuery) -> Result<Vec<Preview>, StoreError> {
        self.read(|tables| tables.previews(&query)).await
    }

    async fn all_previews(&self) -> Result<Vec<Preview>, StoreError> {
        self.read(|tables| tables.previews.values().cloned().collect()).await
    }

    async fn events(&self, session_id: SessionId, after: u64, limit: u32) -> Result<Vec<Event>, StoreError> {
        let newer = |event: &&Event| event.sequence > after;
        let of = |events: &Vec<Event>| events.iter().filter(newer).take(limit as usize).cloned().collect();
        self.read(|tables| tables.events.get(&session_id).map(of).unwrap_or_default()).await
    }
}
