//! What runs sandboxes. `nagaya-runtime` implements it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use nagaya_api::ids::{SessionId, VolumeId};
use tokio::sync::mpsc;

use super::guest::Guest;
use crate::model::{Capabilities, ImageDigest, Isolation, Limit, SandboxSpec};

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
    /// Not offered by this driver, e.g. writing memory down.
    #[error("this driver cannot {0}")]
    Unsupported(&'static str),
    /// The disk was written over another image than the one that is asked for.
    #[error("the disk belongs to image {disk}, not to {asked}")]
    OtherRoot { disk: ImageDigest, asked: ImageDigest },
    #[error("{0}")]
    Failed(String),
}

/// A running sandbox has no processes any more, though nobody asked for that. Its disk is kept until `destroy`; the rest is
/// released by `stop`.
#[derive(Debug, Clone)]
pub struct Ended {
    pub id: SessionId,
    /// The sandbox powered itself off. False: it was killed, or its host failed it.
    pub powered_off: bool,
    /// In words for the user, e.g. "the sandbox's first process was killed".
    pub cause: String,
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
    /// Absolute and normal, as the sandbox sees it. Made (for the image's user) when it is missing.
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
/// its steps; sandboxes live on when the process that made them dies. What all drivers of a server share, disks and
/// volumes among it, is the [`Host`](super::Host)'s.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    fn capabilities(&self) -> Capabilities;
    /// Starts a sandbox and returns when commands can run in it: a new one, whose disk is a fresh one or an image that it
    /// takes over, or a stopped one on its own disk, without its volumes. `OtherRoot` where the kept disk was written over
    /// another image.
    ///
    /// On error nothing is left of a new one, or what is left is found by [`Driver::list`]; its image may be used up. Of a
    /// stopped one `stop` takes away what came up.
    async fn start(&self, id: SessionId, spec: &SandboxSpec) -> Result<Arc<dyn Guest>, DriverError>;
    /// Takes over a sandbox that an earlier process made. `Gone` when not even its disk is there.
    async fn adopt(&self, id: SessionId) -> Result<Adopted, DriverError>;
    /// Halts every process of the sandbox where it is; clocks of running commands' timeouts stand still.
    /// Calls on its guest may hang until `thaw`. It is idempotent; `Gone` when it has no processes.
    async fn freeze(&self, id: SessionId) -> Result<(), DriverError>;
    /// Lets a frozen sandbox go on. It is idempotent; `Gone` when it has no processes.
    async fn thaw(&self, id: SessionId) -> Result<(), DriverError>;
    /// Writes the processes and the memory of a frozen sandbox into this directory, from where a start goes on with them.
    async fn checkpoint(&self, _id: SessionId, _directory: &Path) -> Result<(), DriverError> {
        Err(DriverError::Unsupported("write down processes and memory"))
    }
    /// Ends all processes and keeps the disk, everything written to it included, and nothing else.
    /// Volumes are unmounted and written back. It is idempotent.
    async fn stop(&self, id: SessionId) -> Result<(), DriverError>;
    /// Ends a sandbox, also while another call about it hangs: what that still makes is destroyed again when it returns. On
    /// return none of its processes is alive; its disk and network are being
    /// released in the background and [`Driver::list`] names it until they are. It is idempotent, for unknown
    /// sandboxes too.
    async fn destroy(&self, id: SessionId) -> Result<(), DriverError>;
    /// Every sandbox of this driver of which anything exists on this host, alive, stopped or half removed, except
    /// those whose release is already under way in this process.
    async fn list(&self) -> Result<Vec<SessionId>, DriverError>;

    /// Mounts a volume in a running sandbox. It is idempotent. `Refused` when the path is a
    /// mount already, or not a directory.
    async fn attach_volume(&self, id: SessionId, mount: &Mount) -> Result<(), DriverError>;
    /// Unmounts a volume and writes it back; `Busy` while a process uses it, unless `force`: then its later
    /// reads and writes there fail. Unmounting what is not mounted has no effect.
    async fn detach_volume(&self, id: SessionId, mount: &Mount, force: bool) -> Result<(), DriverError>;

    /// What a running sandbox uses now; takes some tenths of a second. `Gone` when it has no processes.
    async fn usage(&self, id: SessionId) -> Result<ResourceUsage, DriverError>;

    /// Sandboxes that this process started or adopted and that ended unasked. May be called once.
    fn ends(&self) -> mpsc::UnboundedReceiver<Ended>;
}

/// The drivers of a server by name, and which of them a session gets that asks for none.
#[derive(Clone)]
pub struct Drivers {
    by_name: BTreeMap<String, Arc<dyn Driver>>,
    default: String,
}

impl Drivers {
    /// # Panics
    /// Where the default is none of them.
    pub fn new(default: &str, by_name: BTreeMap<String, Arc<dyn Driver>>) -> Self {
        assert!(by_name.contains_key(default), "the default driver is one of the drivers");
        Self { by_name, default: default.to_owned() }
    }

    pub fn default_name(&self) -> &str {
        &self.default
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    pub fn all(&self) -> impl Iterator<Item = (&str, &Arc<dyn Driver>)> {
        self.by_name.iter().map(|(name, driver)| (name.as_str(), driver))
    }

    pub fn find(&self, name: &str) -> Option<&Arc<dyn Driver>> {
        self.by_name.get(name)
    }

    /// The driver of a session. One that the server has no more answers to everything that it is not there: its sandboxes
    /// are neither lost nor touched until it is configured again.
    pub fn of(&self, name: &str) -> Arc<dyn Driver> {
        self.find(name).cloned().unwrap_or_else(|| Arc::new(Absent(name.to_owned())))
    }
}

/// A driver that sandboxes were made by, and that this server was started without.
struct Absent(String);

impl Absent {
    fn error<T>(&self) -> Result<T, DriverError> {
        Err(DriverError::Failed(format!("this server runs without the driver {:?}, which the sandbox needs", self.0)))
    }
}

#[async_trait]
impl Driver for Absent {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: Isolation::SharedKernel,
            memory_checkpoint: false,
            live_resize: false,
            nested_containers: false,
        }
    }

    async fn start(&self, _id: SessionId, _spec: &SandboxSpec) -> Result<Arc<dyn Guest>, DriverError> {
        self.error()
    }

    async fn adopt(&self, _id: SessionId) -> Result<Adopted, DriverError> {
        self.error()
    }

    async fn freeze(&self, _id: SessionId) -> Result<(), DriverError> {
        self.error()
    }

    async fn thaw(&self, _id: SessionId) -> Result<(), DriverError> {
        self.error()
    }

    async fn stop(&self, _id: SessionId) -> Result<(), DriverError> {
        self.error()
    }

    async fn destroy(&self, _id: SessionId) -> Result<(), DriverError> {
        self.error()
    }

    async fn list(&self) -> Result<Vec<SessionId>, DriverError> {
        Ok(Vec::new())
    }

    async fn attach_volume(&self, _id: SessionId, _mount: &Mount) -> Result<(), DriverError> {
        self.error()
    }

    async fn detach_volume(&self, _id: SessionId, _mount: &Mount, _force: bool) -> Result<(), DriverError> {
        self.error()
    }

    async fn usage(&self, _id: SessionId) -> Result<ResourceUsage, DriverError> {
        self.error()
    }

    fn ends(&self) -> mpsc::UnboundedReceiver<Ended> {
        mpsc::unbounded_channel().1
    }
}
