//! Pause and resume, the unasked end of a sandbox, and what an adopted one turns out to be.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{DiskImageId, SnapshotId};

use super::mounts::attached;
use super::work::{AdoptError, Done, StartFailure, later, work};
use super::{Actor, End, Flow};
use crate::errors::store_error;
use crate::executions::failed;
use crate::handle::{Exit, Reply};
use crate::model::{
    AttachmentState, DiskOnlyReason, Durability, EventKind, Execution, ExecutionStatus, Pause, PauseReason,
    RestoreMode, Resume, Session, SessionState, Snapshot, SnapshotKind, SnapshotState, UnixMs,
};
use crate::ports::{Adopted, Change, DriverError, Guest};
use crate::session::{Request, Verdict, accept, check};

impl Actor {
    pub(super) async fn created(&mut self, result: Result<Arc<dyn Guest>, StartFailure>) -> Flow {
        let guest = match result {
            Ok(guest) => guest,
            Err(cause) => {
                let exhausted = match cause {
                    StartFailure::NoCapacity(limit) => Some(limit),
                    StartFailure::Refused(_) | StartFailure::Other(_) => None,
                };
                let cause = cause.to_string();
                tracing::warn!(session = %self.session.id, cause, "a sandbox could not be created");
                return Flow::End(End { exhausted, ..End::failed(cause) });
            }
        };
        let now = self.shared.clock.now();
        let mut session = self.session.clone();
        session.state = SessionState::Running;
        session.ready_at = Some(now);
        session.source_image_id = None;
        mark_attached(&mut session);
        // Set before the state is published, so that whoever reads RUNNING can use it.
        self.live.set_guest(Some(guest));
        let mut facts = vec![EventKind::Ready { after_ms: now.saturating_sub(session.created_at) }];
        facts.extend(session.attachments.iter().map(attached));
        match self.commit_with(session, facts).await {
            Ok(()) => Flow::Continue,
            Err(_) => Flow::End(End::failed("the server could not record the sandbox")),
        }
    }

    /// Whoever asks for a pause wants it to last: where it began by itself, visitors end it no more.
    pub(super) async fn pause_asked(&mut self, reply: Reply<Session>) {
        if self.session.pause.as_ref().is_some_and(|pause| pause.idle) {
            let mut session = self.session.clone();
            session.pause.iter_mut().for_each(|pause| pause.idle = false);
            if let Err(error) = self.commit(session, Vec::new()).await {
                return answer(Some(reply), Err(error));
            }
        }
        self.pause(Some(reply));
    }

    /// Freezes the sandbox. `None` when nobody asked for it.
    pub(super) fn pause(&mut self, reply: Option<Reply<Session>>) {
        if let Some(refusal) = self.settled(Request::Pause) {
            return answer(reply, refusal);
        }
        self.show(Some(SessionState::Pausing));
        let (driver, id) = (self.shared.driver_of(&self.session), self.session.id);
        self.work = Some(work(async move { Done::Frozen { result: driver.freeze(id).await, reply } }));
    }

    /// The answer to a request that the committed state has nothing to do for.
    fn settled(&self, request: Request) -> Option<Result<Session, Error>> {
        if let Err(error) = check(self.session.state, request) {
            return Some(Err(error));
        }
        let settled = accept(self.session.state, request) == Verdict::Nothing;
        settled.then(|| Ok(self.live.session(self.shared.clock.now())))
    }

    pub(super) async fn frozen(&mut self, result: Result<(), DriverError>, reply: Option<Reply<Session>>) {
        let failure = match result {
            Ok(()) => match self.record_pause(reply.is_none()).await {
                Ok(()) => return answer(reply, Ok(self.session.clone())),
                Err(error) => error,
            },
            Err(DriverError::Gone) => {
                let cause = "the sandbox ended while it was being paused".to_owned();
                self.ended = Some(Exit { cause: cause.clone(), powered_off: false, host_restarted: false });
                self.show(None);
                return answer(reply, Err(Error::new(Code::PauseFailed, cause)));
            }
            Err(error) => Error::new(Code::PauseFailed, error.to_string()),
        };
        tracing::warn!(session = %self.session.id, error = %failure, "a pause failed");
        if reply.is_none() {
            self.try_later();
        }
        answer(reply, Err(failure));
        self.work = Some(self.undo(false));
    }

