//! Snapshots: taken from a session's disk, stored as blobs, brought to the durable place, deleted.
//!
//! ```text
//!   CREATING ─── disk copied ─── blobs stored ──▶ READY, on this machine ─── uploaded ──▶ READY, durable
//!       └──────────── failed ──▶ FAILED              └────────── delete, expiry ──▶ DELETING ──▶ gone
//! ```
//!
//! One task carries a snapshot through its steps, each recorded when it is done, so that the next start goes on
//! where the last one stopped. Only the copy needs the session, and asks its task for it.

use std::path::Path;
use std::sync::{Arc, Mutex};

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{DiskImageId, SessionId, SnapshotId};
use tokio::sync::{RwLock, oneshot};

use crate::access::Caller;
use crate::deadlines::Sleeper;
use crate::errors::store_error;
use crate::event_log::Events;
use crate::handle::{Job, Reply, SessionHandle};
use crate::model::{Durability, EventKind, Session, Snapshot, SnapshotKind, SnapshotState};
use crate::ports::{BlobError, Blobs, Change, ImageReader, SnapshotQuery, StoredImage};
use crate::registry::Registry;
use crate::requests::{ListSnapshots, NewSnapshot, SnapshotUpdate};
use crate::session::Request;
use crate::shared::{Shared, spawn_running};
use crate::volumes::Volumes;
use crate::workspaces::Workspaces;
use crate::{query, validate};

/// A blocking creation waits this long for its snapshot to become durable as well, which is at once where the
/// durable place is this machine.
const DURABLE_WAIT_MS: u64 = 100;
/// Times kept for [`Snapshots::take_source_stops`]; later ones are dropped until they are taken.
const SOURCE_STOPS_MAX: usize = 10_000;

/// The snapshots of the server.
pub(crate) struct Snapshots {
    shared: Arc<Shared>,
    workspaces: Arc<Workspaces>,
    registry: Arc<Registry>,
    events: Arc<Events>,
    volumes: Arc<Volumes>,
    blobs: Arc<dyn Blobs>,
    /// Read by those who store blobs until they are recorded, written by who removes those not recorded.
    gate: RwLock<()>,
    /// How long sources were frozen, microseconds.
    source_stops_us: Mutex<Vec<u64>>,
}

impl Snapshots {
    pub(crate) fn new(
        shared: Arc<Shared>,
        workspaces: Arc<Workspaces>,
        registry: Arc<Registry>,
        events: Arc<Events>,
        volumes: Arc<Volumes>,
        blobs: Arc<dyn Blobs>,
    ) -> Self {
        let (gate, source_stops_us) = (RwLock::default(), Mutex::default());
        Self { shared, workspaces, registry, events, volumes, blobs, gate, source_stops_us }
    }

    pub(crate) async fn create(
        self: &Arc<Self>,
        caller: &Caller,
        id: SessionId,
        new: NewSnapshot,
    ) -> Result<Snapshot, Error> {
        let running = self.shared.tasks.enter()?;
        validate::name(&new.name)?;
        let now = self.shared.clock.now();
        validate::expires_at(new.expires_at, now)?;
        let live = self.registry.find_live(caller, id, Request::Copy).await?;
        let snapshot = self.new_snapshot(&live.session(now), new.name, new.expires_at);
        let (reply, answer) = oneshot::channel();
        spawn_running(running, self.clone().take(live, snapshot, new.wait, reply));
        answer.await.unwrap_or_else(|_| Err(Code::Draining.into()))
    }

    pub(crate) async fn get(&self, caller: &Caller, id: SnapshotId) -> Result<Snapshot, Error> {
        let snapshot = self.shared.store.snapshot(id).await.map_err(store_error)?;
        snapshot.filter(|of| of.workspace_id == caller.workspace_id).ok_or_else(|| Code::SnapshotNotFound.into())
    }

