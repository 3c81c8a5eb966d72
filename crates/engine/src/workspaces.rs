//! Workspaces: what each may use, and how long it keeps things.

use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{KeyId, WorkspaceId};
use tokio::sync::{Mutex, MutexGuard};

use crate::access::{self, Caller};
use crate::errors::store_error;
use crate::model::{ApiKey, Snapshot, Workspace, WorkspaceSettings};
use crate::ports::{Change, SnapshotQuery};
use crate::requests::WorkspaceSettingsUpdate;
use crate::shared::Shared;

pub(crate) struct Workspaces {
    shared: Arc<Shared>,
    quiet: Mutex<()>,
}

impl Workspaces {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, quiet: Mutex::default() }
    }

    /// Waits until nobody else is at what counts against limits. Held while limits of a workspace are checked and what
    /// counts against them is recorded, and while a snapshot's record is read and changed.
    pub(crate) async fn quiet(&self) -> MutexGuard<'_, ()> {
        self.quiet.lock().await
    }

    pub(crate) async fn first_start(&self, secret: Option<&str>) -> Result<Option<String>, Error> {
        let shared = &*self.shared;
        if let Some(secret) = secret {
            access::check_secret(secret)?;
        }
        let made = match secret {
            Some(secret) if shared.access.authenticate(secret).is_ok() => return Ok(None),
            Some(_) => None,
            None if shared.access.has_keys() => return Ok(None),
            None => Some(access::new_secret(&*shared.entropy)),
        };
        let secret = made.as_deref().or(secret).unwrap_or_default();
        let now = shared.clock.now();
        let (workspace, is_new) = match shared.access.oldest_workspace() {
            Some(workspace) => (workspace, false),
            None => {
                let id = WorkspaceId::new(now, shared.random());
                (
                    Workspace {
                        id,
                        name: "default".to_owned(),
                        created_at: now,
                        settings: WorkspaceSettings::default(),
                    },
                    true,
                )
            }
        };
        let key = ApiKey {
            id: KeyId::new(now, shared.random()),
            workspace_id: workspace.id,
            secret_hash: access::hash_secret(secret),
            created_at: now,
        };
        let workspace = is_new.then_some(workspace);
        let mut changes: Vec<Change> = workspace.clone().map(Change::Workspace).into_iter().collect();
        changes.push(Change::ApiKey(key.clone()));
        shared.store.commit(changes).await.map_err(store_error)?;
        shared.access.add(workspace, key);
        Ok(made)
    }

    /// All of a workspace's snapshots, which count against its limits.
    pub(crate) async fn snapshots(&self, workspace_id: WorkspaceId) -> Result<Vec<Snapshot>, Error> {
        let workspace_id = Some(workspace_id);
        let query = SnapshotQuery { workspace_id, limit: u32::MAX, ..SnapshotQuery::default() };
        self.shared.store.snapshots(query).await.map_err(store_error)
    }

    pub(crate) fn settings(
        &self,
        caller: &Caller,
        workspace_id: Option<WorkspaceId>,
    ) -> Result<(WorkspaceId, WorkspaceSettings), Error> {
        let workspace = self.shared.access.workspace(caller, workspace_id)?;
        Ok((workspace.id, workspace.settings))
    }

    pub(crate) async fn update_settings(
        self: &Arc<Self>,
        caller: &Caller,
        workspace_id: Option<WorkspaceId>,
        update: WorkspaceSettingsUpdate,
    ) -> Result<(WorkspaceId, WorkspaceSettings), Error> {
        let (workspaces, caller) = (self.clone(), *caller);
        self.shared
            .detached(async move {
                let _quiet = workspaces.quiet().await;
                let shared = &workspaces.shared;
                let mut workspace = shared.access.workspace(&caller, workspace_id)?;
                apply(&mut workspace.settings, update)?;
                shared.write(vec![Change::Workspace(workspace.clone())]).await?;
                shared.access.update(workspace.clone());
                Ok((workspace.id, workspace.settings))
            })
            .await
    }
}

fn apply(settings: &mut WorkspaceSettings, update: WorkspaceSettingsUpdate) -> Result<(), Error> {
    set("pause_retention", &mut settings.pause_retention_ms, update.pause_retention_ms)?;
    set("snapshot_retention", &mut settings.snapshot_retention_ms, update.snapshot_retention_ms)?;
    set("snapshots_max", &mut settings.snapshots_max, update.snapshots_max)?;
    set("templates_max", &mut settings.templates_max, update.templates_max)?;
    set("volumes_max", &mut settings.volumes_max, update.volumes_max)?;
    set("bytes_max", &mut settings.bytes_max, update.bytes_max)?;
    set("sessions_max", &mut settings.sessions_max, update.sessions_max)?;
    set("sticky_sessions_max", &mut settings.sticky_sessions_max, update.sticky_sessions_max)?;
    set("preview_urls_max", &mut settings.preview_urls_max, update.preview_urls_max)
}

/// A limit of nothing would be a workspace nobody can use.
fn set<T: Default + PartialEq>(name: &str, setting: &mut Option<T>, update: Option<Option<T>>) -> Result<(), Error> {
    match update {
        None => Ok(()),
        Some(Some(value)) if value == T::default() => {
            Err(Error::new(Code::InvalidArgument, format!("{name} must be more than zero")))
        }
        Some(value) => {
            *setting = value;
            Ok(())
        }
    }
}
