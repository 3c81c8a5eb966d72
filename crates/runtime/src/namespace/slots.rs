//! Slots: pre-created sandboxes, but for what a request decides.
//!
//! A slot is a number, from which its host ids, its address and its cgroup follow, with a disk, a
//! network, a file system and an agent that waits for a server. Taking it means to set its limits and
//! to connect. It is used by one session and never again: the number is, once everything with it is
//! gone. A slot that nobody took ends with the server: its agent is on a lifeline.
//!
//! A sandbox on a disk that exists needs a slot around that. What does not depend on the disk, its ground, is made
//! ahead as well: its first process is there and waits for the disk.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nagaya_guest::mount::{self, NO_DEVICES, READ_ONLY};
use nagaya_guest::spawn::{self, IDS_PER_SANDBOX};
use rustix::net::sockopt::Timeout;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;

use super::disk::{self, DiskError, Disks};
use super::host_image::Image;
use super::images::{self, CopyError};
use super::live;
use super::network::{Network, NetworkError};
use super::{Config, ceilings};
use crate::cgroup::{CgroupError, Cgroups, Group};
use crate::spawner::{SpawnError, Spawner};
use crate::sys;
use crate::sys::loop_device::LoopDevice;

/// The first host id of slot 0. systemd leaves the range from 0x7000_0000 on to nobody; see its
/// page on users, groups and ids.
const FIRST_ID: u32 = 0x7000_0000;
/// All ids stay below 0x8000_0000: programs that keep them in signed numbers are many.
const SLOTS_LIMIT: u32 = 4_096;
/// A first process has what needs no disk within milliseconds.
const FIRST_PROCESS_ANSWER_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error("all {0} slots are in use")]
    Exhausted(u32),
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlotSpec {
    pub disk_gb: u32,
    pub outbound: bool,
}

/// Where a slot's directory and its disk come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum SlotDisk<'a> {
    /// Made with the slot, and removed with it.
    Pool,
    /// A directory with a disk that is kept whatever becomes of the slot, and the base layer under that disk.
    Kept { directory: &'a Path, base: &'a Path },
    /// A directory with a disk that was made just now, and its device. Nothing of it was flushed.
    New { directory: &'a Path, device: &'a LoopDevice },
}

/// What a sandbox stands on, whatever its disk is.
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
        let said = live::read_error(&self.started.error);
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

/// The first host uid and gid of a slot.
pub(super) const fn first_id(slot: u32) -> u32 {
    FIRST_ID + slot * IDS_PER_SANDBOX
}

/// Makes slots and keeps account of their numbers.
pub(super) struct Factory {
    pub spawner: Spawner,
    pub network: Option<Network>,
    pub disks: Disks,
    pub cgroups: Cgroups,
    pub image: Image,
    /// Where slots wait that no session has yet.
    pub pool_directory: PathBuf,
    /// Bytes and seconds; see [`spawn::Sandbox`].
    pub kept_output: (u64, u64),
    numbers: Mutex<Numbers>,
}

struct Numbers {
    used: BTreeSet<u32>,
    /// Numbers are given out in a circle, so that a freed one rests as long as possible.
    next: u32,
    max: u32,
}

impl Factory {
    pub fn new(
        spawner: Spawner,
        network: Option<Network>,
        disks: Disks,
        cgroups: Cgroups,
        image: Image,
        pool_directory: PathBuf,
        config: &Config,
    ) -> Self {
        let kept_output = (config.kept_output_mb_max << 20, config.kept_output_minutes_max * 60);
        let room = network.as_ref().map_or(SLOTS_LIMIT, Network::capacity);
        let held = ceilings::raise(config.slots_max, config.processes_max);
        let max = config.slots_max.min(SLOTS_LIMIT).min(room).min(held);
        let numbers = Numbers { used: BTreeSet::new(), next: 0, max };
        Self { spawner, network, disks, cgroups, image, pool_directory, kept_output, numbers: Mutex::new(numbers) }
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().expect("numbers are changed without panics")
    }

    /// Takes the number of a sandbox that already runs.
    pub fn claim(&self, number: u32) {
        self.numbers().used.insert(number);
    }

    /// Gives a number back, after everything that bears it is gone. Blocks.
    pub fn release(&self, number: u32) {
        if let Some(network) = &self.network {
            network.forget(number);
        }
        self.numbers().used.remove(&number);
    }