    pub(crate) async fn list(&self, caller: &Caller, list: ListSnapshots) -> Result<(Vec<Snapshot>, String), Error> {
        let workspace = self.shared.access.workspace(caller, list.workspace_id)?;
        let size = query::page_size(list.page_size)?;
        let before = query::parse_page_token(&list.page_token)?.map(|(at, id)| (at, SnapshotId::from_uuid(id)));
        let (workspace_id, limit) = (Some(workspace.id), size + 1);
        let query = SnapshotQuery { workspace_id, session_id: list.session_id, dangling: list.dangling, before, limit };
        let mut snapshots = self.shared.store.snapshots(query).await.map_err(store_error)?;
        let next = query::page(&mut snapshots, size, |last| (last.created_at, *last.id.as_uuid()));
        Ok((snapshots, next))
    }

    pub(crate) async fn update(
        self: &Arc<Self>,
        caller: &Caller,
        id: SnapshotId,
        update: SnapshotUpdate,
    ) -> Result<Snapshot, Error> {
        let snapshots = self.clone();
        let workspace_id = caller.workspace_id;
        if let Some(name) = &update.name {
            validate::name(name)?;
        }
        validate::expires_at(update.expires_at.flatten(), self.shared.clock.now())?;
        let tags = update.tags.map(validate::tags).transpose()?;
        let change = move |snapshot: &mut Snapshot| {
            if snapshot.workspace_id != workspace_id {
                return Err(Code::SnapshotNotFound.into());
            }
            if snapshot.kind == SnapshotKind::Pause {
                return Err(in_use("it is that of a pause"));
            }
            snapshot.name = update.name.clone().unwrap_or_else(|| snapshot.name.clone());
            snapshot.expires_at = update.expires_at.unwrap_or(snapshot.expires_at);
            snapshot.tags = tags.clone().unwrap_or_else(|| snapshot.tags.clone());
            Ok(())
        };
        self.shared
            .detached(async move {
                let changed = snapshots.change(id, change).await?;
                snapshots.look_at(id);
                Ok(changed)
            })
            .await
    }

    pub(crate) async fn delete(self: &Arc<Self>, caller: &Caller, id: SnapshotId) -> Result<Snapshot, Error> {
        let (snapshots, workspace_id) = (self.clone(), caller.workspace_id);
        self.shared
            .detached(async move {
                let snapshot = snapshots.begin_delete(id, |of| of.workspace_id == workspace_id).await?;
                if let Err(error) = snapshots.finish_delete(id).await {
                    tracing::warn!(snapshot = %id, %error, "a snapshot could not be deleted; trying again");
                    snapshots.keep_deleting(id);
                    let detail =
                        "the snapshot is being deleted, but its space is not free yet; the server keeps trying";
                    return Err(Error::new(Code::SnapshotFailed, detail));
                }
                Ok(snapshot)
            })
            .await
    }

    pub(crate) async fn open(&self, caller: &Caller, id: SnapshotId) -> Result<ImageReader, Error> {
        let snapshot = self.get(caller, id).await?;
        if snapshot.state != SnapshotState::Ready || snapshot.manifest.is_empty() {
            return Err(not_ready(&snapshot));
        }
        self.blobs.open(&snapshot.manifest).await.map_err(blob_error)
    }

    pub(crate) fn take_source_stops(&self) -> Vec<u64> {
        std::mem::take(&mut self.source_stops_us.lock().expect("no holder of this lock panics"))
    }

    /// A snapshot that sessions can be made from.
    pub(crate) async fn usable(&self, caller: &Caller, id: SnapshotId) -> Result<Snapshot, Error> {
        let snapshot = self.get(caller, id).await?;
        let expired = snapshot.expires_at.is_some_and(|at| at <= self.shared.clock.now());
        match snapshot.state {
            SnapshotState::Deleting => Err(Code::SnapshotNotFound.into()),
            _ if expired => Err(Code::SnapshotNotFound.into()),
            SnapshotState::Ready => Ok(snapshot),
            SnapshotState::Creating | SnapshotState::Failed => Err(not_ready(&snapshot)),
        }
    }

    /// Makes a stored disk image at this path.
    pub(crate) async fn restore(&self, manifest: &str, image: &Path) -> Result<(), BlobError> {
        self.blobs.restore(manifest, image).await
    }

