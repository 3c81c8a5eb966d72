//! The timer of an HTTP/1.1 connection.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Instant;

use hyper::rt::{Sleep, Timer};

type Inner = Pin<Box<tokio::time::Sleep>>;

/// Waits for one thing at a time, a request's header, and with the same entry in the runtime's list for each of them:
/// moving that on is nearly free, while adding and removing it costs every request a lock.
#[derive(Default)]
pub(super) struct KeptTimer {
    kept: Arc<Mutex<Option<Inner>>>,
}

impl Timer for KeptTimer {
    fn sleep(&self, duration: std::time::Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        let deadline = tokio::time::Instant::from_std(deadline);
        let inner = match self.kept.lock().expect("nothing panics while holding a timer").take() {
            Some(mut inner) => {
                inner.as_mut().reset(deadline);
                inner
            }
            None => Box::pin(tokio::time::sleep_until(deadline)),
        };
        Box::pin(KeptSleep { inner: Some(inner), kept: Arc::clone(&self.kept) })
    }

    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }
}

struct KeptSleep {
    /// `None` only while it is dropped.
    inner: Option<Inner>,
    kept: Arc<Mutex<Option<Inner>>>,
}

impl Sleep for KeptSleep {}

impl Future for KeptSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match &mut self.inner {
            Some(inner) => inner.as_mut().poll(context),
            None => Poll::Ready(()),
        }
    }
}

impl Drop for KeptSleep {
    fn drop(&mut self) {
        if let Ok(mut kept) = self.kept.lock() {
            *kept = self.inner.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_wait_ends_at_its_own_time_and_one_entry_serves_all() {
        let timer = KeptTimer::default();
        let begun = timer.now();
        for (wait_ms, until_ms) in [(500, 500), (20, 520), (1_000, 1_520)] {
            timer.sleep(Duration::from_millis(wait_ms)).await;
            assert_eq!((timer.now() - begun).as_millis(), until_ms);
        }
        // One that is given up does not end a later one.
        let mut given_up = timer.sleep(Duration::from_millis(10));
        assert!(futures::poll!(&mut given_up).is_pending());
        drop(given_up);
        timer.sleep(Duration::from_millis(300)).await;
        assert_eq!((timer.now() - begun).as_millis(), 1_820);
        assert!(timer.kept.lock().unwrap().is_some());
    }
}
