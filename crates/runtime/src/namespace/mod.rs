//! The namespace driver: sandboxes made of Linux namespaces, cgroups and an overlay on a disk image.
//!
//! ```text
//!  ids, network, disk, cgroup ──▶ spawner: clone3, mounts, agent ──▶ slot in the pool
//!                                                                        │ take: limits, record, name
//!  release ◀── kill the first process ◀── destroy ◀── sandbox ◀── link ◀──┘
//! ```
//!
//! What survives this process is on purpose: the sandboxes' processes and their directories below
//! `sandboxes/`. Everything else (slots of the pool, mounts, loop devices) is held by descriptors
//! and goes with it, but for files and cgroups of slots, which the next start sweeps.

mod disk;
mod host_image;
mod live;
mod network;
mod record;
mod room;
mod slots;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use async_trait::async_trait;
use nagaya_api::ids::SessionId;
use nagaya_engine::model::{Guarantees, Machine};
use nagaya_engine::ports::{Driver, DriverError, Guest, SandboxExit};
use tokio::sync::{Notify, mpsc};

pub use network::{Cidr, Network, NetworkError};

use crate::cgroup::Cgroups;
use crate::spawner::Spawner;
use live::{Live, PidFd};
use record::Record;
use slots::{Factory, Pool, Shape, Slot, SlotError, Started, group_name};

/// What the operator decides about the driver.
#[derive(Debug, Clone)]
pub struct Config {
    /// Everything the driver writes is below it.
    pub data: PathBuf,
    /// Sandboxes that can exist at once.
    pub slots_max: u32,
    /// Slots of the default shape (5 GiB disk, outbound access) that are kept ready.
    pub pool_ready: usize,
    /// The same for sandboxes without outbound access.
    pub pool_ready_isolated: usize,
    /// Processes and threads of one sandbox.
    pub processes_max: u64,
    /// Free space of the data directory's file system below which no sandbox is made, MiB.
    pub disk_free_mb_min: u64,
    /// Available memory of the host below which no sandbox is made, MiB.
    pub memory_available_mb_min: u64,
    /// `None`: a /16 that no route of the host leads to is chosen at the first start, and kept.
    pub network_cidr: Option<Cidr>,
    /// Private networks that sandboxes may reach, such as `10.1.2.0/24`.
    pub network_allow: Vec<String>,
    /// False: there is no way out for any sandbox, and asking for one is an error.
    pub network_outbound: bool,
    /// Switch the host's cgroups to fast moves of processes; see [`Cgroups::favor_moves`].
    pub favor_cgroup_moves: bool,
}

