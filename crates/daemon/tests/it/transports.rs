//! Every protocol on every version of HTTP, in clear text and with TLS: what a connection can carry is answered with its
//! outcome, what it cannot is refused before anything is done.

use std::collections::BTreeMap;
use std::sync::Arc;

use buffa::Message;
use bytes::Bytes;
use http::{HeaderMap, Request, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use nagaya_api::tenki::v1 as wire;
use nagaya_daemon::config::TlsConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::support::*;

const CONTROL: &str = "tenki.sandbox.v1.SandboxService";
const VERSIONS: [Version; 3] = [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2];
const GRPC: [&str; 3] = ["application/grpc", "application/grpc+proto", "application/grpc+json"];
const WEB: [&str; 3] = ["application/grpc-web", "application/grpc-web+proto", "application/grpc-web+json"];
const UNARY: [&str; 2] = ["application/proto", "application/json"];
const STREAM: [&str; 2] = ["application/connect+proto", "application/connect+json"];

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// A server in clear text or with TLS, and who speaks to it.
struct Side {
    world: World,
    tls: Option<rustls::ClientConfig>,
}

/// How a call travels.
#[derive(Debug, Clone, Copy)]
struct Way {
    version: Version,
    kind: &'static str,
    trailers: bool,
}

impl Way {
    fn is_json(&self) -> bool {
        self.kind.ends_with("json")
    }

    fn is_framed(&self) -> bool {
        !UNARY.contains(&self.kind)
    }

    /// Whether its outcome can be told.
    fn carries(&self) -> bool {
        let needs_trailers = GRPC.contains(&self.kind);
        !needs_trailers || self.version == Version::HTTP_2 || (self.version == Version::HTTP_11 && self.trailers)
    }
}

/// What came of a call, by the rules of its protocol.
#[derive(Debug, Default)]
struct Told {
    code: String,
    text: String,
    messages: Vec<Bytes>,
    fields: HeaderMap,
    /// Bytes of header and trailers, in which gRPC tells its outcome.
    metadata_bytes: usize,
}

impl Told {
    fn message<M: Message + DeserializeOwned>(&self, way: Way) -> M {
        let [message] = &self.messages[..] else { panic!("one message: {self:?}") };
        match way.is_json() {
            true => serde_json::from_slice(message).unwrap(),
            false => M::decode_from_slice(message).unwrap(),
        }
    }
}

impl Side {
    async fn clear() -> Self {
        Self { world: World::new().await, tls: None }
    }

    async fn tls() -> Self {
        let issued = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (certificate_file, key_file) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
        std::fs::write(&certificate_file, issued.cert.pem()).unwrap();
        std::fs::write(&key_file, issued.signing_key.serialize_pem()).unwrap();
        let world = World::with(|config| config.tls = Some(TlsConfig { certificate_file, key_file })).await;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(issued.cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client =
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        Self { world, tls: Some(client.with_root_certificates(roots).with_no_client_auth()) }
    }

    async fn connect(&self, version: Version) -> Box<dyn Io> {
        let stream = TcpStream::connect(self.world.address()).await.unwrap();
        let Some(tls) = &self.tls else { return Box::new(stream) };
        let mut tls = tls.clone();
        tls.alpn_protocols = vec![if version == Version::HTTP_2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let name = "localhost".try_into().unwrap();
        Box::new(tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await.unwrap())
    }

    async fn call(&self, way: Way, method: &str, message: &(impl Message + Serialize)) -> Told {
        let content = if way.is_json() { serde_json::to_vec(message).unwrap() } else { message.encode_to_vec() };
        self.send(way, method, content, &[]).await
    }

    async fn send(&self, way: Way, method: &str, content: Vec<u8>, extra: &[(&str, &str)]) -> Told {
        let body = match way.is_framed() {
            true => [&[0][..], &(content.len() as u32).to_be_bytes(), &content].concat(),
            false => content,
        };
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let authority = format!("localhost:{}", self.world.address().port());
        let uri = match way.version {
            Version::HTTP_2 => format!("{scheme}://{authority}/{CONTROL}/{method}"),
            _ => format!("/{CONTROL}/{method}"),
        };
        let mut request = Request::post(uri)
            .version(way.version)
            .header("host", authority)
            .header("content-type", way.kind)
            .header("authorization", format!("Bearer {}", self.world.secret));
        if way.trailers {
            request = request.header("te", "trailers");
        }
        for (name, value) in extra {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let io = TokioIo::new(self.connect(way.version).await);
        let response = if way.version == Version::HTTP_2 {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            soon(sender.send_request(request)).await.unwrap()
        } else {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
            tokio::spawn(connection);
            soon(sender.send_request(request)).await.unwrap()
        };
        let (head, body) = response.into_parts();
        let body = soon(body.collect()).await.unwrap();
        let trailers = body.trailers().cloned();
        read(way, head.status.as_u16(), head.headers, trailers, body.to_bytes())
    }
}

fn read(way: Way, status: u16, mut fields: HeaderMap, trailers: Option<HeaderMap>, mut body: Bytes) -> Told {
    let size = |fields: &HeaderMap| fields.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>();
    let metadata_bytes = size(&fields) + trailers.as_ref().map_or(0, size);
    fields.extend(trailers.unwrap_or_default());
    let mut told = Told { metadata_bytes, ..Told::default() };
    let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap_or_default();
    let text = |value: &serde_json::Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
    if !way.is_framed() {
        let error = if status == 200 { serde_json::Value::Null } else { json(&body) };
        told.code = if status == 200 { "ok".into() } else { text(&error, "code") };
        told.text = text(&error, "message");
        told.messages = if status == 200 { vec![body] } else { Vec::new() };
        return Told { fields, ..told };
    }
    let mut status_fields = fields.clone();
    while body.len() >= 5 {
        let head = body.split_to(5);
        let length = u32::from_be_bytes(head[1..5].try_into().unwrap()) as usize;
        if ![0, 2, 0x80].contains(&head[0]) || length > body.len() {
            // An answer in another form than the call's.
            return Told { code: "unreadable".into(), fields, ..told };
        }
        let message = body.split_to(length);
        match head[0] {
            0 => told.messages.push(message),
            2 => {
                let end = json(&message);
                told.code = if end["error"].is_null() { "ok".into() } else { text(&end["error"], "code") };
                told.text = text(&end["error"], "message");
            }
            0x80 => {
                for line in std::str::from_utf8(&message).unwrap().lines() {
                    let (name, value) = line.split_once(": ").unwrap();
                    status_fields.insert(name.parse::<http::HeaderName>().unwrap(), value.parse().unwrap());
                }
            }
            other => panic!("flags {other}"),
        }
    }
    if let Some(code) = status_fields.get("grpc-status") {
        let names = BTreeMap::from([
            ("0", "ok"),
            ("3", "invalid_argument"),
            ("5", "not_found"),
            ("9", "failed_precondition"),
            ("12", "unimplemented"),
        ]);
        told.code = names.get(code.to_str().unwrap()).copied().unwrap_or("another").into();
        told.text = status_fields.get("grpc-message").map_or("", |value| value.to_str().unwrap()).to_owned();
    }
    Told { fields, ..told }
}

fn ways(kinds: &[&'static str]) -> Vec<Way> {
    let versions = VERSIONS.into_iter().flat_map(|version| [true, false].map(|trailers| (version, trailers)));
    versions.flat_map(|(version, trailers)| kinds.iter().map(move |kind| Way { version, kind, trailers })).collect()
}

/// One way through everything a call can be.
async fn walk(side: &Side, way: Way, streams: bool) {
    let sessions = || side.world.fakes.store.all_sessions().len();
    let before = sessions();
    let by = if streams { Way { version: Version::HTTP_11, kind: UNARY[0], trailers: false } } else { way };
    let told = side.call(by, "CreateSession", &create()).await;
    if !by.carries() {
        assert_eq!((told.code.as_str(), sessions()), ("unimplemented", before), "{way:?}: {told:?}");
        assert!(told.text.contains("[transport_unfit]"), "{way:?}: {told:?}");
        return;
    }
    assert_eq!(told.code, "ok", "{way:?}: {told:?}");
    let created: wire::CreateSessionResponse = told.message(by);
    assert_eq!(sessions(), before + 1, "{way:?}");
    let id = created.session.id.clone();
    if streams {
        let told = side.call(way, "WaitSession", &wire::WaitSessionRequest { session_id: id }).await;
        let expected = if way.carries() { "ok" } else { "unimplemented" };
        assert_eq!(told.code, expected, "{way:?}: {told:?}");
        if way.carries() {
            let message: wire::WaitSessionResponse = told.message(way);
            assert_eq!(message.session.state, wire::SessionState::Running, "{way:?}");
        }
        return;
    }
    let unknown = wire::GetSessionRequest { session_id: "0190a8f0-0000-7000-8000-000000000000".into() };
    let told = side.call(way, "GetSession", &unknown).await;
    assert_eq!(told.code, "not_found", "{way:?}: {told:?}");
    assert!(told.text.contains("[session_not_found]"), "{way:?}: {told:?}");
    let announced = told.fields.get("trailer").is_some();
    assert_eq!(announced, GRPC.contains(&way.kind) && way.version == Version::HTTP_11, "{way:?}: {told:?}");
}

async fn matrix(side: Side) {
    for way in ways(&[&GRPC[..], &WEB, &UNARY].concat()) {
        walk(&side, way, false).await;
    }
    for way in ways(&[&GRPC[..], &WEB, &STREAM].concat()) {
        walk(&side, way, true).await;
    }
}

#[tokio::test]
async fn every_protocol_on_every_version_in_clear_text() {
    matrix(Side::clear().await).await;
}

#[tokio::test]
async fn every_protocol_on_every_version_with_tls() {
    matrix(Side::tls().await).await;
}

/// A stream asked for as a single call, and the other way round: nobody could read the answer, so nothing is done.
#[tokio::test]
async fn a_call_in_the_wrong_form_does_nothing() {
    let side = Side::clear().await;
    for way in ways(&[&STREAM[..], &["application/grpc-web-text", "text/plain", "application/grpc+thrift"]].concat()) {
        let told = side.call(way, "CreateSession", &create()).await;
        assert_ne!(told.code, "ok", "{way:?}: {told:?}");
        assert!(side.world.fakes.store.all_sessions().is_empty(), "{way:?}: {told:?}");
    }
    let id = side.world.session().await.0;
    for way in ways(&UNARY) {
        let told = side.call(way, "WaitSession", &get(&id)).await;
        assert_ne!(told.code, "ok", "{way:?}: {told:?}");
    }
}

fn get(id: &str) -> wire::GetSessionRequest {
    wire::GetSessionRequest { session_id: id.to_owned() }
}

/// gRPC's clients take 8 KiB of header fields gladly and 16 KiB at most, whatever the text of an error repeats.
#[tokio::test]
async fn no_error_has_more_than_7_kib_of_header_fields() {
    let side = Side::clear().await;
    let long = "é".repeat(20_000);
    let header = "x".repeat(12_000);
    for way in ways(&GRPC).into_iter().filter(Way::carries) {
        let told = side.send(way, "GetSession", b"{}".to_vec(), &[("grpc-encoding", &header)]).await;
        assert_ne!(told.code, "ok", "{told:?}");
        assert!(told.metadata_bytes < 7 * 1024, "{way:?}: {}", told.metadata_bytes);
        if !way.is_json() {
            continue;
        }
        for message in [
            serde_json::json!({ "sessionId": 1, long.as_str(): { "a": 1 } }),
            serde_json::json!({ "ownerId": "x", "ownerType": "USER", "idleTimeoutMinutes": long }),
            serde_json::json!({ "ownerId": "x", "ownerType": "USER", "maxDuration": long }),
            serde_json::json!({ "state": long }),
        ] {
            for method in ["GetSession", "CreateSession", "ListSessions"] {
                let told = side.send(way, method, message.to_string().into_bytes(), &[]).await;
                assert!(told.metadata_bytes < 7 * 1024, "{way:?} {method}: {}", told.metadata_bytes);
            }
        }
    }
}
