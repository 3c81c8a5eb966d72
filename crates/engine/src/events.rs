//! What happened to sessions: facts that are recorded in the same commit as the transition they belong to.
//!
//! Of commands only abnormal ends are facts, and only the program's name is recorded: arguments and environments hold
//! secrets. A command that succeeds costs no write.

use std::collections::VecDeque;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{ExecutionId, SessionId, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::actor::store_error;
use crate::inner::{Found, Inner};
use crate::model::{Egress, UnixMs};
use crate::ports::{Change, ExitStatus, GuestError};
use crate::{Caller, Engine, query};

/// Characters of a program's name that are recorded.
const PROGRAM_CHARS_MAX: usize = 64;
/// Events that one look into the store brings.
const PAGE: u32 = 100;

/// Causes of a session's end, as its record tells them.
pub(crate) const MAX_DURATION_REACHED: &str = "maximum duration reached";
pub(crate) const PAUSE_RETENTION_EXPIRED: &str = "pause retention expired";

/// Something that happened to a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub session_id: SessionId,
    /// Counts the session's events from 1. Given by the store; 0 until then.
    pub sequence: u64,
    pub at: UnixMs,
    pub fact: Fact,
    /// The command that it happened to.
    pub execution_id: Option<ExecutionId>,
}

/// What happened. Stored, and told to users, under these names: none may be renamed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fact {
    Created(Origin),
    Ready {
        after_ms: u64,
    },
    Paused {
        reason: PauseReason,
        /// In words, where nobody asked for it.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        cause: String,
    },
    /// Processes and memory were given up; the disk is kept.
    MemoryReleased {
        /// One of those of `Pause::disk_reason`.
        reason: String,
    },
    PoweredOff,
    Resumed {
        mode: RestoreMode,
        /// Why only the disk was there.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        reason: String,
    },
    ResumeFailed {
        cause: String,
    },
    Extended {
        by_ms: u64,
        timeout_at_ms: UnixMs,
    },
    Forked {
        sessions: u32,
    },
    SnapshotCreated {
        snapshot_id: SnapshotId,
    },
    SnapshotFailed {
        snapshot_id: SnapshotId,
        cause: String,
    },
    VolumeAttached {
        volume_id: VolumeId,
        path: String,
    },
    VolumeDetached {
        volume_id: VolumeId,
        path: String,
    },
    EgressChanged {
        /// All that the server lets sandboxes reach.
        unrestricted: bool,
        /// How many are allowed.
        domains: usize,
        networks: usize,
    },
    CommandKilled {
        program: String,
        signal: String,
    },
    CommandTimedOut {
        program: String,
        after_ms: u64,
    },
    CommandNotFound {
        program: String,
    },
    /// Git said more than an answer holds.
    GitFailed {
        operation: String,
        exit_code: i32,
        /// All of it that the server read.
        said: String,
    },
    /// A process was killed because the sandbox's memory was used up.
    OutOfMemory {
        /// The command that was running.
        program: String,
        limit_mb: u32,
    },
    /// What was asked for would have gone beyond a limit.
    Refused {
        request: String,
        limit: String,
    },
    Terminated {
        reason: EndReason,
        #[serde(default, skip_serializing_if = "String::is_empty")]
        cause: String,
    },
    /// Recorded by a later version of the server.
    #[serde(other)]
    Unknown,
}

/// What a session's disk began with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case")]
pub enum Origin {
    Fresh,
    Snapshot { snapshot_id: SnapshotId },
    Fork { session_id: SessionId },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    Requested,
    Idle,
    SandboxEnded,
    HostRestarted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestoreMode {
    Memory,
    ColdBoot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    Requested,
    MaxDuration,
    PauseRetention,
    Failed,
}

impl EndReason {
    /// From what the session's record says.
    pub(crate) fn of(terminal_error: &str) -> Self {
        match terminal_error {
            "" => Self::Requested,
            MAX_DURATION_REACHED => Self::MaxDuration,
            PAUSE_RETENTION_EXPIRED => Self::PauseRetention,
            _ => Self::Failed,
        }
    }
}

impl Fact {
    pub(crate) fn egress(egress: Option<&Egress>) -> Self {
        Self::EgressChanged {
            unrestricted: egress.is_none(),
            domains: egress.map_or(0, |egress| egress.allow_domains.len()),
            networks: egress.map_or(0, |egress| egress.allow_cidrs.len()),
        }
    }

    /// What is worth keeping of a command's end; nothing of one that ended by itself.
    fn of_exit(program: &str, status: &ExitStatus, memory_mb: u32) -> Option<Self> {
        let program = program_name(program);
        let failed = status.code != 0 || !status.signal.is_empty();
        if status.reason.starts_with("session_terminated") {
            // The session's own events say what happened.
            None
        } else if failed && status.memory_kills > 0 {
            Some(Self::OutOfMemory { program, limit_mb: memory_mb })
        } else if status.timed_out {
            Some(Self::CommandTimedOut { program, after_ms: status.duration_ms })
        } else if !status.signal.is_empty() {
            Some(Self::CommandKilled { program, signal: status.signal.clone() })
        } else {
            None
        }
    }

