//! The volumes of the server in memory, and which sessions have them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, VolumeId, WorkspaceId};
use tokio::sync::OwnedMutexGuard;

use crate::model::{Session, Volume, VolumeState};

/// All volumes of the server, and which sessions have them.
#[derive(Default)]
pub(super) struct VolumeTable(Mutex<BTreeMap<VolumeId, Known>>);

pub(super) struct Known {
    /// As last committed, but for its state, which changes a moment earlier.
    pub(super) volume: Volume,
    /// Sessions it is attached to, on its way into or out of, with whether that is read-only.
    pub(super) holders: BTreeMap<SessionId, bool>,
    /// Held while something is done to the volume itself.
    pub(super) quiet: Arc<tokio::sync::Mutex<()>>,
}

impl VolumeTable {
    /// What was recorded before the start.
    pub(super) fn load(volumes: &[Volume], sessions: &[Session]) -> Self {
        let known = |volume: &Volume| Known { volume: volume.clone(), holders: BTreeMap::new(), quiet: Arc::default() };
        let mut table: BTreeMap<_, _> = volumes.iter().map(|volume| (volume.id, known(volume))).collect();
        for session in sessions {
            for attachment in &session.attachments {
                if let Some(known) = table.get_mut(&attachment.volume_id) {
                    known.holders.insert(session.id, attachment.readonly);
                }
            }
        }
        Self(Mutex::new(table))
    }

    pub(super) fn with<T>(&self, action: impl FnOnce(&mut BTreeMap<VolumeId, Known>) -> T) -> T {
        action(&mut self.0.lock().expect("no holder of this lock panics"))
    }

    pub(super) fn get(&self, workspace_id: WorkspaceId, id: VolumeId) -> Result<Volume, Error> {
        let found = self.with(|table| table.get(&id).map(|known| known.volume.clone()));
        found
            .filter(|volume| volume.workspace_id == workspace_id && volume.state != VolumeState::Deleting)
            .ok_or_else(|| Code::VolumeNotFound.into())
    }

    /// One that something can be done to: not while it is made, which ends in a moment.
    pub(super) fn usable(&self, workspace_id: WorkspaceId, id: VolumeId) -> Result<Volume, Error> {
        let volume = self.get(workspace_id, id)?;
        match volume.state {
            VolumeState::Available => Ok(volume),
            VolumeState::Creating | VolumeState::Deleting => {
                Err(Error::new(Code::VolumeNotFound, "it is still being made"))
            }
        }
    }

    pub(super) fn put(&self, volume: Volume) {
        self.with(|table| match table.get_mut(&volume.id) {
            Some(known) => known.volume = volume,
            None => {
                let known = Known { volume, holders: BTreeMap::new(), quiet: Arc::default() };
                table.insert(known.volume.id, known);
            }
        });
    }

    pub(super) fn holders(&self, id: VolumeId) -> Vec<SessionId> {
        self.with(|table| table.get(&id).map(|known| known.holders.keys().copied().collect()).unwrap_or_default())
    }

    /// Gives up a session's hold; others may have the volume from now on.
    pub(super) fn release(&self, id: VolumeId, session_id: SessionId) {
        self.with(|table| table.get_mut(&id).and_then(|known| known.holders.remove(&session_id)));
    }

    /// Waits until nothing else is done to the volume.
    pub(super) async fn quiet(&self, id: VolumeId) -> OwnedMutexGuard<()> {
        let lock = self.with(|table| table.get(&id).map(|known| known.quiet.clone()));
        lock.unwrap_or_default().lock_owned().await
    }

    /// Sizes of a workspace's volumes together, with what those that grow will have.
    pub(super) fn bytes_of(&self, workspace_id: WorkspaceId) -> u64 {
        let size = |volume: &Volume| volume.size_bytes.max(volume.growing_to_bytes.unwrap_or_default());
        self.with(|table| {
            let mine = table.values().filter(|known| known.volume.workspace_id == workspace_id);
            mine.map(|known| size(&known.volume)).fold(0, u64::saturating_add)
        })
    }

    pub(super) fn count_of(&self, workspace_id: WorkspaceId) -> usize {
        self.with(|table| table.values().filter(|known| known.volume.workspace_id == workspace_id).count())
    }
}
