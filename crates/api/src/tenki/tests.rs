use std::sync::Arc;

use buffa::MessageField;
use connectrpc::{RequestContext, Response, Router, ServiceResult, ServiceStream};

use super::v1;
use crate::error::Code;

struct OneRpc;

impl v1::SandboxService for OneRpc {
    async fn get_session(
        &self,
        _context: RequestContext,
        request: v1::GetSessionRequest,
    ) -> ServiceResult<v1::GetSessionResponse> {
        if request.session_id.is_empty() {
            return Err(crate::error::Error::from(Code::SessionNotFound).into());
        }
        Response::ok(v1::GetSessionResponse {
            session: MessageField::some(v1::SandboxSession { id: request.session_id, state: v1::SessionState::Running.into(), ..Default::default() }),
            ..Default::default()
        })
    }
}

impl v1::SandboxSessionDataPlaneService for OneRpc {
    async fn run(
        &self,
        _context: RequestContext,
        requests: ServiceStream<v1::SandboxSessionDataPlaneServiceRunRequest>,
    ) -> ServiceResult<ServiceStream<v1::SandboxSessionDataPlaneServiceRunResponse>> {
        drop(requests);
        Ok(Response::stream(futures::stream::empty()))
    }
}

impl v1::SshGatewayClientService for OneRpc {}

fn router() -> Router {
    let router = v1::SandboxService::register(Arc::new(OneRpc), Router::new());
    let router = v1::SandboxSessionDataPlaneService::register(Arc::new(OneRpc), router);
    v1::SshGatewayClientService::register(Arc::new(OneRpc), router)
}

#[test]
fn every_rpc_has_a_route() {
    assert_eq!(router().methods().count(), 91);
    assert!(router().has_method("tenki.sandbox.v1.SandboxSessionDataPlaneService/WriteFileStream"));
}
