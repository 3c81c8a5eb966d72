//! Time as commands have it: it stands still while the sandbox is suspended.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// Moments of this clock are instants without the time that was spent suspended; they mean
/// nothing to any other clock.
#[derive(Debug, Default)]
pub struct Clock {
    state: watch::Sender<State>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    suspended_at: Option<Instant>,
    /// Spent suspended, the time since `suspended_at` not included.
    lost: Duration,
}

impl Clock {
    /// Suspending a suspended clock changes nothing.
    pub fn suspend(&self) {
        self.state.send_modify(|state| {
            state.suspended_at.get_or_insert_with(Instant::now);
        });
    }

    pub fn go_on(&self) {
        self.state.send_modify(|state| {
            if let Some(since) = state.suspended_at.take() {
                state.lost += since.elapsed();
            }
        });
    }

    pub fn now(&self) -> Instant {
        let state = *self.state.borrow();
        state.suspended_at.unwrap_or_else(Instant::now) - state.lost
    }

    /// Completes when the clock has reached `moment` and is not suspended.
    pub async fn sleep_until(&self, moment: Instant) {
        let mut state = self.state.subscribe();
        loop {
            let State { suspended_at, lost } = *state.borrow_and_update();
            let due = async {
                match suspended_at {
                    Some(_) => std::future::pending().await,
                    None => tokio::time::sleep_until(moment + lost).await,
                }
            };
            tokio::select! {
                () = due => return,
                changed = state.changed() => changed.expect("the sender is ours"),
            }
        }
    }

    pub async fn sleep(&self, duration: Duration) {
        self.sleep_until(self.now() + duration).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn time_spent_suspended_does_not_count() {
        let clock = Clock::default();
        let (began, real) = (clock.now(), Instant::now());
        let sleep = clock.sleep_until(began + 10 * SECOND);
        tokio::pin!(sleep);
        assert!(tokio::time::timeout(4 * SECOND, &mut sleep).await.is_err());
        clock.suspend();
        assert!(tokio::time::timeout(100 * SECOND, &mut sleep).await.is_err(), "it woke while suspended");
        clock.suspend();
        assert_eq!(clock.now() - began, 4 * SECOND);
        clock.go_on();
        clock.go_on();
        sleep.await;
        assert_eq!((clock.now() - began, real.elapsed()), (10 * SECOND, 110 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_due_waits_for_the_end_of_the_suspension() {
        let clock = Clock::default();
        clock.suspend();
        let sleep = clock.sleep_until(clock.now());
        tokio::pin!(sleep);
        assert!(tokio::time::timeout(SECOND, &mut sleep).await.is_err());
        clock.go_on();
        sleep.await;
    }
}