    async fn record_pause(&mut self, idle: bool) -> Result<(), Error> {
        let mut session = self.session.clone();
        let snapshot = self.stop_record(&mut session, SessionState::Paused, None);
        session.pause.iter_mut().for_each(|pause| pause.idle = idle);
        let reason = if idle { PauseReason::Idle } else { PauseReason::Requested };
        let paused = self.event(EventKind::Paused { reason, cause: String::new() });
        self.moving = None;
        if let Err(error) = self.commit(session, vec![Change::Snapshot(snapshot), paused]).await {
            self.moving = Some(SessionState::Pausing);
            return Err(error);
        }
        self.slot = None;
        self.retry = self.shared.backoff();
        self.live.memory_low.store(false, Ordering::Release);
        Ok(())
    }

    /// Turns the record of a running session into that of a stopped one; an empty reason keeps its memory.
    /// Returns the snapshot that stands for its disk.
    fn stop_record(&self, session: &mut Session, state: SessionState, disk_reason: Option<DiskOnlyReason>) -> Snapshot {
        let now = self.shared.clock.now();
        let snapshot = pause_snapshot(session, now, self.shared.random(), self.shared.random());
        let shared = &self.shared;
        let of_workspace = || shared.access.settings(session.workspace_id).pause_retention_ms;
        let retention_ms = session.pause_retention_ms.or_else(of_workspace);
        let retention_ms = retention_ms.or(shared.config.pause_retention_default_ms);
        session.state = state;
        session.last_resume_error.clear();
        session.pause = Some(Pause {
            paused_at: now,
            expires_at: retention_ms.map(|ms| now.saturating_add(ms)),
            snapshot_id: snapshot.id,
            in_memory: disk_reason.is_none(),
            disk_reason,
            idle: false,
        });
        snapshot
    }

    /// A move was taken back: the session is again what its record says.
    pub(super) fn undone(&mut self) {
        self.show(None);
        if self.session.state != SessionState::Running {
            self.slot = None;
        }
    }

    /// Decided here, so that whoever was told of a pause finds it lasting.
    pub(super) async fn wake(&mut self, reply: Reply<Session>) {
        if !self.may_wake() {
            let state = self.session.state.name();
            return answer(Some(reply), Err(Error::new(Code::SessionNotRunning, format!("(state={state})"))));
        }
        self.resume(reply).await;
    }

    fn may_wake(&self) -> bool {
        let visits = self.session.wake_on_visit.unwrap_or(self.shared.config.wake_on_visit);
        self.session.pause.as_ref().is_none_or(|pause| visits.wakes(pause))
    }

    pub(super) async fn resume(&mut self, reply: Reply<Session>) {
        if let Some(refusal) = self.settled(Request::Resume) {
            return answer(Some(reply), refusal);
        }
        let slot = match self.actors.registry.reserve(self.session.workspace_id, &self.session.machine.resources) {
            Ok(slot) => slot,
            Err(error) => {
                self.note_refusal("resuming the session", &error).await;
                return answer(Some(reply), Err(error));
            }
        };
        self.slot = Some(slot);
        self.show(Some(SessionState::Resuming));
        if !self.session.pause.as_ref().is_some_and(|pause| pause.in_memory) {
            return self.start_boot(self.session.clone(), Vec::new(), Vec::new(), reply).await;
        }
        let (driver, id) = (self.shared.driver_of(&self.session), self.session.id);
        self.work = Some(work(async move { Done::Thawed { result: driver.thaw(id).await, reply } }));
    }

    pub(super) async fn thawed(&mut self, result: Result<(), DriverError>, reply: Reply<Session>) {
        let failure = match result {
            Ok(()) => match self.record_resume().await {
                Ok(()) => return answer(Some(reply), Ok(self.session.clone())),
                Err(error) => error,
            },
            // Its processes died while they were frozen: go on from the disk.
            Err(DriverError::Gone) => {
                let mut session = self.session.clone();
                give_up_memory(&mut session, DiskOnlyReason::SandboxEnded);
                self.stop_owed = true;
                match self.interrupted().await {
                    Ok(interrupted) => {
                        let mut changes = vec![self.event(released(DiskOnlyReason::SandboxEnded))];
                        changes.extend(interrupted.iter().cloned().map(Change::Execution));
                        return self.start_boot(session, changes, interrupted, reply).await;
                    }
                    Err(error) => error,
                }
            }
            Err(error) => {
                let mut session = self.session.clone();
                session.last_resume_error = format!("the sandbox could not be thawed: {error}");
                let failure = Error::new(Code::ResumeFailed, session.last_resume_error.clone());
                let fact = EventKind::ResumeFailed { cause: session.last_resume_error.clone() };
                if let Err(error) = self.commit_with(session, vec![fact]).await {
                    tracing::warn!(session = %self.session.id, %error, "a failed resume was not recorded");
                }
                failure
            }
        };
        answer(Some(reply), Err(failure));
        self.work = Some(self.undo(true));
    }