    fn new_snapshot(&self, session: &Session, name: String, expires_at: Option<u64>) -> Snapshot {
        let now = self.shared.clock.now();
        let retention_ms = self.shared.access.settings(session.workspace_id).snapshot_retention_ms;
        Snapshot {
            id: SnapshotId::new(now, self.shared.random()),
            workspace_id: session.workspace_id,
            session_id: session.id,
            name,
            kind: SnapshotKind::User,
            state: SnapshotState::Creating,
            durability: Durability::None,
            tags: Vec::new(),
            created_at: now,
            expires_at: expires_at.or_else(|| retention_ms.map(|ms| now.saturating_add(ms))),
            local_ready_at: None,
            durable_at: None,
            machine: session.machine.clone(),
            env: session.env.clone(),
            image_id: DiskImageId::new(now, self.shared.random()),
            copied: false,
            source_stopped_us: 0,
            manifest: String::new(),
            size_bytes: 0,
            stored_bytes: 0,
            failure_reason: String::new(),
            propagation_error: String::new(),
        }
    }

    /// Reads a snapshot's record, changes and commits it, with nobody else at it. One that is being
    /// deleted is not there any more.
    async fn change(
        &self,
        id: SnapshotId,
        change: impl FnOnce(&mut Snapshot) -> Result<(), Error>,
    ) -> Result<Snapshot, Error> {
        let _quiet = self.workspaces.quiet().await;
        let snapshot = self.shared.store.snapshot(id).await.map_err(store_error)?;
        let mut snapshot = snapshot
            .filter(|of| of.state != SnapshotState::Deleting)
            .ok_or_else(|| Error::from(Code::SnapshotNotFound))?;
        let before = snapshot.state;
        change(&mut snapshot)?;
        let told = outcome(before, &snapshot).map(|fact| self.events.event(snapshot.session_id, fact));
        self.shared.write([Change::Snapshot(snapshot.clone())].into_iter().chain(told).collect()).await?;
        self.events.tell(snapshot.session_id);
        Ok(snapshot)
    }

    /// Records a step that is done, however long that takes. False when the engine stops.
    async fn record_step(&self, id: SnapshotId, change: impl Fn(&mut Snapshot)) -> bool {
        let step = || async {
            let changed = self.change(id, |snapshot| {
                change(snapshot);
                Ok(())
            });
            match changed.await {
                Err(error) if error.code == Code::SnapshotNotFound => Ok(()),
                other => other.map(|_| ()),
            }
        };
        self.shared.insist("a snapshot's progress could not be recorded", step).await
    }

    async fn take(self: Arc<Self>, live: Arc<SessionHandle>, snapshot: Snapshot, wait: bool, reply: Reply<Snapshot>) {
        if let Err(error) = self.record(&snapshot).await {
            let _ = reply.send(Err(error));
            return;
        }
        let (id, image) = (snapshot.id, snapshot.image_id);
        let reply = match wait {
            true => Some(reply),
            false => {
                let _ = reply.send(Ok(snapshot));
                None
            }
        };
        match self.copy_and_store(&live, id, image).await {
            Ok(stored) => self.answer_and_upload(id, stored.manifest, reply).await,
            Err(error) => {
                let failed = self.record_failure(id, &error).await;
                if let Some(reply) = reply {
                    let _ = reply.send(Err(error));
                }
                if failed {
                    self.clean_up(id, image).await;
                }
            }
        }
    }

    /// Records a snapshot to be taken, if its workspace may have one more.
    async fn record(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let _quiet = self.workspaces.quiet().await;
        let settings = self.shared.access.settings(snapshot.workspace_id);
        if settings.snapshots_max.is_some() || settings.bytes_max.is_some() {
            let others = self.workspaces.snapshots(snapshot.workspace_id).await?;
            let count = others.iter().filter(|of| of.kind == SnapshotKind::User).count();
            if let Some(max) = settings.snapshots_max.filter(|max| count >= *max as usize) {
                return Err(Error::new(Code::QuotaExceeded, format!("the workspace's snapshots_max is {max}")));
            }
            let bytes = self.volumes.bytes_used(snapshot.workspace_id, &others);
            if let Some(max) = settings.bytes_max.filter(|max| bytes >= *max) {
                return Err(Error::new(Code::QuotaExceeded, format!("the workspace's bytes_max is {max}")));
            }
        }
        self.shared.write(vec![Change::Snapshot(snapshot.clone())]).await?;
        self.shared.deadlines.set(Sleeper::Snapshot(snapshot.id), snapshot.expires_at);
        Ok(())
    }

