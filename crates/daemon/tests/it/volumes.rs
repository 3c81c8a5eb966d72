//! Volumes, as clients of the control plane see them.

use connectrpc::ErrorCode;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::{SessionState, VolumeState};

use crate::life::pause;
use crate::sessions::{get, terminate};
use crate::support::*;

const UNKNOWN: &str = "01980000-0000-7000-8000-000000000000";
const MIB: i64 = 1 << 20;

fn named(name: &str, size_bytes: i64) -> wire::CreateVolumeRequest {
    wire::CreateVolumeRequest { name: name.into(), size_bytes, ..Default::default() }
}

fn mount(volume_id: &str, path: &str, readonly: bool) -> wire::VolumeMount {
    wire::VolumeMount { volume_id: volume_id.into(), mount_path: path.into(), readonly }
}

fn attach(session_id: &str, mount: wire::VolumeMount) -> wire::AttachVolumeRequest {
    wire::AttachVolumeRequest { session_id: session_id.into(), volume: mount.into() }
}

fn detach(session_id: &str, volume_id: &str, force_detach: bool) -> wire::DetachVolumeRequest {
    wire::DetachVolumeRequest { session_id: session_id.into(), volume_id: volume_id.into(), force_detach }
}

fn delete(id: &str) -> wire::DeleteVolumeRequest {
    wire::DeleteVolumeRequest { volume_id: id.into() }
}

fn get_volume(id: &str) -> wire::GetVolumeRequest {
    wire::GetVolumeRequest { volume_id: id.into() }
}

async fn volume(world: &World) -> String {
    world.control().create_volume(named("data", MIB)).await.unwrap().volume.id.clone()
}

fn refused<T>(result: Result<T, connectrpc::ConnectError>, expected: ErrorCode, word: &str) {
    let error = result.err().expect("an error");
    assert_eq!(error.code, expected, "{error}");
    assert!(error.message.as_ref().is_some_and(|text| text.contains(word)), "{error} has no {word:?}");
}

#[tokio::test]
async fn a_volume_lives_from_its_creation_to_its_deletion() {
    let world = World::new().await;
    let client = world.control();
    let volume = client.create_volume(named("data", MIB)).await.unwrap().volume;
    assert_eq!((volume.name.as_str(), volume.size_bytes), ("data", MIB));
    assert_eq!(volume.state, VolumeState::Available);
    assert!(volume.created_at.starts_with("2026-01-01T00:00:") && volume.created_at.ends_with('Z'), "{volume:?}");
    let found = client.get_volume(get_volume(&volume.id)).await.unwrap();
    assert_eq!(*found.volume, *volume);
    assert!(found.active_attachments.is_empty());

    let update = |change: fn(&mut wire::UpdateVolumeRequest)| {
        let mut request = wire::UpdateVolumeRequest { volume_id: volume.id.clone(), ..Default::default() };
        change(&mut request);
        let client = client.clone();
        async move { client.update_volume(request).await }
    };
    world.fakes.clock.advance(1_000);
    let seen = update(|r| r.name = Some("new".into())).await.unwrap().volume;
    assert_eq!((seen.name.as_str(), seen.tags.len()), ("new", 0));
    assert!(seen.updated_at > volume.updated_at, "{} after {}", seen.updated_at, volume.updated_at);
    let seen = update(|r| r.tags = vec!["a".into()]).await.unwrap().volume;
    assert_eq!((seen.name.as_str(), &seen.tags[..]), ("new", &["a".to_owned()][..]));
    assert!(update(|r| r.clear_tags = true).await.unwrap().volume.tags.is_empty());
    type Change = fn(&mut wire::UpdateVolumeRequest);
    let bad: [(&str, Change); 4] = [
        ("long name", |r| r.name = Some("x".repeat(65))),
        ("empty name", |r| r.name = Some(String::new())),
        ("tag", |r| r.tags = vec!["Upper".into()]),
        ("both", |r| (r.tags, r.clear_tags) = (vec!["a".into()], true)),
    ];
    for (name, change) in bad {
        assert_eq!(code(update(change).await), ErrorCode::InvalidArgument, "{name}");
    }

    let resize = |new_size_bytes| {
        let request = wire::ResizeVolumeRequest { volume_id: volume.id.clone(), new_size_bytes };
        let client = client.clone();
        async move { client.resize_volume(request).await }
    };
    assert_eq!(resize(2 * MIB).await.unwrap().volume.size_bytes, 2 * MIB);
    for size in [MIB, 0, -1, (100 << 30) + 1] {
        assert_eq!(code(resize(size).await), ErrorCode::InvalidArgument, "{size}");
    }
    client.delete_volume(delete(&volume.id)).await.unwrap();
    refused(client.get_volume(get_volume(&volume.id)).await, ErrorCode::NotFound, "volume");
    assert!(world.fakes.driver.volumes_now().is_empty());
}

