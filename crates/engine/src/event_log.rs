//! Records what happens to sessions, in the same commit as the transition that it belongs to, and tells it.
//!
//! Of commands only abnormal ends are recorded, and only the program's name: arguments and environments hold
//! secrets. A command that succeeds costs no write.

use std::collections::VecDeque;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{ExecutionId, SessionId};
use tokio::sync::watch;

use crate::access::Caller;
use crate::errors::store_error;
use crate::model::{Event, EventKind};
use crate::ports::{Change, ExitReason, ExitStatus, GuestError};
use crate::query;
use crate::registry::{Found, Registry};
use crate::shared::Shared;

/// Characters of a program's name that are recorded.
const PROGRAM_CHARS_MAX: usize = 64;
/// Events that one look into the store brings.
const PAGE: u32 = 100;

/// What is worth keeping of a command's end; nothing of one that ended by itself.
fn of_exit(program: &str, status: &ExitStatus, memory_bytes: u64) -> Option<EventKind> {
    let program = program_name(program);
    let failed = status.code != 0 || !status.signal.is_empty();
    if status.reason == ExitReason::SessionEnded {
        // The session's own events say what happened.
        None
    } else if failed && status.memory_kills > 0 {
        Some(EventKind::OutOfMemory { program, limit_mb: u32::try_from(memory_bytes >> 20).unwrap_or(u32::MAX) })
    } else if status.timed_out {
        Some(EventKind::CommandTimedOut { program, after_ms: status.duration_ms })
    } else if !status.signal.is_empty() {
        Some(EventKind::CommandKilled { program, signal: status.signal.clone() })
    } else {
        None
    }
}

/// A program as it may be recorded: the last part of its path, without what would break a line.
fn program_name(program: &str) -> String {
    let name = program.rsplit('/').next().unwrap_or_default();
    name.chars().filter(|character| !character.is_control()).take(PROGRAM_CHARS_MAX).collect()
}

/// The event log.
pub(crate) struct Events {
    shared: Arc<Shared>,
    registry: Arc<Registry>,
}

impl Events {
    pub(crate) fn new(shared: Arc<Shared>, registry: Arc<Registry>) -> Self {
        Self { shared, registry }
    }

    pub(crate) async fn page(
        &self,
        caller: &Caller,
        id: SessionId,
        after: u64,
        page_size: u32,
    ) -> Result<(Vec<Event>, u64), Error> {
        let size = query::page_size(page_size)?;
        self.registry.find(caller, id).await?;
        let mut events = self.shared.store.events(id, after, size + 1).await.map_err(store_error)?;
        let more = events.len() > size as usize;
        events.truncate(size as usize);
        let next = events.last().filter(|_| more).map_or(0, |last| last.sequence);
        Ok((events, next))
    }

    pub(crate) async fn follow(&self, caller: &Caller, id: SessionId, after: u64) -> Result<EventFollower, Error> {
        let news = match self.registry.find(caller, id).await? {
            Found::Live(live) => Some(live.recorded.subscribe()),
            Found::Ended(_) => None,
        };
        let ready = VecDeque::new();
        Ok(EventFollower { shared: self.shared.clone(), session_id: id, after, news, ready, over: false })
    }

    /// An event of now, to be committed with what it belongs to.
    pub(crate) fn event(&self, session_id: SessionId, fact: EventKind) -> Change {
        self.command_event(session_id, fact, None)
    }

    pub(crate) fn command_event(
        &self,
        session_id: SessionId,
        fact: EventKind,
        execution_id: Option<ExecutionId>,
    ) -> Change {
        let event = Event { session_id, sequence: 0, at: self.shared.clock.now(), fact, execution_id };
        Change::Event { event, events_max: self.shared.config.events_per_session_max.max(1) }
    }

    /// Tells followers that events of this session were committed.
    pub(crate) fn tell(&self, session_id: SessionId) {
        if let Some(live) = self.registry.live.get(session_id) {
            live.tell_recorded();
        }
    }

    /// Records something that belongs to no transition. What cannot be recorded is only logged: nobody was promised it.
    pub(crate) async fn record(&self, session_id: SessionId, fact: EventKind, execution_id: Option<ExecutionId>) {
        match self.shared.write(vec![self.command_event(session_id, fact, execution_id)]).await {
            Ok(()) => self.tell(session_id),
            Err(error) => tracing::warn!(session = %session_id, %error, "an event was not recorded"),
        }
    }

    /// The event of a command that ended abnormally.
    pub(crate) fn exit_event(
        &self,
        session_id: SessionId,
        execution_id: ExecutionId,
        program: &str,
        status: &ExitStatus,
        memory_bytes: u64,
    ) -> Option<Change> {
        let fact = of_exit(program, status, memory_bytes)?;
        Some(self.command_event(session_id, fact, Some(execution_id)))
    }
}

