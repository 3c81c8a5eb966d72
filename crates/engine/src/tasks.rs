//! Counting the engine's tasks and asking them to stop.

use nagaya_api::error::{Code, Error};
use tokio::sync::watch;

/// The engine's running tasks, and whether they shall end.
pub(crate) struct Tasks {
    running: watch::Sender<usize>,
    stopping: watch::Sender<bool>,
}

/// Held by a task while it runs.
pub(crate) struct Running(watch::Sender<usize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.send_modify(|running| *running -= 1);
    }
}

impl Tasks {
    pub(crate) fn new() -> Self {
        Self { running: watch::Sender::new(0), stopping: watch::Sender::new(false) }
    }

    /// Announces a task; refused with `draining` once the engine stops.
    pub(crate) fn enter(&self) -> Result<Running, Error> {
        // Counted before looking, so that `stop` either sees this task or is seen by it.
        self.running.send_modify(|running| *running += 1);
        let running = Running(self.running.clone());
        self.check()?;
        Ok(running)
    }

    /// Refuses new work once the engine stops.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.is_stopping() { Err(Code::Draining.into()) } else { Ok(()) }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Completes when the engine stops.
    pub(crate) async fn stopping(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    /// Asks all tasks to end, and waits until they have.
    pub(crate) async fn stop(&self) {
        self.stopping.send_replace(true);
        let _ = self.running.subscribe().wait_for(|running| *running == 0).await;
    }
}
