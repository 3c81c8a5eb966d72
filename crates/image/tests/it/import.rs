//! Images from files, as several programs write them.

use std::fs;
use std::path::Path;
use std::process::Command;

use nagaya_image::{Digest, ImageError, Reference};
use serde_json::json;

use crate::images::{Made, Packed, Place, gzip, quick, quiet};
use crate::tar::{Entry, Tar};

fn made() -> Made {
    let lower = Tar::of([Entry::directory("etc"), Entry::file("etc/lower", "lower")]);
    let upper = Tar::of([Entry::file("etc/upper", "upper")]);
    Made::of(&[lower, upper], Packed::Gzip, json!({"Cmd": ["x"]}))
}

fn run(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// An archive of a directory, made by tar.
fn archived(directory: &Path) -> Vec<u8> {
    run("tar", &["-cC", directory.to_str().unwrap(), "."])
}

/// What `docker save` of old versions wrote.
fn saved(made: &Made, archives: &[(&str, &[u8])], tags: &[&str]) -> Vec<u8> {
    let config = made.blobs.iter().find(|(digest, _)| !made.layers.contains(digest)).unwrap();
    let config_name = format!("{}.json", config.0.hex());
    let layers: Vec<_> = archives.iter().map(|(name, _)| format!("{name}/layer.tar")).collect();
    let manifest = json!([{"Config": config_name, "RepoTags": tags, "Layers": layers}]).to_string();
    let mut tar = Tar::new();
    for ((_, content), path) in archives.iter().zip(&layers) {
        tar = match content.strip_prefix(b"-> ") {
            Some(target) => tar.add(&Entry { link: target, ..Entry::new(b'2', path) }),
            None => tar.add(&Entry { content, ..Entry::new(b'0', path) }),
        };
    }
    tar = tar.add(&Entry { content: config.1, ..Entry::new(b'0', &config_name) });
    tar.add(&Entry::file("manifest.json", &manifest)).end()
}

#[tokio::test]
async fn layouts_and_archives_of_them_are_imported_plain_and_compressed() {
    let made = made();
    let directory = tempfile::tempdir().unwrap();
    made.write_layout(directory.path(), "registry.example/team/app:2");
    let archive = archived(directory.path());
    let files = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = files.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let plain = write("plain", &archive);
    let gzipped = write("gzip", &gzip(&archive));
    let zstd = write("zstd", &zstd::encode_all(&archive[..], 1).unwrap());
    for path in [directory.path(), &plain, &gzipped, &zstd] {
        let place = Place::new(quick());
        let images = place.store.import(path, None, quiet()).await.unwrap();
        assert_eq!(images.len(), 1);
        assert_eq!(images[0].digest, made.digest());
        assert_eq!(images[0].names[0].to_string(), "registry.example/team/app:2");
        let layers = place.store.layers(&images[0].digest).unwrap();
        assert_eq!(fs::read_to_string(layers[0].join("etc/upper")).unwrap(), "upper");
        assert_eq!(place.names("incoming"), Vec::<String>::new());
        let name: Reference = "mine".parse().unwrap();
        let named = place.store.import(path, Some(name.clone()), quiet()).await.unwrap();
        assert!(named[0].names.contains(&name));
    }
    let place = Place::new(quick());
    let piped = place.store.import_from(std::io::Cursor::new(gzip(&archive)), None, quiet()).await.unwrap();
    assert_eq!(piped[0].digest, made.digest());
}

#[tokio::test]
async fn what_docker_save_writes_is_imported_with_its_names() {
    let lower = Tar::of([Entry::file("lower", "")]);
    let made = Made::of(&[lower.clone(), lower.clone()], Packed::Plain, json!({}));
    // A layer that is there twice was a link once.
    let archive =
        saved(&made, &[("aaa", &lower), ("bbb", b"-> ../aaa/layer.tar")], &["app:1", "other.example/app:2", "no good"]);
    let place = Place::new(quick());
    let images = place.store.import_from(std::io::Cursor::new(archive.clone()), None, quiet()).await.unwrap();
    let names: Vec<_> = images[0].names.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["docker.io/library/app:1", "other.example/app:2"]);
    let again = Place::new(quick()).store.import_from(std::io::Cursor::new(archive), None, quiet()).await.unwrap();
    assert_eq!(images[0].digest, again[0].digest, "the manifest that is made of it is always the same");
}

#[tokio::test]
async fn archives_of_skopeo_are_imported() {
    let made = made();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    made.write_layout(&directory.path().join("layout"), "1");
    let source = format!("oci:{}:1", at("layout"));
    for (kind, name) in [("docker-archive", "docker"), ("oci-archive", "oci")] {
        run("skopeo", &["copy", "--insecure-policy", "--quiet", &source, &format!("{kind}:{}:team/app:3", at(name))]);
        let place = Place::new(quick());
        let images = place.store.import(at(name).as_ref(), None, quiet()).await.unwrap();
        assert_eq!(images[0].names[0].to_string(), "docker.io/team/app:3", "{kind}");
        let diff_ids: Vec<_> = images[0].layers.iter().map(|layer| layer.diff_id).collect();
        assert_eq!(diff_ids, made.diff_ids, "{kind}");
        assert_eq!(images[0].config.cmd, ["x"], "{kind}");
    }
}

