//! The façade for Tenki clients: `tenki.sandbox.v1` over gRPC, gRPC-Web and Connect.
//!
//! It translates and decides nothing: what is allowed, what exists and what happens is the
//! engine's. What it has of its own is the wire: who called, how large a message may be, which
//! frame may follow which. Rpcs that are not built yet answer `unimplemented` inside a normal
//! response, never an HTTP 404, which clients take for a route that is not ready.

mod auth;
mod control;
mod convert;
mod data;
mod dial;
mod direct;
mod egress;
mod facts;
mod files;
mod fork;
mod git;
mod observe;
mod ports;
mod previews;
pub(crate) mod reframe;
mod run;
mod services;
mod settings;
mod snapshots;
mod ssh;
pub(crate) mod transport;
mod tunnel;
mod volumes;
mod wait;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use connectrpc::{
    CompressionRegistry, ConnectError, ConnectRpcService, DeadlinePolicy, Dispatcher, MethodDescriptor, MethodKind,
    RequestContext,
};
use http::uri::Authority;
use http::{Request, Response, header};
use http_body_util::Full;
use hyper::body::Incoming;
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;
use nagaya_engine::model::{Session, SessionState};
use nagaya_engine::{Caller, Engine, EngineConfig};
use nagaya_gateway::ssh::SshServer;
use tower::Service as _;

use crate::config::Limits;
use crate::download::Downloads;
use crate::metrics::Metrics;
use crate::server::body::{self, ReadLimits, RequestBody, ResponseBody};
use crate::server::lifecycle::{Lifecycle, Phase};
use crate::server::routes::Origin;
pub(crate) use auth::COOKIE_NAMES;
use direct::Direct;
use observe::Observed;
use reframe::Reframed;
use transport::Outcome;

const CONTROL_PLANE: &str = "tenki.sandbox.v1.SandboxService";
const DATA_PLANE: &str = "tenki.sandbox.v1.SandboxSessionDataPlaneService";
const SSH_GATEWAYS: &str = "tenki.sandbox.v1.SSHGatewayClientService";
/// What is offered beyond the contract, to the same callers.
const OWN: &str = "nagaya.v1.NagayaService";

/// What the façade is made from.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) engine_config: EngineConfig,
    pub(crate) limits: Limits,
    pub(crate) public_url: Option<String>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) downloads: Arc<Downloads>,
    pub(crate) ssh: SshServer,
    /// Where SSH is spoken without the bridge.
    pub(crate) ssh_address: Option<SocketAddr>,
}

/// Admits requests, and hands them to the rpc layer.
pub(crate) struct Facade {
    tenki: Arc<Tenki>,
    service: ConnectRpcService<Observed<Direct>>,
    lifecycle: Arc<Lifecycle>,
    read_limits: ReadLimits,
    refused_body_drain: Duration,
}

/// What the rpcs share.
struct Tenki {
    engine: Engine,
    engine_config: EngineConfig,
    metrics: Arc<Metrics>,
    public_url: Option<String>,
    downloads: Arc<Downloads>,
    ssh: SshServer,
    ssh_address: Option<SocketAddr>,
    message_bytes_max: usize,
    stdin_window_bytes: u32,
    read_chunk_bytes: usize,
    create_hold: Duration,
    deadline_margin: Duration,
    lifecycle: Arc<Lifecycle>,
    tunnel_ping_interval: Duration,
    tunnel_ping_timeout: Duration,
}

/// What is known about a request before its message is read.
#[derive(Debug, Clone)]
struct Admitted {
    /// On the control plane only.
    caller: Option<Caller>,
    origin: Origin,
    /// The server as the client named it; from the URI over HTTP/2, else from the Host header.
    authority: Option<Authority>,
}

impl Facade {
    pub(crate) const SERVICES: [&str; 4] = [CONTROL_PLANE, DATA_PLANE, SSH_GATEWAYS, OWN];

