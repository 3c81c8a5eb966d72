//! What drivers, the host and the clock tell, passed on to whom it concerns.

use std::sync::Arc;

use nagaya_api::error::Error;
use tokio::sync::mpsc;

use crate::deadlines::Sleeper;
use crate::engine_core::EngineCore;
use crate::handle::Exit;
use crate::model::EventKind;
use crate::ports::{Ended, HostEvent};

/// Listens until the engine stops.
pub(crate) fn dispatch(
    core: &Arc<EngineCore>,
    ends: Vec<mpsc::UnboundedReceiver<Ended>>,
    events: mpsc::UnboundedReceiver<HostEvent>,
) -> Result<(), Error> {
    ends.into_iter().try_for_each(|ends| dispatch_ends(core, ends))?;
    dispatch_events(core, events)?;
    dispatch_deadlines(core)
}

/// Passes on what a driver tells.
fn dispatch_ends(core: &Arc<EngineCore>, mut ends: mpsc::UnboundedReceiver<Ended>) -> Result<(), Error> {
    let (core, running) = (core.clone(), core.shared.tasks.enter()?);
    tokio::spawn(async move {
        let _running = running;
        loop {
            let Ended { id, powered_off, cause } = tokio::select! {
                biased;
                () = core.shared.tasks.stopping() => return,
                Some(ended) = ends.recv() => ended,
            };
            if let Some(live) = core.registry.live.get(id) {
                live.set_exit(Exit { cause, powered_off, host_restarted: false });
                live.alarm.notify_one();
            }
        }
    });
    Ok(())
}

/// Passes on what the host tells.
fn dispatch_events(core: &Arc<EngineCore>, mut events: mpsc::UnboundedReceiver<HostEvent>) -> Result<(), Error> {
    let (core, running) = (core.clone(), core.shared.tasks.enter()?);
    tokio::spawn(async move {
        let _running = running;
        loop {
            let event = tokio::select! {
                biased;
                () = core.shared.tasks.stopping() => return,
                Some(event) = events.recv() => event,
            };
            match event {
                HostEvent::MemoryLow => core.registry.release_longest_paused(),
                HostEvent::Refused { id, request, limit } => {
                    if core.registry.live.get(id).is_some() {
                        core.events.record(id, EventKind::Refused { request, limit }, None).await;
                    }
                }
            }
        }
    });
    Ok(())
}

/// Wakes those whose time has come.
fn dispatch_deadlines(core: &Arc<EngineCore>) -> Result<(), Error> {
    let (core, running) = (core.clone(), core.shared.tasks.enter()?);
    tokio::spawn(async move {
        let _running = running;
        let wake = |sleeper| match sleeper {
            Sleeper::Session(id) => {
                if let Some(live) = core.registry.live.get(id) {
                    live.alarm.notify_one();
                }
            }
            Sleeper::Snapshot(id) => core.snapshots.expire(id),
            Sleeper::Preview(id) => core.previews.expire(id),
        };
        core.shared.deadlines.run(&*core.shared.clock, &core.shared.tasks, wake).await;
    });
    Ok(())
}
