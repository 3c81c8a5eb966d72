//! Snapshots, on the control plane. Their bytes are fetched in `download.rs`.

use connectrpc::RequestContext;
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, WorkspaceId};
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::model::{SnapshotKind, SnapshotState};
use nagaya_engine::{Caller, ListSnapshots, NewSnapshot, SnapshotUpdate};

use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse::{invalid, page_size};
use crate::rpc::service::caller;

/// Which of the list rpcs was called.
#[derive(Default)]
pub(super) struct Scope {
    pub(super) workspace_id: Option<WorkspaceId>,
    pub(super) session_id: Option<SessionId>,
    pub(super) dangling: bool,
}

impl TenkiService {
    pub(super) async fn create_snapshot(
        &self,
        caller: &Caller,
        request: wire::CreateSnapshotRequest,
    ) -> Result<wire::Snapshot, Error> {
        let id = convert::id(&request.session_id, "session_id")?;
        let expires_at = request.expires_at.as_option().map(|at| convert::unix_ms(at, "expires_at")).transpose()?;
        // store_raw_image needs nothing: every snapshot's disk can be fetched.
        let new = NewSnapshot { name: request.name.unwrap_or_default(), expires_at, wait: !request.r#async };
        self.engine.create_snapshot(caller, id, new).await.map(convert::snapshot)
    }

    pub(super) async fn get_snapshot(&self, caller: &Caller, snapshot_id: &str) -> Result<wire::Snapshot, Error> {
        let id = convert::id(snapshot_id, "snapshot_id")?;
        self.engine.snapshot(caller, id).await.map(convert::snapshot)
    }

    /// One page for all five list rpcs.
    pub(super) async fn list_snapshots(
        &self,
        caller: &Caller,
        scope: Scope,
        asked_size: i32,
        page_token: String,
    ) -> Result<(Vec<wire::Snapshot>, String), Error> {
        let Scope { workspace_id, session_id, dangling } = scope;
        let page_size = page_size(asked_size)?;
        let list = ListSnapshots { workspace_id, session_id, dangling, page_size, page_token };
        let (snapshots, next_page_token) = self.engine.list_snapshots(caller, list).await?;
        Ok((snapshots.into_iter().map(convert::snapshot).collect(), next_page_token))
    }

    pub(super) async fn update_snapshot(
        &self,
        caller: &Caller,
        request: wire::UpdateSnapshotRequest,
    ) -> Result<wire::Snapshot, Error> {
        let id = convert::id(&request.snapshot_id, "snapshot_id")?;
        if request.clear_tags && !request.tags.is_empty() {
            return Err(invalid("tags and clear_tags exclude each other"));
        }
        let expires_at = request.expires_at.as_option().map(|at| convert::unix_ms(at, "expires_at")).transpose()?;
        if request.clear_expires_at && expires_at.is_some() {
            return Err(invalid("expires_at and clear_expires_at exclude each other"));
        }
        let update = SnapshotUpdate {
            name: request.name,
            expires_at: (request.clear_expires_at || expires_at.is_some()).then_some(expires_at),
            tags: (request.clear_tags || !request.tags.is_empty()).then_some(request.tags),
        };
        self.engine.update_snapshot(caller, id, update).await.map(convert::snapshot)
    }

    pub(super) async fn delete_snapshot(&self, caller: &Caller, snapshot_id: &str) -> Result<wire::Snapshot, Error> {
        let id = convert::id(snapshot_id, "snapshot_id")?;
        let deleted = self.engine.delete_snapshot(caller, id).await?;
        Ok(wire::Snapshot {
            state: wire::SnapshotState::Deleted.into(),
            raw_image_available: false,
            ..convert::snapshot(deleted)
        })
    }

    pub(super) async fn get_snapshot_download_url(
        &self,
        context: &RequestContext,
        snapshot_id: &str,
    ) -> Result<wire::GetSnapshotDownloadURLResponse, Error> {
        let caller = caller(context)?;
        let id = convert::id(snapshot_id, "snapshot_id")?;
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
