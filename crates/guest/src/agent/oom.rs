//! Whether the kernel killed something in the sandbox for want of memory.

use std::os::fd::AsFd;

use super::Agent;

/// A count of such kills, to compare with a later one.
#[derive(Debug, Clone, Copy)]
pub struct OutOfMemory(Option<u64>);

impl OutOfMemory {
    /// Remembers the count of now.
    pub fn watch(agent: &Agent) -> Self {
        Self(count(agent))
    }

    /// True when there was a kill since.
    pub fn happened(self, agent: &Agent) -> bool {
        matches!((self.0, count(agent)), (Some(before), Some(now)) if now > before)
    }
}

fn count(agent: &Agent) -> Option<u64> {
    let text = super::meminfo::read_small(agent.settings.memory_events.as_ref()?.as_fd())?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}