    /// Records that a cold boot begins, and lets it begin.
    async fn start_boot(
        &mut self,
        mut session: Session,
        changes: Vec<Change>,
        interrupted: Vec<Execution>,
        reply: Reply<Session>,
    ) {
        session.state = SessionState::Resuming;
        mark_unattached(&mut session);
        match self.commit(session, changes).await {
            Ok(()) => {
                self.show(None);
                // Whatever ended before this start does not matter any more.
                self.ended = None;
                self.live.set_guest(None);
                self.publish_interrupted(interrupted);
                self.work = Some(self.boot(Some(reply)));
            }
            Err(error) => {
                answer(Some(reply), Err(error));
                self.undone();
            }
        }
    }

    pub(super) async fn booted(&mut self, result: Result<Arc<dyn Guest>, StartFailure>, reply: Option<Reply<Session>>) {
        let recorded = match &result {
            Ok(guest) => {
                self.stop_owed = false;
                self.live.set_guest(Some(guest.clone()));
                self.record_resume().await
            }
            Err(cause) => {
                let mut session = self.session.clone();
                session.state = SessionState::Paused;
                session.last_resume_error = cause.to_string();
                mark_unattached(&mut session);
                // Whatever came up is to go down again.
                self.stop_owed = true;
                self.commit_with(session, vec![EventKind::ResumeFailed { cause: cause.to_string() }]).await
            }
        };
        if let Err(error) = recorded {
            tracing::warn!(session = %self.session.id, %error, "the outcome of a start is still to be recorded");
            let pause_ms = self.retry.next_ms();
            self.work = Some(later(&self.shared, pause_ms, Done::Booted { result, reply }));
            return;
        }
        match result {
            Ok(_) => answer(reply, Ok(self.session.clone())),
            Err(cause) => {
                self.slot = None;
                answer(reply, Err(cause.into_error()));
            }
        }
    }

    async fn record_resume(&mut self) -> Result<(), Error> {
        let now = self.shared.clock.now();
        let mut session = self.session.clone();
        let mut changes = Vec::new();
        session.state = SessionState::Running;
        session.last_resume_error.clear();
        if let Some(pause) = session.pause.take() {
            changes.push(Change::ForgetSnapshot(pause.snapshot_id));
            let stood_still = now.saturating_sub(pause.paused_at);
            session.timeout_at = session.timeout_at.map(|at| at.saturating_add(stood_still));
            let mode = if pause.in_memory { RestoreMode::Memory } else { RestoreMode::ColdBoot };
            session.last_resume = Some(Resume { mode, disk_reason: pause.disk_reason });
            changes.push(self.event(EventKind::Resumed { mode, reason: pause.disk_reason }));
        }
        mark_attached(&mut session);
        // Being resumed is being used: it shall not be idle at once.
        session.last_activity_at = session.last_activity_at.max(now);
        let moving = self.moving.take();
        if let Err(error) = self.commit(session, changes).await {
            self.moving = moving;
            return Err(error);
        }
        self.live.activity.note(now);
        Ok(())
    }

    /// Asks the driver whether it is true that the sandbox ended: news may be older than its last start.
    pub(super) fn probe(&mut self, exit: Exit) {
        if accept(self.session.state, Request::Exit) != Verdict::Do || !self.is_in_memory() {
            return;
        }
        let (driver, id) = (self.shared.driver_of(&self.session), self.session.id);
        let frozen = self.session.state == SessionState::Paused;
        self.work = Some(work(async move {
            let result = if frozen { driver.freeze(id).await } else { driver.thaw(id).await };
            Done::Probed { exit, result }
        }));
    }

    fn is_in_memory(&self) -> bool {
        self.session.pause.as_ref().is_none_or(|pause| pause.in_memory)
    }

    pub(super) fn probed(&mut self, exit: Exit, result: Result<(), DriverError>) {
        match result {
            Ok(()) => tracing::debug!(session = %self.session.id, "news of an end that was an earlier one"),
            Err(DriverError::Gone) => self.ended = Some(exit),
            Err(error) => {
                tracing::warn!(session = %self.session.id, %error, "whether a sandbox ended is not known; trying again");
                self.live.set_exit(exit);
                self.try_later();
            }
        }
    }

