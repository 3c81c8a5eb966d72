//! Blobs in a directory, and everything that can happen to them.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nagaya_blobs::{BlobStore, Manifest};
use nagaya_engine::model::Limit;
use nagaya_engine::ports::{BlobError, Blobs};
use proptest::prelude::*;

use common::{
    BLOCK, CHUNK, allocated, argument, assert_whole, blobs, example, image, name, noise, read_through, runtime, start,
};

#[test]
fn images_come_back_byte_for_byte_with_their_holes() {
    let runtime = runtime();
    let any_piece = (0u64..6 * CHUNK, prop_oneof![1u64..100, 1u64..40_000, Just(BLOCK), Just(CHUNK)]);
    let any_image = (0u64..6 * CHUNK, prop::collection::vec(any_piece, 0..8), 0u64..20);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&any_image, |(size, pieces, zeros)| {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let size = if zeros % 2 == 0 { size / BLOCK * BLOCK } else { size };
        let fits = |(offset, length): (u64, u64)| (offset < size).then(|| (offset, length.min(size - offset)));
        let pieces: Vec<_> = pieces.into_iter().filter_map(fits).collect();
        image(&path("image"), size, &pieces);
        if zeros > 10 && size > 0 {
            // Zeros that were written come back as a hole.
            let length = (zeros * BLOCK).min(size) as usize;
            File::options().write(true).open(path("image")).unwrap().write_all_at(&vec![0; length], 0).unwrap();
        }
        runtime.block_on(async {
            let store = BlobStore::open(&path("blobs")).unwrap();
            let stored = store.store(&path("image")).await.unwrap();
            store.restore(&stored.manifest, &path("restored")).await.unwrap();
            let content = fs::read(path("image")).unwrap();
            prop_assert!(fs::read(path("restored")).unwrap() == content, "the content differs");
            // The file system's own record of many pieces takes a few blocks.
            prop_assert!(allocated(&path("restored")) <= stored.size_bytes + 8 * BLOCK, "holes stay holes");
            prop_assert!(read_through(&store, &stored.manifest).await.unwrap() == content);
            let not_zero = content.chunks(BLOCK as usize).filter(|block| block.iter().any(|byte| *byte != 0)).count();
            prop_assert_eq!(stored.size_bytes, not_zero as u64 * BLOCK);
            let files =
                |kind| blobs(&path("blobs"), kind).iter().map(|file| file.metadata().unwrap().len()).sum::<u64>();
            prop_assert_eq!(stored.stored_bytes, files("chunks") + files("images"));
            prop_assert_eq!(store.store(&path("restored")).await.unwrap(), stored);
            assert_whole(&path("blobs"));
            Ok(())
        })
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

#[test]
fn an_empty_file_that_is_there_is_filled_and_as_empty_as_before_after_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    example(&path("image"));
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        let prepared = File::options().read(true).write(true).create_new(true).open(path("prepared")).unwrap();
        for blob in blobs(&path("blobs"), "chunks") {
            let whole = fs::read(&blob).unwrap();
            let mut bytes = whole.clone();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&blob, bytes).unwrap();
            let error = store.restore(&manifest, &path("prepared")).await.unwrap_err();
            assert!(matches!(&error, BlobError::Corrupt(digest) if *digest == name(&blob)), "{error}");
            assert_eq!(prepared.metadata().unwrap().len(), 0);
            fs::write(&blob, whole).unwrap();
        }
        store.restore(&manifest, &path("prepared")).await.unwrap();
        let mut content = Vec::new();
        (&prepared).read_to_end(&mut content).unwrap();
        assert!(content == fs::read(path("image")).unwrap(), "whoever had the file open sees the image in it");
    });
}