impl Config {
    pub fn new(data: PathBuf) -> Self {
        Self {
            data,
            slots_max: 1_024,
            pool_ready: 16,
            pool_ready_isolated: 2,
            processes_max: 1_024,
            disk_free_mb_min: 256,
            memory_available_mb_min: 256,
            network_cidr: None,
            network_allow: Vec::new(),
            network_outbound: true,
            favor_cgroup_moves: true,
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("start the namespace driver: {step}")]
pub struct StartError {
    step: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

fn on<E: Into<Box<dyn std::error::Error + Send + Sync>>>(step: &'static str) -> impl FnOnce(E) -> StartError {
    move |source| StartError { step, source: source.into() }
}

/// Four hexadecimal digits that name everything a server makes on its host outside its directory.
pub fn instance_name(data: &Path) -> String {
    blake3::hash(data.as_os_str().as_encoded_bytes()).to_hex()[..4].to_owned()
}

/// Holds the network that was chosen for this data directory: sandboxes keep their addresses.
pub const NETWORK_FILE: &str = "network";

pub struct NamespaceDriver {
    inner: Arc<Inner>,
    exits: Mutex<Option<mpsc::UnboundedReceiver<SandboxExit>>>,
}

struct Inner {
    config: Config,
    sandboxes: PathBuf,
    factory: Arc<Factory>,
    pools: Vec<Arc<Pool>>,
    live: Mutex<HashMap<SessionId, Arc<Live>>>,
    releasing: Mutex<HashSet<SessionId>>,
    /// Told after each release; one waiter at a time.
    released: Notify,
    exits: mpsc::UnboundedSender<SandboxExit>,
    processors: Vec<usize>,
}

impl NamespaceDriver {
    /// Prepares the host and starts filling the pools. Blocks.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let data = fs::canonicalize(&config.data).map_err(on("find the data directory"))?;
        let instance = instance_name(&data);
        let cgroups = Cgroups::open(&instance).map_err(on("open the control groups"))?;
        if config.favor_cgroup_moves
            && let Err(error) = Cgroups::favor_moves()
        {
            tracing::warn!(%error, "cgroups stay slow to move processes: creating and running take some ms longer");
        }
        let network = if config.network_outbound {
            let cidr = match config.network_cidr {
                Some(cidr) => cidr,
                None => Cidr::choose(&data.join(NETWORK_FILE)).map_err(on("choose a network"))?,
            };
            Some(Network::open(&instance, cidr, &config.network_allow).map_err(on("set the network's rules"))?)
        } else {
            None
        };
        let images = data.join("images");
        let image =
            host_image::make(&images, network.as_ref().map(Network::name_server)).map_err(on("make the host image"))?;
        let disks = disk::Disks::open(&data, &image.layer_names()).map_err(on("prepare disks"))?;
        let sandboxes = data.join("sandboxes");
        let pool_directory = data.join("pool");
        // Slots that nobody took; their agents and mounts went with the process that made them.
        let _ = fs::remove_dir_all(&pool_directory);
        for directory in [&sandboxes, &pool_directory] {
            fs::create_dir_all(directory).map_err(on("make directories"))?;
        }
        let factory = Factory::new(
            Spawner::start().map_err(on("start a spawner"))?,
            network,
            disks,
            cgroups,
            image,
            pool_directory,
            config.slots_max,
        );
        claim_what_exists(&factory, &sandboxes, &images);
        let factory = Arc::new(factory);
        let mut shapes =
            vec![(Shape { disk_gb: nagaya_api::limits::DEFAULT_DISK_GB, outbound: false }, config.pool_ready_isolated)];
        if config.network_outbound {
            shapes.push((Shape { disk_gb: nagaya_api::limits::DEFAULT_DISK_GB, outbound: true }, config.pool_ready));
        }
        let pools = shapes.into_iter().map(|(shape, target)| Pool::start(factory.clone(), shape, target)).collect();
        let (exits, receiver) = mpsc::unbounded_channel();
        let inner = Inner {
            sandboxes,
            factory,
            pools,
            live: Mutex::default(),
            releasing: Mutex::default(),
            released: Notify::new(),
            exits,
            processors: own_processors().map_err(on("count processors"))?,
            config,
        };
        Ok(Self { inner: Arc::new(inner), exits: Mutex::new(Some(receiver)) })
    }

    /// Slots that are ready now, by pool.
    pub fn pool_levels(&self) -> [(&'static str, i64); 2] {
        let level = |outbound| {
            let pools = self.inner.pools.iter().filter(|pool| pool.shape().outbound == outbound);
            pools.map(|pool| pool.level() as i64).sum()
        };
        [("slots", level(true)), ("isolated_slots", level(false))]
    }

    /// Waits until everything that belonged to destroyed sandboxes is gone.
    pub async fn settled(&self) {
        while !self.inner.releasing().is_empty() {
            self.inner.released.notified().await;
        }
    }

    /// Gives back what is only prepared. Sandboxes live on.
    pub fn shut_down(&self) {
        for pool in &self.inner.pools {
            pool.close();
        }
    }

    /// Removes what the driver set on the host; only when no sandbox is left. Blocks.
    pub fn remove_host_state(&self) {
        self.shut_down();
        if let Some(network) = &self.inner.factory.network
            && let Err(error) = network.remove()
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "could not remove the network's rules");
        }
        self.inner.factory.cgroups.remove();
    }
}

/// Takes the numbers of sandboxes that exist, and sweeps what belongs to none.
fn claim_what_exists(factory: &Factory, sandboxes: &Path, images: &Path) {
    let records: Vec<Record> = directories(sandboxes).iter().filter_map(|(_, path)| Record::read(path).ok()).collect();
    for record in &records {
        factory.claim(record.slot);
    }
    let known: HashSet<String> = records.iter().map(|record| group_name(record.slot)).collect();
    for name in factory.cgroups.names().into_iter().filter(|name| !known.contains(name)) {
        let group = factory.cgroups.group(&name);
        live::kill_group(&group);
        let _ = group.remove();
    }
    let used: Vec<PathBuf> =
        records.into_iter().map(|record| record.base).chain([factory.image.base.clone()]).collect();
    host_image::remove_unused(images, &used);
}

/// Sandboxes' directories by id.
fn directories(sandboxes: &Path) -> Vec<(SessionId, PathBuf)> {
    fs::read_dir(sandboxes)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
        .collect()
}

/// Processors that this process may use, which sandboxes share.
fn own_processors() -> Result<Vec<usize>, std::io::Error> {
    let set = rustix::thread::sched_getaffinity(None)?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|number| set.is_set(*number)).collect())
}

