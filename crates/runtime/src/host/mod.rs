//! What all drivers share on their host: where disks lie, disks, volumes, the network, control groups, root file systems, and
//! the numbers from which a sandbox's ids, address and control group follow.
//!
//! A sandbox is a directory below `sandboxes/` with its disk and its record, whatever driver runs it. All that is kept of
//! sandboxes beyond the life of a server is in there, in images of disks, and in volumes.

pub(crate) mod brake;
pub(crate) mod capacity;
mod ceilings;
mod config;
pub(crate) mod disk;
pub(crate) mod disk_images;
mod errors;
mod ext4_image;
mod host_image;
mod locks;
mod network;
pub(crate) mod numbers;
pub(crate) mod record;
mod storage;
pub(crate) mod volumes;

use std::collections::HashSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use nagaya_api::ids::{DiskImageId, SessionId, VolumeId};
use nagaya_engine::model::{Connection, Egress, ImageDigest, Layer, Limit, RootImage};
use nagaya_engine::ports::{self, DriverError, HostEvent};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

pub(crate) use ceilings::lacking as ceilings_lacking;
pub use config::{Config, Limits};
pub use network::{Cidr, Network, NetworkConfig, NetworkError};
pub use storage::{DiskPool, Disks, storage_root};
pub(crate) use storage::{has_pool, shares_blocks, storage_is_plain};

use crate::cgroup::{CgroupError, Cgroups, Group};
use crate::spawner::Spawner;
use brake::Brake;
use capacity::Minimums;
use disk_images::{CopyError, DiskImages};
pub(crate) use errors::{blocking, failed, too_long};
use host_image::HostImages;
use numbers::Numbers;
use record::Record;
use storage::Storage;
use volumes::Volumes;

/// Holds the network that was chosen for this data directory: sandboxes keep their addresses.
pub const NETWORK_FILE: &str = "network";
/// Where sandboxes wait that are pre-created, below the storage.
const POOL: &str = "pool";
/// Between two looks at the host's memory.
const MEMORY_LOOK: Duration = Duration::from_secs(1);
/// Between two events about it: what the first one sets off takes a while.
const MEMORY_EVENT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
#[error("prepare the host: {step}")]
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

/// The host of one server.
pub struct Host {
    pub(crate) config: Config,
    pub(crate) spawner: Spawner,
    pub(crate) network: Option<Network>,
    pub(crate) cgroups: Cgroups,
    pub(crate) disks: disk::Disks,
    pub(crate) disk_images: DiskImages,
    pub(crate) volumes: Volumes,
    pub(crate) numbers: Numbers,
    /// Where sandboxes wait that are pre-created; one directory for each number.
    pub(crate) pool_directory: PathBuf,
    /// Names this run of the host.
    pub(crate) boot_id: String,
    /// Those that this process may use, which sandboxes share.
    pub(crate) processors: Vec<usize>,
    instance: String,
    root_images: HostImages,
    storage: Storage,
    sandboxes: PathBuf,
    /// Addresses of sandboxes that have used up their connections.
    used_up: Mutex<Option<mpsc::UnboundedReceiver<Ipv4Addr>>>,
    _brake: Option<Brake>,
}

