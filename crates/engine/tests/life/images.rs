//! Images from elsewhere: which one a session stands on, and what keeps it on the host.

use std::sync::{Arc, Mutex};

use nagaya_api::error::Code;
use nagaya_engine::model::{SessionState, SnapshotState};
use nagaya_engine::ports::PullState;
use nagaya_engine::{Fork, NewSession, NewSnapshot};

use crate::support::{World, code, idle};

const APP: &str = "registry.example/app:1";
const FIRST: &str = "sha256:1111";
const SECOND: &str = "sha256:2222";

fn on(image: &str) -> NewSession {
    NewSession { image: Some(image.to_owned()), ..NewSession::default() }
}

/// A world in whose registry `APP` is the first image.
async fn world() -> World {
    let world = World::new().await;
    world.fakes.images.publish(APP, FIRST);
    world
}

impl World {
    async fn digests(&self) -> Vec<String> {
        self.engine.images().await.unwrap().into_iter().map(|image| image.digest.to_string()).collect()
    }

    fn root(&self, id: nagaya_api::ids::SessionId) -> String {
        self.fakes.driver.stands_on(id).unwrap().0.to_string()
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_stands_on_the_image_that_it_was_made_with_whatever_its_name_means_later() {
    let world = world().await;
    let first = world.run(on(APP)).await;
    assert_eq!((first.machine.root.as_str(), first.machine.image.as_str()), (FIRST, APP));
    assert_eq!(world.root(first.id), FIRST);

    world.fakes.images.publish(APP, SECOND);
    world.engine.pull_image(APP, Arc::new(|_| ())).await.unwrap();
    let second = world.run(on(APP)).await;
    assert_eq!(world.root(second.id), SECOND);
    let by_digest = world.run(on(FIRST)).await;
    assert_eq!(world.root(by_digest.id), FIRST);
    let default = world.running().await;
    assert_eq!(world.root(default), "host:fake", "who asks for none gets the server's default");

    // The first image has lost its name, and is needed all the same: by a stopped session, its fork and its snapshot.
    let request = NewSnapshot { wait: true, ..NewSnapshot::default() };
    let snapshot = world.engine.create_snapshot(&world.caller, first.id, request).await.unwrap();
    assert_eq!(snapshot.state, SnapshotState::Ready);
    world.engine.pause_session(&world.caller, first.id).await.unwrap();
    let fork =
        world.engine.fork_session(&world.caller, first.id, Fork { count: 1, name: None }).await.unwrap().remove(0);
    assert_eq!(world.settled(fork.id).await.state, SessionState::Running);
    assert_eq!(world.root(fork.id), FIRST);
    assert_eq!(world.engine.prune_images().await.unwrap().images, 0);
    let world = world.restart(|_| ()).await;
    world.engine.resume_session(&world.caller, first.id).await.unwrap();
    for id in [first.id, fork.id, by_digest.id] {
        world.engine.terminate_session(&world.caller, id).await.unwrap();
    }
    idle().await;
    assert_eq!(world.engine.prune_images().await.unwrap().images, 0, "the snapshot needs it");
    let restored = world.run(NewSession { snapshot_id: Some(snapshot.id), ..NewSession::default() }).await;
    assert_eq!((world.root(restored.id).as_str(), restored.machine.image.as_str()), (FIRST, APP));
    world.engine.terminate_session(&world.caller, restored.id).await.unwrap();
    idle().await;
    world.engine.delete_snapshot(&world.caller, snapshot.id).await.unwrap();
    assert_eq!(world.engine.prune_images().await.unwrap().images, 1, "now nothing needs it");
    assert_eq!(world.digests().await, [SECOND]);
    assert_eq!(world.fakes.driver.violations(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_taken_away_takes_the_image_with_it_unless_a_session_needs_that() {
    let world = world().await;
    let session = world.run(on(APP)).await;
    assert_eq!(world.engine.remove_image(APP).await.unwrap().images, 0);
    assert_eq!(world.digests().await, [FIRST]);
    assert_eq!(world.engine.image(FIRST).await.unwrap().names, [""; 0]);
    assert_eq!(code(world.engine.remove_image(APP).await), Code::RegistryImageNotFound);
    world.engine.terminate_session(&world.caller, session.id).await.unwrap();
    idle().await;
    assert_eq!(world.engine.remove_image(FIRST).await.unwrap().images, 1);
    assert!(world.digests().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_creation_without_its_image_leaves_nothing() {
    let world = world().await;
    for (name, expected) in [
        ("registry.example/other:1", Code::RegistryImageNotFound),
        ("", Code::InvalidArgument),
        ("two words", Code::InvalidArgument),
        (&*"a".repeat(513), Code::InvalidArgument),
    ] {
        assert_eq!(code(world.engine.create_session(&world.caller, on(name)).await), expected, "{name:?}");
    }
    let session = world.running().await;
    let request = NewSnapshot { wait: true, ..NewSnapshot::default() };
    let snapshot = world.engine.create_snapshot(&world.caller, session, request).await.unwrap();
    let both = NewSession { snapshot_id: Some(snapshot.id), ..on(APP) };
    assert_eq!(code(world.engine.create_session(&world.caller, both).await), Code::InvalidArgument);
    assert_eq!(world.fakes.store.all_sessions().len(), 1);
    // An image that went away behind the server's back.
    let gone = world.run(on(APP)).await;
    world.engine.pause_session(&world.caller, gone.id).await.unwrap();
    world.fakes.images.lose(FIRST);
    world.fakes.driver.kill(gone.id, "the host was started again");
    idle().await;
    assert_eq!(code(world.engine.resume_session(&world.caller, gone.id).await), Code::RootUnavailable);
}

#[tokio::test(start_paused = true)]
async fn a_session_is_there_while_its_image_is_fetched_and_ends_with_the_reason_where_that_fails() {
    let world = world().await;
    world.fakes.images.refuse_next(nagaya_api::error::Error::new(Code::ImageUnavailable, "the registry is silent"));
    let failed = world.engine.create_session(&world.caller, on(APP)).await.unwrap();
    assert_eq!((failed.state, failed.machine.root.as_str()), (SessionState::Creating, FIRST), "it is known at once");
    let failed = world.settled(failed.id).await;
    assert_eq!(failed.state, SessionState::Terminated);
    assert!(failed.terminal_error.contains("the registry is silent [image_unavailable]"), "{}", failed.terminal_error);
    assert!(world.fakes.driver.sandboxes().is_empty());
    let session = world.run(on(APP)).await;
    assert_eq!(world.root(session.id), FIRST);
    // The registry is not asked for what is here.
    world.fakes.images.refuse_next(Code::ImageUnavailable.into());
    assert_eq!(world.root(world.run(on(APP)).await.id), FIRST);
}

#[tokio::test(start_paused = true)]
async fn pulls_tell_how_far_they_are_and_archives_bring_images() {
    let world = world().await;
    let told: Arc<Mutex<Vec<PullState>>> = Arc::default();
    let seen = told.clone();
    let watcher = Arc::new(move |of: nagaya_engine::ports::PullProgress| seen.lock().unwrap().push(of.state));
    let image = world.engine.pull_image(APP, watcher).await.unwrap();
    assert_eq!((image.digest.as_str(), image.names), (FIRST, vec![APP.to_owned()]));
    assert_eq!(*told.lock().unwrap(), [PullState::Waiting, PullState::Done]);
    let imported = world.engine.import_images(Box::new(SECOND.as_bytes()), Some("own/thing:2")).await.unwrap();
    assert_eq!(imported[0].names, ["own/thing:2"]);
    let session = world.run(on("own/thing:2")).await;
    assert_eq!(world.root(session.id), SECOND);
}
