//! Pause, stop, boot and copies of disks: what every driver does, the fake one too.

use std::time::{Duration, Instant};

use nagaya_api::ids::{DiskImageId, SessionId};
use nagaya_engine::model::Limit;
use nagaya_engine::ports::{Adopted, Command, Driver, DriverError, ProcessEvent, ProcessInput};
use nagaya_testkit::Outcome;

use super::place::*;

pub fn fresh_image() -> DiskImageId {
    DiskImageId::from_uuid(*fresh_id().as_uuid())
}

/// Adopts what is expected to be stopped: whether it powered itself off, and whether the host was restarted.
pub async fn adopt_stopped(driver: &dyn Driver, id: SessionId) -> (bool, bool) {
    match driver.adopt(id).await.unwrap() {
        Adopted::Stopped { powered_off, host_restarted } => (powered_off, host_restarted),
        _ => panic!("the sandbox has processes"),
    }
}

pub async fn a_frozen_command_goes_on_where_it_was(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let mut process = guest.run(Command { stdin: true, ..command(&["cat"]) }).await.unwrap();
    driver.freeze(id).await.unwrap();
    driver.freeze(id).await.unwrap();
    driver.thaw(id).await.unwrap();
    driver.thaw(id).await.unwrap();
    process.input.send(ProcessInput::Stdin("still here".into())).await.unwrap();
    assert_eq!(process.events.recv().await, Some(ProcessEvent::Stdout("still here".into())));
    close_stdin(&process).await;
    assert_eq!(finish(&mut process.events).await.exit.code, 0);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_frozen_sandbox_outlives_its_driver(place: &mut Place) -> Outcome {
    let id = fresh_id();
    let guest = place.driver().start(id, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"kept").await.unwrap();
    place.driver().freeze(id).await.unwrap();
    drop(guest);
    place.restart().await;
    let driver = place.driver();
    let Adopted::Frozen(guest) = driver.adopt(id).await.unwrap() else { panic!("it is not frozen") };
    driver.thaw(id).await.unwrap();
    assert_eq!(run(&*guest, command(&["echo", "again"])).await.text(), "again");
    assert_eq!(read(&*guest, "note").await.unwrap(), b"kept");
    driver.freeze(id).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.settled().await;
    assert!(place.events.try_recv().is_err(), "an asked-for end was reported");
    Ok(())
}

pub async fn a_stopped_sandbox_keeps_its_disk_and_boots(place: &mut Place) -> Outcome {
    let (mut driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"never synced").await.unwrap();
    for round in 0..2 {
        driver.stop(id).await.unwrap();
        driver.stop(id).await.unwrap();
        assert_eq!(driver.list().await.unwrap(), [id]);
        assert_eq!(adopt_stopped(&*driver, id).await, (false, false));
        if round == 1 {
            drop(driver);
            place.restart().await;
            driver = place.driver();
            assert_eq!(adopt_stopped(&*driver, id).await, (false, false));
        }
        let guest = driver.start(id, &place.kept()).await.unwrap();
        assert_eq!(read(&*guest, "note").await.unwrap(), b"never synced");
        assert_eq!(run(&*guest, command(&["echo", "again"])).await.text(), "again");
    }
    assert!(place.events.try_recv().is_err(), "an asked-for end was reported");
    driver.stop(id).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.settled().await;
    assert!(driver.list().await.unwrap().is_empty());
    for gone in [driver.stop(id).await.unwrap_err(), driver.start(id, &place.kept()).await.err().unwrap()] {
        assert!(matches!(gone, DriverError::Gone), "{gone}");
    }
    Ok(())
}

pub async fn what_a_killed_first_process_left_boots(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"kept").await.unwrap();
    place.kill_first_process(id, &*guest).await;
    assert_eq!(place.ended().await.0, id);
    driver.stop(id).await.unwrap();
    let guest = driver.start(id, &place.kept()).await.unwrap();
    assert_eq!(read(&*guest, "note").await.unwrap(), b"kept");
    // And once more, found by a later server.
    place.kill_first_process(id, &*guest).await;
    assert_eq!(place.ended().await.0, id);
    drop(driver);
    place.restart().await;
    let driver = place.driver();
    assert_eq!(adopt_stopped(&*driver, id).await, (false, false));
    let guest = driver.start(id, &place.kept()).await.unwrap();
    assert_eq!(read(&*guest, "note").await.unwrap(), b"kept");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_sandbox_that_powered_itself_off_says_so_and_boots(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"kept").await.unwrap();
    place.power_off(id, &*guest).await;
    let (ended, powered_off, cause) = place.ended().await;
    assert_eq!((ended, powered_off), (id, true), "{cause}");
    driver.stop(id).await.unwrap();
    assert_eq!(adopt_stopped(&*driver, id).await, (true, false));
    let guest = driver.start(id, &place.kept()).await.unwrap();
    assert_eq!(read(&*guest, "note").await.unwrap(), b"kept");
    driver.stop(id).await.unwrap();
    assert_eq!(adopt_stopped(&*driver, id).await, (false, false), "an old power-off counts for ever");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn what_does_not_run_is_neither_frozen_nor_thawed(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    driver.start(id, &place.fresh()).await.unwrap();
    driver.stop(id).await.unwrap();
    for id in [id, fresh_id()] {
        assert!(matches!(driver.freeze(id).await, Err(DriverError::Gone)));
        assert!(matches!(driver.thaw(id).await, Err(DriverError::Gone)));
    }
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_copied_disk_makes_another_sandbox(place: &mut Place) -> Outcome {
    let (driver, source) = (place.driver(), fresh_id());
    let guest = driver.start(source, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"copied").await.unwrap();
    let mut images = vec![fresh_image(), fresh_image()];
    place.host().copy_disk(source, &images).await.unwrap();
    write(&*guest, "note", b"changed later").await.unwrap();
    let mut found = place.host().images().await.unwrap();
    found.sort();
    images.sort();
    assert_eq!(found, images);
    let copy = fresh_id();
    let guest = driver.start(copy, &place.from(images[0])).await.unwrap();
    assert_eq!(place.host().images().await.unwrap(), [images[1]], "an image is used up by a creation");
    assert_eq!(read(&*guest, "note").await.unwrap(), b"copied");
    write(&*guest, "note", b"changed in the copy").await.unwrap();
    // An image that exists is replaced.
    place.host().copy_disk(source, &images[1..]).await.unwrap();
    let second = fresh_id();
    let guest = driver.start(second, &place.from(images[1])).await.unwrap();
    assert_eq!(read(&*guest, "note").await.unwrap(), b"changed later");
    assert!(place.host().images().await.unwrap().is_empty());
    assert!(matches!(driver.start(fresh_id(), &place.from(images[1])).await, Err(DriverError::Gone)));
    assert!(matches!(place.host().copy_disk(fresh_id(), &images).await, Err(DriverError::Gone)));
    assert!(place.host().images().await.unwrap().is_empty(), "a failed copy left an image");
    for id in [source, copy, second] {
        driver.destroy(id).await.unwrap();
    }
    place.host().remove_image(images[0]).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn the_disk_of_a_stopped_or_frozen_sandbox_is_copied_as_well(place: &mut Place) -> Outcome {
    let (driver, source) = (place.driver(), fresh_id());
    let guest = driver.start(source, &place.fresh()).await.unwrap();
    write(&*guest, "note", b"copied").await.unwrap();
    let (frozen, stopped) = (fresh_image(), fresh_image());
    driver.freeze(source).await.unwrap();
    place.host().copy_disk(source, &[frozen]).await.unwrap();
    driver.stop(source).await.unwrap();
    place.host().copy_disk(source, &[stopped]).await.unwrap();
    for image in [frozen, stopped] {
        let id = fresh_id();
        let guest = driver.start(id, &place.from(image)).await.unwrap();
        assert_eq!(read(&*guest, "note").await.unwrap(), b"copied");
        driver.destroy(id).await.unwrap();
    }
    let guest = driver.start(source, &place.kept()).await.unwrap();
    assert_eq!(read(&*guest, "note").await.unwrap(), b"copied");
    driver.destroy(source).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_stopped_sandbox_takes_no_slot(place: &mut Place) -> Outcome {
    let (driver, stopped) = (place.driver(), fresh_id());
    driver.start(stopped, &place.fresh()).await.unwrap();
    driver.stop(stopped).await.unwrap();
    let mut others = Vec::new();
    for _ in 0..SLOTS_MAX {
        let id = fresh_id();
        driver.start(id, &place.fresh()).await.unwrap();
        others.push(id);
    }
    let refused = driver.start(stopped, &place.kept()).await.err().unwrap();
    assert!(matches!(&refused, DriverError::Exhausted(Limit::Slots)), "{refused:?}");
    driver.destroy(others.pop().unwrap()).await.unwrap();
    place.settled().await;
    let begin = Instant::now();
    while let Err(error) = driver.start(stopped, &place.kept()).await {
        assert!(begin.elapsed() < Duration::from_secs(20), "the place of a destroyed sandbox stays taken: {error}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for id in others.into_iter().chain([stopped]) {
        driver.destroy(id).await.unwrap();
    }
    place.settled().await;
    Ok(())
}
