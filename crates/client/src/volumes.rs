//! Volumes: disks that outlive sessions.

use std::time::Duration;

use nagaya_api::tenki::v1;
use serde::Serialize;
use tokio::time::Instant;

use crate::client::{PAGE_SIZE, all_pages};
use crate::constants::DEFAULT_VOLUME_DETACH_TIMEOUT;
use crate::settable::settable;
use crate::wire::{self, wire_enum};
use crate::{Client, Error, RefusalKind, Result, Session, VolumeAttachment, VolumeMount, create, wait};

/// How long a deletion is tried again while the volume is written back, and the pauses between.
const DELETE_RETRY: Duration = Duration::from_secs(60);
const DELETE_PAUSES_S: [u64; 5] = [1, 2, 4, 8, 16];
/// The state of an attachment that is gone.
const DETACHED: &str = "DETACHED";

wire_enum! {
    VolumeState, v1::VolumeState {
        Unspecified = "unspecified",
        Available = "available",
        Deleting = "deleting",
        Deleted = "deleted",
        InUse = "in_use",
    }
}

#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Volume {
    pub id: String,
    pub workspace_id: String,
    pub name: String,
    pub size_bytes: u64,
    pub state: VolumeState,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub updated_at: String,
    pub tags: Vec<String>,
}

impl Volume {
    /// Whether nothing that is known here speaks against deleting it.
    pub fn is_deletable(&self) -> bool {
        self.state == VolumeState::Available
    }
}

/// A volume and the sessions that it is in.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct VolumeDetails {
    pub volume: Volume,
    pub attachments: Vec<VolumeAttachment>,
}

settable! {
    #[derive(Debug, Clone, Default)]
    pub struct CreateVolumeOptions {
        pub name: String,
        /// 1 MiB to 100 GiB.
        pub size_bytes: u64,
        /// The caller's own workspace when there is none.
        pub workspace_id: Option<String>,
    }
}

settable! {
    /// What [`Client::update_volume`] changes; the rest stays.
    #[derive(Debug, Clone, Default)]
    pub struct UpdateVolumeOptions {
        pub name: Option<String>,
        /// All tags from now on, which may be none.
        pub tags: Option<Vec<String>>,
    }
}

settable! {
    #[derive(Debug, Clone)]
    pub struct DetachOptions {
        /// Also while processes have files open in it.
        pub force: bool,
        /// How long to wait until it is gone; 120 s by default, `None` is not at all.
        pub wait: Option<Duration>,
    }
}

impl Default for DetachOptions {
    fn default() -> Self {
        Self { force: false, wait: Some(DEFAULT_VOLUME_DETACH_TIMEOUT) }
    }
}

impl Client {
    pub async fn create_volume(&self, options: CreateVolumeOptions) -> Result<Volume> {
        let request = v1::CreateVolumeRequest {
            workspace_id: options.workspace_id.unwrap_or_default(),
            name: options.name,
            size_bytes: bytes(options.size_bytes)?,
            ..Default::default()
        };
        described(self.control().create_volume(request).await.map_err(Error::of_rpc)?.volume)
    }

    /// Fails with [`RefusalKind::VolumeNotFound`](crate::RefusalKind::VolumeNotFound).
    pub async fn get_volume(&self, id: &str) -> Result<VolumeDetails> {
        let answer = self
            .control()
            .get_volume(v1::GetVolumeRequest { volume_id: id.to_owned() })
            .await
            .map_err(Error::of_rpc)?;
        Ok(VolumeDetails {
            volume: described(answer.volume)?,
            attachments: answer.active_attachments.into_iter().map(VolumeAttachment::of_wire).collect(),
        })
    }

    /// All volumes of a workspace; of the caller's own one when the id is empty.
    pub async fn list_volumes(&self, workspace_id: &str) -> Result<Vec<Volume>> {
        let volumes = all_pages(|page_token| {
            let request =
                v1::ListVolumesRequest { workspace_id: workspace_id.to_owned(), page_size: PAGE_SIZE, page_token };
            async move {
                let answer = self.control().list_volumes(request).await.map_err(Error::of_rpc)?;
                Ok((answer.volumes, answer.next_page_token))
            }
        });
        Ok(volumes.await?.into_iter().map(Volume::of_wire).collect())
    }

    /// Waits until a volume is AVAILABLE or in use. Fails with [`RefusalKind::VolumeNotFound`](crate::RefusalKind::VolumeNotFound) when it was deleted.
    pub async fn wait_volume_ready(&self, id: &str, timeout: Duration) -> Result<Volume> {
        let asking = async {
            for attempt in 0.. {
                let volume = self.get_volume(id).await?.volume;
                match volume.state {
                    VolumeState::Available | VolumeState::InUse => return Ok(volume),
                    VolumeState::Deleted => return Err(gone("volume not found: it was deleted [volume_not_found]")),
                    _ => wait::pause(attempt).await,
                }
            }
            unreachable!("there is no last attempt")
        };
        let timed_out = |_| Error::TimedOut { what: "becoming AVAILABLE".into(), after: timeout };
        tokio::time::timeout(timeout, asking).await.map_err(timed_out)?
    }

