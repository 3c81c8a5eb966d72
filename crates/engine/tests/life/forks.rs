//! Forks.

use nagaya_api::error::Code;
use nagaya_engine::model::SessionState;
use nagaya_engine::{EngineConfig, Fork, NewSession};

use crate::support::{World, code, idle};

fn fork(count: u32) -> Fork {
    Fork { count, name: None }
}

#[tokio::test(start_paused = true)]
async fn forks_have_their_parents_disk_and_an_identity_of_their_own() {
    let world = World::new().await;
    let new = NewSession {
        name: "parent".into(),
        cpu_millis: Some(3_000),
        env: [("A".into(), "1".into())].into(),
        metadata: [("m".into(), "1".into())].into(),
        tags: vec!["t".into()],
        sticky: true,
        ..NewSession::default()
    };
    let parent = world.run(new).await;
    world.write(parent.id, "/root/log", "before").await;
    world.pause(parent.id).await;
    world.resume(parent.id).await;
    let forks = world.engine.fork_session(&world.caller, parent.id, fork(3)).await.unwrap();
    world.write(parent.id, "/root/log", "after").await;
    let names: Vec<_> = forks.iter().map(|fork| fork.name.as_str()).collect();
    assert_eq!(names, ["parent-fork-1", "parent-fork-2", "parent-fork-3"]);
    for created in forks {
        assert_eq!(created.state, SessionState::Creating);
        let session = world.settled(created.id).await;
        assert_eq!((session.state, session.sticky), (SessionState::Running, false));
        assert_eq!((session.machine.resources.cpus(), session.env["A"].as_str()), (3, "1"));
        assert_eq!(session.metadata, [("m".to_owned(), "1".to_owned())].into());
        assert_eq!((session.tags.as_slice(), session.source_image_id), (["t".to_owned()].as_slice(), None));
        assert_eq!(world.read(session.id, "/root/log").await.as_deref(), Some("before"));
    }
    assert!(world.fakes.driver.images_now().is_empty());
}

#[tokio::test(start_paused = true)]
async fn stopped_sessions_can_be_forked_without_waking_them() {
    let world = World::new().await;
    let [paused, off] = [world.running().await, world.running().await];
    world.pause(paused).await;
    world.fakes.driver.power_off(off);
    idle().await;
    for id in [paused, off] {
        let forks = world.engine.fork_session(&world.caller, id, fork(1)).await.unwrap();
        assert_eq!(world.settled(forks[0].id).await.state, SessionState::Running);
    }
    assert!(world.fakes.driver.is_frozen(paused));
}

#[tokio::test(start_paused = true)]
async fn all_forks_or_none() {
    let world = World::with(EngineConfig { sessions_max: 3, forks_max: 5, ..EngineConfig::default() }).await;
    let id = world.running().await;
    assert_eq!(code(world.engine.fork_session(&world.caller, id, fork(3)).await), Code::CapacityUnavailable);
    assert_eq!(code(world.engine.fork_session(&world.caller, id, fork(0)).await), Code::InvalidArgument);
    assert_eq!(code(world.engine.fork_session(&world.caller, id, fork(6)).await), Code::InvalidArgument);
    world.fakes.driver.set_full(true);
    assert_eq!(code(world.engine.fork_session(&world.caller, id, fork(2)).await), Code::CapacityUnavailable);
    world.fakes.driver.set_full(false);
    idle().await;
    assert_eq!((world.active().await, world.fakes.store.all_sessions().len()), (1, 1));
    assert!(world.fakes.driver.images_now().is_empty());
    assert_eq!(world.engine.fork_session(&world.caller, id, fork(2)).await.unwrap().len(), 2);
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    assert_eq!(code(world.engine.fork_session(&world.caller, id, fork(1)).await), Code::SessionTerminated);
}

#[tokio::test(start_paused = true)]
async fn a_fork_that_cannot_be_created_leaves_no_image() {
    let world = World::new().await;
    let id = world.running().await;
    world.fakes.driver.hold_creates(true);
    let forks = world.engine.fork_session(&world.caller, id, fork(2)).await.unwrap();
    let ending = tokio::spawn({
        let (engine, caller, first) = (world.engine.clone(), world.caller, forks[0].id);
        async move { engine.terminate_session(&caller, first).await }
    });
    idle().await;
    world.fakes.driver.hold_creates(false);
    ending.await.unwrap().unwrap();
    assert_eq!(world.settled(forks[1].id).await.state, SessionState::Running);
    assert!(world.fakes.driver.images_now().is_empty());
}
