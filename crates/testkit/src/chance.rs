//! What suites with random choices share: how many, from which seed, and how long to wait for the end.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// The number in an environment variable, if it is set.
pub fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

/// A seed that nothing repeats, short enough to be read over the phone.
pub fn fresh_seed() -> u64 {
    RandomState::new().build_hasher().finish() % 1_000_000_000
}

/// Asks until it is so; fails after a minute. For what the host does on its own time. Blocks.
pub fn settle(what: &str, mut ask: impl FnMut() -> bool) {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    while !ask() {
        assert!(Instant::now() < deadline, "after {SETTLE_TIMEOUT:?} still not true: {what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
