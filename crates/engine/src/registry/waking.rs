//! Reaching a session from outside, which may mean to wake it.

use std::sync::Arc;

use nagaya_api::error::{Code, Error};

use super::Registry;
use crate::handle::{InUse, Job, SessionHandle};
use crate::model::{Session, SessionState};
use crate::ports::Guest;

/// A running sandbox, and what keeps it running.
type Entered = (InUse, Arc<dyn Guest>);

impl Registry {
    /// Waits until the session runs, and wakes it where visits may. From then on it is in use.
    pub(crate) async fn reach(&self, live: &Arc<SessionHandle>) -> Result<Entered, Error> {
        if let Some(running) = self.enter_running(live)? {
            return Ok(running);
        }
        let patience =
            self.shared.clock.sleep_until(self.shared.clock.now().saturating_add(self.shared.config.wake_timeout_ms));
        tokio::select! {
            biased;
            () = self.shared.tasks.stopping() => Err(Code::Draining.into()),
            reached = self.wake(live) => reached,
            () = patience => Err(not_running(live.state())),
        }
    }

    /// `None` when it does not run just now.
    fn enter_running(&self, live: &Arc<SessionHandle>) -> Result<Option<Entered>, Error> {
        if live.state() != SessionState::Running {
            return Ok(None);
        }
        // Entered before the second look, so that it cannot have become idle in between.
        let in_use = InUse::new(live.clone(), self.shared.clock.clone());
        match (live.guest(), live.state()) {
            (Some(guest), SessionState::Running) => Ok(Some((in_use, guest))),
            (None, SessionState::Running) => Err(Code::GuestUnreachable.into()),
            _ => Ok(None),
        }
    }

    async fn wake(&self, live: &Arc<SessionHandle>) -> Result<Entered, Error> {
        loop {
            if let Some(running) = self.enter_running(live)? {
                return Ok(running);
            }
            let session = live.published.borrow().clone();
            match session.state {
                SessionState::Running => {}
                SessionState::Terminating | SessionState::Terminated => return Err(Code::SessionTerminated.into()),
                SessionState::Paused | SessionState::UserShutdown => {
                    // Others may ask for the same; the first one resumes it.
                    live.ask_job(|reply| Job::Wake { reply }).await?;
                }
                SessionState::Creating | SessionState::Pausing | SessionState::Resuming => {
                    let settled = |of: &Session| of.state != session.state;
                    let mut states = live.published.clone();
                    states.wait_for(settled).await.map_err(|_| Error::from(Code::Draining))?;
                }
            }
        }
    }
}

fn not_running(state: SessionState) -> Error {
    Error::new(Code::SessionNotRunning, format!("(state={})", state.name()))
}
