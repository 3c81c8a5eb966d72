//! Destinations of sessions.

use nagaya_api::error::Code;
use nagaya_engine::model::{Egress, SessionState};
use nagaya_engine::{Fork, NewSession};

use crate::support::{World, code, idle};

fn list(domain: &str) -> Option<Egress> {
    Some(Egress { allow_domains: vec![domain.into()], allow_cidrs: vec!["1.2.3.0/24".into()] })
}

fn with_list(domain: &str) -> NewSession {
    NewSession { outbound: true, egress: list(domain), ..NewSession::default() }
}

#[tokio::test(start_paused = true)]
async fn a_list_is_set_at_birth_and_changed_at_any_time() {
    let world = World::new().await;
    let id = world.run(with_list("A.example.")).await.id;
    assert_eq!(world.session(id).await.machine.egress, list("a.example"));
    assert_eq!(world.fakes.driver.egress(id), list("a.example"));
    let changed = world.engine.set_egress(&world.caller, id, list("b.example")).await.unwrap();
    assert_eq!(changed.machine.egress, list("b.example"));
    assert_eq!(world.fakes.driver.egress(id), list("b.example"));
    world.pause(id).await;
    world.engine.set_egress(&world.caller, id, list("c.example")).await.unwrap();
    assert_eq!(world.fakes.driver.egress(id), list("c.example"));
    world.resume(id).await;
    world.fakes.driver.power_off(id);
    idle().await;
    // There is nothing to set it on, until it boots.
    world.engine.set_egress(&world.caller, id, None).await.unwrap();
    world.resume(id).await;
    assert_eq!((world.session(id).await.machine.egress, world.fakes.driver.egress(id)), (None, None));
}

#[tokio::test(start_paused = true)]
async fn forks_and_sessions_from_snapshots_inherit_it() {
    let world = World::new().await;
    let id = world.run(with_list("a.example")).await.id;
    let fork = world.engine.fork_session(&world.caller, id, Fork { count: 1, name: None }).await.unwrap()[0].id;
    assert_eq!(world.settled(fork).await.state, SessionState::Running);
    let snapshot_id = world.pause(id).await.pause.map(|pause| pause.snapshot_id);
    let from = NewSession { outbound: true, snapshot_id, ..NewSession::default() };
    let copy = world.run(from.clone()).await.id;
    for id in [fork, copy] {
        assert_eq!(world.fakes.driver.egress(id), list("a.example"));
    }
    let other = world.run(NewSession { egress: list("b.example"), ..from }).await.id;
    assert_eq!(world.fakes.driver.egress(other), list("b.example"));
}

#[tokio::test(start_paused = true)]
async fn what_the_record_says_is_set_again_after_a_restart() {
    let world = World::new().await;
    let id = world.run(with_list("a.example")).await.id;
    // As when the server is killed between recording and setting.
    let world = world.restart(|fakes| fakes.driver.lose_egress(id)).await;
    assert_eq!(world.fakes.driver.egress(id), list("a.example"));
    assert_eq!(world.session(id).await.machine.egress, list("a.example"));
}

#[tokio::test(start_paused = true)]
async fn bad_lists_and_ended_sessions_are_refused() {
    let world = World::new().await;
    let id = world.run(with_list("a.example")).await.id;
    let bad = Some(Egress { allow_domains: vec!["*".into()], allow_cidrs: Vec::new() });
    assert_eq!(code(world.engine.set_egress(&world.caller, id, bad.clone()).await), Code::InvalidArgument);
    let new = NewSession { outbound: true, egress: bad, ..NewSession::default() };
    assert_eq!(code(world.engine.create_session(&world.caller, new).await), Code::InvalidArgument);
    assert_eq!(world.session(id).await.machine.egress, list("a.example"));
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    assert_eq!(code(world.engine.set_egress(&world.caller, id, None).await), Code::SessionTerminated);
    assert_eq!(code(world.engine.connections(&world.caller, id).await), Code::SessionTerminated);
}
