//! Halting a sandbox's processes where they are, and letting them go on.

use std::sync::Arc;
use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_api::ids::SessionId;
use nagaya_engine::ports::DriverError;

use super::live::Live;
use super::slots::group_name;
use super::{Inner, blocking, capacity, failed};
use crate::agent_client::Link;
use crate::cgroup::Group;

/// How long an agent has for halting clocks; and one that stands still itself, which counts nothing meanwhile.
const CLOCKS_MAX: Duration = Duration::from_secs(2);
const CLOCKS_OF_HALTED_MAX: Duration = Duration::from_millis(100);

impl Inner {
    pub(super) async fn freeze(&self, id: SessionId) -> Result<(), DriverError> {
        let live = self.running(id)?;
        set_clocks(&live, live.link(), true).await?;
        let group = self.group(&live);
        let frozen = blocking(move || group.freeze()).await;
        if frozen.is_err() {
            set_clocks(&live, live.link(), false).await?;
        }
        frozen.map_err(|error| failed("freeze the sandbox", &error))
    }

    pub(super) async fn thaw(&self, id: SessionId) -> Result<(), DriverError> {
        let live = self.running(id)?;
        if self.is_frozen(&live) && self.disk_failed(id).await {
            return self.give_up_memory(&live).await;
        }
        let group = self.group(&live);
        blocking(move || group.thaw()).await.map_err(|error| failed("thaw the sandbox", &error))?;
        // Where there is no connection, whoever connects next sets them going.
        set_clocks(&live, live.link(), false).await
    }

    /// A sandbox whose disk takes no more writes can only go on from that, once it is repaired: its processes are ended. As
    /// long as there is no space to repair it with, it stays as it is.
    async fn give_up_memory(&self, live: &Live) -> Result<(), DriverError> {
        if let Some(limit) = capacity::lacking(&self.config, self.storage.root()) {
            return Err(DriverError::Exhausted(limit));
        }
        tracing::warn!(id = %live.id, "the sandbox's disk had errors: it goes on from its disk, which is repaired first");
        live.end(&self.factory.cgroups).await?;
        Err(DriverError::Gone)
    }

    pub(super) fn is_frozen(&self, live: &Live) -> bool {
        // One that was made by a server that knew no pause has nothing to look at.
        self.group(live).is_to_be_frozen().unwrap_or(false)
    }

    pub(super) fn running(&self, id: SessionId) -> Result<Arc<Live>, DriverError> {
        let live = self.live().get(&id).cloned();
        // The agent of one that powered itself off is still there, and nothing else.
        live.filter(|live| !live.is_ending() && !live.pidfd.has_ended()).ok_or(DriverError::Gone)
    }

    pub(super) fn group(&self, live: &Live) -> Group {
        self.factory.cgroups.group(&group_name(live.slot))
    }
}

/// Halts the clocks of commands' timeouts, or lets them go on. An agent that is too old for it lets them go on. One that does
/// not answer is not waited for: it gets the request when it goes on.
pub(super) async fn set_clocks(live: &Live, link: Option<Arc<Link>>, halted: bool) -> Result<(), DriverError> {
    let Some(link) = link else { return Ok(()) };
    let limit = if live.pidfd.is_halted() { CLOCKS_OF_HALTED_MAX } else { CLOCKS_MAX };
    let asking = async { if halted { link.suspend().await } else { link.go_on().await } };
    match tokio::time::timeout(limit, asking).await {
        Ok(Err(error)) if error.code != Code::CapabilityUnavailable => Err(failed("reach the sandbox's agent", &error)),
        Ok(_) => Ok(()),
        Err(_) => {
            tracing::warn!(id = %live.id, halted, "the sandbox's first process does not answer; timeouts of its commands may be off");
            Ok(())
        }
    }
}
