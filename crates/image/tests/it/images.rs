//! Images made by hand, and where they can be put: in a layout on disk, or behind a registry that does as it is told.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use nagaya_image::{Config, Digest, ImageStore, Progress, Watcher};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packed {
    Plain,
    Gzip,
    Zstd,
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image as registries have it.
#[derive(Clone)]
pub struct Made {
    /// Everything but the manifest, by digest.
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    pub manifest: Vec<u8>,
    /// Of the layers as they are sent, the lowest first.
    pub layers: Vec<Digest>,
    pub diff_ids: Vec<Digest>,
}

impl Made {
    /// Of these archives, the lowest first.
    pub fn of(archives: &[Vec<u8>], packed: Packed, config: Value) -> Self {
        Self::with(archives, packed, config, |_| {})
    }

    /// The same with a manifest that was changed before it got its digest.
    pub fn with(archives: &[Vec<u8>], packed: Packed, config: Value, change: impl FnOnce(&mut Value)) -> Self {
        let mut blobs = BTreeMap::new();
        let (mut layers, mut descriptors) = (Vec::new(), Vec::new());
        let diff_ids: Vec<_> = archives.iter().map(|archive| Digest::of(archive)).collect();
        for archive in archives {
            let (bytes, suffix) = match packed {
                Packed::Plain => (archive.clone(), ""),
                Packed::Gzip => (gzip(archive), "+gzip"),
                Packed::Zstd => (zstd::encode_all(&archive[..], 3).unwrap(), "+zstd"),
            };
            let digest = Digest::of(&bytes);
            descriptors.push(json!({"mediaType": format!("{LAYER}{suffix}"), "digest": digest, "size": bytes.len()}));
            layers.push(digest);
            blobs.insert(digest, bytes);
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string().into_bytes();
        let digest = Digest::of(&config);
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": OCI_CONFIG, "digest": digest, "size": config.len()}, "layers": descriptors,
        });
        blobs.insert(digest, config);
        change(&mut manifest);
        Self { blobs, manifest: manifest.to_string().into_bytes(), layers, diff_ids }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// An index that has this image for the platform of the tests, and others that are not there.
    pub fn index(&self) -> Vec<u8> {
        let other = Digest::of(b"not there");
        let entry = |digest: Digest, size: usize, architecture: &str| {
            let platform = json!({"os": "linux", "architecture": architecture});
            json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": size, "platform": platform})
        };
        let manifests =
            [entry(other, 1, "s390x"), entry(self.digest(), self.manifest.len(), "amd64"), entry(other, 1, "arm64")];
        json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).to_string().into_bytes()
    }

    /// Writes an OCI layout in which this image has a name.
    pub fn write_layout(&self, directory: &Path, name: &str) {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        for (digest, bytes) in &self.blobs {
            fs::write(blobs.join(digest.hex()), bytes).unwrap();
        }
        fs::write(blobs.join(self.digest().hex()), &self.manifest).unwrap();
        let entry = json!({
            "mediaType": OCI_MANIFEST, "digest": self.digest(), "size": self.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": name},
        });
        fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        fs::write(directory.join("index.json"), index.to_string()).unwrap();
    }
}

/// A store in a directory of its own.
pub struct Place {
    pub directory: TempDir,
    pub store: ImageStore,
}

/// Settings with which nothing takes long, and nobody is logged in anywhere.
pub fn quick() -> Config {
    static EMPTY: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let empty = EMPTY.get_or_init(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("docker-{}.json", std::process::id()));
        fs::write(&path, "{}").unwrap();
        path
    });
    Config {
        docker_config: Some(empty.clone()),
        connect_timeout_ms: 2000,
        silence_timeout_ms: 300,
        retries_max: 2,
        retry_delay_ms: 1,
        ..Config::default()
    }
}

impl Place {
    pub fn new(config: Config) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = ImageStore::open(&directory.path().join("images"), config).unwrap();
        Self { directory, store }
    }

    pub fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join("images").join(path)
    }

    /// What has a name in a directory of the store, sorted.
    pub fn names(&self, directory: &str) -> Vec<String> {
        names(&self.at(directory))
    }

    pub fn has_layer(&self, diff_id: &Digest) -> bool {
        self.at("layers").join(diff_id.hex()).exists()
    }
}

pub fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub fn quiet() -> Watcher {
    std::sync::Arc::new(|_| {})
}

/// A watcher, and what it was told.
pub fn watched() -> (Watcher, std::sync::Arc<std::sync::Mutex<Vec<Progress>>>) {
    let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let to = told.clone();
    (std::sync::Arc::new(move |progress| to.lock().unwrap().push(progress)), told)
}
