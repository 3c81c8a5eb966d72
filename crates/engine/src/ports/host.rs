//! What all drivers of a server share on its host. `nagaya-runtime` implements it.

use std::path::PathBuf;

use async_trait::async_trait;
use nagaya_api::ids::{DiskImageId, SessionId, VolumeId};
use tokio::sync::mpsc;

use super::driver::DriverError;
use crate::model::{Connection, Egress, ImageDigest, RootImage};

/// Something happened on the host that nobody asked for.
#[derive(Debug, Clone)]
pub enum HostEvent {
    /// It is short of memory: paused sandboxes in RAM should be stopped.
    MemoryLow,
    /// Something that a sandbox did was refused at a limit. Told now and then, not each time.
    Refused {
        id: SessionId,
        /// What was refused, e.g. "a connection to the outside".
        request: String,
        /// The limit and its value.
        limit: String,
    },
}

/// The host of a server: disks, volumes, network and root file systems, whatever driver runs a sandbox. Calls may be repeated
/// after a crash between any two of their steps. What a call acknowledges about disks and volumes is fsync'ed, names included.
#[async_trait]
pub trait Host: Send + Sync + 'static {
    /// Copies a sandbox's disk, as it is at one moment, to these images, whatever state it is in.
    /// Returns how long its writes were frozen, microseconds. Images that exist are replaced; on error none is left.
    async fn copy_disk(&self, id: SessionId, images: &[DiskImageId]) -> Result<u64, DriverError>;
    /// Where an image is, or can be made.
    fn image_path(&self, id: DiskImageId) -> PathBuf;
    /// Makes the empty file in which an image is about to be written, so that what the image needs can be ready when it is
    /// whole; a start takes it then, and until then it is no image.
    async fn prepare_image(&self, id: DiskImageId) -> Result<PathBuf, DriverError>;
    /// Removes an image, or what was prepared for one. Removing an unknown one has no effect.
    async fn remove_image(&self, id: DiskImageId) -> Result<(), DriverError>;
    async fn images(&self) -> Result<Vec<DiskImageId>, DriverError>;

    /// Makes an empty volume. One that exists already is left as it is.
    async fn create_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError>;
    /// Makes it larger, mounted read-write or not at all; `Busy` where it is mounted read-only. On error it is as before,
    /// or grown nevertheless.
    async fn grow_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError>;
    /// How large it is; up to one block more than what was asked for.
    async fn volume_size(&self, id: VolumeId) -> Result<u64, DriverError>;
    /// Removing an unknown one has no effect.
    async fn remove_volume(&self, id: VolumeId) -> Result<(), DriverError>;
    async fn volumes(&self) -> Result<Vec<VolumeId>, DriverError>;
    /// Waits until no sandbox has the volume mounted any more, after their ends, and until what they
    /// wrote is on disk.
    async fn settle_volume(&self, id: VolumeId) -> Result<(), DriverError>;

    /// Names the only destinations that a sandbox with outbound access reaches from now on, frozen or not; `None` lifts
    /// that. What a start names holds before the sandbox's first instruction, and outlives
    /// this process. On return connections to what is not allowed any more are cut. It is idempotent.
    async fn set_egress(&self, id: SessionId, egress: Option<&Egress>) -> Result<(), DriverError>;
    /// The last connections of a running or frozen sandbox to the outside, oldest first.
    async fn connections(&self, id: SessionId) -> Result<Vec<Connection>, DriverError>;

    /// The image of sandboxes that ask for none.
    fn default_root(&self) -> ImageDigest;
    /// The root file system of this digest; `Gone` where the host has it no more.
    async fn root(&self, digest: &ImageDigest) -> Result<RootImage, DriverError>;
    /// The image that a sandbox's disk was written over; `None` where that was not recorded.
    async fn root_of(&self, id: SessionId) -> Result<Option<ImageDigest>, DriverError>;
    /// Removes root file systems that are neither the default nor among these.
    async fn retain_roots(&self, used: &[ImageDigest]) -> Result<(), DriverError>;

    /// May be called once.
    fn events(&self) -> mpsc::UnboundedReceiver<HostEvent>;
}
