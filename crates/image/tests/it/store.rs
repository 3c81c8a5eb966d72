//! What is kept, for whom, and what is left after crashes and damage.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nagaya_image::{Config, ImageStore, Reference, resolve_user};
use serde_json::json;

use crate::fake::{Answer, Fake, honest};
use crate::images::{Made, Packed, Place, quick, quiet};
use crate::tar::{Entry, Tar};

fn made(names: &[&str]) -> Made {
    let archives: Vec<_> = names.iter().map(|name| Tar::of([Entry::file(name, name)])).collect();
    Made::of(&archives, Packed::Gzip, json!({}))
}

fn layout(made: &Made, name: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    made.write_layout(directory.path(), name);
    directory
}

async fn import(store: &ImageStore, made: &Made, name: &str) -> nagaya_image::Image {
    let directory = layout(made, name);
    let images = store.import(directory.path(), None, quiet()).await.unwrap();
    images.into_iter().next().unwrap()
}

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

#[tokio::test]
async fn images_are_there_again_after_a_restart() {
    let Place { directory, store } = Place::new(quick());
    let one = import(&store, &made(&["a", "b"]), "app:1").await;
    import(&store, &made(&["a", "c"]), "app:2").await;
    let before = store.list();
    drop(store);
    let images = directory.path().join("images");
    assert_eq!(
        fs::metadata(&images).unwrap().permissions().mode() & 0o7777,
        0o700,
        "others could run set-user-id files"
    );
    assert_eq!(fs::metadata(&images).unwrap().uid(), 0);
    // What a crash leaves, and what an operator's mistake does.
    fs::create_dir_all(images.join("incoming/7/root/deep")).unwrap();
    fs::write(images.join("incoming/8"), "").unwrap();
    fs::set_permissions(&images, PermissionsExt::from_mode(0o755)).unwrap();
    let store = ImageStore::open(&images, quick()).unwrap();
    assert_eq!(fs::metadata(&images).unwrap().permissions().mode() & 0o7777, 0o700);
    assert_eq!(store.list(), before);
    assert_eq!(store.find("app:1").unwrap(), one);
    assert_eq!(crate::images::names(&images.join("incoming")), Vec::<String>::new());
    let error = ImageStore::open(&images, quick()).err().unwrap();
    assert_eq!(error.kind(), "locked");
    drop(store);
    ImageStore::open(&images, quick()).unwrap();
}

#[tokio::test]
async fn images_are_found_by_name_digest_and_the_beginning_of_one() {
    let place = Place::new(quick());
    let image = import(&place.store, &made(&["a"]), "app:1").await;
    let hex = image.digest.hex();
    for text in [
        "app:1",
        "docker.io/library/app:1",
        &image.digest.to_string(),
        &hex[..12],
        &hex,
        &format!("sha256:{}", &hex[..20]),
    ] {
        assert_eq!(place.store.find(text).unwrap().digest, image.digest, "{text}");
    }
    for text in ["app", "app:2", &hex[..11], "", "sha256:", "../names.json"] {
        assert_eq!(place.store.find(text).unwrap_err().kind(), "unknown_image", "{text}");
    }
}

