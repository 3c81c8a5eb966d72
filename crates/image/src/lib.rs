//! OCI images on disk, for sandboxes to run.

mod archive;
mod config;
mod decompress;
mod digest;
mod error;
mod image_config;
mod manifest;
mod reference;
mod tree;
mod unpack;

pub use config::{Config, InvalidSetting, PullPolicy};
pub use digest::{Digest, DigestError};
pub use error::ImageError;
pub use image_config::ImageConfig;
pub use manifest::{Compression, DOCUMENT_BYTES_MAX, Descriptor, Document, Index, LAYERS_MAX, Manifest, Platform};
pub use reference::{DOCKER_HUB, Reference};
pub use unpack::{Limits, Unpacked, unpack};
