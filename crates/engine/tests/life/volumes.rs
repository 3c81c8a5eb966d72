//! Volumes, and who has them.

use nagaya_api::error::Code;
use nagaya_api::ids::{VolumeId, WorkspaceId};
use nagaya_engine::model::{AttachmentState, SessionState, VolumeState};
use nagaya_engine::ports::Clock;
use nagaya_engine::{Caller, ListVolumes, NewMount, NewSession, NewVolume, VolumeUpdate, WorkspaceSettingsUpdate};

use crate::support::{MIB, World, code, idle, mount};

fn readonly(volume_id: VolumeId, path: &str) -> NewMount {
    NewMount { readonly: true, ..mount(volume_id, path) }
}

#[tokio::test(start_paused = true)]
async fn what_is_written_to_a_volume_is_there_for_the_next_who_has_it() {
    let world = World::new().await;
    let volume = world.volume().await;
    assert_eq!((volume.state, volume.size_bytes), (VolumeState::Available, MIB));
    let [a, b] = [world.running().await, world.running().await];
    world.attach(a, volume.id, "/data").await;
    world.write(a, "/data/log", "from a").await;
    let attachment = world.session(a).await.attachments[0].clone();
    assert_eq!((attachment.state, attachment.mount_path.as_str()), (AttachmentState::Attached, "/data"));
    let (_, holders) = world.engine.volume(&world.caller, volume.id).await.unwrap();
    assert_eq!(holders, [(a, attachment)]);
    world.engine.detach_volume(&world.caller, a, volume.id, false).await.unwrap();
    assert!(world.session(a).await.attachments.is_empty());
    assert_eq!(world.read(a, "/data/log").await, None);
    world.attach(b, volume.id, "/elsewhere").await;
    assert_eq!(world.read(b, "/elsewhere/log").await.as_deref(), Some("from a"));
    world.engine.terminate_session(&world.caller, b).await.unwrap();
    let new = NewSession { mounts: vec![mount(volume.id, "/home/user/data")], ..NewSession::default() };
    let c = world.run(new).await;
    assert_eq!(c.attachments[0].state, AttachmentState::Attached);
    assert_eq!(world.read(c.id, "/home/user/data/log").await.as_deref(), Some("from a"));
}

#[tokio::test(start_paused = true)]
async fn one_writer_or_many_readers() {
    let world = World::new().await;
    let volume = world.volume().await.id;
    let [a, b, c] = [world.running().await, world.running().await, world.running().await];
    let attach = async |id, mount| world.engine.attach_volume(&world.caller, id, mount).await;
    attach(a, readonly(volume, "/data")).await.unwrap();
    attach(b, readonly(volume, "/data")).await.unwrap();
    assert_eq!(code(attach(c, mount(volume, "/data")).await), Code::VolumeInUse);
    assert_eq!(code(attach(a, readonly(volume, "/other")).await), Code::VolumeInUse, "twice in one session");
    assert_eq!(code(world.engine.delete_volume(&world.caller, volume).await), Code::VolumeInUse);
    world.engine.detach_volume(&world.caller, a, volume, false).await.unwrap();
    world.engine.detach_volume(&world.caller, b, volume, false).await.unwrap();
    attach(c, mount(volume, "/data")).await.unwrap();
    assert_eq!(code(attach(a, readonly(volume, "/data")).await), Code::VolumeInUse);
    let new = NewSession { mounts: vec![mount(volume, "/data")], ..NewSession::default() };
    assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::VolumeInUse);
    assert_eq!(world.active().await, 3);
    world.pause(c).await;
    assert_eq!(code(attach(a, mount(volume, "/data")).await), Code::VolumeInUse, "a paused session keeps it");
}

#[tokio::test(start_paused = true)]
async fn bad_places_and_sessions_are_refused() {
    let world = World::new().await;
    let [volume, other] = [world.volume().await.id, world.volume().await.id];
    let id = world.running().await;
    let attach = async |id, mount| world.engine.attach_volume(&world.caller, id, mount).await;
    for bad in ["/", "data", "/a/../b", "/proc/x", "/dev", "", "/a//b"] {
        assert_eq!(code(attach(id, mount(volume, bad)).await), Code::PathRefused, "{bad}");
        let new = NewSession { mounts: vec![mount(volume, bad)], ..NewSession::default() };
        assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::PathRefused, "{bad}");
    }
    attach(id, mount(volume, "/data")).await.unwrap();
    for taken in ["/data", "/data/below"] {
        assert_eq!(code(attach(id, mount(other, taken)).await), Code::PathRefused, "{taken}");
    }
    let unknown = VolumeId::new(1, [1; 10]);
    assert_eq!(code(attach(id, mount(unknown, "/x")).await), Code::VolumeNotFound);
    assert_eq!(code(world.engine.detach_volume(&world.caller, id, other, false).await), Code::VolumeNotFound);
    let stranger = Caller { workspace_id: WorkspaceId::new(1, [1; 10]), ..world.caller };
    assert_eq!(code(world.engine.volume(&stranger, volume).await), Code::VolumeNotFound);
    assert_eq!(code(world.engine.delete_volume(&stranger, other).await), Code::VolumeNotFound);
    assert_eq!(code(world.engine.resize_volume(&stranger, other, 2 * MIB).await), Code::VolumeNotFound);
    world.pause(id).await;
    assert_eq!(code(attach(id, mount(other, "/x")).await), Code::SessionNotRunning);
    assert_eq!(code(world.engine.detach_volume(&world.caller, id, volume, false).await), Code::SessionNotRunning);
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    assert_eq!(code(attach(id, mount(other, "/x")).await), Code::SessionTerminated);
}