#[test]
fn images_share_what_they_have_in_common() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        image(&path("one"), 8 * CHUNK, &[(0, 8 * CHUNK)]);
        let one = store.store(&path("one")).await.unwrap();
        assert_eq!(blobs(&path("blobs"), "chunks").len(), 8);
        fs::copy(path("one"), path("other")).unwrap();
        File::options().write(true).open(path("other")).unwrap().write_all_at(b"changed", 5 * CHUNK + 77).unwrap();
        let other = store.store(&path("other")).await.unwrap();
        assert_eq!(blobs(&path("blobs"), "chunks").len(), 9);
        assert_eq!(one.stored_bytes, other.stored_bytes, "before sharing");

        let freed = store.retain(std::slice::from_ref(&other.manifest)).await.unwrap();
        assert_eq!(freed, CHUNK + 24 + 8 * 164, "one chunk and one manifest");
        store.restore(&other.manifest, &path("restored")).await.unwrap();
        assert!(fs::read(path("restored")).unwrap() == fs::read(path("other")).unwrap());
        let gone = store.restore(&one.manifest, &path("gone")).await.unwrap_err();
        assert!(matches!(gone, BlobError::Missing(name) if name == one.manifest));
        assert!(store.retain(&[]).await.unwrap() > 8 * CHUNK);
        assert!(blobs(&path("blobs"), "chunks").is_empty() && blobs(&path("blobs"), "images").is_empty());
    });
}

/// A way in which a disk or an operator damages a file; false: it is missing afterwards.
type Damage = fn(&Path) -> bool;

const DAMAGES: [(&str, Damage); 5] = [
    ("a flipped bit", |path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(path, bytes).unwrap();
        true
    }),
    ("cut short", |path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        true
    }),
    ("emptied", |path| {
        File::create(path).unwrap();
        true
    }),
    ("grown", |path| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() + (1 << 40)).unwrap();
        true
    }),
    ("removed", |path| {
        fs::remove_file(path).unwrap();
        false
    }),
];

#[test]
fn every_damage_is_found_before_an_image_exists_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::create_dir(path("images")).unwrap();
    example(&path("image"));
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        let mut all = blobs(&path("blobs"), "chunks");
        assert_eq!(all.len(), 4);
        all.push(path("blobs").join("images").join(&manifest));
        for (damage, apply) in DAMAGES {
            for blob in &all {
                let there = apply(blob);
                let named = |error: &BlobError| match error {
                    BlobError::Corrupt(digest) => there && *digest == name(blob),
                    BlobError::Missing(digest) => !there && *digest == name(blob),
                    _ => false,
                };
                let error = store.restore(&manifest, &path("images").join("one")).await.unwrap_err();
                assert!(named(&error), "{damage}: {error}");
                let left = fs::read_dir(path("images")).unwrap().count();
                assert_eq!(left, 0, "{damage}: nothing is there");
                let error = read_through(&store, &manifest).await.unwrap_err();
                assert!(named(&error), "{damage}: {error}");

                // Storing the same once more heals what was stored before.
                assert_eq!(store.store(&path("image")).await.unwrap().manifest, manifest);
                assert_whole(&path("blobs"));
            }
        }
        store.restore(&manifest, &path("images").join("one")).await.unwrap();
    });
}

#[test]
fn a_chunk_in_the_wrong_place_is_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), CHUNK, &[(0, 2 * BLOCK)]);
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        let stored = store.store(&path("image")).await.unwrap();
        let file = path("blobs").join("images").join(&stored.manifest);
        let mut manifest = Manifest::parse(&fs::read(file).unwrap()).unwrap();
        // Well formed, with the right name, and asking for more blocks than the chunk has.
        manifest.chunks[0].blocks.insert(7);
        let bytes = manifest.encode();
        let forged = nagaya_blobs::Digest::of(&bytes).to_string();
        fs::write(path("blobs").join("images").join(&forged), bytes).unwrap();
        let chunk = name(&blobs(&path("blobs"), "chunks")[0]);
        for error in [
            store.restore(&forged, &path("restored")).await.unwrap_err(),
            read_through(&store, &forged).await.unwrap_err(),
        ] {
            assert!(matches!(&error, BlobError::Corrupt(digest) if *digest == chunk), "{error}");
        }
        assert!(!path("restored").exists());
    });
}

