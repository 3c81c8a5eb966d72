//! Several drivers and several images in one server.

use std::collections::BTreeMap;
use std::sync::Arc;

use nagaya_api::error::Code;
use nagaya_engine::fake::{FAKE_DRIVER, Fakes};
use nagaya_engine::model::{DiskOrigin, ImageDigest, SandboxSpec, SessionState};
use nagaya_engine::ports::{Driver, DriverError, Drivers, Host, Ports};
use nagaya_engine::{Fork, NewSession, NewSnapshot};

use crate::support::{World, code, idle};

const OTHER: &str = "other";

/// A host with two drivers, of which the second one is the default.
fn two_drivers(fakes: &Fakes) -> Ports {
    let drivers: BTreeMap<String, Arc<dyn Driver>> = [
        (FAKE_DRIVER.to_owned(), fakes.driver.clone() as Arc<dyn Driver>),
        (OTHER.to_owned(), Arc::new(fakes.driver.named(OTHER))),
    ]
    .into();
    Ports { drivers: Drivers::new(OTHER, drivers), ..fakes.ports() }
}

fn on(driver: &str) -> NewSession {
    NewSession { driver: Some(driver.to_owned()), ..NewSession::default() }
}

#[tokio::test(start_paused = true)]
async fn sessions_run_on_the_driver_they_ask_for_and_a_restart_keeps_them_apart() {
    let world = World::new().await.restart_with(|_| (), two_drivers).await;
    let (first, second) = (world.run(on(FAKE_DRIVER)).await, world.run(NewSession::default()).await);
    assert_eq!((first.driver.as_str(), second.driver.as_str()), (FAKE_DRIVER, OTHER));
    let driver_of = |world: &World, id| world.fakes.driver.stands_on(id).map(|(_, driver)| driver);
    assert_eq!((driver_of(&world, first.id), driver_of(&world, second.id)), (Some(FAKE_DRIVER), Some(OTHER)));
    let fork = world.engine.fork_session(&world.caller, first.id, Fork { count: 1, name: None }).await.unwrap();
    world.settled(fork[0].id).await;
    assert_eq!(driver_of(&world, fork[0].id), Some(FAKE_DRIVER), "a fork runs where its parent does");

    let world = world.restart_with(|_| (), two_drivers).await;
    idle().await;
    for id in [first.id, second.id] {
        assert_eq!(world.session(id).await.state, SessionState::Running);
        world.engine.pause_session(&world.caller, id).await.unwrap();
        world.engine.resume_session(&world.caller, id).await.unwrap();
    }
    // News of an end come from the driver that has the sandbox.
    world.fakes.driver.kill(second.id, "killed");
    idle().await;
    assert_eq!(world.settled(second.id).await.state, SessionState::Paused);
    assert_eq!(world.session(first.id).await.state, SessionState::Running);
    for id in [first.id, second.id, fork[0].id] {
        world.engine.terminate_session(&world.caller, id).await.unwrap();
    }
    idle().await;
    assert!(world.fakes.driver.sandboxes().is_empty());
    assert_eq!(world.fakes.driver.violations(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_the_server_does_not_have_is_refused_by_name() {
    let world = World::new().await;
    let error = world.engine.create_session(&world.caller, on("microvm")).await.unwrap_err();
    assert_eq!(error.code, Code::InvalidArgument);
    assert!(error.to_string().contains("\"microvm\"") && error.to_string().contains("fake"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn sandboxes_of_a_driver_that_is_gone_wait_for_it() {
    let world = World::new().await.restart_with(|_| (), two_drivers).await;
    let id = world.run(on(OTHER)).await.id;
    let world = world.restart(|_| ()).await;
    assert_eq!(code(world.engine.pause_session(&world.caller, id).await), Code::GuestUnreachable);
    assert_eq!(world.fakes.driver.sandboxes().get(&id), Some(&true), "nothing happens to it");
    let world = world.restart_with(|_| (), two_drivers).await;
    idle().await;
    assert_eq!(world.session(id).await.state, SessionState::Running);
    world.engine.pause_session(&world.caller, id).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_disk_stays_over_the_image_it_was_written_over() {
    let world = World::new().await;
    world.fakes.driver.set_default_root("host:old");
    let source = world.running().await;
    let taken = NewSnapshot { name: "s".into(), wait: true, ..NewSnapshot::default() };
    let snapshot = world.engine.create_snapshot(&world.caller, source, taken).await.unwrap();
    world.fakes.driver.set_default_root("host:new");
    let old = ImageDigest::new("host:old");
    assert_eq!(snapshot.machine.root, old);

    let fork = world.engine.fork_session(&world.caller, source, Fork { count: 1, name: None }).await.unwrap()[0].id;
    let restored = world.run(NewSession { snapshot_id: Some(snapshot.id), ..NewSession::default() }).await.id;
    let fresh = world.running().await;
    world.settled(fork).await;
    world.fakes.driver.power_off(source);
    world.settled(source).await;
    world.engine.resume_session(&world.caller, source).await.unwrap();
    for id in [source, fork, restored] {
        assert_eq!(world.fakes.driver.stands_on(id).unwrap().0, old);
        assert_eq!(world.session(id).await.machine.root, old);
    }
    assert_eq!(world.fakes.driver.stands_on(fresh).unwrap().0, ImageDigest::new("host:new"));
}

#[tokio::test(start_paused = true)]
async fn nothing_starts_over_an_image_that_is_gone() {
    let world = World::new().await;
    let id = world.running().await;
    let taken = NewSnapshot { name: "s".into(), wait: true, ..NewSnapshot::default() };
    let snapshot = world.engine.create_snapshot(&world.caller, id, taken).await.unwrap().id;
    world.fakes.driver.power_off(id);
    world.settled(id).await;
    world.fakes.driver.lose_root("host:fake");
    let error = world.engine.resume_session(&world.caller, id).await.unwrap_err();
    assert_eq!(error.code, Code::RootUnavailable);
    assert!(error.to_string().contains("host:fake"), "{error}");
    assert!(world.fakes.driver.is_only_a_disk(id), "the disk is as it was");

    world.fakes.driver.set_default_root("host:new");
    let new = NewSession { snapshot_id: Some(snapshot), ..NewSession::default() };
    let created = world.engine.create_session(&world.caller, new).await.unwrap().id;
    let failed = world.settled(created).await;
    assert_eq!(failed.state, SessionState::Terminated);
    assert!(failed.terminal_error.contains("root_unavailable"), "{}", failed.terminal_error);
}

#[tokio::test(start_paused = true)]
async fn a_driver_refuses_a_disk_of_another_image() {
    let world = World::new().await;
    let id = world.running().await;
    let driver = &world.fakes.driver;
    driver.power_off(id);
    world.settled(id).await;
    let session = world.session(id).await;
    let spec = SandboxSpec {
        resources: session.machine.resources,
        root: driver.root(&ImageDigest::new("host:another")).await.unwrap(),
        disk: DiskOrigin::Kept,
        memory: None,
        outbound: false,
        egress: None,
    };
    let refused = driver.start(id, &spec).await;
    assert!(matches!(refused, Err(DriverError::OtherRoot { .. })), "it would mean nothing there");
}

#[tokio::test(start_paused = true)]
async fn records_of_servers_that_knew_one_image_get_the_one_their_disk_has() {
    let world = World::new().await;
    world.fakes.driver.set_default_root("host:old");
    let id = world.running().await;
    let taken = NewSnapshot { name: "s".into(), wait: true, ..NewSnapshot::default() };
    let snapshot = world.engine.create_snapshot(&world.caller, id, taken).await.unwrap().id;
    let store = world.fakes.store.clone();
    let world = world
        .restart_with(
            |fakes| fakes.driver.set_default_root("host:new"),
            |fakes| {
                store.forget_roots();
                fakes.ports()
            },
        )
        .await;
    idle().await;
    assert_eq!(world.session(id).await.machine.root, ImageDigest::new("host:old"));
    let snapshot = world.engine.snapshot(&world.caller, snapshot).await.unwrap();
    assert_eq!(snapshot.machine.root, ImageDigest::new("host:new"), "nothing tells what it was");
}
