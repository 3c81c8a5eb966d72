//! Requests to previews, on their way to services in sandboxes and back.
//!
//! ```text
//! viewer ── HTTP/1.1, HTTP/2 ──▶ Proxy ── enter ──▶ engine: which sandbox, which port, may they, is it awake
//!                                  │
//!                                  └── HTTP/1.1 over Guest::connect, kept open ──▶ service in the sandbox
//! ```
//!
//! Bodies stream both ways and are never held; what follows a 101 is carried as bytes. Nothing here decides who may
//! look at what, or listens on an address: the daemon hands requests in.

mod body;
mod connection;
mod exchange;
mod headers;
mod host;
mod ingress;
mod page;
mod pool;
mod token;
mod upgrade;

use std::borrow::Cow;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use nagaya_api::error::{Code, Error};
use nagaya_engine::Engine;
use nagaya_engine::ports::Guest;
use tokio::sync::watch;

pub use body::ResponseBody;
use host::{Below, Host};
pub use ingress::{Arrival, DomainIngress, LoopbackIngress};
use page::ErrorFormat;
use pool::{Lease, Services};
pub use token::PARAMETER as VIEWER_TOKEN_PARAMETER;
use token::Shown;
use upgrade::Upgrade;

use crate::config::PreviewsConfig;
use crate::traffic::Traffic;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// How long the body of a refused request is read and thrown away, so that its sender gets to see the answer.
const REFUSED_BODY_DRAIN: Duration = Duration::from_secs(5);

/// Who decides where a preview leads.
pub trait PreviewResolver: Send + Sync + 'static {
    /// The service behind a label, awake. `token` is the viewer's, if one was shown.
    fn enter(&self, label: &str, token: Option<&str>) -> impl Future<Output = Result<Visit, Error>> + Send;
}

/// A way to a service that is open for one request.
pub struct Visit {
    /// Another one after every start of the sandbox.
    pub guest: Arc<dyn Guest>,
    /// Of the sandbox's loopback.
    pub port: u16,
    /// Kept while the request lasts.
    pub hold: Box<dyn Send + Sync>,
}

impl PreviewResolver for Engine {
    async fn enter(&self, label: &str, token: Option<&str>) -> Result<Visit, Error> {
        let visit = self.enter_preview(label, token).await?;
        Ok(Visit { guest: Arc::clone(&visit.guest), port: visit.port, hold: Box::new(visit) })
    }
}

/// A connection that requests come on.
pub trait Connection: Send + Sync {
    /// Told with each request that may see its preview. False: there is no place for its viewer.
    fn admit(&self) -> bool;
}

/// Who sends requests on a connection.
pub struct Viewer {
    /// The preview whose own loopback port it came to; `None` when the request's host tells.
    pub label: Option<Arc<str>>,
    pub peer: IpAddr,
    /// The viewer sees `https://`.
    pub secure: bool,
    /// Kept while the connection lasts, also by what is spoken on it after HTTP.
    pub connection: Arc<dyn Connection>,
    /// What services hear of it.
    claims: headers::Claims,
}

impl Viewer {
    pub fn new(label: Option<Arc<str>>, peer: IpAddr, secure: bool, connection: Arc<dyn Connection>) -> Self {
        Self { label, peer, secure, connection, claims: headers::Claims::of(peer, secure) }
    }
}

/// The proxy. One for the whole server.
pub struct Proxy<E> {
    entrance: Arc<E>,
    /// Below which previews have their names, lower case.
    domain: Option<String>,
    config: PreviewsConfig,
    /// Names of cookies that open the server itself. Services neither see nor set them.
    own_cookies: &'static [&'static str],
    services: Arc<Services>,
    answers: Answers,
    stopping: watch::Sender<bool>,
}

/// How many requests were answered, by whom.
#[derive(Debug, Default)]
pub struct Answers {
    service: AtomicU64,
    own: AtomicU64,
}

impl Answers {
    /// By services in sandboxes.
    pub fn of_services(&self) -> u64 {
        self.service.load(Ordering::Relaxed)
    }

    /// By the proxy itself: refusals, and what a browser is told to do about its token.
    pub fn of_its_own(&self) -> u64 {
        self.own.load(Ordering::Relaxed)
    }
}

