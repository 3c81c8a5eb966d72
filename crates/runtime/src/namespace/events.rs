//! What happens without being asked for: sandboxes end, power themselves off or reach a limit, memory runs low.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use nagaya_engine::ports::DriverEvent;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::live::Live;
use super::{Inner, capacity};
use crate::agent_client::Link;

/// Between two looks at the host's memory.
const MEMORY_LOOK: Duration = Duration::from_secs(1);
/// Between two events about it: what the first one sets off takes a while.
const MEMORY_EVENT: Duration = Duration::from_secs(5);

impl Inner {
    /// Tells when a sandbox ends unasked.
    pub(super) fn watch(self: &Arc<Self>, live: &Arc<Live>) {
        let (inner, live) = (self.clone(), live.clone());
        tokio::spawn(async move {
            live.pidfd.ended().await;
            if live.begin_ending() {
                let cause = "the sandbox's first process ended unexpectedly".to_owned();
                inner.tell(DriverEvent::Ended { id: live.id, powered_off: false, cause });
            }
        });
    }

    /// Tells when a sandbox powers itself off, as long as this connection to it lasts.
    pub(super) fn watch_power(self: &Arc<Self>, live: &Arc<Live>, link: &Arc<Link>) {
        live.set_link(link.clone());
        let (inner, live, link) = (self.clone(), live.clone(), link.clone());
        tokio::spawn(async move {
            if !link.await_power_off().await || !live.begin_ending() {
                return;
            }
            let (noting, id) = (inner.clone(), live.id);
            if let Err(error) = super::blocking(move || noting.note_power_off(id, true)).await {
                tracing::warn!(%error, %id, "could not write down that a sandbox powered itself off");
            }
            let cause = "the sandbox powered itself off".to_owned();
            inner.tell(DriverEvent::Ended { id, powered_off: true, cause });
        });
    }

    /// Tells when the host's memory runs low, until the driver is gone.
    pub(super) fn watch_memory(self: &Arc<Self>) {
        let inner = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut look = tokio::time::interval(MEMORY_LOOK);
            look.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut told: Option<Instant> = None;
            loop {
                look.tick().await;
                let Some(inner) = inner.upgrade() else { return };
                let low = capacity::available_memory_mb().is_some_and(|found| found < inner.config.memory_low_mb);
                if low && told.is_none_or(|told| told.elapsed() >= MEMORY_EVENT) {
                    told = Some(Instant::now());
                    inner.tell(DriverEvent::MemoryLow);
                }
            }
        });
    }

    /// Tells of sandboxes that have used up their connections.
    pub(super) fn watch_connections(self: &Arc<Self>, mut used_up: mpsc::UnboundedReceiver<Ipv4Addr>) {
        let inner = Arc::downgrade(self);
        tokio::spawn(async move {
            while let Some(guest) = used_up.recv().await {
                let Some(inner) = inner.upgrade() else { return };
                let Some(network) = &inner.factory.network else { return };
                let slot = network.slot(guest);
                let id = inner.live().values().find(|live| Some(live.slot) == slot).map(|live| live.id);
                let Some(id) = id else { continue };
                let limit = format!("network.connections_max is {}", network.connections_max());
                inner.tell(DriverEvent::Refused { id, request: "a connection to the outside".to_owned(), limit });
            }
        });
    }

    fn tell(&self, event: DriverEvent) {
        // Nobody listens any more when the server shuts down.
        let _ = self.events.send(event);
    }
}