#[test]
fn names_that_are_no_digests_reach_no_file() {
    let directory = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let store = BlobStore::open(directory.path()).unwrap();
        for bad in ["", "../owner", "/etc/passwd", &"A".repeat(64)] {
            store.restore(bad, &directory.path().join("x")).await.unwrap_err();
            store.open(bad).await.unwrap_err();
            store.retain(&[bad.to_owned()]).await.unwrap_err();
        }
    });
}

#[test]
fn retain_takes_nothing_away_while_a_kept_manifest_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        let mut manifests = Vec::new();
        for (number, name) in (1..).zip(["kept", "deleted"]) {
            image(&path(name), 10 * CHUNK, &[(number * CHUNK, CHUNK)]);
            manifests.push(store.store(&path(name)).await.unwrap().manifest);
        }
        let manifest = path("blobs").join("images").join(&manifests[0]);
        let whole = fs::read(&manifest).unwrap();
        fs::write(&manifest, b"damaged").unwrap();
        store.retain(&manifests[..1]).await.unwrap();
        assert_eq!(blobs(&path("blobs"), "chunks").len(), 2, "nobody knows which are needed");
        assert!(manifest.exists(), "it may be repaired");
        fs::write(&manifest, whole).unwrap();
        fs::write(path("blobs").join("chunks").join("README"), "not a blob").unwrap();
        assert_eq!(store.retain(&manifests[..1]).await.unwrap(), CHUNK);
        assert!(path("blobs").join("chunks").join("README").exists());
        store.restore(&manifests[0], &path("restored")).await.unwrap();
    });
}

#[test]
fn what_is_not_an_image_is_refused_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        store.store(&path("missing")).await.unwrap_err();
        store.store(directory.path()).await.unwrap_err();
        File::create(path("huge")).unwrap().set_len((1 << 40) + 1).unwrap();
        let error = store.store(&path("huge")).await.unwrap_err();
        assert!(matches!(&error, BlobError::Exhausted(Limit::ImageBytes)), "{error}");
        File::create(path("largest")).unwrap().set_len(1 << 40).unwrap();
        let stored = store.store(&path("largest")).await.unwrap();
        store.restore(&stored.manifest, &path("restored")).await.unwrap();
        assert_eq!(path("restored").metadata().unwrap().len(), 1 << 40);
        store.restore(&stored.manifest, &path("no such directory").join("image")).await.unwrap_err();
        assert_whole(&path("blobs"));
    });
}

#[test]
fn an_image_that_is_there_already_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    example(&path("image"));
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        fs::write(path("restored"), "of an earlier try").unwrap();
        store.restore(&manifest, &path("restored")).await.unwrap();
        assert!(fs::read(path("restored")).unwrap() == fs::read(path("image")).unwrap());
        for private in [path("restored"), blobs(&path("blobs"), "chunks").remove(0)] {
            assert_eq!(private.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{private:?}");
        }
    });
}

#[test]
fn a_slow_reader_gets_everything_and_one_that_leaves_stops_the_reading() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), 9 * CHUNK + 5, &[(0, 3 * CHUNK), (8 * CHUNK + 5, CHUNK)]);
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        let mut reader = store.open(&manifest).await.unwrap();
        let mut bytes = Vec::new();
        while let Some(piece) = reader.chunks.recv().await {
            let piece = piece.unwrap();
            assert!(piece.len() <= 1 << 20);
            bytes.extend_from_slice(&piece);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(bytes == fs::read(path("image")).unwrap());
        let mut reader = store.open(&manifest).await.unwrap();
        reader.chunks.recv().await.unwrap().unwrap();
        drop(reader);
        // Deleting does not wait for readers; one that is in the middle is told.
        let mut reader = store.open(&manifest).await.unwrap();
        reader.chunks.recv().await.unwrap().unwrap();
        store.retain(&[]).await.unwrap();
        let mut last = Ok(Default::default());
        while let Some(piece) = reader.chunks.recv().await {
            last = piece;
        }
        assert!(matches!(last, Err(BlobError::Missing(_))));
    });
}