    /// What happened, in one sentence.
    pub fn summary(&self) -> String {
        match self {
            Self::Created(Origin::Fresh) => "created with an empty disk".to_owned(),
            Self::Created(Origin::Snapshot { snapshot_id }) => format!("created from snapshot {snapshot_id}"),
            Self::Created(Origin::Fork { session_id }) => format!("created as a fork of session {session_id}"),
            Self::Ready { after_ms } => format!("ready after {after_ms} ms"),
            Self::Paused { reason: PauseReason::Requested, .. } => "paused by request".to_owned(),
            Self::Paused { reason: PauseReason::Idle, .. } => "paused because nobody used it".to_owned(),
            Self::Paused { cause, .. } => format!("paused because it stopped by itself: {cause}"),
            Self::MemoryReleased { reason } => {
                format!("memory and processes given up, the disk is kept ({reason})")
            }
            Self::PoweredOff => "powered itself off; the disk is kept".to_owned(),
            Self::Resumed { mode: RestoreMode::Memory, .. } => "resumed with its memory".to_owned(),
            Self::Resumed { mode: RestoreMode::ColdBoot, reason } => format!("booted again from its disk ({reason})"),
            Self::ResumeFailed { cause } => format!("could not be resumed: {cause}"),
            Self::Extended { by_ms, .. } => format!("deadline moved by {} s", by_ms / 1_000),
            Self::Forked { sessions } => format!("forked into {sessions} sessions"),
            Self::SnapshotCreated { snapshot_id } => format!("snapshot {snapshot_id} is ready"),
            Self::SnapshotFailed { snapshot_id, cause } => format!("snapshot {snapshot_id} failed: {cause}"),
            Self::VolumeAttached { volume_id, path } => format!("volume {volume_id} attached at {path}"),
            Self::VolumeDetached { volume_id, path } => format!("volume {volume_id} detached from {path}"),
            Self::EgressChanged { unrestricted: true, .. } => "outbound destinations are not restricted".to_owned(),
            Self::EgressChanged { domains, networks, .. } => {
                format!("outbound destinations restricted to {domains} names and {networks} networks")
            }
            Self::CommandKilled { program, signal } => format!("{program} was killed by {signal}"),
            Self::CommandTimedOut { program, after_ms } => format!("{program} timed out after {after_ms} ms"),
            Self::CommandNotFound { program } => format!("{program} was not found in the sandbox"),
            Self::GitFailed { operation, exit_code, said } => {
                format!("git {operation} failed (exit_code={exit_code}): {said}")
            }
            Self::OutOfMemory { program, limit_mb } => {
                format!("a process was killed for want of memory while {program} ran (limit {limit_mb} MB)")
            }
            Self::Refused { request, limit } => format!("{request} was refused: {limit}"),
            Self::Terminated { reason: EndReason::Requested, .. } => "terminated by request".to_owned(),
            Self::Terminated { cause, .. } => format!("terminated: {cause}"),
            Self::Unknown => "something that this version of the server does not know".to_owned(),
        }
    }
}

/// A program as it may be recorded: the last part of its path, without what would break a line.
fn program_name(program: &str) -> String {
    let name = program.rsplit('/').next().unwrap_or_default();
    name.chars().filter(|character| !character.is_control()).take(PROGRAM_CHARS_MAX).collect()
}

impl Engine {
    /// A page of a session's events after this one, oldest first, and the `after` of the next page; 0 at the end.
    pub async fn events(
        &self,
        caller: &Caller,
        id: SessionId,
        after: u64,
        page_size: u32,
    ) -> Result<(Vec<Event>, u64), Error> {
        let size = query::page_size(page_size)?;
        self.0.find(caller, id).await?;
        let mut events = self.0.store.events(id, after, size + 1).await.map_err(store_error)?;
        let more = events.len() > size as usize;
        events.truncate(size as usize);
        let next = events.last().filter(|_| more).map_or(0, |last| last.sequence);
        Ok((events, next))
    }

    /// All of a session's events after this one, those to come included, until it has ended.
    pub async fn follow_events(&self, caller: &Caller, id: SessionId, after: u64) -> Result<EventFollower, Error> {
        let news = match self.0.find(caller, id).await? {
            Found::Live(live) => Some(live.recorded.subscribe()),
            Found::Ended(_) => None,
        };
        let ready = VecDeque::new();
        Ok(EventFollower { engine: self.0.clone(), session_id: id, after, news, ready, over: false })
    }
}

/// Reads a session's events as they are recorded.
pub struct EventFollower {
    engine: Arc<Inner>,
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
                self.over = matches!(event.fact, Fact::Terminated { .. });
                return Some(Ok(event));
            }
            if let Some(news) = &mut self.news {
                news.mark_unchanged();
            }
            match self.engine.store.events(self.session_id, self.after, PAGE).await {
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
                return self.engine.tasks.check().err().map(Err);
            };
            let more = tokio::select! {
                biased;
                () = self.engine.tasks.stopping() => false,
                told = news.changed() => told.is_ok(),
            };
            if !more {
                // What was recorded last is still to be read; its end among it, unless the engine stops.
                self.news = None;
            }
        }
    }
}

