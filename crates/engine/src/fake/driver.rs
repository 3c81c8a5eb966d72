use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nagaya_api::ids::{DiskImageId, SessionId, VolumeId};
use tokio::sync::{mpsc, watch};

use super::blobs::Images;
use super::disks::Volume;
use super::files::Files;
use super::{FakeGuest, Faults};
use crate::model::{
    Capabilities, Connection, DiskOrigin, Egress, ImageDigest, ImageUser, Isolation, Limit, RootImage, SandboxSpec,
};
use crate::ports::{Adopted, Driver, DriverError, Ended, Guest, Host, HostEvent, Mount, ResourceUsage};

/// What the fake driver is called in [`Fakes`](super::Fakes).
pub const FAKE_DRIVER: &str = "fake";

/// A driver, and the host of all drivers, whose sandboxes are records. They outlive the engine, whole or half made. Clones
/// share them.
#[derive(Clone)]
pub struct FakeDriver {
    name: &'static str,
    pub(super) faults: Arc<Faults>,
    pub(super) images: Arc<Images>,
    world: Arc<Mutex<World>>,
    /// While true, creations stand still before their last step.
    held: watch::Sender<bool>,
}

#[derive(Default)]
pub(super) struct World {
    sandboxes: BTreeMap<SessionId, Sandbox>,
    pub(super) volumes: BTreeMap<VolumeId, Volume>,
    ends: BTreeMap<&'static str, mpsc::UnboundedSender<Ended>>,
    events: Option<mpsc::UnboundedSender<HostEvent>>,
    /// The image of sandboxes that ask for none, and those that the host has lost.
    default_root: Option<ImageDigest>,
    user: Option<ImageUser>,
    lost_roots: Vec<ImageDigest>,
    /// Answers of the next creations and boots, first first.
    refusals: Vec<DriverError>,
    sandboxes_max: Option<usize>,
    unreachable: bool,
    blind: bool,
    /// Space on the host is used up: disks cannot be copied, made or grown.
    pub(super) full: bool,
    /// Calls under way, to find out about two at once for the same sandbox.
    busy: BTreeMap<SessionId, &'static str>,
    pub(super) violations: Vec<String>,
}

/// Its parts are made in this order, and removed in the opposite one.
#[derive(Default)]
pub(super) struct Sandbox {
    driver: &'static str,
    /// The image under its disk.
    root: ImageDigest,
    network: bool,
    pub(super) disk: Option<Arc<Mutex<Files>>>,
    processes: Option<Processes>,
    powered_off: bool,
    host_restarted: bool,
    egress: Option<Egress>,
    load: ResourceUsage,
    connections: Vec<Connection>,
    /// Whether this engine created or adopted it, and so hears of its end.
    attached: bool,
    /// Dead, and being taken apart by a task of this process.
    releasing: bool,
    /// The last one, for tests that look at what became of it.
    last_guest: Option<Arc<FakeGuest>>,
}

struct Processes {
    guest: Arc<FakeGuest>,
    frozen: bool,
}

impl Sandbox {
    pub(super) fn guest(&self) -> Option<&Arc<FakeGuest>> {
        self.processes.as_ref().map(|processes| &processes.guest)
    }

    fn start(&mut self, faults: Arc<Faults>, user: &ImageUser) -> Option<Arc<FakeGuest>> {
        let guest = Arc::new(FakeGuest::new(faults, user.clone(), self.disk.clone()?));
        self.processes = Some(Processes { guest: guest.clone(), frozen: false });
        self.last_guest = Some(guest.clone());
        (self.powered_off, self.host_restarted, self.attached) = (false, false, true);
        Some(guest)
    }

    fn die(&mut self, cause: &str) -> bool {
        match self.processes.take() {
            None => false,
            Some(processes) => {
                processes.guest.set_frozen(false);
                processes.guest.die(cause);
                true
            }
        }
    }
}

fn user(name: &str) -> ImageUser {
    ImageUser { name: name.to_owned(), uid: 1_000, gid: 1_000, home: format!("/home/{name}") }
}

impl World {
    pub(super) fn sandbox(&mut self, id: SessionId) -> Result<&mut Sandbox, DriverError> {
        self.sandboxes.get_mut(&id).filter(|sandbox| !sandbox.releasing).ok_or(DriverError::Gone)
    }

