//! Volumes: what every driver does with them.

use nagaya_api::ids::{SessionId, VolumeId};
use nagaya_engine::ports::{DriverError, Mount};
use nagaya_testkit::Outcome;

use super::place::*;

pub const MIB: u64 = 1 << 20;

pub fn fresh_volume() -> VolumeId {
    VolumeId::from_uuid(*fresh_id().as_uuid())
}

pub fn at(volume_id: VolumeId, path: &str) -> Mount {
    Mount { volume_id, path: path.to_owned(), readonly: false }
}

pub fn reading(volume_id: VolumeId, path: &str) -> Mount {
    Mount { readonly: true, ..at(volume_id, path) }
}

pub async fn destroy(place: &Place, ids: &[SessionId]) {
    for id in ids {
        place.driver().destroy(*id).await.unwrap();
    }
    place.settled().await;
}

pub async fn a_volume_takes_files_from_one_sandbox_to_another(place: &mut Place) -> Outcome {
    let (driver, volume) = (place.driver(), fresh_volume());
    place.host().create_volume(volume, MIB).await.unwrap();
    let (first, second) = (fresh_id(), fresh_id());
    let guest = driver.start(first, &place.fresh()).await.unwrap();
    let mount = at(volume, "/home/tenki/some/where");
    for _ in 0..2 {
        driver.attach_volume(first, &mount).await.unwrap();
    }
    write(&*guest, "/home/tenki/some/where/note", b"kept").await.unwrap();
    for _ in 0..2 {
        driver.detach_volume(first, &mount, false).await.unwrap();
    }
    assert!(guest.stat("/home/tenki/some/where/note").await.unwrap().is_none(), "it is still there");
    let guest = driver.start(second, &place.fresh()).await.unwrap();
    driver.attach_volume(second, &at(volume, "/data")).await.unwrap();
    assert_eq!(read(&*guest, "/data/note").await.unwrap(), b"kept");
    driver.detach_volume(second, &at(volume, "/data"), true).await.unwrap();
    destroy(place, &[first, second]).await;
    place.host().remove_volume(volume).await.unwrap();
    Ok(())
}

pub async fn volumes_are_made_listed_and_removed_once(place: &mut Place) -> Outcome {
    let (driver, volumes, id) = (place.driver(), [fresh_volume(), fresh_volume()], fresh_id());
    for volume in volumes {
        place.host().create_volume(volume, MIB).await.unwrap();
    }
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    driver.attach_volume(id, &at(volumes[0], "/data")).await.unwrap();
    write(&*guest, "/data/note", b"kept").await.unwrap();
    place.host().create_volume(volumes[0], 2 * MIB).await.unwrap();
    assert_eq!(read(&*guest, "/data/note").await.unwrap(), b"kept", "one that exists is left as it is");
    let mut found = place.host().volumes().await.unwrap();
    found.sort();
    let mut expected = volumes.to_vec();
    expected.sort();
    assert_eq!(found, expected);
    driver.detach_volume(id, &at(volumes[0], "/data"), false).await.unwrap();
    for volume in volumes.into_iter().chain(volumes) {
        place.host().remove_volume(volume).await.unwrap();
    }
    assert!(place.host().volumes().await.unwrap().is_empty());
    destroy(place, &[id]).await;
    Ok(())
}

pub async fn what_is_not_there_can_be_neither_attached_nor_grown(place: &mut Place) -> Outcome {
    let (driver, volume, id) = (place.driver(), fresh_volume(), fresh_id());
    driver.start(id, &place.fresh()).await.unwrap();
    let unknown = fresh_volume();
    assert!(matches!(driver.attach_volume(id, &at(unknown, "/data")).await, Err(DriverError::Gone)));
    assert!(matches!(place.host().grow_volume(unknown, 2 * MIB).await, Err(DriverError::Gone)));
    assert!(matches!(place.host().volume_size(unknown).await, Err(DriverError::Gone)));
    place.host().create_volume(volume, MIB).await.unwrap();
    assert!(matches!(driver.attach_volume(fresh_id(), &at(volume, "/data")).await, Err(DriverError::Gone)));
    destroy(place, &[id]).await;
    assert!(matches!(driver.attach_volume(id, &at(volume, "/data")).await, Err(DriverError::Gone)));
    place.host().remove_volume(volume).await.unwrap();
    Ok(())
}

