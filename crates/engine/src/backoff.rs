//! Pauses between attempts.

use crate::config::EngineConfig;

/// Pauses that double.
#[derive(Clone, Copy)]
pub(crate) struct Backoff {
    next_ms: u64,
    max_ms: u64,
}

impl Backoff {
    pub(crate) fn new(config: &EngineConfig) -> Self {
        let first = config.retry_first_ms.max(1);
        Self { next_ms: first, max_ms: config.retry_max_ms.max(first) }
    }

    pub(crate) fn next_ms(&mut self) -> u64 {
        let pause = self.next_ms;
        self.next_ms = pause.saturating_mul(2).min(self.max_ms);
        pause
    }
}
