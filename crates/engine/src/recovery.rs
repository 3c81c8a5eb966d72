//! Bringing records and world together when the engine starts.
//!
//! Every live record gets its task, which adopts the sandbox, rolls back a creation or finishes an
//! ending; see [`crate::actor`]. What the driver still has of a session that is recorded as ended is destroyed. No
//! caller is served before each of these has been tried once, and previews are reachable again. Snapshots and volumes go on where
//! they stopped, images and blobs that no record names are removed; that goes on beside.
//!
//! Every sandbox and every volume has a record before it exists, and as long as it exists. One without is not a leftover but has lost its
//! record: it is left alone, unless whoever started the server gave it up.

use std::collections::BTreeSet;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{DiskImageId, SessionId, VolumeId};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::actor::StartMode;
use crate::engine_core::{EngineCore, Records};
use crate::errors::store_error;
use crate::model::{SessionState, SnapshotState};
use crate::ports::{Change, DriverError, Store};
use crate::registry::NameClaim;
use crate::shared::Shared;
use crate::tasks::Running;

/// What was recorded before the start.
pub(crate) async fn read(store: &dyn Store) -> Result<Records, Error> {
    Ok(Records {
        sessions: store.live_sessions().await.map_err(store_error)?,
        snapshots: store.all_snapshots().await.map_err(store_error)?,
        volumes: store.all_volumes().await.map_err(store_error)?,
        previews: store.all_previews().await.map_err(store_error)?,
    })
}

pub(crate) async fn recover(core: &Arc<EngineCore>, records: Records) -> Result<(), Error> {
    let unknown = |what: &str, error: DriverError| {
        tracing::error!(%error, "the driver could not tell which {what} exist");
        Error::new(Code::Internal, format!("the driver could not tell which {what} exist"))
    };
    let records = name_roots(&core.shared, records).await?;
    let mut sandboxes = Vec::new();
    for (name, driver) in core.shared.drivers.all() {
        let found = driver.list().await.map_err(|error| unknown("sandboxes", error))?;
        sandboxes.extend(found.into_iter().map(|id| (name.to_owned(), id)));
    }
    let images = core.shared.host.images().await.map_err(|error| unknown("images", error))?;
    let volumes = core.shared.host.volumes().await.map_err(|error| unknown("volumes", error))?;
    let mut unrecorded = Vec::new();
    for id in volumes.into_iter().filter(|id| !records.volumes.iter().any(|volume| volume.id == *id)) {
        if give_up(&core.shared, "volume", &id) {
            unrecorded.push(id);
        }
    }
    remove_nameless(core, &records, images, unrecorded);

    let live: BTreeSet<SessionId> = records.sessions.iter().map(|session| session.id).collect();
    let mut attempts = Vec::new();
    for session in records.sessions {
        let stopped = matches!(session.state, SessionState::Paused | SessionState::UserShutdown);
        let slot = (!stopped).then(|| core.registry.live.take(session.workspace_id, &session.machine.resources));
        let (attempted, attempt) = oneshot::channel();
        let name = core.registry.live.claim_name(&session).unwrap_or_else(|_| {
            let id = session.id;
            tracing::error!(session = %id, "another session is recorded with the same unique name; rename one of them");
            None
        });
        name.iter().for_each(NameClaim::recorded);
        core.actors.spawn(session, slot, name, StartMode::Recovered { attempted }, core.shared.tasks.enter()?);
        attempts.push(attempt);
    }
    for (driver, id) in sandboxes.into_iter().filter(|(_, id)| !live.contains(id)) {
        if core.shared.store.session(id).await.map_err(store_error)?.is_none() && !give_up(&core.shared, "sandbox", &id)
        {
            continue;
        }
        let (attempted, attempt) = oneshot::channel();
        tokio::spawn(sweep(core.shared.clone(), driver, id, attempted, core.shared.tasks.enter()?));
        attempts.push(attempt);
    }
    await_attempts(&core.shared, attempts).await;
    core.previews.recover(records.previews).await;
    records.volumes.into_iter().for_each(|volume| core.volumes.recover(volume));
    records.snapshots.into_iter().for_each(|snapshot| core.snapshots.recover(snapshot));
    core.snapshots.keep_freeing();
    Ok(())
}

