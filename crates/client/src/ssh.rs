//! SSH: certificates, keys, and the bytes of a connection to a session's SSH server.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::Uri;
use http::uri::Scheme;
use nagaya_api::tenki::v1;
use rustls::pki_types::ServerName;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message, handshake::client::Request};

use crate::constants::DEFAULT_CONNECT_TIMEOUT;
use crate::pipe::FRAME_BYTES_MAX;
use crate::settable::settable;
use crate::{Client, Error, RefusalKind, Result, Session, Status, wire};

/// What of a refusal's text is kept.
const REFUSAL_BYTES_MAX: usize = 256;
/// Servers send SSH packets, which are far smaller.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

settable! {
    /// Whom a certificate is for.
    #[derive(Debug, Clone, Default)]
    pub struct SshCertificateOptions {
        /// A public key as in `authorized_keys`.
        pub public_key: String,
        /// How long it should be valid; the server has a limit of its own.
        pub ttl: Option<Duration>,
        /// Addresses or networks that it may be used from; anywhere when there are none.
        pub source_addresses: Vec<String>,
    }
}

/// A certificate for a session's SSH server.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SshCertificate {
    /// In the form of OpenSSH: `ssh-…-cert-v01@openssh.com …`.
    pub certificate: String,
    /// The public key of the authority that signed it, which also signs the server's host keys.
    pub authority: String,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub expires_at: Option<SystemTime>,
    /// After how long it should be replaced.
    #[serde(serialize_with = "wire::serialize_optional_span")]
    pub renew_after: Option<Duration>,
    /// Hexadecimal.
    pub serial: String,
    pub permissions: SshPermissions,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct SshPermissions {
    pub pty: bool,
    pub agent_forwarding: bool,
    pub local_port_forwarding: bool,
    pub remote_port_forwarding: bool,
    pub x11_forwarding: bool,
}

impl Session {
    /// Signs a public key for this session's SSH server.
    pub async fn issue_ssh_certificate(&self, options: SshCertificateOptions) -> Result<SshCertificate> {
        let request = v1::IssueSandboxSSHCertRequest {
            session_id: self.id().to_owned(),
            public_key: options.public_key,
            requested_ttl: wire::duration(options.ttl),
            source_addresses: options.source_addresses,
        };
        let answer = self.client().gateways().issue_sandbox_ssh_cert(request).await.map_err(Error::of_rpc)?;
        let permissions = answer.permissions.into_option().unwrap_or_default();
        Ok(SshCertificate {
            certificate: answer.ssh_cert,
            authority: answer.ca_pub,
            expires_at: wire::time(answer.expires_at),
            renew_after: wire::span(answer.renewal_after),
            serial: answer.cert_serial,
            permissions: SshPermissions {
                pty: permissions.allow_pty,
                agent_forwarding: permissions.allow_agent_forwarding,
                local_port_forwarding: permissions.allow_port_forwarding_local,
                remote_port_forwarding: permissions.allow_port_forwarding_remote,
                x11_forwarding: permissions.allow_x11_forwarding,
            },
        })
    }

    /// Replaces the keys that the sandbox's SSH server takes behind the gateway.
    pub async fn set_ssh_authorized_keys(&self, keys: Vec<String>) -> Result<()> {
        let request =
            v1::UpdateSSHAuthorizedKeysRequest { session_id: self.id().to_owned(), ssh_authorized_keys: keys };
        self.client().control().update_ssh_authorized_keys(request).await.map_err(Error::of_rpc)?;
        Ok(())
    }

    /// A connection to the session's SSH server: the bytes that an SSH client would exchange over TCP.
    ///
    /// Fails with [`RefusalKind::Unauthorized`](crate::RefusalKind::Unauthorized), [`RefusalKind::PermissionDenied`](crate::RefusalKind::PermissionDenied), [`RefusalKind::SessionNotFound`](crate::RefusalKind::SessionNotFound),
    /// [`RefusalKind::InvalidState`](crate::RefusalKind::InvalidState) or [`RefusalKind::SshUnavailable`](crate::RefusalKind::SshUnavailable).
    pub async fn ssh(&self) -> Result<SshStream> {
        let client = self.client();
        let gateway = match client.gateway() {
            Some(pinned) => bridge(pinned, self.id())
                .ok_or_else(|| Error::InvalidOptions(format!("gateway {pinned:?} is not a URL of a WebSocket")))?,
            None => match discover(client, self.id()).await {
                Some(found) => found,
                None => derive(client.endpoint_uri(), self.id())
                    .ok_or_else(|| unavailable("the server names no SSH gateway"))?,
            },
        };
        connect(client, &gateway).await
    }
}

