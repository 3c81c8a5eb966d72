//! SSH: its rpcs, and the WebSocket bridge `/v1/ssh/SESSION`, which carries the bytes of an SSH connection.

use std::net::SocketAddr;
use std::time::Duration;

use connectrpc::RequestContext;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use nagaya_api::error::{Code, Error};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::words;
use nagaya_engine::ports::Clock;
use nagaya_engine::{SessionUpdate, SshSession, validate};
use nagaya_gateway::ssh::{self, ConnectionPermit, Permissions, WebSocket};

use super::service::TenkiService;
use crate::host::HostClock;
use crate::rpc::parse::{invalid, milliseconds};
use crate::rpc::service::caller;
use crate::rpc::{auth, convert};
use crate::wire::body::ResponseBody;
use crate::wire::connection::Via;
use crate::wire::lifecycle::Phase;

/// What clients show of a refusal, bytes.
const REFUSAL_BYTES_MAX: usize = 256;
const PUBLIC_KEY_BYTES: std::ops::RangeInclusive<usize> = 32..=8192;
const SOURCE_ADDRESSES_MAX: usize = 16;
/// This server is one gateway, of one region.
const GATEWAY_ID: &str = "nagaya";
const REGION: &str = "local";

impl TenkiService {
    pub(super) async fn list_active_ssh_gateways(
        &self,
        context: &RequestContext,
        _: wire::ListActiveSSHGatewaysRequest,
    ) -> Result<wire::ListActiveSSHGatewaysResponse, Error> {
        let gateway = wire::ActiveSSHGateway {
            gateway_id: GATEWAY_ID.to_owned(),
            region: REGION.to_owned(),
            public_endpoint: self.ssh_address.map(|address| address.to_string()).unwrap_or_default(),
            last_heartbeat_at: convert::timestamp(HostClock.now()).into(),
            healthy: true,
            ws_bridge_endpoint: self.endpoint(context),
            ..Default::default()
        };
        Ok(wire::ListActiveSSHGatewaysResponse { gateways: vec![gateway] })
    }

    pub(super) async fn issue_sandbox_ssh_cert(
        &self,
        context: &RequestContext,
        request: wire::IssueSandboxSSHCertRequest,
    ) -> Result<wire::IssueSandboxSSHCertResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let public_key = validate::ssh_key_line(&request.public_key);
        if !PUBLIC_KEY_BYTES.contains(&public_key.len()) {
            return Err(invalid("public_key must have 32 to 8192 characters"));
        }
        if request.source_addresses.len() > SOURCE_ADDRESSES_MAX {
            return Err(invalid("source_addresses must name at most 16 addresses or networks"));
        }
        let ttl = milliseconds(request.requested_ttl.as_option(), "requested_ttl")?;
        let ttl = ttl.filter(|ttl| *ttl > 0).map(Duration::from_millis);
        let issued = self.ssh.issue(caller, id, public_key, ttl, &request.source_addresses).await?;
        let now = HostClock.now();
        let expires_at = issued.expires_at_seconds.saturating_mul(1000);
        Ok(wire::IssueSandboxSSHCertResponse {
            ssh_cert: issued.certificate,
            ca_pub: self.ssh.ca_public_key(),
            expires_at: convert::timestamp(expires_at).into(),
            cert_serial: format!("{:016x}", issued.serial),
            renewal_after: convert::duration(expires_at.saturating_sub(now) / 2).into(),
            permissions: permissions(issued.permissions).into(),
        })
    }

    pub(super) async fn update_ssh_authorized_keys(
        &self,
        context: &RequestContext,
        request: wire::UpdateSSHAuthorizedKeysRequest,
    ) -> Result<wire::UpdateSSHAuthorizedKeysResponse, Error> {
        let caller = &caller(context)?;
        let id = convert::id(&request.session_id, "session_id")?;
        let update =
            SessionUpdate { ssh_authorized_keys: Some(request.ssh_authorized_keys), ..SessionUpdate::default() };
        self.engine.update_session(caller, id, update).await?;
        Ok(wire::UpdateSSHAuthorizedKeysResponse::default())
    }
}

fn permissions(permissions: Permissions) -> wire::SSHCertPermissions {
    wire::SSHCertPermissions {
        allow_pty: permissions.pty,
        allow_agent_forwarding: permissions.agent_forwarding,
        allow_port_forwarding_local: permissions.port_forwarding_local,
        allow_port_forwarding_remote: permissions.port_forwarding_remote,
        allow_x11_forwarding: false,
    }
}

/// The session to which a path is the bridge, whatever it is called there.
pub(super) fn bridge_to(path: &str) -> Option<&str> {
    path.strip_prefix("/v1/ssh/").filter(|id| !id.is_empty() && !id.contains('/'))
}

