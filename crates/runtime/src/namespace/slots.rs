//! Slots: pre-created sandboxes, but for what a request decides.
//!
//! A slot is a number, from which its host ids, its address and its cgroup follow, with a disk, a
//! network, a file system and an agent that waits for a server. Taking it means to set its limits and
//! to connect. It is used by one session and never again: the number is, once everything with it is
//! gone. A slot that nobody took ends with the server: its agent is on a lifeline.
//!
//! A sandbox on a disk that exists, or on an image that no slot waits with, needs a slot around that. What depends on neither is
//! pre-created as well: its first process is there and waits for the disk and the layers of the image.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nagaya_engine::model::{ImageUser, RootImage};
use nagaya_guest::mount::{self, NO_DEVICES, READ_ONLY};
use nagaya_guest::spawn;
use rustix::net::sockopt::Timeout;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;

use super::running;
use crate::cgroup::{CgroupError, Group};
use crate::host::disk::{self, DiskError};
use crate::host::disk_images::{self, CopyError};
use crate::host::numbers::{UsedUp, first_id};
use crate::host::{Host, Network, NetworkError};
use crate::spawner::SpawnError;
use crate::sys;
use crate::sys::loop_device::LoopDevice;

/// A first process has what needs no disk within milliseconds.
const FIRST_PROCESS_ANSWER_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error(transparent)]
    Exhausted(#[from] UsedUp),
    #[error("make namespaces")]
    Namespaces(#[from] SpawnError),
    #[error("set up the network")]
    Network(#[from] NetworkError),
    #[error("make a disk")]
    Disk(#[from] DiskError),
    #[error("mount a new disk")]
    NewDisk(#[from] CopyError),
    #[error("make a control group")]
    Cgroup(#[from] CgroupError),
    #[error("the first process failed: {0}")]
    FirstProcess(String),
    #[error("{step}")]
    System { step: &'static str, source: io::Error },
}

/// What slots of one pool have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SlotSpec {
    pub disk_bytes: u64,
    pub outbound: bool,
    pub root: Arc<RootImage>,
}

/// Where a slot's directory and its disk come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum SlotDisk<'a> {
    /// Made with the slot, and removed with it.
    Pool,
    /// A directory with a disk that is kept whatever becomes of the slot.
    Kept { directory: &'a Path },
    /// A directory with a disk that was made just now, and its device. Nothing of it was flushed.
    New { directory: &'a Path, device: &'a LoopDevice },
}

/// What a sandbox has before its disk and its image are known.
pub(super) struct PreparedSlot {
    number: u32,
    group: Group,
    user: OwnedFd,
    /// Where the first process waits for the disk. It ends when this is closed before.
    disk: OwnedFd,
    started: Started,
}

/// A sandbox that nobody has yet.
pub(super) struct Slot {
    pub number: u32,
    pub group: Group,
    /// Its disk's image and its agent's socket; becomes the directory of the sandbox.
    pub directory: PathBuf,
    /// Where the first process has sent its [`spawn::Sizes`].
    sizes: OwnedFd,
    pub started: Started,
}

impl Slot {
    /// Sets what the sandbox may keep in memory without a process: half of its memory in `/dev/shm`, with an inode for
    /// each 16 KiB of it, and a quarter in System V segments. So there is always room for a command. Blocks until the
    /// first process has made what has a size.
    pub fn set_sizes(&self, memory_bytes: u64) -> Result<(), SlotError> {
        let (spawn::Sizes, descriptors) = spawn::receive(&self.sizes).map_err(|error| self.not_told(&error))?;
        let [shared_memory, segments]: [OwnedFd; 2] =
            descriptors.try_into().map_err(|_| SlotError::FirstProcess("it did not tell what has a size".into()))?;
        let (size, inodes) = ((memory_bytes / 2).to_string(), (memory_bytes / (16 << 10)).to_string());
        mount::adjust(shared_memory.as_fd(), &[("size", &size), ("nr_inodes", &inodes)])
            .map_err(|errno| on("size /dev/shm")(errno.into()))?;
        let pages = memory_bytes / 4 / sys::page_bytes();
        File::from(segments).write_all(pages.to_string().as_bytes()).map_err(on("size shared memory"))
    }

    fn not_told(&self, error: &spawn::ChannelError) -> SlotError {
        let said = running::read_error(&self.started.error);
        SlotError::FirstProcess(if said.is_empty() { error.to_string() } else { said })
    }
}

/// A sandbox whose first process was started.
pub(super) struct Started {
    pub pid: i32,
    pub pidfd: OwnedFd,
    /// Where the first process tells why it failed.
    pub error: OwnedFd,
    /// Closing it before a server connects ends the first process.
    pub lifeline: OwnedFd,
}

/// Makes slots.
pub(super) struct Factory {
    pub host: Arc<Host>,
}

impl Factory {
    /// Makes a slot from nothing; takes some ten milliseconds.
    pub fn make(&self, spec: &SlotSpec, disk: SlotDisk<'_>) -> Result<Slot, SlotError> {
        self.build(self.prepare(spec.outbound)?, spec, disk)
    }

    /// Makes what a slot has whatever its disk and its image are.
    pub fn prepare(&self, outbound: bool) -> Result<PreparedSlot, SlotError> {
        let number = self.host.numbers.take()?;
        self.prepare_numbered(number, outbound).inspect_err(|_| self.clear(number))
    }

    /// Gives a prepared slot its disk and its image.
    pub fn build(&self, prepared: PreparedSlot, spec: &SlotSpec, disk: SlotDisk<'_>) -> Result<Slot, SlotError> {
        match self.give_disk(&prepared, spec, disk) {
            Ok(directory) => {
                let PreparedSlot { number, group, disk: sizes, started, .. } = prepared;
                Ok(Slot { number, group, directory, sizes, started })
            }
            Err(error) => {
                self.abandon(prepared);
                Err(error)
            }
        }
    }

    /// Takes a prepared slot apart that got no disk.
    pub fn abandon(&self, prepared: PreparedSlot) {
        let PreparedSlot { number, started, .. } = prepared;
        running::kill_and_wait(&started.pidfd);
        self.clear(number);
    }

    fn directory(&self, number: u32) -> PathBuf {
        self.host.pool_directory.join(number.to_string())
    }

    fn prepare_numbered(&self, number: u32, outbound: bool) -> Result<PreparedSlot, SlotError> {
        let group = self.host.make_group(number)?;
        let (network, user) = self.host.spawner.namespaces(first_id(number))?;
        match &self.host.network {
            Some(rules) => rules.set_up(network.as_fd(), outbound.then_some(number))?,
            None => Network::set_up_isolated(network.as_fd())?,
        }
        self.start_first(number, group, network, user)
    }

    /// Starts the first process, which makes what it can and waits for its disk.
    fn start_first(
        &self,
        number: u32,
        group: Group,
        network: OwnedFd,
        user: OwnedFd,
    ) -> Result<PreparedSlot, SlotError> {
        let agent_files = group.agent_files()?;
        let command_files = group.command_files()?;
        let usage_files = [
            group.memory_usage_file()?,
            group.memory_limit_file()?,
            group.memory_statistics_file()?,
            group.memory_events_file()?,
            group.processes_limit_file()?,
        ];
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| on("make a pipe")(errno.into()));
        let (error, error_write) = pipe()?;
        let (lifeline_read, lifeline) = pipe()?;
        let (disk, disk_read) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|errno| on("make a socket")(errno.into()))?;
        // Its first process may have been stopped by somebody.
        rustix::net::sockopt::set_socket_timeout(&disk, Timeout::Recv, Some(FIRST_PROCESS_ANSWER_MAX))
            .map_err(|errno| on("make a socket")(errno.into()))?;
        let order = spawn::Sandbox {
            agent_cgroups: agent_files.len(),
            command_cgroups: command_files.common.len(),
            command_groups: command_files.groups.iter().map(|group| group.join.len()).collect(),
            first_id: first_id(number),
            hostname: "sandbox".into(),
            kept_output_bytes_max: self.host.config.limits.kept_output_mb_max << 20,
            kept_output_seconds_max: self.host.config.limits.kept_output_minutes_max * 60,
        };
        let mut fds: Vec<BorrowedFd<'_>> =
            vec![error_write.as_fd(), lifeline_read.as_fd(), disk_read.as_fd(), user.as_fd(), network.as_fd()];
        fds.extend(agent_files.iter().chain(&command_files.common).map(File::as_fd));
        for group in &command_files.groups {
            fds.extend(group.join.iter().chain([&group.processes]).map(File::as_fd));
        }
        fds.extend(usage_files.iter().map(File::as_fd));
        let (pid, pidfd) = self.host.spawner.sandbox(order, &fds)?;
        Ok(PreparedSlot { number, group, user, disk, started: Started { pid, pidfd, error, lifeline } })
    }

    /// Gives the first process its disk and what lies under it; the slot's directory.
    fn give_disk(&self, prepared: &PreparedSlot, spec: &SlotSpec, disk: SlotDisk<'_>) -> Result<PathBuf, SlotError> {
        let (directory, disk) = match disk {
            SlotDisk::Pool => {
                let directory = self.directory(prepared.number);
                fs::create_dir(&directory).map_err(on("make the slot's directory"))?;
                self.host.disks.make(&disk::path(&directory), spec.disk_bytes)?;
                let disk = disk::attach(&disk::path(&directory))?;
                (directory, disk)
            }
            SlotDisk::Kept { directory } => {
                // Of an attempt that failed a moment ago.
                disk::wait_until_unmounted(&disk::path(directory))?;
                disk::repair(&disk::path(directory))?;
                disk::grow(&disk::path(directory), spec.disk_bytes)?;
                (directory.to_owned(), disk::attach(&disk::path(directory))?)
            }
            SlotDisk::New { directory, device } => {
                let path = disk::path(directory);
                disk::grow(&path, spec.disk_bytes)?;
                device.take_size().map_err(on("size the disk's device"))?;
                (directory.to_owned(), disk_images::mount_unflushed(device, directory)?)
            }
        };
        mount::set_attributes(disk.as_fd(), NO_DEVICES, Some(prepared.user.as_fd()))
            .map_err(|errno| on("map the disk")(errno.into()))?;
        let stack = self.host.layers_of(&spec.root);
        let layers = stack.iter().map(|of| layer(&of.source, prepared.user.as_fd()));
        let layers: Vec<OwnedFd> = layers.collect::<Result<_, _>>()?;
        let listen = running::listen(&directory).map_err(on("make the agent's socket"))?;
        let ImageUser { name, uid, gid, home } = spec.root.user.clone();
        let workdir = spec.root.workdir.clone().unwrap_or_else(|| home.clone());
        let order = spawn::Disk {
            layers: stack.iter().map(|of| of.place.clone()).collect(),
            user: spawn::User { name, uid, gid, home, workdir },
            env: spec.root.env.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        };
        let mut fds = vec![disk.as_fd(), listen.as_fd()];
        fds.extend(layers.iter().map(AsFd::as_fd));
        spawn::send(prepared.disk.as_fd(), &order, &fds).map_err(|error| {
            match running::read_error(&prepared.started.error) {
                said if said.is_empty() => SlotError::FirstProcess(error.to_string()),
                said => SlotError::FirstProcess(said),
            }
        })?;
        Ok(directory)
    }

    /// Takes a slot apart that no session used, but for a disk that is kept.
    pub fn discard(&self, slot: Slot) {
        let Slot { number, started, .. } = slot;
        running::kill_and_wait(&started.pidfd);
        self.clear(number);
    }

    /// Makes a slot of another kind from one that no session used, without letting go of its number.
    pub fn reshape(&self, slot: Slot, spec: &SlotSpec, disk: SlotDisk<'_>) -> Result<Slot, SlotError> {
        let Slot { number, started, .. } = slot;
        self.make_again(number, started, spec, disk)
    }

    /// As [`Factory::reshape`], from one that was only prepared.
    pub fn rebuild(&self, prepared: PreparedSlot, spec: &SlotSpec, disk: SlotDisk<'_>) -> Result<Slot, SlotError> {
        let PreparedSlot { number, started, .. } = prepared;
        self.make_again(number, started, spec, disk)
    }

    fn make_again(
        &self,
        number: u32,
        started: Started,
        spec: &SlotSpec,
        disk: SlotDisk<'_>,
    ) -> Result<Slot, SlotError> {
        running::kill_and_wait(&started.pidfd);
        drop(started);
        self.remove(number);
        let prepared = self.prepare_numbered(number, spec.outbound).inspect_err(|_| self.clear(number))?;
        self.build(prepared, spec, disk)
    }

    /// Removes what bears a number and has no processes any more, and frees the number.
    fn clear(&self, number: u32) {
        self.remove(number);
        self.host.release_number(number);
    }

    fn remove(&self, number: u32) {
        let directory = self.directory(number);
        running::remove_group(&self.host.group(number));
        if let Err(error) = fs::remove_dir_all(&directory)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, directory = %directory.display(), "could not remove a slot's directory");
        }
    }
}

fn on(step: &'static str) -> impl Fn(io::Error) -> SlotError {
    move |source| SlotError::System { step, source }
}

/// A read-only copy of a layer's mount in which the ids are the sandbox's.
fn layer(path: &Path, user: BorrowedFd<'_>) -> Result<OwnedFd, SlotError> {
    let made = mount::clone_tree(rustix::fs::CWD, &path.to_string_lossy(), false)
        .and_then(|tree| mount::set_attributes(tree.as_fd(), READ_ONLY | NO_DEVICES, Some(user)).map(|()| tree));
    made.map_err(|errno| on("map a layer")(errno.into()))
}

/// What is pre-created.
pub(super) trait Product: Send + Sized + 'static {
    fn make(factory: &Factory, spec: &SlotSpec) -> Result<Self, SlotError>;
    fn started(&self) -> &Started;
    fn discard(self, factory: &Factory);
}