    fn number(&self) -> Result<u32, SlotError> {
        let mut numbers = self.numbers();
        let max = numbers.max;
        let start = numbers.next;
        let free = (0..max).map(|step| (start + step) % max).find(|number| !numbers.used.contains(number));
        let number = free.ok_or(SlotError::Exhausted(max))?;
        numbers.used.insert(number);
        numbers.next = (number + 1) % max;
        Ok(number)
    }

    /// Makes a slot from nothing; takes some ten milliseconds.
    pub fn make(&self, shape: SlotSpec, home: SlotDisk<'_>) -> Result<Slot, SlotError> {
        self.build(self.prepare(shape.outbound)?, shape.disk_gb, home)
    }

    /// Makes the ground of a slot.
    pub fn prepare(&self, outbound: bool) -> Result<PreparedSlot, SlotError> {
        let number = self.number()?;
        self.prepare_numbered(number, outbound).inspect_err(|_| self.clear(number))
    }

    /// Makes a slot on a ground.
    pub fn build(&self, ground: PreparedSlot, disk_gb: u32, home: SlotDisk<'_>) -> Result<Slot, SlotError> {
        match self.place_on(&ground, disk_gb, home) {
            Ok(directory) => {
                let PreparedSlot { number, group, disk: sizes, started, .. } = ground;
                Ok(Slot { number, group, directory, sizes, started })
            }
            Err(error) => {
                self.abandon(ground);
                Err(error)
            }
        }
    }

    /// Takes a ground apart that has no slot.
    pub fn abandon(&self, ground: PreparedSlot) {
        let PreparedSlot { number, started, .. } = ground;
        live::kill_and_wait(&started.pidfd);
        self.clear(number);
    }

    fn directory(&self, number: u32) -> PathBuf {
        self.pool_directory.join(number.to_string())
    }

    fn prepare_numbered(&self, number: u32, outbound: bool) -> Result<PreparedSlot, SlotError> {
        let group = self.cgroups.make_group(&group_name(number))?;
        let (network, user) = self.spawner.namespaces(first_id(number))?;
        match &self.network {
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
        let layers = self.image.layers.iter().map(|(_, path)| layer(path, user.as_fd()));
        let layers: Vec<OwnedFd> = layers.collect::<Result<_, _>>()?;
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
            layers: self.image.layer_names(),
            agent_cgroups: agent_files.len(),
            command_cgroups: command_files.common.len(),
            command_groups: command_files.groups.iter().map(|group| group.join.len()).collect(),
            first_id: first_id(number),
            hostname: "sandbox".into(),
            kept_output_bytes_max: self.kept_output.0,
            kept_output_seconds_max: self.kept_output.1,
        };
        let mut fds: Vec<BorrowedFd<'_>> =
            vec![error_write.as_fd(), lifeline_read.as_fd(), disk_read.as_fd(), user.as_fd(), network.as_fd()];
        fds.extend(layers.iter().map(AsFd::as_fd));
        fds.extend(agent_files.iter().chain(&command_files.common).map(File::as_fd));
        for group in &command_files.groups {
            fds.extend(group.join.iter().chain([&group.processes]).map(File::as_fd));
        }
        fds.extend(usage_files.iter().map(File::as_fd));
        let (pid, pidfd) = self.spawner.sandbox(order, &fds)?;
        Ok(PreparedSlot { number, group, user, disk, started: Started { pid, pidfd, error, lifeline } })
    }

    /// Gives a ground its disk: the slot's directory.
    fn place_on(&self, ground: &PreparedSlot, disk_gb: u32, home: SlotDisk<'_>) -> Result<PathBuf, SlotError> {
        let (directory, base, disk) = match home {
            SlotDisk::Pool => {
                let directory = self.directory(ground.number);
                fs::create_dir(&directory).map_err(on("make the slot's directory"))?;
                self.disks.make(&disk::path(&directory), disk_gb)?;
                let disk = disk::attach(&disk::path(&directory))?;
                (directory, self.image.base.as_path(), disk)
            }
            SlotDisk::Kept { directory, base } => {
                // Of an attempt that failed a moment ago.
                disk::wait_until_unmounted(&disk::path(directory))?;
                disk::repair(&disk::path(directory))?;
                disk::grow(&disk::path(directory), disk_gb)?;
                (directory.to_owned(), base, disk::attach(&disk::path(directory))?)
            }
            SlotDisk::New { directory, device } => {
                let path = disk::path(directory);
                disk::grow(&path, disk_gb)?;
                device.take_size().map_err(on("size the disk's device"))?;
                (directory.to_owned(), self.image.base.as_path(), images::mount_unflushed(device, directory)?)
            }
        };
        mount::set_attributes(disk.as_fd(), NO_DEVICES, Some(ground.user.as_fd()))
            .map_err(|errno| on("map the disk")(errno.into()))?;
        let base = layer(base, ground.user.as_fd())?;
        let listen = live::listen(&directory).map_err(on("make the agent's socket"))?;
        spawn::send(ground.disk.as_fd(), &spawn::Disk, &[disk.as_fd(), base.as_fd(), listen.as_fd()]).map_err(
            |error| match live::read_error(&ground.started.error) {
                said if said.is_empty() => SlotError::FirstProcess(error.to_string()),
                said => SlotError::FirstProcess(said),
            },
        )?;
        Ok(directory)
    }

