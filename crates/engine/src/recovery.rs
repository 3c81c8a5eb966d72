//! Bringing records and world together when the engine starts.
//!
//! Every live record gets its task, which adopts the sandbox, rolls back a creation or finishes an
//! ending; see [`crate::actor`]. What the driver has and no live record names is destroyed. No
//! caller is served before each of these has been tried once.

use std::collections::BTreeSet;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::SessionId;
use tokio::sync::oneshot;

use crate::actor::{Birth, store_error};
use crate::inner::Inner;
use crate::tasks::Running;

pub(crate) async fn recover(engine: &Arc<Inner>) -> Result<(), Error> {
    let sessions = engine.store.live_sessions().await.map_err(store_error)?;
    let existing = engine.driver.list().await.map_err(|error| {
        tracing::error!(%error, "the driver could not tell which sandboxes exist");
        Error::new(Code::Internal, "the driver could not tell which sandboxes exist")
    })?;
    let live: BTreeSet<SessionId> = sessions.iter().map(|session| session.id).collect();
    let mut attempts = Vec::new();
    for session in sessions {
        let slot = engine.registry.take(session.workspace_id, &session.machine);
        let (attempted, attempt) = oneshot::channel();
        engine.spawn(session, slot, Birth::Recovered { attempted }, engine.tasks.enter()?);
        attempts.push(attempt);
    }
    for id in existing.into_iter().filter(|id| !live.contains(id)) {
        let (attempted, attempt) = oneshot::channel();
        tokio::spawn(sweep(engine.clone(), id, attempted, engine.tasks.enter()?));
        attempts.push(attempt);
    }
    for attempt in attempts {
        // Tasks drop their end when they have tried; there is nothing to receive.
        let _ = attempt.await;
    }
    Ok(())
}

/// Destroys a sandbox that no live record names, however long that takes.
async fn sweep(engine: Arc<Inner>, id: SessionId, attempted: oneshot::Sender<()>, _running: Running) {
    let mut attempted = Some(attempted);
    let mut backoff = engine.backoff();
    while let Err(error) = engine.driver.destroy(id).await {
        tracing::warn!(session = %id, %error, "a leftover sandbox could not be removed; trying again");
        drop(attempted.take());
        let wake = engine.clock.sleep_until(engine.clock.now() + backoff.next_ms());
        tokio::select! {
            biased;
            () = engine.tasks.stopping() => return,
            () = wake => {}
        }
    }
}
