//! The sandbox's end from inside: `poweroff` and its kin ask the first process for it with a signal.
//!
//! All processes are ended and what they wrote is written back; then the agent stays, so that the
//! next server learns of it, however long none was there.

use std::sync::Arc;
use std::time::Duration;

use nagaya_api::error::Code;
use rustix::fs::{Mode, OFlags};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::failure::Failure;
use super::{Agent, sys};

/// How those that know no other way ask a first process to power off or to halt: the image's own
/// `poweroff` with SIGPWR, busybox with SIGUSR1 and SIGUSR2, what was made for systemd with the real-time
/// signals 3 and 4, which C libraries count from 34.
pub const SIGNALS: [i32; 5] = [libc::SIGPWR, libc::SIGUSR1, libc::SIGUSR2, 37, 38];

/// Between TERM and KILL.
const GRACE: Duration = Duration::from_secs(5);
/// How long after KILL the ends of processes are waited for. Only the kernel can hold them up.
const AFTER_KILL: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
pub struct Power {
    state: watch::Sender<State>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    On,
    /// Processes are being ended.
    GoingOff,
    Off,
}

impl Power {
    /// Refuses what needs a sandbox that is on.
    pub fn require_on(&self) -> Result<(), Failure> {
        match *self.state.borrow() {
            State::On => Ok(()),
            State::GoingOff | State::Off => {
                Err(Failure::new(Code::SessionNotRunning, "the sandbox powered itself off"))
            }
        }
    }

    pub fn is_off(&self) -> bool {
        *self.state.borrow() == State::Off
    }

    /// Completes when the sandbox has powered itself off.
    pub async fn off(&self) {
        let mut state = self.state.subscribe();
        let _ = state.wait_for(|state| *state == State::Off).await.expect("the sender is ours");
    }
}

/// Waits to be asked. Only for process 1: the processes it ends are all that it can see.
pub fn obey(agent: &Arc<Agent>) -> std::io::Result<()> {
    for number in SIGNALS {
        let mut asked = signal(SignalKind::from_raw(number))?;
        let agent = agent.clone();
        tokio::spawn(async move {
            if asked.recv().await.is_some() {
                power_off(&agent).await;
            }
        });
    }
    Ok(())
}

async fn power_off(agent: &Agent) {
    let first = agent.power.state.send_if_modified(|state| {
        let on = *state == State::On;
        *state = if on { State::GoingOff } else { *state };
        on
    });
    if !first {
        return;
    }
    sys::signal_all(libc::SIGTERM);
    if !all_ended(agent, GRACE).await {
        sys::signal_all(libc::SIGKILL);
        all_ended(agent, AFTER_KILL).await;
    }
    // What fails to be written here is tried again when the disk is unmounted.
    let _ = tokio::task::spawn_blocking(|| {
        let root = rustix::fs::open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::fs::syncfs(root)
    })
    .await;
    agent.power.state.send_replace(State::Off);
}

/// Whether all processes ended within this time.
async fn all_ended(agent: &Agent, within: Duration) -> bool {
    let deadline = agent.clock.now() + within;
    while agent.reaper.has_children() {
        if agent.clock.now() >= deadline {
            return false;
        }
        agent.clock.sleep(POLL).await;
    }
    true
}
