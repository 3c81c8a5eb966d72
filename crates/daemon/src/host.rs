//! The host's clock and randomness, as the engine asks for them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nagaya_engine::model::UnixMs;
use nagaya_engine::ports::{BoxFuture, Clock, Entropy};

/// How long a jump of the wall clock may go unnoticed by a sleeper.
const RECHECK_EVERY: Duration = Duration::from_secs(2);

/// The host's wall clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> UnixMs {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
    }

    /// Timers of the runtime count monotonic time, which stands still while the host is suspended
    /// and does not move when the wall clock is set. So a long sleep is cut into short ones, each
    /// of which reads the wall clock again.
    fn sleep_until(&self, at: UnixMs) -> BoxFuture<()> {
        Box::pin(async move {
            loop {
                let remaining = Duration::from_millis(at.saturating_sub(HostClock.now()));
                if remaining.is_zero() {
                    return;
                }
                tokio::time::sleep(remaining.min(RECHECK_EVERY)).await;
            }
        })
    }
}

/// The kernel's random number generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes).expect("Linux 5.15 and later always answer getrandom");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_time_that_has_passed_is_not_waited_for() {
        let sleep = HostClock.sleep_until(HostClock.now());
        tokio::time::timeout(Duration::from_secs(1), sleep).await.expect("returns at once");
    }

    #[tokio::test]
    async fn a_sleep_lasts_until_the_wall_clock_reaches_its_end() {
        let end = HostClock.now() + 30;
        HostClock.sleep_until(end).await;
        assert!(HostClock.now() >= end);
    }

    #[test]
    fn two_draws_of_randomness_differ() {
        let (mut first, mut second) = ([0; 32], [0; 32]);
        HostEntropy.fill(&mut first);
        HostEntropy.fill(&mut second);
        assert_ne!(first, second);
    }
}
