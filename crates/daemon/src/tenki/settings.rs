//! What a workspace may use and how long it keeps things.

use buffa_types::google::protobuf::Duration;
use connectrpc::RequestContext;
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::WorkspaceId;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::model::WorkspaceSettings;
use nagaya_engine::{Caller, WorkspaceSettingsUpdate};

use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::service::caller;

impl TenkiService {
    pub(super) async fn get_workspace_sandbox_settings(
        &self,
        context: &RequestContext,
        request: wire::GetWorkspaceSandboxSettingsRequest,
    ) -> Result<wire::GetWorkspaceSandboxSettingsResponse, Error> {
        let settings = self.settings(&caller(context)?, &request.workspace_id).await?;
        Ok(wire::GetWorkspaceSandboxSettingsResponse { settings: settings.into() })
    }

    pub(super) async fn update_workspace_sandbox_settings(
        &self,
        context: &RequestContext,
        request: wire::UpdateWorkspaceSandboxSettingsRequest,
    ) -> Result<wire::UpdateWorkspaceSandboxSettingsResponse, Error> {
        let settings = self.update_settings(&caller(context)?, request).await?;
        Ok(wire::UpdateWorkspaceSandboxSettingsResponse { settings: settings.into() })
    }

    pub(super) async fn get_workspace_snapshot_retention_settings(
        &self,
        context: &RequestContext,
        request: wire::GetWorkspaceSnapshotRetentionSettingsRequest,
    ) -> Result<wire::GetWorkspaceSnapshotRetentionSettingsResponse, Error> {
        let settings = self.settings(&caller(context)?, &request.workspace_id).await?;
        let settings = retention_settings(settings).into();
        Ok(wire::GetWorkspaceSnapshotRetentionSettingsResponse { settings })
    }

    pub(super) async fn update_workspace_snapshot_retention_settings(
        &self,
        context: &RequestContext,
        request: wire::UpdateWorkspaceSnapshotRetentionSettingsRequest,
    ) -> Result<wire::UpdateWorkspaceSnapshotRetentionSettingsResponse, Error> {
        let update = wire::UpdateWorkspaceSandboxSettingsRequest {
            workspace_id: request.workspace_id,
            pause_retention: request.pause_retention,
            clear_pause_retention: request.clear_pause_retention,
            snapshot_retention: request.snapshot_retention,
            clear_snapshot_retention: request.clear_snapshot_retention,
            ..Default::default()
        };
        let settings = self.update_settings(&caller(context)?, update).await?;
        let settings = retention_settings(settings).into();
        Ok(wire::UpdateWorkspaceSnapshotRetentionSettingsResponse { settings })
    }

    async fn settings(&self, caller: &Caller, workspace_id: &str) -> Result<wire::WorkspaceSandboxSettings, Error> {
        let asked = Some(convert::id(workspace_id, "workspace_id")?);
        let (id, settings) = self.engine.settings(caller, asked).await?;
        Ok(answer(id, settings))
    }

    async fn update_settings(
        &self,
        caller: &Caller,
        request: wire::UpdateWorkspaceSandboxSettingsRequest,
    ) -> Result<wire::WorkspaceSandboxSettings, Error> {
        let update = WorkspaceSettingsUpdate {
            pause_retention_ms: retention(
                request.pause_retention.as_option(),
                request.clear_pause_retention,
                "pause_retention",
            )?,
            snapshot_retention_ms: retention(
                request.snapshot_retention.as_option(),
                request.clear_snapshot_retention,
                "snapshot_retention",
            )?,
            snapshots_max: limit(request.max_snapshots, request.clear_max_snapshots, "max_snapshots")?,
            templates_max: limit(request.max_templates, request.clear_max_templates, "max_templates")?,
            volumes_max: limit(request.max_volumes, request.clear_max_volumes, "max_volumes")?,
            bytes_max: limit(request.max_total_bytes, request.clear_max_total_bytes, "max_total_bytes")?,
            sessions_max: limit(
                request.max_concurrent_sessions,
                request.clear_max_concurrent_sessions,
                "max_concurrent_sessions",
            )?,
            sticky_sessions_max: limit(
                request.max_sticky_sessions,
                request.clear_max_sticky_sessions,
                "max_sticky_sessions",
            )?,
            // A workspace has one project, so that the older name means the same.
            preview_urls_max: limit(
                request.max_preview_urls_per_workspace.or(request.max_preview_urls_per_project),
                request.clear_max_preview_urls_per_workspace || request.clear_max_preview_urls_per_project,
                "max_preview_urls_per_workspace",
            )?,
        };
        let asked = Some(convert::id(&request.workspace_id, "workspace_id")?);
        let (id, settings) = self.engine.update_settings(caller, asked, update).await?;
        Ok(answer(id, settings))
    }
}

