//! Memory for messages under way in the whole server: taken before a message is read or made, waited for in the order
//! of asking, and refused by the limit's name when it cannot be had in time.
//!
//! Small messages have shares of their own: whoever fills the server with large ones keeps nobody from the small ones,
//! and whoever fills one of these keeps out only those few who have the same one.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use nagaya_api::error::{Code, Error};
use nagaya_engine::ports::{GuestError, Room};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What counts as small.
pub(crate) const SMALL_BYTES_MAX: usize = 64 * 1024;
/// Of all, the part of small messages; and its shares, of which each caller has one.
const SMALL_PART: usize = 8;
const SMALL_SHARES: usize = 16;
/// Taken at once by a message whose size is not known before.
const STEP_BYTES: usize = 1024 * 1024;
/// What is counted in.
const UNIT_BYTES: usize = 1024;
/// How long after the last large message memory goes back to the host; a busy server does not give and take all the time.
const GIVE_BACK_AFTER: Duration = Duration::from_secs(1);

/// Gives memory that the process does not use back to the host.
pub type GiveBack = Arc<dyn Fn() + Send + Sync>;

pub(crate) struct Budget {
    small: Vec<Share>,
    large: Share,
    bytes_max: usize,
    wait: Duration,
    give_back: Option<GiveBack>,
    giving_back: AtomicBool,
}

struct Share {
    free: Arc<Semaphore>,
    units: u32,
}

impl Share {
    fn of(bytes: usize) -> Self {
        let units = u32::try_from(bytes / UNIT_BYTES).unwrap_or(u32::MAX).max(1);
        Self { free: Arc::new(Semaphore::new(units as usize)), units }
    }
}

impl Budget {
    /// Of so many bytes, for which a message waits at most so long.
    pub(crate) fn new(bytes_max: usize, wait: Duration, give_back: Option<GiveBack>) -> Arc<Self> {
        let small = bytes_max / SMALL_PART;
        Arc::new(Self {
            small: (0..SMALL_SHARES).map(|_| Share::of(small / SMALL_SHARES)).collect(),
            large: Share::of(bytes_max - small),
            bytes_max,
            wait,
            give_back,
            giving_back: AtomicBool::new(false),
        })
    }

    /// For the messages of one call, in one direction. `caller` tells callers apart.
    pub(crate) fn hold(self: &Arc<Self>, caller: u8) -> Held {
        Held {
            budget: Arc::clone(self),
            small: usize::from(caller) % SMALL_SHARES,
            used: AtomicUsize::new(0),
            granted: AtomicUsize::new(0),
            permits: Mutex::default(),
        }
    }

    async fn take(&self, share: &Share, bytes: usize) -> Result<OwnedSemaphorePermit, Error> {
        // What is larger than all there is takes all there is.
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).min(share.units);
        if let Ok(permit) = Arc::clone(&share.free).try_acquire_many_owned(units) {
            return Ok(permit);
        }
        let waited = tokio::time::timeout(self.wait, Arc::clone(&share.free).acquire_many_owned(units)).await;
        waited.ok().and_then(Result::ok).ok_or_else(|| {
            let detail = format!(
                "limits.bytes_under_way_max is {}, and other messages took all of it for {} ms; use the streaming form of the call",
                self.bytes_max,
                self.wait.as_millis()
            );
            Error::new(Code::CapacityUnavailable, detail)
        })
    }

    /// Has memory go back to the host in a moment, where much was used.
    fn released(self: &Arc<Self>, bytes: usize) {
        let Some(give_back) = self.give_back.clone().filter(|_| bytes >= STEP_BYTES) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.giving_back.swap(true, Ordering::AcqRel) {
            return;
        }
        let budget = Arc::clone(self);
        runtime.spawn(async move {
            tokio::time::sleep(GIVE_BACK_AFTER).await;
            budget.giving_back.store(false, Ordering::Release);
            let _ = tokio::task::spawn_blocking(move || give_back()).await;
        });
    }
}

/// What one call has taken, until it is dropped.
pub(crate) struct Held {
    budget: Arc<Budget>,
    /// Its share of small messages.
    small: usize,
    used: AtomicUsize,
    granted: AtomicUsize,
    permits: Mutex<Vec<OwnedSemaphorePermit>>,
}

impl Held {
    /// Takes what a message of this size needs, in all; before it is there.
    pub(crate) async fn reserve(&self, bytes: usize) -> Result<(), Error> {
        let missing = bytes.saturating_sub(self.granted());
        if missing == 0 {
            return Ok(());
        }
        let share = if bytes <= SMALL_BYTES_MAX { &self.budget.small[self.small] } else { &self.budget.large };
        let permit = self.budget.take(share, missing).await?;
        self.granted.fetch_add(missing, Ordering::AcqRel);
        self.permits.lock().expect("nothing panics while holding permits").push(permit);
        Ok(())
    }

