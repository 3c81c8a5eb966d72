//! Snapshots, as clients of the control plane see them.

use buffa_types::google::protobuf::Timestamp;
use connectrpc::ErrorCode;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::{SessionState, SnapshotDurabilityState, SnapshotState, SnapshotType};

use crate::life::{metrics, pause};
use crate::sessions::{get, terminate};
use crate::support::*;

const UNKNOWN: &str = "01980000-0000-7000-8000-000000000000";

pub fn snapshot_of(session_id: &str) -> wire::CreateSnapshotRequest {
    wire::CreateSnapshotRequest { session_id: session_id.into(), ..Default::default() }
}

fn get_snapshot(id: &str) -> wire::GetSnapshotRequest {
    wire::GetSnapshotRequest { snapshot_id: id.into() }
}

pub fn delete_snapshot(id: &str) -> wire::DeleteSnapshotRequest {
    wire::DeleteSnapshotRequest { snapshot_id: id.into() }
}

/// A moment from the fake world's clock on.
fn in_seconds(world: &World, seconds: i64) -> Timestamp {
    use nagaya_engine::ports::Clock;
    let now = i64::try_from(world.fakes.clock.now() / 1000).unwrap();
    Timestamp { seconds: now + seconds, ..Default::default() }
}

#[tokio::test]
async fn a_snapshot_is_answered_ready_and_durable() {
    let world = World::new().await;
    let client = world.control();
    let request = wire::CreateSessionRequest {
        cpu_cores: Some(3),
        memory_mb: Some(256),
        disk_size_gb: Some(6),
        env: pairs(&[("KEPT", "yes"), ("OTHER", "1")]),
        ..create()
    };
    let id = client.create_session(request).await.unwrap().session.id.clone();
    let request = wire::CreateSnapshotRequest {
        name: Some("first".into()),
        expires_at: in_seconds(&world, 3_600).into(),
        store_raw_image: Some(true),
        ..snapshot_of(&id)
    };
    let snapshot = client.create_snapshot(request).await.unwrap().snapshot;
    assert_eq!(snapshot.state, SnapshotState::Ready);
    assert_eq!(snapshot.durability_state, SnapshotDurabilityState::Durable);
    assert_eq!(snapshot.r#type, SnapshotType::User);
    assert_eq!((snapshot.name.as_deref(), snapshot.session_id.as_str()), (Some("first"), id.as_str()));
    assert_eq!((snapshot.cpu_cores, snapshot.memory_mb, snapshot.disk_size_gb), (3, 256, 6));
    assert_eq!((snapshot.base_image_id.as_str(), snapshot.restore_mode.as_str()), ("sandbox", "COLD_BOOT"));
    assert!(snapshot.raw_image_available && snapshot.local_ready_at.is_set() && snapshot.expires_at.is_set());
    assert_eq!(*client.get_snapshot(get_snapshot(&snapshot.id)).await.unwrap().snapshot, *snapshot);

    assert!(metrics(&world).await.contains("nagaya_snapshot_source_stopped_seconds_count 1"));

    // What is made from it inherits what it does not say itself.
    let request = wire::CreateSessionRequest {
        snapshot_id: Some(snapshot.id.clone()),
        cpu_cores: Some(1),
        env: pairs(&[("OTHER", "2")]),
        ..create()
    };
    let copy = client.create_session(request).await.unwrap().session;
    assert_eq!(copy.state, SessionState::Running);
    assert_eq!((copy.cpu_cores, copy.memory_mb, copy.disk_size_gb), (1, 256, 6));
    assert_eq!(copy.source_snapshot_id.as_ref(), Some(&snapshot.id));
    assert_eq!(copy.snapshot_id, copy.source_snapshot_id);

    let refused = client.delete_snapshot(delete_snapshot(&snapshot.id)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::FailedPrecondition);
    assert!(refused.message.unwrap().contains("snapshot is in use"));
    client.terminate_session(terminate(&copy.id)).await.unwrap();
    let deleted = client.delete_snapshot(delete_snapshot(&snapshot.id)).await.unwrap().snapshot;
    assert_eq!((&deleted.id, deleted.state.as_known()), (&snapshot.id, Some(SnapshotState::Deleted)));
    let gone = client.get_snapshot(get_snapshot(&snapshot.id)).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::NotFound);
    assert!(gone.message.unwrap().contains("snapshot"));
    let request = wire::CreateSessionRequest { snapshot_id: Some(snapshot.id.clone()), ..create() };
    let restored = client.create_session(request).await.unwrap_err();
    assert_eq!(restored.code, ErrorCode::NotFound);
    assert!(restored.message.unwrap().contains("snapshot"));
}

