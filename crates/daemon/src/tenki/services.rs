//! The generated service traits, answered. One line of translation each; the rest is elsewhere.

use std::sync::Arc;

use connectrpc::{RequestContext, Response, Router, ServiceResult, ServiceStream};
use nagaya_api::error::Error;
use nagaya_api::tenki::v1 as wire;

use super::control::List;
use super::service::TenkiService;
use super::settings::retention_settings;
use super::snapshots::Scope;
use super::{dial, run, tunnel, wait};
use crate::rpc::convert;
use crate::rpc::parse::workspace;
use crate::rpc::service::caller;

/// A router that knows all rpcs of the contract.
pub(super) fn router(tenki: &Arc<TenkiService>) -> Router {
    let router = wire::SandboxService::register(Arc::new(ControlPlane(Arc::clone(tenki))), Router::new());
    let router = wire::SandboxSessionDataPlaneService::register(Arc::new(DataPlane(Arc::clone(tenki))), router);
    wire::SshGatewayClientService::register(Arc::new(SshGateways(Arc::clone(tenki))), router)
}

struct ControlPlane(Arc<TenkiService>);
struct DataPlane(Arc<TenkiService>);
struct SshGateways(Arc<TenkiService>);

fn answer<T>(result: Result<T, Error>) -> ServiceResult<T> {
    Ok(Response::new(result?))
}

impl wire::SandboxService for ControlPlane {
    async fn who_am_i(&self, context: RequestContext, _: wire::WhoAmIRequest) -> ServiceResult<wire::WhoAmIResponse> {
        Response::ok(self.0.who_am_i(&caller(&context)?))
    }

    async fn create_session(
        &self,
        context: RequestContext,
        request: wire::CreateSessionRequest,
    ) -> ServiceResult<wire::CreateSessionResponse> {
        answer(self.0.create_session(&context, request).await)
    }

    async fn create_session_credential(
        &self,
        context: RequestContext,
        request: wire::CreateSessionCredentialRequest,
    ) -> ServiceResult<wire::CreateSessionCredentialResponse> {
        answer(self.0.create_session_credential(&context, request).await)
    }

    async fn get_session(
        &self,
        context: RequestContext,
        request: wire::GetSessionRequest,
    ) -> ServiceResult<wire::GetSessionResponse> {
        let session = self.0.get_session(&caller(&context)?, &request.session_id).await?;
        Response::ok(wire::GetSessionResponse { session: session.into() })
    }

    async fn wait_session(
        &self,
        context: RequestContext,
        request: wire::WaitSessionRequest,
    ) -> ServiceResult<ServiceStream<wire::WaitSessionResponse>> {
        wait::wait_session(&self.0, &context, &request.session_id).await
    }

    async fn list_sessions(
        &self,
        context: RequestContext,
        request: wire::ListSessionsRequest,
    ) -> ServiceResult<wire::ListSessionsResponse> {
        let list = List {
            owner_id: request.owner_id,
            tags: request.tags,
            sticky: request.sticky,
            include_terminated: request.include_terminated,
            page_size: request.page_size,
            page_token: request.page_token,
            ..List::default()
        };
        let (sessions, next_page_token) = self.0.list(&caller(&context)?, list).await?;
        Response::ok(wire::ListSessionsResponse { sessions, next_page_token })
    }

    async fn list_workspace_sandboxes(
        &self,
        context: RequestContext,
        request: wire::ListWorkspaceSandboxesRequest,
    ) -> ServiceResult<wire::ListWorkspaceSandboxesResponse> {
        let list = List {
            workspace_id: convert::or_none(&request.workspace_id).map(str::to_owned),
            state: request.state,
            tags: request.tags,
            sticky: request.sticky,
            include_terminated: request.include_terminated,
            page_size: request.page_size,
            page_token: request.page_token,
            ..List::default()
        };
        let (sessions, next_page_token) = self.0.list(&caller(&context)?, list).await?;
        Response::ok(wire::ListWorkspaceSandboxesResponse { sessions, next_page_token })
    }

