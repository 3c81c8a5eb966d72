//! One request over one connection: who is connected to, how long it may take, and what is never sent.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, HeaderMap, HeaderValue, USER_AGENT};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::address::is_inner;
use crate::config::Config;
use crate::error::ImageError;

/// Of an answer's head, in bytes and in fields.
const HEAD_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 100;
/// Of one host, that are tried.
const ADDRESSES_MAX: usize = 8;
const URL_BYTES_MAX: usize = 16 << 10;

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub https: bool,
    /// As in a URL: an address of version 6 is in brackets.
    pub host: String,
    pub port: u16,
    pub path: String,
}

impl Target {
    pub fn parse(url: &str) -> Result<Self, String> {
        if url.len() > URL_BYTES_MAX {
            return Err(format!("it has more than {URL_BYTES_MAX} bytes"));
        }
        let uri: Uri = url.parse().map_err(|_| "it is no URL".to_owned())?;
        let https = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err("it is neither https nor http".into()),
        };
        let authority = uri.authority().ok_or("it names no host")?;
        if authority.as_str().contains('@') {
            return Err("it has a user in it".into());
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
        Ok(Self { https, host: authority.host().to_ascii_lowercase(), port, path })
    }

    /// Where an answer from here leads on to.
    pub fn join(&self, location: &str) -> Result<Self, String> {
        if let Some(path) = location.strip_prefix('/') {
            return match path.starts_with('/') {
                true => Self::parse(&format!("{}:{location}", if self.https { "https" } else { "http" })),
                false => Self::parse(&format!("{}{location}", self.origin())),
            };
        }
        Self::parse(location)
    }

    /// Whoever has the same one may be told the same.
    pub fn origin(&self) -> String {
        format!("{}://{}:{}", if self.https { "https" } else { "http" }, self.host, self.port)
    }

    /// Host and port, the latter only where it is not the usual one.
    pub fn authority(&self) -> String {
        match (self.https, self.port) {
            (true, 443) | (false, 80) => self.host.clone(),
            (_, port) => format!("{}:{port}", self.host),
        }
    }
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It may have one when it is repeated.
    Passing(String),
    Final(ImageError),
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::Final(error)
    }
}

/// An answer of which the head is here.
pub(crate) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Body,
}

