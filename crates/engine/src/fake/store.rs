use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nagaya_api::ids::{ExecutionId, KeyId, SessionId, WorkspaceId};

use super::Faults;
use crate::model::{ApiKey, Execution, Session, SessionState, Workspace};
use crate::ports::{Change, SessionQuery, Store, StoreError};

/// A store in memory. It outlives the engine that writes to it.
pub struct FakeStore {
    faults: Arc<Faults>,
    tables: Mutex<Tables>,
}

#[derive(Default, Clone)]
struct Tables {
    workspaces: BTreeMap<WorkspaceId, Workspace>,
    keys: BTreeMap<KeyId, ApiKey>,
    sessions: BTreeMap<SessionId, Session>,
    executions: BTreeMap<ExecutionId, Execution>,
    settings: BTreeMap<String, Vec<u8>>,
}

impl FakeStore {
    pub fn new(faults: Arc<Faults>) -> Self {
        Self { faults, tables: Mutex::default() }
    }

    fn with<T>(&self, action: impl FnOnce(&mut Tables) -> T) -> T {
        action(&mut self.tables.lock().expect("no holder of this lock panics"))
    }

    async fn read<T>(&self, action: impl FnOnce(&mut Tables) -> T) -> Result<T, StoreError> {
        if self.faults.effect().await {
            return Err(StoreError("a read failed, as this test asked for".to_owned()));
        }
        Ok(self.with(action))
    }

    /// Every session, live or not, without faults.
    pub fn all_sessions(&self) -> Vec<Session> {
        self.with(|tables| tables.sessions.values().cloned().collect())
    }

    /// Every execution, without faults.
    pub fn all_executions(&self) -> Vec<Execution> {
        self.with(|tables| tables.executions.values().cloned().collect())
    }

    /// Loses the newest session record, as a store that does not sync would: for tests of tests.
    pub fn lose_newest_session(&self) {
        self.with(|tables| tables.sessions.pop_last());
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
            Change::Setting { name, value } => {
                self.settings.insert(name, value);
            }
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
}

#[async_trait]
impl Store for FakeStore {
    async fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        if self.faults.effect().await {
            return Err(StoreError("a commit failed, as this test asked for".to_owned()));
        }
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
}
