//! What callers ask of a session, and the commands that belong to it.

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::ExecutionId;

use super::{Actor, End, Flow};
use crate::executions::{Ended, Outcome};
use crate::handle::{Message, Reply, Started};
use crate::model::{EventKind, Execution, ExecutionStatus, Session};
use crate::ports::{Change, Command};
use crate::registry::NameClaim;
use crate::requests::{NewExecution, SessionUpdate};
use crate::session::{Request, check};
use crate::validate;

/// Refusals are recorded at most this often: whoever runs into a limit tends to ask again and again.
const REFUSAL_PAUSE_MS: u64 = 60_000;

impl Actor {
    pub(super) async fn handle(&mut self, message: Message) -> Flow {
        match message {
            Message::Terminate { reply } => {
                self.waiting.push(reply);
                Flow::End(End::requested())
            }
            Message::Update { update, reply } => {
                let result = self.update(update).await;
                self.answer_change(result, reply).await
            }
            Message::Extend { additional_ms, reply } => {
                let result = self.extend(additional_ms).await;
                self.answer_change(result, reply).await
            }
            Message::Execute { new, reply } => {
                if let Err((error, reply)) = self.execute(new, reply).await {
                    self.note_refusal("starting a command", &error).await;
                    let _ = reply.send(Err(error));
                }
                Flow::Continue
            }
        }
    }

    /// Answers who asked for a change; a deadline may be due because of it.
    async fn answer_change(&mut self, result: Result<(), Error>, reply: Reply<Session>) -> Flow {
        let _ = reply.send(result.map(|()| self.session.clone()));
        self.due().await
    }

    async fn update(&mut self, update: SessionUpdate) -> Result<(), Error> {
        let session = self.updated(update)?;
        let is_renamed = (&session.name, session.name_is_unique) != (&self.session.name, self.session.name_is_unique);
        // Until the record has the new name, the old one is not free.
        let claimed = match is_renamed {
            true => Some(self.actors.registry.live.claim_name(&session)?),
            false => None,
        };
        self.commit_with(session, Vec::new()).await?;
        if let Some(name) = claimed {
            name.iter().for_each(NameClaim::recorded);
            self.name = name;
        }
        Ok(())
    }

    async fn extend(&mut self, additional_ms: u64) -> Result<(), Error> {
        let (session, facts) = self.extended(additional_ms)?;
        self.commit_with(session, facts).await
    }

    fn updated(&self, update: SessionUpdate) -> Result<Session, Error> {
        check(self.session.state, Request::Change)?;
        let mut session = self.session.clone();
        if update.name.is_some() || update.name_is_unique.is_some() {
            session.name = update.name.unwrap_or(session.name);
            session.name_is_unique = update.name_is_unique.unwrap_or(session.name_is_unique);
            validate::session_name(&session.name, session.name_is_unique)?;
        }
        if let Some(tags) = update.tags {
            session.tags = validate::tags(tags)?;
        }
        if let Some(sticky) = update.sticky {
            session.sticky = sticky;
        }
        if let Some(wake_on_visit) = update.wake_on_visit {
            session.wake_on_visit = wake_on_visit;
        }
        if let Some(duration_ms) = update.max_duration_ms {
            validate::max_duration_ms(duration_ms, &self.shared.config)?;
            session.timeout_at = Some(session.created_at.saturating_add(duration_ms));
        }
        if let Some(keys) = update.ssh_authorized_keys {
            if keys.is_empty() {
                return Err(Error::new(Code::InvalidArgument, "ssh_authorized_keys must name at least one key"));
            }
            session.ssh_authorized_keys = validate::ssh_authorized_keys(keys, &self.shared.config)?;
        }
        Ok(session)
    }

    /// Records that a request was refused because of a limit, so that it can be explained.
    pub(super) async fn note_refusal(&mut self, request: &str, error: &Error) {
        let now = self.shared.clock.now();
        let at_limit = matches!(error.code, Code::QuotaExceeded | Code::CapacityUnavailable | Code::VolumeLimit);
        if !at_limit || self.refused_at.is_some_and(|at| now < at.saturating_add(REFUSAL_PAUSE_MS)) {
            return;
        }
        self.refused_at = Some(now);
        let event = self.event(EventKind::Refused { request: request.to_owned(), limit: error.to_string() });
        match self.shared.write(vec![event]).await {
            Ok(()) => self.live.tell_recorded(),
            Err(error) => tracing::warn!(session = %self.session.id, %error, "a refusal was not recorded"),
        }
    }

