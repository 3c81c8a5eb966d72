//! How a sandbox comes to run: on a fresh disk, on an image's, or on the one it had before.

use std::fs::{self, File};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nagaya_api::ids::{DiskImageId, SessionId};
use nagaya_engine::model::{DiskOrigin, Limit, SandboxSpec};
use nagaya_engine::ports::{DriverError, Guest};
use nagaya_guest::spawn::{ENV_BYTES_MAX, LAYERS_MAX};
use rustix::process::Pid;

use super::core::DriverCore;
use super::running::{self, PidFd, RunningSandbox};
use super::slots::{PreparedSlot, Slot, SlotDisk, SlotError, SlotSpec, Started};
use crate::cgroup::Limits;
use crate::host::numbers::UsedUp;
use crate::host::record::{self, Record};
use crate::host::{blocking, capacity, disk, failed};

/// Before a new sandbox is synced: the host's disk serves first whoever waits for the sandbox. What the database syncs
/// meanwhile would wait for all of its disk.
const KEEP_AFTER: Duration = Duration::from_millis(20);

impl DriverCore {
    /// Starts a sandbox, new or stopped. What is left of a new one that fails is its directory, at most; of a stopped one the
    /// disk is as it was.
    pub(super) async fn start(
        self: &Arc<Self>,
        id: SessionId,
        spec: &SandboxSpec,
    ) -> Result<Arc<dyn Guest>, DriverError> {
        if spec.memory.is_some() {
            return Err(DriverError::Unsupported("go on with processes and memory"));
        }
        let begin = Instant::now();
        let (inner, wanted) = (self.clone(), spec.clone());
        let (slot, started) = blocking(move || match wanted.disk {
            DiskOrigin::Fresh => inner.start_fresh(id, &wanted),
            DiskOrigin::Image(image) => inner.start_from(id, &wanted, image),
            DiskOrigin::Kept => inner.start_kept(id, &wanted),
        })
        .await?;
        self.keep(id, matches!(spec.disk, DiskOrigin::Image(_)));
        match self.connect(id, slot, started).await {
            Ok(guest) => {
                tracing::debug!(%id, ready = ?begin.elapsed(), "sandbox started");
                Ok(guest)
            }
            Err(error) => {
                match spec.disk {
                    DiskOrigin::Kept => self.stop(id).await?,
                    DiskOrigin::Fresh | DiskOrigin::Image(_) => self.destroy(id).await?,
                }
                Err(error)
            }
        }
    }

    fn start_fresh(&self, id: SessionId, spec: &SandboxSpec) -> Result<(u32, Started), DriverError> {
        self.check_request(spec)?;
        let slot = self.slot(spec, SlotDisk::Pool)?;
        self.take(id, spec, slot)
    }

