//! [`BlobStore`]: blobs in a directory, and in a bucket behind it where one is configured.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use nagaya_engine::ports::{BlobError, Blobs, ImageReader, StoredImage};
use tokio::runtime::Handle;
use tokio::sync::RwLock;

use crate::config::S3Config;
use crate::digest::Digest;
use crate::directory::{Directory, Kind, parse_manifest};
use crate::remote::{Remote, S3Credentials};
use crate::{Chunk, Manifest, cut, reading, restore};

/// Each holds one chunk in memory.
const UPLOADS_AT_ONCE: usize = 4;

/// Disk images in a directory of blobs. Only one may use a directory.
#[derive(Debug)]
pub struct BlobStore {
    shared: Arc<Shared>,
    /// Held for writing while blobs are removed. A store whose caller gave up goes on to its end, so that the
    /// caller's own care is not enough.
    gate: Arc<RwLock<()>>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    directory: Directory,
    remote: Option<Remote>,
}

impl BlobStore {
    /// Opens the directory, making it as needed. It is the durable place itself.
    pub fn open(directory: &Path) -> Result<Self, BlobError> {
        Ok(Self::new(Directory::open(directory)?, None))
    }

    /// Opens the directory as what this machine has of a bucket. The bucket need not be reachable yet.
    pub fn open_with_s3(directory: &Path, config: &S3Config, credentials: &S3Credentials) -> Result<Self, BlobError> {
        let directory = Directory::open(directory)?;
        let remote = Remote::new(config, credentials, directory.owner()?)?;
        Ok(Self::new(directory, Some(remote)))
    }

    fn new(directory: Directory, remote: Option<Remote>) -> Self {
        Self { shared: Arc::new(Shared { directory, remote }), gate: Arc::default() }
    }
}

#[async_trait]
impl Blobs for BlobStore {
    async fn store(&self, image: &Path) -> Result<StoredImage, BlobError> {
        let (shared, image) = (self.shared.clone(), image.to_path_buf());
        let gate = self.gate.clone().read_owned().await;
        blocking(move || {
            let _gate = gate;
            cut::cut(&shared.directory, &image)
        })
        .await
    }

    async fn upload(&self, manifest: &str) -> Result<(), BlobError> {
        let Some(remote) = &self.shared.remote else { return Ok(()) };
        let digest: Digest = manifest.parse()?;
        remote.claim().await?;
        let bytes = self.shared.read_local(Kind::Manifest, digest).await?;
        let manifest = parse_manifest(digest, &bytes)?;
        let mut seen = HashSet::new();
        let unique = manifest.chunks.iter().filter(|chunk| seen.insert(chunk.digest));
        let uploads: Vec<_> = unique.map(|chunk| self.shared.upload_chunk(remote, chunk)).collect();
        futures::stream::iter(uploads).buffer_unordered(UPLOADS_AT_ONCE).try_collect::<()>().await?;
        // The last of all: a manifest in the bucket says that its chunks are there.
        match remote.has(Kind::Manifest, digest, bytes.len() as u64).await? {
            true => Ok(()),
            false => remote.put(Kind::Manifest, digest, bytes).await,
        }
    }

    async fn restore(&self, manifest: &str, image: &Path) -> Result<(), BlobError> {
        let manifest = self.shared.manifest(manifest.parse()?).await?;
        let (shared, image): (_, PathBuf) = (self.shared.clone(), image.to_path_buf());
        let runtime = Handle::current();
        blocking(move || {
            let fetch = |chunk: &Chunk| shared.fetch(&runtime, chunk);
            restore::restore(&shared.directory, &manifest, &image, &fetch)
        })
        .await
    }

    async fn open(&self, manifest: &str) -> Result<ImageReader, BlobError> {
        let manifest = self.shared.manifest(manifest.parse()?).await?;
        Ok(reading::read(self.shared.clone(), manifest))
    }

