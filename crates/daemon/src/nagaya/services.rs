//! The generated service trait, answered. One line of translation each; the rest is elsewhere.

use std::sync::Arc;

use connectrpc::{RequestContext, Response, Router, ServiceResult, ServiceStream};
use nagaya_api::nagaya::v1 as own;

use super::facts;
use super::service::Nagaya;

/// A router that knows all rpcs.
pub(super) fn router(nagaya: &Arc<Nagaya>) -> Router {
    own::NagayaService::register(Arc::new(Rpcs(Arc::clone(nagaya))), Router::new())
}

struct Rpcs(Arc<Nagaya>);

impl own::NagayaService for Rpcs {
    async fn fork_session(
        &self,
        context: RequestContext,
        request: own::ForkSessionRequest,
    ) -> ServiceResult<own::ForkSessionResponse> {
        Ok(Response::new(self.0.fork_session(&context, request).await?))
    }

    async fn update_session_egress(
        &self,
        context: RequestContext,
        request: own::UpdateSessionEgressRequest,
    ) -> ServiceResult<own::UpdateSessionEgressResponse> {
        Ok(Response::new(self.0.update_session_egress(&context, request).await?))
    }

    async fn list_session_connections(
        &self,
        context: RequestContext,
        request: own::ListSessionConnectionsRequest,
    ) -> ServiceResult<own::ListSessionConnectionsResponse> {
        Ok(Response::new(self.0.list_session_connections(&context, request).await?))
    }

    async fn list_session_events(
        &self,
        context: RequestContext,
        request: own::ListSessionEventsRequest,
    ) -> ServiceResult<own::ListSessionEventsResponse> {
        Ok(Response::new(self.0.list_session_events(&context, request).await?))
    }

    async fn watch_session_events(
        &self,
        context: RequestContext,
        request: own::WatchSessionEventsRequest,
    ) -> ServiceResult<ServiceStream<own::WatchSessionEventsResponse>> {
        facts::watch_session_events(&self.0, &context, request).await
    }

    async fn explain_session(
        &self,
        context: RequestContext,
        request: own::ExplainSessionRequest,
    ) -> ServiceResult<own::ExplainSessionResponse> {
        Ok(Response::new(self.0.explain_session(&context, request).await?))
    }
}
