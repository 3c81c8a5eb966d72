//! Commands that belong to a session rather than to a stream: started, followed to their end, recorded.

use std::collections::BTreeMap;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::ExecutionId;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::backoff::Backoff;
use crate::errors::guest_error;
use crate::handle::{Reply, Started};
use crate::model::{Execution, ExecutionStatus, UnixMs};
use crate::ports::{Clock, Command, ExitStatus, Guest, ProcessEvent};

/// The executions of one live session. All their records are written by the session's task.
pub(crate) struct Executions {
    /// Ids are version 7, so the order is the order of their starts.
    known: BTreeMap<ExecutionId, watch::Sender<Execution>>,
    tasks: JoinSet<Ended>,
}

/// What the task of an execution comes back with.
pub(crate) struct Ended {
    pub(crate) id: ExecutionId,
    pub(crate) outcome: Outcome,
}

pub(crate) enum Outcome {
    Exited(ExitStatus),
    /// The sandbox knows nothing of it: the server stopped before the command was started.
    Lost,
    /// It was refused, and its caller knows.
    NotStarted,
    /// An older one's output was dropped; there is nothing to record.
    Forgotten,
}

impl Executions {
    pub(crate) fn new() -> Self {
        Self { known: BTreeMap::new(), tasks: JoinSet::new() }
    }

    /// Completes when the next execution ends; never while there is none.
    pub(crate) async fn next(&mut self) -> Ended {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(ended)) => return ended,
                // Cancelled ones were cancelled here; a panic has been reported by its hook, and
                // the record stays RUNNING until the session ends or the server starts again.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Makes room for one more: the id of a finished one to forget, if that is needed.
    pub(crate) fn make_room(&self, executions_max: u32) -> Result<Option<ExecutionId>, Error> {
        if self.known.len() < executions_max as usize {
            return Ok(None);
        }
        let finished = |record: &watch::Sender<Execution>| record.borrow().status != ExecutionStatus::Running;
        match self.known.iter().find(|(_, record)| finished(record)) {
            Some((id, _)) => Ok(Some(*id)),
            None => {
                let detail = format!("executions_per_session_max is {executions_max}, and all are running");
                Err(Error::new(Code::QuotaExceeded, detail))
            }
        }
    }

    /// Drops a finished execution and its output.
    pub(crate) fn forget(&mut self, id: ExecutionId, guest: Arc<dyn Guest>) {
        self.known.remove(&id);
        self.tasks.spawn(async move {
            // Unreachable output dies with the sandbox at the latest.
            let _ = guest.forget(id).await;
            Ended { id, outcome: Outcome::Forgotten }
        });
    }

    /// Starts a command whose record is committed, and follows it. The caller is answered when it runs.
    pub(crate) fn start(
        &mut self,
        execution: Execution,
        command: Command,
        guest: Arc<dyn Guest>,
        clock: Arc<dyn Clock>,
        backoff: Backoff,
        reply: Reply<Started>,
    ) {
        let id = execution.id;
        let (record, published) = watch::channel(execution.clone());
        self.known.insert(id, record);
        self.tasks.spawn(async move {
            let outcome = match guest.run_detached(id, command).await {
                Ok(_pid) => {
                    // A caller that went away does not stop its command.
                    let _ = reply.send(Ok(Started { execution, published }));
                    follow(id, guest, clock, backoff).await
                }
                Err(error) => {
                    if error.code == Code::GuestUnreachable {
                        // It may run after all; nobody will ever ask for it.
                        let _ = guest.forget(id).await;
                    }
                    let _ = reply.send(Err(guest_error(error)));
                    Outcome::NotStarted
                }
            };
            Ended { id, outcome }
        });
    }

    /// Takes over what an earlier process recorded; running ones are followed to their end.
    pub(crate) fn adopt(
        &mut self,
        executions: Vec<Execution>,
        guest: &Arc<dyn Guest>,
        clock: &Arc<dyn Clock>,
        backoff: Backoff,
    ) {
        // One that this process has started in the meantime has somebody who waits for it.
        for execution in executions.into_iter().filter(|of| !self.known.contains_key(&of.id)).collect::<Vec<_>>() {
            let id = execution.id;
            if execution.status == ExecutionStatus::Running {
                let (guest, clock) = (guest.clone(), clock.clone());
                self.tasks.spawn(async move { Ended { id, outcome: follow(id, guest, clock, backoff).await } });
            }
            self.known.insert(id, watch::Sender::new(execution));
        }
    }

    /// Takes over records of a sandbox that has no processes any more.
    pub(crate) fn know(&mut self, executions: Vec<Execution>) {
        for execution in executions {
            self.known.entry(execution.id).or_insert_with(|| watch::Sender::new(execution));
        }
    }

    /// The record of an execution that just ended, to be committed and then published.
    pub(crate) fn ended(&self, id: ExecutionId, status: &ExitStatus, now: UnixMs) -> Option<Execution> {
        let mut execution = self.known.get(&id)?.borrow().clone();
        execution.status = match status {
            status if status.timed_out => ExecutionStatus::TimedOut,
            status if status.code == 0 && status.signal.is_empty() => ExecutionStatus::Succeeded,
            _ => ExecutionStatus::Failed,
        };
        execution.exit_code = status.code;
        execution.duration_ms = status.duration_ms;
        execution.ended_at = Some(now);
        Some(execution)
    }

    /// The record of an execution of which the sandbox knows nothing.
    pub(crate) fn lost(&self, id: ExecutionId, now: UnixMs) -> Option<Execution> {
        Some(failed(self.known.get(&id)?.borrow().clone(), now))
    }

    pub(crate) fn publish(&self, execution: Execution) {
        if let Some(record) = self.known.get(&execution.id) {
            record.send_replace(execution);
        }
    }

    pub(crate) fn remove(&mut self, id: ExecutionId) {
        self.known.remove(&id);
    }

    /// Stops following, and returns those still running as failed: their session is over.
    pub(crate) async fn fail_running(&mut self, now: UnixMs) -> Vec<Execution> {
        self.tasks.shutdown().await;
        let running = self.known.values().map(|record| record.borrow().clone());
        running.filter(|execution| execution.status == ExecutionStatus::Running).map(|e| failed(e, now)).collect()
    }
}

/// An execution whose command is gone without an exit status.
pub(crate) fn failed(mut execution: Execution, now: UnixMs) -> Execution {
    execution.status = ExecutionStatus::Failed;
    execution.exit_code = -1;
    execution.duration_ms = now.saturating_sub(execution.started_at);
    execution.ended_at = Some(now);
    execution
}

/// Reads and drops a command's output until it exits, over as many connections as that takes.
async fn follow(id: ExecutionId, guest: Arc<dyn Guest>, clock: Arc<dyn Clock>, mut backoff: Backoff) -> Outcome {
    loop {
        match guest.follow_exit(id).await {
            Ok(mut events) => {
                while let Some(event) = events.recv().await {
                    if let ProcessEvent::Exit(status) = event {
                        return Outcome::Exited(status);
                    }
                }
            }
            Err(error) if error.code == Code::ExecutionNotFound => return Outcome::Lost,
            Err(error) => tracing::debug!(execution = %id, %error, "following a command failed; trying again"),
        }
        clock.sleep_until(clock.now() + backoff.next_ms()).await;
    }
}
