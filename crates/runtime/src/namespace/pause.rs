//! Halting a sandbox's processes where they are, and letting them go on.

use std::sync::Arc;
use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_api::ids::SessionId;
use nagaya_engine::ports::DriverError;

use super::core::DriverCore;
use super::running::RunningSandbox;
use crate::agent_client::Link;
use crate::cgroup::Group;
use crate::host::{blocking, failed};

/// How long an agent has for halting clocks; and one that stands still itself, which counts nothing meanwhile.
const CLOCKS_MAX: Duration = Duration::from_secs(2);
const CLOCKS_OF_HALTED_MAX: Duration = Duration::from_millis(100);

impl DriverCore {
    pub(super) async fn freeze(&self, id: SessionId) -> Result<(), DriverError> {
        let running = self.running(id)?;
        set_clocks(&running, running.link(), true).await?;
        let group = self.group(&running);
        let frozen = blocking(move || group.freeze()).await;
        if frozen.is_err() {
            set_clocks(&running, running.link(), false).await?;
        }
        frozen.map_err(|error| failed("freeze the sandbox", &error))
    }

    pub(super) async fn thaw(&self, id: SessionId) -> Result<(), DriverError> {
        let running = self.running(id)?;
        if self.is_frozen(&running) && self.disk_failed(id).await {
            return self.give_up_memory(&running).await;
        }
        let group = self.group(&running);
        blocking(move || group.thaw()).await.map_err(|error| failed("thaw the sandbox", &error))?;
        // Where there is no connection, whoever connects next sets them going.
        set_clocks(&running, running.link(), false).await
    }

    /// A sandbox whose disk takes no more writes can only go on from that, once it is repaired: its processes are ended. As
    /// long as there is no space to repair it with, it stays as it is.
    async fn give_up_memory(&self, running: &RunningSandbox) -> Result<(), DriverError> {
        if let Some(limit) = self.host.lacking() {
            return Err(DriverError::Exhausted(limit));
        }
        tracing::warn!(id = %running.id, "the sandbox's disk had errors: it goes on from its disk, which is repaired first");
        running.end(&self.host).await?;
        Err(DriverError::Gone)
    }

    pub(super) fn is_frozen(&self, running: &RunningSandbox) -> bool {
        // One that was made by a server that knew no pause has nothing to look at.
        self.group(running).is_to_be_frozen().unwrap_or(false)
    }

    pub(super) fn running(&self, id: SessionId) -> Result<Arc<RunningSandbox>, DriverError> {
        let running = self.running_sandboxes().get(&id).cloned();
        // The agent of one that powered itself off is still there, and nothing else.
        running.filter(|running| !running.is_ending() && !running.pidfd.has_ended()).ok_or(DriverError::Gone)
    }

    pub(super) fn group(&self, running: &RunningSandbox) -> Group {
        self.host.group(running.slot)
    }
}

/// Halts the clocks of commands' timeouts, or lets them go on. An agent that is too old for it lets them go on. One that does
/// not answer is not waited for: it gets the request when it goes on.
pub(super) async fn set_clocks(
    running: &RunningSandbox,
    link: Option<Arc<Link>>,
    halted: bool,
) -> Result<(), DriverError> {
    let Some(link) = link else { return Ok(()) };
    let limit = if running.pidfd.is_halted() { CLOCKS_OF_HALTED_MAX } else { CLOCKS_MAX };
    let asking = async { if halted { link.suspend().await } else { link.go_on().await } };
    match tokio::time::timeout(limit, asking).await {
        Ok(Err(error)) if error.code != Code::CapabilityUnavailable => Err(failed("reach the sandbox's agent", &error)),
        Ok(_) => Ok(()),
        Err(_) => {
            tracing::warn!(id = %running.id, halted, "the sandbox's first process does not answer; timeouts of its commands may be off");
            Ok(())
        }
    }
}
