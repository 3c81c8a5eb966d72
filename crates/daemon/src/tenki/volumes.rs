//! Volumes.

use connectrpc::RequestContext;
use nagaya_api::error::Error;
use nagaya_api::ids::{VolumeId, WorkspaceId};
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::{Caller, ListVolumes, NewVolume, VolumeUpdate};

use super::service::TenkiService;
use super::{messages, ranges};
use crate::rpc::convert;
use crate::rpc::parse;
use crate::rpc::parse::{invalid, required, workspace};
use crate::rpc::service::caller;

/// Volumes have names, other than sessions and snapshots, which may do without.
fn named(name: String) -> Result<String, Error> {
    if name.is_empty() { Err(invalid("name must not be empty")) } else { ranges::name(name) }
}

impl TenkiService {
    pub(super) async fn create_volume(
        &self,
        context: &RequestContext,
        request: wire::CreateVolumeRequest,
    ) -> Result<wire::CreateVolumeResponse, Error> {
        let caller = &caller(context)?;
        let new = NewVolume {
            workspace_id: workspace(convert::or_none(&request.workspace_id), request.project_id.as_deref())?,
            name: named(request.name)?,
            size_bytes: ranges::volume_bytes(request.size_bytes)?,
        };
        let volume = self.engine.create_volume(caller, new).await?;
        Ok(wire::CreateVolumeResponse { volume: messages::volume(volume, false).into() })
    }

    pub(super) async fn get_volume(
        &self,
        context: &RequestContext,
        request: wire::GetVolumeRequest,
    ) -> Result<wire::GetVolumeResponse, Error> {
        let caller = &caller(context)?;
        self.volume(caller, convert::id(&request.volume_id, "volume_id")?).await
    }

    async fn volume(&self, caller: &Caller, id: VolumeId) -> Result<wire::GetVolumeResponse, Error> {
        let (volume, attachments) = self.engine.volume(caller, id).await?;
        Ok(wire::GetVolumeResponse {
            volume: messages::volume(volume, !attachments.is_empty()).into(),
            active_attachments: attachments.into_iter().map(|(at, each)| convert::attachment(at, each)).collect(),
        })
    }

    pub(super) async fn list_volumes(
        &self,
        context: &RequestContext,
        request: wire::ListVolumesRequest,
    ) -> Result<wire::ListVolumesResponse, Error> {
        let workspace = workspace(convert::or_none(&request.workspace_id), None)?;
        let caller = caller(context)?;
        let page = self.volumes_page(&caller, workspace, request.page_size, request.page_token);
        let (volumes, next_page_token) = page.await?;
        Ok(wire::ListVolumesResponse { volumes, next_page_token })
    }

    pub(super) async fn list_project_volumes(
        &self,
        context: &RequestContext,
        request: wire::ListProjectVolumesRequest,
    ) -> Result<wire::ListProjectVolumesResponse, Error> {
        let workspace = workspace(request.workspace_id.as_deref(), Some(&request.project_id))?;
        let caller = caller(context)?;
        let page = self.volumes_page(&caller, workspace, request.page_size, request.page_token);
        let (volumes, next_page_token) = page.await?;
        Ok(wire::ListProjectVolumesResponse { volumes, next_page_token })
    }

    /// One page for both list rpcs.
    async fn volumes_page(
        &self,
        caller: &Caller,
        workspace_id: Option<WorkspaceId>,
        asked_size: i32,
        page_token: String,
    ) -> Result<(Vec<wire::Volume>, String), Error> {
        let list = ListVolumes { workspace_id, page_size: ranges::page_size(asked_size)?, page_token };
        let (volumes, next_page_token) = self.engine.list_volumes(caller, list).await?;
        let volumes = volumes.into_iter().map(|(volume, attached)| messages::volume(volume, attached));
        Ok((volumes.collect(), next_page_token))
    }

    pub(super) async fn update_volume(
        &self,
        context: &RequestContext,
        request: wire::UpdateVolumeRequest,
    ) -> Result<wire::UpdateVolumeResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.volume_id, "volume_id")?;
        let update = VolumeUpdate {
            tags: ranges::updated_tags(request.tags, request.clear_tags)?,
            name: request.name.map(named).transpose()?,
        };
        self.engine.update_volume(caller, id, update).await?;
        Ok(wire::UpdateVolumeResponse { volume: self.volume(caller, id).await?.volume })
    }

    pub(super) async fn resize_volume(
        &self,
        context: &RequestContext,
        request: wire::ResizeVolumeRequest,
    ) -> Result<wire::ResizeVolumeResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.volume_id, "volume_id")?;
        self.engine.resize_volume(caller, id, ranges::volume_bytes(request.new_size_bytes)?).await?;
        Ok(wire::ResizeVolumeResponse { volume: self.volume(caller, id).await?.volume })
    }

    pub(super) async fn delete_volume(
        &self,
        context: &RequestContext,
        request: wire::DeleteVolumeRequest,
    ) -> Result<wire::DeleteVolumeResponse, Error> {
        let caller = &caller(context)?;
        self.engine.delete_volume(caller, convert::id(&request.volume_id, "volume_id")?).await?;
        Ok(wire::DeleteVolumeResponse::default())
    }

    pub(super) async fn attach_volume(
        &self,
        context: &RequestContext,
        request: wire::AttachVolumeRequest,
    ) -> Result<wire::AttachVolumeResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let mount = parse::mount(required(request.volume.into_option(), "volume")?)?;
        let attachment = self.engine.attach_volume(caller, id, mount).await?;
        Ok(wire::AttachVolumeResponse { attachment: convert::attachment(id, attachment).into() })
    }

    pub(super) async fn detach_volume(
        &self,
        context: &RequestContext,
        request: wire::DetachVolumeRequest,
    ) -> Result<wire::DetachVolumeResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let volume_id = convert::id(&request.volume_id, "volume_id")?;
        self.engine.detach_volume(caller, id, volume_id, request.force_detach).await?;
        Ok(wire::DetachVolumeResponse::default())
    }
}
