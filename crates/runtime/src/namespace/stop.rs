//! How a sandbox comes to rest, with its disk or without, and what a later server finds of it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nagaya_api::ids::SessionId;
use nagaya_engine::ports::{Adopted, DriverError};

use super::core::DriverCore;
use super::running::{self, PidFd, RunningSandbox};
use crate::host::record::Record;
use crate::host::{blocking, capacity, disk, disk_images, failed, too_long};

/// How long a disk may take to be written back before whoever waits is told; it goes on meanwhile.
const WRITE_BACK_MAX: Duration = Duration::from_secs(120);
/// How long a file system that was frozen for a copy may take to go on.
const THAW_MAX: Duration = Duration::from_secs(30);

impl DriverCore {
    /// Takes over what an earlier server left, or what this one knows already.
    pub(super) async fn adopt(self: &Arc<Self>, id: SessionId) -> Result<Adopted, DriverError> {
        let directory = self.host.directory(id);
        let record = Record::read(&directory).ok_or(DriverError::Gone)?;
        thaw_disk(directory.clone()).await?;
        let mut powered_off = record.powered_off;
        if let Some(running) = self.find(id, &record)? {
            let connecting = async {
                let link = running::connect(&self.host, &running, self.shortcuts).await?;
                if link.powered_off() {
                    return Ok(None);
                }
                let frozen = self.is_frozen(&running);
                // A server may have been killed between halting the clocks and halting the processes.
                super::pause::set_clocks(&running, Some(link.clone()), frozen).await?;
                Ok(Some((frozen, link)))
            };
            let connected = tokio::select! {
                biased;
                () = running.pidfd.ended() => Ok(None),
                connected = connecting => connected,
            };
            match connected {
                Ok(Some((frozen, link))) => {
                    if self.running_sandboxes().insert(id, running.clone()).is_none() {
                        self.watch(&running);
                    }
                    self.watch_power(&running, &link);
                    return Ok(if frozen { Adopted::Frozen(link) } else { Adopted::Running(link) });
                }
                Ok(None) => powered_off |= !running.pidfd.has_ended(),
                // It died on the way.
                Err(_) if running.pidfd.has_ended() => {}
                Err(error) => return Err(error),
            }
            self.note_power_off(id, powered_off)?;
        }
        self.stop(id).await?;
        let host_restarted = record.boot_id.is_some_and(|boot_id| boot_id != self.host.boot_id);
        Ok(Adopted::Stopped { powered_off, host_restarted })
    }

    /// Ends all processes and keeps the disk.
    pub(super) async fn stop(self: &Arc<Self>, id: SessionId) -> Result<(), DriverError> {
        let directory = self.host.directory(id);
        let record = Record::read(&directory).ok_or(DriverError::Gone)?;
        thaw_disk(directory.clone()).await?;
        if let Some(running) = self.find(id, &record)? {
            // Written back while a failure can still be told, and everything goes on.
            if !running.pidfd.has_ended() {
                let written =
                    tokio::time::timeout(WRITE_BACK_MAX, blocking(move || disk_images::sync_disk(&directory))).await;
                match written.map_err(|_| too_long("the disk was not written back", WRITE_BACK_MAX))? {
                    // What could not be written is lost already, and cannot be but on the host's side of the disk.
                    Err(error) if self.disk_failed(id).await => {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(error, %id, "stopping a sandbox whose disk had errors; its next start repairs it");
                    }
                    written => written.map_err(|error| capacity::refusal("write the disk back", &error))?,
                }
            }
            running.end(&self.host).await?;
        }
        self.running_sandboxes().remove(&id);
        let inner = self.clone();
        blocking(move || inner.settle(id)).await
    }

    /// Whether the disk of a sandbox that is up takes no more writes.
    pub(super) async fn disk_failed(&self, id: SessionId) -> bool {
        let host = self.host.clone();
        blocking(move || host.disk_faults(id).0).await
    }

    /// Ends a sandbox, disk and all. The rest is released in the background.
    pub(super) async fn destroy(self: &Arc<Self>, id: SessionId) -> Result<(), DriverError> {
        let directory = self.host.directory(id);
        if self.releasing().contains(&id) || !directory.exists() {
            return Ok(());
        }
        let record = Record::read(&directory).unwrap_or_default();
        thaw_disk(directory).await?;
        let running = self.find(id, &record)?;
        if let Some(running) = &running {
            running.end(&self.host).await?;
        }
        self.running_sandboxes().remove(&id);
        self.releasing().insert(id);
        let inner = self.clone();
        tokio::task::spawn_blocking(move || inner.release(id, record.slot));
        Ok(())
    }

    /// The processes of a sandbox: known already, or found by the record's slot.
    fn find(&self, id: SessionId, record: &Record) -> Result<Option<Arc<RunningSandbox>>, DriverError> {
        if let Some(running) = self.running_sandboxes().get(&id) {
            return Ok(Some(running.clone()));
        }
        let Some(slot) = record.slot else { return Ok(None) };
        let Some(pidfd) = running::find(&self.host.group(slot)) else { return Ok(None) };
        let pidfd = PidFd::new(pidfd).map_err(|error| failed("watch the sandbox", &error))?;
        Ok(Some(Arc::new(RunningSandbox::new(id, slot, pidfd))))
    }

    /// Remembers a power-off before the agent, who knows of it, is ended.
    pub(super) fn note_power_off(&self, id: SessionId, powered_off: bool) -> Result<(), DriverError> {
        let directory = self.host.directory(id);
        match Record::read(&directory) {
            Some(record) if powered_off && !record.powered_off => Record { powered_off, ..record }
                .write_synced(&directory)
                .map_err(|error| capacity::refusal("write the sandbox's record", &error)),
            _ => Ok(()),
        }
    }

    /// Brings the disk of a sandbox without processes to rest, and releases all the rest. Blocks.
    fn settle(&self, id: SessionId) -> Result<(), DriverError> {
        let directory = self.host.directory(id);
        let record = Record::read(&directory).ok_or(DriverError::Gone)?;
        let Some(slot) = record.slot else { return Ok(()) };
        let disk = disk::path(&directory);
        disk::wait_until_unmounted(&disk).map_err(|error| failed("unmount the disk", &error))?;
        File::open(&disk).and_then(|disk| disk.sync_all()).map_err(|error| failed("sync the disk", &error))?;
        running::remove_group(&self.host.group(slot));
        Record { slot: None, ..record }
            .write_synced(&directory)
            .map_err(|error| capacity::refusal("write the sandbox's record", &error))?;
        self.host.release_number(slot);
        Ok(())
    }

    /// Removes all of a sandbox whose processes are gone. Blocks.
    fn release(&self, id: SessionId, slot: Option<u32>) {
        if let Some(slot) = slot {
            running::remove_group(&self.host.group(slot));
        }
        let directory = self.host.directory(id);
        if let Err(error) = fs::remove_dir_all(&directory) {
            tracing::warn!(%error, directory = %directory.display(), "could not remove a sandbox's directory");
        }
        if let Some(slot) = slot {
            self.host.release_number(slot);
        }
        self.releasing().remove(&id);
        self.released.notify_one();
    }
}

/// A frozen file system would keep the sandbox's processes from ending.
async fn thaw_disk(directory: PathBuf) -> Result<(), DriverError> {
    if !disk_images::is_marked_frozen(&directory) {
        return Ok(());
    }
    let thawed = tokio::time::timeout(THAW_MAX, blocking(move || disk_images::thaw(&directory))).await;
    thawed.map_err(|_| too_long("the disk was not thawed", THAW_MAX))?.map_err(|error| failed("thaw the disk", &error))
}
