//! Volumes: made, grown, deleted, and who has them. A volume has one writer or any number of readers.

use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, VolumeId, WorkspaceId};

use crate::access::Caller;
use crate::engine_core::{Engine, EngineCore};
use crate::errors::store_error;
use crate::handle::Job;
use crate::model::{Attachment, AttachmentState, Session, Volume, VolumeState};
use crate::ports::{Change, DriverError, VolumeQuery};
use crate::requests::{ListVolumes, NewMount, NewVolume, VolumeUpdate};
use crate::session::Request;
use crate::{query, validate};

/// What the caller of a volume operation is told about the driver's refusal.
fn volume_error(error: DriverError) -> Error {
    match error {
        DriverError::Exhausted(limit) => Error::new(Code::CapacityUnavailable, limit.name()),
        DriverError::Busy => Code::VolumeBusy.into(),
        DriverError::Refused(reason) => Error::new(Code::VolumeRefused, reason),
        error => Error::new(Code::VolumeFailed, error.to_string()),
    }
}

impl Engine {
    /// Makes an empty volume. Returns when it can be attached.
    pub async fn create_volume(&self, caller: &Caller, new: NewVolume) -> Result<Volume, Error> {
        let inner = self.0.clone();
        let workspace = inner.shared.access.workspace(caller, new.workspace_id)?;
        validate::name(&new.name)?;
        validate::volume_bytes(new.size_bytes)?;
        let now = inner.shared.clock.now();
        let volume = Volume {
            id: VolumeId::new(now, inner.shared.random()),
            workspace_id: workspace.id,
            name: new.name,
            size_bytes: new.size_bytes,
            growing_to_bytes: None,
            state: VolumeState::Creating,
            tags: Vec::new(),
            created_at: now,
            updated_at: now,
        };
        self.0.shared.detached(async move { inner.make_volume(volume).await }).await
    }

    /// A volume, and where it is attached.
    pub async fn volume(&self, caller: &Caller, id: VolumeId) -> Result<(Volume, Vec<(SessionId, Attachment)>), Error> {
        let volume = self.0.volumes.get(caller.workspace_id, id)?;
        let holders = self.0.volumes.holders(id).into_iter();
        Ok((volume, holders.filter_map(|session| Some((session, self.0.attachment(session, id)?))).collect()))
    }

    /// One page of volumes, newest first, each with whether it is attached anywhere, and the token of the next page.
    pub async fn list_volumes(
        &self,
        caller: &Caller,
        list: ListVolumes,
    ) -> Result<(Vec<(Volume, bool)>, String), Error> {
        let workspace = self.0.shared.access.workspace(caller, list.workspace_id)?;
        let size = query::page_size(list.page_size)?;
        let before = query::parse_page_token(&list.page_token)?.map(|(at, id)| (at, VolumeId::from_uuid(id)));
        let query = VolumeQuery { workspace_id: Some(workspace.id), before, limit: size + 1 };
        let mut volumes = self.0.shared.store.volumes(query).await.map_err(store_error)?;
        let next = query::page(&mut volumes, size, |last| (last.created_at, *last.id.as_uuid()));
        let attached = |volume: Volume| {
            let attached = !self.0.volumes.holders(volume.id).is_empty();
            (volume, attached)
        };
        Ok((volumes.into_iter().map(attached).collect(), next))
    }

    pub async fn update_volume(&self, caller: &Caller, id: VolumeId, update: VolumeUpdate) -> Result<Volume, Error> {
        if let Some(name) = &update.name {
            validate::name(name)?;
        }
        let tags = update.tags.map(validate::tags).transpose()?;
        let (inner, workspace_id) = (self.0.clone(), caller.workspace_id);
        self.0
            .shared
            .detached(async move {
                let _quiet = inner.volumes.quiet(id).await;
                let mut volume = inner.volumes.usable(workspace_id, id)?;
                volume.name = update.name.unwrap_or(volume.name);
                volume.tags = tags.unwrap_or(volume.tags);
                inner.record_volume(&mut volume).await?;
                Ok(volume)
            })
            .await
    }

    /// Makes a volume larger, also while it is attached for writing.
    pub async fn resize_volume(&self, caller: &Caller, id: VolumeId, size_bytes: u64) -> Result<Volume, Error> {
        validate::volume_bytes(size_bytes)?;
        let (inner, workspace_id) = (self.0.clone(), caller.workspace_id);
        self.0.shared.detached(async move { inner.grow_volume(workspace_id, id, size_bytes).await }).await
    }

    /// Removes a volume that no session has.
    pub async fn delete_volume(&self, caller: &Caller, id: VolumeId) -> Result<(), Error> {
        let (inner, workspace_id) = (self.0.clone(), caller.workspace_id);
        self.0.shared.detached(async move { inner.delete_volume(workspace_id, id).await }).await
    }

    /// Mounts a volume in a RUNNING session.
    pub async fn attach_volume(&self, caller: &Caller, id: SessionId, mount: NewMount) -> Result<Attachment, Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Mount).await?;
        live.ask_job(|reply| Job::Attach { mount, reply }).await
    }

    /// Unmounts a volume; with `force` also when processes have files of it open.
    pub async fn detach_volume(
        &self,
        caller: &Caller,
        id: SessionId,
        volume_id: VolumeId,
        force: bool,
    ) -> Result<(), Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Mount).await?;
        self.0.volumes.get(caller.workspace_id, volume_id)?;
        live.ask_job(|reply| Job::Detach { volume_id, force, reply }).await
    }
}