#[tokio::test(start_paused = true)]
async fn a_volume_in_use_inside_is_detached_by_force_only() {
    let world = World::new().await;
    let volume = world.volume().await.id;
    let id = world.running().await;
    world.attach(id, volume, "/data").await;
    world.fakes.driver.set_volume_in_use(volume, true);
    assert_eq!(code(world.engine.detach_volume(&world.caller, id, volume, false).await), Code::VolumeBusy);
    assert_eq!(world.session(id).await.attachments[0].state, AttachmentState::Attached);
    world.engine.detach_volume(&world.caller, id, volume, true).await.unwrap();
    assert!(world.fakes.driver.volumes_now()[&volume].mounts.is_empty());
}

#[tokio::test(start_paused = true)]
async fn volumes_of_a_paused_session_wait_for_it() {
    let world = World::new().await;
    let volume = world.volume().await.id;
    let id = world.running().await;
    world.attach(id, volume, "/data").await;
    world.write(id, "/data/log", "kept").await;
    world.pause(id).await;
    world.resume(id).await;
    assert_eq!(world.read(id, "/data/log").await.as_deref(), Some("kept"));
    world.fakes.driver.kill(id, "killed");
    idle().await;
    let stopped = world.session(id).await;
    assert_eq!(stopped.attachments[0].state, AttachmentState::Attaching);
    assert!(world.fakes.driver.volumes_now()[&volume].mounts.is_empty(), "it is written back");
    let resumed = world.resume(id).await;
    assert_eq!(resumed.attachments[0].state, AttachmentState::Attached);
    assert_eq!(world.read(id, "/data/log").await.as_deref(), Some("kept"));
    let world = world.restart(|fakes| fakes.driver.restart_host()).await;
    world.resume(id).await;
    assert_eq!(world.read(id, "/data/log").await.as_deref(), Some("kept"));
}

#[tokio::test(start_paused = true)]
async fn volumes_grow_and_never_shrink() {
    let world = World::new().await;
    let volume = world.volume().await.id;
    let id = world.running().await;
    world.attach(id, volume, "/data").await;
    let resize = async |size| world.engine.resize_volume(&world.caller, volume, size).await;
    let grown = resize(4 * MIB).await.unwrap();
    assert_eq!((grown.size_bytes, grown.growing_to_bytes), (4 * MIB, None));
    assert_eq!(world.fakes.driver.volumes_now()[&volume].size_bytes, 4 * MIB);
    assert_eq!(resize(4 * MIB).await.unwrap().size_bytes, 4 * MIB);
    assert_eq!(code(resize(3 * MIB).await), Code::InvalidArgument);
    assert_eq!(code(resize(65 << 40).await), Code::InvalidArgument);
    world.fakes.driver.set_full(true);
    assert_eq!(code(resize(8 * MIB).await), Code::CapacityUnavailable);
    world.fakes.driver.set_full(false);
    let (kept, _) = world.engine.volume(&world.caller, volume).await.unwrap();
    assert_eq!((kept.size_bytes, kept.growing_to_bytes), (4 * MIB, None));
    world.engine.detach_volume(&world.caller, id, volume, false).await.unwrap();
    world.engine.attach_volume(&world.caller, id, readonly(volume, "/data")).await.unwrap();
    assert_eq!(code(resize(8 * MIB).await), Code::VolumeBusy);
}

#[tokio::test(start_paused = true)]
async fn a_growth_that_failed_after_it_was_done_is_recorded_as_done() {
    let world = World::new().await;
    let mut grown_and_failed = 0;
    for effects in 0..10 {
        let volume = world.volume().await.id;
        // Done twice, as after a crash; the second time may fail.
        world.fakes.faults.repeat(true);
        world.fakes.faults.fail_after(effects);
        let answer = world.engine.resize_volume(&world.caller, volume, 4 * MIB).await;
        world.fakes.faults.repeat(false);
        world.fakes.faults.recover();
        let made = world.fakes.driver.volumes_now()[&volume].size_bytes;
        let (recorded, _) = world.engine.volume(&world.caller, volume).await.unwrap();
        assert_eq!((recorded.size_bytes, recorded.growing_to_bytes), (made, None), "after {effects} effects");
        grown_and_failed += usize::from(answer.is_err() && made == 4 * MIB);
        world.engine.delete_volume(&world.caller, volume).await.unwrap();
    }
    assert!(grown_and_failed > 0);
}

