//! Images of disks as content-addressed parts, on this machine and in a durable place.

use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::model::Limit;

#[derive(Debug, Clone, thiserror::Error)]
pub enum BlobError {
    /// A part of the image is not there: its digest.
    #[error("blob {0} is missing")]
    Missing(String),
    /// A part of the image is not what it was: its digest.
    #[error("blob {0} is corrupt")]
    Corrupt(String),
    #[error("limit reached: {0}")]
    Exhausted(Limit),
    #[error("{0}")]
    Failed(String),
}

/// An image in the blob store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// Digest of its manifest, which names everything else.
    pub manifest: String,
    /// Bytes of the image that are not holes.
    pub size_bytes: u64,
    /// Bytes of all its blobs.
    pub stored_bytes: u64,
}

/// Disk images as content-addressed, checksummed parts. Parts are shared among images and never changed.
#[async_trait]
pub trait Blobs: Send + Sync + 'static {
    /// Keeps a copy of an image on this machine, fsync'ed. The image is only read.
    async fn store(&self, image: &Path) -> Result<StoredImage, BlobError>;
    /// Brings a stored image to the durable place. Returns at once where that is this machine.
    async fn upload(&self, manifest: &str) -> Result<(), BlobError>;
    /// Verifies all parts of an image, and makes it at this path, not yet fsync'ed. An empty file that is there is filled,
    /// what else is there is replaced. On error nothing is there, or a file as empty as it was.
    async fn restore(&self, manifest: &str, image: &Path) -> Result<(), BlobError>;
    /// Opens an image for reading it whole, holes included.
    async fn open(&self, manifest: &str) -> Result<ImageReader, BlobError>;
    /// Removes every blob that none of these images needs; returns the bytes freed. The caller sees to it that no
    /// `store` runs meanwhile.
    async fn retain(&self, manifests: &[String]) -> Result<u64, BlobError>;
}

/// An image being read.
#[derive(Debug)]
pub struct ImageReader {
    /// Size of the image with its holes, bytes.
    pub total_size: u64,
    /// Verified parts in order, then the end of the channel; an error is the last item.
    pub chunks: mpsc::Receiver<Result<Bytes, BlobError>>,
}