impl Inner {
    /// An event of now, to be committed with what it belongs to.
    pub(crate) fn event(&self, session_id: SessionId, fact: Fact) -> Change {
        self.command_event(session_id, fact, None)
    }

    pub(crate) fn command_event(&self, session_id: SessionId, fact: Fact, execution_id: Option<ExecutionId>) -> Change {
        let event = Event { session_id, sequence: 0, at: self.clock.now(), fact, execution_id };
        Change::Event { event, events_max: self.config.events_per_session_max.max(1) }
    }

    /// Tells followers that events of this session were committed.
    pub(crate) fn tell_recorded(&self, session_id: SessionId) {
        if let Some(live) = self.registry.get(session_id) {
            live.tell_recorded();
        }
    }

    /// Records something that belongs to no transition. What cannot be recorded is only logged: nobody was promised it.
    async fn record(&self, session_id: SessionId, fact: Fact, execution_id: Option<ExecutionId>) {
        match self.write(vec![self.command_event(session_id, fact, execution_id)]).await {
            Ok(()) => self.tell_recorded(session_id),
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
        memory_mb: u32,
    ) -> Option<Change> {
        let fact = Fact::of_exit(program, status, memory_mb)?;
        Some(self.command_event(session_id, fact, Some(execution_id)))
    }
}

/// Names the commands of one session, and records those that end abnormally.
#[derive(Clone)]
pub struct CommandLog {
    pub(crate) engine: Arc<Inner>,
    pub(crate) session_id: SessionId,
    pub(crate) memory_mb: u32,
}

impl CommandLog {
    /// An id for a command that is about to start.
    pub fn new_execution(&self) -> ExecutionId {
        ExecutionId::new(self.engine.clock.now(), self.engine.random())
    }

    /// Whether this end of a command is worth recording, by whoever cannot wait for nothing.
    pub fn is_abnormal(&self, status: &ExitStatus) -> bool {
        Fact::of_exit("", status, self.memory_mb).is_some()
    }

    /// Records how a command ended, if that was abnormal: killed, timed out, out of memory. `program` is its first
    /// argument. Returns when that is in the store, so that whoever hears of the end finds it explained.
    pub async fn ended(&self, id: ExecutionId, program: &str, status: &ExitStatus) {
        if let Some(fact) = Fact::of_exit(program, status, self.memory_mb) {
            self.engine.record(self.session_id, fact, Some(id)).await;
        }
    }

    /// Records what git said when it failed, where its caller is told only the beginning.
    pub async fn git_failed(&self, id: ExecutionId, operation: &str, exit_code: i32, said: &str) {
        let fact = Fact::GitFailed { operation: operation.to_owned(), exit_code, said: said.to_owned() };
        self.engine.record(self.session_id, fact, Some(id)).await;
    }

    /// Records that a command could not be started, if that is because it does not exist.
    pub async fn not_started(&self, id: ExecutionId, program: &str, error: &GuestError) {
        if error.code == Code::CommandNotFound {
            let fact = Fact::CommandNotFound { program: program_name(program) };
            self.engine.record(self.session_id, fact, Some(id)).await;
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
        let of = |status: &ExitStatus| Fact::of_exit("/bin/prog", status, 256);
        let program = || "prog".to_owned();
        let exit = |code| ExitStatus { code, reason: "exit".into(), ..ExitStatus::default() };
        assert_eq!((of(&exit(0)), of(&exit(1)), of(&exit(127))), (None, None, None));
        assert_eq!(of(&ExitStatus { memory_kills: 1, ..exit(0) }), None, "it coped");
        let killed = ExitStatus { signal: "SIGKILL".into(), ..exit(-1) };
        assert_eq!(of(&killed), Some(Fact::CommandKilled { program: program(), signal: "SIGKILL".into() }));
        let memory = Some(Fact::OutOfMemory { program: program(), limit_mb: 256 });
        assert_eq!(of(&ExitStatus { memory_kills: 1, ..killed.clone() }), memory);
        assert_eq!(of(&ExitStatus { memory_kills: 2, ..exit(137) }), memory, "a process below it was killed");
        let late = ExitStatus { timed_out: true, duration_ms: 1_005, ..killed.clone() };
        assert_eq!(of(&late), Some(Fact::CommandTimedOut { program: program(), after_ms: 1_005 }));
        let ended = ExitStatus { reason: "session_terminated:paused".into(), ..killed };
        assert_eq!(of(&ended), None, "the session's own events tell");
    }

    #[test]
    fn ends_have_the_reason_that_the_record_tells() {
        for (text, reason) in [
            ("", EndReason::Requested),
            (MAX_DURATION_REACHED, EndReason::MaxDuration),
            (PAUSE_RETENTION_EXPIRED, EndReason::PauseRetention),
            ("the sandbox's disk is gone", EndReason::Failed),
        ] {
            assert_eq!(EndReason::of(text), reason);
        }
    }
}
