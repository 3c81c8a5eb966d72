//! Previews on the server's one listener: told apart by their host names, with a certificate of their own.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use nagaya_api::tenki::v1 as wire;
use nagaya_daemon::config::TlsConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;

use crate::life::metrics;
use crate::support::*;

/// Port 7 of a fake sandbox sends everything back, which is no answer in HTTP.
const ECHO: i32 = 7;

async fn status(world: &World, host: &str) -> u16 {
    let request = Request::get("/healthz").header("host", host).body(Full::<Bytes>::default()).unwrap();
    world.http1(request).await.status().as_u16()
}

#[tokio::test]
async fn names_below_the_domain_are_previews_and_all_others_the_servers() {
    let world = World::with(|config| config.preview_domain = Some("p.example".into())).await;
    let (id, _) = world.session().await;
    let request =
        wire::ExposePortRequest { session_id: id.clone(), port: ECHO, slug: Some("shop".into()), ..Default::default() };
    world.control().expose_port(request).await.unwrap();
    for (host, expected) in [
        ("shop.p.example", 502),
        ("SHOP.P.example.:7070", 502),
        ("other.p.example", 404),
        ("p.example", 404),
        ("a.shop.p.example", 404),
        ("bad host.p.example", 400),
        ("shopp.example", 200),
        ("localhost", 200),
        ("127.0.0.1:7070", 200),
    ] {
        assert_eq!(status(&world, host).await, expected, "{host}");
    }
    let answer = world.http2(Request::get("http://shop.p.example/").body(Full::default()).unwrap()).await;
    assert_eq!(answer.status(), 502);
    assert!(String::from_utf8_lossy(answer.body()).contains("service_broken"));

    // Nothing of the API is served there, however good the key.
    let path = "http://shop.p.example/tenki.sandbox.v1.SandboxService/WhoAmI";
    let request = Request::post(path).header("authorization", format!("Bearer {}", world.secret));
    assert_eq!(world.http2(request.body(Full::default()).unwrap()).await.status(), 502);

    let told = metrics(&world).await;
    for line in [
        "nagaya_preview_requests_total{answered_by=\"server\"} 8",
        "nagaya_preview_requests_total{answered_by=\"service\"} 0",
        "nagaya_preview_connections_total 4",
        "nagaya_ssh_connections_open 0",
    ] {
        assert!(told.contains(line), "{line} is missing in\n{told}");
    }

    world.control().terminate_session(wire::TerminateSessionRequest { session_id: id }).await.unwrap();
    assert_eq!(status(&world, "shop.p.example").await, 410);
}

/// Makes a certificate for a name, and files of it.
fn issue(directory: &Path, name: &str) -> (CertificateDer<'static>, TlsConfig) {
    let issued = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    let file = |ending: &str| directory.join(format!("{}.{ending}", name.trim_start_matches("*.")));
    let tls = TlsConfig { certificate_file: file("cert"), key_file: file("key") };
    std::fs::write(&tls.certificate_file, issued.cert.pem()).unwrap();
    std::fs::write(&tls.key_file, issued.signing_key.serialize_pem()).unwrap();
    (issued.cert.der().clone(), tls)
}

#[tokio::test]
async fn the_certificate_follows_the_name_that_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let (own, tls) = issue(directory.path(), "api.example");
    let (wildcard, of_previews) = issue(directory.path(), "*.p.example");
    let world = World::with(|config| {
        config.preview_domain = Some("p.example".into());
        config.tls = Some(tls);
        config.previews.tls = Some(of_previews);
    })
    .await;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(own.clone()).unwrap();
    roots.add(wildcard.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    for (name, expected) in [("api.example", &own), ("shop.p.example", &wildcard)] {
        let stream = TcpStream::connect(world.address()).await.unwrap();
        let stream = connector.connect(ServerName::try_from(name).unwrap(), stream).await.unwrap();
        assert_eq!(stream.get_ref().1.peer_certificates().unwrap()[0], *expected, "{name}");
    }
}
