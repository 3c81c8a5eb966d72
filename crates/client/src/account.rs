//! Who the caller is, and what a workspace may use.

use std::time::Duration;

use nagaya_api::tenki::v1;
use serde::Serialize;

use crate::settable::settable;
use crate::wire::{self, wire_enum};
use crate::{Client, Error, Result};

/// The owner of a credential, and where it may work.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct WhoAmI {
    /// `USER`, `WORKSPACE` or `SERVICE`.
    pub owner_type: String,
    pub owner_id: String,
    pub workspaces: Vec<Workspace>,
}

#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Workspace {
    pub id: String,
    pub name: String,
}

wire_enum! {
    /// What a limit counts.
    UsageUnit, v1::SandboxUsageUnit {
        Unspecified = "unspecified",
        Count = "count",
        Bytes = "bytes",
    }
}

/// One limit of a workspace, and how much of it is used.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct UsageLimit {
    /// A stable word such as `active_sessions`.
    pub key: String,
    pub label: String,
    pub unit: UsageUnit,
    pub current: i64,
    /// `None`: there is no limit.
    pub max: Option<i64>,
    pub help_text: String,
}

/// What a workspace may use, and how long it keeps things; `None` is without limit.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct WorkspaceSettings {
    pub workspace_id: String,
    #[serde(serialize_with = "wire::serialize_optional_span")]
    pub pause_retention: Option<Duration>,
    #[serde(serialize_with = "wire::serialize_optional_span")]
    pub snapshot_retention: Option<Duration>,
    pub max_snapshots: Option<i32>,
    pub max_templates: Option<i32>,
    pub max_volumes: Option<i32>,
    pub max_total_bytes: Option<i64>,
    pub max_concurrent_sessions: Option<i32>,
    pub max_sticky_sessions: Option<i32>,
    pub max_preview_urls: Option<i32>,
}

/// What [`Client::update_workspace_settings`] does to one setting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Change<T> {
    #[default]
    Keep,
    /// Without limit from now on.
    Clear,
    Set(T),
}

impl<T> Change<T> {
    pub(crate) fn set(self) -> Option<T> {
        match self {
            Self::Set(value) => Some(value),
            Self::Keep | Self::Clear => None,
        }
    }

    fn is_clear(&self) -> bool {
        matches!(self, Self::Clear)
    }
}

settable! {
    /// Changes of a workspace's settings; the default changes nothing.
    #[derive(Debug, Clone, Copy, Default)]
    pub struct WorkspaceSettingsUpdate {
        pub pause_retention: Change<Duration>,
        pub snapshot_retention: Change<Duration>,
        pub max_snapshots: Change<i32>,
        pub max_templates: Change<i32>,
        pub max_volumes: Change<i32>,
        pub max_total_bytes: Change<i64>,
        pub max_concurrent_sessions: Change<i32>,
        pub max_sticky_sessions: Change<i32>,
        pub max_preview_urls: Change<i32>,
    }
}

impl Client {
    pub async fn who_am_i(&self) -> Result<WhoAmI> {
        let answer = self.control().who_am_i(v1::WhoAmIRequest::default()).await.map_err(Error::of_rpc)?;
        let workspaces = answer.workspaces.into_iter();
        Ok(WhoAmI {
            owner_type: answer.owner_type,
            owner_id: answer.owner_id,
            workspaces: workspaces.map(|each| Workspace { id: each.workspace_id, name: each.name }).collect(),
        })
    }

    /// The limits of a workspace; of the caller's own one when the id is empty.
    pub async fn usage(&self, workspace_id: &str) -> Result<Vec<UsageLimit>> {
        let request =
            v1::GetWorkspaceSandboxUsageRequest { workspace_id: workspace_id.to_owned(), ..Default::default() };
        let answer = self.control().get_workspace_sandbox_usage(request).await.map_err(Error::of_rpc)?;
        let limits = answer.limits.into_iter().map(|limit| UsageLimit {
            key: limit.key,
            label: limit.label,
            unit: UsageUnit::of_wire(limit.unit),
            current: limit.current,
            max: limit.max,
            help_text: limit.help_text,
        });
        Ok(limits.collect())
    }

    /// The settings of a workspace; of the caller's own one when the id is empty.
    pub async fn workspace_settings(&self, workspace_id: &str) -> Result<WorkspaceSettings> {
        let request = v1::GetWorkspaceSandboxSettingsRequest { workspace_id: workspace_id.to_owned() };
        let answer = self.control().get_workspace_sandbox_settings(request).await.map_err(Error::of_rpc)?;
        answer
            .settings
            .into_option()
            .map(WorkspaceSettings::of_wire)
            .ok_or_else(|| Error::bad_answer("it holds no settings"))
    }

    /// Changes settings of a workspace and answers all of them.
    pub async fn update_workspace_settings(
        &self,
        workspace_id: &str,
        update: WorkspaceSettingsUpdate,
    ) -> Result<WorkspaceSettings> {
        let request = v1::UpdateWorkspaceSandboxSettingsRequest {
            workspace_id: workspace_id.to_owned(),
            clear_pause_retention: update.pause_retention.is_clear(),
            pause_retention: wire::duration(update.pause_retention.set()),
            clear_snapshot_retention: update.snapshot_retention.is_clear(),
            snapshot_retention: wire::duration(update.snapshot_retention.set()),
            clear_max_snapshots: update.max_snapshots.is_clear(),
            max_snapshots: update.max_snapshots.set(),
            clear_max_templates: update.max_templates.is_clear(),
            max_templates: update.max_templates.set(),
            clear_max_volumes: update.max_volumes.is_clear(),
            max_volumes: update.max_volumes.set(),
            clear_max_total_bytes: update.max_total_bytes.is_clear(),
            max_total_bytes: update.max_total_bytes.set(),
            clear_max_concurrent_sessions: update.max_concurrent_sessions.is_clear(),
            max_concurrent_sessions: update.max_concurrent_sessions.set(),
            clear_max_sticky_sessions: update.max_sticky_sessions.is_clear(),
            max_sticky_sessions: update.max_sticky_sessions.set(),
            clear_max_preview_urls_per_workspace: update.max_preview_urls.is_clear(),
            max_preview_urls_per_workspace: update.max_preview_urls.set(),
            ..Default::default()
        };
        let answer = self.control().update_workspace_sandbox_settings(request).await.map_err(Error::of_rpc)?;
        answer
            .settings
            .into_option()
            .map(WorkspaceSettings::of_wire)
            .ok_or_else(|| Error::bad_answer("it holds no settings"))
    }
}

impl WorkspaceSettings {
    pub(crate) fn of_wire(settings: v1::WorkspaceSandboxSettings) -> Self {
        Self {
            workspace_id: settings.workspace_id,
            pause_retention: wire::span(settings.pause_retention),
            snapshot_retention: wire::span(settings.snapshot_retention),
            max_snapshots: settings.max_snapshots,
            max_templates: settings.max_templates,
            max_volumes: settings.max_volumes,
            max_total_bytes: settings.max_total_bytes,
            max_concurrent_sessions: settings.max_concurrent_sessions,
            max_sticky_sessions: settings.max_sticky_sessions,
            max_preview_urls: settings.max_preview_urls_per_workspace.or(settings.max_preview_urls_per_project),
        }
    }
}
