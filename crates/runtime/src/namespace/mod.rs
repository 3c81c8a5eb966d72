//! The namespace driver: sandboxes made of Linux namespaces, cgroups and an overlay on a disk image.
//!
//! ```text
//!  ids, network, disk, cgroup ──▶ spawner: clone3, mounts, agent ──▶ slot in the pool
//!                                                                        │ take: limits, record, name
//!  release ◀── kill the first process ◀── destroy ◀── sandbox ◀── link ◀──┘
//!                                                     │    ▲
//!                                                stop ▼    │ boot: a slot around the kept disk
//!                                                only the disk ◀──▶ images
//! ```
//!
//! What survives this process is on purpose: the sandboxes' processes and their directories below
//! `sandboxes/`, images of disks, and volumes. Everything else (slots of the pool, mounts, loop devices) is held by descriptors
//! and goes with it, but for files and cgroups of slots, which the next start sweeps.

mod brake;
mod capacity;
mod ceilings;
mod disk;
mod egress;
mod events;
mod host_image;
mod images;
mod live;
mod locks;
mod network;
mod pause;
mod record;
mod slots;
mod start;
mod stop;
mod storage;
mod usage;
mod volumes;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use nagaya_api::ids::{DiskImageId, SessionId, VolumeId};
use nagaya_engine::model::{Connection, Egress, Guarantees, Limit, Machine};
use nagaya_engine::ports::{Adopted, Driver, DriverError, DriverEvent, Guest, Mount, ResourceUsage};
use tokio::sync::{Notify, mpsc};

pub(crate) use ceilings::lacking as ceilings_lacking;
pub use network::{Cidr, Network, NetworkError, Settings};
pub use storage::{PoolChoice, storage_root};
pub(crate) use storage::{has_pool, shares_blocks, storage_is_plain};

use crate::cgroup::Cgroups;
use crate::spawner::Spawner;
use brake::Brake;
use images::{CopyError, Images};
use live::Live;
use record::Record;
use slots::{Factory, Pool, PreparedSlot, SlotSpec, group_name};
use storage::Storage;
use volumes::Volumes;

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
    /// Output of commands in the background that one sandbox keeps for its readers, MiB, and for how long after the
    /// command has ended, minutes.
    pub kept_output_mb_max: u64,
    pub kept_output_minutes_max: u64,
    /// Free space below which no sandbox is made, MiB: of the pool of disks where there is one, else of the data
    /// directory's file system.
    pub disk_free_mb_min: u64,
    /// Whether a new data directory gets a pool of disks.
    pub pool: PoolChoice,
    /// What a new pool begins with, MiB; at most half of what the host has left.
    pub pool_first_mb: u64,
    /// Available memory of the host below which no sandbox is made, MiB.
    pub memory_available_mb_min: u64,
    /// Available memory of the host below which paused sandboxes should give theirs back, MiB.
    pub memory_low_mb: u64,
    /// `None`: a /16 that no route of the host leads to is chosen at the first start, and kept.
    pub network_cidr: Option<Cidr>,
    /// Private networks that sandboxes may reach, such as `10.1.2.0/24`.
    pub network_allow: Vec<String>,
    /// Who answers sandboxes' questions for names; `None` is whom the host asks.
    pub name_server: Option<SocketAddr>,
    /// False: there is no way out for any sandbox, and asking for one is an error.
    pub network_outbound: bool,
    /// Connections that one sandbox may have at a time, within a 64th of the host's table of them.
    pub connections_max: u32,
    /// Whether this driver does from outside what it can do faster there than a sandbox's agent: make sockets in the
    /// sandbox's network, and read what its control groups tell.
    pub shortcuts: bool,
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
            kept_output_mb_max: 256,
            kept_output_minutes_max: 60,
            disk_free_mb_min: 256,
            pool: PoolChoice::Off,
            pool_first_mb: 4_096,
            memory_available_mb_min: 256,
            memory_low_mb: 512,
            network_cidr: None,
            network_allow: Vec::new(),
            name_server: None,
            network_outbound: true,
            connections_max: 4_096,
            shortcuts: true,
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

