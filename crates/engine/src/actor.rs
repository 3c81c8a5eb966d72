//! The task that owns one session. It alone writes the session's record and calls the driver for
//! it; everybody else sends messages and reads what is published. See `session.rs` for the states.

mod ending;
mod requests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nagaya_api::error::{Code, Error};
use tokio::sync::{mpsc, oneshot, watch};

use crate::calls::{NewExecution, SessionUpdate};
use crate::executions::{Executions, Started};
use crate::inner::Inner;
use crate::live::{Activity, Live, Slot};
use crate::model::{Execution, Session, SessionState, UnixMs};
use crate::ports::{BoxFuture, Change, DriverError, Guest, StoreError};
use crate::session::{Request, Verdict, accept};
use crate::tasks::Running;

pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What callers may ask of the task.
pub(crate) enum Message {
    Update { update: SessionUpdate, reply: Reply<Session> },
    Extend { additional_ms: u64, reply: Reply<Session> },
    Terminate { reply: Reply<Session> },
    Execute { new: NewExecution, reply: Reply<Started> },
}

/// How the task starts.
pub(crate) enum Birth {
    /// The record is new: commit it, answer, create the sandbox.
    New { reply: Reply<Session> },
    /// The record is from before the start: bring it and the world together. The sender is dropped
    /// once the first attempt at that is over.
    Recovered { attempted: oneshot::Sender<()> },
}

/// Messages that may wait for a session's task; further senders wait.
const MAILBOX_MAX: usize = 64;

pub(crate) struct Actor {
    engine: Arc<Inner>,
    live: Arc<Live>,
    /// As last committed.
    session: Session,
    published: watch::Sender<Session>,
    mailbox: mpsc::Receiver<Message>,
    /// The share of the quotas; given back when the session has ended.
    slot: Option<Slot>,
    executions: Executions,
    /// Whether `executions` is all there are: not before a session from an earlier process is adopted.
    executions_known: bool,
    /// What the driver is doing for this session.
    work: Option<Work>,
    /// Ends of commands that could not be recorded when they came.
    unrecorded: Vec<Change>,
    /// When activity and what is unrecorded is written down, if there is any.
    flush_at: Option<UnixMs>,
    /// Callers who want to hear that the session has ended.
    waiting: Vec<Reply<Session>>,
    attempted: Option<oneshot::Sender<()>>,
    /// Pauses between attempts to adopt.
    adoption: Backoff,
    _running: Running,
}

struct Work {
    future: BoxFuture<Done>,
    /// Whether the driver has been called for something that must not be dropped half-way.
    begun: Arc<AtomicBool>,
}

enum Done {
    Created(Result<Arc<dyn Guest>, DriverError>),
    Adopted(Result<(Arc<dyn Guest>, Vec<Execution>), AdoptError>),
}

enum AdoptError {
    Gone,
    Other(String),
}

/// What follows a step of the task.
enum Flow {
    Continue,
    /// The session is to end, for this reason; empty when it was asked to.
    End(String),
    /// The engine stops; the sandbox stays.
    Stop,
}

/// Pauses that double.
#[derive(Clone, Copy)]
pub(crate) struct Backoff {
    next_ms: u64,
    max_ms: u64,
}

impl Backoff {
    pub(crate) fn next_ms(&mut self) -> u64 {
        let pause = self.next_ms;
        self.next_ms = pause.saturating_mul(2).min(self.max_ms);
        pause
    }
}

impl Inner {
    pub(crate) fn backoff(&self) -> Backoff {
        let first = self.config.retry_first_ms.max(1);
        Backoff { next_ms: first, max_ms: self.config.retry_max_ms.max(first) }
    }

    pub(crate) async fn write(&self, changes: Vec<Change>) -> Result<(), Error> {
        self.store.commit(changes).await.map_err(store_error)
    }

