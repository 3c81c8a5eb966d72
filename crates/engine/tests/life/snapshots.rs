//! Snapshots, and sessions made from them.

use nagaya_api::error::Code;
use nagaya_api::ids::WorkspaceId;
use nagaya_engine::model::{Durability, Resources, SessionState, Snapshot, SnapshotKind, SnapshotState};
use nagaya_engine::ports::Clock;
use nagaya_engine::{Caller, ListSnapshots, NewSession, NewSnapshot, SnapshotUpdate, WorkspaceSettingsUpdate};

use crate::support::{World, code, idle};

fn taken(wait: bool) -> NewSnapshot {
    NewSnapshot { name: "s".into(), wait, ..NewSnapshot::default() }
}

impl World {
    async fn snapshot(&self, id: nagaya_api::ids::SessionId) -> Snapshot {
        self.engine.create_snapshot(&self.caller, id, taken(true)).await.unwrap()
    }

    async fn from(&self, snapshot: &Snapshot) -> nagaya_engine::model::Session {
        self.run(NewSession { snapshot_id: Some(snapshot.id), ..NewSession::default() }).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_is_the_disk_as_it_was() {
    let world = World::new().await;
    let new = NewSession {
        cpu_millis: Some(1_000),
        memory_bytes: Some(512 << 20),
        disk_bytes: Some(7 << 30),
        env: [("A".into(), "1".into()), ("B".into(), "1".into())].into(),
        ..NewSession::default()
    };
    let source = world.run(new).await.id;
    world.write(source, "/root/log", "one").await;
    let snapshot = world.snapshot(source).await;
    assert_eq!((snapshot.state, snapshot.durability), (SnapshotState::Ready, Durability::Durable));
    assert!(world.fakes.blobs.is_durable(&snapshot.manifest) && snapshot.size_bytes > 0);
    assert_eq!((snapshot.source_stopped_us, world.engine.take_source_stops()), (100, vec![100]));
    assert!(world.engine.take_source_stops().is_empty());
    world.write(source, "/root/log", "two").await;
    world.engine.terminate_session(&world.caller, source).await.unwrap();

    let new = NewSession {
        snapshot_id: Some(snapshot.id),
        memory_bytes: Some(1 << 30),
        env: [("B".into(), "2".into())].into(),
        ..NewSession::default()
    };
    let session = world.run(new).await;
    assert_eq!(session.machine.resources, Resources::of(1, 1_024, 7));
    assert_eq!((session.env["A"].as_str(), session.env["B"].as_str()), ("1", "2"));
    assert_eq!((session.source_snapshot_id, session.source_image_id), (Some(snapshot.id), None));
    assert_eq!(world.read(session.id, "/root/log").await.as_deref(), Some("one"));
    assert!(world.fakes.driver.images_now().is_empty());
}

#[tokio::test(start_paused = true)]
async fn stopped_sessions_can_be_taken_too() {
    let world = World::new().await;
    let [paused, off] = [world.running().await, world.running().await];
    world.write(paused, "/root/log", "p").await;
    world.pause(paused).await;
    world.fakes.driver.power_off(off);
    idle().await;
    let snapshot = world.snapshot(paused).await;
    assert!(world.fakes.driver.is_frozen(paused));
    assert_eq!(world.snapshot(off).await.state, SnapshotState::Ready);
    let session = world.from(&snapshot).await.id;
    assert_eq!(world.read(session, "/root/log").await.as_deref(), Some("p"));
}

#[tokio::test(start_paused = true)]
async fn the_snapshot_of_a_pause_starts_others_while_that_lasts() {
    let world = World::new().await;
    let source = world.running().await;
    world.write(source, "/root/log", "p").await;
    let pause = world.pause(source).await.pause.unwrap();
    let snapshot = world.engine.snapshot(&world.caller, pause.snapshot_id).await.unwrap();
    let session = world.from(&snapshot).await;
    assert_eq!(world.read(session.id, "/root/log").await.as_deref(), Some("p"));
    assert_eq!(code(world.engine.open_snapshot(&world.caller, snapshot.id).await), Code::SnapshotNotReady);
    let update = SnapshotUpdate { name: Some("x".into()), ..SnapshotUpdate::default() };
    assert_eq!(code(world.engine.update_snapshot(&world.caller, snapshot.id, update).await), Code::SnapshotInUse);
    world.resume(source).await;
    let new = NewSession { snapshot_id: Some(snapshot.id), ..NewSession::default() };
    assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::SnapshotNotFound);
}

#[tokio::test(start_paused = true)]
async fn who_does_not_wait_is_answered_when_it_is_recorded() {
    let world = World::new().await;
    let source = world.running().await;
    let created = world.engine.create_snapshot(&world.caller, source, taken(false)).await.unwrap();
    assert_eq!(created.state, SnapshotState::Creating);
    idle().await;
    let ready = world.engine.snapshot(&world.caller, created.id).await.unwrap();
    assert_eq!((ready.state, ready.durability), (SnapshotState::Ready, Durability::Durable));
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_fails_says_why_and_leaves_its_source_as_it_was() {
    let world = World::new().await;
    let source = world.running().await;
    world.fakes.driver.set_full(true);
    let refusal = world.engine.create_snapshot(&world.caller, source, taken(true)).await.unwrap_err();
    assert_eq!((refusal.code, refusal.detail.as_str()), (Code::CapacityUnavailable, "space on the host's disk"));
    world.fakes.driver.set_full(false);
    world.fakes.blobs.set_full(true);
    assert_eq!(code(world.engine.create_snapshot(&world.caller, source, taken(true)).await), Code::CapacityUnavailable);
    world.fakes.blobs.set_full(false);
    idle().await;
    let (failed, _) = world.engine.list_snapshots(&world.caller, ListSnapshots::default()).await.unwrap();
    assert_eq!(failed.len(), 2);
    for snapshot in failed {
        assert_eq!(snapshot.state, SnapshotState::Failed);
        assert_eq!(snapshot.failure_reason, "space on the host's disk");
        let new = NewSession { snapshot_id: Some(snapshot.id), ..NewSession::default() };
        assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::SnapshotNotReady);
        world.engine.delete_snapshot(&world.caller, snapshot.id).await.unwrap();
    }
    assert!(world.fakes.driver.images_now().is_empty() && world.fakes.blobs.stored().is_empty());
    assert_eq!(world.session(source).await.state, SessionState::Running);
    world.snapshot(source).await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_does_not_become_durable_is_usable_and_tried_again() {
    let world = World::new().await;
    let source = world.running().await;
    world.fakes.blobs.set_offline(true);
    let snapshot = world.snapshot(source).await;
    assert_eq!((snapshot.state, snapshot.durability), (SnapshotState::Ready, Durability::PropagationFailed));
    assert_eq!(snapshot.propagation_error, "the durable place does not answer");
    world.from(&snapshot).await;
    let world = world.restart(|fakes| fakes.blobs.set_offline(false)).await;
    let snapshot = world.engine.snapshot(&world.caller, snapshot.id).await.unwrap();
    assert_eq!((snapshot.durability, snapshot.propagation_error.as_str()), (Durability::Durable, ""));
    assert!(snapshot.durable_at.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_in_use_stays_and_one_that_goes_frees_its_space() {
    let world = World::new().await;
    let source = world.running().await;
    world.write(source, "/root/log", "one").await;
    let first = world.snapshot(source).await;
    let same = world.snapshot(source).await;
    world.write(source, "/root/log", "two").await;
    let other = world.snapshot(source).await;
    assert_eq!(first.manifest, same.manifest);
    let user = world.from(&first).await.id;
    let refusal = world.engine.delete_snapshot(&world.caller, first.id).await.unwrap_err();
    assert_eq!(refusal.code, Code::SnapshotInUse);
    world.pause(user).await;
    assert_eq!(code(world.engine.delete_snapshot(&world.caller, first.id).await), Code::SnapshotInUse);
    world.engine.terminate_session(&world.caller, user).await.unwrap();

    let deleted = world.engine.delete_snapshot(&world.caller, first.id).await.unwrap();
    assert_eq!((deleted.id, deleted.state), (first.id, SnapshotState::Deleting));
    assert!(world.fakes.blobs.stored().contains(&same.manifest), "another one needs the same blobs");
    world.engine.delete_snapshot(&world.caller, same.id).await.unwrap();
    assert_eq!(world.fakes.blobs.stored(), [other.manifest]);
    assert_eq!(code(world.engine.snapshot(&world.caller, first.id).await), Code::SnapshotNotFound);
    assert_eq!(code(world.engine.delete_snapshot(&world.caller, first.id).await), Code::SnapshotNotFound);
    let new = NewSession { snapshot_id: Some(first.id), ..NewSession::default() };
    assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::SnapshotNotFound);
}

#[tokio::test(start_paused = true)]
async fn damage_is_named_and_nothing_is_started() {
    let world = World::new().await;
    let source = world.running().await;
    world.write(source, "/root/log", "one").await;
    let corrupt = world.snapshot(source).await;
    world.write(source, "/root/log", "two").await;
    let lost = world.snapshot(source).await;
    world.fakes.blobs.corrupt(&corrupt.manifest);
    world.fakes.blobs.lose(&lost.manifest);
    for (snapshot, what) in [(corrupt, "corrupt"), (lost, "missing")] {
        let new = NewSession { snapshot_id: Some(snapshot.id), ..NewSession::default() };
        let created = world.engine.create_session(&world.caller, new).await.unwrap();
        let ended = world.settled(created.id).await;
        let expected = format!("the snapshot could not be restored: blob {} is {what}", snapshot.manifest);
        assert_eq!((ended.state, ended.terminal_error), (SessionState::Terminated, expected));
        assert_eq!(code(world.engine.open_snapshot(&world.caller, snapshot.id).await), Code::SnapshotDamaged);
    }
    idle().await;
    assert_eq!(world.fakes.driver.sandboxes().len(), 1);
    assert!(world.fakes.driver.images_now().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_image_of_a_snapshot_can_be_read_whole() {
    let world = World::new().await;
    let source = world.running().await;
    world.write(source, "/root/log", "one").await;
    let snapshot = world.snapshot(source).await;
    let mut reader = world.engine.open_snapshot(&world.caller, snapshot.id).await.unwrap();
    let mut read = Vec::new();
    while let Some(chunk) = reader.chunks.recv().await {
        read.extend_from_slice(&chunk.unwrap());
    }
    assert_eq!(read.len() as u64, reader.total_size);
    assert!(String::from_utf8(read).unwrap().contains("one"));
}

#[tokio::test(start_paused = true)]
async fn snapshots_go_when_they_expire_and_nobody_uses_them() {
    let world = World::new().await;
    let update = WorkspaceSettingsUpdate { snapshot_retention_ms: Some(Some(90_000)), ..Default::default() };
    world.engine.update_settings(&world.caller, None, update).await.unwrap();
    let source = world.running().await;
    let now = world.fakes.clock.now();
    let new = NewSnapshot { expires_at: Some(now + 50_000), ..taken(true) };
    let early = world.engine.create_snapshot(&world.caller, source, new.clone()).await.unwrap();
    world.fakes.clock.advance(1);
    let used = world.engine.create_snapshot(&world.caller, source, new).await.unwrap();
    world.fakes.clock.advance(1);
    let late = world.snapshot(source).await;
    world.fakes.clock.advance(1);
    let kept = world.snapshot(source).await;
    let update = SnapshotUpdate { expires_at: Some(None), ..SnapshotUpdate::default() };
    world.engine.update_snapshot(&world.caller, kept.id, update).await.unwrap();
    let user = world.from(&used).await.id;
    let left = async || {
        idle().await;
        let (snapshots, _) = world.engine.list_snapshots(&world.caller, ListSnapshots::default()).await.unwrap();
        let mut left: Vec<_> = snapshots.into_iter().map(|of| of.id).collect();
        left.sort();
        left
    };
    assert_eq!(left().await, [early.id, used.id, late.id, kept.id]);
    world.fakes.clock.advance(50_000);
    assert_eq!(left().await, [used.id, late.id, kept.id]);
    let new = NewSession { snapshot_id: Some(used.id), ..NewSession::default() };
    assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::SnapshotNotFound, "it has expired");
    world.fakes.clock.advance(50_000);
    assert_eq!(left().await, [used.id, kept.id]);
    world.engine.terminate_session(&world.caller, user).await.unwrap();
    assert_eq!(left().await, [kept.id]);
    let bad = NewSnapshot { expires_at: Some(world.fakes.clock.now()), ..taken(true) };
    assert_eq!(code(world.engine.create_snapshot(&world.caller, source, bad).await), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn snapshots_are_listed_changed_limited_and_nobody_elses() {
    let world = World::new().await;
    let update = WorkspaceSettingsUpdate { snapshots_max: Some(Some(3)), ..Default::default() };
    world.engine.update_settings(&world.caller, None, update).await.unwrap();
    let [a, b] = [world.running().await, world.running().await];
    let mut expected = Vec::new();
    for source in [a, b, a] {
        world.fakes.clock.advance(1);
        expected.push(world.snapshot(source).await.id);
    }
    assert_eq!(code(world.engine.create_snapshot(&world.caller, a, taken(true)).await), Code::QuotaExceeded);
    let list = async |list: ListSnapshots| {
        let (page, next) = world.engine.list_snapshots(&world.caller, list).await.unwrap();
        (page.into_iter().map(|of| of.id).collect::<Vec<_>>(), next)
    };
    let (page, next) = list(ListSnapshots { page_size: 2, ..ListSnapshots::default() }).await;
    assert_eq!(page, [expected[2], expected[1]]);
    let (page, next) = list(ListSnapshots { page_size: 2, page_token: next, ..ListSnapshots::default() }).await;
    assert_eq!((page, next.as_str()), (vec![expected[0]], ""));
    assert_eq!(list(ListSnapshots { session_id: Some(b), ..ListSnapshots::default() }).await.0, [expected[1]]);
    assert!(list(ListSnapshots { dangling: true, ..ListSnapshots::default() }).await.0.is_empty());
    world.engine.terminate_session(&world.caller, b).await.unwrap();
    assert_eq!(list(ListSnapshots { dangling: true, ..ListSnapshots::default() }).await.0, [expected[1]]);

    let update = SnapshotUpdate { name: Some("new".into()), tags: Some(vec!["t".into()]), expires_at: None };
    let updated = world.engine.update_snapshot(&world.caller, expected[0], update).await.unwrap();
    assert_eq!((updated.name.as_str(), updated.tags, updated.kind), ("new", vec!["t".into()], SnapshotKind::User));
    for bad in [
        SnapshotUpdate { name: Some("a".repeat(257)), ..SnapshotUpdate::default() },
        SnapshotUpdate { tags: Some(vec![String::new()]), ..SnapshotUpdate::default() },
        SnapshotUpdate { expires_at: Some(Some(1)), ..SnapshotUpdate::default() },
    ] {
        assert_eq!(code(world.engine.update_snapshot(&world.caller, expected[0], bad).await), Code::InvalidArgument);
    }
    let stranger = Caller { workspace_id: WorkspaceId::new(1, [1; 10]), ..world.caller };
    assert_eq!(code(world.engine.snapshot(&stranger, expected[0]).await), Code::SnapshotNotFound);
    assert_eq!(code(world.engine.delete_snapshot(&stranger, expected[0]).await), Code::SnapshotNotFound);
    assert_eq!(code(world.engine.open_snapshot(&stranger, expected[0]).await), Code::SnapshotNotFound);
    let update = SnapshotUpdate::default();
    assert_eq!(code(world.engine.update_snapshot(&stranger, expected[0], update).await), Code::SnapshotNotFound);
    let new = NewSession { snapshot_id: Some(expected[0]), ..NewSession::default() };
    let error = world.engine.create_session(&stranger, new.clone()).await.unwrap_err();
    assert!(matches!(error.code, Code::SnapshotNotFound | Code::WorkspaceNotFound), "{error}");
    let small = NewSession { disk_bytes: Some(5 << 30), ..new };
    assert_eq!(world.run(small).await.machine.resources.disk_gib(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_smaller_disk_than_the_snapshots_is_refused() {
    let world = World::new().await;
    let source = world.run(NewSession { disk_bytes: Some(10 << 30), ..NewSession::default() }).await.id;
    let snapshot_id = Some(world.snapshot(source).await.id);
    let new = |gigabytes: u64| NewSession { snapshot_id, disk_bytes: Some(gigabytes << 30), ..NewSession::default() };
    assert_eq!(code(world.engine.create_session(&world.caller, new(9)).await), Code::InvalidResources);
    assert_eq!(world.run(new(11)).await.machine.resources.disk_gib(), 11);
}
