//! What happens without being asked for: sandboxes end, or power themselves off.

use std::sync::Arc;

use nagaya_engine::ports::Ended;

use super::core::DriverCore;
use super::running::RunningSandbox;
use crate::agent_client::Link;

impl DriverCore {
    /// Tells when a sandbox ends unasked.
    pub(super) fn watch(self: &Arc<Self>, running: &Arc<RunningSandbox>) {
        let (inner, running) = (self.clone(), running.clone());
        tokio::spawn(async move {
            running.pidfd.ended().await;
            if running.begin_ending() {
                let cause = "the sandbox's first process ended unexpectedly".to_owned();
                inner.tell(Ended { id: running.id, powered_off: false, cause });
            }
        });
    }

    /// Tells when a sandbox powers itself off, as long as this connection to it lasts.
    pub(super) fn watch_power(self: &Arc<Self>, running: &Arc<RunningSandbox>, link: &Arc<Link>) {
        running.set_link(link.clone());
        let (inner, running, link) = (self.clone(), running.clone(), link.clone());
        tokio::spawn(async move {
            if !link.await_power_off().await || !running.begin_ending() {
                return;
            }
            let (noting, id) = (inner.clone(), running.id);
            if let Err(error) = crate::host::blocking(move || noting.note_power_off(id, true)).await {
                tracing::warn!(%error, %id, "could not write down that a sandbox powered itself off");
            }
            let cause = "the sandbox powered itself off".to_owned();
            inner.tell(Ended { id, powered_off: true, cause });
        });
    }

    fn tell(&self, ended: Ended) {
        // Nobody listens any more when the server shuts down.
        let _ = self.ends.send(ended);
    }
}
