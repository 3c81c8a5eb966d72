//! The generated service traits, answered. One line of translation each; the rest is elsewhere.

use std::sync::Arc;

use connectrpc::{RequestContext, Response, Router, ServiceResult, ServiceStream};
use nagaya_api::error::Error;
use nagaya_api::tenki::v1 as wire;

use super::control::List;
use super::{Tenki, run, wait};

/// A router that knows all rpcs of the contract.
pub(super) fn router(tenki: &Arc<Tenki>) -> Router {
    let router = wire::SandboxService::register(Arc::new(ControlPlane(Arc::clone(tenki))), Router::new());
    let router = wire::SandboxSessionDataPlaneService::register(Arc::new(DataPlane(Arc::clone(tenki))), router);
    wire::SshGatewayClientService::register(Arc::new(SshGateways), router)
}

struct ControlPlane(Arc<Tenki>);
struct DataPlane(Arc<Tenki>);
struct SshGateways;

fn answer<T>(result: Result<T, Error>) -> ServiceResult<T> {
    Ok(Response::new(result?))
}

impl wire::SandboxService for ControlPlane {
    async fn who_am_i(&self, context: RequestContext, _: wire::WhoAmIRequest) -> ServiceResult<wire::WhoAmIResponse> {
        Response::ok(self.0.who_am_i(&self.0.caller(&context)?))
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
        let session = self.0.get_session(&self.0.caller(&context)?, &request.session_id).await?;
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
        let (sessions, next_page_token) = self.0.list(&self.0.caller(&context)?, list).await?;
        Response::ok(wire::ListSessionsResponse { sessions, next_page_token })
    }

    async fn list_workspace_sandboxes(
        &self,
        context: RequestContext,
        request: wire::ListWorkspaceSandboxesRequest,
    ) -> ServiceResult<wire::ListWorkspaceSandboxesResponse> {
        let list = List {
            workspace_id: request.workspace_id,
            state: request.state,
            tags: request.tags,
            sticky: request.sticky,
            include_terminated: request.include_terminated,
            page_size: request.page_size,
            page_token: request.page_token,
            ..List::default()
        };
        let (sessions, next_page_token) = self.0.list(&self.0.caller(&context)?, list).await?;
        Response::ok(wire::ListWorkspaceSandboxesResponse { sessions, next_page_token })
    }

    async fn list_project_sandboxes(
        &self,
        context: RequestContext,
        request: wire::ListProjectSandboxesRequest,
    ) -> ServiceResult<wire::ListProjectSandboxesResponse> {
        let list = List {
            workspace_id: request.workspace_id.unwrap_or_default(),
            project_id: request.project_id,
            state: request.state,
            tags: request.tags,
            sticky: request.sticky,
            include_terminated: request.include_terminated,
            page_size: request.page_size,
            page_token: request.page_token,
            ..List::default()
        };
        let (sessions, next_page_token) = self.0.list(&self.0.caller(&context)?, list).await?;
        Response::ok(wire::ListProjectSandboxesResponse { sessions, next_page_token })
    }

    async fn update_session(
        &self,
        context: RequestContext,
        request: wire::UpdateSessionRequest,
    ) -> ServiceResult<wire::UpdateSessionResponse> {
        let session = self.0.update_session(&self.0.caller(&context)?, request).await?;
        Response::ok(wire::UpdateSessionResponse { session: session.into() })
    }

    async fn extend_session(
        &self,
        context: RequestContext,
        request: wire::ExtendSessionRequest,
    ) -> ServiceResult<wire::ExtendSessionResponse> {
        let session = self.0.extend_session(&self.0.caller(&context)?, request).await?;
        Response::ok(wire::ExtendSessionResponse { session: session.into() })
    }

    async fn terminate_session(
        &self,
        context: RequestContext,
        request: wire::TerminateSessionRequest,
    ) -> ServiceResult<wire::TerminateSessionResponse> {
        let session = self.0.terminate_session(&self.0.caller(&context)?, &request.session_id).await?;
        Response::ok(wire::TerminateSessionResponse { session: session.into() })
    }

    async fn terminate_sessions(
        &self,
        context: RequestContext,
        request: wire::TerminateSessionsRequest,
    ) -> ServiceResult<wire::TerminateSessionsResponse> {
        answer(self.0.terminate_sessions(&self.0.caller(&context)?, request).await)
    }

    async fn report_session_activity(
        &self,
        context: RequestContext,
        request: wire::ReportSessionActivityRequest,
    ) -> ServiceResult<wire::ReportSessionActivityResponse> {
        answer(self.0.report_session_activity(&self.0.caller(&context)?, &request.session_id).await)
    }

    async fn get_workspace_sandbox_usage(
        &self,
        context: RequestContext,
        request: wire::GetWorkspaceSandboxUsageRequest,
    ) -> ServiceResult<wire::GetWorkspaceSandboxUsageResponse> {
        answer(self.0.usage(&self.0.caller(&context)?, request).await)
    }

    async fn execute_command(
        &self,
        context: RequestContext,
        request: wire::ExecuteCommandRequest,
    ) -> ServiceResult<wire::ExecuteCommandResponse> {
        answer(self.0.execute_command(&self.0.caller(&context)?, request).await)
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

impl wire::SshGatewayClientService for SshGateways {}
