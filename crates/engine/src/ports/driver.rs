//! What runs sandboxes. `nagaya-runtime` implements it.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use nagaya_api::ids::{DiskImageId, SessionId, VolumeId};
use tokio::sync::mpsc;

use super::guest::Guest;
use crate::model::{Connection, Egress, Guarantees, Limit, Machine};

#[derive(Debug, Clone, thiserror::Error)]
pub enum DriverError {
    /// Something finite ran out.
    #[error("limit reached: {0}")]
    Exhausted(Limit),
    /// There is no such sandbox (nor its disk), no such image or no such volume.
    #[error("no such sandbox")]
    Gone,
    /// Something in the sandbox uses it, e.g. a process has a file of the volume open.
    #[error("busy")]
    Busy,
    /// What was asked for cannot be, e.g. a mount over another mount; in words for the user.
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Failed(String),
}

/// Something happened that nobody asked for.
#[derive(Debug, Clone)]
pub enum DriverEvent {
    /// A running sandbox has no processes any more. Its disk is kept until `destroy`; the rest is
    /// released by `stop`.
    Ended {
        id: SessionId,
        /// The sandbox powered itself off. False: it was killed, or its host failed it.
        powered_off: bool,
        /// In words for the user, e.g. "the sandbox's first process was killed".
        cause: String,
    },
    /// The host is short of memory: paused sandboxes in RAM should be stopped.
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

/// What an earlier process left of a sandbox.
pub enum Adopted {
    Running(Arc<dyn Guest>),
    /// Frozen by `freeze`.
    Frozen(Arc<dyn Guest>),
    /// Only its disk is there.
    Stopped {
        /// The sandbox powered itself off while no server watched.
        powered_off: bool,
        /// The host was started again since the sandbox ran.
        host_restarted: bool,
    },
}

/// A volume's place in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub volume_id: VolumeId,
    /// Absolute and normal, as the sandbox sees it. Made (for `tenki`) when it is missing.
    pub path: String,
    pub readonly: bool,
}

/// What a running sandbox uses, of what it may.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceUsage {
    /// Without what the kernel takes back when it needs it, such as cached files.
    pub memory_bytes: u64,
    pub memory_limit_bytes: u64,
    /// Processes killed because the limit was reached, since it was started.
    pub memory_kills: u64,
    /// Output of commands in the background that is kept on the disk.
    pub kept_output_bytes: u64,
    /// Processor time that all threads together had, and for which they had to wait, during a short window, and that
    /// window; microseconds.
    pub cpu_used_us: u64,
    pub cpu_waited_us: u64,
    pub cpu_window_us: u64,
    /// Spans of time in which it used processors, those of them in which it was halted for having used up its share,
    /// and for how long, microseconds; all since it was started.
    pub cpu_periods: u64,
    pub cpu_periods_throttled: u64,
    pub cpu_throttled_us: u64,
    /// Processes and threads.
    pub processes: u64,
    pub processes_max: u64,
    pub disk_used_bytes: u64,
    pub disk_size_bytes: u64,
    /// Its disk had errors, and takes no more writes until it is started again.
    pub disk_failed: bool,
    /// Its disk takes nothing new, because the host has no space.
    pub disk_held: bool,
    /// Its first process is stopped, so that nothing can be asked of the sandbox.
    pub halted: bool,
}