#[tokio::test]
async fn what_nobody_needs_is_removed_and_nothing_else() {
    let place = Place::new(quick());
    let store = &place.store;
    let (first, second) = (made(&["shared", "one"]), made(&["shared", "two"]));
    let one = import(store, &first, "app:1").await;
    assert_eq!(store.gc(|_| false).await.unwrap().images, 0, "it has a name");
    // The name moves on.
    let two = import(store, &second, "app:1").await;
    assert_eq!(store.find("app:1").unwrap().digest, two.digest);
    assert_eq!(store.find(&one.digest.to_string()).unwrap().names, []);
    let needed = one.digest;
    assert_eq!(store.gc(move |digest| *digest == needed).await.unwrap().images, 0, "a session needs it");
    let lease = store.hold(&one.digest).unwrap();
    let second_lease = store.hold(&one.digest).unwrap();
    drop(second_lease);
    assert_eq!(store.gc(|_| false).await.unwrap().images, 0, "it is held");
    assert!(store.layers(lease.digest()).unwrap()[0].join("one").exists());
    drop(lease);
    let freed = store.gc(|_| false).await.unwrap();
    assert_eq!((freed.images, freed.layers, freed.bytes), (1, 1, 3));
    assert!(place.has_layer(&first.diff_ids[0]) && !place.has_layer(&first.diff_ids[1]));
    assert_eq!(place.names("blobs").len(), 2, "manifest and configuration of the other");
    assert_eq!(store.hold(&one.digest).err().unwrap().kind(), "unknown_image");
    assert_eq!(store.layers(&one.digest).unwrap_err().kind(), "unknown_image");
    // Removing by name and by digest.
    import(store, &second, "other:1").await;
    assert_eq!(store.remove("app:1").await.unwrap().names, [reference("other:1")]);
    assert_eq!(store.gc(|_| false).await.unwrap().images, 0);
    assert_eq!(store.remove("app:1").await.unwrap_err().kind(), "unknown_image");
    assert_eq!(store.remove(&two.digest.to_string()).await.unwrap().names, []);
    let freed = store.gc(|_| false).await.unwrap();
    assert_eq!((freed.images, freed.layers), (1, 2));
    for directory in ["blobs", "layers", "images", "incoming"] {
        assert_eq!(place.names(directory), Vec::<String>::new(), "{directory}");
    }
    // And it can come again.
    import(store, &first, "app:1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_of_a_pull_under_way_are_not_removed() {
    let image = made(&["quick", "slow"]);
    let slow = image.layers[1];
    let (begun, go) = (Arc::new(tokio::sync::Notify::new()), Arc::new(std::sync::Barrier::new(2)));
    let fake = Fake::of(&image, {
        let (begun, go) = (begun.clone(), go.clone());
        move |request| {
            if request.path.ends_with(&slow.to_string()) {
                begun.notify_one();
                go.wait();
            }
            None
        }
    });
    let place = Place::new(Config { silence_timeout_ms: 60_000, ..fake.config() });
    let (store, name) = (place.store.clone(), fake.reference("app"));
    let pull = tokio::spawn(async move { store.pull(&name, quiet()).await });
    begun.notified().await;
    while !place.has_layer(&image.diff_ids[0]) {
        assert!(!pull.is_finished());
        tokio::task::yield_now().await;
    }
    let freed = place.store.gc(|_| false).await.unwrap();
    assert_eq!(freed.layers, 0);
    assert!(place.has_layer(&image.diff_ids[0]), "the pull needs it");
    tokio::task::spawn_blocking(move || go.wait()).await.unwrap();
    pull.await.unwrap().unwrap();
}

#[tokio::test]
async fn damaged_images_are_forgotten_and_can_come_again() {
    let image = made(&["a", "b"]);
    for damage in ["blob", "config", "record", "layer", "layer record"] {
        let Place { directory, store } = Place::new(quick());
        let known = import(&store, &image, "app:1").await;
        let healthy = import(&store, &made(&["c"]), "healthy:1").await;
        drop(store);
        let at = directory.path().join("images");
        let layer = at.join("layers").join(image.diff_ids[1].hex());
        match damage {
            "blob" => fs::write(at.join("blobs").join(known.digest.hex()), "other").unwrap(),
            "config" => fs::remove_file(at.join("blobs").join(known.config_digest.hex())).unwrap(),
            "record" => fs::write(at.join("images").join(format!("{}.json", known.digest.hex())), "{").unwrap(),
            "layer" => fs::remove_dir_all(&layer).unwrap(),
            _ => fs::write(layer.join("layer.json"), "").unwrap(),
        }
        let store = ImageStore::open(&at, quick()).unwrap();
        assert_eq!(store.find("app:1").unwrap_err().kind(), "unknown_image", "{damage}");
        assert_eq!(store.find("healthy:1").unwrap().digest, healthy.digest, "{damage}");
        assert_eq!(import(&store, &image, "app:1").await.layers, known.layers, "{damage}");
        assert!(store.layers(&known.digest).unwrap()[0].join("b").exists(), "{damage}");
    }
}

#[tokio::test]
async fn equal_layers_and_a_root_that_hides_all_are_stacked_as_overlayfs_wants_them() {
    let layer = |name: &str| Tar::of([Entry::file(name, "")]);
    let hides = Tar::of([Entry::file("top", ""), Entry::file(".wh..wh..opq", "")]);
    let place = Place::new(quick());
    let twice = Made::of(&[layer("a"), layer("b"), layer("a")], Packed::Zstd, json!({}));
    let image = import(&place.store, &twice, "twice").await;
    let stack: Vec<_> =
        place.store.layers(&image.digest).unwrap().iter().map(|path| crate::images::names(path)).collect();
    assert_eq!(stack, [["a"], ["b"]]);
    let hiding = Made::of(&[layer("a"), layer("b"), hides, layer("c")], Packed::Plain, json!({}));
    let image = import(&place.store, &hiding, "hides").await;
    let stack: Vec<_> =
        place.store.layers(&image.digest).unwrap().iter().map(|path| crate::images::names(path)).collect();
    assert_eq!(stack, [["c"], ["top"]]);
    assert_eq!(place.names("layers").len(), 4, "each layer is there once");
}

#[tokio::test]
async fn commands_run_as_the_account_that_the_image_has() {
    let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\nodd:x:1002:1002::relative:\nbroken\nbig:x:70000:1::/:\n7:x:1007:1007::/seven:\n";
    let group = "root:x:0:\nstaff:x:50:app\nbig:x:70000:\n";
    let place = Place::new(quick());
    let mut number = 0;
    let mut image = async |archives: &[Vec<u8>], user: &str| {
        number += 1;
        let made = Made::of(archives, Packed::Plain, json!({"User": user}));
        let image = import(&place.store, &made, &format!("app:{number}")).await;
        let found = place.store.user(&image.digest).await.map_err(|error| error.to_string());
        found.map(|user| (user.name, user.uid, user.gid, user.home))
    };
    let base = Tar::of([Entry::file("etc/passwd", passwd), Entry::file("etc/group", group)]);
    let upper = Tar::of([Entry::file("etc/other", "")]);
    let is = |name: &str, uid, gid, home: &str| Ok((name.to_owned(), uid, gid, home.to_owned()));
    for (user, found) in [
        ("", is("root", 0, 0, "/root")),
        ("0", is("root", 0, 0, "/root")),
        ("root", is("root", 0, 0, "/root")),
        ("app", is("app", 1000, 1001, "/home/app")),
        ("1000", is("app", 1000, 1001, "/home/app")),
        ("app:staff", is("app", 1000, 50, "/home/app")),
        ("app:7", is("app", 1000, 7, "/home/app")),
        ("1000:0", is("app", 1000, 0, "/home/app")),
        ("app:", is("app", 1000, 1001, "/home/app")),
        (":staff", is("root", 0, 50, "/root")),
        ("4000:staff", is("4000", 4000, 50, "/")),
        ("odd", is("odd", 1002, 1002, "/")),
        ("7", is("7", 1007, 1007, "/seven")),
    ] {
        assert_eq!(image(&[base.clone(), upper.clone()], user).await, found, "{user:?}");
    }
    for (user, says) in [
        ("nobody", "user \"nobody\" is not in its /etc/passwd"),
        ("app:nobody", "group \"nobody\" is not in its /etc/group"),
        ("-1", "\"-1\" is not in"),
        ("4294967296", "is not in"),
        ("70000", "0 to 65535"),
        ("big", "0 to 65535"),
        ("app:big", "0 to 65535"),
        ("app:70001", "0 to 65535"),
    ] {
        let error = image(std::slice::from_ref(&base), user).await.unwrap_err();
        assert!(error.contains(says), "{user}: {error}");
    }
    let none = Tar::of([Entry::file("program", "")]);
    assert_eq!(image(std::slice::from_ref(&none), "").await, is("root", 0, 0, "/"));
    assert_eq!(image(std::slice::from_ref(&none), "5:6").await, is("5", 5, 6, "/"));
    // What lies over it counts: another file, a whiteout, a directory that hides, links of the image, things that are no files.
    let other = "app:x:5:5::/other:\n";
    for (what, over, found) in [
        ("another", Tar::of([Entry::file("etc/passwd", other)]), is("app", 5, 5, "/other")),
        (
            "link",
            Tar::of([Entry::file("real", other), Entry::symlink("etc/passwd", "/etc/../real")]),
            is("app", 5, 5, "/other"),
        ),
        (
            "link above",
            Tar::of([Entry::file("real/passwd", other), Entry::symlink("etc", "real")]),
            is("app", 5, 5, "/other"),
        ),
        (
            "link out",
            Tar::of([Entry::file("real", other), Entry::symlink("etc/passwd", "../../../real")]),
            is("app", 5, 5, "/other"),
        ),
    ] {
        assert_eq!(image(&[base.clone(), over], "app").await, found, "{what}");
    }
    let huge = "x".repeat((1 << 20) + 1);
    for (what, over) in [
        ("whiteout", Tar::of([Entry::file("etc/.wh.passwd", "")])),
        ("whiteout above", Tar::of([Entry::file(".wh.etc", "")])),
        ("opaque", Tar::of([Entry::file("etc/.wh..wh..opq", "")])),
        ("root", Tar::of([Entry::file(".wh..wh..opq", "")])),
        ("file above", Tar::of([Entry::file("etc", "")])),
        ("fifo", Tar::of([Entry::new(b'6', "etc/passwd")])),
        ("directory", Tar::of([Entry::directory("etc/passwd")])),
        ("circle", Tar::of([Entry::symlink("etc/passwd", "passwd")])),
        ("dangling", Tar::of([Entry::symlink("etc/passwd", "/proc/self/root/etc/passwd")])),
        ("huge", Tar::of([Entry::file("etc/passwd", &huge)])),
    ] {
        assert!(image(&[base.clone(), over], "app").await.is_err(), "{what}");
    }
    assert_eq!(resolve_user(&[], "", "it").unwrap().home, "/");
}

/// Pulls in a process of its own, which the test below kills.
#[tokio::test]
async fn child_that_is_killed() {
    let Ok(told) = std::env::var("NAGAYA_IMAGE_TEST_PULL") else { return };
    let (directory, name) = told.split_once('|').unwrap();
    let name: Reference = name.parse().unwrap();
    let config = Config { registries_insecure: vec![name.registry().to_owned()], ..Config::default() };
    let store = ImageStore::open(directory.as_ref(), config).unwrap();
    store.pull(&name, quiet()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_kill_9_no_half_layer_has_a_name_and_the_pull_can_be_repeated() {
    let content = "x".repeat(100_000);
    let names: Vec<_> = (0..200).map(|number| format!("d{}/file-{number}", number % 7)).collect();
    let big = Tar::of(names.iter().map(|name| Entry::file(name, &content)));
    let image = Made::of(&[Tar::of([Entry::file("first", "")]), big], Packed::Plain, json!({}));
    let layer = image.layers[1];
    let length = image.blobs[&layer].len();
    // It stops in the middle of the second layer; later at its very end, where only the flush and the name are missing.
    for stops_at in [length / 3, length - 600, length - 1] {
        let (reached, killed) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicUsize::new(0)));
        let fake = Fake::of(&image, {
            let (image, reached, killed) = (image.clone(), reached.clone(), killed.clone());
            move |request| {
                let stops = request.path.ends_with(&layer.to_string()) && killed.load(Ordering::SeqCst) == 0;
                stops.then(|| {
                    reached.notify_one();
                    let answer = honest(&image, request);
                    Answer { announced: Some(length), body: answer.body[..stops_at].to_vec(), ..answer }
                })
            }
        });
        let directory = tempfile::tempdir().unwrap();
        let images = directory.path().join("images");
        let name = fake.reference("app");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::child_that_is_killed"])
            .env("NAGAYA_IMAGE_TEST_PULL", format!("{}|{name}", images.display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        reached.notified().await;
        // The first layer is there, and what was sent of the second is being unpacked.
        let first = images.join("layers").join(image.diff_ids[0].hex());
        while !first.exists() || fs::read_dir(images.join("incoming")).map_or(0, Iterator::count) != 1 {
            assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
            tokio::task::yield_now().await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        killed.store(1, Ordering::SeqCst);
        assert_eq!(crate::images::names(&images.join("layers")), [image.diff_ids[0].hex()], "a half layer has a name");
        assert_eq!(fs::read_dir(images.join("incoming")).unwrap().count(), 1);
        let store = ImageStore::open(&images, fake.config()).unwrap();
        assert_eq!(fs::read_dir(images.join("incoming")).unwrap().count(), 0);
        assert_eq!(store.list(), []);
        let pulled = store.pull(&name, quiet()).await.unwrap();
        assert_eq!(pulled.digest, image.digest());
        assert_eq!(fake.asked(&image.layers[0].to_string()).len(), 1, "the whole layer stayed");
        let root = &store.layers(&pulled.digest).unwrap()[0];
        assert!(names.iter().all(|name| fs::metadata(root.join(name)).unwrap().len() == 100_000));
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mount =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(directory.path()).status().unwrap();
    assert!(mount.success(), "tmpfs cannot be mounted");
    let outcome = {
        let store = ImageStore::open(&directory.path().join("images"), quick()).unwrap();
        let content = "x".repeat(4 << 20);
        let image = Made::of(&[Tar::of([Entry::file("large", &content)])], Packed::Gzip, json!({}));
        let layout = layout(&image, "app:1");
        let outcome = store.import(layout.path(), None, quiet()).await;
        let left = crate::images::names(&directory.path().join("images/incoming"));
        let small = import(&store, &made(&["small"]), "small").await;
        (outcome.map(|_| ()).map_err(|error| error.kind()), left, small.digest)
    };
    let unmount = Command::new("umount").arg(directory.path()).status().unwrap();
    assert!(unmount.success());
    assert_eq!(outcome, (Err("no_space"), vec![], made(&["small"]).digest()));
}