    fn restrict(&mut self, id: SessionId, egress: Option<Egress>) -> Result<(), DriverError> {
        self.processes(id)?;
        self.sandbox(id)?.egress = egress;
        Ok(())
    }

    fn processes(&mut self, id: SessionId) -> Result<&mut Processes, DriverError> {
        self.sandbox(id)?.processes.as_mut().ok_or(DriverError::Gone)
    }

    /// The mounts of a dead sandbox go some time later.
    pub(super) fn let_mounts_linger(&mut self, id: SessionId) {
        for volume in self.volumes.values_mut() {
            volume.mounts.iter_mut().filter(|mount| mount.session_id == id).for_each(|mount| mount.lingers = true);
        }
    }
}

struct Busy<'a>(&'a FakeDriver, SessionId);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.with(|world| world.busy.remove(&self.1));
    }
}

/// What tests do to the world, and see of it.
impl FakeDriver {
    pub(super) fn new(faults: Arc<Faults>, images: Arc<Images>) -> Self {
        Self { name: FAKE_DRIVER, faults, images, world: Arc::default(), held: watch::Sender::new(false) }
    }

    /// Another driver on the same host.
    pub fn named(&self, name: &'static str) -> Self {
        Self { name, ..self.clone() }
    }

    /// What sandboxes stand on from now on that ask for no image.
    pub fn set_default_root(&self, digest: &str) {
        self.with(|world| world.default_root = Some(ImageDigest::new(digest)));
    }

    /// Whom images name as their user from now on.
    pub fn set_user(&self, name: &str) {
        self.with(|world| world.user = Some(user(name)));
    }

    /// The host has this image no more.
    pub fn lose_root(&self, digest: &str) {
        self.with(|world| world.lost_roots.push(ImageDigest::new(digest)));
    }

    /// The image that a sandbox's disk was written over, and the driver it runs on.
    pub fn stands_on(&self, id: SessionId) -> Option<(ImageDigest, &'static str)> {
        self.with(|world| world.sandboxes.get(&id).map(|sandbox| (sandbox.root.clone(), sandbox.driver)))
    }

    pub(super) fn with<T>(&self, action: impl FnOnce(&mut World) -> T) -> T {
        action(&mut self.world.lock().expect("no holder of this lock panics"))
    }

    /// What a sandbox seems to use from now on.
    pub fn set_load(&self, id: SessionId, load: ResourceUsage) {
        self.with(|world| world.sandboxes.entry(id).or_default().load = load);
    }

    /// Connections that a sandbox seems to have made.
    pub fn set_connections(&self, id: SessionId, connections: Vec<Connection>) {
        self.with(|world| world.sandboxes.entry(id).or_default().connections = connections);
    }

    /// The next creation or boot fails with this.
    pub fn refuse_next(&self, error: DriverError) {
        self.with(|world| world.refusals.push(error));
    }

    /// Creations beyond this many sandboxes fail with `Exhausted(Limit::Slots)`.
    pub fn set_sandboxes_max(&self, sandboxes_max: Option<usize>) {
        self.with(|world| world.sandboxes_max = sandboxes_max);
    }

