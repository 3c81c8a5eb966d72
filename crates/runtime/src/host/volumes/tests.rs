use super::*;

const MIB: u64 = 1 << 20;

fn volumes(data: &Path, disk_free_mb_min: u64) -> Volumes {
    Volumes::open(data, disk_free_mb_min).expect("a directory for volumes")
}

fn id(number: u8) -> VolumeId {
    VolumeId::new(1_767_225_600_000, [number; 10])
}

#[test]
fn only_finished_volumes_are_there_for_the_next_server() {
    let data = tempfile::tempdir().expect("a directory");
    let before = volumes(data.path(), 0);
    before.create(id(1), MIB).expect("create");
    for left in [format!("{}.new", id(2)), "note.txt".into(), "x.ext4".into()] {
        fs::write(data.path().join("volumes").join(left), "half").expect("write");
    }
    let after = volumes(data.path(), 0);
    assert_eq!(after.list().expect("list"), [id(1)]);
    assert!(!data.path().join("volumes").join(format!("{}.new", id(2))).exists());
    after.create(id(2), MIB).expect("create");
    after.remove(id(1)).expect("remove");
    after.remove(id(1)).expect("remove again");
    assert_eq!(after.list().expect("list"), [id(2)]);
}

#[test]
fn a_nearly_full_host_makes_and_grows_none_and_leaves_what_is_there() {
    let data = tempfile::tempdir().expect("a directory");
    volumes(data.path(), 0).create(id(1), MIB).expect("create");
    let path = data.path().join("volumes").join(format!("{}.ext4", id(1)));
    let image = fs::read(&path).expect("read");
    let full = volumes(data.path(), u64::MAX);
    for refused in [full.create(id(2), MIB), full.grow(id(1), 2 * MIB)] {
        assert!(matches!(&refused, Err(DriverError::Exhausted(limit)) if *limit == Limit::DiskFreeMin), "{refused:?}");
    }
    assert_eq!(full.list().expect("list"), [id(1)]);
    assert!(fs::read(&path).expect("read") == image, "the volume was changed");
    full.create(id(1), 2 * MIB).expect("one that exists needs no room");
    full.grow(id(1), MIB).expect("one that is large enough needs no room");
}

#[test]
fn growing_the_unknown_and_shrinking_are_refused() {
    let data = tempfile::tempdir().expect("a directory");
    let volumes = volumes(data.path(), 0);
    assert!(matches!(volumes.grow(id(1), MIB), Err(DriverError::Gone)));
    volumes.create(id(1), 2 * MIB + 1).expect("create");
    assert!(matches!(volumes.grow(id(1), MIB), Err(DriverError::Refused(_))));
    volumes.grow(id(1), 2 * MIB).expect("an odd size is a whole number of blocks");
}

#[test]
fn sizes_that_no_volume_can_have_are_refused_and_nothing_is_made() {
    let data = tempfile::tempdir().expect("a directory");
    let volumes = volumes(data.path(), 0);
    for size in [0, MIB - 1, (100 << 30) + 1, u64::MAX / 2] {
        assert!(matches!(volumes.create(id(1), size), Err(DriverError::Refused(_))), "{size}");
    }
    assert_eq!(volumes.list().expect("list"), []);
    volumes.create(id(1), MIB).expect("create");
    assert!(matches!(volumes.grow(id(1), (100 << 30) + 1), Err(DriverError::Refused(_))));
    volumes.grow(id(1), 100 << 30).expect("the largest");
}

#[test]
fn turns_of_one_name_come_one_after_the_other() {
    let turns = KeyedLocks::default();
    let both = turns.take(["volume".into(), "sandbox".into()]);
    let _other = turns.take(["other".into()]);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| drop(turns.take(["another".into(), "sandbox".into()])));
        std::thread::yield_now();
        assert!(!waiting.is_finished());
        drop(both);
        waiting.join().expect("it gets its turn");
    });
    drop(turns.take(["volume".into(), "sandbox".into(), "another".into()]));
}

#[test]
fn only_ext4_counts_in_a_list_of_mounts() {
    let line = "34 21 7:12 / /data rw,nodev shared:3 - ext4 /dev/loop12 rw";
    assert_eq!(ext4_device(line), Some((7, 12)));
    assert_eq!(ext4_device("21 1 0:30 / / rw - overlay nagaya rw"), None);
    assert_eq!(ext4_device("nonsense"), None);
}