/// The first healthy gateway that the server names. Failing to ask is the same as there being none.
async fn discover(client: &Client, session_id: &str) -> Option<Uri> {
    let answer = client.gateways().list_active_ssh_gateways(v1::ListActiveSSHGatewaysRequest::default()).await.ok()?;
    let usable = answer.gateways.iter().filter(|gateway| gateway.healthy);
    usable.into_iter().find_map(|gateway| bridge(&gateway.ws_bridge_endpoint, session_id))
}

/// Where a gateway's WebSocket for this session is.
fn bridge(gateway: &str, session_id: &str) -> Option<Uri> {
    let gateway: Uri = gateway.trim().parse().ok()?;
    let scheme = match gateway.scheme_str()? {
        "http" | "ws" => "ws",
        "https" | "wss" => "wss",
        _ => return None,
    };
    let path = format!("{}/v1/ssh/{session_id}", gateway.path().trim_end_matches('/'));
    Uri::builder().scheme(scheme).authority(gateway.authority()?.clone()).path_and_query(path).build().ok()
}

/// The gateway that hosted servers have beside their API. An address has no name beside it.
fn derive(endpoint: &Uri, session_id: &str) -> Option<Uri> {
    let host = endpoint.host()?;
    let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    let gateway_host = match host.strip_prefix("api.").or_else(|| host.strip_prefix("app.")) {
        _ if is_address => host.to_owned(),
        Some(rest) => format!("sandbox-gateway.{rest}"),
        None => format!("sandbox-gateway.{host}"),
    };
    let port = endpoint.port().map(|port| format!(":{port}")).unwrap_or_default();
    bridge(&format!("{}://{gateway_host}{port}", endpoint.scheme_str()?), session_id)
}

async fn connect(client: &Client, gateway: &Uri) -> Result<SshStream> {
    let secure = gateway.scheme().map(Scheme::as_str) == Some("wss");
    let host = gateway.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = gateway.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let unreachable =
        |why: String| Error::Unreachable { message: format!("no connection to {host}:{port}: {why}"), unsent: true };
    let opening = async {
        let tcp = TcpStream::connect((host, port)).await.map_err(|error| unreachable(error.to_string()))?;
        tcp.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
        let stream: Box<dyn Duplex> = match secure {
            false => Box::new(tcp),
            true => {
                let name = ServerName::try_from(host.to_owned()).map_err(|error| unreachable(error.to_string()))?;
                let tls = TlsConnector::from(client.connections().tls()?).connect(name, tcp).await;
                Box::new(tls.map_err(|error| unreachable(error.to_string()))?)
            }
        };
        upgrade(request(client, gateway)?, stream).await
    };
    let timed_out = |_| unreachable(format!("it was not made within {} s", DEFAULT_CONNECT_TIMEOUT.as_secs()));
    tokio::time::timeout(DEFAULT_CONNECT_TIMEOUT, opening).await.map_err(timed_out)?
}

fn request(client: &Client, gateway: &Uri) -> Result<Request> {
    let mut request = gateway.clone().into_client_request().map_err(|error| unavailable(&error.to_string()))?;
    request.headers_mut().extend(client.headers().iter().map(|(name, value)| (name.clone(), value.clone())));
    Ok(request)
}

async fn upgrade(request: Request, stream: Box<dyn Duplex>) -> Result<SshStream> {
    let config =
        WebSocketConfig::default().max_message_size(Some(MESSAGE_BYTES_MAX)).max_frame_size(Some(MESSAGE_BYTES_MAX));
    match tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await {
        Ok((socket, _)) => Ok(SshStream { socket, unread: Bytes::new(), closing: false }),
        Err(SocketError::Http(answer)) => {
            let body = answer.body().as_deref().unwrap_or_default();
            let text = String::from_utf8_lossy(&body[..body.len().min(REFUSAL_BYTES_MAX)]);
            Err(refused(answer.status().as_u16(), text.trim()))
        }
        Err(error) => Err(unavailable(&error.to_string())),
    }
}

/// A gateway says by the status of HTTP why it does not open the connection.
fn refused(status: u16, text: &str) -> Error {
    let refused = |kind, status| Error::refused(kind, status, text);
    match status {
        401 => refused(RefusalKind::Unauthorized, Status::Unauthenticated),
        403 => refused(RefusalKind::PermissionDenied, Status::PermissionDenied),
        404 => refused(RefusalKind::SessionNotFound, Status::NotFound),
        409 => refused(RefusalKind::InvalidState, Status::FailedPrecondition),
        _ if text.is_empty() => unavailable(&format!("the gateway answered with HTTP status {status}")),
        _ => refused(RefusalKind::SshUnavailable, Status::Unavailable),
    }
}

