//! Exposed ports and previews, as clients of the control plane see them. What is behind their URLs is the gateway's.

use connectrpc::ErrorCode;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::get_preview_url_request::Lookup;
use serde_json::json;

use crate::sessions::terminate;
use crate::support::*;

const UNKNOWN: &str = "01980000-0000-7000-8000-000000000000";

fn expose(session_id: &str, port: i32, slug: Option<&str>) -> wire::ExposePortRequest {
    let slug = slug.map(str::to_owned);
    wire::ExposePortRequest { session_id: session_id.into(), port, slug, ..Default::default() }
}

fn list(session_id: &str) -> wire::ListExposedPortsRequest {
    wire::ListExposedPortsRequest { session_id: session_id.into() }
}

fn named(slug: &str) -> wire::CreatePreviewUrlRequest {
    wire::CreatePreviewUrlRequest { slug: slug.into(), ..Default::default() }
}

fn lookup(lookup: Lookup) -> wire::GetPreviewUrlRequest {
    wire::GetPreviewUrlRequest { lookup: Some(lookup) }
}

fn bind(preview_url_id: &str, session_id: &str, port: i32) -> wire::BindPreviewUrlRequest {
    wire::BindPreviewUrlRequest {
        preview_url_id: preview_url_id.into(),
        session_id: session_id.into(),
        port,
        ..Default::default()
    }
}

fn open(session_id: &str, port: i32) -> wire::OpenPreviewRequest {
    wire::OpenPreviewRequest { session_id: session_id.into(), port, ..Default::default() }
}

fn refused<T>(result: Result<T, connectrpc::ConnectError>, expected: ErrorCode, word: &str) {
    let error = result.err().expect("an error");
    assert_eq!(error.code, expected, "{error}");
    assert!(error.message.as_ref().is_some_and(|text| text.contains(word)), "{error} has no {word:?}");
}

#[tokio::test]
async fn a_port_is_exposed_listed_and_unexposed() {
    let world = World::new().await;
    let client = world.control();
    let (id, _) = world.session().await;
    let mut until = expose(&id, 3_000, None);
    until.expires_at = buffa_types::google::protobuf::Timestamp { seconds: 4_000_000_000, ..Default::default() }.into();
    let exposed = client.expose_port(until).await.unwrap();
    assert!(exposed.preview_url.starts_with("http://127.0.0.1:"), "{exposed:?}");
    assert_eq!((exposed.port, exposed.expires_at.seconds), (3_000, 4_000_000_000));
    assert_eq!((&exposed.preview_url_id, &exposed.slug, exposed.host_address.as_str()), (&None, &None, ""));
    let shop = client.expose_port(expose(&id, 80, Some("shop"))).await.unwrap();
    assert!(
        shop.preview_url_id.is_some() && shop.slug.as_deref() == Some("shop") && shop.expires_at.as_option().is_none()
    );
    let listed = client.list_exposed_ports(list(&id)).await.unwrap().ports.clone();
    assert_eq!(listed.iter().map(|of| of.port).collect::<Vec<_>>(), [80, 3_000]);
    assert_eq!(listed[0].preview_url_id, shop.preview_url_id);
    assert_eq!(listed[1].preview_url, exposed.preview_url);
    let unexpose = wire::UnexposePortRequest { session_id: id.clone(), port: 3_000 };
    for _ in 0..2 {
        client.unexpose_port(unexpose.clone()).await.unwrap();
    }
    assert_eq!(client.list_exposed_ports(list(&id)).await.unwrap().ports.len(), 1);

    for port in [i32::MIN, -1, 0, 65_536, i32::MAX] {
        refused(client.expose_port(expose(&id, port, None)).await, ErrorCode::InvalidArgument, "port");
        let unexpose = wire::UnexposePortRequest { session_id: id.clone(), port };
        refused(client.unexpose_port(unexpose).await, ErrorCode::InvalidArgument, "port");
        refused(client.open_preview(open(&id, port)).await, ErrorCode::InvalidArgument, "port");
    }
    refused(client.expose_port(expose(&id, 80, Some("a_b"))).await, ErrorCode::InvalidArgument, "slug");
    refused(client.expose_port(expose("x", 80, None)).await, ErrorCode::InvalidArgument, "session_id");
    refused(client.expose_port(expose(UNKNOWN, 80, None)).await, ErrorCode::NotFound, "session not found");
    refused(client.list_exposed_ports(list(UNKNOWN)).await, ErrorCode::NotFound, "session not found");
    let closed = wire::CreateSessionRequest { allow_inbound: Some(false), ..create() };
    let closed = client.create_session(closed).await.unwrap().session.id.clone();
    let inbound = "inbound access is disabled";
    refused(client.expose_port(expose(&closed, 80, None)).await, ErrorCode::FailedPrecondition, inbound);
    refused(client.open_preview(open(&closed, 80)).await, ErrorCode::FailedPrecondition, inbound);
    client.terminate_session(terminate(&id)).await.unwrap();
    refused(client.expose_port(expose(&id, 80, None)).await, ErrorCode::FailedPrecondition, "terminated");
}

#[tokio::test]
async fn the_port_limit_is_told_in_the_words_that_clients_know() {
    let world = World::with_engine(|config| config.exposed_ports_max = 1).await;
    let client = world.control();
    let (id, _) = world.session().await;
    client.expose_port(expose(&id, 1, None)).await.unwrap();
    let refusal = client.expose_port(expose(&id, 2, None)).await;
    refused(refusal, ErrorCode::ResourceExhausted, "maximum exposed ports");
}