/// A technology that runs sandboxes. Every call may be repeated after a crash between any two of
/// its steps; sandboxes live on when the process that made them dies. What a call acknowledges
/// about disks (`copy_disk`, volumes) is fsync'ed, names included.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    fn guarantees(&self) -> Guarantees;
    /// Makes a sandbox and returns when commands can run in it. Its disk is a fresh one, or `disk`,
    /// which it takes over and grows to the machine's size. On error nothing is left behind, or what is left
    /// is found by [`Driver::list`]; `disk` may be used up.
    async fn create(
        &self,
        id: SessionId,
        machine: &Machine,
        disk: Option<DiskImageId>,
    ) -> Result<Arc<dyn Guest>, DriverError>;
    /// Takes over a sandbox that an earlier process made. `Gone` when not even its disk is there.
    async fn adopt(&self, id: SessionId) -> Result<Adopted, DriverError>;
    /// Halts every process of the sandbox where it is; clocks of running commands' timeouts stand still.
    /// Calls on its guest may hang until `thaw`. It is idempotent; `Gone` when it has no processes.
    async fn freeze(&self, id: SessionId) -> Result<(), DriverError>;
    /// Lets a frozen sandbox go on. It is idempotent; `Gone` when it has no processes.
    async fn thaw(&self, id: SessionId) -> Result<(), DriverError>;
    /// Ends all processes and keeps the disk, everything written to it included, and nothing else.
    /// Volumes are unmounted and written back. It is idempotent.
    async fn stop(&self, id: SessionId) -> Result<(), DriverError>;
    /// Starts a stopped sandbox on its kept disk, without its volumes. After an error `stop` takes away what came up.
    async fn boot(&self, id: SessionId, machine: &Machine) -> Result<Arc<dyn Guest>, DriverError>;
    /// Ends a sandbox, also while another call about it hangs: what that still makes is destroyed again when it returns. On
    /// return none of its processes is alive; its disk and network are being
    /// released in the background and [`Driver::list`] names it until they are. It is idempotent, for unknown
    /// sandboxes too.
    async fn destroy(&self, id: SessionId) -> Result<(), DriverError>;
    /// Every sandbox of which anything exists on this host, alive, stopped or half removed, except
    /// those whose release is already under way in this process.
    async fn list(&self) -> Result<Vec<SessionId>, DriverError>;

    /// Copies a sandbox's disk, as it is at one moment, to these images, whatever state it is in.
    /// Returns how long its writes were frozen, microseconds. Images that exist are replaced; on error none is left.
    async fn copy_disk(&self, id: SessionId, images: &[DiskImageId]) -> Result<u64, DriverError>;
    /// Where an image is, or can be made.
    fn image_path(&self, id: DiskImageId) -> PathBuf;
    /// Makes the empty file in which an image is about to be written, so that what the image needs can be ready when it is
    /// whole; `create` takes it then, and until then it is no image. A driver with nothing to make ready lets the image
    /// be made where it will be.
    async fn prepare_image(&self, id: DiskImageId) -> Result<PathBuf, DriverError> {
        Ok(self.image_path(id))
    }
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
    /// Mounts a volume in a running sandbox. It is idempotent. `Refused` when the path is a
    /// mount already, or not a directory.
    async fn attach_volume(&self, id: SessionId, mount: &Mount) -> Result<(), DriverError>;
    /// Unmounts a volume and writes it back; `Busy` while a process uses it, unless `force`: then its later
    /// reads and writes there fail. Unmounting what is not mounted has no effect.
    async fn detach_volume(&self, id: SessionId, mount: &Mount, force: bool) -> Result<(), DriverError>;
    /// Waits until no sandbox has the volume mounted any more, after their ends, and until what they
    /// wrote is on disk.
    async fn settle_volume(&self, id: VolumeId) -> Result<(), DriverError>;

    /// Names the only destinations that a sandbox with outbound access reaches from now on, frozen or not; `None` lifts
    /// that. What the machine of `create` and `boot` names holds before the sandbox's first instruction, and outlives
    /// this process. On return connections to what is not allowed any more are cut. It is idempotent.
    async fn set_egress(&self, id: SessionId, egress: Option<&Egress>) -> Result<(), DriverError>;
    /// The last connections of a running or frozen sandbox to the outside, oldest first.
    async fn connections(&self, id: SessionId) -> Result<Vec<Connection>, DriverError>;

    /// What a running sandbox uses now; takes some tenths of a second. `Gone` when it has no processes.
    async fn usage(&self, id: SessionId) -> Result<ResourceUsage, DriverError>;

    /// Events of sandboxes that this process created or adopted. May be called once.
    fn events(&self) -> mpsc::UnboundedReceiver<DriverEvent>;
}