/// Grounds of either kind that wait for a disk, where as many slots do.
const GROUNDS_READY: usize = 4;

pub struct NamespaceDriver {
    inner: Arc<Inner>,
    events: Mutex<Option<mpsc::UnboundedReceiver<DriverEvent>>>,
    /// Addresses of sandboxes that have used up their connections.
    used_up: Mutex<Option<mpsc::UnboundedReceiver<Ipv4Addr>>>,
}

struct Inner {
    config: Config,
    storage: Storage,
    sandboxes: PathBuf,
    factory: Arc<Factory>,
    pools: Vec<Arc<Pool>>,
    grounds: Vec<Arc<Pool<PreparedSlot>>>,
    live: Mutex<HashMap<SessionId, Arc<Live>>>,
    /// New sandboxes that are not on the host's disk for sure, and whether their disks are to be synced too.
    unsynced: Mutex<HashMap<SessionId, bool>>,
    releasing: Mutex<HashSet<SessionId>>,
    /// Told after each release; one waiter at a time.
    released: Notify,
    events: mpsc::UnboundedSender<DriverEvent>,
    _brake: Option<Brake>,
    images: Images,
    volumes: Volumes,
    /// Names this run of the host.
    boot_id: String,
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
        let storage = Storage::open(&data, config.pool, config.pool_first_mb, config.disk_free_mb_min)
            .map_err(on("open the pool of disks"))?;
        let root = storage.root();
        let sandboxes = root.join(storage::SANDBOXES);
        let (network, used_up) = if config.network_outbound {
            let cidr = match config.network_cidr {
                Some(cidr) => cidr,
                None => Cidr::choose(&data.join(NETWORK_FILE)).map_err(on("choose a network"))?,
            };
            let settings = Settings {
                allowed: config.network_allow.clone(),
                name_server: config.name_server,
                connections_max: config.connections_max,
            };
            let existing = restricted_slots(&sandboxes);
            let opened = Network::open(&instance, cidr, &settings, &existing);
            let (network, used_up) = opened.map_err(on("set the network's rules"))?;
            (Some(network), Some(used_up))
        } else {
            (None, None)
        };
        let images = data.join("images");
        let image =
            host_image::make(&images, network.as_ref().map(Network::name_server)).map_err(on("make the host image"))?;
        let disks = disk::Disks::open(root, &image.layer_names()).map_err(on("prepare disks"))?;
        let pool_directory = root.join("pool");
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
            &config,
        );
        claim_what_exists(&factory, &sandboxes, &images);
        let factory = Arc::new(factory);
        let mut shapes = vec![(
            SlotSpec { disk_gb: nagaya_api::limits::DEFAULT_DISK_GB, outbound: false },
            config.pool_ready_isolated,
        )];
        if config.network_outbound {
            shapes.push((SlotSpec { disk_gb: nagaya_api::limits::DEFAULT_DISK_GB, outbound: true }, config.pool_ready));
        }
        let ground =
            |(shape, target): &(SlotSpec, usize)| Pool::start(factory.clone(), *shape, GROUNDS_READY.min(*target));
        let grounds = shapes.iter().map(ground).collect();
        let pools = shapes.into_iter().map(|(shape, target)| Pool::start(factory.clone(), shape, target)).collect();
        let (events, receiver) = mpsc::unbounded_channel();
        let boot_id = record::boot_id().map_err(on("read the host's boot id"))?;
        let inner = Inner {
            sandboxes,
            factory,
            pools,
            grounds,
            live: Mutex::default(),
            unsynced: Mutex::default(),
            releasing: Mutex::default(),
            released: Notify::new(),
            events,
            _brake: Brake::start(root.to_owned(), config.disk_free_mb_min),
            images: Images::open(root, config.disk_free_mb_min, &boot_id)
                .map_err(on("open the directory of images"))?,
            volumes: Volumes::open(root, config.disk_free_mb_min).map_err(on("open the directory of volumes"))?,
            storage,
            boot_id,
            processors: own_processors().map_err(on("count processors"))?,
            config,
        };
        Ok(Self { inner: Arc::new(inner), events: Mutex::new(Some(receiver)), used_up: Mutex::new(used_up) })
    }

    /// Keeps the server's own port on loopback reachable when the host's table of connections is full.
    pub fn keep_reachable(&self, port: u16) {
        let network = self.inner.factory.network.as_ref();
        if let Some(Err(error)) = network.map(|network| network.leave_untracked(port)) {
            tracing::warn!(%error, "the server cannot be reached while the host's table of connections is full");
        }
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
        let unsynced: Vec<SessionId> = self.inner.unsynced().keys().copied().collect();
        for id in unsynced {
            self.inner.sync_new(id);
        }
        for pool in &self.inner.pools {
            pool.close();
        }
        for pool in &self.inner.grounds {
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
        if let Err(error) = self.inner.storage.remove() {
            tracing::warn!(error = &error as &dyn std::error::Error, "could not remove the pool of disks");
        }
    }
}

