//! Slots: everything a sandbox needs that takes milliseconds to make, made ahead.
//!
//! A slot is a number, from which its host ids, its address and its cgroup follow, with the
//! descriptors of its namespaces, its disk and its layers. It is used by one sandbox and never again:
//! the number is, once the sandbox is gone, with everything else made fresh.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use nagaya_guest::mount::{self, NO_DEVICES, READ_ONLY};
use nagaya_guest::spawn::IDS_PER_SANDBOX;

use super::disk::{self, DiskError, Disks};
use super::host_image::Image;
use super::network::{Network, NetworkError};
use crate::cgroup::{CgroupError, Cgroups, Group};
use crate::spawner::{SpawnError, Spawner};

/// The first host id of slot 0. systemd leaves the range from 0x7000_0000 on to nobody; see its
/// page on users, groups and ids.
const FIRST_ID: u32 = 0x7000_0000;
/// All ids stay below 0x8000_0000: programs that keep them in signed numbers are many.
const SLOTS_LIMIT: u32 = 4_096;

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
    #[error("make a control group")]
    Cgroup(#[from] CgroupError),
    #[error("{step}")]
    Layer { step: &'static str, source: std::io::Error },
}

/// What slots of one pool have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub disk_gb: u32,
    pub outbound: bool,
}

/// A slot ready for a sandbox.
pub(super) struct Slot {
    pub number: u32,
    pub group: Group,
    pub user: OwnedFd,
    pub network: OwnedFd,
    pub disk: OwnedFd,
    pub base: OwnedFd,
    pub layers: Vec<OwnedFd>,
    /// The disk's image; moved to the sandbox's directory when it is taken.
    pub image: PathBuf,
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
    /// Where images of disks wait that no sandbox has yet.
    pub pool_directory: PathBuf,
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
        slots_max: u32,
    ) -> Self {
        let room = network.as_ref().map_or(SLOTS_LIMIT, Network::capacity);
        let numbers = Numbers { used: BTreeSet::new(), next: 0, max: slots_max.min(SLOTS_LIMIT).min(room) };
        Self { spawner, network, disks, cgroups, image, pool_directory, numbers: Mutex::new(numbers) }
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().expect("numbers are changed without panics")
    }

    /// Takes the number of a sandbox that already runs.
    pub fn claim(&self, number: u32) {
        self.numbers().used.insert(number);
    }

    /// Gives a number back, after everything that bears it is gone.
    pub fn release(&self, number: u32) {
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
    pub fn make(&self, shape: Shape) -> Result<Slot, SlotError> {
        let number = self.number()?;
        let made = self.make_numbered(number, shape);
        if made.is_err() {
            let _ = fs::remove_file(self.image_path(number));
            let _ = self.cgroups.group(&group_name(number)).and_then(|group| group.remove());
            self.release(number);
        }
        made
    }

    fn image_path(&self, number: u32) -> PathBuf {
        self.pool_directory.join(format!("{number}.ext4"))
    }

    fn make_numbered(&self, number: u32, shape: Shape) -> Result<Slot, SlotError> {
        let group = self.cgroups.group(&group_name(number))?;
        let (network, user) = self.spawner.namespaces(first_id(number))?;
        match &self.network {
            Some(rules) => rules.set_up(network.as_fd(), shape.outbound.then_some(number))?,
            None => Network::set_up_isolated(network.as_fd())?,
        }
        let image = self.image_path(number);
        self.disks.make(&image, shape.disk_gb)?;
        let disk = disk::attach(&image)?;
        let layer = |step, path: &std::path::Path, attributes: u64| -> Result<OwnedFd, SlotError> {
            let wrong = |errno: rustix::io::Errno| SlotError::Layer { step, source: errno.into() };
            let tree = mount::clone_tree(rustix::fs::CWD, &path.to_string_lossy(), false).map_err(wrong)?;
            mount::set_attributes(tree.as_fd(), attributes, Some(user.as_fd())).map_err(wrong)?;
            Ok(tree)
        };
        let base = layer("map the base layer", &self.image.base, READ_ONLY | NO_DEVICES)?;
        let layers = self
            .image
            .layers
            .iter()
            .map(|(_, path)| layer("map a layer", path, READ_ONLY | NO_DEVICES))
            .collect::<Result<_, _>>()?;
        mount::set_attributes(disk.as_fd(), NO_DEVICES, Some(user.as_fd()))
            .map_err(|errno| SlotError::Layer { step: "map the disk", source: errno.into() })?;
        Ok(Slot { number, group, user, network, disk, base, layers, image })
    }

    /// Takes a slot apart that no sandbox used.
    pub fn discard(&self, slot: Slot) {
        let Slot { number, group, image, .. } = slot;
        let _ = fs::remove_file(image);
        let _ = group.remove();
        self.release(number);
    }
}

pub(super) fn group_name(number: u32) -> String {
    format!("slot-{number}")
}

/// Slots of one shape, refilled by threads of its own.
pub(super) struct Pool {
    factory: Arc<Factory>,
    shape: Shape,
    state: Mutex<PoolState>,
    changed: Condvar,
}

struct PoolState {
    ready: Vec<Slot>,
    /// Being made now.
    coming: usize,
    target: usize,
    closed: bool,
}

/// Making a slot waits for the kernel more than it computes, so several are made at once.
const MAKERS: usize = 4;

impl Pool {
    pub fn start(factory: Arc<Factory>, shape: Shape, target: usize) -> Arc<Self> {
        let state = PoolState { ready: Vec::new(), coming: 0, target, closed: false };
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

    fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().expect("the pool is changed without panics")
    }

    fn refill(&self) {
        loop {
            let mut state = self.state();
            while !state.closed && state.ready.len() + state.coming >= state.target {
                state = self.changed.wait(state).expect("the pool is changed without panics");
            }
            if state.closed {
                return;
            }
            state.coming += 1;
            drop(state);
            let made = self.factory.make(self.shape);
            let mut state = self.state();
            state.coming -= 1;
            match made {
                Ok(slot) if !state.closed => state.ready.push(slot),
                Ok(slot) => {
                    drop(state);
                    self.factory.discard(slot);
                }
                Err(error) => {
                    // Sandboxes make their own slots and report the error where it is seen.
                    tracing::warn!(error = &error as &dyn std::error::Error, "could not make a slot ahead");
                    let pause = std::time::Duration::from_secs(1);
                    drop(self.changed.wait_timeout(state, pause).expect("the pool is changed without panics"));
                }
            }
        }
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Slots that are ready now.
    pub fn level(&self) -> usize {
        self.state().ready.len()
    }

    /// A ready slot, the one that was used least recently being kept for later.
    pub fn take(&self) -> Option<Slot> {
        let slot = self.state().ready.pop();
        self.changed.notify_one();
        slot
    }

    pub fn close(&self) {
        let ready = {
            let mut state = self.state();
            state.closed = true;
            std::mem::take(&mut state.ready)
        };
        self.changed.notify_all();
        for slot in ready {
            self.factory.discard(slot);
        }
    }
}
