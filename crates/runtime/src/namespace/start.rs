//! How a sandbox comes to run: on a fresh disk, on an image's, or on the one it had before.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nagaya_api::ids::{DiskImageId, SessionId};
use nagaya_engine::model::{Limit, Machine};
use nagaya_engine::ports::{DriverError, Guest};

use super::live::{self, Live, PidFd};
use super::record::{self, Record};
use super::slots::{PreparedSlot, Slot, SlotDisk, SlotError, SlotSpec, Started};
use super::{Inner, blocking, capacity, disk, failed};

/// Before a new sandbox is synced: the host's disk serves first whoever waits for the sandbox. What the database syncs
/// meanwhile would wait for all of its disk.
const KEEP_AFTER: Duration = Duration::from_millis(20);

impl Inner {
    /// Makes a sandbox. What is left of one that fails is its directory, at most.
    pub(super) async fn create(
        self: &Arc<Self>,
        id: SessionId,
        machine: &Machine,
        image: Option<DiskImageId>,
    ) -> Result<Arc<dyn Guest>, DriverError> {
        let begin = Instant::now();
        let (inner, wanted) = (self.clone(), machine.clone());
        let (slot, started) = blocking(move || match image {
            None => inner.start_fresh(id, &wanted),
            Some(image) => inner.start_from(id, &wanted, image),
        })
        .await?;
        self.keep(id, image.is_some());
        match self.connect(id, slot, started).await {
            Ok(guest) => {
                tracing::debug!(%id, ready = ?begin.elapsed(), "sandbox started");
                Ok(guest)
            }
            Err(error) => {
                self.destroy(id).await?;
                Err(error)
            }
        }
    }

    /// Starts a stopped sandbox again. When it fails the disk is as it was.
    pub(super) async fn boot(
        self: &Arc<Self>,
        id: SessionId,
        machine: &Machine,
    ) -> Result<Arc<dyn Guest>, DriverError> {
        let (inner, wanted) = (self.clone(), machine.clone());
        let (slot, started) = blocking(move || {
            let directory = inner.directory(id);
            let record = Record::read(&directory).ok_or(DriverError::Gone)?;
            if record.slot.is_some() {
                return Err(DriverError::Failed("the sandbox has not been stopped".into()));
            }
            // A base layer is lost only with the directory of images; a newer one serves as well.
            let base = if record.base.exists() { &record.base } else { &inner.factory.image.base };
            inner.start_kept(id, &wanted, &directory, base)
        })
        .await?;
        self.keep(id, false);
        match self.connect(id, slot, started).await {
            Ok(guest) => Ok(guest),
            Err(error) => {
                self.stop(id).await?;
                Err(error)
            }
        }
    }

    fn start_fresh(&self, id: SessionId, machine: &Machine) -> Result<(u32, Started), DriverError> {
        self.check_request(machine)?;
        let slot = self.slot(machine, SlotDisk::Pool)?;
        self.take(id, machine, slot, &self.factory.image.base)
    }