impl Inner {
    fn directory(&self, id: SessionId) -> PathBuf {
        self.sandboxes.join(id.to_string())
    }

    fn live(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Live>>> {
        self.live.lock().expect("the list is changed without panics")
    }

    fn releasing(&self) -> MutexGuard<'_, HashSet<SessionId>> {
        self.releasing.lock().expect("the list is changed without panics")
    }

    fn slot(&self, machine: &Machine) -> Result<Slot, SlotError> {
        let shape = Shape { disk_gb: machine.disk_gb, outbound: machine.outbound };
        let ready = self.pools.iter().find(|pool| pool.shape() == shape).and_then(|pool| pool.take());
        if let Some(slot) = ready {
            return Ok(slot);
        }
        match self.factory.make(shape) {
            // What is held ready of other shapes gives way to what is wanted now.
            Err(SlotError::Exhausted(max)) => {
                let other = self.pools.iter().find_map(|pool| pool.take());
                other.map_or(Err(SlotError::Exhausted(max)), |slot| self.factory.reshape(slot, shape))
            }
            made => made,
        }
    }

    /// The processors of a sandbox: all, or as many as it has cores, spread by slot number.
    fn processors_for(&self, slot: u32, cores: u32) -> Vec<usize> {
        let all = &self.processors;
        let (count, start) = ((cores as usize).min(all.len()), slot as usize);
        let mut chosen: Vec<usize> = (0..count).map(|step| all[(start + step) % all.len()]).collect();
        chosen.sort_unstable();
        chosen
    }

    /// Everything of a creation but the connection to the agent: the sandbox's slot and process.
    fn start(&self, id: SessionId, machine: &Machine) -> Result<(u32, Started), DriverError> {
        if machine.outbound && !self.config.network_outbound {
            return Err(DriverError::Failed(
                "this server gives no sandbox outbound access; ask for allow_outbound=false".into(),
            ));
        }
        if let Some(limit) = room::lacking(&self.config) {
            return Err(DriverError::Exhausted(limit.into()));
        }
        let slot = self.slot(machine).map_err(|error| match (&error, room::limit_of(&error)) {
            (SlotError::Exhausted(_), _) => DriverError::Exhausted("slots_max".into()),
            (_, Some(limit)) => DriverError::Exhausted(limit.into()),
            (_, None) => failed("make a sandbox", &error),
        })?;
        match live::take(self, id, machine, &slot) {
            Ok(()) => Ok((slot.number, slot.started)),
            Err(error) => {
                self.factory.discard(slot);
                Err(error)
            }
        }
    }

    /// Removes all of a sandbox whose processes are gone. Blocks.
    fn release(&self, id: SessionId, slot: Option<u32>) {
        if let Some(slot) = slot {
            live::remove_group(&self.factory.cgroups, slot);
            let directory = self.directory(id);
            if let Err(error) = fs::remove_dir_all(&directory) {
                tracing::warn!(%error, directory = %directory.display(), "could not remove a sandbox's directory");
            }
            self.factory.release(slot);
        } else {
            let _ = fs::remove_dir_all(self.directory(id));
        }
        self.releasing().remove(&id);
        self.released.notify_one();
    }

    fn watch(self: &Arc<Self>, live: &Arc<Live>) {
        let (inner, live) = (self.clone(), live.clone());
        tokio::spawn(async move {
            live.pidfd.ended().await;
            if !live.is_ending() {
                let cause = "the sandbox's first process ended unexpectedly".to_owned();
                // Nobody listens any more when the server shuts down.
                let _ = inner.exits.send(SandboxExit { id: live.id, cause });
            }
        });
    }
}