impl EngineCore {
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
        let refused_by: Vec<SessionId> = self.volumes.with(|table| {
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
                session.attachments[..index].iter().for_each(|of| self.volumes.release(of.volume_id, session.id));
                return Err(error);
            }
        }
        Ok(())
    }

    async fn record_volume(&self, volume: &mut Volume) -> Result<(), Error> {
        volume.updated_at = self.shared.clock.now();
        self.shared.write(vec![Change::Volume(volume.clone())]).await?;
        self.volumes.put(volume.clone());
        Ok(())
    }

    /// Refuses this many more volumes and bytes where the workspace has a limit. For those who keep the workspaces quiet.
    async fn check_volume_limits(&self, workspace_id: WorkspaceId, more: usize, more_bytes: u64) -> Result<(), Error> {
        let settings = self.shared.access.settings(workspace_id);
        let count = self.volumes.count_of(workspace_id) + more;
        if let Some(max) = settings.volumes_max.filter(|max| more > 0 && count > *max as usize) {
            return Err(Error::new(Code::VolumeLimit, format!("the workspace's volumes_max is {max}")));
        }
        if let Some(max) = settings.bytes_max {
            let used = self.bytes_used(workspace_id, &self.snapshots_of(workspace_id).await?);
            if used.saturating_add(more_bytes) > max {
                return Err(Error::new(Code::VolumeLimit, format!("the workspace's bytes_max is {max}")));
            }
        }
        Ok(())
    }

    async fn make_volume(self: &Arc<Self>, mut volume: Volume) -> Result<Volume, Error> {
        let id = volume.id;
        {
            let _library = self.workspaces.quiet().await;
            self.check_volume_limits(volume.workspace_id, 1, volume.size_bytes).await?;
            self.record_volume(&mut volume).await?;
        }
        let _quiet = self.volumes.quiet(id).await;
        if let Err(error) = self.shared.host.create_volume(id, volume.size_bytes).await {
            tracing::warn!(volume = %id, %error, "a volume could not be made");
            self.keep_removing(id);
            return Err(volume_error(error));
        }
        volume.state = VolumeState::Available;
        let made = || async { self.record_volume(&mut volume.clone()).await };
        if !self.shared.insist("a new volume could not be recorded", made).await {
            // The next start removes what nobody was told of.
            return Err(Code::Draining.into());
        }
        self.volumes.get(volume.workspace_id, id)
    }

    async fn grow_volume(&self, workspace_id: WorkspaceId, id: VolumeId, size_bytes: u64) -> Result<Volume, Error> {
        let _quiet = self.volumes.quiet(id).await;
        let mut volume = self.volumes.usable(workspace_id, id)?;
        if volume.growing_to_bytes.is_some() {
            // A stopping engine could not record how that ended; the next start finds out.
            return Err(Code::Draining.into());
        }
        if size_bytes < volume.size_bytes {
            return Err(Error::new(Code::InvalidArgument, "volumes cannot be made smaller"));
        }
        {
            let _library = self.workspaces.quiet().await;
            self.check_volume_limits(workspace_id, 0, size_bytes - volume.size_bytes).await?;
            volume.growing_to_bytes = Some(size_bytes);
            self.record_volume(&mut volume).await?;
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
        let recorded = || async { self.record_volume(&mut volume.clone()).await };
        if !self.shared.insist("the size of a volume could not be recorded", recorded).await {
            return Err(Code::Draining.into());
        }
        grown.map_err(|error| {
            tracing::warn!(volume = %volume.id, %error, "a volume could not be grown");
            volume_error(error)
        })?;
        self.volumes.get(volume.workspace_id, volume.id)
    }

    async fn delete_volume(self: &Arc<Self>, workspace_id: WorkspaceId, id: VolumeId) -> Result<(), Error> {
        let _quiet = self.volumes.quiet(id).await;
        let mut volume = self.volumes.usable(workspace_id, id)?;
        let holders = self.volumes.with(|table| {
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
        if let Err(error) = self.record_volume(&mut volume).await {
            self.volumes.put(before);
            return Err(error);
        }
        if let Err(error) = self.remove_volume(id).await {
            tracing::warn!(volume = %id, %error, "a volume could not be removed; trying again");
            self.keep_removing(id);
            return Err(Error::new(Code::VolumeFailed, "it is being deleted; the server keeps trying"));
        }
        Ok(())
    }

    /// Removes a volume that is recorded as going, and forgets it. Can be repeated.
    async fn remove_volume(&self, id: VolumeId) -> Result<(), Error> {
        self.shared.host.remove_volume(id).await.map_err(volume_error)?;
        self.shared.write(vec![Change::ForgetVolume(id)]).await?;
        self.volumes.with(|table| table.remove(&id));
        Ok(())
    }

    fn keep_removing(self: &Arc<Self>, id: VolumeId) {
        self.volumes.with(|table| table.get_mut(&id).map(|known| known.volume.state = VolumeState::Deleting));
        let engine = self.clone();
        self.shared.background(async move {
            let _quiet = engine.volumes.quiet(id).await;
            engine.shared.insist("a volume could not be removed", || engine.remove_volume(id)).await;
        });
    }

    /// Goes on with a volume where the last server stopped.
    pub(crate) fn recover_volume(self: &Arc<Self>, volume: Volume) {
        match volume.state {
            // Nobody was told of one that was not finished.
            VolumeState::Creating | VolumeState::Deleting => self.keep_removing(volume.id),
            VolumeState::Available if volume.growing_to_bytes.is_some() => {
                let engine = self.clone();
                self.shared.background(async move {
                    let _quiet = engine.volumes.quiet(volume.id).await;
                    // Its error is in the log; nobody waits for it.
                    let _ = engine.finish_growing(volume).await;
                });
            }
            VolumeState::Available => {}
        }
    }
}