    fn extended(&self, additional_ms: u64) -> Result<(Session, Vec<EventKind>), Error> {
        check(self.session.state, Request::Change)?;
        let invalid = |detail: &str| Err(Error::new(Code::InvalidArgument, detail));
        if additional_ms == 0 {
            return invalid("additional_duration must be longer than zero");
        }
        if additional_ms > self.shared.config.max_duration_max_ms {
            return invalid("additional_duration is longer than max_duration_max_ms");
        }
        // What has no end cannot be made to end later, and whoever asks for more time does not mean less.
        let Some(from) = self.session.timeout_at else { return Ok((self.session.clone(), Vec::new())) };
        let latest = self.session.created_at.saturating_add(self.shared.config.max_duration_max_ms);
        match from.checked_add(additional_ms) {
            Some(timeout_at) if timeout_at <= latest => {
                let extended = EventKind::Extended { by_ms: additional_ms, timeout_at_ms: timeout_at };
                Ok((Session { timeout_at: Some(timeout_at), ..self.session.clone() }, vec![extended]))
            }
            _ => invalid("the session would live longer than max_duration_max_ms"),
        }
    }

    async fn execute(&mut self, new: NewExecution, reply: Reply<Started>) -> Result<(), (Error, Reply<Started>)> {
        let state = self.state();
        let started = async {
            check(state, Request::Use)?;
            let guest = self.live.guest().ok_or(Code::GuestUnreachable)?;
            let forget = self.executions.make_room(self.shared.config.executions_per_session_max)?;
            let now = self.shared.clock.now();
            let execution = Execution {
                id: ExecutionId::new(now, self.shared.random()),
                session_id: self.session.id,
                command: new.command,
                args: new.args,
                status: ExecutionStatus::Running,
                exit_code: 0,
                duration_ms: 0,
                started_at: now,
                ended_at: None,
            };
            let mut env = self.session.env.clone();
            env.extend(new.env);
            let argv = std::iter::once(&execution.command).chain(&execution.args).cloned().collect();
            let command = Command { argv, env, timeout_ms: new.timeout_ms, ..Command::default() };
            validate::command(&command, &self.shared.config)?;
            let mut changes = vec![Change::Execution(execution.clone())];
            changes.extend(forget.map(Change::ForgetExecution));
            self.shared.write(changes).await?;
            Ok((execution, command, guest, forget))
        };
        match started.await {
            Err(error) => Err((error, reply)),
            Ok((execution, command, guest, forget)) => {
                if let Some(id) = forget {
                    self.executions.forget(id, guest.clone());
                }
                let (clock, backoff) = (self.shared.clock.clone(), self.shared.backoff());
                self.executions.start(execution, command, guest, clock, backoff, reply);
                Ok(())
            }
        }
    }

    /// Records how a command ended, then tells those who wait for it.
    pub(super) async fn execution_ended(&mut self, ended: Ended) {
        let now = self.shared.clock.now();
        let (mut changes, execution) = match &ended.outcome {
            Outcome::Forgotten => return,
            Outcome::NotStarted => {
                self.executions.remove(ended.id);
                (vec![Change::ForgetExecution(ended.id)], None)
            }
            Outcome::Exited(status) => {
                let Some(execution) = self.executions.ended(ended.id, status, now) else { return };
                (vec![Change::Execution(execution.clone())], Some(execution))
            }
            Outcome::Lost => {
                let Some(execution) = self.executions.lost(ended.id, now) else { return };
                (vec![Change::Execution(execution.clone())], Some(execution))
            }
        };
        if let (Outcome::Exited(status), Some(execution)) = (&ended.outcome, &execution) {
            let (id, memory_bytes) = (self.session.id, self.session.machine.resources.memory_bytes);
            changes.extend(self.actors.events.exit_event(id, ended.id, &execution.command, status, memory_bytes));
        }
        match self.shared.write(changes.clone()).await {
            Ok(()) => self.live.tell_recorded(),
            Err(error) => {
                // It is a fact all the same: it goes with the next thing that is written.
                tracing::warn!(execution = %ended.id, %error, "the end of a command was not recorded; trying again");
                self.unrecorded.extend(changes);
                self.flush_at = Some(now + self.shared.config.retry_max_ms);
                self.schedule();
            }
        }
        if let Some(execution) = execution {
            self.executions.publish(execution);
        }
    }
}
