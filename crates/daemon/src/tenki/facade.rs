//! Admits requests, and hands them to the rpc layer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{
    CompressionRegistry, ConnectError, ConnectRpcService, DeadlinePolicy, Dispatcher, MethodDescriptor, MethodKind,
};
use http::{Request, Response, header};
use http_body_util::Full;
use hyper::body::Incoming;
use nagaya_api::error::{Code, Error};
use nagaya_engine::{Engine, EngineConfig};
use nagaya_gateway::ssh::SshServer;
use tower::Service as _;

use super::service::{Admitted, TenkiService};
use super::zero_copy::ZeroCopyDispatcher;
use super::{auth, ssh, zero_copy};
use crate::budget::Budget;
use crate::config::Limits;
use crate::download::Downloads;
use crate::facade::{Answer, Facade};
use crate::metrics::Metrics;
use crate::wire::body::{self, ReadLimits, RequestBody, ResponseBody};
use crate::wire::connection::{UrlScheme, Via};
use crate::wire::instrument::{self, Instrumented};
use crate::wire::lifecycle::{Lifecycle, Phase};
use crate::wire::measured::Measured;
use crate::wire::outcome::Outcome;
use crate::wire::rechunk::Rechunked;

const CONTROL_PLANE: &str = "tenki.sandbox.v1.SandboxService";
const DATA_PLANE: &str = "tenki.sandbox.v1.SandboxSessionDataPlaneService";
const SSH_GATEWAYS: &str = "tenki.sandbox.v1.SSHGatewayClientService";
/// What is offered beyond the contract, to the same callers.
const OWN: &str = "nagaya.v1.NagayaService";

/// What the façade is made from.
pub(crate) struct Dependencies {
    pub(crate) engine: Engine,
    pub(crate) engine_config: EngineConfig,
    pub(crate) limits: Limits,
    pub(crate) public_url: Option<String>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) downloads: Arc<Downloads>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) ssh: SshServer,
    /// Where SSH is spoken without the bridge.
    pub(crate) ssh_address: Option<SocketAddr>,
}

/// Admits requests, and hands them to the rpc layer.
pub(crate) struct TenkiFacade {
    tenki: Arc<TenkiService>,
    service: ConnectRpcService<Instrumented<ZeroCopyDispatcher>>,
    lifecycle: Arc<Lifecycle>,
    read_limits: ReadLimits,
    refused_body_drain: Duration,
    budget: Arc<Budget>,
}

impl Facade for TenkiFacade {
    fn claims(&self, path: &str) -> bool {
        Self::serves(path) || ssh::bridge_to(path).is_some()
    }

    fn call<'a>(&'a self, request: Request<Incoming>, via: Via<'a>) -> Answer<'a> {
        match ssh::bridge_to(request.uri().path()) {
            Some(_) => Box::pin(ssh::bridge(&self.tenki, request, via)),
            None => Box::pin(self.answer(request, via)),
        }
    }

    fn offers(&self) -> String {
        format!("POST /SERVICE/METHOD with the services {}", Self::SERVICES.join(", "))
    }
}

impl TenkiFacade {
    const SERVICES: [&str; 4] = [CONTROL_PLANE, DATA_PLANE, SSH_GATEWAYS, OWN];

    fn serves(path: &str) -> bool {
        path.strip_prefix('/')
            .and_then(|path| path.split_once('/'))
            .is_some_and(|(service, _)| Self::SERVICES.contains(&service))
    }

    pub(crate) fn new(dependencies: Dependencies) -> Self {
        let Dependencies {
            engine,
            engine_config,
            limits,
            public_url,
            metrics,
            lifecycle,
            downloads,
            budget,
            ssh,
            ssh_address,
        } = dependencies;
        let idle_s = limits.request_body_idle_timeout_ms as f64 / 1_000.0;
        let tenki = Arc::new(TenkiService {
            engine,
            engine_config,
            metrics: Arc::clone(&metrics),
            public_url,
            downloads,
            ssh,
            ssh_address,
            message_bytes_max: limits.message_bytes_max,
            stdin_window_bytes: limits.stdin_window_bytes,
            read_chunk_bytes: limits.read_chunk_bytes as usize,
            create_hold: Duration::from_millis(limits.create_hold_ms),
            deadline_margin: Duration::from_millis(limits.deadline_margin_ms),
            lifecycle: Arc::clone(&lifecycle),
            tunnel_ping_interval: Duration::from_millis(limits.keep_alive_interval_ms),
            tunnel_ping_timeout: Duration::from_millis(limits.keep_alive_timeout_ms),
        });
        let dispatcher = Instrumented {
            inner: ZeroCopyDispatcher::new(Arc::clone(&tenki)),
            metrics,
            lifecycle: Arc::clone(&lifecycle),
        };
        let service = ConnectRpcService::new(dispatcher)
            .with_limits(
                connectrpc::Limits::default()
                    // Room for what stands in front of the message on the wire.
                    .with_max_request_body_size(limits.message_bytes_max + 64)
                    .with_max_message_size(limits.message_bytes_max),
            )
            // Clients on the same host or network gain nothing from compressed answers, and files
            // would move several times slower. Compressed requests are still understood.
            .with_compression(CompressionRegistry::default())
            .with_compression_policy(connectrpc::CompressionPolicy::disabled())
            // A deadline is only ever the client's own, but then it also ends streams.
            .with_deadline_policy(DeadlinePolicy::new().with_enforce_on_streams(true));
        Self {
            tenki,
            service,
            lifecycle,
            read_limits: ReadLimits {
                message_bytes_max: limits.message_bytes_max,
                idle_timeout: Duration::from_millis(limits.request_body_idle_timeout_ms),
                bytes_per_idle_timeout: (limits.message_bytes_per_s_min as f64 * idle_s) as usize,
            },
            refused_body_drain: Duration::from_millis(limits.refused_body_drain_ms),
            budget,
        }
    }