impl Host {
    /// Prepares the host, and sweeps what belongs to no sandbox. Everything that is written is below `data`. Blocks.
    pub fn open(data: &Path, config: Config) -> Result<Arc<Self>, StartError> {
        let data = fs::canonicalize(data).map_err(on("find the data directory"))?;
        let instance = instance_name(&data);
        let cgroups = Cgroups::open(&instance).map_err(on("open the control groups"))?;
        let limits = &config.limits;
        if limits.favor_cgroup_moves
            && let Err(error) = Cgroups::favor_moves()
        {
            tracing::warn!(%error, "cgroups stay slow to move processes: creating and running take some ms longer");
        }
        let storage =
            Storage::open(&data, &config.disks, limits.disk_free_mb_min).map_err(on("open the pool of disks"))?;
        let root = storage.root();
        let sandboxes = root.join(storage::SANDBOXES);
        let records: Vec<Record> = directories(&sandboxes).iter().filter_map(|(_, path)| Record::read(path)).collect();
        let (network, used_up) = if config.network.outbound {
            let cidr = match config.network.cidr {
                Some(cidr) => cidr,
                None => Cidr::choose(&data.join(NETWORK_FILE)).map_err(on("choose a network"))?,
            };
            let of_record = |record: &Record| Some((record.slot?, record.egress.clone()));
            let restricted: Vec<(u32, Option<Egress>)> = records.iter().filter_map(of_record).collect();
            let opened = Network::open(&instance, cidr, &config.network, &restricted);
            let (network, used_up) = opened.map_err(on("set the network's rules"))?;
            (Some(network), Some(used_up))
        } else {
            (None, None)
        };
        let root_images = HostImages::open(&data.join("images"), network.as_ref().map(Network::name_server))
            .map_err(on("open the directory of images"))?;
        let pool_directory = root.join(POOL);
        // Slots that nobody took; their agents and mounts went with the process that made them.
        let _ = fs::remove_dir_all(&pool_directory);
        for directory in [&sandboxes, &pool_directory] {
            fs::create_dir_all(directory).map_err(on("make directories"))?;
        }
        let boot_id = record::boot_id().map_err(on("read the host's boot id"))?;
        let room = network.as_ref().map_or(u32::MAX, Network::capacity);
        let held = ceilings::raise(limits.slots_max, limits.processes_max);
        let numbers = Numbers::new(limits.slots_max.min(room).min(held));
        claim(&records, &numbers, &cgroups);
        let free_min = limits.disk_free_mb_min;
        Ok(Arc::new(Self {
            spawner: Spawner::start().map_err(on("start a spawner"))?,
            network,
            cgroups,
            disks: disk::Disks::open(root).map_err(on("prepare disks"))?,
            disk_images: DiskImages::open(root, free_min, &boot_id).map_err(on("open the directory of images"))?,
            volumes: Volumes::open(root, free_min).map_err(on("open the directory of volumes"))?,
            numbers,
            pool_directory,
            boot_id,
            processors: own_processors().map_err(on("count processors"))?,
            instance,
            root_images,
            _brake: Brake::start(root.to_owned(), free_min),
            storage,
            sandboxes,
            used_up: Mutex::new(used_up),
            config,
        }))
    }

    /// Makes the image of the host's own programs, which new sandboxes stand on. What only looks after those that are there
    /// needs none, and no space for it. Blocks.
    pub fn make_image(&self) -> Result<(), StartError> {
        self.root_images.make().map_err(on("make the host image"))
    }

    /// Keeps the server's own port on loopback reachable when the host's table of connections is full.
    pub fn keep_reachable(&self, port: u16) {
        if let Some(Err(error)) = self.network.as_ref().map(|network| network.leave_untracked(port)) {
            tracing::warn!(%error, "the server cannot be reached while the host's table of connections is full");
        }
    }

    /// Removes what was set on the host; only when no sandbox is left. Blocks.
    pub fn remove(&self) {
        if let Some(network) = &self.network
            && let Err(error) = network.remove()
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "could not remove the network's rules");
        }
        self.cgroups.remove();
        if let Err(error) = self.storage.remove() {
            tracing::warn!(error = &error as &dyn std::error::Error, "could not remove the pool of disks");
        }
    }

    /// The directory of a sandbox.
    pub(crate) fn directory(&self, id: SessionId) -> PathBuf {
        self.sandboxes.join(id.to_string())
    }

    /// Every sandbox of which anything exists.
    pub(crate) fn sandboxes(&self) -> Vec<(SessionId, PathBuf)> {
        directories(&self.sandboxes)
    }

    /// The name of the limit that a new sandbox would break, if any.
    pub(crate) fn lacking(&self) -> Option<Limit> {
        let least = Minimums {
            disk_free_mb: self.config.limits.disk_free_mb_min,
            memory_available_mb: self.config.limits.memory_available_mb_min,
        };
        capacity::lacking(&least, self.storage.root())
    }

    /// The image of sandboxes that ask for none.
    pub fn default_root_image(&self) -> RootImage {
        self.root_images.default_image()
    }

    /// The layers that a sandbox of this image stands on, the uppermost first.
    pub(crate) fn layers_of(&self, image: &RootImage) -> Vec<Layer> {
        self.root_images.layers_of(image)
    }

    /// Gives a number back, after everything that bears it is gone. Blocks.
    pub(crate) fn release_number(&self, number: u32) {
        if let Some(network) = &self.network {
            network.forget(number);
        }
        self.numbers.release(number);
    }

    /// Makes the control group of a sandbox.
    pub(crate) fn make_group(&self, number: u32) -> Result<Group, CgroupError> {
        self.cgroups.make_group(&group_name(number))
    }

    pub(crate) fn group(&self, number: u32) -> Group {
        self.cgroups.group(&group_name(number))
    }

    /// Changes where a running or frozen sandbox may go. The record comes first: a later server sets what it says.
    fn restrict(&self, id: SessionId, egress: Option<Egress>) -> Result<(), DriverError> {
        let (record, number) = self.recorded(id)?;
        if record.egress != egress {
            let changed = Record { egress: egress.clone(), ..record };
            let written = changed.write_synced(&self.directory(id));
            written.map_err(|error| capacity::refusal("write the sandbox's record", &error))?;
        }
        // A sandbox without a link has no destinations, which is as narrow as can be.
        let Some(network) = &self.network else { return Ok(()) };
        network.change(number, egress.as_ref()).map_err(|error| failed("set the sandbox's destinations", &error))
    }

    fn recorded(&self, id: SessionId) -> Result<(Record, u32), DriverError> {
        let record = Record::read(&self.directory(id)).ok_or(DriverError::Gone)?;
        let number = record.slot.ok_or(DriverError::Gone)?;
        Ok((record, number))
    }

    /// Whose address it is.
    fn holder(&self, guest: Ipv4Addr) -> Option<SessionId> {
        let number = self.network.as_ref()?.slot(guest)?;
        let holds = |path: &Path| Record::read(path).is_some_and(|record| record.slot == Some(number));
        self.sandboxes().into_iter().find(|(_, path)| holds(path)).map(|(id, _)| id)
    }
}

