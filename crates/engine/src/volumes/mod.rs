//! Volumes: made, grown, deleted, and who has them. A volume has one writer or any number of readers.

mod table;

use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{AttachmentId, SessionId, VolumeId, WorkspaceId};

use crate::access::Caller;
use crate::errors::store_error;
use crate::handle::Job;
use crate::model::{Attachment, AttachmentState, Session, Snapshot, Volume, VolumeState};
use crate::ports::{Change, DriverError, Mount, VolumeQuery};
use crate::registry::Registry;
use crate::requests::{ListVolumes, NewMount, NewVolume, VolumeUpdate};
use crate::session::Request;
use crate::shared::Shared;
use crate::workspaces::Workspaces;
use crate::{query, validate};

use table::VolumeTable;

/// What the caller of a volume operation is told about the driver's refusal.
fn volume_error(error: DriverError) -> Error {
    match error {
        DriverError::Exhausted(limit) => Error::new(Code::CapacityUnavailable, limit.name()),
        DriverError::Busy => Code::VolumeBusy.into(),
        DriverError::Refused(reason) => Error::new(Code::VolumeRefused, reason),
        error => Error::new(Code::VolumeFailed, error.to_string()),
    }
}

/// The volumes of the server.
pub(crate) struct Volumes {
    shared: Arc<Shared>,
    workspaces: Arc<Workspaces>,
    registry: Arc<Registry>,
    table: VolumeTable,
}

impl Volumes {
    /// With what was recorded before the start.
    pub(crate) fn new(
        shared: Arc<Shared>,
        workspaces: Arc<Workspaces>,
        registry: Arc<Registry>,
        volumes: &[Volume],
        sessions: &[Session],
    ) -> Self {
        Self { shared, workspaces, registry, table: VolumeTable::load(volumes, sessions) }
    }

    pub(crate) async fn create(self: &Arc<Self>, caller: &Caller, new: NewVolume) -> Result<Volume, Error> {
        let workspace = self.shared.access.workspace(caller, new.workspace_id)?;
        validate::name(&new.name)?;
        validate::volume_bytes(new.size_bytes)?;
        let now = self.shared.clock.now();
        let volume = Volume {
            id: VolumeId::new(now, self.shared.random()),
            workspace_id: workspace.id,
            name: new.name,
            size_bytes: new.size_bytes,
            growing_to_bytes: None,
            state: VolumeState::Creating,
            tags: Vec::new(),
            created_at: now,
            updated_at: now,
        };
        let volumes = self.clone();
        self.shared.detached(async move { volumes.make(volume).await }).await
    }

    pub(crate) fn get(&self, caller: &Caller, id: VolumeId) -> Result<(Volume, Vec<(SessionId, Attachment)>), Error> {
        let volume = self.table.get(caller.workspace_id, id)?;
        let holders = self.table.holders(id).into_iter();
        Ok((volume, holders.filter_map(|session| Some((session, self.attachment(session, id)?))).collect()))
    }

    pub(crate) async fn list(
        &self,
        caller: &Caller,
        list: ListVolumes,
    ) -> Result<(Vec<(Volume, bool)>, String), Error> {
        let workspace = self.shared.access.workspace(caller, list.workspace_id)?;
        let size = query::page_size(list.page_size)?;
        let before = query::parse_page_token(&list.page_token)?.map(|(at, id)| (at, VolumeId::from_uuid(id)));
        let query = VolumeQuery { workspace_id: Some(workspace.id), before, limit: size + 1 };
        let mut volumes = self.shared.store.volumes(query).await.map_err(store_error)?;
        let next = query::page(&mut volumes, size, |last| (last.created_at, *last.id.as_uuid()));
        let attached = |volume: Volume| {
            let attached = !self.table.holders(volume.id).is_empty();
            (volume, attached)
        };
        Ok((volumes.into_iter().map(attached).collect(), next))
    }

    pub(crate) async fn update(
        self: &Arc<Self>,
        caller: &Caller,
        id: VolumeId,
        update: VolumeUpdate,
    ) -> Result<Volume, Error> {
        if let Some(name) = &update.name {
            validate::name(name)?;
        }
        let tags = update.tags.map(validate::tags).transpose()?;
        let (volumes, workspace_id) = (self.clone(), caller.workspace_id);
        self.shared
            .detached(async move {
                let _quiet = volumes.table.quiet(id).await;
                let mut volume = volumes.table.usable(workspace_id, id)?;
                volume.name = update.name.unwrap_or(volume.name);
                volume.tags = tags.unwrap_or(volume.tags);
                volumes.record(&mut volume).await?;
                Ok(volume)
            })
            .await
    }

