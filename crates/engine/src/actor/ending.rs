//! The end of a session: recorded, done, recorded as done; each step repeated until it succeeds.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::Ordering;

use nagaya_api::error::{Code, Error};

use super::work::Work;
use super::{Actor, End, Flow};
use crate::backoff::Backoff;
use crate::deadlines::Sleeper;
use crate::errors::store_error;
use crate::executions::failed;
use crate::handle::{Job, Message};
use crate::model::{AttachmentState, EndReason, EventKind, Execution, ExecutionStatus, Session, SessionState};
use crate::ports::{Change, DriverError};

/// Sessions that one end makes the store forget.
const FORGOTTEN_AT_ONCE: u32 = 4;

impl Actor {
    /// Ends the session, whatever that takes: returns when it has ended, or when the engine stops.
    pub(super) async fn end(&mut self, end: End) -> Flow {
        let mut unrecorded = (!self.session.state.is_terminal()).then(|| self.ending(end));
        if let Some(session) = &unrecorded {
            match self.record_ending(session, true).await {
                Some(true) => unrecorded = None,
                // There is no space for the record: the sandbox has some, and is to go anyway.
                Some(false) => self.show(Some(SessionState::Terminating)),
                None => return Flow::Stop,
            }
        }
        self.shared.deadlines.set(Sleeper::Session(self.session.id), None);
        // A creation that reached the driver is waited for: what it makes must be there to destroy.
        if let Some(work) = self.work.take()
            && work.begun.load(Ordering::Acquire)
        {
            self.finish_or_leave(work).await;
        }
        self.live.set_guest(None);
        self.asked.clear();
        let mut backoff = self.shared.backoff();
        while let Err(error) = self.remove_sandbox().await {
            if !self.pause_after(&mut backoff, "its sandbox could not be removed", error.to_string()).await {
                return Flow::Stop;
            }
        }
        if let Some(session) = unrecorded
            && self.record_ending(&session, false).await.is_none()
        {
            return Flow::Stop;
        }
        self.record_end().await
    }

    /// The record of a session that is to end.
    fn ending(&mut self, end: End) -> Session {
        let mut session = self.session.clone();
        session.state = SessionState::Terminating;
        session.end_reason = Some(end.reason);
        session.terminal_error = end.cause;
        session.exhausted = end.exhausted;
        session.attachments.iter_mut().for_each(|of| of.state = AttachmentState::SyncPending);
        self.moving = None;
        session
    }

    /// Records that a session is to end. False, where that may be, when there is no space for it; `None` when the engine
    /// stops.
    async fn record_ending(&mut self, session: &Session, may_wait: bool) -> Option<bool> {
        let mut backoff = self.shared.backoff();
        while let Err(error) = self.commit(session.clone(), Vec::new()).await {
            if may_wait && error.code == Code::CapacityUnavailable {
                tracing::warn!(session = %session.id, "ending a session before it is recorded: there is no space for the record");
                return Some(false);
            }
            if !self.pause_after(&mut backoff, "its end could not be recorded", error.to_string()).await {
                return None;
            }
        }
        Some(true)
    }

    /// Waits for what the driver is doing, but not for ever. What it still makes when nobody waits any more is removed then.
    async fn finish_or_leave(&mut self, work: Work) {
        let (shared, id) = (self.shared.clone(), self.session.id);
        let mut future = work.future;
        let late = shared.clock.sleep_until(shared.clock.now() + shared.config.step_timeout_ms);
        let finishing = async {
            tokio::select! {
                biased;
                _ = &mut future => true,
                () = late => false,
            }
        };
        if !self.meanwhile(finishing).await {
            tracing::warn!(session = %id, "ending a session although its driver is still at something else");
            let (remover, driver) = (shared.clone(), shared.driver_of(&self.session));
            shared.background(async move {
                future.await;
                let what = "what a late step made of an ended session could not be removed";
                remover.insist(what, || driver.destroy(id)).await;
            });
        }
    }

    /// Destroys the sandbox, waits until what it wrote to its volumes is safe, and removes what its disk was to be
    /// made from. All of it can be repeated.
    async fn remove_sandbox(&mut self) -> Result<(), DriverError> {
        let (actors, session) = (self.actors.clone(), self.session.clone());
        self.meanwhile(async move {
            match actors.shared.driver_of(&session).destroy(session.id).await {
                Ok(()) | Err(DriverError::Gone) => {}
                Err(error) => return Err(error),
            }
            for attachment in &session.attachments {
                actors.volumes.settle(attachment).await?;
            }
            match session.source_image_id {
                Some(image) => actors.shared.host.remove_image(image).await,
                None => Ok(()),
            }
        })
        .await
    }

