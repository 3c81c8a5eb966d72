//! The task that owns one session. It alone writes the session's record and calls the driver for
//! it; everybody else sends messages and reads what is published. See `session.rs` for the states.
//!
//! The driver does one thing at a time for a session, which is the task's `work`. What needs the driver
//! arrives as a [`Job`] and waits while there is work; a [`Message`] is answered at once, whatever the
//! driver does.

mod ending;
mod mounts;
mod pause_resume;
mod requests;
mod restrict;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::AttachmentId;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::backoff::Backoff;
use crate::deadlines::Sleeper;
use crate::event_log::Events;
use crate::executions::Executions;
use crate::handle::{Activity, Exit, Job, Message, Reply, SessionHandle};
use crate::images::RootImages;
use crate::model::{DiskSource, EndReason, EventKind, Limit, Session, SessionState, UnixMs};
use crate::ports::Change;
use crate::previews::Previews;
use crate::registry::{NameClaim, Registry, Slot};
use crate::session::{Request, Verdict, accept};
use crate::shared::Shared;
use crate::snapshots::Snapshots;
use crate::tasks::Running;
use crate::volumes::Volumes;

pub(crate) use work::DiskPreparation;
use work::{Done, Work};

/// How the task starts.
pub(crate) enum StartMode {
    /// The record is new: commit it, answer, create the sandbox.
    New { source: DiskPreparation, reply: Reply<Session> },
    /// The record is being committed together with others. The sender is dropped if that fails.
    Recorded { source: DiskPreparation, recorded: oneshot::Receiver<()> },
    /// The record is from before the start: bring it and the world together. The sender is dropped
    /// once the first attempt at that is over.
    Recovered { attempted: oneshot::Sender<()> },
}

/// Messages that may wait for a session's task; further senders wait. The same for jobs.
const MAILBOX_MAX: usize = 64;

/// The tasks of sessions, and what they work with.
pub(crate) struct Actors {
    shared: Arc<Shared>,
    registry: Arc<Registry>,
    events: Arc<Events>,
    images: Arc<RootImages>,
    volumes: Arc<Volumes>,
    snapshots: Arc<Snapshots>,
    previews: Arc<Previews>,
    /// Sandboxes that are created at a time.
    creates: Semaphore,
}

struct Actor {
    shared: Arc<Shared>,
    actors: Arc<Actors>,
    live: Arc<SessionHandle>,
    /// As last committed.
    session: Session,
    /// The state that is shown instead of the committed one while the driver moves the sandbox.
    moving: Option<SessionState>,
    published: watch::Sender<Session>,
    mailbox: mpsc::Receiver<Message>,
    jobs: mpsc::Receiver<Job>,
    /// The share of the quotas; given back when the session is stopped or has ended.
    slot: Option<Slot>,
    /// Its name, where nobody else can have that; given back when it has ended.
    name: Option<NameClaim>,
    executions: Executions,
    /// Whether `executions` is all there are: not before a session from an earlier process is adopted.
    executions_known: bool,
    /// What the driver is doing for this session.
    work: Option<Work>,
    /// The sandbox ended by itself; that is certain, but not recorded yet.
    ended: Option<Exit>,
    /// The record says that only the disk is kept; the driver has not been told yet, or failed.
    stop_owed: bool,
    /// Who waits for an attachment to come or go.
    asked: BTreeMap<AttachmentId, mounts::PendingMount>,
    /// Attachments to be taken away even from processes that use them.
    forced: BTreeSet<AttachmentId>,
    /// Pauses between attempts at what nobody waits for, and when the next one is.
    retry: Backoff,
    retry_at: Option<UnixMs>,
    /// Ends of commands that could not be recorded when they came.
    unrecorded: Vec<Change>,
    /// When activity and what is unrecorded is written down, if there is any.
    flush_at: Option<UnixMs>,
    /// When a refused request was last recorded.
    refused_at: Option<UnixMs>,
    /// Callers who want to hear that the session has ended.
    waiting: Vec<Reply<Session>>,
    attempted: Option<oneshot::Sender<()>>,
    /// Pauses between attempts to adopt.
    adoption: Backoff,
    /// An attempt to adopt failed: until one succeeds there is nothing that the driver could be asked.
    unadopted: bool,
    _running: Running,
}

/// Why a session is to end.
struct End {
    reason: EndReason,
    /// In words, unless it was asked for.
    cause: String,
    /// What was used up, where that kept it from being created.
    exhausted: Option<Limit>,
}

