//! Blobs with a bucket behind them, on a real S3 server: another program, spoken to over a socket.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use nagaya_blobs::{BlobStore, S3Config, S3Credentials};
use nagaya_engine::ports::{BlobError, Blobs};
use tempfile::TempDir;

use common::{CHUNK, argument, assert_whole, blobs, image, name, read_through, runtime, start};

const KEY_ID: &str = "an-access-key";
const SECRET: &str = "a-secret-access-key";
const BUCKET: &str = "snapshots";
const PREFIX: &str = "servers/one";

/// The server: it keeps its objects as files, checks signatures, and is killed by the tests.
#[test]
#[ignore = "started by other tests"]
fn program_that_serves_s3() {
    let root = argument("NAGAYA_S3_ROOT");
    let port = std::env::var("NAGAYA_S3_PORT").unwrap();
    runtime().block_on(async {
        let mut service = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
        service.set_auth(s3s::auth::SimpleAuth::from_single(KEY_ID, SECRET));
        let service = service.build();
        let listener = tokio::net::TcpListener::bind(format!("127.0.0.1:{port}")).await.unwrap();
        println!("\nlistening on {}", listener.local_addr().unwrap().port());
        let connections = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let connection = connections.serve_connection(TokioIo::new(socket), service.clone()).into_owned();
            tokio::spawn(async move {
                let _ = connection.await;
            });
        }
    });
}

struct Server {
    directory: TempDir,
    port: u16,
    process: Option<Child>,
}

impl Server {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join(BUCKET)).unwrap();
        let mut server = Self { directory, port: 0, process: None };
        server.start();
        server
    }

    /// Starts it, after it was stopped on the same port with the same objects.
    fn start(&mut self) {
        let port = PathBuf::from(self.port.to_string());
        let arguments = [("NAGAYA_S3_ROOT", self.directory.path()), ("NAGAYA_S3_PORT", port.as_path())];
        let mut process = start("program_that_serves_s3", &arguments);
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let port = lines.find_map(|line| line.unwrap().strip_prefix("listening on ").map(str::to_owned)).unwrap();
        self.port = port.parse().unwrap();
        // The pipe stays open: a program that cannot print any more would end.
        std::thread::spawn(move || lines.for_each(drop));
        self.process = Some(process);
    }

    fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    fn objects(&self, kind: &str) -> Vec<PathBuf> {
        let directory = self.directory.path().join(BUCKET).join(PREFIX);
        if directory.join(kind).exists() { blobs(&directory, kind) } else { Vec::new() }
    }

    fn config(&self) -> S3Config {
        S3Config {
            bucket: BUCKET.into(),
            prefix: PREFIX.into(),
            region: "eu-west-1".into(),
            endpoint: Some(format!("http://127.0.0.1:{}", self.port)),
            allow_http: true,
            credentials_file: None,
        }
    }

    fn store(&self, directory: &Path) -> BlobStore {
        let credentials = S3Credentials::new(KEY_ID.into(), SECRET.into()).unwrap();
        BlobStore::open_with_s3(directory, &self.config(), &credentials).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.process.is_some() {
            self.kill();
        }
    }
}

/// What this machine has of the blobs is lost; who it is, is not.
fn lose_local(blobs: &Path) {
    for kind in ["chunks", "images"] {
        fs::remove_dir_all(blobs.join(kind)).unwrap();
        fs::create_dir(blobs.join(kind)).unwrap();
    }
}

fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_was_uploaded_survives_the_loss_of_everything_local() {
    let server = Server::new();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), 40 * CHUNK, &[(0, 3 * CHUNK), (30 * CHUNK + 5, CHUNK)]);
    let content = fs::read(path("image")).unwrap();
    runtime().block_on(async {
        let store = server.store(&path("blobs"));
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        assert!(server.objects("chunks").is_empty(), "store is for this machine");
        store.upload(&manifest).await.unwrap();
        let names = |paths: Vec<PathBuf>| paths.iter().map(|path| name(path)).collect::<Vec<_>>();
        assert_eq!(names(server.objects("chunks")), names(blobs(&path("blobs"), "chunks")));
        assert_eq!(names(server.objects("images")), std::slice::from_ref(&manifest));
        store.upload(&manifest).await.unwrap();

        lose_local(&path("blobs"));
        store.restore(&manifest, &path("restored")).await.unwrap();
        assert!(fs::read(path("restored")).unwrap() == content);
        assert_whole(&path("blobs"));
        lose_local(&path("blobs"));
        assert!(read_through(&store, &manifest).await.unwrap() == content);

        // A blob that rotted here is brought again from there, and is whole here afterwards.
        for kind in ["chunks", "images"] {
            flip_a_bit(&blobs(&path("blobs"), kind)[0]);
        }
        store.restore(&manifest, &path("again")).await.unwrap();
        assert!(fs::read(path("again")).unwrap() == content);
        assert_whole(&path("blobs"));
    });
    // The same on a runtime with one thread, where waiting for the bucket must not stop it.
    lose_local(&path("blobs"));
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let store = server.store(&path("blobs"));
        let manifest = name(&server.objects("images")[0]);
        store.restore(&manifest, &path("once more")).await.unwrap();
    });
    assert!(fs::read(path("once more")).unwrap() == content);
}