fn unavailable(why: &str) -> Error {
    Error::refused(RefusalKind::SshUnavailable, Status::Unavailable, format!("SSH is not available: {why}"))
}

trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// The bytes of one SSH connection. Shutting it down closes both directions.
pub struct SshStream {
    socket: WebSocketStream<Box<dyn Duplex>>,
    unread: Bytes,
    /// Shut down on this side: however the other one goes then, it is the end.
    closing: bool,
}

impl fmt::Debug for SshStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SshStream").finish_non_exhaustive()
    }
}

fn io_error(error: SocketError) -> io::Error {
    match error {
        SocketError::Io(error) => error,
        SocketError::ConnectionClosed | SocketError::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        other => io::Error::other(other),
    }
}

impl AsyncRead for SshStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.unread.is_empty() {
            match ready!(self.socket.poll_next_unpin(context)) {
                Some(Ok(Message::Binary(bytes))) => self.unread = bytes,
                None | Some(Ok(Message::Close(_)) | Err(SocketError::ConnectionClosed)) => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(_)) if self.closing => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
        let length = self.unread.len().min(buffer.remaining());
        buffer.put_slice(&self.unread.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SshStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.socket.poll_ready_unpin(context)).map_err(io_error)?;
        let piece = &bytes[..bytes.len().min(FRAME_BYTES_MAX)];
        self.socket.start_send_unpin(Message::Binary(Bytes::copy_from_slice(piece))).map_err(io_error)?;
        // A caller who does not flush expects its bytes to leave nevertheless, as on a socket.
        if let Poll::Ready(Err(error)) = self.socket.poll_flush_unpin(context) {
            return Poll::Ready(Err(io_error(error)));
        }
        Poll::Ready(Ok(piece.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_flush_unpin(context).map_err(io_error)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.closing = true;
        match ready!(self.socket.poll_close_unpin(context)) {
            Ok(()) | Err(SocketError::ConnectionClosed | SocketError::AlreadyClosed) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(io_error(error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bridge_is_below_the_gateways_path() {
        let of = |gateway: &str| bridge(gateway, "ID").map(|uri| uri.to_string());
        let is = |url: &str| Some(url.to_owned());
        assert_eq!(of("http://a:1"), is("ws://a:1/v1/ssh/ID"));
        assert_eq!(of(" https://a/x/ "), is("wss://a/x/v1/ssh/ID"));
        assert_eq!(of("wss://[::1]:2"), is("wss://[::1]:2/v1/ssh/ID"));
        for bad in ["", "ftp://a", "a:1", "/x"] {
            assert_eq!(of(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn without_a_named_gateway_it_is_beside_the_api() {
        let of = |endpoint: &str| derive(&endpoint.parse().expect("a URL"), "ID").expect("a URL").to_string();
        assert_eq!(of("https://api.example.com"), "wss://sandbox-gateway.example.com/v1/ssh/ID");
        assert_eq!(of("https://app.example.com:8443"), "wss://sandbox-gateway.example.com:8443/v1/ssh/ID");
        assert_eq!(of("http://example.com"), "ws://sandbox-gateway.example.com/v1/ssh/ID");
        assert_eq!(of("http://127.0.0.1:7070"), "ws://127.0.0.1:7070/v1/ssh/ID");
        assert_eq!(of("http://[::1]:7070"), "ws://[::1]:7070/v1/ssh/ID");
    }

    #[test]
    fn refusals_are_known_by_their_status() {
        assert!(matches!(refused(401, "x"), Error::Refused { kind: RefusalKind::Unauthorized, .. }));
        assert!(matches!(refused(403, "x"), Error::Refused { kind: RefusalKind::PermissionDenied, .. }));
        assert!(matches!(refused(404, "x"), Error::Refused { kind: RefusalKind::SessionNotFound, .. }));
        assert!(matches!(refused(409, "x"), Error::Refused { kind: RefusalKind::InvalidState, .. }));
        assert!(matches!(refused(502, ""), Error::Refused { kind: RefusalKind::SshUnavailable, .. }));
        assert_eq!(
            refused(409, "session not RUNNING (state=PAUSED)").to_string(),
            "session not RUNNING (state=PAUSED)"
        );
    }
}
