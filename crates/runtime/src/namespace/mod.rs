//! The namespace driver: sandboxes made of Linux namespaces, cgroups and an overlay on a disk image.
//!
//! ```text
//!  ids, network, disk, cgroup ──▶ spawner: clone3, mounts, agent ──▶ slot in the pool
//!                                                                        │ take: limits, record, name
//!  release ◀── kill the first process ◀── destroy ◀── sandbox ◀── link ◀──┘
//!                                                     │    ▲
//!                                                stop ▼    │ start: a slot around the kept disk
//!                                                only the disk ◀──▶ images
//! ```
//!
//! What survives this process is on purpose: the sandboxes' processes and their directories below
//! `sandboxes/`, images of disks, and volumes. Everything else (slots of the pool, mounts, loop devices) is held by descriptors
//! and goes with it, but for files and cgroups of slots, which the next start sweeps.

mod core;
mod events;
mod pause;
mod running;
mod slots;
mod start;
mod stop;
mod usage;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nagaya_api::ids::SessionId;
use nagaya_engine::model::{Capabilities, Isolation, Resources, SandboxSpec};
use nagaya_engine::ports::{Adopted, Driver, DriverError, Ended, Guest, Mount, ResourceUsage};
use serde::Deserialize;
use tokio::sync::{Notify, mpsc};

use crate::host::record::Record;
use crate::host::{Host, blocking};
use core::DriverCore;
use slots::{Factory, SlotPool, SlotSpec};

/// The sections about this driver.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Config {
    pub pools: Pools,
    /// Whether this driver does from outside what it can do faster there than a sandbox's agent: make sockets in the
    /// sandbox's network, and read what its control groups tell. For tests of the agent; never from a file.
    #[serde(skip)]
    pub shortcuts: bool,
}

/// Pre-created resources, so that creating a sandbox does not wait for them.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Pools {
    /// Slots (namespaces, disk of the default size, control group, address) kept ready for sandboxes with outbound access.
    pub slots_ready: usize,
    /// Slots kept ready for sandboxes without outbound access.
    pub isolated_slots_ready: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { pools: Pools::default(), shortcuts: true }
    }
}

impl Default for Pools {
    fn default() -> Self {
        Self { slots_ready: 16, isolated_slots_ready: 2 }
    }
}

/// Prepared slots of either kind that wait for a disk, where as many slots do.
const PREPARED_READY: usize = 4;

pub struct NamespaceDriver {
    inner: Arc<DriverCore>,
    ends: Mutex<Option<mpsc::UnboundedReceiver<Ended>>>,
}

impl NamespaceDriver {
    /// Starts filling the pools. `name` is what the driver is called in records.
    pub fn start(host: Arc<Host>, name: &str, config: &Config) -> Self {
        let factory = Arc::new(Factory { host: host.clone() });
        let root = Arc::new(host.default_root_image());
        let disk_bytes = Resources::default().disk_bytes;
        let spec = |outbound| SlotSpec { disk_bytes, outbound, root: root.clone() };
        let mut kinds = vec![(spec(false), config.pools.isolated_slots_ready)];
        if host.config.network.outbound {
            kinds.push((spec(true), config.pools.slots_ready));
        }
        let prepare = |(spec, target): &(SlotSpec, usize)| {
            SlotPool::start(factory.clone(), spec.clone(), PREPARED_READY.min(*target))
        };
        let prepared = kinds.iter().map(prepare).collect();
        let pools = kinds.into_iter().map(|(spec, target)| SlotPool::start(factory.clone(), spec, target)).collect();
        let (ends, receiver) = mpsc::unbounded_channel();
        let inner = DriverCore {
            name: name.to_owned(),
            host,
            shortcuts: config.shortcuts,
            factory,
            pools,
            prepared,
            running: Mutex::default(),
            unsynced: Mutex::default(),
            releasing: Mutex::default(),
            released: Notify::new(),
            ends,
        };
        Self { inner: Arc::new(inner), ends: Mutex::new(Some(receiver)) }
    }

    /// Slots that are ready now, by pool.
    pub fn pool_levels(&self) -> [(&'static str, i64); 2] {
        let level = |outbound| {
            let pools = self.inner.pools.iter().filter(|pool| pool.spec().outbound == outbound);
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

    /// Gives back what is only prepared. Sandboxes live on. Blocks.
    pub fn shut_down(&self) {
        let unsynced: Vec<SessionId> = self.inner.unsynced().keys().copied().collect();
        for id in unsynced {
            self.inner.sync_new(id);
        }
        for pool in &self.inner.pools {
            pool.close();
        }
        for pool in &self.inner.prepared {
            pool.close();
        }
    }
}

#[async_trait]
impl Driver for NamespaceDriver {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: Isolation::SharedKernel,
            memory_checkpoint: false,
            live_resize: false,
            nested_containers: false,
        }
    }

    async fn start(&self, id: SessionId, spec: &SandboxSpec) -> Result<Arc<dyn Guest>, DriverError> {
        self.inner.start(id, spec).await
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

    async fn destroy(&self, id: SessionId) -> Result<(), DriverError> {
        self.inner.destroy(id).await
    }

    async fn list(&self) -> Result<Vec<SessionId>, DriverError> {
        let inner = self.inner.clone();
        blocking(move || {
            let found = inner.host.sandboxes();
            let releasing = inner.releasing();
            // A directory without a record or a disk is what a creation left.
            let is_ours = |record: Record| record.driver == inner.name;
            let ours = found.into_iter().filter(|(_, path)| is_ours(Record::read(path).unwrap_or_default()));
            Ok(ours.map(|(id, _)| id).filter(|id| !releasing.contains(id)).collect())
        })
        .await
    }

    async fn attach_volume(&self, id: SessionId, mount: &Mount) -> Result<(), DriverError> {
        let (inner, mount) = (self.inner.clone(), mount.clone());
        blocking(move || inner.host.volumes.attach(&inner.host.spawner, &inner.sandbox(id)?, &mount)).await
    }

    async fn detach_volume(&self, id: SessionId, mount: &Mount, force: bool) -> Result<(), DriverError> {
        let (inner, volume_id) = (self.inner.clone(), mount.volume_id);
        let detach = move || inner.host.volumes.detach(&inner.host.spawner, &inner.sandbox(id)?, volume_id, force);
        match blocking(detach).await {
            // With the sandbox, or with the volume, the mount is gone too.
            Err(DriverError::Gone) => self.inner.host.volumes.settle(mount.volume_id).await,
            other => other,
        }
    }

    async fn usage(&self, id: SessionId) -> Result<ResourceUsage, DriverError> {
        self.inner.usage(id).await
    }

    fn ends(&self) -> mpsc::UnboundedReceiver<Ended> {
        let receiver = self.ends.lock().expect("taken without panics").take();
        receiver.expect("the engine asks for ends once")
    }
}

impl Drop for NamespaceDriver {
    fn drop(&mut self) {
        self.shut_down();
        // Whoever waits for news of a sandbox holds it; with its connection that ends.
        for running in self.inner.running_sandboxes().values() {
            running.disconnect();
        }
    }
}