impl Answer {
    pub fn header(&self, name: http::header::HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// What follows the head. Dropping it closes the connection.
pub(crate) struct Body {
    incoming: Incoming,
    connection: JoinHandle<()>,
    silence: Duration,
}

impl Drop for Body {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Body {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, String> {
        loop {
            let frame = tokio::time::timeout(self.silence, self.incoming.frame()).await;
            match frame.map_err(|_| format!("silence for {} s", self.silence.as_secs_f32()))? {
                None => return Ok(None),
                Some(Err(error)) => return Err(causes(&error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) if bytes.is_empty() => {}
                    Ok(bytes) => return Ok(Some(bytes)),
                    Err(_) => {}
                },
            }
        }
    }

    /// All of it, if it is not more than that; else `None`.
    pub async fn all(&mut self, most: u64) -> Result<Option<Vec<u8>>, String> {
        let mut all = Vec::new();
        while let Some(bytes) = self.next().await? {
            if (all.len() + bytes.len()) as u64 > most {
                return Ok(None);
            }
            all.extend_from_slice(&bytes);
        }
        Ok(Some(all))
    }
}

/// Makes requests as the settings want them made.
pub(crate) struct Http {
    tls: OnceLock<TlsConnector>,
    pub config: Config,
    connect: Duration,
    silence: Duration,
}

impl Http {
    pub fn new(config: &Config) -> Result<Self, ImageError> {
        let http = Self {
            tls: OnceLock::new(),
            config: config.clone(),
            connect: Duration::from_millis(config.connect_timeout_ms),
            silence: Duration::from_millis(config.silence_timeout_ms),
        };
        // A file that cannot be used is told of at the start.
        if http.config.ca_file.is_some() {
            http.tls()?;
        }
        Ok(http)
    }

    /// What TLS needs, made when it is first needed: the certificates of the host take some megabytes.
    fn tls(&self) -> Result<&TlsConnector, ImageError> {
        if let Some(tls) = self.tls.get() {
            return Ok(tls);
        }
        let mut roots = rustls::RootCertStore::empty();
        // A host without certificates reaches no registry over TLS, and may need none.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = &self.config.ca_file {
            let doing = || format!("read the certificates in {}", path.display());
            let bytes = std::fs::read(path).map_err(ImageError::io(doing()))?;
            for certificate in CertificateDer::pem_slice_iter(&bytes) {
                let certificate =
                    certificate.map_err(|error| ImageError::io(doing())(io::Error::other(error.to_string())))?;
                roots.add(certificate).map_err(|error| ImageError::io(doing())(io::Error::other(error)))?;
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| ImageError::io("set up TLS")(io::Error::other(error)))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(self.tls.get_or_init(|| TlsConnector::from(Arc::new(tls))))
    }

    /// Sends one request to one host. Redirects are an answer like others.
    pub async fn send(
        &self,
        method: Method,
        target: &Target,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let passing =
            |what: &str, error: &dyn std::error::Error| Failure::Passing(format!("{what}: {}", causes(error)));
        let silence = format!("silence for {} s", self.silence.as_secs_f32());
        let connected = tokio::time::timeout(self.connect, self.connect(target)).await;
        let stream = connected
            .map_err(|_| Failure::Passing(format!("no connection within {} s", self.connect.as_secs_f32())))??;
        let mut builder = hyper::client::conn::http1::Builder::new();
        builder.max_headers(HEADERS_MAX).max_buf_size(HEAD_BYTES_MAX);
        let handshake = builder.handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| passing("HTTP", &error))?;
        let connection = tokio::spawn(async move { drop(connection.await) });
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        let invalid = |problem: &str| {
            Failure::Final(ImageError::InvalidAnswer { host: target.host.clone(), problem: problem.into() })
        };
        *request.uri_mut() = target.path.parse().map_err(|_| invalid("it named a path that is none"))?;
        *request.headers_mut() = headers;
        let host = HeaderValue::from_str(&target.authority()).map_err(|_| invalid("it named a host that is none"))?;
        request.headers_mut().insert(HOST, host);
        request
            .headers_mut()
            .insert(USER_AGENT, HeaderValue::from_static(concat!("nagaya/", env!("CARGO_PKG_VERSION"))));
        let answer = match tokio::time::timeout(self.silence, sender.send_request(request)).await {
            Ok(Ok(answer)) => answer,
            outcome => {
                connection.abort();
                return Err(match outcome {
                    Ok(Err(error)) => passing("HTTP", &error),
                    _ => Failure::Passing(silence),
                });
            }
        };
        let (head, incoming) = answer.into_parts();
        let body = Body { incoming, connection, silence: self.silence };
        Ok(Answer { status: head.status, headers: head.headers, body })
    }

    async fn connect(&self, target: &Target) -> Result<Box<dyn Stream>, Failure> {
        let addresses = self.addresses(target).await?;
        let mut problem = "it has no address".to_owned();
        // An address that does not answer leaves the others their part of the time.
        let share = self.connect / (addresses.len() as u32).max(1);
        for address in addresses {
            let Ok(connected) = tokio::time::timeout(share, TcpStream::connect(address)).await else {
                problem = format!("{address}: no connection within {} s", share.as_secs_f32());
                continue;
            };
            match connected {
                Err(error) => problem = format!("{address}: {error}"),
                Ok(stream) if !target.https => return Ok(Box::new(stream)),
                Ok(stream) => {
                    let bare = target.host.trim_start_matches('[').trim_end_matches(']');
                    let name = ServerName::try_from(bare.to_owned());
                    let name = name.map_err(|error| Failure::Passing(format!("TLS: {error}")))?;
                    match self.tls().map_err(Failure::Final)?.connect(name, stream).await {
                        Ok(stream) => return Ok(Box::new(stream)),
                        // A certificate does not get better by asking again.
                        Err(error) if error.get_ref().is_some() => {
                            return Err(Failure::Final(ImageError::Unreachable {
                                host: target.authority(),
                                what: "anything over TLS".into(),
                                problem: causes(&error),
                                attempts: 1,
                            }));
                        }
                        Err(error) => problem = format!("TLS: {error}"),
                    }
                }
            }
        }
        Err(Failure::Passing(problem))
    }

    /// The addresses of a host that may be connected to. What was looked at here is what is connected to: the name is not looked up
    /// a second time.
    async fn addresses(&self, target: &Target) -> Result<Vec<SocketAddr>, Failure> {
        let bare = target.host.trim_start_matches('[').trim_end_matches(']');
        let found = tokio::net::lookup_host((bare, target.port)).await;
        let found = found.map_err(|error| Failure::Passing(format!("its name: {error}")))?;
        let found: Vec<_> = found.take(ADDRESSES_MAX).collect();
        if self.config.may_be_inner(&format!("{}:{}", target.host, target.port)) {
            return Ok(found);
        }
        let (inner, outer): (Vec<_>, Vec<_>) = found.into_iter().partition(|address| is_inner(address.ip()));
        match (inner.first(), outer.is_empty()) {
            (Some(address), true) => {
                let address = address.ip().to_string();
                Err(ImageError::RefusedAddress { host: target.authority(), address }.into())
            }
            _ => Ok(outer),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// An error with all that led to it, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text += &format!(": {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_lead_where_browsers_would_go() {
        let from = Target::parse("https://registry.example/v2/a/blobs/x").unwrap();
        for (location, leads) in [
            ("https://cdn.example:8443/x?y=1", Some("https://cdn.example:8443 /x?y=1")),
            ("HTTP://Cdn.Example", Some("http://cdn.example:80 /")),
            ("/other?z", Some("https://registry.example:443 /other?z")),
            ("//cdn.example/x", Some("https://cdn.example:443 /x")),
            ("https://[::1]:5000/x", Some("https://[::1]:5000 /x")),
            ("https://user:password@cdn.example/x", None),
            ("ftp://cdn.example/x", None),
            ("file:///etc/passwd", None),
            ("x", None),
            ("", None),
            ("https://", None),
            ("https://a b/", None),
        ] {
            let found = from.join(location).ok().map(|target| format!("{} {}", target.origin(), target.path));
            assert_eq!(found.as_deref(), leads, "{location}");
        }
        assert_eq!(from.authority(), "registry.example");
        assert_eq!(Target::parse("http://h:5000/").unwrap().authority(), "h:5000");
    }
}
