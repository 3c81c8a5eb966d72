//! Halting a sandbox's processes where they are, and letting them go on.

use std::sync::Arc;

use nagaya_api::error::Code;
use nagaya_api::ids::SessionId;
use nagaya_engine::ports::DriverError;

use super::live::Live;
use super::slots::group_name;
use super::{Inner, blocking, failed};
use crate::cgroup::Group;
use crate::link::Link;

impl Inner {
    pub(super) async fn freeze(&self, id: SessionId) -> Result<(), DriverError> {
        let live = self.running(id)?;
        if let Some(link) = live.link() {
            set_clocks(&link, true).await?;
        }
        let group = self.group(&live);
        let frozen = blocking(move || group.freeze()).await;
        if frozen.is_err()
            && let Some(link) = live.link()
        {
            set_clocks(&link, false).await?;
        }
        frozen.map_err(|error| failed("freeze the sandbox", &error))
    }

    pub(super) async fn thaw(&self, id: SessionId) -> Result<(), DriverError> {
        let live = self.running(id)?;
        let group = self.group(&live);
        blocking(move || group.thaw()).await.map_err(|error| failed("thaw the sandbox", &error))?;
        match live.link() {
            Some(link) => set_clocks(&link, false).await,
            // Whoever connects next sets them going.
            None => Ok(()),
        }
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

/// Halts the clocks of commands' timeouts, or lets them go on. An agent that is too old for it lets them go on.
pub(super) async fn set_clocks(link: &Link, halted: bool) -> Result<(), DriverError> {
    let set = if halted { link.suspend().await } else { link.go_on().await };
    match set {
        Err(error) if error.code != Code::CapabilityUnavailable => Err(failed("reach the sandbox's agent", &error)),
        _ => Ok(()),
    }
}