impl End {
    fn requested() -> Self {
        Self { reason: EndReason::Requested, cause: String::new(), exhausted: None }
    }

    fn failed(cause: impl Into<String>) -> Self {
        Self { reason: EndReason::Failed, cause: cause.into(), exhausted: None }
    }
}

/// What follows a step of the task.
enum Flow {
    Continue,
    End(End),
    /// The engine stops; the sandbox stays.
    Stop,
}

impl Actors {
    pub(crate) fn new(
        shared: Arc<Shared>,
        registry: Arc<Registry>,
        events: Arc<Events>,
        images: Arc<RootImages>,
        volumes: Arc<Volumes>,
        snapshots: Arc<Snapshots>,
        previews: Arc<Previews>,
    ) -> Self {
        let creates = Semaphore::new(shared.config.creates_concurrent_max.max(1) as usize);
        Self { shared, registry, events, images, volumes, snapshots, previews, creates }
    }

    /// Starts the task of a session and makes the session known.
    pub(crate) fn spawn(
        self: &Arc<Self>,
        session: Session,
        slot: Option<Slot>,
        name: Option<NameClaim>,
        start: StartMode,
        running: Running,
    ) {
        let (sender, mailbox) = mpsc::channel(MAILBOX_MAX);
        let (jobs_sender, jobs) = mpsc::channel(MAILBOX_MAX);
        let published = watch::Sender::new(session.clone());
        let live = Arc::new(SessionHandle {
            id: session.id,
            workspace_id: session.workspace_id,
            mailbox: sender,
            jobs: jobs_sender,
            published: published.subscribe(),
            guest: Default::default(),
            alarm: Default::default(),
            exit: Default::default(),
            memory_low: Default::default(),
            activity: Activity::new(session.last_activity_at),
            recorded: Default::default(),
        });
        self.registry.live.insert(live.clone());
        let actor = Actor {
            shared: self.shared.clone(),
            actors: self.clone(),
            live,
            session,
            moving: None,
            published,
            mailbox,
            jobs,
            slot,
            name,
            executions: Executions::new(),
            executions_known: !matches!(start, StartMode::Recovered { .. }),
            work: None,
            ended: None,
            stop_owed: false,
            asked: BTreeMap::new(),
            forced: BTreeSet::new(),
            retry: self.shared.backoff(),
            retry_at: None,
            unrecorded: Vec::new(),
            flush_at: None,
            refused_at: None,
            waiting: Vec::new(),
            attempted: None,
            adoption: self.shared.backoff(),
            unadopted: false,
            _running: running,
        };
        tokio::spawn(actor.run(start));
    }
}

impl Actor {
    async fn run(mut self, start: StartMode) {
        let Some(mut flow) = self.begin_life(start).await else { return };
        self.schedule();
        loop {
            flow = match flow {
                Flow::Continue => self.step().await,
                Flow::End(end) => self.end(end).await,
                Flow::Stop => break,
            };
        }
    }

    /// `None` when the record could not be written: nothing happened, and nobody has heard of the session.
    async fn begin_life(&mut self, start: StartMode) -> Option<Flow> {
        match start {
            StartMode::New { source, reply } => {
                let origin = match self.session.source_snapshot_id {
                    Some(snapshot_id) => DiskSource::Snapshot { snapshot_id },
                    None => DiskSource::Fresh,
                };
                if let Err(error) = self.commit_with(self.session.clone(), vec![EventKind::Created(origin)]).await {
                    self.forget();
                    let _ = reply.send(Err(error));
                    return None;
                }
                self.name.iter().for_each(NameClaim::recorded);
                // A caller that went away finds the session in the list.
                let _ = reply.send(Ok(self.session.clone()));
                self.work = Some(self.create(source));
                Some(Flow::Continue)
            }
            StartMode::Recorded { source, recorded } => {
                if recorded.await.is_err() {
                    self.forget();
                    return None;
                }
                self.work = Some(self.create(source));
                Some(Flow::Continue)
            }
            StartMode::Recovered { attempted } => {
                self.attempted = Some(attempted);
                Some(self.recover())
            }
        }
    }

    fn forget(&mut self) {
        for attachment in &self.session.attachments {
            self.actors.volumes.release(attachment.volume_id, self.session.id);
        }
        self.actors.registry.live.remove(self.session.id);
        self.name = None;
    }

