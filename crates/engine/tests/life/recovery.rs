//! What a crash leaves behind, and what the next start makes of it; each at one chosen moment. All moments are the
//! workflows' and the simulation's.

use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_api::ids::{SessionId, VolumeId};
use nagaya_engine::fake::Fakes;
use nagaya_engine::model::{DiskOrigin, Durability, Resources, SandboxSpec, SessionState, SnapshotState};
use nagaya_engine::ports::{Driver, Host};
use nagaya_engine::{NewSession, NewSnapshot};

use crate::support::{MIB, World, code, idle};

#[tokio::test(start_paused = true)]
async fn a_snapshot_taken_before_a_restart_can_be_used_after_it() {
    let world = World::new().await;
    let source = world.running().await;
    world.write(source, "/root/log", "one").await;
    let new = NewSnapshot { wait: true, ..NewSnapshot::default() };
    let snapshot = world.engine.create_snapshot(&world.caller, source, new).await.unwrap();
    let world = world.restart(|fakes| fakes.driver.restart_host()).await;
    let kept = world.engine.snapshot(&world.caller, snapshot.id).await.unwrap();
    assert_eq!((kept.state, kept.durability), (SnapshotState::Ready, Durability::Durable));
    let session = world.run(NewSession { snapshot_id: Some(snapshot.id), ..NewSession::default() }).await;
    assert_eq!(world.read(session.id, "/root/log").await.as_deref(), Some("one"));
}

#[tokio::test(start_paused = true)]
async fn volumes_keep_their_holders_over_a_restart() {
    let world = World::new().await;
    let volume = world.volume().await.id;
    let id = world.running().await;
    world.attach(id, volume, "/data").await;
    let world = world.restart(|_| ()).await;
    assert!(world.engine.delete_volume(&world.caller, volume).await.is_err());
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    world.engine.delete_volume(&world.caller, volume).await.unwrap();
    idle().await;
    assert!(world.fakes.driver.volumes_now().is_empty());
}

/// What a driver is told of a new sandbox.
async fn fresh(fakes: &Fakes) -> SandboxSpec {
    SandboxSpec {
        resources: Resources::of(1, 128, 5),
        root: fakes.driver.root(&fakes.driver.default_root()).await.unwrap(),
        disk: DiskOrigin::Fresh,
        memory: None,
        outbound: false,
        egress: None,
    }
}

/// A sandbox and a volume of which no record says anything.
async fn strangers(fakes: &Fakes) -> (SessionId, VolumeId) {
    let (session, volume) = (SessionId::new(1, [7; 10]), VolumeId::new(1, [7; 10]));
    fakes.driver.start(session, &fresh(fakes).await).await.unwrap();
    fakes.driver.create_volume(volume, MIB).await.unwrap();
    (session, volume)
}

#[tokio::test(start_paused = true)]
async fn nothing_is_removed_because_no_record_names_it_unless_that_is_asked_for() {
    let world = World::new().await;
    let ended = world.running().await;
    world.engine.terminate_session(&world.caller, ended).await.unwrap();
    idle().await;
    let (session, volume) = strangers(&world.fakes).await;
    let mut world = world.restart(|_| ()).await;
    assert!(world.fakes.driver.sandboxes().contains_key(&session));
    assert!(world.fakes.driver.volumes_now().contains_key(&volume));
    world.config.discard_unrecorded = true;
    let world = world.restart(|_| ()).await;
    idle().await;
    assert!(world.fakes.driver.sandboxes().is_empty());
    assert!(world.fakes.driver.volumes_now().is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_recorded_as_ended_is_removed_as_ever() {
    let world = World::new().await;
    let id = world.running().await;
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    idle().await;
    world.fakes.driver.start(id, &fresh(&world.fakes).await).await.unwrap();
    let world = world.restart(|_| ()).await;
    assert!(world.fakes.driver.sandboxes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn whoever_needs_the_driver_of_a_sandbox_that_does_not_answer_is_told_and_can_end_it() {
    let world = World::new().await;
    let id = world.running().await;
    let world = world.restart(|fakes| fakes.driver.set_unreachable(true)).await;
    assert_eq!(code(world.engine.pause_session(&world.caller, id).await), Code::GuestUnreachable);
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    idle().await;
    assert!(world.fakes.driver.sandboxes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_session_does_not_wait_for_ever_for_what_its_driver_is_at() {
    let world = World::new().await;
    world.fakes.driver.hold_creates(true);
    let id = world.engine.create_session(&world.caller, NewSession::default()).await.unwrap().id;
    idle().await;
    let begin = tokio::time::Instant::now();
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    let limit = Duration::from_millis(world.config.step_timeout_ms);
    assert!(begin.elapsed() >= limit && begin.elapsed() < 2 * limit, "{:?}", begin.elapsed());
    // What the late step makes is removed when it is made.
    world.fakes.driver.hold_creates(false);
    idle().await;
    assert!(world.fakes.driver.sandboxes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_session_can_be_ended_when_there_is_no_space_to_record_it_since_it_takes_space_itself() {
    let world = World::new().await;
    let id = world.running().await;
    world.fakes.store.set_full(true);
    let (engine, caller) = (world.engine.clone(), world.caller);
    let ending = tokio::spawn(async move { engine.terminate_session(&caller, id).await });
    idle().await;
    assert!(world.fakes.driver.sandboxes().is_empty(), "what it holds is free before its end is recorded");
    // A server that is killed now finds the record of a session that runs, and nothing of it.
    world.fakes.store.set_full(false);
    let _told = ending.await.unwrap();
    assert_eq!(world.settled(id).await.state, SessionState::Terminated);
    let world = world.restart(|_| ()).await;
    assert_eq!(world.session(id).await.state, SessionState::Terminated);
}
