//! The sessions of the server that have not ended, in memory, and what they use up.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex};

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, WorkspaceId};

use crate::handle::SessionHandle;
use crate::model::{Resources, Session};

/// All live sessions of the server, and the quotas they count against.
#[derive(Default)]
pub(crate) struct SessionTable(Mutex<Table>);

#[derive(Default)]
struct Table {
    live: BTreeMap<SessionId, Arc<SessionHandle>>,
    names: BTreeMap<(WorkspaceId, String), Named>,
    total: u32,
    used: BTreeMap<WorkspaceId, Used>,
}

/// Whom a name that is unique in its workspace leads to.
struct Named {
    id: SessionId,
    /// Whether the session's record has the name: until then nobody finds it.
    recorded: bool,
}

/// A name that no other session of the workspace can have; free again on drop.
pub(crate) struct NameClaim {
    table: Arc<SessionTable>,
    name: (WorkspaceId, String),
}

impl NameClaim {
    /// The record has the name: from now on the session is found by it.
    pub(crate) fn recorded(&self) {
        self.table.with(|table| {
            if let Some(named) = table.names.get_mut(&self.name) {
                named.recorded = true;
            }
        });
    }
}

impl Drop for NameClaim {
    fn drop(&mut self) {
        self.table.with(|table| table.names.remove(&self.name));
    }
}

/// What the live sessions of a workspace use together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) sessions: u32,
    pub(crate) cpu_millis: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) disk_bytes: u64,
}

/// A session's share of its workspace's and the server's quota; given back on drop.
pub(crate) struct Slot {
    table: Arc<SessionTable>,
    workspace_id: WorkspaceId,
    resources: Resources,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.table.with(|table| {
            table.total -= 1;
            if let Some(used) = table.used.get_mut(&self.workspace_id) {
                used.sessions -= 1;
                used.cpu_millis -= u64::from(self.resources.cpu_millis);
                used.memory_bytes -= self.resources.memory_bytes;
                used.disk_bytes -= self.resources.disk_bytes;
            }
        });
    }
}

impl SessionTable {
    fn with<T>(&self, action: impl FnOnce(&mut Table) -> T) -> T {
        action(&mut self.0.lock().expect("no holder of this lock panics"))
    }

    pub(crate) fn get(&self, id: SessionId) -> Option<Arc<SessionHandle>> {
        self.with(|table| table.live.get(&id).cloned())
    }

    pub(crate) fn insert(&self, live: Arc<SessionHandle>) {
        self.with(|table| table.live.insert(live.id, live));
    }

    pub(crate) fn remove(&self, id: SessionId) {
        self.with(|table| table.live.remove(&id));
    }

    pub(crate) fn all(&self) -> Vec<Arc<SessionHandle>> {
        self.with(|table| table.live.values().cloned().collect())
    }

    /// The name of a session for it alone; `None` where it need not be unique.
    pub(crate) fn claim_name(self: &Arc<Self>, session: &Session) -> Result<Option<NameClaim>, Error> {
        if !session.name_is_unique {
            return Ok(None);
        }
        let name = (session.workspace_id, session.name.clone());
        self.with(|table| match table.names.entry(name.clone()) {
            Entry::Occupied(_) => Err(Error::from(Code::SessionNameTaken)),
            Entry::Vacant(free) => {
                free.insert(Named { id: session.id, recorded: false });
                Ok(())
            }
        })?;
        Ok(Some(NameClaim { table: self.clone(), name }))
    }

    /// The session of the workspace that is found by this name.
    pub(crate) fn named(&self, workspace_id: WorkspaceId, name: &str) -> Option<Arc<SessionHandle>> {
        self.with(|table| {
            let named = table.names.get(&(workspace_id, name.to_owned()))?;
            table.live.get(&named.id).filter(|_| named.recorded).cloned()
        })
    }

    pub(crate) fn used(&self, workspace_id: WorkspaceId) -> Used {
        self.with(|table| table.used.get(&workspace_id).copied().unwrap_or_default())
    }

    /// Counts a new session, if both the workspace and the server have room for it.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        workspace_id: WorkspaceId,
        resources: &Resources,
        of_workspace: Option<u32>,
        sessions_max: u32,
    ) -> Result<Slot, Error> {
        self.with(|table| {
            let used = table.used.get(&workspace_id).map_or(0, |used| used.sessions);
            if let Some(max) = of_workspace.filter(|max| used >= *max) {
                return Err(Error::new(Code::QuotaExceeded, format!("the workspace's sessions_max is {max}")));
            }
            if table.total >= sessions_max {
                let detail = format!("the server's sessions_max is {sessions_max}");
                return Err(Error::new(Code::CapacityUnavailable, detail));
            }
            table.count(workspace_id, resources);
            Ok(())
        })?;
        Ok(Slot { table: self.clone(), workspace_id, resources: *resources })
    }

    /// Counts a session that exists already, whatever the limits say now.
    pub(crate) fn take(self: &Arc<Self>, workspace_id: WorkspaceId, resources: &Resources) -> Slot {
        self.with(|table| table.count(workspace_id, resources));
        Slot { table: self.clone(), workspace_id, resources: *resources }
    }
}

impl Table {
    fn count(&mut self, workspace_id: WorkspaceId, resources: &Resources) {
        self.total += 1;
        let used = self.used.entry(workspace_id).or_default();
        used.sessions += 1;
        used.cpu_millis += u64::from(resources.cpu_millis);
        used.memory_bytes += resources.memory_bytes;
        used.disk_bytes += resources.disk_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn racing_creators_never_get_more_than_the_quota() {
        let sessions = Arc::new(SessionTable::default());
        let workspace = WorkspaceId::new(1, [0; 10]);
        let resources = Resources::of(2, 256, 5);
        let taken = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        if let Ok(slot) = sessions.reserve(workspace, &resources, Some(100), 1_000) {
                            taken.lock().unwrap().push(slot);
                        }
                    }
                });
            }
        });
        assert_eq!(taken.lock().unwrap().len(), 100);
        assert_eq!(
            sessions.used(workspace),
            Used { sessions: 100, cpu_millis: 200_000, memory_bytes: 25_600 << 20, disk_bytes: 500 << 30 }
        );
        drop(taken);
        assert_eq!(sessions.used(workspace), Used::default());
        assert!(sessions.reserve(workspace, &resources, None, 0).is_err(), "the server's own limit");
    }
}