    fn start_from(&self, id: SessionId, machine: &Machine, image: DiskImageId) -> Result<(u32, Started), DriverError> {
        let directory = self.directory(id);
        fs::create_dir(&directory).map_err(|error| failed("make the sandbox's directory", &error))?;
        let started = self
            .images
            .take(image, &directory)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => DriverError::Gone,
                _ => capacity::refusal("take the image over", &error),
            })
            .and_then(|device| {
                self.check_request(machine)?;
                let slot = self.slot(machine, SlotDisk::New { directory: &directory, device: &device })?;
                self.take(id, machine, slot, &self.factory.image.base)
            });
        if started.is_err() {
            let _ = fs::remove_dir_all(&directory);
        }
        started
    }

    fn start_kept(
        &self,
        id: SessionId,
        machine: &Machine,
        directory: &Path,
        base: &Path,
    ) -> Result<(u32, Started), DriverError> {
        self.check_request(machine)?;
        if !disk::path(directory).exists() {
            return Err(DriverError::Gone);
        }
        let slot = self.slot(machine, SlotDisk::Kept { directory, base })?;
        self.take(id, machine, slot, base)
    }

    fn check_request(&self, machine: &Machine) -> Result<(), DriverError> {
        if machine.outbound && !self.config.network_outbound {
            return Err(DriverError::Failed(
                "this server gives no sandbox outbound access; ask for allow_outbound=false".into(),
            ));
        }
        capacity::lacking(&self.config, self.storage.root()).map_or(Ok(()), |limit| Err(DriverError::Exhausted(limit)))
    }

    fn slot(&self, machine: &Machine, home: SlotDisk<'_>) -> Result<Slot, DriverError> {
        let shape = SlotSpec { disk_gb: machine.disk_gb, outbound: machine.outbound };
        let pool = self.pools.iter().find(|pool| matches!(home, SlotDisk::Pool) && pool.shape() == shape);
        if let Some(slot) = pool.and_then(|pool| pool.take()) {
            return Ok(slot);
        }
        let made = match self.ground(shape) {
            Some(ground) => self.factory.build(ground, shape.disk_gb, home),
            None => self.factory.make(shape, home),
        };
        let made = match made {
            // What is held ready of other shapes gives way to what is wanted now.
            Err(SlotError::Exhausted(max)) => self.make_in_place_of_another(shape, home, max),
            made => made,
        };
        made.map_err(|error| match error {
            SlotError::Exhausted(_) => DriverError::Exhausted(Limit::Slots),
            error => capacity::refusal("make a sandbox", &error),
        })
    }

    fn ground(&self, shape: SlotSpec) -> Option<PreparedSlot> {
        self.grounds.iter().find(|pool| pool.shape().outbound == shape.outbound)?.take()
    }

    fn make_in_place_of_another(&self, shape: SlotSpec, home: SlotDisk<'_>, max: u32) -> Result<Slot, SlotError> {
        if let Some(slot) = self.pools.iter().find_map(|pool| pool.take()) {
            return self.factory.reshape(slot, shape, home);
        }
        if let Some(ground) = self.ground(shape) {
            return self.factory.build(ground, shape.disk_gb, home);
        }
        let ground = self.grounds.iter().find_map(|pool| pool.take()).ok_or(SlotError::Exhausted(max))?;
        self.factory.rebuild(ground, shape, home)
    }

    fn take(&self, id: SessionId, machine: &Machine, slot: Slot, base: &Path) -> Result<(u32, Started), DriverError> {
        match live::take(self, id, machine, &slot, base) {
            Ok(()) => Ok((slot.number, slot.started)),
            Err(error) => {
                self.factory.discard(slot);
                Err(error)
            }
        }
    }

    /// Makes a sandbox's name and record durable, and a disk that was an image, in the background: syncing takes
    /// longer than all the rest. What is synced inside the sandbox is not on the host's disk before its name is; see
    /// decision 0005.
    fn keep(self: &Arc<Self>, id: SessionId, disk_too: bool) {
        self.unsynced().insert(id, disk_too);
        let inner = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(KEEP_AFTER).await;
            blocking(move || inner.sync_new(id)).await;
        });
    }

    /// Syncs a new sandbox now, if that is still to be done. Blocks.
    pub(super) fn sync_new(&self, id: SessionId) {
        let Some(disk_too) = self.unsynced().remove(&id) else { return };
        let directory = self.directory(id);
        let sync_disk = || File::open(disk::path(&directory))?.sync_all();
        let synced = if disk_too { sync_disk() } else { Ok(()) }.and_then(|()| record::sync(&directory));
        // One that is being removed already need not be durable.
        if let Err(error) = synced
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, %id, "could not sync a sandbox's record");
        }
    }

    /// Meets the agent of a sandbox that was started just now.
    async fn connect(
        self: &Arc<Self>,
        id: SessionId,
        slot: u32,
        started: Started,
    ) -> Result<Arc<dyn Guest>, DriverError> {
        // The lifeline is held until the agent is connected.
        let Started { pidfd, error: told, lifeline: _lifeline, .. } = started;
        let pidfd = PidFd::new(pidfd).map_err(|error| failed("watch the sandbox", &error))?;
        let live = Arc::new(Live::new(id, slot, pidfd));
        self.live().insert(id, live.clone());
        match live::connect(self, &self.directory(id), &live).await {
            Ok(link) => {
                self.watch(&live);
                self.watch_power(&live, &link);
                Ok(link)
            }
            Err(error) => {
                let told = live::read_error(&told);
                Err(if told.is_empty() { error } else { DriverError::Failed(told) })
            }
        }
    }
}
