//! What the rpcs share, and who called.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::RequestContext;
use http::header;
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::model::{Session, SessionState};
use nagaya_engine::{Caller, Engine};
use nagaya_gateway::ssh::SshServer;

use super::messages;
use crate::download::Downloads;
use crate::metrics::Metrics;
use crate::rpc::convert;
use crate::rpc::service::Admitted;
use crate::wire::lifecycle::Lifecycle;

/// What the rpcs share.
pub(super) struct TenkiService {
    pub(super) engine: Engine,
    pub(super) metrics: Arc<Metrics>,
    pub(super) public_url: Option<String>,
    pub(super) downloads: Arc<Downloads>,
    pub(super) ssh: SshServer,
    pub(super) ssh_address: Option<SocketAddr>,
    pub(super) message_bytes_max: usize,
    pub(super) stdin_window_bytes: u32,
    pub(super) read_chunk_bytes: usize,
    pub(super) create_hold: Duration,
    pub(super) deadline_margin: Duration,
    pub(super) lifecycle: Arc<Lifecycle>,
    pub(super) tunnel_ping_interval: Duration,
    pub(super) tunnel_ping_timeout: Duration,
}

/// How far the way to a session's data plane is, as told in several answers.
pub(super) struct Route {
    pub(super) session: wire::SandboxSession,
    pub(super) endpoint: String,
    pub(super) credential: Option<wire::SessionCredential>,
    pub(super) status: wire::DataPlaneRouteStatus,
}

impl TenkiService {
    /// Where the data plane is reached: here, under the name that the client itself uses.
    pub(super) fn endpoint(&self, context: &RequestContext) -> String {
        if let Some(url) = &self.public_url {
            return url.clone();
        }
        let Some(admitted) = context.extensions().get::<Admitted>() else {
            return String::new();
        };
        let from_host = || context.header(header::HOST)?.to_str().ok()?.parse().ok();
        match admitted.authority.clone().or_else(from_host) {
            Some(authority) => format!("{}://{authority}", admitted.scheme.scheme()),
            None => String::new(),
        }
    }

    /// A certificate is given with RUNNING, so that the client needs no second call.
    pub(super) async fn route(&self, endpoint: String, caller: &Caller, session: Session) -> Route {
        let certified = match session.state {
            SessionState::Running => self.engine.certificate(caller, session.id).await.ok(),
            _ => None,
        };
        match certified {
            Some((certificate, session)) => Route {
                session: convert::session(session),
                endpoint,
                credential: Some(messages::credential(certificate)),
                status: wire::DataPlaneRouteStatus::Verified,
            },
            None => Route {
                status: if session.state.is_terminal() {
                    wire::DataPlaneRouteStatus::Failed
                } else {
                    wire::DataPlaneRouteStatus::NotReady
                },
                session: convert::session(session),
                endpoint,
                credential: None,
            },
        }
    }
}
