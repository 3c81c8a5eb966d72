//! Fakes of every port, for tests: a store in memory, a driver whose sandboxes are records, a clock
//! on tokio's time, seeded randomness. All of them share [`Faults`], which fails or stops the
//! world between any two effects. What the store and the driver hold survives the engine, and may
//! survive the runtime it ran on.

mod blobs;
mod clock;
mod disks;
mod driver;
mod faults;
mod files;
mod guest;
mod images;
mod ingress;
mod programs;
mod sockets;
mod store;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

pub use blobs::FakeBlobs;
pub use clock::FakeClock;
pub use disks::FakeVolume;
pub use driver::{FAKE_DRIVER, FakeDriver};
pub use faults::{Faults, Rng};
pub use guest::FakeGuest;
pub use images::FakeImages;
pub use ingress::FakeIngress;
pub use store::FakeStore;

use crate::access::Caller;
use crate::config::EngineConfig;
use crate::engine::Engine;
use crate::ports::{Drivers, Entropy, Ports};

/// Randomness that a seed repeats.
pub struct FakeEntropy(Mutex<Rng>);

impl FakeEntropy {
    pub fn new(seed: u64) -> Self {
        Self(Mutex::new(Rng::new(seed)))
    }
}

impl Entropy for FakeEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        let mut rng = self.0.lock().expect("no holder of this lock panics");
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&rng.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// A complete fake world.
pub struct Fakes {
    pub faults: Arc<Faults>,
    pub store: Arc<FakeStore>,
    pub driver: Arc<FakeDriver>,
    pub images: Arc<FakeImages>,
    pub blobs: Arc<FakeBlobs>,
    pub ingress: Arc<FakeIngress>,
    pub clock: Arc<FakeClock>,
    pub entropy: Arc<FakeEntropy>,
}

impl Fakes {
    /// A world without faults; the clock stands at 2026-01-01.
    pub fn new(seed: u64) -> Self {
        let faults = Arc::new(Faults::new(seed));
        let images = Arc::<blobs::Images>::default();
        Self {
            store: Arc::new(FakeStore::new(faults.clone())),
            images: Arc::default(),
            driver: Arc::new(FakeDriver::new(faults.clone(), images.clone())),
            blobs: Arc::new(FakeBlobs::new(faults.clone(), images)),
            ingress: Arc::new(FakeIngress::new(faults.clone())),
            clock: Arc::new(FakeClock::new(1_767_225_600_000)),
            entropy: Arc::new(FakeEntropy::new(seed)),
            faults,
        }
    }

    /// The process that used this world is gone, or about to be replaced.
    pub fn disconnect(&self) {
        self.driver.disconnect();
        self.blobs.disconnect();
        self.ingress.disconnect();
    }

    /// Starts an engine in this world; again after it was shut down or dropped with its runtime.
    pub async fn start(&self, config: EngineConfig) -> Result<Engine, nagaya_api::error::Error> {
        self.disconnect();
        Engine::start(config, self.ports()).await
    }

    /// The ports of an engine in this world, with one driver called `fake`.
    pub fn ports(&self) -> Ports {
        Ports {
            store: self.store.clone(),
            drivers: Drivers::new(FAKE_DRIVER, BTreeMap::from([(FAKE_DRIVER.to_owned(), self.driver.clone() as _)])),
            host: self.driver.clone(),
            images: self.images.clone(),
            blobs: self.blobs.clone(),
            ingress: self.ingress.clone(),
            clock: self.clock.clone(),
            entropy: self.entropy.clone(),
        }
    }
}

/// An engine in a fresh fake world, with a workspace and the secret and caller of its key.
pub async fn start(config: EngineConfig) -> (Engine, String, Caller, Fakes) {
    let fakes = Fakes::new(1);
    let engine = fakes.start(config).await.expect("nothing fails in a fresh fake world");
    let secret = engine.first_start(None).await.expect("nothing fails in a fresh fake world");
    let secret = secret.expect("a fresh world has no key");
    let caller = engine.authenticate(&secret).expect("the key was just made");
    (engine, secret, caller, fakes)
}