    /// While held, creations stand still before their last step.
    pub fn hold_creates(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// While unreachable, sandboxes cannot be adopted, though they run.
    pub fn set_unreachable(&self, unreachable: bool) {
        self.with(|world| world.unreachable = unreachable);
    }

    /// Makes [`Driver::list`] answer that there is nothing: for tests of tests.
    pub fn set_blind(&self, blind: bool) {
        self.with(|world| world.blind = blind);
    }

    /// While full, nothing that takes space on the host succeeds.
    pub fn set_full(&self, full: bool) {
        self.with(|world| world.full = full);
    }

    /// Ends a sandbox as if its first process had been killed; false when it has no processes.
    pub fn kill(&self, id: SessionId, cause: &str) -> bool {
        self.end(id, cause, false)
    }

    /// Ends a sandbox as if it had been powered off from inside.
    pub fn power_off(&self, id: SessionId) -> bool {
        self.end(id, "the sandbox powered itself off", true)
    }

    fn end(&self, id: SessionId, cause: &str, powered_off: bool) -> bool {
        self.with(|world| {
            let Some(sandbox) = world.sandboxes.get_mut(&id) else { return false };
            if !sandbox.die(cause) {
                return false;
            }
            sandbox.powered_off = powered_off;
            if let Some(ends) = world.ends.get(sandbox.driver).filter(|_| sandbox.attached) {
                // Nobody listening is what happens while the engine starts or stops.
                let _ = ends.send(Ended { id, powered_off, cause: cause.to_owned() });
            }
            world.let_mounts_linger(id);
            true
        })
    }

    /// Says that a sandbox ended, though it may have been started again since.
    pub fn report_end(&self, id: SessionId) {
        let cause = "an earlier end".to_owned();
        let ended = Ended { id, powered_off: false, cause };
        self.with(|world| world.ends.get(self.name).map(|ends| ends.send(ended)));
    }

    /// Every process on the host ends and every mount goes; only disks stay. For between two engines.
    pub fn restart_host(&self) {
        self.with(|world| {
            for sandbox in world.sandboxes.values_mut() {
                sandbox.host_restarted = sandbox.die("the host was restarted");
                sandbox.network = false;
            }
            world.volumes.values_mut().for_each(|volume| volume.mounts.clear());
        });
    }

    /// Tells the engine that memory runs low.
    pub fn report_memory_low(&self) {
        self.with(|world| world.events.as_ref().map(|events| events.send(HostEvent::MemoryLow)));
    }

    /// Every sandbox of which anything exists, and whether it has processes.
    pub fn sandboxes(&self) -> BTreeMap<SessionId, bool> {
        self.with(|world| world.sandboxes.iter().map(|(id, sandbox)| (*id, sandbox.processes.is_some())).collect())
    }

    pub fn is_frozen(&self, id: SessionId) -> bool {
        self.with(|world| world.processes(id).is_ok_and(|processes| processes.frozen))
    }

    /// The only destinations of a running sandbox.
    pub fn egress(&self, id: SessionId) -> Option<Egress> {
        self.with(|world| world.sandbox(id).ok().and_then(|sandbox| sandbox.egress.clone()))
    }

    pub fn lose_egress(&self, id: SessionId) {
        self.with(|world| world.sandbox(id).map(|sandbox| sandbox.egress = None)).expect("there is such a sandbox");
    }

    /// Whether nothing of a sandbox exists but its disk.
    pub fn is_only_a_disk(&self, id: SessionId) -> bool {
        self.with(|world| world.sandbox(id).is_ok_and(|of| of.disk.is_some() && !of.network && of.processes.is_none()))
    }

    /// The inside of a sandbox that runs, or of the last life of one that does not.
    pub fn guest(&self, id: SessionId) -> Option<Arc<FakeGuest>> {
        self.with(|world| world.sandboxes.get(&id).and_then(|sandbox| sandbox.last_guest.clone()))
    }

    /// What callers did that the contract of [`Driver`] forbids.
    pub fn violations(&self) -> Vec<String> {
        self.with(|world| world.violations.clone())
    }

    /// The process that used this driver is gone, or about to be replaced.
    pub fn disconnect(&self) {
        self.with(|world| {
            world.events = None;
            world.ends.clear();
            world.busy.clear();
            for sandbox in world.sandboxes.values_mut() {
                sandbox.attached = false;
                sandbox.releasing = false;
            }
        });
    }
}

impl FakeDriver {
    fn user(&self) -> ImageUser {
        self.with(|world| world.user.clone()).unwrap_or_else(|| user("user"))
    }

