//! Collects every process that ends: commands, and orphans that end up with process 1.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, WaitOptions, WaitStatus, wait, waitid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::sys::SpawnError;

/// Ends that are collected before others of the agent's tasks have their turn.
const AT_ONCE: usize = 64;

/// Knows who waits for which process.
#[derive(Debug, Default)]
pub struct Reaper {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<i32, oneshot::Sender<WaitStatus>>,
    /// Processes being started, whose ids are not known yet.
    starting: usize,
    /// Ends of processes nobody waited for, kept while any is being started.
    early: HashMap<i32, WaitStatus>,
}

impl Reaper {
    /// Starts collecting. Must be called within the runtime, once.
    pub fn start() -> std::io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child())?;
        let collector = reaper.clone();
        tokio::spawn(async move {
            loop {
                if collector.collect() {
                    // The rest of the agent goes on, however fast processes end.
                    tokio::task::yield_now().await;
                } else if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Runs `start`, which makes a child, and returns the child's id and where its end is told,
    /// even when it ends before `start` has returned.
    pub fn spawn(
        &self,
        start: impl FnOnce() -> Result<i32, SpawnError>,
    ) -> Result<(i32, oneshot::Receiver<WaitStatus>), SpawnError> {
        self.state().starting += 1;
        let started = start();
        let mut state = self.state();
        state.starting -= 1;
        let result = started.map(|pid| {
            let (sender, receiver) = oneshot::channel();
            match state.early.remove(&pid) {
                Some(status) => drop(sender.send(status)),
                None => drop(state.waiting.insert(pid, sender)),
            }
            (pid, receiver)
        });
        if state.starting == 0 {
            state.early.clear();
        }
        result
    }

    /// Commands that have not ended.
    pub fn running(&self) -> usize {
        self.state().waiting.len()
    }

    /// Whether any process is left, ours or adopted. Its end is not collected.
    pub fn has_children(&self) -> bool {
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        !matches!(waitid(WaitId::All, look), Err(Errno::CHILD))
    }

    /// Collects some ends. True when there may be more.
    fn collect(&self) -> bool {
        for _ in 0..AT_ONCE {
            // The lock is held so that an end cannot fall between a start and its registration.
            let mut state = self.state();
            let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) else {
                return false;
            };
            let pid = pid.as_raw_nonzero().get();
            match state.waiting.remove(&pid) {
                Some(sender) => drop(sender.send(status)),
                None if state.starting > 0 => drop(state.early.insert(pid, status)),
                None => {}
            }
        }
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while holding the table of processes")
    }
}
