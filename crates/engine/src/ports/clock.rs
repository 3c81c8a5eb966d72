//! Time and randomness. `nagaya-daemon` implements them with the host's.

use std::future::Future;
use std::pin::Pin;

use crate::model::UnixMs;

pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Wall-clock time. Deadlines are wall-clock times, so that they mean the same after a restart.
pub trait Clock: Send + Sync + 'static {
    fn now(&self) -> UnixMs;
    /// Completes at or after the given time, also when the wall clock jumps past it.
    fn sleep_until(&self, at: UnixMs) -> BoxFuture<()>;
}

pub trait Entropy: Send + Sync + 'static {
    fn fill(&self, bytes: &mut [u8]);
}