#[tokio::test]
async fn lists_page_under_both_names() {
    let world = World::new().await;
    let client = world.control();
    for n in 0..4 {
        client.create_volume(named(&format!("v{n}"), MIB)).await.unwrap();
        world.fakes.clock.advance(10);
    }
    let mut pages = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = wire::ListVolumesRequest { page_size: 3, page_token, ..Default::default() };
        let page = client.list_volumes(request).await.unwrap();
        pages.push(page.volumes.iter().map(|volume| volume.name.clone()).collect::<Vec<_>>());
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(pages.concat(), ["v3", "v2", "v1", "v0"]);
    assert_eq!(pages.len(), 2);
    let project_id = client.who_am_i(Default::default()).await.unwrap().workspaces[0].workspace_id.clone();
    let request = wire::ListProjectVolumesRequest { project_id, ..Default::default() };
    assert_eq!(client.list_project_volumes(request).await.unwrap().volumes.len(), 4);
    for (size, token) in [(101, ""), (-1, ""), (0, "x")] {
        let request = wire::ListVolumesRequest { page_size: size, page_token: token.into(), ..Default::default() };
        assert_eq!(code(client.list_volumes(request).await), ErrorCode::InvalidArgument);
    }
    let request = wire::ListVolumesRequest { workspace_id: UNKNOWN.into(), ..Default::default() };
    assert_eq!(code(client.list_volumes(request).await), ErrorCode::NotFound);
    for n in 4..21 {
        client.create_volume(named(&format!("v{n}"), MIB)).await.unwrap();
    }
    let page = client.list_volumes(Default::default()).await.unwrap();
    assert_eq!((page.volumes.len(), page.next_page_token.is_empty()), (20, false), "a page of the default size");
}

#[tokio::test]
async fn an_attached_volume_is_in_use_until_it_is_detached() {
    let world = World::new().await;
    let client = world.control();
    let (id, volume_id) = (world.session().await.0, volume(&world).await);
    let attachment = client.attach_volume(attach(&id, mount(&volume_id, "/data", false))).await.unwrap().attachment;
    assert_eq!((&attachment.volume_id, &attachment.session_id), (&volume_id, &id));
    assert_eq!((attachment.mount_path.as_str(), attachment.state.as_str()), ("/data", "ATTACHED"));
    let session = client.get_session(get(&id)).await.unwrap().session;
    assert_eq!(session.volume_attachments, [(*attachment).clone()]);
    let found = client.get_volume(get_volume(&volume_id)).await.unwrap();
    assert_eq!(found.volume.state, VolumeState::InUse);
    assert_eq!(found.active_attachments, session.volume_attachments);
    let listed = client.list_volumes(Default::default()).await.unwrap().volumes;
    assert_eq!(listed[0].state, VolumeState::InUse);
    refused(client.delete_volume(delete(&volume_id)).await, ErrorCode::FailedPrecondition, "volume is in use");

    world.fakes.driver.set_volume_in_use(volume_id.parse().unwrap(), true);
    let busy = client.detach_volume(detach(&id, &volume_id, false)).await;
    refused(busy, ErrorCode::FailedPrecondition, "volume is in use");
    let session = client.get_session(get(&id)).await.unwrap().session;
    assert_eq!(session.volume_attachments.len(), 1, "it is still there");
    client.detach_volume(detach(&id, &volume_id, true)).await.unwrap();
    assert!(client.get_session(get(&id)).await.unwrap().session.volume_attachments.is_empty());
    let found = client.get_volume(get_volume(&volume_id)).await.unwrap().volume;
    assert_eq!(found.state, VolumeState::Available);
    client.delete_volume(delete(&volume_id)).await.unwrap();
}

#[tokio::test]
async fn one_writer_or_many_readers() {
    let world = World::new().await;
    let client = world.control();
    let volume_id = volume(&world).await;
    let request =
        |readonly| wire::CreateSessionRequest { volumes: vec![mount(&volume_id, "/data", readonly)], ..create() };
    let writer = client.create_session(request(false)).await.unwrap().session;
    assert_eq!(writer.state, SessionState::Running);
    assert_eq!(writer.volume_attachments[0].state, "ATTACHED");
    for readonly in [false, true] {
        let second = client.create_session(request(readonly)).await;
        refused(second, ErrorCode::FailedPrecondition, "volume is in use");
    }
    client.terminate_session(terminate(&writer.id)).await.unwrap();
    // The first reader may come while the writer's last bytes are on their way to the disk.
    let mut readers = 0;
    soon(async {
        while readers < 2 {
            match client.create_session(request(true)).await {
                Ok(_) => readers += 1,
                Err(error) => assert!(error.message.is_some_and(|text| text.contains("volume sync pending"))),
            }
        }
    })
    .await;
    refused(client.create_session(request(false)).await, ErrorCode::FailedPrecondition, "volume is in use");
}

