//! Images under disks, sizes that are no whole units, and several drivers on one host.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use nagaya_engine::model::{ImageDigest, ImageUser, Layer, Resources, RootImage, SandboxSpec};
use nagaya_engine::ports::{Adopted, Command, Driver, DriverError};
use nagaya_runtime::namespace::{self, NamespaceDriver, Pools};
use nagaya_testkit::{NotRun, Outcome};

use super::limits::cgroup_of;
use super::place::*;

const MIB: u64 = 1 << 20;

/// An image of two layers that were made by hand, each of the whole root. The upper one hides a file of the lower one.
fn layered(directory: &Path) -> Result<RootImage, NotRun> {
    let layer = |name: &str, files: &[(&str, &str)]| {
        let root = directory.join(name);
        // Nothing that is a machine's: places for mounts, and who resolves names.
        for made in ["", "bin", "etc", "home/app", "srv/app"] {
            fs::create_dir_all(root.join(made)).unwrap();
        }
        fs::set_permissions(&root, PermissionsExt::from_mode(0o755)).unwrap();
        for (path, text) in files {
            fs::write(root.join(path), text).unwrap();
        }
        Layer { source: root, place: String::new() }
    };
    let lower = layer("lower", &[("etc/both", "lower"), ("etc/lower", "lower")]);
    let upper = layer("upper", &[("etc/both", "upper"), ("etc/upper", "upper")]);
    // One program that needs no library, whatever the host is made of.
    let source = directory.join("cat.c");
    fs::write(&source, CAT).unwrap();
    let program = lower.source.join("bin/cat");
    let linked = std::process::Command::new("cc").arg("-static").arg("-o").arg(program).arg(&source).status();
    let linked = linked.map_err(|error| NotRun(format!("cc makes no program for the image: {error}")))?;
    assert!(linked.success(), "cc -static failed");
    let user = ImageUser { name: "app".into(), uid: 7, gid: 9, home: "/home/app".into() };
    Ok(RootImage {
        digest: ImageDigest::new("sha256:made-by-hand"),
        layers: vec![upper, lower],
        user,
        workdir: Some("/srv/app".into()),
        env: BTreeMap::from([("PATH".into(), "/opt/own:/bin".into()), ("GREETING".into(), "hello world".into())]),
    })
}

/// Prints the files that it is given.
const CAT: &str = r#"
#include <stdio.h>
int main(int count, char **names) {
    for (int at = 1; at < count; at++) {
        FILE *file = fopen(names[at], "r");
        if (!file) return 1;
        for (int byte; (byte = fgetc(file)) != EOF;) putchar(byte);
        putchar(' ');
    }
    return 0;
}
"#;

pub async fn an_image_is_a_stack_of_layers_and_none_of_the_host_is_in_it(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let directory = tempfile::Builder::new().prefix("nagaya-contract-layers-").tempdir().unwrap();
    fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let spec = SandboxSpec { root: layered(directory.path())?, ..place.fresh() };
    let guest = driver.start(id, &spec).await.unwrap();
    let seen = run(&*guest, command(&["/bin/cat", "/etc/both", "/etc/lower", "/etc/upper"])).await;
    assert_eq!(seen.text(), "upper lower upper", "{seen:?}");
    assert!(guest.stat("/usr/bin").await.unwrap().is_none(), "the host's programs are in an image that has none");
    let ids = |status: &str| {
        status
            .lines()
            .filter(|line| line.starts_with("Uid:") || line.starts_with("Gid:"))
            .fold(String::new(), |ids, line| format!("{ids}{} ", line.split_whitespace().nth(1).unwrap_or_default()))
    };
    let own = run(&*guest, command(&["/bin/cat", "/proc/self/status"])).await;
    assert_eq!(ids(&own.text()), "7 9 ", "commands run as the image's user");
    let root = Command { user: User::Root, ..command(&["/bin/cat", "/proc/self/status"]) };
    assert_eq!(ids(&run(&*guest, root).await.text()), "0 0 ");
    let told = run(&*guest, command(&["/bin/cat", "/proc/self/environ"])).await.text();
    for variable in ["USER=app", "HOME=/home/app", "PATH=/opt/own:/bin", "GREETING=hello world"] {
        assert!(told.split('\0').any(|each| each.trim() == variable), "{variable}: {told:?}");
    }
    let own_env =
        Command { env: BTreeMap::from([("GREETING".into(), "bye".into())]), ..command(&["cat", "/proc/self/environ"]) };
    let told = run(&*guest, own_env).await.text();
    assert!(told.contains("GREETING=bye\0") && !told.contains("hello"), "a command's own wins: {told:?}");
    for found in ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"] {
        assert!(guest.stat(found).await.unwrap().is_some(), "{found}");
    }
    let temporary = guest.stat("/tmp").await.unwrap().expect("a place for temporary files");
    assert_eq!(temporary.mode & 0o7777, 0o1777);
    write(&*guest, "note", b"kept").await.unwrap();
    assert_eq!(run(&*guest, command(&["cat", "note"])).await.text(), "kept", "commands start where the image says");
    let there = Command { cwd: "/srv/app".into(), ..command(&["cat", "note"]) };
    assert_eq!(run(&*guest, there).await.text(), "kept", "relative paths start there, too");

    // It goes on over its own image, and over no other.
    driver.stop(id).await.unwrap();
    let refused = driver.start(id, &place.kept()).await;
    let Err(DriverError::OtherRoot { disk, asked }) = refused else { panic!("it started over another image") };
    assert_eq!((disk, asked), (spec.root.digest.clone(), place.fresh().root.digest));
    let guest = driver.start(id, &SandboxSpec { root: spec.root.clone(), ..place.kept() }).await.unwrap();
    assert_eq!(read(&*guest, "/srv/app/note").await.unwrap(), b"kept");
    assert_eq!(place.host().root_of(id).await.unwrap(), Some(spec.root.digest));
    assert!(!directory.path().join("upper/srv/app/note").exists(), "images are only ever read");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn an_image_may_have_as_many_layers_as_images_have(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let directory = tempfile::Builder::new().prefix("nagaya-contract-layers-").tempdir().unwrap();
    fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let mut root = layered(directory.path())?;
    root.layers.extend((root.layers.len()..127).map(|number| {
        let source = directory.path().join(number.to_string());
        fs::create_dir_all(source.join("etc")).unwrap();
        fs::write(source.join(format!("etc/{number}")), number.to_string()).unwrap();
        Layer { source, place: String::new() }
    }));
    let guest = driver.start(id, &SandboxSpec { root: root.clone(), ..place.fresh() }).await.unwrap();
    let seen = run(&*guest, command(&["/bin/cat", "/etc/both", "/etc/2", "/etc/64", "/etc/126"])).await;
    assert_eq!(seen.text(), "upper 2 64 126", "{seen:?}");
    driver.destroy(id).await.unwrap();
    root.layers.push(root.layers[5].clone());
    let refused = driver.start(fresh_id(), &SandboxSpec { root, ..place.fresh() }).await;
    assert!(matches!(refused, Err(DriverError::Refused(_))), "more layers than images have");
    place.settled().await;
    Ok(())
}

