//! WebSockets and whatever else is spoken on a connection after its first request.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use nagaya_api::error::{Code, Error};

use super::BoxFuture;
use super::headers::has_token;

/// Held for each direction of a tunnel, and as much again by either socket.
const BUFFER_BYTES: usize = 16 * 1024;

/// Another protocol that a viewer asks for.
pub(super) struct Upgrade {
    pub(super) protocol: HeaderValue,
    /// Asked for as HTTP/2 does it (RFC 8441): the answer is 200, not 101.
    pub(super) extended_connect: bool,
    viewer: OnUpgrade,
}

impl Upgrade {
    /// What this request asks for; it becomes one of HTTP/1.1.
    pub(super) fn of(parts: &mut Parts) -> Result<Option<Self>, Error> {
        let protocol = match (&parts.method, parts.version) {
            (&Method::CONNECT, Version::HTTP_2) => match parts.extensions.get::<hyper::ext::Protocol>() {
                Some(protocol) => HeaderValue::from_str(protocol.as_str()).ok(),
                None => None,
            },
            (&Method::CONNECT, _) => None,
            (_, Version::HTTP_11) if has_token(&parts.headers, header::CONNECTION, "upgrade") => {
                let protocol = parts.headers.get(header::UPGRADE).cloned();
                // HTTP/2 in clear text would take all further requests past us.
                match protocol.filter(|_| !has_token(&parts.headers, header::UPGRADE, "h2c")) {
                    Some(protocol) => Some(protocol),
                    None => return Ok(None),
                }
            }
            _ => return Ok(None),
        };
        let Some(protocol) = protocol else {
            return Err(Error::new(Code::InvalidArgument, "CONNECT leads nowhere here"));
        };
        let extended_connect = parts.method == Method::CONNECT;
        let Some(viewer) = parts.extensions.remove::<OnUpgrade>() else { return Ok(None) };
        if extended_connect {
            parts.method = Method::GET;
            parts.headers.insert(header::SEC_WEBSOCKET_KEY, websocket_key()?);
        }
        Ok(Some(Self { protocol, extended_connect, viewer }))
    }

    /// Turns the service's 101 into what the viewer waits for.
    pub(super) fn accept(&self, status: &mut StatusCode, headers: &mut HeaderMap) {
        if self.extended_connect {
            *status = StatusCode::OK;
            headers.remove(header::CONNECTION);
            headers.remove(header::UPGRADE);
            headers.remove(header::SEC_WEBSOCKET_ACCEPT);
        }
    }

    /// Carries bytes both ways until both sides have ended, one has failed, or the server stops. `hold` is kept so long.
    pub(super) fn run(self, service: OnUpgrade, hold: impl Send + 'static, stopping: BoxFuture<()>) {
        tokio::spawn(async move {
            let both = async {
                let (viewer, service) = tokio::try_join!(self.viewer, service)?;
                let (mut viewer, mut service) = (TokioIo::new(viewer), TokioIo::new(service));
                let copied =
                    tokio::io::copy_bidirectional_with_sizes(&mut viewer, &mut service, BUFFER_BYTES, BUFFER_BYTES);
                if let Err(error) = copied.await {
                    tracing::debug!(%error, "a tunnel to a service in a sandbox ended early");
                }
                Ok::<_, hyper::Error>(())
            };
            tokio::select! {
                ended = both => if let Err(error) = ended {
                    tracing::debug!(%error, "a tunnel to a service in a sandbox did not begin");
                },
                () = stopping => {}
            }
            drop(hold);
        });
    }
}

/// HTTP/2 needs no key, HTTP/1.1 has to have one; only its form matters (RFC 6455, section 4.1).
fn websocket_key() -> Result<HeaderValue, Error> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| Error::new(Code::Internal, format!("no randomness: {error}")))?;
    Ok(HeaderValue::try_from(STANDARD.encode(random)).expect("base64 can stand in a header"))
}