#[test]
fn an_upload_that_is_cut_off_fails_and_is_completed_later() {
    let mut server = Server::new();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), 40 * CHUNK, &[(0, 40 * CHUNK)]);
    runtime().block_on(async {
        let store = std::sync::Arc::new(server.store(&path("blobs")));
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        let upload = tokio::spawn({
            let (store, manifest) = (store.clone(), manifest.clone());
            async move { store.upload(&manifest).await }
        });
        while server.objects("chunks").len() < 5 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.kill();
        let error = upload.await.unwrap().unwrap_err();
        assert!(matches!(&error, BlobError::Failed(text) if text.contains("bucket snapshots at http")), "{error}");
        assert!(server.objects("images").is_empty(), "no manifest is there before all of its chunks");
        assert!(server.objects("chunks").len() < 40, "the server was killed too late for this test");
        // Here nothing is lost meanwhile, and what is only here can be used.
        store.restore(&manifest, &path("restored")).await.unwrap();
        store.upload(&manifest).await.unwrap_err();
        store.retain(std::slice::from_ref(&manifest)).await.unwrap_err();

        server.start();
        store.upload(&manifest).await.unwrap();
        lose_local(&path("blobs"));
        store.restore(&manifest, &path("restored")).await.unwrap();
        assert!(fs::read(path("restored")).unwrap() == fs::read(path("image")).unwrap());
    });
}

#[test]
fn damage_in_the_bucket_is_found_and_named() {
    let server = Server::new();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), 4 * CHUNK, &[(0, 4 * CHUNK)]);
    runtime().block_on(async {
        let store = server.store(&path("blobs"));
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        store.upload(&manifest).await.unwrap();
        for kind in ["chunks", "images"] {
            let object = server.objects(kind).remove(0);
            let digest = name(&object);
            for removed in [false, true] {
                lose_local(&path("blobs"));
                if removed {
                    fs::remove_file(&object).unwrap()
                } else {
                    flip_a_bit(&object)
                }
                let error = store.restore(&manifest, &path("restored")).await.unwrap_err();
                let named = match &error {
                    BlobError::Corrupt(name) => !removed && *name == digest,
                    BlobError::Missing(name) => removed && *name == digest,
                    _ => false,
                };
                assert!(named, "{error}");
                assert!(!path("restored").exists());
            }
            // As long as the image is still somewhere, all is healed.
            store.store(&path("image")).await.unwrap();
            store.upload(&manifest).await.unwrap();
            lose_local(&path("blobs"));
            store.restore(&manifest, &path("restored")).await.unwrap();
            fs::remove_file(path("restored")).unwrap();
        }
    });
}

#[test]
fn retain_gives_back_the_space_in_the_bucket_too() {
    let server = Server::new();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    runtime().block_on(async {
        let store = server.store(&path("blobs"));
        image(&path("one"), 4 * CHUNK, &[(0, 4 * CHUNK)]);
        image(&path("other"), 5 * CHUNK, &[(0, 5 * CHUNK)]);
        let mut manifests = Vec::new();
        for name in ["one", "other"] {
            manifests.push(store.store(&path(name)).await.unwrap().manifest);
            store.upload(manifests.last().unwrap()).await.unwrap();
        }
        assert_eq!(server.objects("chunks").len(), 5, "the two have four chunks in common");
        let stranger = server.directory.path().join(BUCKET).join(PREFIX).join("chunks/of somebody else");
        fs::write(&stranger, "x").unwrap();
        lose_local(&path("blobs"));
        store.retain(&manifests[..1]).await.unwrap();
        assert_eq!(server.objects("images").len(), 1);
        assert_eq!(server.objects("chunks").len(), 4 + 1);
        assert!(stranger.exists());
        store.restore(&manifests[0], &path("restored")).await.unwrap();
        assert!(fs::read(path("restored")).unwrap() == fs::read(path("one")).unwrap());
        store.retain(&[]).await.unwrap();
        assert_eq!(server.objects("chunks"), [stranger]);
        assert!(server.objects("images").is_empty());
    });
}

#[test]
fn two_servers_cannot_remove_each_others_blobs() {
    let server = Server::new();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), CHUNK, &[(0, CHUNK)]);
    runtime().block_on(async {
        let first = server.store(&path("first"));
        let manifest = first.store(&path("image")).await.unwrap().manifest;
        first.upload(&manifest).await.unwrap();
        let second = server.store(&path("second"));
        let refused = second.retain(&[]).await.unwrap_err();
        assert!(refused.to_string().contains("belongs to another server"), "{refused}");
        second.store(&path("image")).await.unwrap();
        second.upload(&manifest).await.unwrap_err();
        assert_eq!(server.objects("chunks").len(), 1);
        // The first is still itself after a restart.
        drop(first);
        server.store(&path("first")).retain(&[manifest]).await.unwrap();
        assert_eq!(server.objects("chunks").len(), 1);
    });
}

#[test]
fn a_wrong_secret_is_refused_and_told_to_nobody() {
    let server = Server::new();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    image(&path("image"), CHUNK, &[(0, CHUNK)]);
    runtime().block_on(async {
        let credentials = S3Credentials::new(KEY_ID.into(), "another-secret".into()).unwrap();
        let store = BlobStore::open_with_s3(&path("blobs"), &server.config(), &credentials).unwrap();
        let manifest = store.store(&path("image")).await.unwrap().manifest;
        let refused = store.upload(&manifest).await.unwrap_err().to_string();
        assert!(refused.contains("bucket snapshots"), "{refused}");
        for text in [refused, format!("{store:?}"), format!("{credentials:?}")] {
            assert!(!text.contains("another-secret") && !text.contains(SECRET), "{text}");
        }
        assert!(server.objects("chunks").is_empty());
    });
}
