//! What a workspace may use, and how long it keeps things.

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::WorkspaceId;

use crate::access::Caller;
use crate::engine_core::Engine;
use crate::model::WorkspaceSettings;
use crate::ports::Change;
use crate::requests::WorkspaceSettingsUpdate;

impl Engine {
    pub async fn settings(
        &self,
        caller: &Caller,
        workspace_id: Option<WorkspaceId>,
    ) -> Result<(WorkspaceId, WorkspaceSettings), Error> {
        let workspace = self.0.shared.access.workspace(caller, workspace_id)?;
        Ok((workspace.id, workspace.settings))
    }

    /// Changes limits and retentions. They hold for what is done from now on.
    pub async fn update_settings(
        &self,
        caller: &Caller,
        workspace_id: Option<WorkspaceId>,
        update: WorkspaceSettingsUpdate,
    ) -> Result<(WorkspaceId, WorkspaceSettings), Error> {
        let inner = self.0.clone();
        let caller = *caller;
        self.0
            .shared
            .detached(async move {
                let _quiet = inner.snapshots.quiet.lock().await;
                let mut workspace = inner.shared.access.workspace(&caller, workspace_id)?;
                apply(&mut workspace.settings, update)?;
                inner.shared.write(vec![Change::Workspace(workspace.clone())]).await?;
                inner.shared.access.update(workspace.clone());
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

/// The contract knows no limit of nothing: that would be a workspace nobody can use.
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