/// Records of servers that knew one image only say nothing of it: they get what the disk says, else the host's own image.
/// What no record needs is removed then.
async fn name_roots(shared: &Shared, mut records: Records) -> Result<Records, Error> {
    let mut changes = Vec::new();
    for session in records.sessions.iter_mut().filter(|session| session.machine.root.is_unknown()) {
        let of_disk = shared.host.root_of(session.id).await.ok().flatten();
        session.machine.root = of_disk.unwrap_or_else(|| shared.host.default_root());
        // Nor did they name the driver before its sandbox was up.
        if session.driver.is_empty() {
            session.driver = shared.drivers.default_name().to_owned();
        }
        session.isolation = shared.drivers.find(&session.driver).map(|driver| driver.capabilities().isolation);
        changes.push(Change::Session(session.clone()));
    }
    for snapshot in records.snapshots.iter_mut().filter(|snapshot| snapshot.machine.root.is_unknown()) {
        snapshot.machine.root = shared.host.default_root();
        changes.push(Change::Snapshot(snapshot.clone()));
    }
    if !changes.is_empty() {
        shared.write(changes).await?;
    }
    let of_sessions = records.sessions.iter().map(|session| &session.machine.root);
    let of_snapshots = records.snapshots.iter().map(|snapshot| &snapshot.machine.root);
    let used: Vec<_> = of_sessions.chain(of_snapshots).cloned().collect();
    if let Err(error) = shared.host.retain_roots(&used).await {
        tracing::warn!(%error, "root file systems that nobody needs could not be removed");
    }
    Ok(records)
}

/// Whether something without a record is to be removed.
fn give_up(shared: &Shared, what: &str, id: &dyn std::fmt::Display) -> bool {
    let discard = shared.config.discard_unrecorded;
    if discard {
        tracing::warn!(%id, "a {what} that no record names is removed, as was asked for");
    } else {
        tracing::error!(%id, "a {what} that no record names is left alone; `nagaya recover` gives it a record");
    }
    discard
}

/// Waits until all have been tried once, or until what is left shows no sign for a while: one sandbox that hangs shall not
/// keep the others from their callers.
async fn await_attempts(shared: &Shared, attempts: Vec<oneshot::Receiver<()>>) {
    // Tasks drop their end when they have tried; there is nothing to receive.
    let tried = |attempt: oneshot::Receiver<()>| async { drop(attempt.await) };
    let mut waiting: JoinSet<()> = attempts.into_iter().map(tried).collect();
    loop {
        let patience = shared.clock.sleep_until(shared.clock.now() + shared.config.recovery_patience_ms);
        tokio::select! {
            biased;
            next = waiting.join_next() => if next.is_none() { return },
            () = patience => {
                tracing::warn!(sandboxes = waiting.len(), "some do not answer; they are tried again while others are served");
                return;
            }
        }
    }
}

/// Removes images that no record names, and volumes that are given up.
fn remove_nameless(core: &Arc<EngineCore>, records: &Records, images: Vec<DiskImageId>, volumes: Vec<VolumeId>) {
    // Sessions in creation remove their images themselves, with all the rest of them.
    let of_sessions = records.sessions.iter().filter_map(|session| session.source_image_id);
    let unfinished = records.snapshots.iter().filter(|of| of.state == SnapshotState::Creating && of.copied);
    let named: BTreeSet<DiskImageId> = of_sessions.chain(unfinished.map(|of| of.image_id)).collect();
    let removing = core.clone();
    core.shared.background(async move {
        for image in images.into_iter().filter(|image| !named.contains(image)) {
            removing.snapshots.remove_image(image).await;
        }
        for id in volumes {
            let what = "a volume that no record names could not be removed";
            removing.shared.insist(what, || removing.shared.host.remove_volume(id)).await;
        }
    });
}

/// Destroys a sandbox that no live record names, however long that takes.
async fn sweep(shared: Arc<Shared>, driver: String, id: SessionId, attempted: oneshot::Sender<()>, _running: Running) {
    let driver = shared.drivers.of(&driver);
    let mut attempted = Some(attempted);
    let mut backoff = shared.backoff();
    while let Err(error) = driver.destroy(id).await {
        tracing::warn!(session = %id, %error, "a leftover sandbox could not be removed; trying again");
        drop(attempted.take());
        if !shared.pause(backoff.next_ms()).await {
            return;
        }
    }
}
