//! Fetching the disk of a snapshot.

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use nagaya_api::tenki::v1 as wire;

use crate::snapshots::{delete_snapshot, snapshot_of};
use crate::support::*;

/// A snapshot of a sandbox with something on its disk, and the path of its download.
async fn snapshot(world: &World) -> (String, String) {
    let (session_id, data) = world.session().await;
    let request = wire::WriteFileRequest {
        session_id: session_id.clone(),
        path: "large".into(),
        content: vec![7; 300_000].into(),
    };
    data.write_file(wire::SandboxSessionDataPlaneServiceWriteFileRequest { request: request.into() }).await.unwrap();
    let id = world.control().create_snapshot(snapshot_of(&session_id)).await.unwrap().snapshot.id.clone();
    let path = path(world, &id).await;
    (id, path)
}

async fn path(world: &World, id: &str) -> String {
    let request = wire::GetSnapshotDownloadURLRequest { snapshot_id: id.into() };
    let answer = world.control().get_snapshot_download_url(request).await.unwrap();
    assert!(answer.expires_at.is_set());
    answer.url.strip_prefix(&world.url()).expect("the URL leads to this server").to_owned()
}

async fn fetch(world: &World, method: &str, path: &str) -> Response<Bytes> {
    let request = Request::builder().method(method).uri(path).header("host", "x").body(Full::default()).unwrap();
    world.http1(request).await
}

fn error_code(response: &Response<Bytes>) -> String {
    let error: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
    error["code"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_url_alone_fetches_the_whole_disk() {
    let world = World::new().await;
    let (id, path) = snapshot(&world).await;
    let response = fetch(&world, "GET", &path).await;
    assert_eq!(response.status(), 200);
    let length = response.body().len();
    assert!(length > 300_000, "{length}");
    assert_eq!(response.headers()["content-length"], length.to_string());
    assert_eq!(response.headers()["content-type"], "application/octet-stream");
    assert!(response.headers()["content-disposition"].to_str().unwrap().contains(&format!("{id}.ext4")));
    let head = fetch(&world, "HEAD", &path).await;
    assert_eq!(
        (head.status().as_u16(), &head.headers()["content-length"]),
        (200, &response.headers()["content-length"])
    );
    let request = Request::get(format!("{}{path}", world.url())).body(Full::default()).unwrap();
    let second = world.http2(request).await;
    assert_eq!(second.body(), response.body());
}

#[tokio::test]
async fn a_url_that_was_changed_or_is_too_old_is_refused() {
    let world = World::new().await;
    let (id, path) = snapshot(&world).await;
    let (_, token) = path.split_once("token=").unwrap();
    let other = snapshot(&world).await.0;
    let mut forged = token.to_owned().into_bytes();
    forged[12] = if forged[12] == b'A' { b'B' } else { b'A' };
    let forged = String::from_utf8(forged).unwrap();
    for bad in [
        format!("/v1/snapshots/{id}/disk"),
        format!("/v1/snapshots/{id}/disk?token="),
        format!("/v1/snapshots/{id}/disk?token=%00"),
        format!("/v1/snapshots/{id}/disk?token={forged}"),
        format!("/v1/snapshots/{id}/disk?token={}", &token[..token.len() - 4]),
        format!("/v1/snapshots/{other}/disk?token={token}"),
    ] {
        let response = fetch(&world, "GET", &bad).await;
        assert_eq!((response.status().as_u16(), error_code(&response).as_str()), (401, "unauthenticated"), "{bad}");
    }
    let malformed = fetch(&world, "GET", "/v1/snapshots/x/disk?token=y").await;
    assert_eq!((malformed.status().as_u16(), error_code(&malformed).as_str()), (400, "invalid_id"));
    let posted = fetch(&world, "POST", &path).await;
    assert_eq!((posted.status().as_u16(), &posted.headers()["allow"]), (405, &"GET, HEAD".parse().unwrap()));
    assert_eq!(fetch(&world, "GET", &format!("/v1/snapshots/{id}/disk/x")).await.status(), 404);

    let world = World::with(|config| config.limits.download_url_ttl_ms = 1).await;
    let (_, path) = snapshot(&world).await;
    soon(async {
        while fetch(&world, "HEAD", &path).await.status() != 401 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_gone_or_damaged_is_told_before_the_first_byte() {
    let world = World::new().await;
    let (id, path) = snapshot(&world).await;
    world.fakes.blobs.corrupt(&world.fakes.blobs.stored()[0]);
    let damaged = fetch(&world, "GET", &path).await;
    assert!(damaged.status().is_client_error() || damaged.status().is_server_error(), "{}", damaged.status());
    world.control().delete_snapshot(delete_snapshot(&id)).await.unwrap();
    let gone = fetch(&world, "GET", &path).await;
    assert_eq!((gone.status().as_u16(), error_code(&gone).as_str()), (404, "snapshot_not_found"));
}

#[tokio::test]
async fn the_snapshot_of_a_pause_has_no_url() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let paused = client.pause_session(wire::PauseSessionRequest { session_id: id }).await.unwrap().session;
    assert!(!paused.pause_snapshot.raw_image_available);
    let request = wire::GetSnapshotDownloadURLRequest { snapshot_id: paused.pause_snapshot.id.clone() };
    let refused = client.get_snapshot_download_url(request).await.unwrap_err();
    assert_eq!(refused.code, connectrpc::ErrorCode::FailedPrecondition);
}
