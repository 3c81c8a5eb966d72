//! Snapshots, on the control plane. Their bytes are fetched in `download.rs`.

use connectrpc::RequestContext;
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, WorkspaceId};
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::model::{SnapshotKind, SnapshotState};
use nagaya_engine::{Caller, ListSnapshots, NewSnapshot, SnapshotUpdate};

use super::ranges;
use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse::{invalid, workspace};
use crate::rpc::service::caller;

/// Which of the list rpcs was called.
#[derive(Default)]
struct Scope {
    workspace_id: Option<WorkspaceId>,
    session_id: Option<SessionId>,
    dangling: bool,
}

impl TenkiService {
    pub(super) async fn create_snapshot(
        &self,
        context: &RequestContext,
        request: wire::CreateSnapshotRequest,
    ) -> Result<wire::CreateSnapshotResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let expires_at = request.expires_at.as_option().map(|at| convert::unix_ms(at, "expires_at")).transpose()?;
        // store_raw_image needs nothing: every snapshot's disk can be fetched.
        let name = ranges::name(request.name.unwrap_or_default())?;
        let new = NewSnapshot { name, expires_at, wait: !request.r#async };
        let snapshot = self.engine.create_snapshot(caller, id, new).await?;
        Ok(wire::CreateSnapshotResponse { snapshot: convert::snapshot(snapshot).into() })
    }

    pub(super) async fn get_snapshot(
        &self,
        context: &RequestContext,
        request: wire::GetSnapshotRequest,
    ) -> Result<wire::GetSnapshotResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.snapshot_id, "snapshot_id")?;
        let snapshot = self.engine.snapshot(caller, id).await?;
        Ok(wire::GetSnapshotResponse { snapshot: convert::snapshot(snapshot).into() })
    }

    pub(super) async fn list_snapshots(
        &self,
        context: &RequestContext,
        request: wire::ListSnapshotsRequest,
    ) -> Result<wire::ListSnapshotsResponse, Error> {
        let scope = Scope::default();
        let caller = caller(context)?;
        let page = self.snapshots_page(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Ok(wire::ListSnapshotsResponse { snapshots, next_page_token })
    }

    pub(super) async fn list_session_snapshots(
        &self,
        context: &RequestContext,
        request: wire::ListSessionSnapshotsRequest,
    ) -> Result<wire::ListSessionSnapshotsResponse, Error> {
        let scope = Scope { session_id: Some(convert::id(&request.session_id, "session_id")?), ..Scope::default() };
        let caller = caller(context)?;
        let page = self.snapshots_page(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Ok(wire::ListSessionSnapshotsResponse { snapshots, next_page_token })
    }

    pub(super) async fn list_dangling_snapshots(
        &self,
        context: &RequestContext,
        request: wire::ListDanglingSnapshotsRequest,
    ) -> Result<wire::ListDanglingSnapshotsResponse, Error> {
        let scope = Scope { dangling: true, ..Scope::default() };
        let caller = caller(context)?;
        let page = self.snapshots_page(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Ok(wire::ListDanglingSnapshotsResponse { snapshots, next_page_token })
    }

    pub(super) async fn list_workspace_snapshots(
        &self,
        context: &RequestContext,
        request: wire::ListWorkspaceSnapshotsRequest,
    ) -> Result<wire::ListWorkspaceSnapshotsResponse, Error> {
        let scope =
            Scope { workspace_id: workspace(convert::or_none(&request.workspace_id), None)?, ..Scope::default() };
        let caller = caller(context)?;
        let page = self.snapshots_page(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Ok(wire::ListWorkspaceSnapshotsResponse { snapshots, next_page_token })
    }

    pub(super) async fn list_project_snapshots(
        &self,
        context: &RequestContext,
        request: wire::ListProjectSnapshotsRequest,
    ) -> Result<wire::ListProjectSnapshotsResponse, Error> {
        let scope = Scope {
            workspace_id: workspace(request.workspace_id.as_deref(), Some(&request.project_id))?,
            ..Scope::default()
        };
        let caller = caller(context)?;
        let page = self.snapshots_page(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Ok(wire::ListProjectSnapshotsResponse { snapshots, next_page_token })
    }

    /// One page for all five list rpcs.
    async fn snapshots_page(
        &self,
        caller: &Caller,
        scope: Scope,
        asked_size: i32,
        page_token: String,
    ) -> Result<(Vec<wire::Snapshot>, String), Error> {
        let Scope { workspace_id, session_id, dangling } = scope;
        let page_size = ranges::page_size(asked_size)?;
        let list = ListSnapshots { workspace_id, session_id, dangling, page_size, page_token };
        let (snapshots, next_page_token) = self.engine.list_snapshots(caller, list).await?;
        Ok((snapshots.into_iter().map(convert::snapshot).collect(), next_page_token))
    }

    pub(super) async fn update_snapshot(
        &self,
        context: &RequestContext,
        request: wire::UpdateSnapshotRequest,
    ) -> Result<wire::UpdateSnapshotResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.snapshot_id, "snapshot_id")?;
        let tags = ranges::updated_tags(request.tags, request.clear_tags)?;
        let expires_at = request.expires_at.as_option().map(|at| convert::unix_ms(at, "expires_at")).transpose()?;
        if request.clear_expires_at && expires_at.is_some() {
            return Err(invalid("expires_at and clear_expires_at exclude each other"));
        }
        let update = SnapshotUpdate {
            name: request.name.map(ranges::name).transpose()?,
            expires_at: (request.clear_expires_at || expires_at.is_some()).then_some(expires_at),
            tags,
        };
        let snapshot = self.engine.update_snapshot(caller, id, update).await?;
        Ok(wire::UpdateSnapshotResponse { snapshot: convert::snapshot(snapshot).into() })
    }

    pub(super) async fn delete_snapshot(
        &self,
        context: &RequestContext,
        request: wire::DeleteSnapshotRequest,
    ) -> Result<wire::DeleteSnapshotResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.snapshot_id, "snapshot_id")?;
        let deleted = self.engine.delete_snapshot(caller, id).await?;
        let snapshot = wire::Snapshot {
            state: wire::SnapshotState::Deleted.into(),
            raw_image_available: false,
            ..convert::snapshot(deleted)
        };
        Ok(wire::DeleteSnapshotResponse { snapshot: snapshot.into() })
    }

    pub(super) async fn get_snapshot_download_url(
        &self,
        context: &RequestContext,
        request: wire::GetSnapshotDownloadURLRequest,
    ) -> Result<wire::GetSnapshotDownloadURLResponse, Error> {
        let caller = caller(context)?;
        let id = convert::id(&request.snapshot_id, "snapshot_id")?;
        let snapshot = self.engine.snapshot(&caller, id).await?;
        if snapshot.kind == SnapshotKind::Pause {
            let detail = "it stands for the disk of a paused session; take a snapshot of that session and fetch it";
            return Err(Error::new(Code::SnapshotNotReady, detail));
        }
        if snapshot.state != SnapshotState::Ready {
            return Err(Code::SnapshotNotReady.into());
        }
        let (token, expires_at) = self.downloads.token(&caller, id);
        Ok(wire::GetSnapshotDownloadURLResponse {
            url: format!("{}/v1/snapshots/{id}/disk?token={token}", self.endpoint(context)),
            expires_at: convert::timestamp(expires_at).into(),
        })
    }
}
