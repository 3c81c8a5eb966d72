//! How a sandbox comes to rest, with its disk or without, and what a later server finds of it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nagaya_api::ids::SessionId;
use nagaya_engine::ports::{Adopted, DriverError};

use super::live::{self, Live, PidFd};
use super::record::Record;
use super::{Inner, blocking, capacity, disk, failed, images, too_long};

/// How long a disk may take to be written back before whoever waits is told; it goes on meanwhile.
const WRITE_BACK_MAX: Duration = Duration::from_secs(120);
/// How long a file system that was frozen for a copy may take to go on.
const THAW_MAX: Duration = Duration::from_secs(30);

impl Inner {
    /// Takes over what an earlier server left, or what this one knows already.
    pub(super) async fn adopt(self: &Arc<Self>, id: SessionId) -> Result<Adopted, DriverError> {
        let directory = self.directory(id);
        let record = Record::read(&directory).ok_or(DriverError::Gone)?;
        thaw_disk(directory.clone()).await?;
        let mut powered_off = record.powered_off;
        if let Some(live) = self.find(id, &record)? {
            let connecting = async {
                let link = live::connect(self, &directory, &live).await?;
                if link.powered_off() {
                    return Ok(None);
                }
                let frozen = self.is_frozen(&live);
                // A server may have been killed between halting the clocks and halting the processes.
                super::pause::set_clocks(&live, Some(link.clone()), frozen).await?;
                Ok(Some((frozen, link)))
            };
            let connected = tokio::select! {
                biased;
                () = live.pidfd.ended() => Ok(None),
                connected = connecting => connected,
            };
            match connected {
                Ok(Some((frozen, link))) => {
                    if self.live().insert(id, live.clone()).is_none() {
                        self.watch(&live);
                    }
                    self.watch_power(&live, &link);
                    return Ok(if frozen { Adopted::Frozen(link) } else { Adopted::Running(link) });
                }
                Ok(None) => powered_off |= !live.pidfd.has_ended(),
                // It died on the way.
                Err(_) if live.pidfd.has_ended() => {}
                Err(error) => return Err(error),
            }
            self.note_power_off(id, powered_off)?;
        }
        self.stop(id).await?;
        let host_restarted = record.boot_id.is_some_and(|boot_id| boot_id != self.boot_id);
        Ok(Adopted::Stopped { powered_off, host_restarted })
    }

    /// Ends all processes and keeps the disk.
    pub(super) async fn stop(self: &Arc<Self>, id: SessionId) -> Result<(), DriverError> {
        let directory = self.directory(id);
        let record = Record::read(&directory).ok_or(DriverError::Gone)?;
        thaw_disk(directory.clone()).await?;
        if let Some(live) = self.find(id, &record)? {
            // Written back while a failure can still be told, and everything goes on.
            if !live.pidfd.has_ended() {
                let written =
                    tokio::time::timeout(WRITE_BACK_MAX, blocking(move || images::sync_disk(&directory))).await;
                match written.map_err(|_| too_long("the disk was not written back", WRITE_BACK_MAX))? {
                    // What could not be written is lost already, and cannot be but on the host's side of the disk.
                    Err(error) if self.disk_failed(id).await => {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(error, %id, "stopping a sandbox whose disk had errors; its next start repairs it");
                    }
                    written => written.map_err(|error| capacity::refusal("write the disk back", &error))?,
                }
            }
            live.end(&self.factory.cgroups).await?;
        }
        self.live().remove(&id);
        let inner = self.clone();
        blocking(move || inner.settle(id)).await
    }

    /// Whether the disk of a sandbox that is up takes no more writes.
    pub(super) async fn disk_failed(&self, id: SessionId) -> bool {
        let disk = disk::path(&self.directory(id));
        blocking(move || disk::faults(&disk).0).await
    }

    /// Ends a sandbox, disk and all. The rest is released in the background.
    pub(super) async fn destroy(self: &Arc<Self>, id: SessionId) -> Result<(), DriverError> {
        let directory = self.directory(id);
        if self.releasing().contains(&id) || !directory.exists() {
            return Ok(());
        }
        let record = Record::read(&directory).unwrap_or_default();
        thaw_disk(directory).await?;
        let live = self.find(id, &record)?;
        if let Some(live) = &live {
            live.end(&self.factory.cgroups).await?;
        }
        self.live().remove(&id);
        self.releasing().insert(id);
        let inner = self.clone();
        tokio::task::spawn_blocking(move || inner.release(id, record.slot));
        Ok(())
    }

    /// The processes of a sandbox: known already, or found by the record's slot.
    fn find(&self, id: SessionId, record: &Record) -> Result<Option<Arc<Live>>, DriverError> {
        if let Some(live) = self.live().get(&id) {
            return Ok(Some(live.clone()));
        }
        let Some(slot) = record.slot else { return Ok(None) };
        let Some(pidfd) = live::find(&self.factory.cgroups, slot) else { return Ok(None) };
        let pidfd = PidFd::new(pidfd).map_err(|error| failed("watch the sandbox", &error))?;
        Ok(Some(Arc::new(Live::new(id, slot, pidfd))))
    }

    /// Remembers a power-off before the agent, who knows of it, is ended.
    pub(super) fn note_power_off(&self, id: SessionId, powered_off: bool) -> Result<(), DriverError> {
        let directory = self.directory(id);
        match Record::read(&directory) {
            Some(record) if powered_off && !record.powered_off => Record { powered_off, ..record }
                .write_synced(&directory)
                .map_err(|error| capacity::refusal("write the sandbox's record", &error)),
            _ => Ok(()),
        }
    }

    /// Brings the disk of a sandbox without processes to rest, and releases all the rest. Blocks.
    fn settle(&self, id: SessionId) -> Result<(), DriverError> {
        let directory = self.directory(id);
        let record = Record::read(&directory).ok_or(DriverError::Gone)?;
        let Some(slot) = record.slot else { return Ok(()) };
        let disk = disk::path(&directory);
        disk::wait_until_unmounted(&disk).map_err(|error| failed("unmount the disk", &error))?;
        File::open(&disk).and_then(|disk| disk.sync_all()).map_err(|error| failed("sync the disk", &error))?;
        live::remove_group(&self.factory.cgroups, slot);
        Record { slot: None, ..record }
            .write_synced(&directory)
            .map_err(|error| capacity::refusal("write the sandbox's record", &error))?;
        self.factory.release(slot);
        Ok(())
    }

    /// Removes all of a sandbox whose processes are gone. Blocks.
    fn release(&self, id: SessionId, slot: Option<u32>) {
        if let Some(slot) = slot {
            live::remove_group(&self.factory.cgroups, slot);
        }
        let directory = self.directory(id);
        if let Err(error) = fs::remove_dir_all(&directory) {
            tracing::warn!(%error, directory = %directory.display(), "could not remove a sandbox's directory");
        }
        if let Some(slot) = slot {
            self.factory.release(slot);
        }
        self.releasing().remove(&id);
        self.released.notify_one();
    }
}

/// A frozen file system would keep the sandbox's processes from ending.
async fn thaw_disk(directory: PathBuf) -> Result<(), DriverError> {
    if !images::is_marked_frozen(&directory) {
        return Ok(());
    }
    let thawed = tokio::time::timeout(THAW_MAX, blocking(move || images::thaw(&directory))).await;
    thawed.map_err(|_| too_long("the disk was not thawed", THAW_MAX))?.map_err(|error| failed("thaw the disk", &error))
}