/// Reads a session's events as they are recorded.
pub struct EventFollower {
    shared: Arc<Shared>,
    session_id: SessionId,
    after: u64,
    /// Tells that there may be more; gone when the session has ended.
    news: Option<watch::Receiver<u64>>,
    ready: VecDeque<Event>,
    /// The last event was told.
    over: bool,
}

impl EventFollower {
    /// The next event; `None` when the session has ended and all was told. `draining` when the engine stops before.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        loop {
            if self.over {
                return None;
            }
            if let Some(event) = self.ready.pop_front() {
                self.after = event.sequence;
                self.over = matches!(event.fact, EventKind::Terminated { .. });
                return Some(Ok(event));
            }
            if let Some(news) = &mut self.news {
                news.mark_unchanged();
            }
            match self.shared.store.events(self.session_id, self.after, PAGE).await {
                Ok(events) if !events.is_empty() => {
                    self.ready = events.into();
                    continue;
                }
                Ok(_) => {}
                Err(error) => {
                    self.over = true;
                    return Some(Err(store_error(error)));
                }
            }
            let Some(news) = &mut self.news else {
                self.over = true;
                return self.shared.tasks.check().err().map(Err);
            };
            let more = tokio::select! {
                biased;
                () = self.shared.tasks.stopping() => false,
                told = news.changed() => told.is_ok(),
            };
            if !more {
                // What was recorded last is still to be read; its end among it, unless the engine stops.
                self.news = None;
            }
        }
    }
}

/// Names the commands of one session, and records those that end abnormally.
#[derive(Clone)]
pub struct CommandLog {
    pub(crate) events: Arc<Events>,
    pub(crate) session_id: SessionId,
    pub(crate) memory_bytes: u64,
}

impl CommandLog {
    /// An id for a command that is about to start.
    pub fn new_execution(&self) -> ExecutionId {
        ExecutionId::new(self.events.shared.clock.now(), self.events.shared.random())
    }

    /// Whether this end of a command is worth recording, by whoever cannot wait for nothing.
    pub fn is_abnormal(&self, status: &ExitStatus) -> bool {
        of_exit("", status, self.memory_bytes).is_some()
    }

    /// Records how a command ended, if that was abnormal: killed, timed out, out of memory. `program` is its first
    /// argument. Returns when that is in the store, so that whoever hears of the end finds it explained.
    pub async fn ended(&self, id: ExecutionId, program: &str, status: &ExitStatus) {
        if let Some(fact) = of_exit(program, status, self.memory_bytes) {
            self.events.record(self.session_id, fact, Some(id)).await;
        }
    }

    /// Records what git said when it failed, where its caller is told only the beginning.
    pub async fn git_failed(&self, id: ExecutionId, operation: &str, exit_code: i32, said: &str) {
        let fact = EventKind::GitFailed { operation: operation.to_owned(), exit_code, said: said.to_owned() };
        self.events.record(self.session_id, fact, Some(id)).await;
    }

    /// Records that a command could not be started, if that is because it does not exist.
    pub async fn not_started(&self, id: ExecutionId, program: &str, error: &GuestError) {
        if error.code == Code::CommandNotFound {
            let fact = EventKind::CommandNotFound { program: program_name(program) };
            self.events.record(self.session_id, fact, Some(id)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_program_only_its_name_is_kept() {
        assert_eq!(program_name("/usr/bin/python3"), "python3");
        assert_eq!(program_name("sh"), "sh");
        assert_eq!(program_name("a\nb\x1b[31m"), "ab[31m");
        assert_eq!(program_name(&"長".repeat(100)).chars().count(), 64);
        assert_eq!(program_name("/"), "");
    }

    #[test]
    fn only_abnormal_ends_of_commands_are_facts() {
        let of = |status: &ExitStatus| of_exit("/bin/prog", status, 256 << 20);
        let program = || "prog".to_owned();
        let exit = |code| ExitStatus { code, ..ExitStatus::default() };
        assert_eq!((of(&exit(0)), of(&exit(1)), of(&exit(127))), (None, None, None));
        assert_eq!(of(&ExitStatus { memory_kills: 1, ..exit(0) }), None, "it coped");
        let killed = ExitStatus { signal: "SIGKILL".into(), ..exit(-1) };
        assert_eq!(of(&killed), Some(EventKind::CommandKilled { program: program(), signal: "SIGKILL".into() }));
        let memory = Some(EventKind::OutOfMemory { program: program(), limit_mb: 256 });
        assert_eq!(of(&ExitStatus { memory_kills: 1, ..killed.clone() }), memory);
        assert_eq!(of(&ExitStatus { memory_kills: 2, ..exit(137) }), memory, "a process below it was killed");
        let late = ExitStatus { timed_out: true, duration_ms: 1_005, ..killed.clone() };
        assert_eq!(of(&late), Some(EventKind::CommandTimedOut { program: program(), after_ms: 1_005 }));
        let ended = ExitStatus { reason: ExitReason::SessionEnded, ..killed };
        assert_eq!(of(&ended), None, "the session's own events tell");
    }
}