    async fn answer(&self, request: Request<Incoming>, via: Via<'_>) -> Response<ResponseBody> {
        let (mut parts, mut incoming) = request.into_parts();
        let path = parts.uri.path().strip_prefix('/').unwrap_or_default();
        let method = self.service.dispatcher().lookup(path);
        let busy = match method.and_then(|method| method.spec) {
            Some(spec) if instrument::is_long(spec.method()) => None,
            _ => Some(self.lifecycle.enter()),
        };

        let outcome = Outcome::of(&parts);
        let admitted = self.admit(path, method, &parts, via.scheme);
        let admitted = match admitted.and_then(|admitted| via.open.admit().map(|()| admitted)) {
            Ok(admitted) => admitted,
            Err(error) => return outcome.tell(self.refuse(error, method, &parts, incoming)),
        };
        let answer_held = Arc::clone(&admitted.held);
        // Until the call has returned: by then its message is used up.
        let caller = admitted.share;
        let request_held = self.budget.hold(caller);
        let streams =
            matches!(method.map(|method| method.kind), Some(MethodKind::ClientStreaming | MethodKind::BidiStreaming));
        let body = if streams && path == zero_copy::WRITE_FILE_STREAM && is_plain_grpc(&parts.headers) {
            let reframed = Rechunked::new(incoming, self.read_limits.message_bytes_max);
            RequestBody::Rechunked(Measured::new(reframed, &self.budget, caller))
        } else if streams && body::is_framed(&parts.headers) {
            RequestBody::Stream(Measured::new(incoming, &self.budget, caller))
        } else if streams {
            RequestBody::Text(incoming)
        } else {
            match body::read_whole(&mut incoming, &parts.headers, self.read_limits, &request_held).await {
                Ok(message) => RequestBody::Whole(Full::new(message)),
                Err(error) => return outcome.tell(self.refuse(error, method, &parts, incoming)),
            }
        };
        parts.extensions.insert(admitted);
        // The form of a refusal follows that of the request.
        let kind = parts.headers.get(header::CONTENT_TYPE).map(|kind| (header::CONTENT_TYPE, kind.clone()));
        let (head, body) = match self.service.clone().call(Request::from_parts(parts, body)).await {
            Ok(response) => response.into_parts(),
            Err(never) => match never {},
        };
        drop(request_held);
        outcome.tell(match ResponseBody::whole(body, busy, answer_held, self.read_limits).await {
            Ok(body) => Response::from_parts(head, body),
            Err(error) => ConnectError::from(error)
                .into_http_response(&kind.into_iter().collect())
                .map(|body| ResponseBody::rpc(body, None)),
        })
    }

    /// Everything that can be said before the message is read, so that nobody without a key or a
    /// certificate makes the server take in large messages. That a certificate is for the session
    /// of the message is checked when that is known.
    fn admit(
        &self,
        path: &str,
        method: Option<MethodDescriptor>,
        parts: &http::request::Parts,
        scheme: UrlScheme,
    ) -> Result<Admitted, Error> {
        if self.lifecycle.phase() >= Phase::Draining {
            return Err(Code::Draining.into());
        }
        if method.is_none() {
            return Err(Error::new(Code::Unimplemented, "the service has no method of this name"));
        }
        Outcome::of(parts).check()?;
        let (caller, id) = if path.starts_with(DATA_PLANE) {
            let session = self.tenki.engine.certified_session(auth::certificate(&parts.headers)?)?;
            (None, *session.as_uuid())
        } else {
            let caller = self.tenki.engine.authenticate(auth::token(&parts.headers)?)?;
            (Some(caller), *caller.workspace_id.as_uuid())
        };
        // Ids end in what is random of them.
        let share = id.as_bytes()[15];
        Ok(Admitted {
            caller,
            scheme,
            authority: parts.uri.authority().cloned(),
            share,
            held: Arc::new(self.budget.hold(share)),
        })
    }

    fn refuse(
        &self,
        error: Error,
        method: Option<MethodDescriptor>,
        parts: &http::request::Parts,
        rest: Incoming,
    ) -> Response<ResponseBody> {
        let error = ConnectError::from(error);
        let rpc = method.and_then(|method| method.spec).map_or("unknown", |spec| spec.method());
        self.tenki.metrics.call_ended(rpc, error.code.as_str());
        body::discard(rest, self.refused_body_drain);
        error.into_http_response(&parts.headers).map(|body| ResponseBody::rpc(body, None))
    }
}

/// Whether messages travel in binary form, each behind a length.
fn is_plain_grpc(headers: &http::HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/grpc" || kind == "application/grpc+proto")
}