    fn start_from(&self, id: SessionId, spec: &SandboxSpec, image: DiskImageId) -> Result<(u32, Started), DriverError> {
        let directory = self.host.directory(id);
        fs::create_dir(&directory).map_err(|error| failed("make the sandbox's directory", &error))?;
        let started = self
            .host
            .disk_images
            .take(image, &directory)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => DriverError::Gone,
                _ => capacity::refusal("take the image over", &error),
            })
            .and_then(|device| {
                self.check_request(spec)?;
                let slot = self.slot(spec, SlotDisk::New { directory: &directory, device: &device })?;
                self.take(id, spec, slot)
            });
        if started.is_err() {
            let _ = fs::remove_dir_all(&directory);
        }
        started
    }

    fn start_kept(&self, id: SessionId, spec: &SandboxSpec) -> Result<(u32, Started), DriverError> {
        let directory = self.host.directory(id);
        let record = Record::read(&directory).ok_or(DriverError::Gone)?;
        if record.slot.is_some() {
            return Err(DriverError::Failed("the sandbox has not been stopped".into()));
        }
        if let Some(disk) = record.root.filter(|disk| *disk != spec.root.digest) {
            return Err(DriverError::OtherRoot { disk, asked: spec.root.digest.clone() });
        }
        self.check_request(spec)?;
        if !disk::path(&directory).exists() {
            return Err(DriverError::Gone);
        }
        let slot = self.slot(spec, SlotDisk::Kept { directory: &directory })?;
        self.take(id, spec, slot)
    }

    fn check_request(&self, spec: &SandboxSpec) -> Result<(), DriverError> {
        let refuse = |why: &str| Err(DriverError::Refused(why.into()));
        if spec.outbound && !self.host.config.network.outbound {
            return refuse("this server gives no sandbox outbound access; ask for allow_outbound=false");
        }
        if !disk::DISK_BYTES.contains(&spec.resources.disk_bytes) {
            return refuse("disks have 64 MiB to 100 GiB");
        }
        if self.host.layers_of(&spec.root).len() > LAYERS_MAX {
            return refuse("the image has too many layers");
        }
        let env_bytes: usize = spec.root.env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        if env_bytes > ENV_BYTES_MAX {
            return refuse("the image's environment has more than 64 KiB");
        }
        self.host.lacking().map_or(Ok(()), |limit| Err(DriverError::Exhausted(limit)))
    }

    fn slot(&self, spec: &SandboxSpec, disk: SlotDisk<'_>) -> Result<Slot, DriverError> {
        let wanted = SlotSpec {
            disk_bytes: spec.resources.disk_bytes,
            outbound: spec.outbound,
            root: Arc::new(spec.root.clone()),
        };
        let pool = self.pools.iter().find(|pool| matches!(disk, SlotDisk::Pool) && *pool.spec() == wanted);
        if let Some(slot) = pool.and_then(|pool| pool.take()) {
            return Ok(slot);
        }
        let made = match self.prepared(wanted.outbound) {
            Some(prepared) => self.factory.build(prepared, &wanted, disk),
            None => self.factory.make(&wanted, disk),
        };
        let made = match made {
            // What is held ready of other kinds gives way to what is wanted now.
            Err(SlotError::Exhausted(used_up)) => self.make_in_place_of_another(&wanted, disk, used_up),
            made => made,
        };
        made.map_err(|error| match error {
            SlotError::Exhausted(_) => DriverError::Exhausted(Limit::Slots),
            error => capacity::refusal("make a sandbox", &error),
        })
    }

    fn prepared(&self, outbound: bool) -> Option<PreparedSlot> {
        self.prepared.iter().find(|pool| pool.spec().outbound == outbound)?.take()
    }

    fn make_in_place_of_another(
        &self,
        wanted: &SlotSpec,
        disk: SlotDisk<'_>,
        used_up: UsedUp,
    ) -> Result<Slot, SlotError> {
        if let Some(slot) = self.pools.iter().find_map(|pool| pool.take()) {
            return self.factory.reshape(slot, wanted, disk);
        }
        if let Some(prepared) = self.prepared(wanted.outbound) {
            return self.factory.build(prepared, wanted, disk);
        }
        let prepared = self.prepared.iter().find_map(|pool| pool.take()).ok_or(SlotError::Exhausted(used_up))?;
        self.factory.rebuild(prepared, wanted, disk)
    }

    fn take(&self, id: SessionId, spec: &SandboxSpec, slot: Slot) -> Result<(u32, Started), DriverError> {
        match take(self, id, spec, &slot) {
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
        let directory = self.host.directory(id);
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
        let running = Arc::new(RunningSandbox::new(id, slot, pidfd));
        self.running_sandboxes().insert(id, running.clone());
        match running::connect(&self.host, &running, self.shortcuts).await {
            Ok(link) => {
                self.watch(&running);
                self.watch_power(&running, &link);
                Ok(link)
            }
            Err(error) => {
                let told = running::read_error(&told);
                Err(if told.is_empty() { error } else { DriverError::Failed(told) })
            }
        }
    }
}

/// Makes a slot the sandbox of a session: its limits, its record, its directory. The last step gives
/// it its name, so that a crash before it leaves a slot and a crash after it a sandbox. The slot is
/// unharmed by an error.
fn take(inner: &DriverCore, id: SessionId, spec: &SandboxSpec, slot: &Slot) -> Result<(), DriverError> {
    let host = &*inner.host;
    let limits = Limits {
        cpu_millis: spec.resources.cpu_millis,
        memory_bytes: spec.resources.memory_bytes,
        processes_max: host.config.limits.processes_max,
    };
    slot.group.set_limits(limits).map_err(|error| failed("set the sandbox's limits", &error))?;
    slot.set_sizes(limits.memory_bytes).map_err(|error| failed("set the sandbox's sizes", &error))?;
    let processors = host.processors_for(slot.number, spec.resources.cpus());
    set_processors(slot.started.pid, &processors).map_err(|error| failed("set the sandbox's processors", &error))?;
    let record = Record {
        egress: spec.egress.clone(),
        ..Record::new(&inner.name, &spec.root, slot.number, host.boot_id.clone())
    };
    record.write(&slot.directory).map_err(|error| failed("write the sandbox's record", &error))?;
    if let Some(network) = host.network.as_ref().filter(|_| spec.outbound) {
        let begun = network.begin(slot.number, spec.egress.as_ref());
        begun.map_err(|error| failed("set the sandbox's destinations", &error))?;
    }
    let directory = host.directory(id);
    if slot.directory != directory {
        fs::rename(&slot.directory, &directory).map_err(|error| failed("name the sandbox", &error))?;
    }
    Ok(())
}

/// Also what `nproc` tells inside. A thread hands its processors on to the threads and processes it
/// starts, so every thread that the agent has already must get them.
fn set_processors(pid: i32, processors: &[usize]) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    for processor in processors {
        set.set(*processor);
    }
    rustix::thread::sched_setaffinity(Pid::from_raw(pid), &set)?;
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = entry?.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        match thread.map(|thread| rustix::thread::sched_setaffinity(Some(thread), &set)) {
            // A thread that has ended meanwhile needs none.
            None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => {}
            Some(Err(errno)) => return Err(errno.into()),
        }
    }
    Ok(())
}