    fn busy(&self, id: SessionId, call: &'static str) -> Busy<'_> {
        self.with(|world| {
            // An end need not wait for a step that takes too long.
            if let Some(other) = world.busy.insert(id, call)
                && call != "destroy"
            {
                world.violations.push(format!("{call} of {id} during its {other}"));
            }
        });
        Busy(self, id)
    }

    pub(super) async fn step(&self) -> Result<(), DriverError> {
        match self.faults.effect().await {
            true => Err(DriverError::Failed("a driver step failed, as this test asked for".to_owned())),
            false => Ok(()),
        }
    }

    /// Does something that the contract lets callers repeat, twice where a test wants that.
    pub(super) async fn repeatable<T, F: Future<Output = Result<T, DriverError>>>(
        &self,
        call: impl Fn() -> F,
    ) -> Result<T, DriverError> {
        if self.faults.repeats() {
            call().await?;
        }
        call().await
    }

    fn refusal(&self) -> Result<(), DriverError> {
        let refusal = self.with(|world| {
            let running = world.sandboxes.values().filter(|sandbox| sandbox.network).count();
            let full = world.sandboxes_max.is_some_and(|max| running >= max);
            let refusal = full.then_some(DriverError::Exhausted(Limit::Slots));
            refusal.or_else(|| (!world.refusals.is_empty()).then(|| world.refusals.remove(0)))
        });
        refusal.map_or(Ok(()), Err)
    }

    async fn create_parts(self, id: SessionId, spec: SandboxSpec) -> Result<Arc<dyn Guest>, DriverError> {
        let _busy = self.busy(id, "create");
        self.step().await?;
        self.refusal()?;
        self.with(|world| {
            if let Some(other) = world.sandboxes.insert(id, Sandbox::default()).filter(|of| of.disk.is_some()) {
                world.violations.push(format!("create of {id}, which exists"));
                world.sandboxes.insert(id, other);
            }
            let sandbox = world.sandboxes.entry(id).or_default();
            (sandbox.network, sandbox.egress) = (true, spec.egress);
            (sandbox.driver, sandbox.root) = (self.name, spec.root.digest.clone());
        });
        // A failure from here on leaves what was made so far for `list` to find.
        self.step().await?;
        let files = match spec.disk {
            DiskOrigin::Image(image) => self.images.with(|images| images.remove(&image)).ok_or(DriverError::Gone)?,
            DiskOrigin::Fresh | DiskOrigin::Kept => Files::of_user(&spec.root.user.home),
        };
        self.with(|world| world.sandboxes.entry(id).or_default().disk = Some(Arc::new(Mutex::new(files))));
        self.step().await?;
        // The sender is ours, so waiting cannot fail.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        let guest = self.with(|world| world.sandboxes.get_mut(&id)?.start(self.faults.clone(), &spec.root.user));
        self.step().await?;
        guest.map(|guest| guest as Arc<dyn Guest>).ok_or(DriverError::Gone)
    }

    async fn boot(&self, id: SessionId, spec: &SandboxSpec) -> Result<Arc<dyn Guest>, DriverError> {
        let _busy = self.busy(id, "boot");
        self.step().await?;
        self.refusal()?;
        self.with(|world| {
            let sandbox = world.sandbox(id)?;
            sandbox.disk.as_ref().ok_or(DriverError::Gone)?;
            if sandbox.root != spec.root.digest {
                return Err(DriverError::OtherRoot { disk: sandbox.root.clone(), asked: spec.root.digest.clone() });
            }
            let stopped = !sandbox.network && sandbox.processes.is_none();
            (sandbox.network, sandbox.egress) = (true, spec.egress.clone());
            if !stopped {
                world.violations.push(format!("boot of {id}, which was not stopped"));
            }
            Ok::<(), DriverError>(())
        })?;
        self.step().await?;
        let guest =
            self.with(|world| world.sandbox(id)?.start(self.faults.clone(), &spec.root.user).ok_or(DriverError::Gone))?;
        self.step().await?;
        Ok(guest)
    }

    async fn set_frozen(&self, id: SessionId, frozen: bool) -> Result<(), DriverError> {
        self.step().await?;
        self.with(|world| {
            let processes = world.processes(id)?;
            processes.frozen = frozen;
            processes.guest.set_frozen(frozen);
            Ok(())
        })?;
        self.step().await
    }

    async fn end_sandbox(&self, id: SessionId) -> Result<(), DriverError> {
        self.step().await?;
        let release = self.with(|world| {
            world.let_mounts_linger(id);
            let sandbox = world.sandboxes.get_mut(&id)?;
            sandbox.attached = false;
            sandbox.die("the session was terminated");
            (!std::mem::replace(&mut sandbox.releasing, true)).then_some(())
        });
        if release.is_some() {
            tokio::spawn(release_parts(self.clone(), id));
        }
        // Dead, but whoever asked does not know yet.
        self.step().await
    }

    async fn stop_parts(&self, id: SessionId) -> Result<(), DriverError> {
        let _busy = self.busy(id, "stop");
        self.step().await?;
        self.with(|world| {
            world.sandbox(id)?.disk.as_ref().ok_or(DriverError::Gone)?;
            world.sandbox(id)?.die("the sandbox was stopped");
            world.let_mounts_linger(id);
            Ok(())
        })?;
        self.step().await?;
        self.with(|world| {
            for volume in world.volumes.values_mut() {
                volume.mounts.retain(|mount| mount.session_id != id);
            }
            world.sandbox(id).map(|sandbox| sandbox.network = false)
        })?;
        self.step().await
    }
}

/// Takes a dead sandbox apart, piece by piece.
async fn release_parts(driver: FakeDriver, id: SessionId) {
    loop {
        // Whatever fails here is tried again by the driver itself.
        driver.faults.effect().await;
        let done = driver.with(|world| {
            let Some(sandbox) = world.sandboxes.get_mut(&id) else { return true };
            if sandbox.disk.take().is_some() {
                return false;
            }
            world.sandboxes.remove(&id);
            true
        });
        if done {
            return;
        }
    }
}

#[async_trait]
impl Driver for FakeDriver {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            isolation: Isolation::SharedKernel,
            memory_checkpoint: false,
            live_resize: false,
            nested_containers: false,
        }
    }