impl<E: PreviewResolver> Proxy<E> {
    /// Needs a Tokio runtime.
    pub fn start(
        entrance: Arc<E>,
        domain: Option<&str>,
        config: PreviewsConfig,
        own_cookies: &'static [&'static str],
    ) -> Arc<Self> {
        Arc::new(Self {
            entrance,
            domain: domain.map(str::to_ascii_lowercase),
            services: Services::start(config.idle_timeout()),
            config,
            own_cookies,
            answers: Answers::default(),
            stopping: watch::Sender::new(false),
        })
    }

    /// What passes between the proxy and services.
    pub fn traffic(&self) -> &Arc<Traffic> {
        self.services.traffic()
    }

    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// Ends what has no end of its own: tunnels and streams of events.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Whether a request to the server's own listener is one to a preview.
    pub fn is_asked(&self, request: &Request<Incoming>) -> bool {
        let Some(domain) = &self.domain else { return false };
        let authority = match request.uri().authority() {
            Some(authority) => authority.as_str().as_bytes(),
            None => request.headers().get(header::HOST).map_or(&[][..], HeaderValue::as_bytes),
        };
        // Whatever may be meant for a preview is refused there if it is not well-formed.
        let text = authority.to_ascii_lowercase();
        let name = text.split(|byte| *byte == b':').next().unwrap_or_default();
        let name = name.strip_suffix(b".").unwrap_or(name);
        name.strip_suffix(domain.as_bytes()).is_some_and(|front| front.is_empty() || front.ends_with(b"."))
    }

    /// Answers a request to a preview. Never fails: what goes wrong is told to the viewer.
    pub async fn answer(&self, request: Request<Incoming>, viewer: &Viewer) -> Response<ResponseBody> {
        let (parts, body) = request.into_parts();
        let asker = ErrorFormat::of(&parts);
        let expects_continue = exchange::expects_continue(&parts.headers);
        let mut body = Some(body);
        match self.relay(parts, &mut body, asker, viewer).await {
            Ok(response) => response,
            Err(error) => {
                self.answers.own.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%error, "a request to a preview was refused");
                // Who asks first whether to send a body does not send it now.
                if let (Some(body), false) = (body, expects_continue) {
                    discard(body);
                }
                asker.error(&error).map(ResponseBody::own)
            }
        }
    }

    async fn relay(
        &self,
        mut parts: Parts,
        body: &mut Option<Incoming>,
        asker: ErrorFormat,
        viewer: &Viewer,
    ) -> Result<Response<ResponseBody>, Error> {
        let (host, label) = self.target(&parts, viewer)?;
        let shown = token::take(&mut parts, &label, self.own_cookies);
        let visit = self.entrance.enter(&label, shown.as_ref().map(|shown| shown.token.as_str())).await?;
        if !viewer.connection.admit() {
            return Err(Error::new(Code::CapacityUnavailable, "previews.connections_max is reached"));
        }
        let learned = match shown {
            Some(Shown { token, in_url: true }) => token::cookie(&label, &token, viewer.secure),
            _ => None,
        };
        if let Some(cookie) = &learned
            && asker.is_browser()
            && parts.method == Method::GET
        {
            self.answers.own.fetch_add(1, Ordering::Relaxed);
            return Ok(to_same_place(&parts.uri, cookie));
        }
        let upgrade = Upgrade::of(&mut parts)?;
        headers::to_service(&mut parts, &host, &viewer.claims, upgrade.as_ref().map(|upgrade| &upgrade.protocol));
        parts.uri = origin_form(parts.uri);
        parts.version = Version::HTTP_11;
        parts.extensions = http::Extensions::new();

        let entered = self.services.enter(&label, visit, &self.config)?;
        let body = body.take().expect("the body is taken here only");
        let head = parts.method == Method::HEAD;
        let (mut response, lease) = exchange::exchange(entered, parts, body, &self.config).await?;
        let no_body = head || matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        headers::one_length(response.headers_mut(), no_body).map_err(|why| Error::new(Code::ServiceBroken, why))?;
        let mut response = self.hand_back(response, lease, upgrade, viewer)?;
        token::strip_set_cookies(response.headers_mut(), self.own_cookies);
        if let Some(cookie) = learned {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
        self.answers.service.fetch_add(1, Ordering::Relaxed);
        Ok(response)
    }

    /// Which preview a request is for. Anything could be meant by a request without a proper host, so it is refused.
    fn target<'v>(&self, parts: &Parts, viewer: &'v Viewer) -> Result<(Host, Cow<'v, str>), Error> {
        let host = Host::of(parts)
            .ok_or_else(|| Error::new(Code::InvalidArgument, "a request must name exactly one valid host"))?;
        if let Some(label) = &viewer.label {
            return match host.is_loopback() {
                true => Ok((host, Cow::Borrowed(&**label))),
                false => Err(Error::new(Code::HostRefused, "this port is for localhost, 127.0.0.1 and [::1]")),
            };
        }
        let domain = self.domain.as_ref().ok_or(Code::HostRefused)?;
        match host::below(domain, &host.name()) {
            Some(Below::Label(label)) => Ok((host, Cow::Owned(label))),
            Some(Below::Nothing) => Err(Code::PreviewNotFound.into()),
            None => Err(Code::HostRefused.into()),
        }
    }

    /// Turns a service's answer into the viewer's.
    fn hand_back(
        &self,
        mut response: Response<Incoming>,
        lease: Lease,
        upgrade: Option<Upgrade>,
        viewer: &Viewer,
    ) -> Result<Response<ResponseBody>, Error> {
        let switches = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let on_service = switches.then(|| hyper::upgrade::on(&mut response));
        let (mut parts, incoming) = response.into_parts();
        parts.extensions = http::Extensions::new();
        parts.version = Version::HTTP_11;
        let Some(on_service) = on_service else {
            // To such a request any success would say that the tunnel is there.
            if parts.status.is_success() && upgrade.is_some_and(|upgrade| upgrade.extended_connect) {
                return Err(Error::new(
                    Code::ServiceBroken,
                    "it does not speak the protocol that the viewer asked for",
                ));
            }
            headers::to_viewer(&mut parts.headers, None);
            let stopping = is_event_stream(&parts.headers).then(|| self.stopping());
            return Ok(Response::from_parts(parts, ResponseBody::service(incoming, lease, stopping)));
        };
        let Some(upgrade) = upgrade else {
            return Err(Error::new(Code::ServiceBroken, "it switched to a protocol that nobody asked for"));
        };
        let protocol = parts.headers.get(header::UPGRADE).cloned().unwrap_or_else(|| upgrade.protocol.clone());
        headers::to_viewer(&mut parts.headers, Some(protocol));
        upgrade.accept(&mut parts.status, &mut parts.headers);
        let connection = Arc::clone(&viewer.connection);
        upgrade.run(on_service, (lease.into_entered(), connection), self.stopping());
        Ok(Response::from_parts(parts, ResponseBody::own(Full::default())))
    }

    fn stopping(&self) -> BoxFuture<()> {
        let mut stopping = self.stopping.subscribe();
        Box::pin(async move {
            // An error means that the proxy itself is gone.
            let _ = stopping.wait_for(|stopping| *stopping).await;
        })
    }
}

/// Has the browser open the same URL without the token, so that it stays out of histories and referrers.
fn to_same_place(uri: &Uri, cookie: &HeaderValue) -> Response<ResponseBody> {
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    // Two slashes at its beginning would lead to another host.
    let path = format!("/{}", path.trim_start_matches(['/', '\\']));
    let mut response = Response::new(ResponseBody::own(Full::default()));
    *response.status_mut() = StatusCode::SEE_OTHER;
    let headers = response.headers_mut();
    headers.insert(header::SET_COOKIE, cookie.clone());
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::LOCATION, HeaderValue::try_from(path).unwrap_or_else(|_| HeaderValue::from_static("/")));
    response
}

/// A target as servers expect it: path and query, or the asterisk of OPTIONS.
fn origin_form(uri: Uri) -> Uri {
    uri.into_parts().path_and_query.map_or_else(|| Uri::from_static("/"), Uri::from)
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}

fn discard(mut body: Incoming) {
    if body.is_end_stream() {
        return;
    }
    tokio::spawn(tokio::time::timeout(
        REFUSED_BODY_DRAIN,
        async move { while let Some(Ok(_)) = body.frame().await {} },
    ));
}
