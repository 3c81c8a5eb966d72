//! OCI images on this host, for sandboxes to run.
//!
//! An [`ImageStore`] pulls images from registries and imports them from files, keeps each layer once as a directory that overlayfs can
//! stack, and removes what nobody needs. Everything that comes from outside is hostile: names, answers of registries, manifests and
//! layers have bounds, are verified before they get a name, and never reach a path that is not theirs. Absent on purpose: mounts,
//! sandboxes, sessions, and any other crate of the project.

mod archive;
mod config;
mod decompress;
mod digest;
mod disk;
mod error;
mod image_config;
mod import;
mod manifest;
mod pull;
mod reference;
mod registry;
mod store;
mod tree;
mod unpack;
mod user;

pub use config::{Config, HOST_IMAGE, InvalidSetting, PullPolicy};
pub use digest::{Digest, DigestError};
pub use error::ImageError;
pub use image_config::ImageConfig;
pub use manifest::{Compression, DOCUMENT_BYTES_MAX, Descriptor, Document, Index, LAYERS_MAX, Manifest, Platform};
pub use pull::{LayerState, Progress, Watcher};
pub use reference::{DOCKER_HUB, Reference};
pub use store::{Freed, Image, ImageLayer, ImageStore, Lease};
pub use unpack::{Limits, Unpacked, unpack};
pub use user::{User, resolve_user};