impl Product for Slot {
    fn make(factory: &Factory, spec: &SlotSpec) -> Result<Self, SlotError> {
        factory.make(spec, SlotDisk::Pool)
    }

    fn started(&self) -> &Started {
        &self.started
    }

    fn discard(self, factory: &Factory) {
        factory.discard(self);
    }
}

impl Product for PreparedSlot {
    fn make(factory: &Factory, spec: &SlotSpec) -> Result<Self, SlotError> {
        factory.prepare(spec.outbound)
    }

    fn started(&self) -> &Started {
        &self.started
    }

    fn discard(self, factory: &Factory) {
        factory.abandon(self);
    }
}

/// Slots of one kind, whole or prepared, refilled by threads of its own.
pub(super) struct SlotPool<P: Product = Slot> {
    factory: Arc<Factory>,
    spec: SlotSpec,
    state: Mutex<PoolState<P>>,
    changed: Condvar,
}

struct PoolState<P> {
    ready: Vec<P>,
    /// When one was taken last.
    taken: Instant,
    /// Being made now.
    coming: usize,
    target: usize,
    closed: bool,
}

/// How long nobody may have taken a slot before a pool that is more than half full is refilled.
const REFILL_AFTER: Duration = Duration::from_millis(20);
/// How long the end of a pool waits for slots that are being made.
const COMING_MAX: Duration = Duration::from_secs(5);
/// Making a slot waits for the kernel more than it computes, so several are made at once.
const MAKERS: usize = 4;