/// Tells when the host's memory runs low, until the host is gone.
fn watch_memory(host: &Arc<Host>, events: mpsc::UnboundedSender<HostEvent>) {
    let host = Arc::downgrade(host);
    tokio::spawn(async move {
        let mut look = tokio::time::interval(MEMORY_LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told: Option<Instant> = None;
        loop {
            look.tick().await;
            let Some(host) = host.upgrade() else { return };
            let low = capacity::available_memory_mb().is_some_and(|found| found < host.config.limits.memory_low_mb);
            if low && told.is_none_or(|told| told.elapsed() >= MEMORY_EVENT) {
                told = Some(Instant::now());
                // Nobody listens any more when the server shuts down.
                let _ = events.send(HostEvent::MemoryLow);
            }
        }
    });
}

/// Tells of sandboxes that have used up their connections.
fn watch_connections(
    host: &Arc<Host>,
    mut used_up: mpsc::UnboundedReceiver<Ipv4Addr>,
    events: mpsc::UnboundedSender<HostEvent>,
) {
    let host = Arc::downgrade(host);
    tokio::spawn(async move {
        while let Some(guest) = used_up.recv().await {
            let Some(host) = host.upgrade() else { return };
            let Some(most) = host.network.as_ref().map(Network::connections_max) else { return };
            let Some(id) = blocking(move || host.holder(guest)).await else { continue };
            let limit = format!("network.connections_max is {most}");
            let request = "a connection to the outside".to_owned();
            let _ = events.send(HostEvent::Refused { id, request, limit });
        }
    });
}

/// Takes the numbers of sandboxes that exist, and sweeps the groups of those that do not.
fn claim(records: &[Record], numbers: &Numbers, cgroups: &Cgroups) {
    let taken: Vec<u32> = records.iter().filter_map(|record| record.slot).collect();
    taken.iter().for_each(|number| numbers.claim(*number));
    let known: HashSet<String> = taken.into_iter().map(group_name).collect();
    for name in cgroups.names().into_iter().filter(|name| !known.contains(name)) {
        let group = cgroups.group(&name);
        group.kill_all();
        let _ = group.remove();
    }
}

fn group_name(number: u32) -> String {
    format!("slot-{number}")
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

fn own_processors() -> Result<Vec<usize>, std::io::Error> {
    let set = rustix::thread::sched_getaffinity(None)?;
    Ok((0..rustix::thread::CpuSet::MAX_CPU).filter(|number| set.is_set(*number)).collect())
}

/// The host as the engine knows it; clones share it.
#[derive(Clone)]
pub struct HostPort(pub Arc<Host>);

#[async_trait]
impl ports::Host for HostPort {
    async fn copy_disk(&self, id: SessionId, images: &[DiskImageId]) -> Result<u64, DriverError> {
        let (host, images) = (self.0.clone(), images.to_vec());
        let stopped = blocking(move || {
            let directory = host.directory(id);
            if !disk::path(&directory).exists() {
                return Err(DriverError::Gone);
            }
            host.disk_images.copy(&directory, &images).map_err(|error| match error {
                CopyError::NoRoom(_) => DriverError::Exhausted(Limit::DiskFreeMin),
                error => capacity::refusal("copy the disk", &error),
            })
        });
        Ok(stopped.await?.as_micros() as u64)
    }

    fn image_path(&self, id: DiskImageId) -> PathBuf {
        self.0.disk_images.path(id)
    }

    async fn prepare_image(&self, id: DiskImageId) -> Result<PathBuf, DriverError> {
        let host = self.0.clone();
        let prepared = blocking(move || host.disk_images.prepare(id)).await;
        prepared.map_err(|error| capacity::refusal("prepare the image", &error))
    }

    async fn remove_image(&self, id: DiskImageId) -> Result<(), DriverError> {
        let host = self.0.clone();
        blocking(move || host.disk_images.remove(id)).await.map_err(|error| failed("remove the image", &error))
    }

    async fn images(&self) -> Result<Vec<DiskImageId>, DriverError> {
        self.0.disk_images.list().map_err(|error| failed("list the images", &error))
    }

    async fn create_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        let host = self.0.clone();
        blocking(move || host.volumes.create(id, size_bytes)).await
    }

    async fn grow_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        let host = self.0.clone();
        blocking(move || host.volumes.grow(id, size_bytes)).await
    }

    async fn volume_size(&self, id: VolumeId) -> Result<u64, DriverError> {
        let host = self.0.clone();
        blocking(move || host.volumes.size(id)).await
    }

    async fn remove_volume(&self, id: VolumeId) -> Result<(), DriverError> {
        let host = self.0.clone();
        blocking(move || host.volumes.remove(id)).await
    }

    async fn volumes(&self) -> Result<Vec<VolumeId>, DriverError> {
        let host = self.0.clone();
        blocking(move || host.volumes.list()).await
    }

    async fn settle_volume(&self, id: VolumeId) -> Result<(), DriverError> {
        self.0.volumes.settle(id).await
    }

    async fn set_egress(&self, id: SessionId, egress: Option<&Egress>) -> Result<(), DriverError> {
        let (host, egress) = (self.0.clone(), egress.cloned());
        blocking(move || host.restrict(id, egress)).await
    }

    async fn connections(&self, id: SessionId) -> Result<Vec<Connection>, DriverError> {
        let host = self.0.clone();
        blocking(move || {
            let (_, number) = host.recorded(id)?;
            let Some(network) = &host.network else { return Ok(Vec::new()) };
            network.connections(number).map_err(|error| failed("look at the sandbox's connections", &error))
        })
        .await
    }

    fn default_root(&self) -> ImageDigest {
        self.0.root_images.default_image().digest
    }

    async fn root(&self, digest: &ImageDigest) -> Result<RootImage, DriverError> {
        let (host, digest) = (self.0.clone(), digest.clone());
        blocking(move || host.root_images.find(&digest)).await.ok_or(DriverError::Gone)
    }

    async fn root_of(&self, id: SessionId) -> Result<Option<ImageDigest>, DriverError> {
        let host = self.0.clone();
        blocking(move || Ok(Record::read(&host.directory(id)).ok_or(DriverError::Gone)?.root)).await
    }

    async fn retain_roots(&self, used: &[ImageDigest]) -> Result<(), DriverError> {
        let (host, used) = (self.0.clone(), used.to_vec());
        blocking(move || {
            // Sandboxes that have lost their record need theirs all the same.
            let of_disks = host.sandboxes().into_iter().filter_map(|(_, path)| Record::read(&path)?.root);
            host.root_images.retain(&used.into_iter().chain(of_disks).collect());
        })
        .await;
        Ok(())
    }

    fn events(&self) -> mpsc::UnboundedReceiver<HostEvent> {
        let (events, receiver) = mpsc::unbounded_channel();
        watch_memory(&self.0, events.clone());
        let used_up = self.0.used_up.lock().expect("taken without panics").take();
        if let Some(used_up) = used_up {
            watch_connections(&self.0, used_up, events);
        }
        locks::watch(&self.0, self.0.groups_path());
        receiver
    }
}

impl Host {
    /// The prefix of the paths of sandboxes' control groups, without their numbers.
    pub(crate) fn groups_path(&self) -> String {
        format!("/nagaya/{}/slot-", self.instance)
    }

    /// The processors of a sandbox: all, or as many as it has cores, spread by number.
    pub(crate) fn processors_for(&self, number: u32, cpus: u32) -> Vec<usize> {
        let all = &self.processors;
        let (count, start) = ((cpus as usize).min(all.len()), number as usize);
        let mut chosen: Vec<usize> = (0..count).map(|step| all[(start + step) % all.len()]).collect();
        chosen.sort_unstable();
        chosen
    }

    /// Whether the file system of a sandbox's disk takes no more writes, and whether it is held for want of space on the
    /// host. Blocks.
    pub(crate) fn disk_faults(&self, id: SessionId) -> (bool, bool) {
        disk::faults(&disk::path(&self.directory(id)))
    }
}