    /// Whether this façade answers for the path, with whatever outcome.
    pub(crate) fn serves(path: &str) -> bool {
        path.strip_prefix('/')
            .and_then(|path| path.split_once('/'))
            .is_some_and(|(service, _)| Self::SERVICES.contains(&service))
    }

    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { engine, engine_config, limits, public_url, metrics, lifecycle, downloads, ssh, ssh_address } =
            parts;
        let tenki = Arc::new(Tenki {
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
        let dispatcher =
            Observed { inner: Direct::new(Arc::clone(&tenki)), metrics, lifecycle: Arc::clone(&lifecycle) };
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
            },
            refused_body_drain: Duration::from_millis(limits.refused_body_drain_ms),
        }
    }

    pub(crate) async fn call(&self, request: Request<Incoming>, origin: Origin) -> Response<ResponseBody> {
        let (mut parts, mut incoming) = request.into_parts();
        let path = parts.uri.path().strip_prefix('/').unwrap_or_default();
        let method = self.service.dispatcher().lookup(path);
        let busy = match method.and_then(|method| method.spec) {
            Some(spec) if observe::is_long(spec.method()) => None,
            _ => Some(self.lifecycle.enter()),
        };

        let outcome = Outcome::of(&parts);
        let admitted = match self.admit(path, method, &parts, origin) {
            Ok(admitted) => admitted,
            Err(error) => return outcome.tell(self.refuse(error, method, &parts, incoming)),
        };
        let streams =
            matches!(method.map(|method| method.kind), Some(MethodKind::ClientStreaming | MethodKind::BidiStreaming));
        let body = if streams && path == direct::WRITE_FILE_STREAM && is_plain_grpc(&parts.headers) {
            RequestBody::Reframed(Reframed::new(incoming, self.read_limits.message_bytes_max))
        } else if streams {
            RequestBody::Stream(incoming)
        } else {
            match body::read_whole(&mut incoming, &parts.headers, self.read_limits).await {
                Ok(message) => RequestBody::Whole(Full::new(message)),
                Err(error) => return outcome.tell(self.refuse(error, method, &parts, incoming)),
            }
        };
        parts.extensions.insert(admitted);
        match self.service.clone().call(Request::from_parts(parts, body)).await {
            Ok(response) => outcome.tell(response.map(|body| ResponseBody::rpc(body, busy))),
            Err(never) => match never {},
        }
    }

    /// Everything that can be said before the message is read, so that nobody without a key or a
    /// certificate makes the server take in large messages. That a certificate is for the session
    /// of the message is checked when that is known.
    fn admit(
        &self,
        path: &str,
        method: Option<MethodDescriptor>,
        parts: &http::request::Parts,
        origin: Origin,
    ) -> Result<Admitted, Error> {
        if self.lifecycle.phase() >= Phase::Draining {
            return Err(Code::Draining.into());
        }
        if method.is_none() {
            return Err(Error::new(Code::Unimplemented, "the service has no method of this name"));
        }
        Outcome::of(parts).check()?;
        let caller = if path.starts_with(DATA_PLANE) {
            self.tenki.engine.certified_session(auth::certificate(&parts.headers)?)?;
            None
        } else {
            Some(self.tenki.engine.authenticate(auth::token(&parts.headers)?)?)
        };
        Ok(Admitted { caller, origin, authority: parts.uri.authority().cloned() })
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

/// How far the way to a session's data plane is, as told in several answers.
struct Route {
    session: wire::SandboxSession,
    endpoint: String,
    credential: Option<wire::SessionCredential>,
    status: wire::DataPlaneRouteStatus,
}

impl Tenki {
    fn caller(&self, context: &RequestContext) -> Result<Caller, Error> {
        context
            .extensions()
            .get::<Admitted>()
            .and_then(|admitted| admitted.caller)
            .ok_or_else(|| Code::Unauthenticated.into())
    }

    /// Where the data plane is reached: here, under the name that the client itself uses.
    fn endpoint(&self, context: &RequestContext) -> String {
        if let Some(url) = &self.public_url {
            return url.clone();
        }
        let Some(admitted) = context.extensions().get::<Admitted>() else {
            return String::new();
        };
        let from_host = || context.header(header::HOST)?.to_str().ok()?.parse().ok();
        match admitted.authority.clone().or_else(from_host) {
            Some(authority) => format!("{}://{authority}", admitted.origin.scheme()),
            None => String::new(),
        }
    }

    /// A certificate is given with RUNNING, so that the client needs no second call.
    async fn route(&self, endpoint: String, caller: &Caller, session: Session) -> Route {
        let certified = match session.state {
            SessionState::Running => self.engine.certificate(caller, session.id).await.ok(),
            _ => None,
        };
        match certified {
            Some((certificate, session)) => Route {
                session: convert::session(session),
                endpoint,
                credential: Some(convert::credential(certificate)),
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