    async fn list_project_sandboxes(
        &self,
        context: RequestContext,
        request: wire::ListProjectSandboxesRequest,
    ) -> ServiceResult<wire::ListProjectSandboxesResponse> {
        let list = List {
            workspace_id: request.workspace_id,
            project_id: Some(request.project_id),
            state: request.state,
            tags: request.tags,
            sticky: request.sticky,
            include_terminated: request.include_terminated,
            page_size: request.page_size,
            page_token: request.page_token,
            ..List::default()
        };
        let (sessions, next_page_token) = self.0.list(&caller(&context)?, list).await?;
        Response::ok(wire::ListProjectSandboxesResponse { sessions, next_page_token })
    }

    async fn update_session(
        &self,
        context: RequestContext,
        request: wire::UpdateSessionRequest,
    ) -> ServiceResult<wire::UpdateSessionResponse> {
        let session = self.0.update_session(&caller(&context)?, request).await?;
        Response::ok(wire::UpdateSessionResponse { session: session.into() })
    }

    async fn update_ssh_authorized_keys(
        &self,
        context: RequestContext,
        request: wire::UpdateSSHAuthorizedKeysRequest,
    ) -> ServiceResult<wire::UpdateSSHAuthorizedKeysResponse> {
        answer(self.0.update_ssh_authorized_keys(&caller(&context)?, request).await)
    }

    async fn extend_session(
        &self,
        context: RequestContext,
        request: wire::ExtendSessionRequest,
    ) -> ServiceResult<wire::ExtendSessionResponse> {
        let session = self.0.extend_session(&caller(&context)?, request).await?;
        Response::ok(wire::ExtendSessionResponse { session: session.into() })
    }

    async fn terminate_session(
        &self,
        context: RequestContext,
        request: wire::TerminateSessionRequest,
    ) -> ServiceResult<wire::TerminateSessionResponse> {
        let session = self.0.terminate_session(&caller(&context)?, &request.session_id).await?;
        Response::ok(wire::TerminateSessionResponse { session: session.into() })
    }

    async fn terminate_sessions(
        &self,
        context: RequestContext,
        request: wire::TerminateSessionsRequest,
    ) -> ServiceResult<wire::TerminateSessionsResponse> {
        answer(self.0.terminate_sessions(&caller(&context)?, request).await)
    }

    async fn pause_session(
        &self,
        context: RequestContext,
        request: wire::PauseSessionRequest,
    ) -> ServiceResult<wire::PauseSessionResponse> {
        let session = self.0.pause_session(&context, &request.session_id).await?;
        Response::ok(wire::PauseSessionResponse { session: session.into() })
    }

    async fn resume_session(
        &self,
        context: RequestContext,
        request: wire::ResumeSessionRequest,
    ) -> ServiceResult<wire::ResumeSessionResponse> {
        let session = self.0.resume_session(&context, &request.session_id).await?;
        Response::ok(wire::ResumeSessionResponse { session: session.into() })
    }

    async fn create_snapshot(
        &self,
        context: RequestContext,
        request: wire::CreateSnapshotRequest,
    ) -> ServiceResult<wire::CreateSnapshotResponse> {
        let snapshot = self.0.create_snapshot(&caller(&context)?, request).await?;
        Response::ok(wire::CreateSnapshotResponse { snapshot: snapshot.into() })
    }

    async fn get_snapshot(
        &self,
        context: RequestContext,
        request: wire::GetSnapshotRequest,
    ) -> ServiceResult<wire::GetSnapshotResponse> {
        let snapshot = self.0.get_snapshot(&caller(&context)?, &request.snapshot_id).await?;
        Response::ok(wire::GetSnapshotResponse { snapshot: snapshot.into() })
    }

    async fn update_snapshot(
        &self,
        context: RequestContext,
        request: wire::UpdateSnapshotRequest,
    ) -> ServiceResult<wire::UpdateSnapshotResponse> {
        let snapshot = self.0.update_snapshot(&caller(&context)?, request).await?;
        Response::ok(wire::UpdateSnapshotResponse { snapshot: snapshot.into() })
    }

    async fn delete_snapshot(
        &self,
        context: RequestContext,
        request: wire::DeleteSnapshotRequest,
    ) -> ServiceResult<wire::DeleteSnapshotResponse> {
        let snapshot = self.0.delete_snapshot(&caller(&context)?, &request.snapshot_id).await?;
        Response::ok(wire::DeleteSnapshotResponse { snapshot: snapshot.into() })
    }