    pub(crate) async fn resize(
        self: &Arc<Self>,
        caller: &Caller,
        id: VolumeId,
        size_bytes: u64,
    ) -> Result<Volume, Error> {
        validate::volume_bytes(size_bytes)?;
        let (volumes, workspace_id) = (self.clone(), caller.workspace_id);
        self.shared.detached(async move { volumes.grow(workspace_id, id, size_bytes).await }).await
    }

    pub(crate) async fn delete(self: &Arc<Self>, caller: &Caller, id: VolumeId) -> Result<(), Error> {
        let (volumes, workspace_id) = (self.clone(), caller.workspace_id);
        self.shared.detached(async move { volumes.delete_unheld(workspace_id, id).await }).await
    }

    pub(crate) async fn attach(&self, caller: &Caller, id: SessionId, mount: NewMount) -> Result<Attachment, Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Mount).await?;
        live.ask_job(|reply| Job::Attach { mount, reply }).await
    }

    pub(crate) async fn detach(
        &self,
        caller: &Caller,
        id: SessionId,
        volume_id: VolumeId,
        force: bool,
    ) -> Result<(), Error> {
        self.shared.tasks.check()?;
        let live = self.registry.find_live(caller, id, Request::Mount).await?;
        self.table.get(caller.workspace_id, volume_id)?;
        live.ask_job(|reply| Job::Detach { volume_id, force, reply }).await
    }

    fn attachment(&self, session_id: SessionId, id: VolumeId) -> Option<Attachment> {
        let live = self.registry.live.get(session_id)?;
        let session = live.published.borrow();
        session.attachments.iter().find(|of| of.volume_id == id).cloned()
    }

    fn is_syncing(&self, session_id: SessionId, id: VolumeId) -> bool {
        self.attachment(session_id, id).is_some_and(|of| of.state == AttachmentState::SyncPending)
    }

    /// Takes a volume for a session, if nobody has it in a way that excludes that.
    pub(crate) fn hold(&self, workspace_id: WorkspaceId, session_id: SessionId, mount: &NewMount) -> Result<(), Error> {
        let refused_by: Vec<SessionId> = self.table.with(|table| {
            let known = table.get_mut(&mount.volume_id).filter(|known| {
                known.volume.workspace_id == workspace_id && known.volume.state == VolumeState::Available
            });
            let Some(known) = known else { return Err(Error::from(Code::VolumeNotFound)) };
            let excludes = |(of, readonly): &(&SessionId, &bool)| **of == session_id || !mount.readonly || !**readonly;
            let refused_by: Vec<_> = known.holders.iter().filter(excludes).map(|(of, _)| *of).collect();
            if refused_by.is_empty() {
                known.holders.insert(session_id, mount.readonly);
            }
            Ok(refused_by)
        })?;
        if refused_by.is_empty() {
            return Ok(());
        }
        let syncing = refused_by.iter().all(|of| self.is_syncing(*of, mount.volume_id));
        Err(if syncing { Code::VolumeSyncPending } else { Code::VolumeInUse }.into())
    }

    /// Takes all volumes of a new session, or none.
    pub(crate) fn hold_all(&self, session: &Session) -> Result<(), Error> {
        for (index, attachment) in session.attachments.iter().enumerate() {
            let (volume_id, path, readonly) = (attachment.volume_id, String::new(), attachment.readonly);
            if let Err(error) = self.hold(session.workspace_id, session.id, &NewMount { volume_id, path, readonly }) {
                session.attachments[..index].iter().for_each(|of| self.table.release(of.volume_id, session.id));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Gives up a session's hold; others may have the volume from now on.
    pub(crate) fn release(&self, id: VolumeId, session_id: SessionId) {
        self.table.release(id, session_id);
    }

    /// An attachment that a session with these others can have.
    pub(crate) fn new_attachment(&self, mount: &NewMount, others: &[Attachment]) -> Result<Attachment, Error> {
        validate::mount_path(&mount.path)?;
        let max = self.shared.config.volumes_per_session_max;
        if others.len() >= max as usize {
            return Err(Error::new(Code::VolumeLimit, format!("volumes_per_session_max is {max}")));
        }
        if others.iter().any(|other| other.volume_id == mount.volume_id) {
            return Err(Error::new(Code::VolumeInUse, "it is attached here already"));
        }
        if others.iter().any(|other| validate::overlap(&other.mount_path, &mount.path)) {
            let detail = "mount_path is, holds or lies below that of another attachment";
            return Err(Error::new(Code::PathRefused, detail));
        }
        Ok(Attachment {
            id: AttachmentId::new(self.shared.clock.now(), self.shared.random()),
            volume_id: mount.volume_id,
            mount_path: mount.path.clone(),
            readonly: mount.readonly,
            state: AttachmentState::Attaching,
        })
    }

    /// Mounts a volume, while nothing else happens to it.
    pub(crate) async fn mount(&self, session: &Session, attachment: &Attachment) -> Result<(), DriverError> {
        let _quiet = self.table.quiet(attachment.volume_id).await;
        self.shared.driver_of(session).attach_volume(session.id, &mount_of(attachment)).await
    }

    pub(crate) async fn unmount(&self, session: &Session, of: &Attachment, force: bool) -> Result<(), DriverError> {
        let _quiet = self.table.quiet(of.volume_id).await;
        self.shared.driver_of(session).detach_volume(session.id, &mount_of(of), force).await
    }

    /// Waits until what a dead sandbox wrote to a volume is safe.
    pub(crate) async fn settle(&self, attachment: &Attachment) -> Result<(), DriverError> {
        let _quiet = self.table.quiet(attachment.volume_id).await;
        match self.shared.host.settle_volume(attachment.volume_id).await {
            // A volume that is gone has nothing left to write.
            Err(DriverError::Gone) => Ok(()),
            other => other,
        }
    }

    /// Stored bytes of a workspace's snapshots and sizes of its volumes together.
    pub(crate) fn bytes_used(&self, workspace_id: WorkspaceId, snapshots: &[Snapshot]) -> u64 {
        let stored: u64 = snapshots.iter().map(|of| of.stored_bytes).sum();
        stored.saturating_add(self.table.bytes_of(workspace_id))
    }

    async fn record(&self, volume: &mut Volume) -> Result<(), Error> {
        volume.updated_at = self.shared.clock.now();
        self.shared.write(vec![Change::Volume(volume.clone())]).await?;
        self.table.put(volume.clone());
        Ok(())
    }

    /// Refuses this many more volumes and bytes where the workspace has a limit. For those who keep the workspaces quiet.
    async fn check_volume_limits(&self, workspace_id: WorkspaceId, more: usize, more_bytes: u64) -> Result<(), Error> {
        let settings = self.shared.access.settings(workspace_id);
        let count = self.table.count_of(workspace_id) + more;
        if let Some(max) = settings.volumes_max.filter(|max| more > 0 && count > *max as usize) {
            return Err(Error::new(Code::VolumeLimit, format!("the workspace's volumes_max is {max}")));
        }
        if let Some(max) = settings.bytes_max {
            let used = self.bytes_used(workspace_id, &self.workspaces.snapshots(workspace_id).await?);
            if used.saturating_add(more_bytes) > max {
                return Err(Error::new(Code::VolumeLimit, format!("the workspace's bytes_max is {max}")));
            }
        }
        Ok(())
    }

    async fn make(self: &Arc<Self>, mut volume: Volume) -> Result<Volume, Error> {
        let id = volume.id;
        {
            let _workspaces = self.workspaces.quiet().await;
            self.check_volume_limits(volume.workspace_id, 1, volume.size_bytes).await?;
            self.record(&mut volume).await?;
        }
        let _quiet = self.table.quiet(id).await;
        if let Err(error) = self.shared.host.create_volume(id, volume.size_bytes).await {
            tracing::warn!(volume = %id, %error, "a volume could not be made");
            self.keep_removing(id);
            return Err(volume_error(error));
        }
        volume.state = VolumeState::Available;
        let made = || async { self.record(&mut volume.clone()).await };
        if !self.shared.insist("a new volume could not be recorded", made).await {
            // The next start removes what nobody was told of.
            return Err(Code::Draining.into());
        }
        self.table.get(volume.workspace_id, id)
    }

    async fn grow(&self, workspace_id: WorkspaceId, id: VolumeId, size_bytes: u64) -> Result<Volume, Error> {
        let _quiet = self.table.quiet(id).await;
        let mut volume = self.table.usable(workspace_id, id)?;
        if volume.growing_to_bytes.is_some() {
            // A stopping engine could not record how that ended; the next start finds out.
            return Err(Code::Draining.into());
        }
        if size_bytes < volume.size_bytes {
            return Err(Error::new(Code::InvalidArgument, "volumes cannot be made smaller"));
        }
        {
            let _workspaces = self.workspaces.quiet().await;
            self.check_volume_limits(workspace_id, 0, size_bytes - volume.size_bytes).await?;
            volume.growing_to_bytes = Some(size_bytes);
            self.record(&mut volume).await?;
        }
        self.finish_growing(volume).await
    }

    /// Grows a volume as its record says. Where that fails its record tells the size that it has.
    async fn finish_growing(&self, mut volume: Volume) -> Result<Volume, Error> {
        let Some(size_bytes) = volume.growing_to_bytes.take() else { return Ok(volume) };
        let grown = match size_bytes > volume.size_bytes {
            true => self.shared.host.grow_volume(volume.id, size_bytes).await,
            false => Ok(()),
        };
        let is_grown = match &grown {
            Ok(()) => true,
            // What failed may have come after it, as may a crash of which this is the recovery.
            Err(_) => self.shared.host.volume_size(volume.id).await.is_ok_and(|size| size >= size_bytes),
        };
        if is_grown {
            volume.size_bytes = size_bytes;
        }
        let recorded = || async { self.record(&mut volume.clone()).await };
        if !self.shared.insist("the size of a volume could not be recorded", recorded).await {
            return Err(Code::Draining.into());
        }
        grown.map_err(|error| {
            tracing::warn!(volume = %volume.id, %error, "a volume could not be grown");
            volume_error(error)
        })?;
        self.table.get(volume.workspace_id, volume.id)
    }

    async fn delete_unheld(self: &Arc<Self>, workspace_id: WorkspaceId, id: VolumeId) -> Result<(), Error> {
        let _quiet = self.table.quiet(id).await;
        let mut volume = self.table.usable(workspace_id, id)?;
        let holders = self.table.with(|table| {
            let known = table.get_mut(&id)?;
            if known.holders.is_empty() {
                known.volume.state = VolumeState::Deleting;
            }
            Some(known.holders.keys().copied().collect::<Vec<_>>())
        });
        let holders = holders.unwrap_or_default();
        if !holders.is_empty() {
            let syncing = holders.iter().all(|of| self.is_syncing(*of, id));
            return Err(if syncing { Code::VolumeSyncPending } else { Code::VolumeInUse }.into());
        }
        let before = volume.clone();
        volume.state = VolumeState::Deleting;
        if let Err(error) = self.record(&mut volume).await {
            self.table.put(before);
            return Err(error);
        }
        if let Err(error) = self.remove(id).await {
            tracing::warn!(volume = %id, %error, "a volume could not be removed; trying again");
            self.keep_removing(id);
            return Err(Error::new(Code::VolumeFailed, "it is being deleted; the server keeps trying"));
        }
        Ok(())
    }

    /// Removes a volume that is recorded as going, and forgets it. Can be repeated.
    async fn remove(&self, id: VolumeId) -> Result<(), Error> {
        self.shared.host.remove_volume(id).await.map_err(volume_error)?;
        self.shared.write(vec![Change::ForgetVolume(id)]).await?;
        self.table.with(|table| table.remove(&id));
        Ok(())
    }

    fn keep_removing(self: &Arc<Self>, id: VolumeId) {
        self.table.with(|table| table.get_mut(&id).map(|known| known.volume.state = VolumeState::Deleting));
        let volumes = self.clone();
        self.shared.background(async move {
            let _quiet = volumes.table.quiet(id).await;
            volumes.shared.insist("a volume could not be removed", || volumes.remove(id)).await;
        });
    }

    /// Goes on with a volume where the last server stopped.
    pub(crate) fn recover(self: &Arc<Self>, volume: Volume) {
        match volume.state {
            // Nobody was told of one that was not finished.
            VolumeState::Creating | VolumeState::Deleting => self.keep_removing(volume.id),
            VolumeState::Available if volume.growing_to_bytes.is_some() => {
                let volumes = self.clone();
                self.shared.background(async move {
                    let _quiet = volumes.table.quiet(volume.id).await;
                    // Its error is in the log; nobody waits for it.
                    let _ = volumes.finish_growing(volume).await;
                });
            }
            VolumeState::Available => {}
        }
    }
}

fn mount_of(attachment: &Attachment) -> Mount {
    Mount { volume_id: attachment.volume_id, path: attachment.mount_path.clone(), readonly: attachment.readonly }
}