    /// Records that the sandbox ended by itself: its disk is kept.
    pub(super) async fn record_exit(&mut self, exit: Exit) {
        let mut session = self.session.clone();
        let mut changes = Vec::new();
        if session.state == SessionState::Running {
            let (state, reason) = match (exit.powered_off, exit.host_restarted) {
                (true, _) => (SessionState::UserShutdown, DiskOnlyReason::PoweredOff),
                (false, true) => (SessionState::Paused, DiskOnlyReason::HostRestarted),
                (false, false) => (SessionState::Paused, DiskOnlyReason::SandboxEnded),
            };
            changes.push(Change::Snapshot(self.stop_record(&mut session, state, Some(reason))));
            changes.push(self.event(stopped_by_itself(&exit)));
            if !exit.powered_off {
                session.last_resume_error = exit.cause;
            }
        } else {
            let reason = if exit.host_restarted { DiskOnlyReason::HostRestarted } else { DiskOnlyReason::SandboxEnded };
            give_up_memory(&mut session, reason);
            changes.push(self.event(released(reason)));
        }
        if self.keep_only_disk(session, changes).await {
            self.ended = None;
            self.slot = None;
        }
    }

    /// When a session's memory is to be given up, and why.
    pub(super) fn release_memory_at(&self, now: UnixMs) -> Option<(UnixMs, DiskOnlyReason)> {
        let pause = self.session.pause.as_ref().filter(|pause| pause.in_memory)?;
        if self.session.state != SessionState::Paused {
            return None;
        }
        if self.live.memory_low.load(Ordering::Acquire) {
            return Some((now, DiskOnlyReason::MemoryPressure));
        }
        let max_ms = self.shared.config.pause_in_memory_max_ms?;
        Some((pause.paused_at.saturating_add(max_ms), DiskOnlyReason::MemoryTimeLimit))
    }

    /// Gives up the memory of a paused session for its disk.
    pub(super) async fn release_memory(&mut self, now: UnixMs) {
        let Some((_, reason)) = self.release_memory_at(now) else { return };
        let mut session = self.session.clone();
        give_up_memory(&mut session, reason);
        let released = self.event(released(reason));
        self.keep_only_disk(session, vec![released]).await;
    }

    /// Commits a record that says that only the disk is kept; the driver is told afterwards. False: try again later.
    async fn keep_only_disk(&mut self, mut session: Session, mut changes: Vec<Change>) -> bool {
        mark_unattached(&mut session);
        self.mark_given_up(&mut session.attachments);
        let interrupted = match self.interrupted().await {
            Ok(interrupted) => interrupted,
            Err(_) => {
                self.try_later();
                return false;
            }
        };
        changes.extend(interrupted.iter().cloned().map(Change::Execution));
        if self.commit(session, changes).await.is_err() {
            self.try_later();
            return false;
        }
        self.give_up_attaching();
        self.live.memory_low.store(false, Ordering::Release);
        self.live.set_guest(None);
        self.publish_interrupted(interrupted);
        self.stop_owed = true;
        true
    }

    /// The commands that end with the sandbox, as failed; they are still to be recorded.
    async fn interrupted(&mut self) -> Result<Vec<Execution>, Error> {
        let now = self.shared.clock.now();
        if self.executions_known {
            return Ok(self.executions.fail_running(now).await);
        }
        let recorded = self.shared.store.executions(self.session.id).await.map_err(store_error)?;
        self.executions.know(recorded.clone());
        self.executions_known = true;
        let running = recorded.into_iter().filter(|of| of.status == ExecutionStatus::Running);
        Ok(running.map(|execution| failed(execution, now)).collect())
    }

    fn publish_interrupted(&self, interrupted: Vec<Execution>) {
        interrupted.into_iter().for_each(|execution| self.executions.publish(execution));
    }

    /// When nobody will have used the session for too long.
    pub(super) fn idle_at(&self, now: UnixMs) -> Option<UnixMs> {
        let minutes = self.session.idle_timeout_minutes.or(self.shared.config.idle_timeout_default_minutes);
        let minutes = minutes.filter(|minutes| *minutes > 0 && !self.session.sticky)?;
        if accept(self.state(), Request::Idle) != Verdict::Do {
            return None;
        }
        let last = self.session.last_activity_at.max(self.live.activity.last(now));
        Some(last.saturating_add(u64::from(minutes) * 60_000))
    }

    pub(super) async fn stopped(&mut self, result: Result<(), DriverError>) -> Flow {
        match result {
            Ok(()) => {
                self.stop_owed = false;
                self.retry = self.shared.backoff();
                self.drop_detached().await;
            }
            Err(DriverError::Gone) => return Flow::End(End::failed("the sandbox's disk is gone")),
            Err(error) => {
                tracing::warn!(session = %self.session.id, %error, "a sandbox could not be stopped; trying again");
                self.try_later();
            }
        }
        Flow::Continue
    }