    /// What a record from before the start asks for.
    fn recover(&mut self) -> Flow {
        match self.session.state {
            SessionState::Creating => Flow::End(End::failed("the server stopped while the sandbox was being created")),
            // Its record has the reason already.
            SessionState::Terminating | SessionState::Terminated => Flow::End(End::requested()),
            state => {
                if state == SessionState::Pausing {
                    // Never stored by this engine; a pause that was not recorded as done did not happen.
                    self.session.state = SessionState::Running;
                }
                self.work = Some(self.adopt(0));
                Flow::Continue
            }
        }
    }

    /// Waits for the next thing to happen, and deals with it.
    async fn step(&mut self) -> Flow {
        // A creation is short: it is finished, so that it need not be thrown away at the next start.
        let unfinished = self.session.state == SessionState::Creating
            || self.work.as_ref().is_some_and(|work| work.begun.load(Ordering::Acquire));
        tokio::select! {
            biased;
            done = work::next_done(&mut self.work) => match self.done(done).await {
                Flow::Continue => self.due().await,
                other => other,
            },
            () = self.shared.tasks.stopping(), if !unfinished => {
                self.flush().await;
                Flow::Stop
            }
            () = self.live.alarm.notified() => self.due().await,
            Some(message) = self.mailbox.recv() => self.handle(message).await,
            // Nothing else begins while somebody waits for a volume to come or go.
            Some(job) = self.jobs.recv(), if self.unadopted || self.work.is_none() && self.asked.is_empty() => {
                if self.unadopted {
                    let detail = "the server could not take the sandbox over yet, and keeps trying";
                    ending::refuse_job(job, &Error::new(Code::GuestUnreachable, detail));
                    return Flow::Continue;
                }
                self.take_up(job).await;
                self.due().await
            }
            ended = self.executions.next() => {
                self.execution_ended(ended).await;
                Flow::Continue
            }
        }
    }

    async fn take_up(&mut self, job: Job) {
        match job {
            Job::Pause { reply } => self.pause_asked(reply).await,
            Job::Resume { reply } => self.resume(reply).await,
            Job::Wake { reply } => self.wake(reply).await,
            Job::Copy { images, pause, reply } => self.copy(images, pause, reply),
            Job::Attach { mount, reply } => self.attach(mount, reply).await,
            Job::Detach { volume_id, force, reply } => self.detach(volume_id, force, reply).await,
            Job::Restrict { egress, reply } => self.restrict(egress, reply).await,
        }
    }

    async fn done(&mut self, done: Done) -> Flow {
        match done {
            Done::Created(result) => return self.created(result).await,
            Done::Adopted(result) => return self.adopted(result).await,
            Done::Stopped(result) => return self.stopped(result).await,
            Done::Frozen { result, reply } => self.frozen(result, reply).await,
            Done::Thawed { result, reply } => self.thawed(result, reply).await,
            Done::Booted { result, reply } => self.booted(result, reply).await,
            Done::Undone => self.undone(),
            Done::Probed { exit, result } => self.probed(exit, result),
            Done::Copied { result, reply } => {
                let _ = reply.send(result.map_err(work::copy_error));
            }
            Done::Mounts(results) => self.mounts_done(results).await,
            Done::Restricted { result, before, reply } => self.restricted(result, before, reply).await,
        }
        Flow::Continue
    }

    /// Acts on whatever is due now.
    async fn due(&mut self) -> Flow {
        let now = self.shared.clock.now();
        let is_due = |at: Option<UnixMs>| at.is_some_and(|at| at <= now);
        let state = self.state();
        if is_due(self.session.timeout_at) && accept(state, Request::Expire) == Verdict::Do {
            return Flow::End(End {
                reason: EndReason::MaxDuration,
                cause: "maximum duration reached".to_owned(),
                exhausted: None,
            });
        }
        let expires_at = self.session.pause.as_ref().and_then(|pause| pause.expires_at);
        if is_due(expires_at) && accept(state, Request::RetentionExpired) == Verdict::Do {
            return Flow::End(End {
                reason: EndReason::PauseRetention,
                cause: "pause retention expired".to_owned(),
                exhausted: None,
            });
        }
        if self.work.is_none() && self.retry_at.is_none_or(|at| at <= now) {
            self.retry_at = None;
            self.move_on(now).await;
        }
        if is_due(self.flush_at) {
            self.flush().await;
        }
        if self.flush_at.is_none() && self.has_unsaved() {
            self.flush_at = Some(now + self.shared.config.activity_flush_ms);
        }
        self.schedule();
        Flow::Continue
    }