    async fn start(&self, id: SessionId, spec: &SandboxSpec) -> Result<Arc<dyn Guest>, DriverError> {
        if spec.disk == DiskOrigin::Kept {
            return self.boot(id, spec).await;
        }
        // Goes on when nobody waits for it any more, as a real driver's threads do.
        let creation = tokio::spawn(self.clone().create_parts(id, spec.clone()));
        creation.await.map_err(|error| DriverError::Failed(error.to_string()))?
    }

    async fn adopt(&self, id: SessionId) -> Result<Adopted, DriverError> {
        let _busy = self.busy(id, "adopt");
        self.step().await?;
        if self.with(|world| world.unreachable) {
            return Err(DriverError::Failed("the sandbox does not answer".to_owned()));
        }
        self.with(|world| {
            let sandbox = world.sandbox(id)?;
            sandbox.attached = true;
            match &sandbox.processes {
                Some(Processes { guest, frozen: false }) => Ok(Adopted::Running(guest.clone())),
                Some(Processes { guest, frozen: true }) => Ok(Adopted::Frozen(guest.clone())),
                None if sandbox.disk.is_some() => {
                    Ok(Adopted::Stopped { powered_off: sandbox.powered_off, host_restarted: sandbox.host_restarted })
                }
                None => Err(DriverError::Gone),
            }
        })
    }

    async fn freeze(&self, id: SessionId) -> Result<(), DriverError> {
        let _busy = self.busy(id, "freeze");
        self.repeatable(|| self.set_frozen(id, true)).await
    }

    async fn thaw(&self, id: SessionId) -> Result<(), DriverError> {
        let _busy = self.busy(id, "thaw");
        self.repeatable(|| self.set_frozen(id, false)).await
    }

    async fn stop(&self, id: SessionId) -> Result<(), DriverError> {
        self.repeatable(|| self.stop_parts(id)).await
    }

    async fn destroy(&self, id: SessionId) -> Result<(), DriverError> {
        let _busy = self.busy(id, "destroy");
        self.repeatable(|| self.end_sandbox(id)).await
    }

    async fn list(&self) -> Result<Vec<SessionId>, DriverError> {
        self.step().await?;
        Ok(self.with(|world| match world.blind {
            true => Vec::new(),
            false => world
                .sandboxes
                .iter()
                .filter(|(_, of)| !of.releasing && of.driver == self.name)
                .map(|(id, _)| *id)
                .collect(),
        }))
    }

    async fn attach_volume(&self, id: SessionId, mount: &Mount) -> Result<(), DriverError> {
        let _busy = self.busy(id, "attach_volume");
        self.repeatable(|| self.mount_volume(id, mount)).await
    }

    async fn detach_volume(&self, id: SessionId, mount: &Mount, force: bool) -> Result<(), DriverError> {
        let _busy = self.busy(id, "detach_volume");
        self.repeatable(|| self.unmount_volume(id, mount, force)).await
    }