    /// Makes a volume larger.
    pub async fn resize_volume(&self, id: &str, new_size_bytes: u64) -> Result<Volume> {
        let request = v1::ResizeVolumeRequest { volume_id: id.to_owned(), new_size_bytes: bytes(new_size_bytes)? };
        described(self.control().resize_volume(request).await.map_err(Error::of_rpc)?.volume)
    }

    pub async fn update_volume(&self, id: &str, options: UpdateVolumeOptions) -> Result<Volume> {
        let request = v1::UpdateVolumeRequest {
            volume_id: id.to_owned(),
            name: options.name,
            clear_tags: options.tags.as_ref().is_some_and(Vec::is_empty),
            tags: create::tags(&options.tags.unwrap_or_default())?,
        };
        described(self.control().update_volume(request).await.map_err(Error::of_rpc)?.volume)
    }

    /// Deletes a volume with its content. Waits up to 60 s while it is written back.
    /// Fails with [`RefusalKind::VolumeInUse`](crate::RefusalKind::VolumeInUse) while a session has it.
    pub async fn delete_volume(&self, id: &str) -> Result<()> {
        let deadline = Instant::now() + DELETE_RETRY;
        for attempt in 0.. {
            let request = v1::DeleteVolumeRequest { volume_id: id.to_owned() };
            let error = match self.control().delete_volume(request).await {
                Ok(_) => return Ok(()),
                Err(error) => Error::of_rpc(error),
            };
            let pause = Duration::from_secs(DELETE_PAUSES_S[attempt.min(DELETE_PAUSES_S.len() - 1)]);
            if !matches!(error, Error::Refused { kind: RefusalKind::VolumeSyncPending, .. })
                || Instant::now() + pause > deadline
            {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
        unreachable!("there is no last attempt")
    }
}

impl Session {
    /// Mounts a volume in the running sandbox.
    pub async fn attach_volume(&self, mount: VolumeMount) -> Result<VolumeAttachment> {
        let volume = mount.into_wire().into();
        let request = v1::AttachVolumeRequest { session_id: self.id().to_owned(), volume };
        let answer = self.client().control().attach_volume(request).await.map_err(Error::of_rpc)?;
        answer
            .attachment
            .into_option()
            .map(VolumeAttachment::of_wire)
            .ok_or_else(|| Error::bad_answer("it names no attachment"))
    }

    /// Takes a volume out of the sandbox, and waits until it is gone as the options say.
    pub async fn detach_volume(&self, volume_id: &str, options: DetachOptions) -> Result<()> {
        let request = v1::DetachVolumeRequest {
            session_id: self.id().to_owned(),
            volume_id: volume_id.to_owned(),
            force_detach: options.force,
        };
        self.client().control().detach_volume(request).await.map_err(Error::of_rpc)?;
        let Some(limit) = options.wait else { return Ok(()) };
        let asking = async {
            for attempt in 0.. {
                let attached = |each: &VolumeAttachment| each.volume_id == volume_id && each.state != DETACHED;
                if !self.refresh().await?.volumes.iter().any(attached) {
                    return Ok(());
                }
                wait::pause(attempt).await;
            }
            unreachable!("there is no last attempt")
        };
        let timed_out = |_| Error::TimedOut { what: "detaching the volume".into(), after: limit };
        tokio::time::timeout(limit, asking).await.map_err(timed_out)?
    }
}

fn bytes(size: u64) -> Result<i64> {
    i64::try_from(size).map_err(|_| Error::InvalidOptions("a volume has at most 100 GiB".into()))
}

fn gone(message: &str) -> Error {
    Error::refused(crate::RefusalKind::VolumeNotFound, crate::Status::NotFound, message)
}

fn described(volume: impl Into<Option<v1::Volume>>) -> Result<Volume> {
    volume.into().map(Volume::of_wire).ok_or_else(|| Error::bad_answer("it names no volume"))
}

impl Volume {
    pub(crate) fn of_wire(volume: v1::Volume) -> Self {
        Self {
            id: volume.id,
            workspace_id: volume.workspace_id,
            name: volume.name,
            size_bytes: wire::unsigned(volume.size_bytes),
            state: VolumeState::of_wire(volume.state),
            created_at: volume.created_at,
            updated_at: volume.updated_at,
            tags: volume.tags,
        }
    }
}