#[tokio::test]
async fn an_asynchronous_snapshot_becomes_ready() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let request = wire::CreateSnapshotRequest { r#async: true, ..snapshot_of(&id) };
    let snapshot = client.create_snapshot(request).await.unwrap().snapshot;
    soon(async {
        loop {
            let now = client.get_snapshot(get_snapshot(&snapshot.id)).await.unwrap().snapshot;
            if now.durability_state == SnapshotDurabilityState::Durable {
                break assert_eq!(now.state, SnapshotState::Ready);
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_snapshot_that_fails_says_why_and_leaves_the_session_usable() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    world.fakes.driver.set_full(true);
    let error = client.create_snapshot(snapshot_of(&id)).await.unwrap_err();
    world.fakes.driver.set_full(false);
    assert!(error.message.as_ref().is_some_and(|text| text.contains("space")), "{error:?}");
    assert_eq!(client.get_session(get(&id)).await.unwrap().session.state, SessionState::Running);
    assert_eq!(client.create_snapshot(snapshot_of(&id)).await.unwrap().snapshot.state, SnapshotState::Ready);
}

#[tokio::test]
async fn lists_page_under_all_five_names() {
    let world = World::new().await;
    let client = world.control();
    let (first, second) = (world.session().await.0, world.session().await.0);
    for _ in 0..3 {
        client.create_snapshot(snapshot_of(&first)).await.unwrap();
        world.fakes.clock.advance(10);
    }
    client.create_snapshot(snapshot_of(&second)).await.unwrap();
    client.terminate_session(terminate(&second)).await.unwrap();
    let workspace_id = client.who_am_i(Default::default()).await.unwrap().workspaces[0].workspace_id.clone();

    let mut pages = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = wire::ListSnapshotsRequest { page_size: 3, page_token };
        let page = client.list_snapshots(request).await.unwrap();
        pages.push(page.snapshots.len());
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, [3, 1]);
    let request = wire::ListSessionSnapshotsRequest { session_id: first, ..Default::default() };
    assert_eq!(client.list_session_snapshots(request).await.unwrap().snapshots.len(), 3);
    let dangling = client.list_dangling_snapshots(Default::default()).await.unwrap().snapshots;
    assert_eq!(dangling.iter().map(|snapshot| &snapshot.session_id).collect::<Vec<_>>(), [&second]);
    for workspace_id in ["", &workspace_id] {
        let request = wire::ListWorkspaceSnapshotsRequest { workspace_id: workspace_id.into(), ..Default::default() };
        assert_eq!(client.list_workspace_snapshots(request).await.unwrap().snapshots.len(), 4);
    }
    let request = wire::ListProjectSnapshotsRequest { project_id: workspace_id, ..Default::default() };
    assert_eq!(client.list_project_snapshots(request).await.unwrap().snapshots.len(), 4);

    let list = |page_size, page_token: &str| {
        let request = wire::ListSnapshotsRequest { page_size, page_token: page_token.into() };
        let client = client.clone();
        async move { client.list_snapshots(request).await }
    };
    for refused in [list(101, "").await, list(-1, "").await, list(0, "x").await] {
        assert_eq!(code(refused), ErrorCode::InvalidArgument);
    }
    let request = wire::ListSessionSnapshotsRequest { session_id: "x".into(), ..Default::default() };
    assert_eq!(code(client.list_session_snapshots(request).await), ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn updates_change_what_they_name_and_nothing_else() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let request = wire::CreateSnapshotRequest { name: Some("old".into()), ..snapshot_of(&id) };
    let snapshot = client.create_snapshot(request).await.unwrap().snapshot;
    let update = |change: &dyn Fn(&mut wire::UpdateSnapshotRequest)| {
        let mut request = wire::UpdateSnapshotRequest { snapshot_id: snapshot.id.clone(), ..Default::default() };
        change(&mut request);
        let client = client.clone();
        async move { client.update_snapshot(request).await }
    };
    let end = in_seconds(&world, 60);
    let seen = update(&|r| r.name = Some("new".into())).await.unwrap().snapshot;
    assert_eq!((seen.name.as_deref(), seen.tags.len()), (Some("new"), 0));
    let seen = update(&|r| r.tags = vec!["a".into(), "b:1".into()]).await.unwrap().snapshot;
    assert_eq!((seen.name.as_deref(), &seen.tags[..]), (Some("new"), &["a".to_owned(), "b:1".to_owned()][..]));
    let seen = update(&|r| r.expires_at = end.clone().into()).await.unwrap().snapshot;
    assert_eq!((seen.expires_at.seconds, seen.tags.len()), (end.seconds, 2));
    let seen = update(&|r| r.clear_tags = true).await.unwrap().snapshot;
    assert!(seen.tags.is_empty() && seen.expires_at.is_set());
    let seen = update(&|r| r.clear_expires_at = true).await.unwrap().snapshot;
    assert!(seen.expires_at.is_unset());
    type Change<'a> = &'a dyn Fn(&mut wire::UpdateSnapshotRequest);
    let past = in_seconds(&world, -1);
    let refused: [(&str, Change<'_>); 6] = [
        ("name", &|r| r.name = Some("x".repeat(65))),
        ("tags", &|r| r.tags = vec!["Upper".into()]),
        ("tags twice", &|r| (r.tags, r.clear_tags) = (vec!["a".into()], true)),
        ("expiry twice", &|r| (r.expires_at, r.clear_expires_at) = (end.clone().into(), true)),
        ("the past", &|r| r.expires_at = past.clone().into()),
        ("before 1970", &|r| r.expires_at = Timestamp { seconds: -5, ..Default::default() }.into()),
    ];
    for (name, change) in refused {
        assert_eq!(code(update(change).await), ErrorCode::InvalidArgument, "{name}");
    }
    assert_eq!(*client.get_snapshot(get_snapshot(&snapshot.id)).await.unwrap().snapshot, *seen);
}

#[tokio::test]
async fn an_expired_snapshot_is_gone() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let request = wire::CreateSnapshotRequest { expires_at: in_seconds(&world, 60).into(), ..snapshot_of(&id) };
    let snapshot = client.create_snapshot(request).await.unwrap().snapshot;
    world.fakes.clock.advance(61_000);
    let request = || wire::CreateSessionRequest { snapshot_id: Some(snapshot.id.clone()), ..create() };
    let refused = client.create_session(request()).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::NotFound);
    assert!(refused.message.unwrap().contains("snapshot"));
    soon(async {
        while client.get_snapshot(get_snapshot(&snapshot.id)).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(world.fakes.blobs.stored().is_empty(), "its space is free");
}

#[tokio::test]
async fn a_damaged_snapshot_ends_the_session_that_is_made_from_it_and_names_the_part() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let snapshot = client.create_snapshot(snapshot_of(&id)).await.unwrap().snapshot;
    let blob = world.fakes.blobs.stored().remove(0);
    world.fakes.blobs.corrupt(&blob);
    let request = wire::CreateSessionRequest { snapshot_id: Some(snapshot.id.clone()), ..create() };
    let session = client.create_session(request).await.unwrap().session;
    assert_eq!(session.state, SessionState::Terminated);
    assert!(session.terminal_error.contains(&blob), "{}", session.terminal_error);
    assert_eq!(world.fakes.driver.sandboxes().len(), 1, "nothing was started");
}

#[tokio::test]
async fn the_snapshot_of_a_pause_can_be_used_but_not_deleted() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let paused = client.pause_session(pause(&id)).await.unwrap().session;
    let snapshot_id = paused.pause_snapshot_id.clone().unwrap();
    let refused = client.delete_snapshot(delete_snapshot(&snapshot_id)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::FailedPrecondition);
    assert!(refused.message.unwrap().contains("snapshot is in use"));
    let request = wire::CreateSessionRequest { snapshot_id: Some(snapshot_id.clone()), ..create() };
    assert_eq!(client.create_session(request).await.unwrap().session.state, SessionState::Running);
    // Taking a snapshot of a paused session works as of a running one.
    let snapshot = client.create_snapshot(snapshot_of(&id)).await.unwrap().snapshot;
    assert_eq!(snapshot.state, SnapshotState::Ready);
    client.resume_session(wire::ResumeSessionRequest { session_id: id }).await.unwrap();
    assert_eq!(code(client.get_snapshot(get_snapshot(&snapshot_id)).await), ErrorCode::NotFound);
}

#[tokio::test]
async fn requests_against_the_contract_are_refused() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let year_1970 = Timestamp { seconds: 1, ..Default::default() };
    for (name, request) in [
        ("session_id", snapshot_of("x")),
        ("name", wire::CreateSnapshotRequest { name: Some("x".repeat(65)), ..snapshot_of(&id) }),
        ("expires_at", wire::CreateSnapshotRequest { expires_at: year_1970.into(), ..snapshot_of(&id) }),
    ] {
        assert_eq!(code(client.create_snapshot(request).await), ErrorCode::InvalidArgument, "{name}");
    }
    assert_eq!(code(client.create_snapshot(snapshot_of(UNKNOWN)).await), ErrorCode::NotFound);
    for (id, expected) in [("x", ErrorCode::InvalidArgument), (UNKNOWN, ErrorCode::NotFound)] {
        assert_eq!(code(client.get_snapshot(get_snapshot(id)).await), expected);
        assert_eq!(code(client.delete_snapshot(delete_snapshot(id)).await), expected);
        let request = wire::UpdateSnapshotRequest { snapshot_id: id.into(), ..Default::default() };
        assert_eq!(code(client.update_snapshot(request).await), expected);
        let request = wire::GetSnapshotDownloadURLRequest { snapshot_id: id.into() };
        assert_eq!(code(client.get_snapshot_download_url(request).await), expected);
    }
    let snapshot = client.create_snapshot(snapshot_of(&id)).await.unwrap().snapshot;
    let request = wire::CreateSessionRequest { snapshot_id: Some(snapshot.id.clone()), ..create() };
    let smaller = wire::CreateSessionRequest { disk_size_gb: Some(4), ..request };
    assert_eq!(code(client.create_session(smaller).await), ErrorCode::InvalidArgument);
    client.terminate_session(terminate(&id)).await.unwrap();
    let ended = client.create_snapshot(snapshot_of(&id)).await.unwrap_err();
    assert_eq!(ended.code, ErrorCode::FailedPrecondition);
    assert!(ended.message.unwrap().contains("terminated"));
}
