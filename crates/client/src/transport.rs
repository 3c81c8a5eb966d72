//! HTTP/2 to servers: one connection per origin, shared by everything that a client does.

use std::error::Error as _;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use connectrpc::client::{BoxFuture, ClientBody, ClientTransport};
use http::{Request, Response, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::{Client, Error as HttpError};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use crate::{Error, Result};

/// A connection that is silent for so long is asked whether it still lives,
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// and given up when it does not answer.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Http = Client<InTime<HttpsConnector<HttpConnector>>, ClientBody>;

/// Makes connections as one set of options says.
pub(crate) struct Connections {
    root_certificates: Option<Vec<u8>>,
    connect_timeout: Duration,
    plain: Transport,
    /// Made when the first `https` origin is met: reading the system's certificates takes milliseconds.
    secure: OnceLock<(Transport, Arc<ClientConfig>)>,
}

impl Connections {
    pub(crate) fn new(root_certificates: Option<Vec<u8>>, connect_timeout: Duration) -> Result<Self> {
        let plain = Transport::new(tls(RootCertStore::empty())?, connect_timeout);
        Ok(Self { root_certificates, connect_timeout, plain, secure: OnceLock::new() })
    }

    pub(crate) fn to(&self, origin: &Uri) -> Result<Transport> {
        match origin.scheme_str() {
            Some("https") => Ok(self.secure()?.0.clone()),
            _ => Ok(self.plain.clone()),
        }
    }

    /// For connections that are not HTTP/2.
    pub(crate) fn tls(&self) -> Result<Arc<ClientConfig>> {
        Ok(Arc::clone(&self.secure()?.1))
    }

    fn secure(&self) -> Result<&(Transport, Arc<ClientConfig>)> {
        if let Some(made) = self.secure.get() {
            return Ok(made);
        }
        let roots = match &self.root_certificates {
            Some(pem) => given_roots(pem)?,
            None => system_roots()?,
        };
        let config = tls(roots)?;
        let made = (Transport::new(config.clone(), self.connect_timeout), Arc::new(config));
        Ok(self.secure.get_or_init(|| made))
    }
}

fn tls(roots: RootCertStore) -> Result<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Error::InvalidOptions(format!("TLS: {error}")))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

fn given_roots(pem: &[u8]) -> Result<RootCertStore> {
    let invalid = |why: String| Error::InvalidOptions(format!("root_certificates: {why}"));
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| invalid(error.to_string()))?;
        roots.add(certificate).map_err(|error| invalid(error.to_string()))?;
    }
    match roots.is_empty() {
        true => Err(invalid("there is no certificate in them".into())),
        false => Ok(roots),
    }
}

fn system_roots() -> Result<RootCertStore> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map(|error| format!(" ({error})")).unwrap_or_default();
        return Err(Error::InvalidOptions(format!(
            "the system trusts no certificate{why}: install its CA certificates, or set root_certificates"
        )));
    }
    Ok(roots)
}

/// What calls go through. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Transport {
    http: Http,
}

impl Transport {
    fn new(tls: ClientConfig, connect_timeout: Duration) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http2();
        let http = Client::builder(TokioExecutor::new())
            .http2_only(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .http2_keep_alive_timeout(PING_TIMEOUT)
            .timer(TokioTimer::new())
            .build(InTime { connector: connector.wrap_connector(tcp), limit: connect_timeout });
        Self { http }
    }
}

impl ClientTransport for Transport {
    type ResponseBody = hyper::body::Incoming;
    type Error = TransportError;

    fn send(
        &self,
        request: Request<ClientBody>,
    ) -> BoxFuture<'static, Result<Response<Self::ResponseBody>, Self::Error>> {
        let origin = origin_text(request.uri());
        let sent = self.http.request(request);
        Box::pin(async move { sent.await.map_err(|error| TransportError::new(origin, &error)) })
    }
}

/// Makes connections, names and TLS handshakes included, within a limit.
#[derive(Clone)]
struct InTime<C> {
    connector: C,
    limit: Duration,
}

impl<C> tower_service::Service<Uri> for InTime<C>
where
    C: tower_service::Service<Uri, Error = BoxError>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, std::result::Result<C::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<std::result::Result<(), BoxError>> {
        self.connector.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.connector.call(uri);
        let limit = self.limit;
        Box::pin(async move {
            let timed_out = |_| BoxError::from(format!("it was not made within {} s", limit.as_secs_f64()));
            tokio::time::timeout(limit, connecting).await.map_err(timed_out)?
        })
    }
}

fn origin_text(uri: &Uri) -> String {
    format!("{}://{}", uri.scheme_str().unwrap_or("http"), uri.authority().map_or("", |authority| authority.as_str()))
}

/// A call that did not get an answer.
#[derive(Debug, Clone)]
pub(crate) struct TransportError {
    origin: String,
    why: String,
    /// Whether no connection could be made.
    pub(crate) unconnected: bool,
    /// Whether the server said that it did not begin with the call.
    pub(crate) refused: bool,
}

impl TransportError {
    fn new(origin: String, error: &HttpError) -> Self {
        let mut why = error.to_string();
        let mut refused = false;
        let mut cause = error.source();
        while let Some(each) = cause {
            why = each.to_string();
            if let Some(frame) = each.downcast_ref::<h2::Error>() {
                let reason = frame.reason();
                refused |= reason == Some(h2::Reason::REFUSED_STREAM)
                    || frame.is_go_away() && reason == Some(h2::Reason::NO_ERROR);
            }
            cause = each.source();
        }
        Self { origin, why, unconnected: error.is_connect(), refused }
    }
}

impl fmt::Display for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unconnected {
            true => write!(f, "no connection to {}: {}", self.origin, self.why),
            false => write!(f, "the connection to {} broke: {}", self.origin, self.why),
        }
    }
}

impl std::error::Error for TransportError {}