    pub(super) async fn adopted(&mut self, result: Result<(Adopted, Vec<Execution>), AdoptError>) -> Flow {
        let (adopted, executions) = match result {
            Ok(found) => found,
            Err(AdoptError::Gone) => {
                return Flow::End(End::failed("not even the sandbox's disk was left when the server started again"));
            }
            Err(AdoptError::Other(reason)) => {
                tracing::warn!(session = %self.session.id, reason, "a sandbox could not be adopted; trying again");
                self.attempted = None;
                self.unadopted = true;
                let pause_ms = self.adoption.next_ms();
                self.work = Some(self.adopt(pause_ms));
                return Flow::Continue;
            }
        };
        self.unadopted = false;
        match adopted {
            Adopted::Running(guest) | Adopted::Frozen(guest) => self.adopted_alive(guest, executions),
            Adopted::Stopped { powered_off, host_restarted } => {
                let cause = match host_restarted {
                    true => "the host was restarted",
                    false => "the sandbox was no longer running when the server started again",
                };
                let exit = Exit { cause: cause.to_owned(), powered_off, host_restarted };
                self.adopted_stopped(exit).await;
            }
        }
        self.attempted = None;
        Flow::Continue
    }

    fn adopted_alive(&mut self, guest: Arc<dyn Guest>, executions: Vec<Execution>) {
        let backoff = self.shared.backoff();
        self.executions_known = true;
        self.executions.adopt(executions, &guest, &self.shared.clock, backoff);
        if self.session.state == SessionState::Resuming {
            self.work = Some(self.finish_boot(guest));
        } else {
            self.live.set_guest(Some(guest));
        }
    }

    async fn adopted_stopped(&mut self, exit: Exit) {
        match self.session.state {
            SessionState::Running | SessionState::Pausing => {
                self.ended = Some(exit.clone());
                self.record_exit(exit).await;
            }
            SessionState::Resuming => {
                let cause = "the server stopped while the session was being resumed".to_owned();
                self.booted(Err(StartFailure::Other(cause)), None).await;
            }
            _ if self.session.pause.as_ref().is_some_and(|pause| pause.in_memory) => {
                self.ended = Some(exit.clone());
                self.record_exit(exit).await;
            }
            // What an interrupted stop has left is finished.
            _ => self.stop_owed = true,
        }
    }
}

fn released(reason: DiskOnlyReason) -> EventKind {
    EventKind::MemoryReleased { reason }
}

fn stopped_by_itself(exit: &Exit) -> EventKind {
    let reason = if exit.host_restarted { PauseReason::HostRestarted } else { PauseReason::SandboxEnded };
    match exit.powered_off {
        true => EventKind::PoweredOff,
        false => EventKind::Paused { reason, cause: exit.cause.clone() },
    }
}

fn answer(reply: Option<Reply<Session>>, result: Result<Session, Error>) {
    if let Some(reply) = reply {
        // A caller that went away changes nothing.
        let _ = reply.send(result);
    }
}

fn give_up_memory(session: &mut Session, reason: DiskOnlyReason) {
    if let Some(pause) = &mut session.pause {
        pause.in_memory = false;
        pause.disk_reason = Some(reason);
    }
}

fn mark_attached(session: &mut Session) {
    for attachment in session.attachments.iter_mut().filter(|of| of.state == AttachmentState::Attaching) {
        attachment.state = AttachmentState::Attached;
    }
}

/// What was mounted is to be mounted again at the next boot.
fn mark_unattached(session: &mut Session) {
    for attachment in session.attachments.iter_mut().filter(|of| of.state == AttachmentState::Attached) {
        attachment.state = AttachmentState::Attaching;
    }
}

/// The disk of a session that stops, as a snapshot to start others from.
fn pause_snapshot(session: &Session, now: UnixMs, random: [u8; 10], more: [u8; 10]) -> Snapshot {
    Snapshot {
        id: SnapshotId::new(now, random),
        workspace_id: session.workspace_id,
        session_id: session.id,
        name: session.name.clone(),
        kind: SnapshotKind::Pause,
        state: SnapshotState::Ready,
        durability: Durability::LocalReady,
        tags: Vec::new(),
        created_at: now,
        expires_at: None,
        local_ready_at: Some(now),
        durable_at: None,
        machine: session.machine.clone(),
        env: session.env.clone(),
        image_id: DiskImageId::new(now, more),
        copied: false,
        source_stopped_us: 0,
        manifest: String::new(),
        size_bytes: 0,
        stored_bytes: 0,
        failure_reason: String::new(),
        propagation_error: String::new(),
    }
}