    async fn copy_and_store(
        &self,
        live: &SessionHandle,
        id: SnapshotId,
        image: DiskImageId,
    ) -> Result<StoredImage, Error> {
        let stopped_us = live.ask_job(|reply| Job::Copy { images: vec![image], pause: None, reply }).await?;
        {
            let mut stops = self.source_stops_us.lock().expect("no holder of this lock panics");
            if stops.len() < SOURCE_STOPS_MAX {
                stops.push(stopped_us);
            }
        }
        let copied = |snapshot: &mut Snapshot| {
            snapshot.copied = true;
            snapshot.source_stopped_us = stopped_us;
        };
        if !self.record_step(id, copied).await {
            return Err(Code::Draining.into());
        }
        self.store_copy(id, image).await
    }

    /// Stores the copy of the disk as blobs, and removes it.
    async fn store_copy(&self, id: SnapshotId, image: DiskImageId) -> Result<StoredImage, Error> {
        let stored = {
            let _gate = self.gate.read().await;
            let stored = self.blobs.store(&self.shared.host.image_path(image)).await.map_err(blob_error)?;
            let now = self.shared.clock.now();
            let ready = |snapshot: &mut Snapshot| {
                snapshot.state = SnapshotState::Ready;
                snapshot.durability = Durability::LocalReady;
                snapshot.local_ready_at = Some(now);
                snapshot.manifest = stored.manifest.clone();
                snapshot.size_bytes = stored.size_bytes;
                snapshot.stored_bytes = stored.stored_bytes;
            };
            if !self.record_step(id, ready).await {
                return Err(Code::Draining.into());
            }
            stored
        };
        self.remove_image(image).await;
        self.look_at(id);
        Ok(stored)
    }

    pub(crate) async fn remove_image(&self, image: DiskImageId) {
        self.shared.insist("a disk image could not be removed", || self.shared.host.remove_image(image)).await;
    }

    /// False when the engine stops, and leaves the rest to the next start.
    async fn record_failure(&self, id: SnapshotId, error: &Error) -> bool {
        if error.code == Code::Draining {
            return false;
        }
        tracing::warn!(snapshot = %id, %error, "a snapshot failed");
        let reason = match error.detail.is_empty() {
            true => error.to_string(),
            false => error.detail.clone(),
        };
        let failed = |snapshot: &mut Snapshot| {
            snapshot.state = SnapshotState::Failed;
            snapshot.failure_reason = reason.clone();
        };
        self.record_step(id, failed).await
    }

    /// Removes what a snapshot that failed has left.
    async fn clean_up(&self, id: SnapshotId, image: DiskImageId) {
        self.remove_image(image).await;
        // Part of it may have been stored.
        self.insist_on_freeing().await;
        self.look_at(id);
    }

    async fn answer_and_upload(&self, id: SnapshotId, manifest: String, reply: Option<Reply<Snapshot>>) {
        let mut upload = std::pin::pin!(self.upload(id, &manifest));
        let Some(reply) = reply else { return upload.await };
        let uploaded = tokio::select! {
            biased;
            () = &mut upload => true,
            _ = self.shared.pause(DURABLE_WAIT_MS) => false,
        };
        let snapshot = self.shared.store.snapshot(id).await.map_err(store_error);
        let _ = reply.send(snapshot.and_then(|of| of.ok_or_else(|| Code::SnapshotNotFound.into())));
        if !uploaded {
            upload.await;
        }
    }