/// Slots of sandboxes that exist, and the only destinations they reach.
fn restricted_slots(sandboxes: &Path) -> Vec<(u32, Option<Egress>)> {
    let records = directories(sandboxes).into_iter().filter_map(|(_, path)| Record::read(&path));
    records.filter_map(|record| Some((record.slot?, record.egress))).collect()
}

/// Takes the numbers of sandboxes that exist, and sweeps what belongs to none.
fn claim_what_exists(factory: &Factory, sandboxes: &Path, images: &Path) {
    let records: Vec<Record> = directories(sandboxes).iter().filter_map(|(_, path)| Record::read(path)).collect();
    let slots: Vec<u32> = records.iter().filter_map(|record| record.slot).collect();
    for slot in &slots {
        factory.claim(*slot);
    }
    let known: HashSet<String> = slots.into_iter().map(group_name).collect();
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

    fn unsynced(&self) -> MutexGuard<'_, HashMap<SessionId, bool>> {
        self.unsynced.lock().expect("the list is changed without panics")
    }

    fn releasing(&self) -> MutexGuard<'_, HashSet<SessionId>> {
        self.releasing.lock().expect("the list is changed without panics")
    }

    /// The processors of a sandbox: all, or as many as it has cores, spread by slot number.
    fn processors_for(&self, slot: u32, cores: u32) -> Vec<usize> {
        let all = &self.processors;
        let (count, start) = ((cores as usize).min(all.len()), slot as usize);
        let mut chosen: Vec<usize> = (0..count).map(|step| all[(start + step) % all.len()]).collect();
        chosen.sort_unstable();
        chosen
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

/// What is told of a step that was given up.
fn too_long(what: &str, limit: std::time::Duration) -> DriverError {
    DriverError::Failed(format!("{what} within {} s", limit.as_secs()))
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

    async fn create(
        &self,
        id: SessionId,
        machine: &Machine,
        disk: Option<DiskImageId>,
    ) -> Result<Arc<dyn Guest>, DriverError> {
        self.inner.create(id, machine, disk).await
    }

    async fn adopt(&self, id: SessionId) -> Result<Adopted, DriverError> {
        self.inner.adopt(id).await
    }

    async fn freeze(&self, id: SessionId) -> Result<(), DriverError> {
        self.inner.freeze(id).await
    }

    async fn thaw(&self, id: SessionId) -> Result<(), DriverError> {
        self.inner.thaw(id).await
    }

    async fn stop(&self, id: SessionId) -> Result<(), DriverError> {
        self.inner.stop(id).await
    }

    async fn boot(&self, id: SessionId, machine: &Machine) -> Result<Arc<dyn Guest>, DriverError> {
        self.inner.boot(id, machine).await
    }

    async fn destroy(&self, id: SessionId) -> Result<(), DriverError> {
        self.inner.destroy(id).await
    }

    async fn list(&self) -> Result<Vec<SessionId>, DriverError> {
        let found = directories(&self.inner.sandboxes);
        let releasing = self.inner.releasing();
        Ok(found.into_iter().map(|(id, _)| id).filter(|id| !releasing.contains(id)).collect())
    }

    async fn copy_disk(&self, id: SessionId, images: &[DiskImageId]) -> Result<u64, DriverError> {
        let (inner, images) = (self.inner.clone(), images.to_vec());
        let stopped = blocking(move || {
            let directory = inner.directory(id);
            if !disk::path(&directory).exists() {
                return Err(DriverError::Gone);
            }
            inner.images.copy(&directory, &images).map_err(|error| match error {
                CopyError::NoRoom(_) => DriverError::Exhausted(Limit::DiskFreeMin),
                error => capacity::refusal("copy the disk", &error),
            })
        });
        Ok(stopped.await?.as_micros() as u64)
    }

    fn image_path(&self, id: DiskImageId) -> PathBuf {
        self.inner.images.path(id)
    }

    async fn prepare_image(&self, id: DiskImageId) -> Result<PathBuf, DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.images.prepare(id)).await.map_err(|error| capacity::refusal("prepare the image", &error))
    }

    async fn remove_image(&self, id: DiskImageId) -> Result<(), DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.images.remove(id)).await.map_err(|error| failed("remove the image", &error))
    }

    async fn images(&self) -> Result<Vec<DiskImageId>, DriverError> {
        self.inner.images.list().map_err(|error| failed("list the images", &error))
    }

    async fn create_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.volumes.create(id, size_bytes)).await
    }

    async fn grow_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.volumes.grow(id, size_bytes)).await
    }

    async fn volume_size(&self, id: VolumeId) -> Result<u64, DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.volumes.size(id)).await
    }

    async fn remove_volume(&self, id: VolumeId) -> Result<(), DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.volumes.remove(id)).await
    }

    async fn volumes(&self) -> Result<Vec<VolumeId>, DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.volumes.list()).await
    }

    async fn attach_volume(&self, id: SessionId, mount: &Mount) -> Result<(), DriverError> {
        let (inner, mount) = (self.inner.clone(), mount.clone());
        blocking(move || inner.volumes.attach(&inner.factory.spawner, &inner.sandbox(id)?, &mount)).await
    }

    async fn detach_volume(&self, id: SessionId, mount: &Mount, force: bool) -> Result<(), DriverError> {
        let (inner, volume_id) = (self.inner.clone(), mount.volume_id);
        let detach = move || inner.volumes.detach(&inner.factory.spawner, &inner.sandbox(id)?, volume_id, force);
        match blocking(detach).await {
            // With the sandbox, or with the volume, the mount is gone too.
            Err(DriverError::Gone) => self.settle_volume(mount.volume_id).await,
            other => other,
        }
    }

    async fn settle_volume(&self, id: VolumeId) -> Result<(), DriverError> {
        self.inner.volumes.settle(id).await
    }

    async fn set_egress(&self, id: SessionId, egress: Option<&Egress>) -> Result<(), DriverError> {
        let (inner, egress) = (self.inner.clone(), egress.cloned());
        blocking(move || inner.set_egress(id, egress)).await
    }

    async fn connections(&self, id: SessionId) -> Result<Vec<Connection>, DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.connections(id)).await
    }

    async fn usage(&self, id: SessionId) -> Result<ResourceUsage, DriverError> {
        self.inner.usage(id).await
    }

    fn events(&self) -> mpsc::UnboundedReceiver<DriverEvent> {
        let receiver = self.events.lock().expect("taken without panics").take();
        self.inner.watch_memory();
        if let Some(used_up) = self.used_up.lock().expect("taken without panics").take() {
            self.inner.watch_connections(used_up);
        }
        self.inner.watch_locks();
        receiver.expect("the engine asks for events once")
    }
}

impl Drop for NamespaceDriver {
    fn drop(&mut self) {
        self.shut_down();
        // Whoever waits for news of a sandbox holds it; with its connection that ends.
        for live in self.inner.live().values() {
            live.disconnect();
        }
    }
}
