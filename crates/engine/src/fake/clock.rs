use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::model::UnixMs;
use crate::ports::{BoxFuture, Clock};

/// A clock that runs with tokio's, so it stands still where tokio's is paused, and that tests may
/// move forward.
pub struct FakeClock(Arc<Shared>);

struct Shared {
    from: Mutex<(UnixMs, Instant)>,
    jumps: watch::Sender<()>,
    deaf: AtomicBool,
}

impl Shared {
    fn now(&self) -> UnixMs {
        let (base, since) = *self.from.lock().expect("no holder of this lock panics");
        base + since.elapsed().as_millis() as UnixMs
    }
}

impl FakeClock {
    pub fn new(now: UnixMs) -> Self {
        Self(Arc::new(Shared {
            from: Mutex::new((now, Instant::now())),
            jumps: watch::Sender::new(()),
            deaf: AtomicBool::new(false),
        }))
    }

    /// Sets the time, as an operator would; also to go on after the runtime was replaced.
    pub fn set(&self, now: UnixMs) {
        *self.0.from.lock().expect("no holder of this lock panics") = (now, Instant::now());
        self.0.jumps.send_replace(());
    }

    /// Makes sleepers sleep for ever: for tests of tests.
    pub fn set_deaf(&self, deaf: bool) {
        self.0.deaf.store(deaf, Ordering::Relaxed);
    }

    /// Jumps forward at once; sleepers whose time has come wake up.
    pub fn advance(&self, by_ms: u64) {
        self.set(self.now() + by_ms);
    }
}

impl Clock for FakeClock {
    fn now(&self) -> UnixMs {
        self.0.now()
    }

    fn sleep_until(&self, at: UnixMs) -> BoxFuture<()> {
        let shared = self.0.clone();
        Box::pin(async move {
            let mut jumps = shared.jumps.subscribe();
            loop {
                let left = at.saturating_sub(shared.now());
                if left == 0 {
                    return;
                }
                if shared.deaf.load(Ordering::Relaxed) {
                    std::future::pending::<()>().await;
                }
                // This is the clock; there is no other to ask.
                #[allow(clippy::disallowed_methods)]
                let sleep = tokio::time::sleep(Duration::from_millis(left));
                tokio::select! {
                    biased;
                    () = sleep => {}
                    _ = jumps.changed() => {}
                }
            }
        })
    }
}