    /// Brings a READY snapshot to the durable place, however long that takes; until it is deleted or the engine stops.
    async fn upload(&self, id: SnapshotId, manifest: &str) {
        let mut backoff = self.shared.backoff();
        loop {
            let result = tokio::select! {
                biased;
                () = self.shared.tasks.stopping() => return,
                result = self.blobs.upload(manifest) => result,
            };
            let now = self.shared.clock.now();
            let outcome = |snapshot: &mut Snapshot| match &result {
                Ok(()) => {
                    snapshot.durability = Durability::Durable;
                    snapshot.durable_at = Some(now);
                    snapshot.propagation_error.clear();
                    Ok(())
                }
                Err(error) => {
                    snapshot.durability = Durability::PropagationFailed;
                    snapshot.propagation_error = error.to_string();
                    Ok(())
                }
            };
            match self.change(id, outcome).await {
                Err(error) if error.code == Code::SnapshotNotFound => return,
                Ok(_) if result.is_ok() => return,
                _ => tracing::warn!(snapshot = %id, ?result, "a snapshot is not durable yet; trying again"),
            }
            if !self.shared.pause(backoff.next_ms()).await {
                return;
            }
        }
    }

    /// Records that a snapshot is to go, unless something needs it.
    async fn begin_delete(&self, id: SnapshotId, may: impl FnOnce(&Snapshot) -> bool) -> Result<Snapshot, Error> {
        let _quiet = self.workspaces.quiet().await;
        let snapshot = self.shared.store.snapshot(id).await.map_err(store_error)?;
        let mut snapshot = snapshot.filter(may).ok_or_else(|| Error::from(Code::SnapshotNotFound))?;
        match (snapshot.kind, snapshot.state) {
            (_, SnapshotState::Deleting) => return Ok(snapshot),
            (_, SnapshotState::Creating) => return Err(in_use("it is being created")),
            (SnapshotKind::Pause, _) => return Err(in_use("it is that of a pause")),
            _ => {}
        }
        let uses = |live: &Arc<SessionHandle>| {
            let session = live.published.borrow();
            session.source_snapshot_id == Some(id) && !session.state.is_terminal()
        };
        if let Some(user) = self.registry.live.all().iter().find(|live| uses(live)) {
            return Err(in_use(&format!("session {} was made from it", user.id)));
        }
        snapshot.state = SnapshotState::Deleting;
        self.shared.write(vec![Change::Snapshot(snapshot.clone())]).await?;
        self.shared.deadlines.set(Sleeper::Snapshot(id), None);
        Ok(snapshot)
    }

    /// Frees the space that only this snapshot needs, then forgets it. Can be repeated.
    async fn finish_delete(&self, id: SnapshotId) -> Result<(), Error> {
        self.free_blobs().await?;
        let _quiet = self.workspaces.quiet().await;
        self.shared.write(vec![Change::ForgetSnapshot(id)]).await
    }

    /// Removes every blob that no snapshot needs.
    async fn free_blobs(&self) -> Result<(), Error> {
        let _gate = self.gate.write().await;
        let snapshots = self.shared.store.all_snapshots().await.map_err(store_error)?;
        let kept = snapshots.into_iter().filter(|of| of.state != SnapshotState::Deleting && !of.manifest.is_empty());
        let manifests: Vec<String> = kept.map(|of| of.manifest).collect();
        let freed = self.blobs.retain(&manifests).await.map_err(blob_error)?;
        tracing::debug!(freed, "blobs that no snapshot needs were removed");
        Ok(())
    }

    async fn insist_on_freeing(&self) {
        self.shared.insist("blobs that no snapshot needs could not be removed", || self.free_blobs()).await;
    }

    /// Removes what the last server left of blobs that no snapshot needs.
    pub(crate) fn keep_freeing(self: &Arc<Self>) {
        let snapshots = self.clone();
        self.shared.background(async move { snapshots.insist_on_freeing().await });
    }

    fn keep_deleting(self: &Arc<Self>, id: SnapshotId) {
        let snapshots = self.clone();
        self.shared.background(async move {
            snapshots.shared.insist("a snapshot could not be deleted", || snapshots.finish_delete(id)).await;
        });
    }

    /// Has a look soon at whether the snapshot has expired, or when it will.
    pub(crate) fn look_at(&self, id: SnapshotId) {
        self.shared.deadlines.set(Sleeper::Snapshot(id), Some(self.shared.clock.now()));
    }