    async fn retain(&self, manifests: &[String]) -> Result<u64, BlobError> {
        let kept = manifests.iter().map(|name| name.parse()).collect::<Result<HashSet<Digest>, _>>()?;
        let gate = self.gate.clone().write_owned().await;
        let chunks = self.shared.chunks_of(&kept).await?;
        let shared = self.shared.clone();
        // The gate goes along, so that it stays shut when the caller gives up in the middle.
        let (_gate, kept, chunks, freed) = blocking(move || {
            let freed = shared.directory.remove_others(Kind::Manifest, &kept)?;
            let freed = match &chunks {
                Some(chunks) => freed + shared.directory.remove_others(Kind::Chunk, chunks)?,
                None => freed,
            };
            Ok((gate, kept, chunks, freed))
        })
        .await?;
        if let Some(remote) = &self.shared.remote {
            remote.claim().await?;
            remote.remove_others(Kind::Manifest, &kept).await?;
            if let Some(chunks) = &chunks {
                remote.remove_others(Kind::Chunk, chunks).await?;
            }
        }
        Ok(freed)
    }
}

impl Shared {
    async fn read_local(self: &Arc<Self>, kind: Kind, digest: Digest) -> Result<Bytes, BlobError> {
        let shared = self.clone();
        blocking(move || {
            let mut bytes = Vec::new();
            shared.directory.read(kind, digest, &mut bytes)?;
            Ok(Bytes::from(bytes))
        })
        .await
    }

    /// The blob from here, or else from the bucket; then it is here too.
    async fn read(self: &Arc<Self>, kind: Kind, digest: Digest) -> Result<Bytes, BlobError> {
        let error = match self.read_local(kind, digest).await {
            Err(error @ (BlobError::Missing(_) | BlobError::Corrupt(_))) => error,
            outcome => return outcome,
        };
        let Some(remote) = &self.remote else { return Err(error) };
        let bytes = remote.get(kind, digest).await?;
        let (shared, copy) = (self.clone(), bytes.clone());
        blocking(move || shared.directory.put(kind, digest, &copy)).await?;
        Ok(bytes)
    }

    async fn manifest(self: &Arc<Self>, digest: Digest) -> Result<Manifest, BlobError> {
        parse_manifest(digest, &self.read(Kind::Manifest, digest).await?)
    }

    pub async fn read_chunk(self: &Arc<Self>, chunk: &Chunk) -> Result<Bytes, BlobError> {
        let bytes = self.read(Kind::Chunk, chunk.digest).await?;
        match bytes.len() as u64 == chunk.stored_bytes() {
            true => Ok(bytes),
            false => Err(BlobError::Corrupt(chunk.digest.to_string())),
        }
    }

    /// Brings a chunk here that is missing or corrupt. Blocks.
    fn fetch(self: &Arc<Self>, runtime: &Handle, chunk: &Chunk) -> Result<(), BlobError> {
        runtime.block_on(self.read_chunk(chunk)).map(|_| ())
    }

    async fn upload_chunk(self: &Arc<Self>, remote: &Remote, chunk: &Chunk) -> Result<(), BlobError> {
        if remote.has(Kind::Chunk, chunk.digest, chunk.stored_bytes()).await? {
            return Ok(());
        }
        let bytes = self.read_local(Kind::Chunk, chunk.digest).await?;
        remote.put(Kind::Chunk, chunk.digest, bytes).await
    }

    /// The chunks of these images; `None` when one of them cannot tell any more which it has.
    async fn chunks_of(self: &Arc<Self>, manifests: &HashSet<Digest>) -> Result<Option<HashSet<Digest>>, BlobError> {
        let mut chunks = HashSet::new();
        let mut complete = true;
        for digest in manifests {
            match self.manifest(*digest).await {
                Ok(manifest) => chunks.extend(manifest.chunks.iter().map(|chunk| chunk.digest)),
                Err(error @ (BlobError::Missing(_) | BlobError::Corrupt(_))) => {
                    tracing::warn!(
                        "no space is given back: {error}, so nobody knows which blobs its snapshot needs; \
                         bring it back from a copy, or delete the snapshot"
                    );
                    complete = false;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(complete.then_some(chunks))
    }
}

/// Work that waits for the disk, or computes for long, away from the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, BlobError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(BlobError::Failed(format!("work on blobs stopped: {error}"))),
    }
}
