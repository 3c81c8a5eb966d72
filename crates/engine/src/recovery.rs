//! Bringing records and world together when the engine starts.
//!
//! Every live record gets its task, which adopts the sandbox, rolls back a creation or finishes an
//! ending; see [`crate::actor`]. What the driver has and no live record names is destroyed. No
//! caller is served before each of these has been tried once, and previews are reachable again. Snapshots and volumes go on where
//! they stopped, images, volumes and blobs that no record names are removed; that goes on beside.

use std::collections::BTreeSet;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{ImageId, SessionId, VolumeId};
use tokio::sync::oneshot;

use crate::actor::{Birth, store_error};
use crate::inner::Inner;
use crate::model::{Preview, Session, SessionState, Snapshot, SnapshotState, Volume};
use crate::ports::{DriverError, Store};
use crate::tasks::Running;

/// What was recorded before the start.
pub(crate) struct Records {
    pub(crate) sessions: Vec<Session>,
    pub(crate) snapshots: Vec<Snapshot>,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) previews: Vec<Preview>,
}

pub(crate) async fn read(store: &dyn Store) -> Result<Records, Error> {
    Ok(Records {
        sessions: store.live_sessions().await.map_err(store_error)?,
        snapshots: store.all_snapshots().await.map_err(store_error)?,
        volumes: store.all_volumes().await.map_err(store_error)?,
        previews: store.all_previews().await.map_err(store_error)?,
    })
}

pub(crate) async fn recover(engine: &Arc<Inner>, records: Records) -> Result<(), Error> {
    let unknown = |what: &str, error: DriverError| {
        tracing::error!(%error, "the driver could not tell which {what} exist");
        Error::new(Code::Internal, format!("the driver could not tell which {what} exist"))
    };
    let sandboxes = engine.driver.list().await.map_err(|error| unknown("sandboxes", error))?;
    let images = engine.driver.images().await.map_err(|error| unknown("images", error))?;
    let volumes = engine.driver.volumes().await.map_err(|error| unknown("volumes", error))?;
    remove_nameless(engine, &records, images, volumes);

    let live: BTreeSet<SessionId> = records.sessions.iter().map(|session| session.id).collect();
    let mut attempts = Vec::new();
    for session in records.sessions {
        let stopped = matches!(session.state, SessionState::Paused | SessionState::UserShutdown);
        let slot = (!stopped).then(|| engine.registry.take(session.workspace_id, &session.machine));
        let (attempted, attempt) = oneshot::channel();
        engine.spawn(session, slot, Birth::Recovered { attempted }, engine.tasks.enter()?);
        attempts.push(attempt);
    }
    for id in sandboxes.into_iter().filter(|id| !live.contains(id)) {
        let (attempted, attempt) = oneshot::channel();
        tokio::spawn(sweep(engine.clone(), id, attempted, engine.tasks.enter()?));
        attempts.push(attempt);
    }
    for attempt in attempts {
        // Tasks drop their end when they have tried; there is nothing to receive.
        let _ = attempt.await;
    }
    engine.recover_previews(records.previews).await;
    records.volumes.into_iter().for_each(|volume| engine.recover_volume(volume));
    records.snapshots.into_iter().for_each(|snapshot| engine.recover_snapshot(snapshot));
    let freeing = engine.clone();
    engine.background(async move {
        freeing.insist("blobs that no snapshot needs could not be removed", || freeing.free_blobs()).await;
    });
    Ok(())
}

/// Removes images and volumes that no record names.
fn remove_nameless(engine: &Arc<Inner>, records: &Records, images: Vec<ImageId>, volumes: Vec<VolumeId>) {
    // Sessions in creation remove their images themselves, with all the rest of them.
    let of_sessions = records.sessions.iter().filter_map(|session| session.source_image_id);
    let unfinished = records.snapshots.iter().filter(|of| of.state == SnapshotState::Creating && of.copied);
    let named: BTreeSet<ImageId> = of_sessions.chain(unfinished.map(|of| of.image_id)).collect();
    let known: BTreeSet<VolumeId> = records.volumes.iter().map(|volume| volume.id).collect();
    let removing = engine.clone();
    engine.background(async move {
        for image in images.into_iter().filter(|image| !named.contains(image)) {
            removing.remove_image(image).await;
        }
        for id in volumes.into_iter().filter(|id| !known.contains(id)) {
            let what = "a volume that no record names could not be removed";
            removing.insist(what, || removing.driver.remove_volume(id)).await;
        }
    });
}

/// Destroys a sandbox that no live record names, however long that takes.
async fn sweep(engine: Arc<Inner>, id: SessionId, attempted: oneshot::Sender<()>, _running: Running) {
    let mut attempted = Some(attempted);
    let mut backoff = engine.backoff();
    while let Err(error) = engine.driver.destroy(id).await {
        tracing::warn!(session = %id, %error, "a leftover sandbox could not be removed; trying again");
        drop(attempted.take());
        if !engine.pause(backoff.next_ms()).await {
            return;
        }
    }
}
