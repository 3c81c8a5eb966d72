//! Sandboxes from the disk of another one.

use connectrpc::RequestContext;
use nagaya_api::error::Error;
use nagaya_api::nagaya::v1 as own;
use nagaya_engine::Fork;

use super::service::Nagaya;
use crate::rpc::convert;
use crate::rpc::parse::invalid;
use crate::rpc::service::caller;
use crate::waiting;

impl Nagaya {
    pub(super) async fn fork_session(
        &self,
        context: &RequestContext,
        request: own::ForkSessionRequest,
    ) -> Result<own::ForkSessionResponse, Error> {
        let caller = caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let count = u32::try_from(request.count).map_err(|_| invalid("count must not be negative"))?;
        let fork = Fork { count: count.max(1), name: request.name };
        let forks = self.engine.fork_session(&caller, id, fork).await?;
        // Together they may take as long as one creation may.
        let created = forks.iter().map(|fork| waiting::created(&self.engine, &caller, fork.id, Some(self.create_hold)));
        let forks = futures::future::try_join_all(created).await?;
        Ok(own::ForkSessionResponse {
            sessions: forks.into_iter().map(convert::session).collect(),
            memory_carried: Some(false),
        })
    }
}