    /// Starts the task of a session and makes the session known.
    pub(crate) fn spawn(self: &Arc<Self>, session: Session, slot: Slot, birth: Birth, running: Running) {
        let (sender, mailbox) = mpsc::channel(MAILBOX_MAX);
        let published = watch::Sender::new(session.clone());
        let live = Arc::new(Live {
            id: session.id,
            workspace_id: session.workspace_id,
            mailbox: sender,
            published: published.subscribe(),
            guest: Default::default(),
            alarm: Default::default(),
            exit: Default::default(),
            activity: Activity::new(session.last_activity_at),
        });
        self.registry.insert(live.clone());
        let actor = Actor {
            engine: self.clone(),
            live,
            session,
            published,
            mailbox,
            slot: Some(slot),
            executions: Executions::new(),
            executions_known: matches!(birth, Birth::New { .. }),
            work: None,
            unrecorded: Vec::new(),
            flush_at: None,
            waiting: Vec::new(),
            attempted: None,
            adoption: self.backoff(),
            _running: running,
        };
        tokio::spawn(actor.run(birth));
    }
}

impl Actor {
    async fn run(mut self, birth: Birth) {
        let mut flow = match birth {
            Birth::New { reply } => {
                if let Err(error) = self.commit(self.session.clone(), Vec::new()).await {
                    // Nothing happened: nobody has heard of this session.
                    self.engine.registry.remove(self.session.id);
                    let _ = reply.send(Err(error));
                    return;
                }
                // A caller that went away finds the session in the list.
                let _ = reply.send(Ok(self.session.clone()));
                self.work = Some(self.create());
                Flow::Continue
            }
            Birth::Recovered { attempted } => {
                self.attempted = Some(attempted);
                self.recover()
            }
        };
        self.schedule();
        loop {
            flow = match flow {
                Flow::Continue => self.step().await,
                Flow::End(cause) => self.end(cause).await,
                Flow::Stop => break,
            };
        }
    }

    /// What a record from before the start asks for.
    fn recover(&mut self) -> Flow {
        match self.session.state {
            SessionState::Creating => Flow::End("the server stopped while the sandbox was being created".to_owned()),
            SessionState::Terminating | SessionState::Terminated => Flow::End(String::new()),
            SessionState::Running => {
                self.work = Some(self.adopt(0));
                Flow::Continue
            }
            // These belong to pause and resume, and nothing makes them yet: keep them as they are.
            SessionState::Paused | SessionState::Pausing | SessionState::Resuming | SessionState::UserShutdown => {
                self.attempted = None;
                Flow::Continue
            }
        }
    }

    /// Waits for the next thing to happen, and deals with it.
    async fn step(&mut self) -> Flow {
        let creating = self.session.state == SessionState::Creating;
        tokio::select! {
            biased;
            done = next_done(&mut self.work) => self.done(done).await,
            // A creation is short: finish it, so that it need not be thrown away at the next start.
            () = self.engine.tasks.stopping(), if !creating => {
                self.flush().await;
                Flow::Stop
            }
            () = self.live.alarm.notified() => self.due().await,
            Some(message) = self.mailbox.recv() => self.handle(message).await,
            ended = self.executions.next() => {
                self.execution_ended(ended).await;
                Flow::Continue
            }
        }
    }

    async fn done(&mut self, done: Done) -> Flow {
        match done {
            Done::Created(Ok(guest)) => {
                let mut session = self.session.clone();
                session.state = SessionState::Running;
                session.ready_at = Some(self.engine.clock.now());
                session.driver = self.engine.driver.name().to_owned();
                // Set before the state is published, so that whoever reads RUNNING can use it.
                self.live.set_guest(Some(guest));
                match self.commit(session, Vec::new()).await {
                    Ok(()) => self.due().await,
                    Err(_) => Flow::End("the server could not record the sandbox".to_owned()),
                }
            }
            Done::Created(Err(error)) => {
                tracing::warn!(session = %self.session.id, %error, "a sandbox could not be created");
                Flow::End(match error {
                    DriverError::Exhausted(limit) => Error::new(Code::CapacityUnavailable, limit).to_string(),
                    DriverError::Gone => "the sandbox ended while it was being created".to_owned(),
                    DriverError::Failed(reason) => format!("the sandbox could not be created: {reason}"),
                })
            }
            Done::Adopted(Ok((guest, executions))) => {
                let backoff = self.engine.backoff();
                self.executions_known = true;
                self.executions.adopt(executions, &guest, &self.engine.clock, backoff);
                self.live.set_guest(Some(guest));
                self.attempted = None;
                self.due().await
            }
            Done::Adopted(Err(AdoptError::Gone)) => {
                Flow::End("the sandbox was no longer running when the server started again".to_owned())
            }
            Done::Adopted(Err(AdoptError::Other(reason))) => {
                tracing::warn!(session = %self.session.id, reason, "a sandbox could not be adopted; trying again");
                self.attempted = None;
                let pause_ms = self.adoption.next_ms();
                self.work = Some(self.adopt(pause_ms));
                Flow::Continue
            }
        }
    }