    async fn record_end(&mut self) -> Flow {
        let mut backoff = self.shared.backoff();
        let mut interrupted = self.executions.fail_running(self.shared.clock.now()).await;
        loop {
            let now = self.shared.clock.now();
            let mut session = self.session.clone();
            session.state = SessionState::Terminated;
            session.terminated_at = Some(now);
            session.source_image_id = None;
            session.pause = None;
            session.attachments.clear();
            session.last_activity_at = session.last_activity_at.max(self.live.activity.last(now));
            let result = self.write_end(session.clone(), &mut interrupted).await;
            match result {
                Ok(()) => {
                    let before = std::mem::replace(&mut self.session, session);
                    for attachment in before.attachments {
                        self.actors.volumes.release(attachment.volume_id, before.id);
                    }
                    break;
                }
                Err(error) => {
                    if !self.pause_after(&mut backoff, "its end could not be recorded", error.to_string()).await {
                        return Flow::Stop;
                    }
                }
            }
        }
        // In this order: whoever learns that it has ended finds its quota and its name free and its record in the store.
        self.actors.registry.live.remove(self.session.id);
        self.name = None;
        self.actors.previews.session_ended(self.session.id);
        self.slot = None;
        if let Some(id) = self.session.source_snapshot_id {
            // It may have expired while this session kept it.
            self.actors.snapshots.look_at(id);
        }
        for execution in interrupted {
            self.executions.publish(execution);
        }
        self.published.send_replace(self.session.clone());
        self.live.tell_recorded();
        for reply in self.waiting.drain(..) {
            let _ = reply.send(Ok(self.session.clone()));
        }
        self.mailbox.close();
        while let Some(message) = self.mailbox.recv().await {
            match message {
                Message::Terminate { reply } => {
                    let _ = reply.send(Ok(self.session.clone()));
                }
                other => refuse(other),
            }
        }
        self.jobs.close();
        while let Some(job) = self.jobs.recv().await {
            refuse_job(job, &Code::SessionTerminated.into());
        }
        Flow::Stop
    }

    /// Commits the last record together with those of the commands that ended with it.
    async fn write_end(&mut self, session: Session, interrupted: &mut Vec<Execution>) -> Result<(), Error> {
        // One that this process did not adopt may have commands from an earlier process.
        if !self.executions_known {
            let store = self.shared.store.clone();
            let id = session.id;
            let recorded = self.meanwhile(async move { store.executions(id).await }).await;
            let now = session.terminated_at.unwrap_or_default();
            let running = recorded.map_err(store_error)?.into_iter().filter(|e| e.status == ExecutionStatus::Running);
            *interrupted = running.map(|execution| failed(execution, now)).collect();
        }
        let pause = self.session.pause.as_ref().map(|pause| Change::ForgetSnapshot(pause.snapshot_id));
        let cause = session.terminal_error.clone();
        let ended =
            self.event(EventKind::Terminated { reason: session.end_reason.unwrap_or(EndReason::Failed), cause });
        let now = session.terminated_at.unwrap_or_default();
        let ended_before = now.saturating_sub(self.shared.config.ended_sessions_kept_ms);
        // More than one, so that their number shrinks when the time was made shorter.
        let forget = Change::ForgetEnded { ended_before, sessions_max: FORGOTTEN_AT_ONCE };
        let mut changes = vec![Change::Session(session), ended, forget];
        changes.extend(pause);
        changes.extend(self.unrecorded.iter().cloned());
        changes.extend(interrupted.iter().cloned().map(Change::Execution));
        self.shared.write(changes).await
    }

    /// Runs a future while answering messages, for a session that is ending.
    async fn meanwhile<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        loop {
            tokio::select! {
                biased;
                output = &mut future => return output,
                Some(message) = self.mailbox.recv() => match message {
                    Message::Terminate { reply } => self.waiting.push(reply),
                    other => refuse(other),
                },
                Some(job) = self.jobs.recv() => refuse_job(job, &Code::SessionTerminated.into()),
            }
        }
    }

    /// Reports a failed step of the ending to those who wait, and pauses before the next attempt.
    /// False when the engine stops instead; the next start finishes the ending.
    async fn pause_after(&mut self, backoff: &mut Backoff, what: &str, error: String) -> bool {
        tracing::warn!(session = %self.session.id, error, "ending a session: {what}; trying again");
        self.attempted = None;
        for reply in self.waiting.drain(..) {
            let detail = format!("the session is ending, but {what} yet; the server keeps trying");
            let _ = reply.send(Err(Error::new(Code::Internal, detail)));
        }
        let wake = self.shared.clock.sleep_until(self.shared.clock.now() + backoff.next_ms());
        let shared = self.shared.clone();
        self.meanwhile(async move {
            tokio::select! {
                biased;
                () = shared.tasks.stopping() => false,
                () = wake => true,
            }
        })
        .await
    }
}

fn refuse(message: Message) {
    let error = || Error::from(Code::SessionTerminated);
    match message {
        Message::Update { reply, .. } | Message::Extend { reply, .. } | Message::Terminate { reply } => {
            let _ = reply.send(Err(error()));
        }
        Message::Execute { reply, .. } => {
            let _ = reply.send(Err(error()));
        }
    }
}

pub(super) fn refuse_job(job: Job, error: &Error) {
    match job {
        Job::Pause { reply } | Job::Resume { reply } | Job::Wake { reply } | Job::Restrict { reply, .. } => {
            drop(reply.send(Err(error.clone())));
        }
        Job::Copy { reply, .. } => drop(reply.send(Err(error.clone()))),
        Job::Attach { reply, .. } => drop(reply.send(Err(error.clone()))),
        Job::Detach { reply, .. } => drop(reply.send(Err(error.clone()))),
    }
}