pub async fn part_of_a_processor_and_a_disk_of_any_size_are_given(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let resources = Resources { cpu_millis: 500, memory_bytes: 200 * MIB, disk_bytes: 300 * MIB };
    let guest = driver.start(id, &SandboxSpec { resources, ..place.fresh() }).await.unwrap();
    assert_eq!(shell(&*guest, "nproc").await, "1");
    let size_kib: u64 = shell(&*guest, "df -k --output=size / | tail -1").await.trim().parse().unwrap();
    assert!((250 << 10..=300 << 10).contains(&size_kib), "df shows {size_kib} KiB for a disk of 300 MiB");
    let (_process, host_pid) = marked_process(&*guest).await;
    let group = cgroup_of(host_pid, "cpu").parent().unwrap().to_owned();
    let quota = fs::read_to_string(group.join("cpu.max"))
        .or_else(|_| fs::read_to_string(group.join("cpu.cfs_quota_us")))
        .unwrap();
    assert_eq!(quota.split_whitespace().next(), Some("50000"), "the quota of half a processor in 100 ms");
    driver.destroy(id).await.unwrap();
    for disk_bytes in [64 * MIB, 100 << 30] {
        let id = fresh_id();
        let resources = Resources { disk_bytes, ..resources };
        let guest = driver.start(id, &SandboxSpec { resources, ..place.fresh() }).await.unwrap();
        let size_kib: u64 = shell(&*guest, "df -k --output=size / | tail -1").await.trim().parse().unwrap();
        assert!((disk_bytes * 6 / 10..=disk_bytes).contains(&(size_kib << 10)), "{size_kib} KiB of {disk_bytes} bytes");
        driver.destroy(id).await.unwrap();
    }
    for disk_bytes in [64 * MIB - 4096, (100 << 30) + 4096] {
        let resources = Resources { disk_bytes, ..resources };
        let refused = driver.start(fresh_id(), &SandboxSpec { resources, ..place.fresh() }).await;
        assert!(matches!(refused, Err(DriverError::Refused(_))), "a disk of {disk_bytes} bytes");
    }
    place.settled().await;
    Ok(())
}

pub async fn two_drivers_of_one_host_keep_their_sandboxes_apart(place: &mut Place) -> Outcome {
    let (first, ids) = (place.driver(), [fresh_id(), fresh_id()]);
    let pools = Pools { slots_ready: 0, isolated_slots_ready: 0 };
    let config = namespace::Config { pools, ..namespace::Config::default() };
    let another = |place: &Place| Arc::new(NamespaceDriver::start(place.shared_host(), "another", &config));
    let second = another(place);
    for (driver, id) in [(&*first, ids[0]), (&*second as &dyn Driver, ids[1])] {
        let guest = driver.start(id, &place.fresh()).await.unwrap();
        assert_eq!(run(&*guest, command(&["echo", "here"])).await.text(), "here");
    }
    assert_eq!((first.list().await.unwrap(), second.list().await.unwrap()), (vec![ids[0]], vec![ids[1]]));

    // As after a restart of the server: each finds its own.
    drop((first, second));
    place.restart().await;
    let (first, second) = (place.driver(), another(place));
    assert_eq!((first.list().await.unwrap(), second.list().await.unwrap()), (vec![ids[0]], vec![ids[1]]));
    for (driver, id) in [(&*first, ids[0]), (&*second as &dyn Driver, ids[1])] {
        assert!(matches!(driver.adopt(id).await.unwrap(), Adopted::Running(_)));
        driver.destroy(id).await.unwrap();
    }
    second.settled().await;
    place.settled().await;
    Ok(())
}