#[tokio::test(start_paused = true)]
async fn workspaces_have_limits_of_volumes_and_bytes() {
    let world = World::new().await;
    let update = WorkspaceSettingsUpdate {
        volumes_max: Some(Some(2)),
        bytes_max: Some(Some(4 * MIB)),
        ..WorkspaceSettingsUpdate::default()
    };
    world.engine.update_settings(&world.caller, None, update).await.unwrap();
    let create = async |size_bytes| {
        let new = NewVolume { size_bytes, ..NewVolume::default() };
        world.engine.create_volume(&world.caller, new).await
    };
    assert_eq!(code(create(5 * MIB).await), Code::VolumeLimit);
    let first = create(MIB).await.unwrap().id;
    create(MIB).await.unwrap();
    assert_eq!(code(create(MIB).await), Code::VolumeLimit);
    assert_eq!(code(world.engine.resize_volume(&world.caller, first, 4 * MIB).await), Code::VolumeLimit);
    world.engine.resize_volume(&world.caller, first, 3 * MIB).await.unwrap();
    world.engine.delete_volume(&world.caller, first).await.unwrap();
    create(MIB).await.unwrap();
    for bad in [0, (64 << 40) + 1] {
        assert_eq!(code(create(bad).await), Code::InvalidArgument);
    }
    let zero = WorkspaceSettingsUpdate { volumes_max: Some(Some(0)), ..WorkspaceSettingsUpdate::default() };
    assert_eq!(code(world.engine.update_settings(&world.caller, None, zero).await), Code::InvalidArgument);
    let none = WorkspaceSettingsUpdate { volumes_max: Some(None), ..WorkspaceSettingsUpdate::default() };
    let (_, settings) = world.engine.update_settings(&world.caller, None, none).await.unwrap();
    assert_eq!((settings.volumes_max, settings.bytes_max), (None, Some(4 * MIB)));
    create(MIB).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_cannot_be_made_is_not_there() {
    let world = World::new().await;
    world.fakes.driver.set_full(true);
    let new = NewVolume { size_bytes: MIB, ..NewVolume::default() };
    assert_eq!(code(world.engine.create_volume(&world.caller, new).await), Code::CapacityUnavailable);
    idle().await;
    assert!(world.fakes.store.volumes_now().is_empty() && world.fakes.driver.volumes_now().is_empty());
}

#[tokio::test(start_paused = true)]
async fn volumes_are_listed_and_changed() {
    let world = World::new().await;
    let mut expected = Vec::new();
    for _ in 0..3 {
        world.fakes.clock.advance(1);
        expected.push(world.volume().await.id);
    }
    let id = world.running().await;
    world.attach(id, expected[1], "/data").await;
    let list = async |page_token| {
        let list = ListVolumes { page_size: 2, page_token, ..ListVolumes::default() };
        let (page, next) = world.engine.list_volumes(&world.caller, list).await.unwrap();
        (page.into_iter().map(|(volume, attached)| (volume.id, attached)).collect::<Vec<_>>(), next)
    };
    let (page, next) = list(String::new()).await;
    assert_eq!(page, [(expected[2], false), (expected[1], true)]);
    assert_eq!(list(next).await, (vec![(expected[0], false)], String::new()));
    let before = world.fakes.clock.now();
    world.fakes.clock.advance(1_000);
    let update = VolumeUpdate { name: Some("new".into()), tags: Some(vec!["t".into()]) };
    let updated = world.engine.update_volume(&world.caller, expected[0], update).await.unwrap();
    assert_eq!((updated.name.as_str(), updated.tags), ("new", vec!["t".into()]));
    assert!(updated.updated_at > before);
    world.engine.delete_volume(&world.caller, expected[0]).await.unwrap();
    assert_eq!(code(world.engine.volume(&world.caller, expected[0]).await), Code::VolumeNotFound);
    assert_eq!(code(world.engine.delete_volume(&world.caller, expected[0]).await), Code::VolumeNotFound);
}

#[tokio::test(start_paused = true)]
async fn a_session_that_cannot_have_its_volumes_does_not_start() {
    let world = World::new().await;
    let volume = world.volume().await.id;
    let missing = VolumeId::new(1, [1; 10]);
    let new = NewSession { mounts: vec![mount(volume, "/a"), mount(missing, "/b")], ..NewSession::default() };
    assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::VolumeNotFound);
    let new = NewSession { mounts: vec![mount(volume, "/a"), mount(volume, "/b")], ..NewSession::default() };
    assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::VolumeInUse);
    let id = world.run(NewSession { mounts: vec![mount(volume, "/a")], ..NewSession::default() }).await.id;
    assert_eq!(world.session(id).await.state, SessionState::Running, "nothing was kept by those refused");
}
