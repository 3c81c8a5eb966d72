//! What is offered beyond the contract: the package `nagaya.v1`, with the same callers and sessions.

use std::sync::Arc;

use connectrpc::{RequestContext, Response, ServiceResult, ServiceStream};
use nagaya_api::error::Error;
use nagaya_api::nagaya::v1 as own;
use nagaya_engine::Fork;

use super::parse::invalid;
use super::service::TenkiService;
use super::{convert, facts};

pub(super) struct Own(pub(super) Arc<TenkiService>);

impl own::NagayaService for Own {
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

impl TenkiService {
    async fn fork_session(
        &self,
        context: &RequestContext,
        request: own::ForkSessionRequest,
    ) -> Result<own::ForkSessionResponse, Error> {
        let caller = self.caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let count = u32::try_from(request.count).map_err(|_| invalid("count must not be negative"))?;
        let fork = Fork { count: count.max(1), name: request.name };
        let forks = self.engine.fork_session(&caller, id, fork).await?;
        // Together they may take as long as one creation may.
        let settled = forks.into_iter().map(|fork| self.settled(&caller, fork, Some(self.create_hold)));
        let forks = futures::future::try_join_all(settled).await?;
        Ok(own::ForkSessionResponse {
            sessions: forks.into_iter().map(convert::session).collect(),
            memory_carried: Some(false),
        })
    }
}