/// Opens a session for a client that shows a key of the API, and makes a WebSocket of the connection. Refusals
/// are plain answers: clients look at the status and show the text.
pub(super) async fn bridge(
    tenki: &TenkiService,
    mut request: Request<Incoming>,
    via: Via<'_>,
) -> Response<ResponseBody> {
    let admitted = admit_bridge(tenki, &request).await;
    let (visit, place, accept) = match admitted.and_then(|admitted| via.open.admit().map(|()| admitted)) {
        Ok(admitted) => admitted,
        Err(error) => return refusal(&error),
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let (server, connection) = (tenki.ssh.clone(), via.viewer.connection.clone());
    let peer = SocketAddr::new(via.viewer.peer, 0);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(stream) => {
                let socket = WebSocket::new(TokioIo::new(stream)).await;
                server.serve_visit(socket, visit, Some(peer), place).await;
            }
            Err(error) => tracing::debug!(%error, "a client of the SSH bridge went away"),
        }
        drop(connection);
    });
    let mut response = Response::new(ResponseBody::text(""));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    response
}

async fn admit_bridge(
    tenki: &TenkiService,
    request: &Request<Incoming>,
) -> Result<(SshSession, ConnectionPermit, HeaderValue), Error> {
    if tenki.lifecycle.phase() >= Phase::Draining {
        return Err(Code::Draining.into());
    }
    let caller = tenki.engine.authenticate(auth::token(request.headers())?)?;
    refuse_other_sites(request.headers())?;
    let id = bridge_to(request.uri().path()).unwrap_or_default();
    // What is no id names no session.
    let id = id.parse().map_err(|_| Error::from(Code::SessionNotFound))?;
    let accept = handshake(request)?;
    let place = tenki.ssh.place()?;
    let visit = tenki.engine.visit(&caller, id).await?;
    Ok((visit, place, accept))
}

/// A page of another site must not use what a browser knows of its user. Programs send no origin, or ours. Another port
/// is another site: previews may be there.
fn refuse_other_sites(headers: &HeaderMap) -> Result<(), Error> {
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let Some(origin) = origins.next() else { return Ok(()) };
    let is_ours = |origin: &str| {
        let (scheme, rest) = origin.split_once("://")?;
        // The server may be behind something that ends TLS, so that only the browser knows what the port is by default.
        let default = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        let place = |text: &str| {
            let authority: Authority = text.parse().ok().filter(|of: &Authority| !of.as_str().contains('@'))?;
            let port = match authority.as_str().strip_prefix(authority.host())? {
                "" => default,
                _ => authority.port_u16()?,
            };
            Some((authority.host().to_ascii_lowercase(), port))
        };
        let mut hosts = headers.get_all(header::HOST).iter();
        let host = hosts.next().filter(|_| hosts.next().is_none())?.to_str().ok()?;
        Some(place(rest)? == place(host)?)
    };
    match (origin.to_str().ok().and_then(is_ours), origins.next()) {
        (Some(true), None) => Ok(()),
        _ => Err(Error::new(Code::PermissionDenied, "pages of other sites may not open SSH connections")),
    }
}

/// What answers the WebSocket's handshake (RFC 6455, section 4.2).
fn handshake(request: &Request<Incoming>) -> Result<HeaderValue, Error> {
    let headers = request.headers();
    let lists = |name, wanted: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(wanted))
    };
    let is_handshake = request.method() == Method::GET
        && request.version() == http::Version::HTTP_11
        && lists(header::UPGRADE, "websocket")
        && lists(header::CONNECTION, "upgrade")
        && lists(header::SEC_WEBSOCKET_VERSION, "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| is_handshake);
    let key = key.ok_or_else(|| invalid("this path is opened as a WebSocket (version 13), by GET over HTTP/1.1"))?;
    HeaderValue::from_str(&ssh::accept_key(key.as_bytes())).map_err(|_| invalid("Sec-WebSocket-Key is malformed"))
}

fn refusal(error: &Error) -> Response<ResponseBody> {
    let mut text = words::wire_text(error);
    let end = (0..=REFUSAL_BYTES_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    let mut response = Response::new(ResponseBody::text(text));
    *response.status_mut() =
        StatusCode::from_u16(error.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(host: &str, origins: &[&str]) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        for origin in origins {
            headers.append(header::ORIGIN, origin.parse().unwrap());
        }
        refuse_other_sites(&headers).is_ok()
    }

    #[test]
    fn only_pages_of_this_very_place_may_open_connections() {
        for (host, origins) in [
            ("a.example", &[][..]),
            ("a.example", &["https://a.example"]),
            ("a.example", &["http://a.example:80"]),
            ("A.example:443", &["https://a.EXAMPLE"]),
            ("127.0.0.1:7070", &["http://127.0.0.1:7070"]),
            ("[::1]:7070", &["http://[::1]:7070"]),
        ] {
            assert!(allowed(host, origins), "{host} {origins:?}");
        }
        for (host, origins) in [
            ("127.0.0.1:7070", &["http://127.0.0.1:20000"][..]),
            ("127.0.0.1:7070", &["http://127.0.0.1"]),
            ("a.example", &["https://a.example:8443"]),
            ("a.example:7070", &["https://a.example"]),
            ("a.example:80", &["https://a.example"]),
            ("a.example", &["https://b.example"]),
            ("a.example", &["https://web.a.example"]),
            ("a.example", &["null"]),
            ("a.example", &[""]),
            ("a.example", &["ftp://a.example"]),
            ("a.example", &["https://a.example@b.example"]),
            ("a.example", &["https://x@a.example"]),
            ("a.example", &["https://a.example:99999"]),
            ("a.example", &["https://a.example", "https://b.example"]),
        ] {
            assert!(!allowed(host, origins), "{host} {origins:?}");
        }
    }
}
