use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nagaya_api::ids::SessionId;
use tokio::sync::{mpsc, watch};

use super::{FakeGuest, Faults};
use crate::model::{Guarantees, Machine};
use crate::ports::{Driver, DriverError, Guest, SandboxExit};

/// A driver whose sandboxes are records. They outlive the engine, whole or half made. Clones share them.
#[derive(Clone)]
pub struct FakeDriver {
    faults: Arc<Faults>,
    world: Arc<Mutex<World>>,
    /// While true, creations stand still before their last step.
    held: watch::Sender<bool>,
}

#[derive(Default)]
struct World {
    sandboxes: BTreeMap<SessionId, Sandbox>,
    exits: Option<mpsc::UnboundedSender<SandboxExit>>,
    /// Answers of the next creations, first first.
    refusals: Vec<DriverError>,
    sandboxes_max: Option<usize>,
    unreachable: bool,
    blind: bool,
    /// Calls under way, to find out about two at once for the same sandbox.
    busy: BTreeMap<SessionId, &'static str>,
    violations: Vec<String>,
}

/// Made in this order, removed in the opposite one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Network,
    Disk,
    Processes,
}

struct Sandbox {
    /// The newest part; all before it are there too.
    upto: Part,
    /// Whether this engine created or adopted it, and so hears of its end.
    attached: bool,
    /// Dead, and being taken apart by a task of this process.
    releasing: bool,
    guest: Arc<FakeGuest>,
}

impl Sandbox {
    fn is_alive(&self) -> bool {
        self.upto == Part::Processes && self.guest.is_alive()
    }
}

struct Busy<'a>(&'a FakeDriver, SessionId);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.with(|world| world.busy.remove(&self.1));
    }
}

impl FakeDriver {
    pub fn new(faults: Arc<Faults>) -> Self {
        Self { faults, world: Arc::default(), held: watch::Sender::new(false) }
    }

    fn with<T>(&self, action: impl FnOnce(&mut World) -> T) -> T {
        action(&mut self.world.lock().expect("no holder of this lock panics"))
    }

    /// The next creation fails with this.
    pub fn refuse_next(&self, error: DriverError) {
        self.with(|world| world.refusals.push(error));
    }

    /// Creations beyond this many sandboxes fail with `Exhausted("network_slots_max")`.
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

    /// Ends a sandbox as if its first process had been killed; false when it is not alive.
    pub fn kill(&self, id: SessionId, cause: &str) -> bool {
        self.with(|world| {
            let Some(sandbox) = world.sandboxes.get(&id).filter(|sandbox| sandbox.is_alive()) else { return false };
            sandbox.guest.die(cause);
            if let Some(exits) = world.exits.as_ref().filter(|_| sandbox.attached) {
                // Nobody listening is what happens while the engine starts or stops.
                let _ = exits.send(SandboxExit { id, cause: cause.to_owned() });
            }
            true
        })
    }

    /// Every sandbox of which anything exists, and whether commands can run in it.
    pub fn sandboxes(&self) -> BTreeMap<SessionId, bool> {
        self.with(|world| world.sandboxes.iter().map(|(id, sandbox)| (*id, sandbox.is_alive())).collect())
    }

    pub fn guest(&self, id: SessionId) -> Option<Arc<FakeGuest>> {
        self.with(|world| world.sandboxes.get(&id).map(|sandbox| sandbox.guest.clone()))
    }

    /// What callers did that the contract of [`Driver`] forbids.
    pub fn violations(&self) -> Vec<String> {
        self.with(|world| world.violations.clone())
    }

    /// The process that used this driver is gone, or about to be replaced.
    pub fn disconnect(&self) {
        self.with(|world| {
            world.exits = None;
            world.busy.clear();
            for sandbox in world.sandboxes.values_mut() {
                sandbox.attached = false;
                sandbox.releasing = false;
            }
        });
    }

