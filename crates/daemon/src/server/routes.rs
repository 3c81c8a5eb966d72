//! Which part of the server answers a request: by its host if it is a preview's, else by its path.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use hyper::body::Incoming;

use nagaya_api::error::{Code, Error};
use nagaya_engine::Engine;
use nagaya_gateway::preview::Proxy;
use nagaya_gateway::strict::Refusal;

use crate::download::Downloads;
use crate::facade::Facade;
use crate::metrics::Metrics;
use crate::wire::body::ResponseBody;
use crate::wire::connection::{Open, Via};
use crate::wire::lifecycle::{Lifecycle, Phase};

pub(crate) struct Routes {
    /// One for each family of clients.
    pub(crate) facades: Vec<Box<dyn Facade>>,
    pub(crate) downloads: Arc<Downloads>,
    pub(crate) previews: Arc<Proxy<Engine>>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) metrics: Arc<Metrics>,
}

impl Routes {
    pub(crate) async fn answer(&self, request: Request<Incoming>, via: Via<'_>) -> Response<ResponseBody> {
        if via.viewer.label.is_some() || self.previews.is_asked(&request) {
            let busy = self.lifecycle.enter();
            return self.previews.answer(request, via.viewer).await.map(|body| ResponseBody::preview(body, busy));
        }
        let path = request.uri().path();
        if let Some(facade) = self.facades.iter().find(|facade| facade.claims(path)) {
            return facade.call(request, via).await;
        }
        let readable = matches!(*request.method(), Method::GET | Method::HEAD);
        let mut response = match (request.uri().path(), readable) {
            ("/", true) => text(StatusCode::OK, "Nagaya: a sandbox server that speaks tenki.sandbox.v1.\n"),
            ("/healthz", true) => text(StatusCode::OK, "ok\n"),
            ("/readyz", true) => match self.lifecycle.phase() {
                Phase::Serving => text(StatusCode::OK, "ready\n"),
                Phase::Starting => text(StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
                Phase::Draining | Phase::Stopped => text(StatusCode::SERVICE_UNAVAILABLE, "shutting down\n"),
            },
            ("/metrics", true) => {
                let mut response = text(StatusCode::OK, self.metrics.encode());
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(Metrics::CONTENT_TYPE));
                response
            }
            (path, true) if Downloads::snapshot_of(path).is_some() => {
                return self.download(request.method(), request.uri(), via.open).await;
            }
            (path, false)
                if matches!(path, "/" | "/healthz" | "/readyz" | "/metrics")
                    || Downloads::snapshot_of(path).is_some() =>
            {
                let mut response =
                    json(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path is read with GET");
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
                response
            }
            _ => json(StatusCode::NOT_FOUND, "path_not_found", &self.nothing_here()),
        };
        if request.method() == Method::HEAD {
            *response.body_mut() = ResponseBody::text(Bytes::new());
        }
        response
    }

    fn nothing_here(&self) -> String {
        let services: Vec<&str> = self.facades.iter().flat_map(|facade| facade.services()).copied().collect();
        let mut offers = vec![format!("POST /SERVICE/METHOD with the services {}", services.join(", "))];
        offers.extend(self.facades.iter().flat_map(|facade| facade.paths()).map(|path| (*path).to_owned()));
        format!("nothing is served under this path; there are /healthz, /readyz, /metrics and {}", offers.join("; "))
    }

    async fn download(&self, method: &Method, uri: &Uri, open: &Open) -> Response<ResponseBody> {
        let answer = match self.lifecycle.phase() {
            Phase::Draining | Phase::Stopped => Err(Error::from(Code::Draining)),
            Phase::Starting | Phase::Serving => {
                self.downloads.answer(method, uri).await.and_then(|answer| open.admit().map(|()| answer))
            }
        };
        answer.unwrap_or_else(|error| {
            let status = StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            json(status, error.code.name(), &error.coded_text())
        })
    }
}

/// The answer to a request that could mean two things, or nothing.
pub(crate) fn refuse(refusal: &Refusal) -> Response<ResponseBody> {
    json(refusal.status, "invalid_argument", refusal.reason)
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<ResponseBody> {
    respond(status, "text/plain; charset=utf-8", text)
}

/// The shape of a Connect error, so that every client can show it.
fn json(status: StatusCode, code: &str, message: &str) -> Response<ResponseBody> {
    respond(status, "application/json", serde_json::json!({ "code": code, "message": message }).to_string())
}

fn respond(status: StatusCode, kind: &'static str, text: impl Into<Bytes>) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::text(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
