//! What a sandbox uses, for those who want to know why it is slow or full.

use std::sync::Arc;
use std::time::Duration;

use nagaya_api::ids::SessionId;
use nagaya_engine::ports::{DriverError, ResourceUsage};
use nagaya_guest::processor_times::{ProcessorTimes, between};
use tokio::time::Instant;

use super::core::DriverCore;
use super::running::RunningSandbox;
use crate::cgroup::{Group, Part};
use crate::host::{blocking, failed};

/// How long processor times are compared: some of the scheduler's periods.
const WINDOW: Duration = Duration::from_millis(250);

impl DriverCore {
    pub(super) async fn usage(self: &Arc<Self>, id: SessionId) -> Result<ResourceUsage, DriverError> {
        let running = self.running(id)?;
        let asked = !self.shortcuts && !running.pidfd.is_halted();
        let mut load = match running.link().filter(|_| asked) {
            Some(link) => link.usage().await.map_err(|error| failed("ask the sandbox's agent", &error))?,
            None => self.usage_from_outside(&running).await?,
        };
        let host = self.host.clone();
        (load.disk_failed, load.disk_held) = blocking(move || host.disk_faults(id)).await;
        Ok(load)
    }

    async fn usage_from_outside(&self, running: &RunningSandbox) -> Result<ResourceUsage, DriverError> {
        let group = self.group(running);
        let before = processor_times(&group).await;
        let begun = Instant::now();
        tokio::time::sleep(WINDOW).await;
        let after = processor_times(&group).await;
        let window = begun.elapsed();
        let mut load = blocking(move || read(&group)).await.map_err(|error| failed("look at the disk", &error))?;
        (load.cpu_used_us, load.cpu_waited_us) = between(&before, &after);
        load.cpu_window_us = window.as_micros() as u64;
        load.halted = running.pidfd.is_halted();
        if let Some(link) = running.link().filter(|_| !load.halted) {
            // An older agent does not tell.
            load.kept_output_bytes = link.kept_output().await.unwrap_or(0);
        }
        Ok(load)
    }
}

async fn processor_times(group: &Group) -> ProcessorTimes {
    let group = group.clone();
    blocking(move || group.processor_times()).await
}

fn read(group: &Group) -> std::io::Result<ResourceUsage> {
    let used = group.load();
    let (disk_used_bytes, disk_size_bytes) = disk(group)?;
    Ok(ResourceUsage {
        memory_bytes: used.memory_bytes,
        memory_limit_bytes: used.memory_limit_bytes,
        memory_kills: used.out_of_memory_kills,
        cpu_periods: used.cpu_periods,
        cpu_periods_throttled: used.cpu_periods_throttled,
        cpu_throttled_us: used.cpu_throttled_us,
        processes: used.processes,
        processes_max: used.processes_max,
        disk_used_bytes,
        disk_size_bytes,
        ..ResourceUsage::default()
    })
}

/// Bytes used and in all on the disk, as the sandbox's first process sees it: it is mounted nowhere else. Zeros when
/// that process is gone.
fn disk(group: &Group) -> std::io::Result<(u64, u64)> {
    let Some(pid) = group.processes(Part::Agent).into_iter().next() else { return Ok((0, 0)) };
    match rustix::fs::statvfs(format!("/proc/{pid}/root/")) {
        Ok(disk) => {
            let size = disk.f_blocks.saturating_mul(disk.f_frsize);
            Ok((size.saturating_sub(disk.f_bavail.saturating_mul(disk.f_frsize)), size))
        }
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH) => Ok((0, 0)),
        Err(error) => Err(error.into()),
    }
}