/// The part of the settings that older clients know.
fn retention_settings(settings: wire::WorkspaceSandboxSettings) -> wire::WorkspaceSnapshotRetentionSettings {
    wire::WorkspaceSnapshotRetentionSettings {
        workspace_id: settings.workspace_id,
        pause_retention: settings.pause_retention,
        snapshot_retention: settings.snapshot_retention,
    }
}

fn answer(id: WorkspaceId, settings: WorkspaceSettings) -> wire::WorkspaceSandboxSettings {
    let count = |limit: Option<u32>| limit.map(|limit| i32::try_from(limit).unwrap_or(i32::MAX));
    wire::WorkspaceSandboxSettings {
        workspace_id: id.to_string(),
        pause_retention: settings.pause_retention_ms.map(convert::duration).into(),
        snapshot_retention: settings.snapshot_retention_ms.map(convert::duration).into(),
        max_snapshots: count(settings.snapshots_max),
        max_templates: count(settings.templates_max),
        max_volumes: count(settings.volumes_max),
        max_total_bytes: settings.bytes_max.map(convert::saturating),
        max_concurrent_sessions: count(settings.sessions_max),
        max_sticky_sessions: count(settings.sticky_sessions_max),
        max_preview_urls_per_project: count(settings.preview_urls_max),
        max_preview_urls_per_workspace: count(settings.preview_urls_max),
    }
}

/// One setting of an update: `None` leaves it, `Some(None)` takes the limit away.
type Change<T> = Option<Option<T>>;

fn change<T>(value: Option<T>, clear: bool, field: &str) -> Result<Change<T>, Error> {
    match (value, clear) {
        (Some(_), true) => Err(refused(field, "and its clear flag exclude each other")),
        (None, false) => Ok(None),
        (value, _) => Ok(Some(value)),
    }
}

fn limit<W, T>(value: Option<W>, clear: bool, field: &str) -> Result<Change<T>, Error>
where
    T: TryFrom<W> + Default + PartialEq,
{
    let read = |value: W| T::try_from(value).ok().filter(|limit| *limit != T::default());
    let above_zero = |value| read(value).ok_or_else(|| refused(field, "must be above zero"));
    change(value.map(above_zero).transpose()?, clear, field)
}

fn retention(value: Option<&Duration>, clear: bool, field: &str) -> Result<Change<u64>, Error> {
    let value = value.map(|value| convert::milliseconds(value, field)).transpose()?;
    if value == Some(0) {
        return Err(refused(field, "must be longer than zero; clear it to keep things for ever"));
    }
    change(value, clear, field)
}

fn refused(field: &str, problem: &str) -> Error {
    Error::new(Code::InvalidArgument, format!("{field} {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_left_changed_or_cleared() {
        assert_eq!(limit::<i32, u32>(None, false, "f"), Ok(None));
        assert_eq!(limit::<i32, u32>(Some(3), false, "f"), Ok(Some(Some(3))));
        assert_eq!(limit::<i32, u32>(None, true, "f"), Ok(Some(None)));
        for (value, clear) in [(Some(3), true), (Some(0), false), (Some(-1), false)] {
            assert_eq!(limit::<i32, u32>(value, clear, "f").unwrap_err().code, Code::InvalidArgument);
        }
    }
}
