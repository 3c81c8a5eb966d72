//! What a crash leaves behind, and what the next start makes of it; each at one chosen moment. All moments are the
//! workflows' and the simulation's.

use nagaya_engine::model::{Durability, SnapshotState};
use nagaya_engine::{NewSession, NewSnapshot};

use crate::support::{World, idle};

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
