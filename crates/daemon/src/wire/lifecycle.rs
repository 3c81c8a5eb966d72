//! From starting to stopped: what a request may still expect of this server.
//!
//! ```text
//! Starting ── serve ──▶ Serving ── shut down ──▶ Draining ── all answered, or too late ──▶ Stopped
//! ```
//!
//! Draining: nothing new is accepted, long streams end with `draining`, other calls are finished.
//! Stopped: connections that are still open are cut.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Starting,
    Serving,
    Draining,
    Stopped,
}

/// The server's phase, and how many calls must be finished before it may stop.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: watch::Sender<Phase>,
    busy: AtomicUsize,
    /// Notified when the last call has ended.
    all_ended: Notify,
}

impl Lifecycle {
    pub(crate) fn new() -> Arc<Self> {
        let phase = watch::Sender::new(Phase::Starting);
        Arc::new(Self { phase, busy: AtomicUsize::new(0), all_ended: Notify::new() })
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Phases only move forward; going back is ignored.
    pub(crate) fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let forward = *phase < to;
            if forward {
                *phase = to;
            }
            forward
        });
    }

    /// Completes in the given phase, or in a later one.
    pub(crate) fn reached(&self, wanted: Phase) -> impl Future<Output = ()> + Send + 'static {
        let mut phase = self.phase.subscribe();
        async move {
            // An error means that the server is gone altogether, which is later than any phase.
            let _ = phase.wait_for(|phase| *phase >= wanted).await;
        }
    }

    /// Marks a call that is to be finished, until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Busy {
        self.busy.fetch_add(1, Ordering::SeqCst);
        Busy(Arc::clone(self))
    }

    /// Waits until no such call is left, at most for the given time. Says whether that was so.
    pub(crate) async fn quiet(&self, at_most: Duration) -> bool {
        let all_ended = async {
            loop {
                // Begun before the look, so that no end falls in between.
                let mut ended = pin!(self.all_ended.notified());
                ended.as_mut().enable();
                if self.busy.load(Ordering::SeqCst) == 0 {
                    return;
                }
                ended.await;
            }
        };
        tokio::time::timeout(at_most, all_ended).await.is_ok()
    }
}

/// A call that is to be finished before the server stops.
#[derive(Debug)]
pub(crate) struct Busy(Arc<Lifecycle>);

impl Drop for Busy {
    fn drop(&mut self) {
        if self.0.busy.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.all_ended.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_is_quiet_when_the_last_call_has_ended() {
        let lifecycle = Lifecycle::new();
        let (first, second) = (lifecycle.enter(), lifecycle.enter());
        drop(first);
        assert!(!lifecycle.quiet(Duration::from_secs(1)).await);
        let waiting = tokio::spawn({
            let lifecycle = Arc::clone(&lifecycle);
            async move { lifecycle.quiet(Duration::from_secs(1)).await }
        });
        tokio::task::yield_now().await;
        drop(second);
        assert!(waiting.await.unwrap());
        assert!(lifecycle.quiet(Duration::ZERO).await);
    }

    #[test]
    fn phases_never_go_back() {
        let lifecycle = Lifecycle::new();
        lifecycle.advance(Phase::Draining);
        lifecycle.advance(Phase::Serving);
        assert_eq!(lifecycle.phase(), Phase::Draining);
    }
}