impl<P: Product> SlotPool<P> {
    pub fn start(factory: Arc<Factory>, spec: SlotSpec, target: usize) -> Arc<Self> {
        let state = PoolState { ready: Vec::new(), taken: Instant::now(), coming: 0, target, closed: false };
        let pool = Arc::new(Self { factory, spec, state: Mutex::new(state), changed: Condvar::new() });
        for _ in 0..MAKERS.min(target) {
            let pool = pool.clone();
            std::thread::Builder::new()
                .name("slot-maker".into())
                .spawn(move || pool.refill())
                .expect("the host has room for a thread");
        }
        pool
    }

    fn state(&self) -> MutexGuard<'_, PoolState<P>> {
        self.state.lock().expect("the pool is changed without panics")
    }

    fn refill(&self) {
        // What somebody waits for goes first.
        sys::yield_to_others();
        loop {
            let mut state = self.state();
            while !state.closed && state.ready.len() + state.coming >= state.target {
                state = self.changed.wait(state).expect("the pool is changed without panics");
            }
            if state.closed {
                return;
            }
            // While enough are left, whoever took one gets to use it in peace.
            let quiet = state.taken + REFILL_AFTER;
            let now = Instant::now();
            if state.ready.len() * 2 >= state.target && now < quiet {
                drop(self.changed.wait_timeout(state, quiet - now).expect("the pool is changed without panics"));
                continue;
            }
            state.coming += 1;
            drop(state);
            let made = P::make(&self.factory, &self.spec);
            let mut state = self.state();
            match made {
                Ok(slot) if !state.closed => {
                    state.ready.push(slot);
                    state.coming -= 1;
                }
                Ok(slot) => {
                    drop(state);
                    slot.discard(&self.factory);
                    self.state().coming -= 1;
                    self.changed.notify_all();
                }
                Err(error) => {
                    state.coming -= 1;
                    self.changed.notify_all();
                    // Sandboxes make their own slots and report the error where it is seen.
                    tracing::warn!(error = &error as &dyn std::error::Error, "could not make a slot ahead");
                    let pause = Duration::from_secs(1);
                    drop(self.changed.wait_timeout(state, pause).expect("the pool is changed without panics"));
                }
            }
        }
    }

    pub fn spec(&self) -> &SlotSpec {
        &self.spec
    }

    /// Slots that are ready now.
    pub fn level(&self) -> usize {
        self.state().ready.len()
    }

    /// One that lives. Blocks.
    pub fn take(&self) -> Option<P> {
        loop {
            let mut state = self.state();
            state.taken = Instant::now();
            let slot = state.ready.pop();
            drop(state);
            self.changed.notify_one();
            let slot = slot?;
            if !running::has_ended(slot.started().pidfd.as_fd()) {
                return Some(slot);
            }
            let said = running::read_error(&slot.started().error);
            tracing::warn!(pid = slot.started().pid, said, "a pre-created first process has ended; taking another");
            slot.discard(&self.factory);
        }
    }

    /// Takes apart what is ready and what is still being made; on return nothing is left of either, unless it hangs: the next
    /// start finds that.
    pub fn close(&self) {
        let ready = {
            let mut state = self.state();
            state.closed = true;
            std::mem::take(&mut state.ready)
        };
        self.changed.notify_all();
        for slot in ready {
            slot.discard(&self.factory);
        }
        let coming = |state: &mut PoolState<P>| state.coming > 0;
        let waited = self.changed.wait_timeout_while(self.state(), COMING_MAX, coming);
        if waited.expect("the pool is changed without panics").1.timed_out() {
            tracing::warn!("a slot that is being pre-created hangs; the next start removes what there is of it");
        }
    }
}