    /// Takes so much more for a message that grows.
    pub(crate) async fn grow(&self, bytes: usize) -> Result<(), Error> {
        let used = self.used.fetch_add(bytes, Ordering::AcqRel) + bytes;
        match self.granted() {
            granted if used <= granted => Ok(()),
            0 if used <= SMALL_BYTES_MAX => self.reserve(SMALL_BYTES_MAX).await,
            granted => self.reserve(used.max(granted + STEP_BYTES)).await,
        }
    }

    pub(crate) fn granted(&self) -> usize {
        self.granted.load(Ordering::Acquire)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.released(self.granted());
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Held").field("granted", &self.granted).finish_non_exhaustive()
    }
}

#[async_trait]
impl Room for Held {
    async fn grow(&self, bytes: usize) -> Result<(), GuestError> {
        let refused = |error: Error| GuestError { code: error.code, detail: error.detail, errno: 0 };
        Held::grow(self, bytes).await.map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    fn budget(bytes_max: usize, give_back: Option<GiveBack>) -> Arc<Budget> {
        Budget::new(bytes_max, Duration::from_millis(1_000), give_back)
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_had_in_time_is_refused_by_its_name() {
        let budget = budget(16 * MIB, None);
        let first = budget.hold(0);
        first.reserve(10 * MIB).await.unwrap();
        let second = budget.hold(0);
        let refused = second.reserve(10 * MIB).await.unwrap_err();
        assert_eq!(refused.code, Code::CapacityUnavailable);
        assert!(refused.to_string().contains("limits.bytes_under_way_max is 16777216"), "{refused}");
        // Small ones have their own, and of them each caller.
        let small = budget.hold(1);
        small.reserve(SMALL_BYTES_MAX).await.unwrap();
        let (next, last) = (budget.hold(1), budget.hold(1));
        next.reserve(SMALL_BYTES_MAX).await.unwrap();
        assert_eq!(last.reserve(SMALL_BYTES_MAX).await.unwrap_err().code, Code::CapacityUnavailable);
        budget.hold(2).reserve(SMALL_BYTES_MAX).await.unwrap();
        drop(first);
        second.reserve(10 * MIB).await.unwrap();
        second.reserve(10 * MIB).await.unwrap();
        assert_eq!(budget.large.free.available_permits(), 4 * 1024);
        // One that is larger than all waits for all.
        drop(second);
        budget.hold(0).reserve(100 * MIB).await.unwrap();
        assert_eq!(budget.large.free.available_permits(), 14 * 1024);
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_first_gets_it_first() {
        let budget = budget(16 * MIB, None);
        let first = budget.hold(0);
        first.reserve(12 * MIB).await.unwrap();
        let (large, less) = (budget.hold(0), budget.hold(0));
        let mut waiting = std::pin::pin!(large.reserve(12 * MIB));
        assert!(futures::poll!(&mut waiting).is_pending());
        let mut later = std::pin::pin!(less.reserve(MIB));
        assert!(futures::poll!(&mut later).is_pending(), "it does not overtake");
        drop(first);
        waiting.await.unwrap();
        later.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_of_unknown_size_takes_as_it_grows() {
        let budget = budget(16 * MIB, None);
        let held = budget.hold(0);
        held.grow(1_000).await.unwrap();
        assert_eq!(budget.large.free.available_permits(), 14 * 1024, "it is small");
        for _ in 0..100 {
            held.grow(100_000).await.unwrap();
        }
        assert!((10_000_000..12_000_000).contains(&held.granted()), "{}", held.granted());
        let other = budget.hold(0);
        let mut grown = Ok(());
        while grown.is_ok() {
            grown = other.grow(MIB).await;
        }
        assert!(other.granted() <= 6 * MIB);
        drop((held, other));
        assert_eq!(budget.large.free.available_permits(), 14 * 1024);
        assert_eq!(budget.small[0].free.available_permits(), 128);
    }

    #[tokio::test]
    async fn memory_goes_back_once_after_large_messages() {
        let count = Arc::new(AtomicUsize::new(0));
        let (given, counted) = (Arc::new(tokio::sync::Notify::new()), Arc::clone(&count));
        let told = Arc::clone(&given);
        let budget = budget(
            16 * MIB,
            Some(Arc::new(move || {
                counted.fetch_add(1, Ordering::SeqCst);
                told.notify_one();
            })),
        );
        for bytes in [1_000, 2 * MIB, 3 * MIB] {
            budget.hold(0).reserve(bytes).await.unwrap();
        }
        given.notified().await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert!(!budget.giving_back.load(Ordering::SeqCst));
    }
}