    async fn get_snapshot_download_url(
        &self,
        context: RequestContext,
        request: wire::GetSnapshotDownloadURLRequest,
    ) -> ServiceResult<wire::GetSnapshotDownloadURLResponse> {
        answer(self.0.get_snapshot_download_url(&context, &request.snapshot_id).await)
    }

    async fn list_snapshots(
        &self,
        context: RequestContext,
        request: wire::ListSnapshotsRequest,
    ) -> ServiceResult<wire::ListSnapshotsResponse> {
        let scope = Scope::default();
        let caller = caller(&context)?;
        let page = self.0.list_snapshots(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Response::ok(wire::ListSnapshotsResponse { snapshots, next_page_token })
    }

    async fn list_session_snapshots(
        &self,
        context: RequestContext,
        request: wire::ListSessionSnapshotsRequest,
    ) -> ServiceResult<wire::ListSessionSnapshotsResponse> {
        let scope = Scope { session_id: Some(convert::id(&request.session_id, "session_id")?), ..Scope::default() };
        let caller = caller(&context)?;
        let page = self.0.list_snapshots(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Response::ok(wire::ListSessionSnapshotsResponse { snapshots, next_page_token })
    }

    async fn list_dangling_snapshots(
        &self,
        context: RequestContext,
        request: wire::ListDanglingSnapshotsRequest,
    ) -> ServiceResult<wire::ListDanglingSnapshotsResponse> {
        let scope = Scope { dangling: true, ..Scope::default() };
        let caller = caller(&context)?;
        let page = self.0.list_snapshots(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Response::ok(wire::ListDanglingSnapshotsResponse { snapshots, next_page_token })
    }

    async fn list_workspace_snapshots(
        &self,
        context: RequestContext,
        request: wire::ListWorkspaceSnapshotsRequest,
    ) -> ServiceResult<wire::ListWorkspaceSnapshotsResponse> {
        let scope =
            Scope { workspace_id: workspace(convert::or_none(&request.workspace_id), None)?, ..Scope::default() };
        let caller = caller(&context)?;
        let page = self.0.list_snapshots(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Response::ok(wire::ListWorkspaceSnapshotsResponse { snapshots, next_page_token })
    }

    async fn list_project_snapshots(
        &self,
        context: RequestContext,
        request: wire::ListProjectSnapshotsRequest,
    ) -> ServiceResult<wire::ListProjectSnapshotsResponse> {
        let scope = Scope {
            workspace_id: workspace(request.workspace_id.as_deref(), Some(&request.project_id))?,
            ..Scope::default()
        };
        let caller = caller(&context)?;
        let page = self.0.list_snapshots(&caller, scope, request.page_size, request.page_token);
        let (snapshots, next_page_token) = page.await?;
        Response::ok(wire::ListProjectSnapshotsResponse { snapshots, next_page_token })
    }

    async fn create_volume(
        &self,
        context: RequestContext,
        request: wire::CreateVolumeRequest,
    ) -> ServiceResult<wire::CreateVolumeResponse> {
        let volume = self.0.create_volume(&caller(&context)?, request).await?;
        Response::ok(wire::CreateVolumeResponse { volume: volume.into() })
    }

    async fn get_volume(
        &self,
        context: RequestContext,
        request: wire::GetVolumeRequest,
    ) -> ServiceResult<wire::GetVolumeResponse> {
        answer(self.0.get_volume(&caller(&context)?, &request.volume_id).await)
    }

    async fn update_volume(
        &self,
        context: RequestContext,
        request: wire::UpdateVolumeRequest,
    ) -> ServiceResult<wire::UpdateVolumeResponse> {
        answer(self.0.update_volume(&caller(&context)?, request).await)
    }

    async fn resize_volume(
        &self,
        context: RequestContext,
        request: wire::ResizeVolumeRequest,
    ) -> ServiceResult<wire::ResizeVolumeResponse> {
        answer(self.0.resize_volume(&caller(&context)?, request).await)
    }

    async fn delete_volume(
        &self,
        context: RequestContext,
        request: wire::DeleteVolumeRequest,
    ) -> ServiceResult<wire::DeleteVolumeResponse> {
        answer(self.0.delete_volume(&caller(&context)?, &request.volume_id).await)
    }

    async fn attach_volume(
        &self,
        context: RequestContext,
        request: wire::AttachVolumeRequest,
    ) -> ServiceResult<wire::AttachVolumeResponse> {
        answer(self.0.attach_volume(&caller(&context)?, request).await)
    }

    async fn detach_volume(
        &self,
        context: RequestContext,
        request: wire::DetachVolumeRequest,
    ) -> ServiceResult<wire::DetachVolumeResponse> {
        answer(self.0.detach_volume(&caller(&context)?, request).await)
    }

    async fn list_volumes(
        &self,
        context: RequestContext,
        request: wire::ListVolumesRequest,
    ) -> ServiceResult<wire::ListVolumesResponse> {
        let workspace = workspace(convert::or_none(&request.workspace_id), None)?;
        let caller = caller(&context)?;
        let page = self.0.list_volumes(&caller, workspace, request.page_size, request.page_token);
        let (volumes, next_page_token) = page.await?;
        Response::ok(wire::ListVolumesResponse { volumes, next_page_token })
    }

    async fn list_project_volumes(
        &self,
        context: RequestContext,
        request: wire::ListProjectVolumesRequest,
    ) -> ServiceResult<wire::ListProjectVolumesResponse> {
        let workspace = workspace(request.workspace_id.as_deref(), Some(&request.project_id))?;
        let caller = caller(&context)?;
        let page = self.0.list_volumes(&caller, workspace, request.page_size, request.page_token);
        let (volumes, next_page_token) = page.await?;
        Response::ok(wire::ListProjectVolumesResponse { volumes, next_page_token })
    }

    async fn get_workspace_sandbox_settings(
        &self,
        context: RequestContext,
        request: wire::GetWorkspaceSandboxSettingsRequest,
    ) -> ServiceResult<wire::GetWorkspaceSandboxSettingsResponse> {
        let settings = self.0.settings(&caller(&context)?, &request.workspace_id).await?;
        Response::ok(wire::GetWorkspaceSandboxSettingsResponse { settings: settings.into() })
    }

    async fn update_workspace_sandbox_settings(
        &self,
        context: RequestContext,
        request: wire::UpdateWorkspaceSandboxSettingsRequest,
    ) -> ServiceResult<wire::UpdateWorkspaceSandboxSettingsResponse> {
        let settings = self.0.update_settings(&caller(&context)?, request).await?;
        Response::ok(wire::UpdateWorkspaceSandboxSettingsResponse { settings: settings.into() })
    }

    async fn get_workspace_snapshot_retention_settings(
        &self,
        context: RequestContext,
        request: wire::GetWorkspaceSnapshotRetentionSettingsRequest,
    ) -> ServiceResult<wire::GetWorkspaceSnapshotRetentionSettingsResponse> {
        let settings = self.0.settings(&caller(&context)?, &request.workspace_id).await?;
        let settings = retention_settings(settings).into();
        Response::ok(wire::GetWorkspaceSnapshotRetentionSettingsResponse { settings })
    }

    async fn update_workspace_snapshot_retention_settings(
        &self,
        context: RequestContext,
        request: wire::UpdateWorkspaceSnapshotRetentionSettingsRequest,
    ) -> ServiceResult<wire::UpdateWorkspaceSnapshotRetentionSettingsResponse> {
        let update = wire::UpdateWorkspaceSandboxSettingsRequest {
            workspace_id: request.workspace_id,
            pause_retention: request.pause_retention,
            clear_pause_retention: request.clear_pause_retention,
            snapshot_retention: request.snapshot_retention,
            clear_snapshot_retention: request.clear_snapshot_retention,
            ..Default::default()
        };
        let settings = self.0.update_settings(&caller(&context)?, update).await?;
        let settings = retention_settings(settings).into();
        Response::ok(wire::UpdateWorkspaceSnapshotRetentionSettingsResponse { settings })
    }

    async fn expose_port(
        &self,
        context: RequestContext,
        request: wire::ExposePortRequest,
    ) -> ServiceResult<wire::ExposePortResponse> {
        answer(self.0.expose_port(&caller(&context)?, request).await)
    }

    async fn unexpose_port(
        &self,
        context: RequestContext,
        request: wire::UnexposePortRequest,
    ) -> ServiceResult<wire::UnexposePortResponse> {
        answer(self.0.unexpose_port(&caller(&context)?, request).await)
    }

    async fn list_exposed_ports(
        &self,
        context: RequestContext,
        request: wire::ListExposedPortsRequest,
    ) -> ServiceResult<wire::ListExposedPortsResponse> {
        answer(self.0.list_exposed_ports(&caller(&context)?, &request.session_id).await)
    }

    async fn open_preview(
        &self,
        context: RequestContext,
        request: wire::OpenPreviewRequest,
    ) -> ServiceResult<wire::OpenPreviewResponse> {
        answer(self.0.open_preview(&caller(&context)?, request).await)
    }

    async fn touch_preview(
        &self,
        context: RequestContext,
        request: wire::TouchPreviewRequest,
    ) -> ServiceResult<wire::TouchPreviewResponse> {
        answer(self.0.touch_preview(&caller(&context)?, request).await)
    }

    async fn create_preview_url(
        &self,
        context: RequestContext,
        request: wire::CreatePreviewUrlRequest,
    ) -> ServiceResult<wire::CreatePreviewUrlResponse> {
        let preview_url = self.0.create_preview_url(&caller(&context)?, request).await?;
        Response::ok(wire::CreatePreviewUrlResponse { preview_url: preview_url.into() })
    }

    async fn get_preview_url(
        &self,
        context: RequestContext,
        request: wire::GetPreviewUrlRequest,
    ) -> ServiceResult<wire::GetPreviewUrlResponse> {
        let preview_url = self.0.get_preview_url(&caller(&context)?, request).await?;
        Response::ok(wire::GetPreviewUrlResponse { preview_url: preview_url.into() })
    }

    async fn list_preview_urls(
        &self,
        context: RequestContext,
        request: wire::ListPreviewUrlsRequest,
    ) -> ServiceResult<wire::ListPreviewUrlsResponse> {
        answer(self.0.list_preview_urls(&caller(&context)?, request).await)
    }

    async fn bind_preview_url(
        &self,
        context: RequestContext,
        request: wire::BindPreviewUrlRequest,
    ) -> ServiceResult<wire::BindPreviewUrlResponse> {
        let preview_url = self.0.bind_preview_url(&caller(&context)?, request).await?;
        Response::ok(wire::BindPreviewUrlResponse { preview_url: preview_url.into() })
    }

    async fn unbind_preview_url(
        &self,
        context: RequestContext,
        request: wire::UnbindPreviewUrlRequest,
    ) -> ServiceResult<wire::UnbindPreviewUrlResponse> {
        let preview_url = self.0.unbind_preview_url(&caller(&context)?, &request.preview_url_id).await?;
        Response::ok(wire::UnbindPreviewUrlResponse { preview_url: preview_url.into() })
    }

    async fn delete_preview_url(
        &self,
        context: RequestContext,
        request: wire::DeletePreviewUrlRequest,
    ) -> ServiceResult<wire::DeletePreviewUrlResponse> {
        answer(self.0.delete_preview_url(&caller(&context)?, &request.preview_url_id).await)
    }

    async fn resolve_preview_token(
        &self,
        context: RequestContext,
        request: wire::ResolvePreviewTokenRequest,
    ) -> ServiceResult<wire::ResolvePreviewTokenResponse> {
        answer(self.0.resolve_preview_token(&caller(&context)?, request).await)
    }

    async fn report_session_activity(
        &self,
        context: RequestContext,
        request: wire::ReportSessionActivityRequest,
    ) -> ServiceResult<wire::ReportSessionActivityResponse> {
        answer(self.0.report_session_activity(&caller(&context)?, &request.session_id).await)
    }

    async fn get_workspace_sandbox_usage(
        &self,
        context: RequestContext,
        request: wire::GetWorkspaceSandboxUsageRequest,
    ) -> ServiceResult<wire::GetWorkspaceSandboxUsageResponse> {
        answer(self.0.usage(&caller(&context)?, request).await)
    }

    async fn git_operation(
        &self,
        context: RequestContext,
        request: wire::GitOperationRequest,
    ) -> ServiceResult<wire::GitOperationResponse> {
        answer(self.0.git_operation(&caller(&context)?, request).await)
    }

    async fn execute_command(
        &self,
        context: RequestContext,
        request: wire::ExecuteCommandRequest,
    ) -> ServiceResult<wire::ExecuteCommandResponse> {
        answer(self.0.execute_command(&caller(&context)?, request).await)
    }

    async fn stream_command_output(
        &self,
        context: RequestContext,
        request: wire::StreamCommandOutputRequest,
    ) -> ServiceResult<ServiceStream<wire::StreamCommandOutputResponse>> {
        run::stream_command_output(&self.0, &context, request).await
    }
}

/// The rpcs that carry file contents are not here but in `direct.rs`.
impl wire::SandboxSessionDataPlaneService for DataPlane {
    async fn run(
        &self,
        context: RequestContext,
        requests: ServiceStream<wire::SandboxSessionDataPlaneServiceRunRequest>,
    ) -> ServiceResult<ServiceStream<wire::SandboxSessionDataPlaneServiceRunResponse>> {
        run::run(&self.0, &context, requests).await
    }

    async fn dial(
        &self,
        context: RequestContext,
        requests: ServiceStream<wire::SandboxSessionDataPlaneServiceDialRequest>,
    ) -> ServiceResult<ServiceStream<wire::SandboxSessionDataPlaneServiceDialResponse>> {
        dial::dial(&self.0, &context, requests).await
    }

    async fn host_port_tunnel(
        &self,
        context: RequestContext,
        requests: ServiceStream<wire::SandboxSessionDataPlaneServiceHostPortTunnelRequest>,
    ) -> ServiceResult<ServiceStream<wire::SandboxSessionDataPlaneServiceHostPortTunnelResponse>> {
        tunnel::tunnel(&self.0, &context, requests).await
    }

    async fn stat(
        &self,
        context: RequestContext,
        request: wire::SandboxSessionDataPlaneServiceStatRequest,
    ) -> ServiceResult<wire::SandboxSessionDataPlaneServiceStatResponse> {
        let response = self.0.stat(&context, request.request.into_option()).await?;
        Response::ok(wire::SandboxSessionDataPlaneServiceStatResponse { response: response.into() })
    }

    async fn mkdir(
        &self,
        context: RequestContext,
        request: wire::SandboxSessionDataPlaneServiceMkdirRequest,
    ) -> ServiceResult<wire::SandboxSessionDataPlaneServiceMkdirResponse> {
        let response = self.0.mkdir(&context, request.request.into_option()).await?;
        Response::ok(wire::SandboxSessionDataPlaneServiceMkdirResponse { response: response.into() })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: wire::SandboxSessionDataPlaneServiceRemoveRequest,
    ) -> ServiceResult<wire::SandboxSessionDataPlaneServiceRemoveResponse> {
        let response = self.0.remove(&context, request.request.into_option()).await?;
        Response::ok(wire::SandboxSessionDataPlaneServiceRemoveResponse { response: response.into() })
    }

    async fn list(
        &self,
        context: RequestContext,
        request: wire::SandboxSessionDataPlaneServiceListRequest,
    ) -> ServiceResult<wire::SandboxSessionDataPlaneServiceListResponse> {
        let response = self.0.list_directory(&context, request.request.into_option()).await?;
        Response::ok(wire::SandboxSessionDataPlaneServiceListResponse { response: response.into() })
    }
}

impl wire::SshGatewayClientService for SshGateways {
    async fn issue_sandbox_ssh_cert(
        &self,
        context: RequestContext,
        request: wire::IssueSandboxSSHCertRequest,
    ) -> ServiceResult<wire::IssueSandboxSSHCertResponse> {
        answer(self.0.issue_sandbox_ssh_cert(&caller(&context)?, request).await)
    }

    async fn list_active_ssh_gateways(
        &self,
        context: RequestContext,
        _: wire::ListActiveSSHGatewaysRequest,
    ) -> ServiceResult<wire::ListActiveSSHGatewaysResponse> {
        Response::ok(self.0.list_active_ssh_gateways(&context))
    }
}