/// The program that the next tests kill.
#[test]
#[ignore = "started by other tests"]
fn program_that_stores_and_restores() {
    let directory = argument("NAGAYA_IMAGE_TEST");
    let path = |name: &str| directory.join(name);
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        // To the file, because the harness captures output, and only once it is acknowledged.
        fs::write(path("acknowledged"), &manifest).unwrap();
        store.restore(&manifest, &path("images").join("restored")).await.unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        fs::write(path("status"), status).unwrap();
    });
}

#[test]
fn kill_9_between_any_two_chunks_leaves_nothing_half() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), 20 * CHUNK, &[(0, 20 * CHUNK)]);
    let content = fs::read(path("image")).unwrap();
    let (mut killed_while_storing, mut killed_while_restoring) = (0, 0);
    for round in 0..16u64 {
        for name in ["blobs", "images"] {
            let _ = fs::remove_dir_all(path(name));
        }
        let _ = fs::remove_file(path("acknowledged"));
        fs::create_dir(path("images")).unwrap();
        let mut child = start("program_that_stores_and_restores", &[("NAGAYA_IMAGE_TEST", directory.path())]);
        // Killed when so many chunks have been stored; later rounds wait for the restoration to begin.
        loop {
            let chunks = fs::read_dir(path("blobs").join("chunks")).map_or(0, Iterator::count) as u64;
            let wanted = if round < 10 { chunks >= 2 * round } else { path("acknowledged").exists() };
            if wanted || child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        if round >= 10 {
            std::thread::sleep(Duration::from_millis(3 * (round - 10)));
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let store = BlobStore::open(&path("blobs")).unwrap();
        assert_whole(&path("blobs"));
        let restored: Vec<_> = fs::read_dir(path("images")).unwrap().map(|entry| entry.unwrap().path()).collect();
        for image in &restored {
            assert!(fs::read(image).unwrap() == content, "an image that has a name is whole");
        }
        runtime().block_on(async {
            match fs::read_to_string(path("acknowledged")) {
                Ok(manifest) if manifest.len() == 64 => {
                    killed_while_restoring += u32::from(restored.is_empty());
                    store.restore(&manifest, &path("again")).await.unwrap();
                    assert!(fs::read(path("again")).unwrap() == content);
                }
                _ => killed_while_storing += 1,
            }
            store.store(&path("image")).await.unwrap();
        });
        assert_whole(&path("blobs"));
    }
    println!("killed while storing {killed_while_storing} times, while restoring {killed_while_restoring} times");
    assert!(killed_while_storing >= 5, "{killed_while_storing}");
}

#[test]
fn memory_does_not_grow_with_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), 256 << 20, &[(0, 200 << 20)]);
    fs::create_dir(path("images")).unwrap();
    let mut child = start("program_that_stores_and_restores", &[("NAGAYA_IMAGE_TEST", directory.path())]);
    let mut output = String::new();
    child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert!(child.wait().unwrap().success(), "{output}");
    let status = fs::read_to_string(path("status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    println!("peak of resident memory: {peak_kib} KiB");
    assert!(peak_kib < 48 << 10, "{peak_kib} KiB");
}

/// A file system of its own; `None` where this may not be mounted.
struct OwnDisk(tempfile::TempDir);

impl OwnDisk {
    fn small(size: &str) -> Option<Self> {
        Self::mount(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "nagaya-blobs-test"]))
    }

    /// One whose files can share blocks; `image` is where it keeps them.
    fn sharing(image: &Path) -> Option<Self> {
        File::create(image).unwrap().set_len(1 << 30).unwrap();
        let made = Command::new("mkfs.xfs").arg("-q").arg(image).status();
        if !made.is_ok_and(|status| status.success()) {
            return None;
        }
        Self::mount(Command::new("mount").args(["-t", "xfs", "-o", "loop"]).arg(image))
    }

    fn mount(command: &mut Command) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = command.arg(directory.path()).status();
        mounted.is_ok_and(|status| status.success()).then_some(Self(directory))
    }
}

impl Drop for OwnDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.path()).status().unwrap();
        assert!(unmounted.success());
    }
}