#[tokio::test]
async fn a_preview_url_lives_from_its_creation_to_its_deletion() {
    let world = World::new().await;
    let client = world.control();
    let (id, _) = world.session().await;
    let made = client.create_preview_url(named("shop")).await.unwrap().preview_url;
    assert_eq!((made.slug.as_str(), made.token.as_str(), &made.session_id, made.port), ("shop", "shop", &None, None));
    assert_eq!((&made.project_id, made.owner_id.is_empty()), (&made.workspace_id, false));
    assert!(made.created_at.as_option().is_some() && made.last_accessed_at.as_option().is_none());
    for by in [Lookup::PreviewUrlId(made.id.clone()), Lookup::Slug("shop".into())] {
        assert_eq!(*client.get_preview_url(lookup(by)).await.unwrap().preview_url, *made);
    }
    let bound = client.bind_preview_url(bind(&made.id, &id, 80)).await.unwrap().preview_url;
    assert_eq!((bound.session_id.as_deref(), bound.port), (Some(id.as_str()), Some(80)));
    let listed = client.list_preview_urls(wire::ListPreviewUrlsRequest::default()).await.unwrap();
    assert_eq!(listed.preview_urls, [(*bound).clone()]);
    let unbind = wire::UnbindPreviewUrlRequest { preview_url_id: made.id.clone() };
    assert_eq!(client.unbind_preview_url(unbind).await.unwrap().preview_url.session_id, None);

    refused(client.create_preview_url(named("shop")).await, ErrorCode::AlreadyExists, "slug already in use");
    refused(client.create_preview_url(named("www")).await, ErrorCode::InvalidArgument, "reserved");
    let half = wire::CreatePreviewUrlRequest { port: Some(80), ..named("half") };
    refused(client.create_preview_url(half).await, ErrorCode::InvalidArgument, "together");
    let foreign = wire::CreatePreviewUrlRequest { workspace_id: Some(UNKNOWN.into()), ..named("foreign") };
    refused(client.create_preview_url(foreign).await, ErrorCode::NotFound, "workspace");
    refused(client.get_preview_url(wire::GetPreviewUrlRequest::default()).await, ErrorCode::InvalidArgument, "slug");
    let unknown = lookup(Lookup::PreviewUrlId(UNKNOWN.into()));
    refused(client.get_preview_url(unknown).await, ErrorCode::NotFound, "preview URL not found");
    refused(client.bind_preview_url(bind(UNKNOWN, &id, 80)).await, ErrorCode::NotFound, "preview URL not found");
    refused(client.bind_preview_url(bind(&made.id, UNKNOWN, 80)).await, ErrorCode::NotFound, "session not found");
    refused(client.bind_preview_url(bind(&made.id, &id, 0)).await, ErrorCode::InvalidArgument, "port");
    let delete = wire::DeletePreviewUrlRequest { preview_url_id: made.id.clone() };
    client.delete_preview_url(delete.clone()).await.unwrap();
    refused(client.delete_preview_url(delete).await, ErrorCode::NotFound, "preview URL not found");
}

#[tokio::test]
async fn a_private_preview_is_opened_touched_and_resolved() {
    let world = World::new().await;
    let client = world.control();
    let (id, _) = world.session().await;
    let opened = client.open_preview(open(&id, 7_681)).await.unwrap();
    assert!(opened.preview_url.ends_with(&format!("={}", opened.viewer_token)), "{opened:?}");
    assert!(opened.preview_url.starts_with("http://127.0.0.1:") && opened.expires_at.as_option().is_some());
    let resolve = |token: &str| {
        let (client, token) = (client.clone(), token.to_owned());
        async move { client.resolve_preview_token(wire::ResolvePreviewTokenRequest { token }).await }
    };
    let found = resolve(&opened.viewer_token).await.unwrap();
    assert_eq!((&found.session_id, found.port, found.mode.as_str(), found.is_offline), (&id, 7_681, "private", false));
    let touch = wire::TouchPreviewRequest { preview_token: opened.viewer_token.clone() };
    assert!(client.touch_preview(touch.clone()).await.unwrap().last_accessed_at.as_option().is_some());
    client.create_preview_url(named("shop")).await.unwrap();
    let found = resolve("shop").await.unwrap();
    assert_eq!((found.session_id.as_str(), found.mode.as_str(), found.is_offline), ("", "public", true));
    for bad in ["nvt1.x.y", "no-such-label"] {
        refused(resolve(bad).await, ErrorCode::NotFound, "preview URL not found");
    }
    refused(resolve("").await, ErrorCode::InvalidArgument, "token");
    client.terminate_session(terminate(&id)).await.unwrap();
    soon(async { while client.touch_preview(touch.clone()).await.is_ok() {} }).await;
    refused(client.touch_preview(touch).await, ErrorCode::NotFound, "preview URL not found");
}

#[tokio::test]
async fn plain_json_clients_may_send_what_newer_versions_know() {
    let world = World::new().await;
    let (id, _) = world.session().await;
    let request = json!({
        "sessionId": id, "port": 8080, "slug": "from-json", "projectId": "", "expiresAt": "2096-01-01T00:00:00Z"
    });
    let (status, answer) = world.json("CreatePreviewUrl", request).await;
    assert_eq!((status, &answer["previewUrl"]["slug"]), (200, &json!("from-json")), "{answer}");
    let (status, answer) = world.json("ListPreviewUrls", json!({ "sessionId": id })).await;
    assert_eq!((status, answer["previewUrls"].as_array().map(Vec::len)), (200, Some(1)), "{answer}");
    let (status, answer) = world.json("ExposePort", json!({ "sessionId": id, "port": 8080, "slug": "" })).await;
    assert_eq!((status, answer.get("slug")), (200, None), "{answer}");
}
