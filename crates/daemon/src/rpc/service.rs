//! Admits requests, and hands them to the rpc layer.

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
use nagaya_api::ids::SessionId;
use nagaya_engine::Caller;
use tower::Service as _;

use crate::budget::{Budget, Held};
use crate::metrics::Metrics;
use crate::wire::body::{self, ReadLimits, RequestBody, ResponseBody};
use crate::wire::connection::{UrlScheme, Via};
use crate::wire::instrument::Instrumented;
use crate::wire::lifecycle::{Lifecycle, Phase};
use crate::wire::limits::Limits;
use crate::wire::measured::Measured;
use crate::wire::outcome::Outcome;
use crate::wire::rechunk::Rechunked;

pub(crate) use crate::wire::instrument::Streams;

/// What the server has one of, whichever façade is asked.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) budget: Arc<Budget>,
}

/// Who asks, as their credential says.
pub(crate) enum Asking {
    Caller(Caller),
    /// Somebody with the certificate of one session. That it is the session of the message is checked when that is known.
    Certified(SessionId),
}

/// What is known about a request before its message is read.
#[derive(Debug, Clone)]
pub(crate) struct Admitted {
    /// Not where a certificate was shown.
    caller: Option<Caller>,
    pub(crate) scheme: UrlScheme,
    /// The server as the client named it; from the URI over HTTP/2, else from the Host header.
    pub(crate) authority: Option<Authority>,
    /// Tells callers apart where they share memory.
    share: u8,
    /// Memory for the answer.
    held: Arc<Held>,
}

impl Admitted {
    fn of(context: &RequestContext) -> Result<&Self, Error> {
        context.extensions().get::<Self>().ok_or_else(|| Code::Unauthenticated.into())
    }
}

/// Who called, where rpcs are for callers.
pub(crate) fn caller(context: &RequestContext) -> Result<Caller, Error> {
    Admitted::of(context)?.caller.ok_or_else(|| Code::Unauthenticated.into())
}

/// Memory for the call's answer.
pub(crate) fn held(context: &RequestContext) -> Result<Arc<Held>, Error> {
    Ok(Arc::clone(&Admitted::of(context)?.held))
}

/// The services of one façade, behind everything that is the same for all calls.
pub(crate) struct RpcService<D> {
    service: ConnectRpcService<Instrumented<D>>,
    streams: Streams,
    shared: Shared,
    read_limits: ReadLimits,
    refused_body_drain: Duration,
}

/// The service that a path names, where it names one and its method.
pub(crate) fn service_of(path: &str) -> Option<&str> {
    path.strip_prefix('/')?.split_once('/').map(|(service, _)| service)
}

impl<D: Dispatcher> RpcService<D> {
    pub(crate) fn new(dispatcher: D, streams: Streams, shared: Shared) -> Self {
        let limits = &shared.limits;
        let idle_s = limits.request_body_idle_timeout_ms as f64 / 1_000.0;
        let dispatcher = Instrumented {
            inner: dispatcher,
            streams,
            metrics: Arc::clone(&shared.metrics),
            lifecycle: Arc::clone(&shared.lifecycle),
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
            service,
            streams,
            read_limits: ReadLimits {
                message_bytes_max: limits.message_bytes_max,
                idle_timeout: Duration::from_millis(limits.request_body_idle_timeout_ms),
                bytes_per_idle_timeout: (limits.message_bytes_per_s_min as f64 * idle_s) as usize,
            },
            refused_body_drain: Duration::from_millis(limits.refused_body_drain_ms),
            shared,
        }
    }

    /// `authenticate` is asked before the message is read.
    pub(crate) async fn answer(
        &self,
        request: Request<Incoming>,
        via: Via<'_>,
        authenticate: impl FnOnce(&http::request::Parts) -> Result<Asking, Error>,
    ) -> Response<ResponseBody> {
        let (mut parts, mut incoming) = request.into_parts();
        let path = parts.uri.path().strip_prefix('/').unwrap_or_default();
        let method = self.service.dispatcher().lookup(path);
        let busy = match method.and_then(|method| method.spec) {
            Some(spec) if self.streams.is_long(spec.method()) => None,
            _ => Some(self.shared.lifecycle.enter()),
        };

        let outcome = Outcome::of(&parts);
        let admitted = self.admit(method, &parts, via.scheme, authenticate);
        let admitted = match admitted.and_then(|admitted| via.open.admit().map(|()| admitted)) {
            Ok(admitted) => admitted,
            Err(error) => return outcome.tell(self.refuse(error, method, &parts, incoming)),
        };
        let answer_held = Arc::clone(&admitted.held);
        // Until the call has returned: by then its message is used up.
        let caller = admitted.share;
        let budget = &self.shared.budget;
        let request_held = budget.hold(caller);
        let streams =
            matches!(method.map(|method| method.kind), Some(MethodKind::ClientStreaming | MethodKind::BidiStreaming));
        let body = if streams && self.streams.rechunked.contains(&path) && is_plain_grpc(&parts.headers) {
            let reframed = Rechunked::new(incoming, self.read_limits.message_bytes_max);
            RequestBody::Rechunked(Measured::new(reframed, budget, caller))
        } else if streams && body::is_framed(&parts.headers) {
            RequestBody::Stream(Measured::new(incoming, budget, caller))
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
    /// certificate makes the server take in large messages.
    fn admit(
        &self,
        method: Option<MethodDescriptor>,
        parts: &http::request::Parts,
        scheme: UrlScheme,
        authenticate: impl FnOnce(&http::request::Parts) -> Result<Asking, Error>,
    ) -> Result<Admitted, Error> {
        if self.shared.lifecycle.phase() >= Phase::Draining {
            return Err(Code::Draining.into());
        }
        if method.is_none() {
            return Err(Error::new(Code::Unimplemented, "the service has no method of this name"));
        }
        Outcome::of(parts).check()?;
        let (caller, id) = match authenticate(parts)? {
            Asking::Caller(caller) => (Some(caller), *caller.workspace_id.as_uuid()),
            Asking::Certified(session) => (None, *session.as_uuid()),
        };
        // Ids end in what is random of them.
        let share = id.as_bytes()[15];
        Ok(Admitted {
            caller,
            scheme,
            authority: parts.uri.authority().cloned(),
            share,
            held: Arc::new(self.shared.budget.hold(share)),
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
        self.shared.metrics.call_ended(rpc, error.code.as_str());
        body::discard(rest, self.refused_body_drain);
        error.into_http_response(&parts.headers).map(|body| ResponseBody::rpc(body, None))
    }
}

/// Whether messages travel in binary form, each behind a length.
fn is_plain_grpc(headers: &http::HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/grpc" || kind == "application/grpc+proto")
}