#[tokio::test]
async fn an_index_in_a_layout_gives_the_image_for_this_platform() {
    let made = made();
    let directory = tempfile::tempdir().unwrap();
    made.write_layout(directory.path(), "x");
    let index = made.index();
    fs::write(directory.path().join("blobs/sha256").join(Digest::of(&index).hex()), &index).unwrap();
    let entry = json!({
        "mediaType": crate::images::OCI_INDEX, "digest": Digest::of(&index), "size": index.len(),
        "annotations": {"io.containerd.image.name": "docker.io/library/app:7", "org.opencontainers.image.ref.name": "7"},
    });
    fs::write(directory.path().join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string())
        .unwrap();
    let place = Place::new(quick());
    let images = place.store.import(directory.path(), None, quiet()).await.unwrap();
    assert_eq!((images.len(), images[0].digest), (1, made.digest()));
    assert_eq!(images[0].names[0].to_string(), "docker.io/library/app:7");
}

async fn refusal(archive: Vec<u8>) -> ImageError {
    let place = Place::new(quick());
    let error =
        place.store.import_from(std::io::Cursor::new(archive), None, quiet()).await.expect_err("it was imported");
    assert_eq!(place.names("incoming"), Vec::<String>::new(), "{error}");
    assert_eq!(place.names("images"), Vec::<String>::new(), "{error}");
    error
}

#[tokio::test]
async fn archives_that_are_no_images_are_refused() {
    let layer = Tar::of([Entry::file("f", "")]);
    let made = Made::of(std::slice::from_ref(&layer), Packed::Plain, json!({}));
    let many: Vec<_> = (0..10_001).map(|number| format!("{number}")).collect();
    let good = saved(&made, &[("a", &layer)], &["a:1"]);
    for (archive, kind, says) in [
        (vec![], "invalid_image", "neither the index.json"),
        (b"no archive".to_vec(), "invalid_image", "in the middle of a header"),
        (good[..good.len() / 2].to_vec(), "invalid_image", ""),
        (gzip(b"x")[..10].to_vec(), "invalid_image", "decompressed"),
        (Tar::of([Entry::file("index.json", "{}")]), "invalid_image", "schemaVersion"),
        (Tar::of([Entry::file("index.json", r#"{"schemaVersion":2,"manifests":[]}"#)]), "no_platform", "none"),
        (Tar::of([Entry::file("manifest.json", "[]")]), "invalid_image", "it has no image"),
        (
            Tar::of([Entry::file("manifest.json", r#"[{"Config":"../../etc/passwd","Layers":[]}]"#)]),
            "invalid_image",
            "it has no ../../etc/passwd",
        ),
        (saved(&made, &[], &[]), "invalid_image", "0 layers"),
        (saved(&made, &[("a", &layer), ("b", &layer)], &[]), "invalid_image", "names 1 layers"),
        (saved(&made, &[("a", &Tar::of([Entry::file("other", "")]))], &[]), "digest_mismatch", "content of the layer"),
        (saved(&made, &[("a", b"-> ../../../../etc/passwd")], &[]), "invalid_image", "has no a/layer.tar"),
        (saved(&made, &[("a", b"-> ../a/layer.tar")], &[]), "invalid_image", "has no a/layer.tar"),
        (Tar::of(many.iter().map(|name| Entry::file(name, ""))), "invalid_image", "more than 10000 files"),
    ] {
        let error = refusal(archive).await;
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(says), "expected {says}: {error}");
    }
    // A blob that is not what its name says; and paths that are no files.
    let directory = tempfile::tempdir().unwrap();
    made.write_layout(directory.path(), "a:1");
    let blob = directory.path().join("blobs/sha256").join(made.digest().hex());
    let place = Place::new(quick());
    fs::write(&blob, "{}").unwrap();
    assert_eq!(place.store.import(directory.path(), None, quiet()).await.unwrap_err().kind(), "digest_mismatch");
    fs::remove_file(&blob).unwrap();
    assert_eq!(place.store.import(directory.path(), None, quiet()).await.unwrap_err().kind(), "invalid_image");
    run("mkfifo", &[blob.to_str().unwrap()]);
    assert_eq!(place.store.import(directory.path(), None, quiet()).await.unwrap_err().kind(), "invalid_image");
    assert_eq!(place.store.import(&blob, None, quiet()).await.unwrap_err().kind(), "invalid_image");
    assert_eq!(place.store.import("/nowhere".as_ref(), None, quiet()).await.unwrap_err().kind(), "io");
}

#[tokio::test]
async fn one_name_is_not_given_to_two_images() {
    let (one, two) = (made(), Made::of(&[Tar::of([Entry::file("x", "")])], Packed::Plain, json!({})));
    let directory = tempfile::tempdir().unwrap();
    one.write_layout(directory.path(), "a:1");
    let first: serde_json::Value =
        serde_json::from_slice(&fs::read(directory.path().join("index.json")).unwrap()).unwrap();
    two.write_layout(directory.path(), "b:1");
    let mut both: serde_json::Value =
        serde_json::from_slice(&fs::read(directory.path().join("index.json")).unwrap()).unwrap();
    both["manifests"].as_array_mut().unwrap().push(first["manifests"][0].clone());
    fs::write(directory.path().join("index.json"), both.to_string()).unwrap();
    let place = Place::new(quick());
    let name: Reference = "mine".parse().unwrap();
    let error = place.store.import(directory.path(), Some(name), quiet()).await.unwrap_err();
    assert!(error.to_string().contains("2 images"), "{error}");
    assert_eq!(place.store.import(directory.path(), None, quiet()).await.unwrap().len(), 2);
}