#[test]
fn where_files_can_share_blocks_no_bytes_are_copied() {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = OwnDisk::sharing(&directory.path().join("disk")) else {
        println!("NOT RUN: XFS cannot be made and mounted here (this needs root and mkfs.xfs)");
        return;
    };
    let path = |name: &str| disk.0.path().join(name);
    // Every piece of the file is one that another file has as well.
    let is_shared = |path: &Path| {
        let output = Command::new("filefrag").arg("-v").arg(path).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let pieces: Vec<_> = text.lines().filter(|line| line.contains("..")).collect();
        !pieces.is_empty() && pieces.iter().all(|line| line.contains("shared"))
    };
    runtime().block_on(async {
        let store = BlobStore::open(&path("blobs")).unwrap();
        // Odd pieces, so that runs begin anywhere, but none so short that it is copied; and an end that is no whole block.
        let pieces = [(0, 12 * CHUNK), (20 * CHUNK + 3 * BLOCK, 20 * BLOCK), (30 * CHUNK + 16 * BLOCK, 2 * CHUNK)];
        for size in [40 * CHUNK, 32 * CHUNK + 16 * BLOCK + 77] {
            image(&path("image"), size, &pieces);
            let stored = store.store(&path("image")).await.unwrap();
            store.restore(&stored.manifest, &path("restored")).await.unwrap();
            // A block that the image's end cuts is copied.
            if size % BLOCK == 0 {
                assert!(is_shared(&path("restored")));
            }
            let chunks = blobs(&path("blobs"), "chunks");
            let whole = chunks.iter().find(|blob| blob.metadata().unwrap().len() == CHUNK).unwrap();
            assert!(is_shared(whole));
            assert!(fs::read(path("restored")).unwrap() == fs::read(path("image")).unwrap());
            assert_eq!(path("restored").metadata().unwrap().len(), size);
            assert!(read_through(&store, &stored.manifest).await.unwrap() == fs::read(path("image")).unwrap());

            // What is written to the one is not seen in the others.
            let changed = File::options().write(true).open(path("restored")).unwrap();
            changed.write_all_at(&[7; 3 * BLOCK as usize], CHUNK).unwrap();
            assert_whole(&path("blobs"));
            store.retain(&[]).await.unwrap();
            for name in ["image", "restored"] {
                fs::remove_file(path(name)).unwrap();
            }
        }
    });
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing_behind() {
    let Some(disk) = OwnDisk::small("24m") else {
        println!("NOT RUN: a file system cannot be mounted here (this needs root)");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let on_disk = |name: &str| disk.0.path().join(name);
    let full = |error: BlobError| matches!(error, BlobError::Exhausted(Limit::HostDisk));
    runtime().block_on(async {
        let store = BlobStore::open(&on_disk("blobs")).unwrap();
        image(&path("small"), CHUNK, &[(0, CHUNK)]);
        let small = store.store(&path("small")).await.unwrap();
        image(&path("large"), 20 * CHUNK, &[(CHUNK, 10 * CHUNK)]);
        assert!(full(store.store(&path("large")).await.unwrap_err()));
        assert_whole(&on_disk("blobs"));
        store.restore(&small.manifest, &path("restored")).await.unwrap();
        assert!(fs::read(path("restored")).unwrap() == noise(0, CHUNK as usize));
        // What did get stored is of use to nobody, and goes.
        store.retain(std::slice::from_ref(&small.manifest)).await.unwrap();
        assert_eq!(blobs(&on_disk("blobs"), "chunks").len(), 1);

        let roomy = BlobStore::open(&path("blobs")).unwrap();
        let large = roomy.store(&path("large")).await.unwrap();
        fs::create_dir(on_disk("images")).unwrap();
        assert!(full(roomy.restore(&large.manifest, &on_disk("images").join("large")).await.unwrap_err()));
        assert_eq!(fs::read_dir(on_disk("images")).unwrap().count(), 0);
        assert!(store.store(&path("small")).await.is_ok(), "the space is free again");
    });
}
