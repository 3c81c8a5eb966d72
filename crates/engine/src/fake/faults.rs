use std::sync::Mutex;

use tokio::sync::watch;

/// A small pseudo-random generator (splitmix64): good enough to choose schedules, and repeatable.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    #[allow(clippy::should_implement_trait)] // it never ends, so it is no iterator
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 up to, not including, `end`; 0 when `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 { 0 } else { self.next() % end }
    }

    /// True this often in a thousand.
    pub fn per_mille(&mut self, chance: u32) -> bool {
        self.below(1_000) < u64::from(chance)
    }
}

/// Where the fakes ask, before and after everything that lasts, whether to go on.
pub struct Faults {
    state: Mutex<State>,
    crashed: watch::Sender<bool>,
}

struct State {
    rng: Rng,
    effects: u64,
    crash_at: Option<u64>,
    fail_at: Option<u64>,
    repeat: bool,
    failures_per_mille: u32,
    yields_max: u32,
}

impl Faults {
    /// No faults, no delays.
    pub fn new(seed: u64) -> Self {
        let state = State {
            rng: Rng::new(!seed),
            effects: 0,
            crash_at: None,
            fail_at: None,
            repeat: false,
            failures_per_mille: 0,
            yields_max: 0,
        };
        Self { state: Mutex::new(state), crashed: watch::Sender::new(false) }
    }

    fn with<T>(&self, action: impl FnOnce(&mut State) -> T) -> T {
        action(&mut self.state.lock().expect("no holder of this lock panics"))
    }

    /// From now on this many of a thousand effects fail.
    pub fn fail_per_mille(&self, chance: u32) {
        self.with(|state| state.failures_per_mille = chance);
    }

    /// Each effect lets other tasks run up to this many times, so that schedules differ.
    pub fn yield_up_to(&self, times: u32) {
        self.with(|state| state.yields_max = times);
    }

    /// Lets this many more effects happen; the one after them, and all others, never return.
    pub fn crash_after(&self, effects: u64) {
        self.with(|state| state.crash_at = Some(state.effects + effects + 1));
    }

    /// Lets this many more effects happen; the one after them fails.
    pub fn fail_after(&self, effects: u64) {
        self.with(|state| state.fail_at = Some(state.effects + effects + 1));
    }

    /// From now on everything that may be repeated is: done twice for each time it is asked for.
    pub fn repeat(&self, repeat: bool) {
        self.with(|state| state.repeat = repeat);
    }

    pub(super) fn repeats(&self) -> bool {
        self.with(|state| state.repeat)
    }

    /// Effects so far.
    pub fn effects(&self) -> u64 {
        self.with(|state| state.effects)
    }

    pub fn has_crashed(&self) -> bool {
        *self.crashed.borrow()
    }

    /// Completes when the world has stopped; then drop the runtime, and call [`Faults::recover`].
    pub async fn crashed(&self) {
        let _ = self.crashed.subscribe().wait_for(|crashed| *crashed).await;
    }

    /// Lets the world go on after a crash.
    pub fn recover(&self) {
        self.with(|state| (state.crash_at, state.fail_at) = (None, None));
        self.crashed.send_replace(false);
    }

    /// One effect, about to happen or just done. True when it is to fail.
    pub(super) async fn effect(&self) -> bool {
        let (crash, fail, yields) = self.with(|state| {
            state.effects += 1;
            let fail = state.rng.per_mille(state.failures_per_mille) || state.fail_at == Some(state.effects);
            let yields = state.rng.below(u64::from(state.yields_max) + 1);
            (state.crash_at == Some(state.effects), fail, yields)
        });
        if crash {
            self.crashed.send_replace(true);
        }
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        if self.has_crashed() {
            std::future::pending::<()>().await;
        }
        fail
    }
}