    /// Acts on whatever is due now: an exit, the deadline, activity to write down.
    async fn due(&mut self) -> Flow {
        let state = self.session.state;
        let now = self.engine.clock.now();
        if let Some(cause) = self.live.exit.get()
            && accept(state, Request::Exit) == Verdict::Do
        {
            return Flow::End(cause.clone());
        }
        if self.session.timeout_at.is_some_and(|at| at <= now) && accept(state, Request::Expire) == Verdict::Do {
            return Flow::End("maximum duration reached".to_owned());
        }
        if self.flush_at.is_some_and(|at| at <= now) {
            self.flush().await;
        }
        if self.flush_at.is_none() && self.has_unsaved() {
            self.flush_at = Some(now + self.engine.config.activity_flush_ms);
        }
        self.schedule();
        Flow::Continue
    }

    fn has_unsaved(&self) -> bool {
        !self.unrecorded.is_empty() || self.live.activity.unsaved.load(Ordering::Acquire)
    }

    /// Registers the next time at which something is due.
    fn schedule(&self) {
        let next = [self.session.timeout_at, self.flush_at].into_iter().flatten().min();
        self.engine.deadlines.set(self.session.id, next);
    }

    async fn flush(&mut self) {
        self.flush_at = None;
        if self.has_unsaved()
            && let Err(error) = self.commit(self.session.clone(), Vec::new()).await
        {
            tracing::warn!(session = %self.session.id, %error, "activity was not recorded");
        }
    }

    /// Commits the record and what belongs to it, then publishes it.
    async fn commit(&mut self, mut session: Session, mut others: Vec<Change>) -> Result<(), Error> {
        // Cleared first: activity from here on is newer than what is written.
        let unsaved = self.live.activity.unsaved.swap(false, Ordering::AcqRel);
        let last = self.live.activity.last(self.engine.clock.now());
        session.last_activity_at = session.last_activity_at.max(last);
        others.push(Change::Session(session.clone()));
        others.extend(self.unrecorded.iter().cloned());
        if let Err(error) = self.engine.write(others).await {
            if unsaved {
                self.live.activity.unsaved.store(true, Ordering::Release);
            }
            return Err(error);
        }
        self.unrecorded.clear();
        self.session = session;
        self.published.send_replace(self.session.clone());
        Ok(())
    }

    fn create(&self) -> Work {
        let begun = Arc::new(AtomicBool::new(false));
        let (engine, begun_too) = (self.engine.clone(), begun.clone());
        let (id, machine) = (self.session.id, self.session.machine.clone());
        let future = Box::pin(async move {
            let _permit = engine.creates.acquire().await.expect("the semaphore is never closed");
            begun_too.store(true, Ordering::Release);
            Done::Created(engine.driver.create(id, &machine).await)
        });
        Work { future, begun }
    }

    /// Adopting may be dropped at any point: destroying copes with whatever there is.
    fn adopt(&self, pause_ms: u64) -> Work {
        let (engine, id) = (self.engine.clone(), self.session.id);
        let future = Box::pin(async move {
            engine.clock.sleep_until(engine.clock.now() + pause_ms).await;
            let guest = match engine.driver.adopt(id).await {
                Ok(guest) => guest,
                Err(DriverError::Gone) => return Done::Adopted(Err(AdoptError::Gone)),
                Err(error) => return Done::Adopted(Err(AdoptError::Other(error.to_string()))),
            };
            let executions = engine.store.executions(id).await;
            let adopted = executions.map(|executions| (guest, executions));
            Done::Adopted(adopted.map_err(|error| AdoptError::Other(error.to_string())))
        });
        Work { future, begun: Arc::new(AtomicBool::new(false)) }
    }
}

async fn next_done(work: &mut Option<Work>) -> Done {
    let Some(running) = work else { return std::future::pending().await };
    let done = running.future.as_mut().await;
    *work = None;
    done
}

/// The store's own words stay in the log: they may name files of the host.
pub(crate) fn store_error(error: StoreError) -> Error {
    tracing::error!(%error, "the store failed");
    Error::new(Code::Internal, "the server could not read or write its records")
}