    /// Gives the driver what nobody asked for but is due: the most pressing thing, one at a time.
    async fn move_on(&mut self, now: UnixMs) {
        if let Some(exit) = self.live.take_exit() {
            self.probe(exit);
        }
        if self.work.is_none()
            && let Some(exit) = self.ended.clone()
        {
            self.record_exit(exit).await;
        }
        if self.work.is_none() && self.release_memory_at(now).is_some_and(|(at, _)| at <= now) {
            self.release_memory(now).await;
        }
        if self.work.is_some() || self.retry_at.is_some() {
            return;
        }
        if self.stop_owed {
            self.work = Some(self.stop());
        } else if self.session.state == SessionState::Running && self.has_unsettled_mounts() {
            self.work = Some(self.settle_mounts());
        } else if self.idle_at(now).is_some_and(|at| at <= now) {
            self.pause(None);
        }
    }

    /// The state as everybody sees it.
    fn state(&self) -> SessionState {
        self.moving.unwrap_or(self.session.state)
    }

    fn has_unsaved(&self) -> bool {
        !self.unrecorded.is_empty() || self.live.activity.unsaved.load(Ordering::Acquire)
    }

    /// Registers the next time at which something is due.
    fn schedule(&self) {
        let now = self.shared.clock.now();
        let state = self.state();
        let when = |request, at: Option<UnixMs>| at.filter(|_| accept(state, request) == Verdict::Do);
        let expires_at = self.session.pause.as_ref().and_then(|pause| pause.expires_at);
        // What waits for work to end is looked at when it does.
        let own = self.work.is_none().then(|| match self.retry_at {
            Some(at) => Some(at),
            None => [self.release_memory_at(now).map(|(at, _)| at), self.idle_at(now)].into_iter().flatten().min(),
        });
        let next = [
            when(Request::Expire, self.session.timeout_at),
            when(Request::RetentionExpired, expires_at),
            own.flatten(),
            self.flush_at,
        ];
        self.shared.deadlines.set(Sleeper::Session(self.session.id), next.into_iter().flatten().min());
    }

    /// Something failed that nobody waits for: try again later.
    fn try_later(&mut self) {
        self.retry_at = Some(self.shared.clock.now() + self.retry.next_ms());
    }

    async fn flush(&mut self) {
        self.flush_at = None;
        if self.has_unsaved()
            && let Err(error) = self.commit(self.session.clone(), Vec::new()).await
        {
            tracing::warn!(session = %self.session.id, %error, "activity was not recorded");
        }
    }

    /// Commits the record with what happened, then publishes it.
    async fn commit_with(&mut self, session: Session, facts: Vec<EventKind>) -> Result<(), Error> {
        let events = facts.into_iter().map(|fact| self.event(fact)).collect();
        self.commit(session, events).await
    }

    fn event(&self, fact: EventKind) -> Change {
        self.actors.events.event(self.session.id, fact)
    }

    /// Commits the record and what belongs to it, then publishes it.
    async fn commit(&mut self, mut session: Session, mut others: Vec<Change>) -> Result<(), Error> {
        // Cleared first: activity from here on is newer than what is written.
        let unsaved = self.live.activity.unsaved.swap(false, Ordering::AcqRel);
        let last = self.live.activity.last(self.shared.clock.now());
        session.last_activity_at = session.last_activity_at.max(last);
        others.push(Change::Session(session.clone()));
        others.extend(self.unrecorded.iter().cloned());
        let tells = others.iter().any(|change| matches!(change, Change::Event { .. }));
        if let Err(error) = self.shared.write(others).await {
            if unsaved {
                self.live.activity.unsaved.store(true, Ordering::Release);
            }
            return Err(error);
        }
        self.unrecorded.clear();
        self.session = session;
        self.publish();
        if tells {
            self.live.tell_recorded();
        }
        Ok(())
    }

    fn publish(&self) {
        self.published.send_replace(Session { state: self.state(), ..self.session.clone() });
    }

    /// Shows, without recording it, that the session is on its way.
    fn show(&mut self, moving: Option<SessionState>) {
        self.moving = moving;
        self.publish();
    }
}
