//! Root file systems that come from elsewhere. `nagaya-image` implements it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::Arc;

use async_trait::async_trait;
use nagaya_api::error::Error;

use crate::model::{ImageDigest, RootImage, UnixMs};

/// What the name of an image stands for.
pub enum Resolved {
    /// The image that is made of the host's own programs.
    Host,
    Image {
        digest: ImageDigest,
        /// The image stays on the host until this is dropped.
        hold: Box<dyn Send + Sync>,
    },
    /// An image that its registry has, and that uses of it may fetch.
    Elsewhere { digest: ImageDigest },
}

/// An image that is wholly on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub digest: ImageDigest,
    /// In full, such as `docker.io/library/python:3.12`; sorted. None where they have moved on to other images.
    pub names: Vec<String>,
    /// The lowest first.
    pub layers: Vec<ImageLayer>,
    pub added_at: UnixMs,
    /// As the image has it: names or numbers, with a group or without; empty is root.
    pub user: String,
    /// Absolute; empty where the image does not say.
    pub workdir: String,
    pub env: BTreeMap<String, String>,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub labels: BTreeMap<String, String>,
    /// `PORT/PROTOCOL`.
    pub exposed_ports: Vec<String>,
}

/// A layer, which images share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageLayer {
    /// `sha256:…` of its uncompressed archive.
    pub diff_id: String,
    /// As its registry has it.
    pub compressed_bytes: u64,
    /// Of its files.
    pub bytes: u64,
}

/// How far a layer of an image is that is being fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullProgress {
    /// `sha256:…`, as its registry names it.
    pub layer: String,
    /// Which one it is, from 0, the lowest; and of how many.
    pub position: usize,
    pub layers: usize,
    /// What has arrived and was unpacked, and what there is, compressed.
    pub bytes: u64,
    pub total: u64,
    pub state: PullState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullState {
    /// Others are worked on before it.
    Waiting,
    Fetching,
    /// It was here already.
    Present,
    Done,
}

impl PullState {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Fetching => "fetching",
            Self::Present => "present",
            Self::Done => "done",
        }
    }
}

/// Is told how far a pull is. Called from several threads; must not block.
pub type PullWatcher = Arc<dyn Fn(PullProgress) + Send + Sync>;

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FreedImages {
    pub images: usize,
    pub layers: usize,
    /// Of files in those layers.
    pub bytes: u64,
}

/// The images of a host. Errors are those that callers get: names that mean nothing, registries that refuse, layers that are
/// not what they should be.
#[async_trait]
pub trait Images: Send + Sync + 'static {
    /// What a name, an alias of the operator's or a digest stands for; of what is not here the registry is asked, where the
    /// operator lets creations do that.
    async fn resolve(&self, name: &str) -> Result<Resolved, Error>;
    /// Fetches what a name stood for when it was resolved. What has arrived stays when the future is dropped.
    async fn fetch(&self, name: &str, digest: &ImageDigest) -> Result<(), Error>;
    /// The root file system of an image; `None` where it is not here.
    async fn root(&self, digest: &ImageDigest) -> Result<Option<RootImage>, Error>;
    /// By digest.
    async fn list(&self) -> Result<Vec<Image>, Error>;
    /// By name, alias, digest, or the first twelve or more digits of one.
    async fn find(&self, name: &str) -> Result<Image, Error>;
    /// Fetches what a name stands for now. Dropping the future ends it.
    async fn pull(&self, name: &str, watcher: PullWatcher) -> Result<Image, Error>;
    /// Reads images from an archive: an OCI layout, or what `docker save` writes. `name` is for one that has none in there.
    async fn import(&self, archive: Box<dyn Read + Send>, name: Option<&str>) -> Result<Vec<Image>, Error>;
    /// Takes a name away, or all names of a digest. The image stays.
    async fn remove(&self, name: &str) -> Result<(), Error>;
    /// Removes images without names that nobody holds and that are none of these, and layers of no image.
    async fn prune(&self, needed: BTreeSet<ImageDigest>) -> Result<FreedImages, Error>;
}
