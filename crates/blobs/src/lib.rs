//! Disk images as content-addressed parts: the engine's [`Blobs`](nagaya_engine::ports::Blobs).
//!
//! An image is cut into chunks of 4 MiB. What is not a hole in a chunk is one blob, named by its BLAKE3 digest; a manifest
//! names the chunks, and is a blob itself. Blobs are whole from the moment they have their name, never change,
//! and are believed only after their digest has been computed again. They lie in a directory; an S3 bucket can
//! be the durable place behind it. Absent on purpose: knowledge of snapshots, sessions and what an image means.

mod config;
mod cut;
mod digest;
mod directory;
mod manifest;
mod reading;
mod remote;
mod restore;
mod store;
mod workers;

pub use config::{Config, S3Config};
pub use digest::Digest;
pub use directory::manifests;
pub use manifest::{BlockMap, Chunk, Manifest, ManifestError};
pub use remote::S3Credentials;
pub use store::BlobStore;

/// Blobs hold whole blocks: the unit in which holes are left out, and that file systems can share.
const BLOCK_BYTES: u64 = 4096;
/// An image is cut at multiples of this.
const CHUNK_BYTES: u64 = 4 << 20;
const CHUNK_BLOCKS: usize = (CHUNK_BYTES / BLOCK_BYTES) as usize;
/// Larger images are refused; with it the size of a manifest has a limit too.
const IMAGE_BYTES_MAX: u64 = 1 << 40;