#[tokio::test]
async fn mounts_that_cannot_be_are_refused_and_change_nothing() {
    let world = World::new().await;
    let client = world.control();
    let (id, volume_id, other) = (world.session().await.0, volume(&world).await, volume(&world).await);
    for path in ["/", "", "data", "/a/../b", "/a//b", "/proc/x", "/dev", "/run", "/sys", "/a\0b"] {
        let result = client.attach_volume(attach(&id, mount(&volume_id, path, false))).await;
        assert_eq!(code(result), ErrorCode::InvalidArgument, "{path:?}");
    }
    let without = wire::AttachVolumeRequest { session_id: id.clone(), ..Default::default() };
    assert_eq!(code(client.attach_volume(without).await), ErrorCode::InvalidArgument);
    refused(client.attach_volume(attach(&id, mount(UNKNOWN, "/data", false))).await, ErrorCode::NotFound, "volume");
    let nowhere = client.attach_volume(attach(UNKNOWN, mount(&volume_id, "/data", false))).await;
    refused(nowhere, ErrorCode::NotFound, "session");

    client.attach_volume(attach(&id, mount(&volume_id, "/data", false))).await.unwrap();
    let twice = client.attach_volume(attach(&id, mount(&volume_id, "/other", false))).await;
    refused(twice, ErrorCode::FailedPrecondition, "volume is in use");
    for path in ["/data", "/data/below"] {
        let result = client.attach_volume(attach(&id, mount(&other, path, false))).await;
        assert_eq!(code(result), ErrorCode::InvalidArgument, "{path}");
    }
    client.pause_session(pause(&id)).await.unwrap();
    let paused = client.attach_volume(attach(&id, mount(&other, "/other", false))).await;
    refused(paused, ErrorCode::FailedPrecondition, "state=PAUSED");
    client.terminate_session(terminate(&id)).await.unwrap();
    let ended = client.attach_volume(attach(&id, mount(&other, "/other", false))).await;
    refused(ended, ErrorCode::FailedPrecondition, "terminated");
}

#[tokio::test]
async fn requests_against_the_contract_are_refused() {
    let world = World::new().await;
    let client = world.control();
    for (name, request) in [
        ("no name", named("", MIB)),
        ("long name", named(&"x".repeat(65), MIB)),
        ("too small", named("a", MIB - 1)),
        ("too large", named("a", (100 << 30) + 1)),
        ("negative", named("a", -1)),
        ("workspace", wire::CreateVolumeRequest { workspace_id: "x".into(), ..named("a", MIB) }),
    ] {
        assert_eq!(code(client.create_volume(request).await), ErrorCode::InvalidArgument, "{name}");
    }
    let foreign = wire::CreateVolumeRequest { workspace_id: UNKNOWN.into(), ..named("a", MIB) };
    assert_eq!(code(client.create_volume(foreign).await), ErrorCode::NotFound);
    assert!(world.fakes.driver.volumes_now().is_empty());
    let id = world.session().await.0;
    for (volume_id, expected) in [("x", ErrorCode::InvalidArgument), (UNKNOWN, ErrorCode::NotFound)] {
        assert_eq!(code(client.get_volume(get_volume(volume_id)).await), expected);
        assert_eq!(code(client.delete_volume(delete(volume_id)).await), expected);
        assert_eq!(code(client.detach_volume(detach(&id, volume_id, false)).await), expected);
        let request = wire::ResizeVolumeRequest { volume_id: volume_id.into(), new_size_bytes: 2 * MIB };
        assert_eq!(code(client.resize_volume(request).await), expected);
        let request = wire::UpdateVolumeRequest { volume_id: volume_id.into(), ..Default::default() };
        assert_eq!(code(client.update_volume(request).await), expected);
    }
}

#[tokio::test]
async fn limits_of_the_workspace_are_named() {
    let world = World::new().await;
    let client = world.control();
    let workspace_id = client.who_am_i(Default::default()).await.unwrap().workspaces[0].workspace_id.clone();
    let request = wire::UpdateWorkspaceSandboxSettingsRequest {
        workspace_id,
        max_volumes: Some(1),
        max_total_bytes: Some(3 * MIB),
        ..Default::default()
    };
    client.update_workspace_sandbox_settings(request).await.unwrap();
    let volume_id = volume(&world).await;
    refused(client.create_volume(named("second", MIB)).await, ErrorCode::ResourceExhausted, "volume limit");
    let request = |new_size_bytes| wire::ResizeVolumeRequest { volume_id: volume_id.clone(), new_size_bytes };
    refused(client.resize_volume(request(4 * MIB)).await, ErrorCode::ResourceExhausted, "volume limit");
    assert_eq!(client.resize_volume(request(3 * MIB)).await.unwrap().volume.size_bytes, 3 * MIB);
}