    /// Takes a slot apart that no session used, but for a disk that is kept.
    pub fn discard(&self, slot: Slot) {
        let Slot { number, started, .. } = slot;
        live::kill_and_wait(&started.pidfd);
        self.clear(number);
    }

    /// Makes a slot of another shape from one that no session used, without letting go of its number.
    pub fn reshape(&self, slot: Slot, shape: SlotSpec, home: SlotDisk<'_>) -> Result<Slot, SlotError> {
        let Slot { number, started, .. } = slot;
        live::kill_and_wait(&started.pidfd);
        drop(started);
        self.make_again(number, shape, home)
    }

    /// As [`Factory::reshape`], from a ground.
    pub fn rebuild(&self, ground: PreparedSlot, shape: SlotSpec, home: SlotDisk<'_>) -> Result<Slot, SlotError> {
        let PreparedSlot { number, started, .. } = ground;
        live::kill_and_wait(&started.pidfd);
        self.make_again(number, shape, home)
    }

    fn make_again(&self, number: u32, shape: SlotSpec, home: SlotDisk<'_>) -> Result<Slot, SlotError> {
        self.remove(number);
        let ground = self.prepare_numbered(number, shape.outbound).inspect_err(|_| self.clear(number))?;
        self.build(ground, shape.disk_gb, home)
    }

    /// Removes what bears a number and has no processes any more, and frees the number.
    fn clear(&self, number: u32) {
        self.remove(number);
        self.release(number);
    }

    fn remove(&self, number: u32) {
        let directory = self.directory(number);
        live::remove_group(&self.cgroups, number);
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

pub(super) fn group_name(number: u32) -> String {
    format!("slot-{number}")
}

/// What is pre-created.
pub(super) trait Product: Send + Sized + 'static {
    fn make(factory: &Factory, shape: SlotSpec) -> Result<Self, SlotError>;
    fn started(&self) -> &Started;
    fn discard(self, factory: &Factory);
}

impl Product for Slot {
    fn make(factory: &Factory, shape: SlotSpec) -> Result<Self, SlotError> {
        factory.make(shape, SlotDisk::Pool)
    }

    fn started(&self) -> &Started {
        &self.started
    }

    fn discard(self, factory: &Factory) {
        factory.discard(self);
    }
}

impl Product for PreparedSlot {
    fn make(factory: &Factory, shape: SlotSpec) -> Result<Self, SlotError> {
        factory.prepare(shape.outbound)
    }

    fn started(&self) -> &Started {
        &self.started
    }

    fn discard(self, factory: &Factory) {
        factory.abandon(self);
    }
}

/// Slots, or grounds, of one shape, refilled by threads of its own.
pub(super) struct Pool<P: Product = Slot> {
    factory: Arc<Factory>,
    shape: SlotSpec,
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

impl<P: Product> Pool<P> {
    pub fn start(factory: Arc<Factory>, shape: SlotSpec, target: usize) -> Arc<Self> {
        let state = PoolState { ready: Vec::new(), taken: Instant::now(), coming: 0, target, closed: false };
        let pool = Arc::new(Self { factory, shape, state: Mutex::new(state), changed: Condvar::new() });
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
            let made = P::make(&self.factory, self.shape);
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

    pub fn shape(&self) -> SlotSpec {
        self.shape
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
            if !live::has_ended(slot.started().pidfd.as_fd()) {
                return Some(slot);
            }
            let said = live::read_error(&slot.started().error);
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
