//! Destinations of sessions, and their connections to the outside.

use connectrpc::RequestContext;
use nagaya_api::error::Error;
use nagaya_api::nagaya::v1 as own;
use nagaya_engine::model::Connection;

use super::service::Nagaya;
use crate::rpc::convert;
use crate::rpc::parse;
use crate::rpc::service::caller;

impl Nagaya {
    pub(super) async fn update_session_egress(
        &self,
        context: &RequestContext,
        request: own::UpdateSessionEgressRequest,
    ) -> Result<own::UpdateSessionEgressResponse, Error> {
        let caller = caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let egress = request.egress.into_option().map(parse::egress);
        let session = self.engine.set_egress(&caller, id, egress).await?;
        Ok(own::UpdateSessionEgressResponse { session: convert::session(session).into() })
    }

    pub(super) async fn list_session_connections(
        &self,
        context: &RequestContext,
        request: own::ListSessionConnectionsRequest,
    ) -> Result<own::ListSessionConnectionsResponse, Error> {
        let caller = caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let connections = self.engine.connections(&caller, id).await?;
        Ok(own::ListSessionConnectionsResponse { connections: connections.into_iter().map(connection).collect() })
    }
}

fn connection(connection: Connection) -> own::SessionConnection {
    own::SessionConnection {
        started_at: convert::timestamp(connection.at).into(),
        destination: connection.destination,
        protocol: connection.protocol,
        name: connection.name,
        bytes_sent: i64::try_from(connection.bytes_sent).unwrap_or(i64::MAX),
        bytes_received: i64::try_from(connection.bytes_received).unwrap_or(i64::MAX),
        allowed: connection.denied.is_empty(),
        reason: connection.denied,
    }
}
