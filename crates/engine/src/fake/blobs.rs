use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nagaya_api::ids::DiskImageId;
use tokio::sync::mpsc;

use super::Faults;
use super::files::Files;
use crate::model::Limit;
use crate::ports::{BlobError, Blobs, ImageReader, StoredImage};

/// Disk images at rest, which the fake driver and the fake blob store share.
#[derive(Default)]
pub(super) struct Images(Mutex<BTreeMap<DiskImageId, Files>>);

impl Images {
    pub(super) fn with<T>(&self, action: impl FnOnce(&mut BTreeMap<DiskImageId, Files>) -> T) -> T {
        action(&mut self.0.lock().expect("no holder of this lock panics"))
    }

    pub(super) fn path(id: DiskImageId) -> PathBuf {
        Path::new("/fake/images").join(id.to_string())
    }

    fn id(path: &Path) -> Result<DiskImageId, BlobError> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.parse().map_err(|_| BlobError::Failed(format!("{} is no image", path.display())))
    }
}

/// A blob store in memory: one blob per image, named by its digest.
pub struct FakeBlobs {
    faults: Arc<Faults>,
    images: Arc<Images>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    stored: BTreeMap<String, Files>,
    durable: BTreeSet<String>,
    corrupt: BTreeSet<String>,
    full: bool,
    offline: bool,
    storing: u32,
    violations: Vec<String>,
}

impl FakeBlobs {
    pub(super) fn new(faults: Arc<Faults>, images: Arc<Images>) -> Self {
        Self { faults, images, state: Mutex::default() }
    }

    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().expect("no holder of this lock panics"))
    }

    async fn step(&self) -> Result<(), BlobError> {
        match self.faults.effect().await {
            true => Err(BlobError::Failed("a blob step failed, as this test asked for".to_owned())),
            false => Ok(()),
        }
    }

    /// Manifests of everything that is kept.
    pub fn stored(&self) -> Vec<String> {
        self.with(|state| state.stored.keys().cloned().collect())
    }

    /// Whether an image reached the durable place.
    pub fn is_durable(&self, manifest: &str) -> bool {
        self.with(|state| state.durable.contains(manifest))
    }

    /// While full, nothing more can be stored.
    pub fn set_full(&self, full: bool) {
        self.with(|state| state.full = full);
    }

    /// While offline, nothing reaches the durable place.
    pub fn set_offline(&self, offline: bool) {
        self.with(|state| state.offline = offline);
    }

    /// Damages what is stored under this name.
    pub fn corrupt(&self, manifest: &str) {
        self.with(|state| state.corrupt.insert(manifest.to_owned()));
    }

    /// Loses what is stored under this name.
    pub fn lose(&self, manifest: &str) {
        self.with(|state| state.stored.remove(manifest));
    }

    /// What callers did that the contract of [`Blobs`] forbids.
    pub fn violations(&self) -> Vec<String> {
        self.with(|state| state.violations.clone())
    }

    /// The process that used this store is gone.
    pub(super) fn disconnect(&self) {
        self.with(|state| state.storing = 0);
    }

    fn read(&self, manifest: &str) -> Result<Files, BlobError> {
        self.with(|state| {
            if state.corrupt.contains(manifest) {
                return Err(BlobError::Corrupt(manifest.to_owned()));
            }
            state.stored.get(manifest).cloned().ok_or_else(|| BlobError::Missing(manifest.to_owned()))
        })
    }

    async fn store_image(&self, image: &Path) -> Result<StoredImage, BlobError> {
        self.step().await?;
        if self.with(|state| state.full) {
            return Err(BlobError::Exhausted(Limit::HostDisk));
        }
        let id = Images::id(image)?;
        let files = self.images.with(|images| images.get(&id).cloned());
        let files = files.ok_or_else(|| BlobError::Failed(format!("{} is not there", image.display())))?;
        let content = files.image();
        let manifest = blake3::hash(&content).to_hex().to_string();
        self.with(|state| state.stored.insert(manifest.clone(), files));
        self.step().await?;
        let bytes = content.len() as u64;
        Ok(StoredImage { manifest, size_bytes: bytes, stored_bytes: bytes })
    }
}

#[async_trait]
impl Blobs for FakeBlobs {
    async fn store(&self, image: &Path) -> Result<StoredImage, BlobError> {
        self.with(|state| state.storing += 1);
        if self.faults.repeats() {
            let _ = self.store_image(image).await;
        }
        let result = self.store_image(image).await;
        self.with(|state| state.storing -= 1);
        result
    }

    async fn upload(&self, manifest: &str) -> Result<(), BlobError> {
        self.step().await?;
        self.read(manifest)?;
        if self.with(|state| state.offline) {
            return Err(BlobError::Failed("the durable place does not answer".to_owned()));
        }
        self.with(|state| state.durable.insert(manifest.to_owned()));
        self.step().await
    }

    async fn restore(&self, manifest: &str, image: &Path) -> Result<(), BlobError> {
        self.step().await?;
        let id = Images::id(image)?;
        let files = self.read(manifest)?;
        self.step().await?;
        self.images.with(|images| images.insert(id, files));
        Ok(())
    }

    async fn open(&self, manifest: &str) -> Result<ImageReader, BlobError> {
        let image = self.read(manifest)?.image();
        let total_size = image.len() as u64;
        let (sender, chunks) = mpsc::channel(1);
        tokio::spawn(async move { sender.send(Ok(image)).await });
        Ok(ImageReader { total_size, chunks })
    }

    async fn retain(&self, manifests: &[String]) -> Result<u64, BlobError> {
        self.step().await?;
        let freed = self.with(|state| {
            if state.storing > 0 {
                state.violations.push("retain during a store".to_owned());
            }
            let doomed: Vec<String> = state.stored.keys().filter(|kept| !manifests.contains(kept)).cloned().collect();
            let files: Vec<Files> = doomed.iter().filter_map(|manifest| state.stored.remove(manifest)).collect();
            for manifest in &doomed {
                state.durable.remove(manifest);
            }
            files.iter().map(|files| files.image().len() as u64).sum()
        });
        self.step().await?;
        Ok(freed)
    }
}