fn failed(step: &str, error: &dyn std::error::Error) -> DriverError {
    let mut text = format!("{step}: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    DriverError::Failed(text)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("blocking work does not panic")
}

#[async_trait]
impl Driver for NamespaceDriver {
    fn name(&self) -> &'static str {
        "namespace"
    }

    fn guarantees(&self) -> Guarantees {
        Guarantees { isolation: "shared kernel".into(), memory_snapshot: false }
    }

    async fn create(&self, id: SessionId, machine: &Machine) -> Result<Arc<dyn Guest>, DriverError> {
        let begin = Instant::now();
        let (inner, wanted) = (self.inner.clone(), machine.clone());
        // The leash is held until the agent is connected.
        let (slot, Started { pidfd, error: told, leash: _leash, .. }) =
            blocking(move || inner.start(id, &wanted)).await?;
        let taken = begin.elapsed();
        let pidfd = PidFd::new(pidfd).map_err(|error| failed("watch the sandbox", &error))?;
        let live = Arc::new(Live::new(id, slot, pidfd));
        self.inner.live().insert(id, live.clone());
        match live::connect(&self.inner.directory(id), &self.inner.factory.cgroups, slot).await {
            Ok(link) => {
                self.inner.watch(&live);
                tracing::debug!(%id, ?taken, ready = ?begin.elapsed(), "sandbox started");
                Ok(link)
            }
            Err(error) => {
                self.destroy(id).await?;
                let told = live::read_error(&told);
                Err(if told.is_empty() { error } else { DriverError::Failed(told) })
            }
        }
    }

    async fn adopt(&self, id: SessionId) -> Result<Arc<dyn Guest>, DriverError> {
        let directory = self.inner.directory(id);
        let record = Record::read(&directory).map_err(|_| DriverError::Gone)?;
        let known = self.inner.live().get(&id).cloned();
        let live = match known {
            Some(live) => live,
            None => {
                let pidfd = live::find(&self.inner.factory.cgroups, record.slot).ok_or(DriverError::Gone)?;
                let pidfd = PidFd::new(pidfd).map_err(|error| failed("watch the sandbox", &error))?;
                let live = Arc::new(Live::new(id, record.slot, pidfd));
                self.inner.live().insert(id, live.clone());
                self.inner.watch(&live);
                live
            }
        };
        tokio::select! {
            biased;
            () = live.pidfd.ended() => Err(DriverError::Gone),
            link = live::connect(&directory, &self.inner.factory.cgroups, record.slot) => Ok(link?),
        }
    }

    async fn destroy(&self, id: SessionId) -> Result<(), DriverError> {
        let directory = self.inner.directory(id);
        let known = self.inner.live().remove(&id);
        let slot = match known {
            Some(live) => {
                live.end().await.map_err(|error| failed("kill the sandbox", &error))?;
                Some(live.slot)
            }
            None if !directory.exists() || self.inner.releasing().contains(&id) => return Ok(()),
            None => {
                let slot = Record::read(&directory).ok().map(|record| record.slot);
                if let Some(pidfd) = slot.and_then(|slot| live::find(&self.inner.factory.cgroups, slot)) {
                    let pidfd = PidFd::new(pidfd).map_err(|error| failed("watch the sandbox", &error))?;
                    pidfd.kill().await.map_err(|error| failed("kill the sandbox", &error))?;
                }
                slot
            }
        };
        self.inner.releasing().insert(id);
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || inner.release(id, slot));
        Ok(())
    }

    async fn list(&self) -> Result<Vec<SessionId>, DriverError> {
        let found = directories(&self.inner.sandboxes);
        let releasing = self.inner.releasing();
        Ok(found.into_iter().map(|(id, _)| id).filter(|id| !releasing.contains(id)).collect())
    }

    fn exits(&self) -> mpsc::UnboundedReceiver<SandboxExit> {
        let receiver = self.exits.lock().expect("taken without panics").take();
        receiver.expect("the engine asks for exits once")
    }
}

impl Drop for NamespaceDriver {
    fn drop(&mut self) {
        self.shut_down();
    }
}