    /// Deletes a snapshot whose time has come, unless something needs it: then its end is when this is asked again.
    pub(crate) fn expire(self: &Arc<Self>, id: SnapshotId) {
        let snapshots = self.clone();
        self.shared.background(async move {
            let now = snapshots.shared.clock.now();
            let due = match snapshots.shared.store.snapshot(id).await {
                Ok(Some(snapshot)) if snapshot.kind != SnapshotKind::Pause => snapshot.expires_at,
                Ok(_) => return,
                Err(_) => Some(now.saturating_add(snapshots.shared.config.retry_max_ms)),
            };
            if due.is_none_or(|at| at > now) {
                return snapshots.shared.deadlines.set(Sleeper::Snapshot(id), due);
            }
            match snapshots.begin_delete(id, |of| of.expires_at.is_some_and(|at| at <= now)).await {
                Ok(_) => {
                    snapshots
                        .shared
                        .insist("an expired snapshot could not be deleted", || snapshots.finish_delete(id))
                        .await;
                }
                Err(error) if error.code == Code::Internal => {
                    let again = now.saturating_add(snapshots.shared.config.retry_max_ms);
                    snapshots.shared.deadlines.set(Sleeper::Snapshot(id), Some(again));
                }
                Err(_) => {}
            }
        });
    }

    /// Goes on with a snapshot where the last server stopped.
    pub(crate) fn recover(self: &Arc<Self>, snapshot: Snapshot) {
        let (snapshots, id) = (self.clone(), snapshot.id);
        match (snapshot.kind, snapshot.state) {
            (SnapshotKind::Pause, _) => {}
            (_, SnapshotState::Creating) => self.shared.background(async move {
                let result = match snapshot.copied {
                    true => snapshots.store_copy(id, snapshot.image_id).await,
                    false => {
                        let reason = "the server stopped before the disk was copied";
                        Err(Error::new(Code::SnapshotFailed, reason))
                    }
                };
                match result {
                    Ok(stored) => snapshots.upload(id, &stored.manifest).await,
                    Err(error) => {
                        if snapshots.record_failure(id, &error).await {
                            snapshots.clean_up(id, snapshot.image_id).await;
                        }
                    }
                }
            }),
            (_, SnapshotState::Ready) => {
                self.look_at(id);
                if snapshot.durability != Durability::Durable {
                    self.shared.background(async move { snapshots.upload(id, &snapshot.manifest).await });
                }
            }
            (_, SnapshotState::Failed) => self.look_at(id),
            (_, SnapshotState::Deleting) => self.keep_deleting(id),
        }
    }
}

fn in_use(detail: &str) -> Error {
    Error::new(Code::SnapshotInUse, detail)
}

/// What its session is to remember of a change of a snapshot.
fn outcome(before: SnapshotState, snapshot: &Snapshot) -> Option<EventKind> {
    let snapshot_id = snapshot.id;
    match (before, snapshot.state) {
        (SnapshotState::Creating, SnapshotState::Ready) => Some(EventKind::SnapshotCreated { snapshot_id }),
        (SnapshotState::Creating, SnapshotState::Failed) => {
            Some(EventKind::SnapshotFailed { snapshot_id, cause: snapshot.failure_reason.clone() })
        }
        _ => None,
    }
}

fn not_ready(snapshot: &Snapshot) -> Error {
    let detail = match (snapshot.kind, snapshot.state) {
        (SnapshotKind::Pause, _) => "the disk of a paused session is not kept as blobs".to_owned(),
        (_, SnapshotState::Failed) => format!("it failed: {}", snapshot.failure_reason),
        _ => "it is being created".to_owned(),
    };
    Error::new(Code::SnapshotNotReady, detail)
}

fn blob_error(error: BlobError) -> Error {
    match error {
        BlobError::Missing(_) | BlobError::Corrupt(_) => Error::new(Code::SnapshotDamaged, error.to_string()),
        BlobError::Exhausted(limit) => Error::new(Code::CapacityUnavailable, limit.name()),
        BlobError::Failed(reason) => Error::new(Code::SnapshotFailed, reason),
    }
}