    fn busy(&self, id: SessionId, call: &'static str) -> Busy<'_> {
        self.with(|world| {
            if let Some(other) = world.busy.insert(id, call) {
                world.violations.push(format!("{call} of {id} during its {other}"));
            }
        });
        Busy(self, id)
    }

    async fn create_parts(self, id: SessionId) -> Result<Arc<dyn Guest>, DriverError> {
        let _busy = self.busy(id, "create");
        self.step().await?;
        let refusal = self.with(|world| {
            let full = world.sandboxes_max.is_some_and(|max| world.sandboxes.len() >= max);
            let refusal = full.then(|| DriverError::Exhausted("network_slots_max".to_owned()));
            refusal.or_else(|| (!world.refusals.is_empty()).then(|| world.refusals.remove(0)))
        });
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        let guest = Arc::new(FakeGuest::new(self.faults.clone()));
        for part in [Part::Network, Part::Disk, Part::Processes] {
            if part == Part::Processes {
                // The sender is ours, so waiting cannot fail.
                let _ = self.held.subscribe().wait_for(|held| !held).await;
            }
            self.with(|world| {
                let sandbox = Sandbox { upto: part, attached: true, releasing: false, guest: guest.clone() };
                world.sandboxes.insert(id, sandbox);
            });
            // A failure here leaves what was made so far for `list` to find.
            self.step().await?;
        }
        Ok(guest)
    }

    async fn step(&self) -> Result<(), DriverError> {
        match self.faults.effect().await {
            true => Err(DriverError::Failed("a driver step failed, as this test asked for".to_owned())),
            false => Ok(()),
        }
    }
}

/// Takes a dead sandbox apart, piece by piece.
async fn release_parts(faults: Arc<Faults>, world: Arc<Mutex<World>>, id: SessionId) {
    loop {
        // Whatever fails here is tried again by the driver itself.
        faults.effect().await;
        let mut world = world.lock().expect("no holder of this lock panics");
        let Some(sandbox) = world.sandboxes.get_mut(&id) else { return };
        match sandbox.upto {
            Part::Processes => sandbox.upto = Part::Disk,
            Part::Disk => sandbox.upto = Part::Network,
            Part::Network => {
                world.sandboxes.remove(&id);
                return;
            }
        }
    }
}

#[async_trait]
impl Driver for FakeDriver {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn guarantees(&self) -> Guarantees {
        Guarantees { isolation: "none".to_owned(), memory_snapshot: false }
    }

    async fn create(&self, id: SessionId, _machine: &Machine) -> Result<Arc<dyn Guest>, DriverError> {
        // Goes on when nobody waits for it any more, as a real driver's threads do.
        let creation = tokio::spawn(self.clone().create_parts(id));
        creation.await.map_err(|error| DriverError::Failed(error.to_string()))?
    }

    async fn adopt(&self, id: SessionId) -> Result<Arc<dyn Guest>, DriverError> {
        let _busy = self.busy(id, "adopt");
        self.step().await?;
        if self.with(|world| world.unreachable) {
            return Err(DriverError::Failed("the sandbox does not answer".to_owned()));
        }
        self.with(|world| match world.sandboxes.get_mut(&id) {
            Some(sandbox) if sandbox.is_alive() => {
                sandbox.attached = true;
                Ok(sandbox.guest.clone() as Arc<dyn Guest>)
            }
            _ => Err(DriverError::Gone),
        })
    }

    async fn destroy(&self, id: SessionId) -> Result<(), DriverError> {
        let _busy = self.busy(id, "destroy");
        self.step().await?;
        let release = self.with(|world| {
            let sandbox = world.sandboxes.get_mut(&id)?;
            sandbox.attached = false;
            sandbox.guest.die("the session was terminated");
            (!std::mem::replace(&mut sandbox.releasing, true)).then_some(())
        });
        if release.is_some() {
            tokio::spawn(release_parts(self.faults.clone(), self.world.clone(), id));
        }
        // Dead, but whoever asked does not know yet.
        self.step().await
    }

    async fn list(&self) -> Result<Vec<SessionId>, DriverError> {
        self.step().await?;
        Ok(self.with(|world| match world.blind {
            true => Vec::new(),
            false => world.sandboxes.iter().filter(|(_, of)| !of.releasing).map(|(id, _)| *id).collect(),
        }))
    }

    fn exits(&self) -> mpsc::UnboundedReceiver<SandboxExit> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.with(|world| {
            if world.exits.replace(sender).is_some() {
                world.violations.push("exits was called twice".to_owned());
            }
        });
        receiver
    }
}