pub async fn a_volume_is_not_attached_over_another(place: &mut Place) -> Outcome {
    let (driver, volumes, id) = (place.driver(), [fresh_volume(), fresh_volume()], fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    for volume in volumes {
        place.host().create_volume(volume, MIB).await.unwrap();
    }
    driver.attach_volume(id, &at(volumes[0], "/data")).await.unwrap();
    write(&*guest, "/data/note", b"kept").await.unwrap();
    let refused = driver.attach_volume(id, &at(volumes[1], "/data")).await;
    assert!(matches!(&refused, Err(DriverError::Refused(why)) if why.contains("mounted there already")), "{refused:?}");
    assert_eq!(read(&*guest, "/data/note").await.unwrap(), b"kept");
    driver.attach_volume(id, &at(volumes[1], "/other")).await.unwrap();
    destroy(place, &[id]).await;
    for volume in volumes {
        place.host().settle_volume(volume).await.unwrap();
        place.host().remove_volume(volume).await.unwrap();
    }
    Ok(())
}

pub async fn a_volume_outlives_its_driver_and_its_sandbox(place: &mut Place) -> Outcome {
    let (volumes, first, second) = ([fresh_volume(), fresh_volume()], fresh_id(), fresh_id());
    let driver = place.driver();
    let guest = driver.start(first, &place.fresh()).await.unwrap();
    for (volume, path) in volumes.into_iter().zip(["/data", "/more"]) {
        place.host().create_volume(volume, MIB).await.unwrap();
        driver.attach_volume(first, &at(volume, path)).await.unwrap();
        write(&*guest, &format!("{path}/note"), path.as_bytes()).await.unwrap();
    }
    drop((driver, guest));
    place.restart().await;
    let driver = place.driver();
    let guest = adopt_running(&*driver, first).await;
    assert_eq!(place.host().volumes().await.unwrap().len(), 2);
    driver.attach_volume(first, &at(volumes[0], "/data")).await.unwrap();
    assert_eq!(read(&*guest, "/data/note").await.unwrap(), b"/data");
    // One is taken out by the driver that did not put it in; the other goes with the sandbox.
    driver.detach_volume(first, &at(volumes[0], "/data"), false).await.unwrap();
    assert!(guest.stat("/data/note").await.unwrap().is_none());
    write(&*guest, "/more/last", b"last").await.unwrap();
    driver.destroy(first).await.unwrap();
    place.host().settle_volume(volumes[1]).await.unwrap();
    let guest = driver.start(second, &place.fresh()).await.unwrap();
    for (volume, path) in volumes.into_iter().zip(["/data", "/more"]) {
        driver.attach_volume(second, &at(volume, path)).await.unwrap();
        assert_eq!(read(&*guest, &format!("{path}/note")).await.unwrap(), path.as_bytes());
    }
    assert_eq!(read(&*guest, "/more/last").await.unwrap(), b"last");
    destroy(place, &[second]).await;
    for volume in volumes {
        place.host().settle_volume(volume).await.unwrap();
        place.host().remove_volume(volume).await.unwrap();
    }
    Ok(())
}

pub async fn readers_share_a_volume_that_none_of_them_changes(place: &mut Place) -> Outcome {
    let (driver, volume, ids) = (place.driver(), fresh_volume(), [fresh_id(), fresh_id()]);
    place.host().create_volume(volume, MIB).await.unwrap();
    let mut guests = Vec::new();
    for id in ids {
        guests.push(driver.start(id, &place.fresh()).await.unwrap());
    }
    driver.attach_volume(ids[0], &at(volume, "/data")).await.unwrap();
    write(&*guests[0], "/data/note", b"kept").await.unwrap();
    driver.detach_volume(ids[0], &at(volume, "/data"), false).await.unwrap();
    for (id, guest) in ids.iter().zip(&guests) {
        driver.attach_volume(*id, &reading(volume, "/data")).await.unwrap();
        assert!(write(&**guest, "/data/more", b"more").await.is_err(), "a reader wrote");
        assert!(guest.remove("/data/note", false).await.is_err(), "a reader removed a file");
    }
    for guest in &guests {
        assert_eq!(read(&**guest, "/data/note").await.unwrap(), b"kept");
    }
    assert!(matches!(place.host().grow_volume(volume, 2 * MIB).await, Err(DriverError::Busy)));
    driver.detach_volume(ids[0], &reading(volume, "/data"), false).await.unwrap();
    assert_eq!(read(&*guests[1], "/data/note").await.unwrap(), b"kept", "one reader's end ended another");
    driver.detach_volume(ids[1], &reading(volume, "/data"), true).await.unwrap();
    driver.attach_volume(ids[1], &at(volume, "/data")).await.unwrap();
    write(&*guests[1], "/data/more", b"more").await.unwrap();
    destroy(place, &ids).await;
    place.host().settle_volume(volume).await.unwrap();
    place.host().remove_volume(volume).await.unwrap();
    Ok(())
}

pub async fn a_volume_grows_and_keeps_its_files(place: &mut Place) -> Outcome {
    let (driver, volume, id) = (place.driver(), fresh_volume(), fresh_id());
    place.host().create_volume(volume, MIB).await.unwrap();
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    for megabytes in [2, 32, 2_048] {
        driver.attach_volume(id, &at(volume, "/data")).await.unwrap();
        write(&*guest, &format!("/data/{megabytes}"), b"kept").await.unwrap();
        driver.detach_volume(id, &at(volume, "/data"), false).await.unwrap();
        for _ in 0..2 {
            place.host().grow_volume(volume, megabytes * MIB).await.unwrap();
        }
        assert_eq!(place.host().volume_size(volume).await.unwrap(), megabytes * MIB);
    }
    driver.attach_volume(id, &at(volume, "/data")).await.unwrap();
    for megabytes in [2, 32, 2_048] {
        assert_eq!(read(&*guest, &format!("/data/{megabytes}")).await.unwrap(), b"kept");
    }
    destroy(place, &[id]).await;
    place.host().settle_volume(volume).await.unwrap();
    place.host().remove_volume(volume).await.unwrap();
    Ok(())
}
