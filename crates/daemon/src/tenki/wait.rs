//! WaitSession: the session now, then every change, until it is RUNNING or has ended.

use std::sync::Arc;

use connectrpc::{RequestContext, Response, ServiceResult, ServiceStream};
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::Caller;
use nagaya_engine::model::{Session, SessionState};
use tokio::sync::watch;

use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::service::caller;
use crate::waiting::{self, Waited};

struct Waiting {
    tenki: Arc<TenkiService>,
    caller: Caller,
    endpoint: String,
    watched: watch::Receiver<Session>,
    sent: Option<Session>,
    /// Nothing more is sent.
    ended: bool,
}

impl TenkiService {
    pub(super) async fn wait_session(
        self: &Arc<Self>,
        context: &RequestContext,
        request: wire::WaitSessionRequest,
    ) -> ServiceResult<ServiceStream<wire::WaitSessionResponse>> {
        let caller = caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let watched = self.engine.watch_session(&caller, id).await?;
        let waiting = Waiting {
            tenki: Arc::clone(self),
            caller,
            endpoint: self.endpoint(context),
            watched,
            sent: None,
            ended: false,
        };
        Response::stream_ok(futures::stream::unfold(waiting, |mut waiting| async move {
            let message = waiting.next().await?;
            Some((message.map_err(Into::into), waiting))
        }))
    }
}

impl Waiting {
    async fn next(&mut self) -> Option<Result<wire::WaitSessionResponse, Error>> {
        if self.ended {
            return None;
        }
        let sent = self.sent.as_ref();
        let session = match waiting::until(&mut self.watched, |session| Some(session) != sent, None).await {
            Waited::Reached(session) => session,
            // There was no outcome yet.
            Waited::Late(_) | Waited::Draining(_) => {
                self.ended = true;
                return Some(Err(Code::Draining.into()));
            }
        };
        let route = self.tenki.route(self.endpoint.clone(), &self.caller, session.clone()).await;
        self.ended = matches!(session.state, SessionState::Running | SessionState::Terminated);
        self.sent = Some(session);
        Some(Ok(wire::WaitSessionResponse {
            session: route.session.into(),
            data_plane_endpoint: route.endpoint,
            credential: route.credential.into(),
            route_status: route.status.into(),
        }))
    }
}