    async fn usage(&self, id: SessionId) -> Result<ResourceUsage, DriverError> {
        self.with(|world| {
            world.processes(id)?;
            Ok(world.sandbox(id)?.load.clone())
        })
    }

    fn ends(&self) -> mpsc::UnboundedReceiver<Ended> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.with(|world| {
            if world.ends.insert(self.name, sender).is_some() {
                world.violations.push("ends was called twice".to_owned());
            }
        });
        receiver
    }
}

#[async_trait]
impl Host for FakeDriver {
    async fn copy_disk(&self, id: SessionId, images: &[DiskImageId]) -> Result<u64, DriverError> {
        let _busy = self.busy(id, "copy_disk");
        self.repeatable(|| self.copy_to_images(id, images)).await
    }

    fn image_path(&self, id: DiskImageId) -> PathBuf {
        Images::path(id)
    }

    async fn prepare_image(&self, id: DiskImageId) -> Result<PathBuf, DriverError> {
        Ok(Images::path(id))
    }

    async fn remove_image(&self, id: DiskImageId) -> Result<(), DriverError> {
        self.repeatable(|| async {
            self.step().await?;
            self.images.with(|images| images.remove(&id));
            self.step().await
        })
        .await
    }

    async fn images(&self) -> Result<Vec<DiskImageId>, DriverError> {
        self.step().await?;
        Ok(if self.with(|world| world.blind) { Vec::new() } else { self.images_now() })
    }

    async fn create_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        self.repeatable(|| self.make_volume(id, size_bytes)).await
    }

    async fn grow_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        self.repeatable(|| self.enlarge_volume(id, size_bytes)).await
    }

    async fn volume_size(&self, id: VolumeId) -> Result<u64, DriverError> {
        self.measure_volume(id)
    }

    async fn remove_volume(&self, id: VolumeId) -> Result<(), DriverError> {
        self.repeatable(|| self.drop_volume(id)).await
    }

    async fn volumes(&self) -> Result<Vec<VolumeId>, DriverError> {
        self.step().await?;
        Ok(if self.with(|world| world.blind) { Vec::new() } else { self.volumes_now().into_keys().collect() })
    }

    async fn settle_volume(&self, id: VolumeId) -> Result<(), DriverError> {
        self.repeatable(|| self.let_volume_settle(id)).await
    }

    async fn set_egress(&self, id: SessionId, egress: Option<&Egress>) -> Result<(), DriverError> {
        let _busy = self.busy(id, "set_egress");
        let egress = egress.cloned();
        self.repeatable(|| async {
            self.step().await?;
            self.with(|world| world.restrict(id, egress.clone()))?;
            self.step().await
        })
        .await
    }

    async fn connections(&self, id: SessionId) -> Result<Vec<Connection>, DriverError> {
        self.with(|world| {
            world.processes(id)?;
            Ok(world.sandbox(id)?.connections.clone())
        })
    }

    fn default_root(&self) -> ImageDigest {
        self.with(|world| world.default_root.clone()).unwrap_or_else(|| ImageDigest::new("host:fake"))
    }

    async fn root(&self, digest: &ImageDigest) -> Result<RootImage, DriverError> {
        // Those of elsewhere are the images', not the host's.
        let of_elsewhere = digest.as_str().starts_with("sha256:");
        match of_elsewhere || self.with(|world| world.lost_roots.contains(digest)) {
            true => Err(DriverError::Gone),
            false => Ok(RootImage {
                digest: digest.clone(),
                layers: Vec::new(),
                user: self.user(),
                workdir: None,
                env: BTreeMap::new(),
            }),
        }
    }

    async fn root_of(&self, id: SessionId) -> Result<Option<ImageDigest>, DriverError> {
        Ok(self.with(|world| world.sandboxes.get(&id).map(|sandbox| sandbox.root.clone())))
    }

    async fn retain_roots(&self, _used: &[ImageDigest]) -> Result<(), DriverError> {
        Ok(())
    }

    fn events(&self) -> mpsc::UnboundedReceiver<HostEvent> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.with(|world| {
            if world.events.replace(sender).is_some() {
                world.violations.push("events was called twice".to_owned());
            }
        });
        receiver
    }
}
