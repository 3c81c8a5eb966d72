//! A session that has not ended, as the rest of the engine reaches it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{DiskImageId, SessionId, SnapshotId, VolumeId, WorkspaceId};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::model::{Attachment, Egress, Execution, Session, SessionState, UnixMs};
use crate::ports::{Clock, Guest};
use crate::requests::{NewExecution, NewMount, SessionUpdate};

pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What callers may ask of the task at any time.
pub(crate) enum Message {
    Update { update: SessionUpdate, reply: Reply<Session> },
    Extend { additional_ms: u64, reply: Reply<Session> },
    Terminate { reply: Reply<Session> },
    Execute { new: NewExecution, reply: Reply<Started> },
}

/// What callers may ask of the task that needs the driver.
pub(crate) enum Job {
    Pause {
        reply: Reply<Session>,
    },
    Resume {
        reply: Reply<Session>,
    },
    /// Resume it for a visitor, if visitors may wake it.
    Wake {
        reply: Reply<Session>,
    },
    /// Copy the disk; where a pause is named only while that lasts. The answer is how long the source was frozen.
    Copy {
        images: Vec<DiskImageId>,
        pause: Option<SnapshotId>,
        reply: Reply<u64>,
    },
    Attach {
        mount: NewMount,
        reply: Reply<Attachment>,
    },
    Detach {
        volume_id: VolumeId,
        force: bool,
        reply: Reply<()>,
    },
    /// Name the only destinations that the sandbox reaches, or lift that.
    Restrict {
        egress: Option<Egress>,
        reply: Reply<Session>,
    },
}

/// What the caller of an execution gets once the command runs.
pub(crate) struct Started {
    /// As it was when it started.
    pub(crate) execution: Execution,
    pub(crate) published: watch::Receiver<Execution>,
}

/// A live session as seen from outside its task.
pub(crate) struct SessionHandle {
    pub(crate) id: SessionId,
    pub(crate) workspace_id: WorkspaceId,
    pub(crate) mailbox: mpsc::Sender<Message>,
    pub(crate) jobs: mpsc::Sender<Job>,
    /// The last committed record; in its state PAUSING and RESUMING are shown before they are recorded.
    pub(crate) published: watch::Receiver<Session>,
    /// Present while the sandbox can be reached. Look at the state first: it is set a moment early.
    pub(crate) guest: RwLock<Option<Arc<dyn Guest>>>,
    /// Makes the session's task look at what is due: deadline, exit, activity.
    pub(crate) alarm: Notify,
    /// The driver says that the sandbox ended by itself.
    pub(crate) exit: Mutex<Option<Exit>>,
    /// It is paused, and its memory is wanted back.
    pub(crate) memory_low: AtomicBool,
    pub(crate) activity: Activity,
    /// Changes whenever events of the session were committed.
    pub(crate) recorded: watch::Sender<u64>,
}

/// How a sandbox ended by itself.
#[derive(Debug, Clone)]
pub(crate) struct Exit {
    pub(crate) cause: String,
    pub(crate) powered_off: bool,
    pub(crate) host_restarted: bool,
}

/// When a session was last in use. Lives in memory; its task writes it down now and then.
pub(crate) struct Activity {
    last: AtomicU64,
    open: AtomicU32,
    /// Newer than what the store has.
    pub(crate) unsaved: AtomicBool,
}

impl Activity {
    pub(crate) fn new(last: UnixMs) -> Self {
        Self { last: AtomicU64::new(last), open: AtomicU32::new(0), unsaved: AtomicBool::new(false) }
    }

    /// Counts as use now, for its task, which writes it down itself.
    pub(crate) fn note(&self, now: UnixMs) {
        self.last.fetch_max(now, Ordering::Relaxed);
    }

    pub(crate) fn last(&self, now: UnixMs) -> UnixMs {
        let last = self.last.load(Ordering::Relaxed);
        if self.open.load(Ordering::Relaxed) > 0 { last.max(now) } else { last }
    }
}

impl SessionHandle {
    /// The record with its activity up to date.
    pub(crate) fn session(&self, now: UnixMs) -> Session {
        let mut session = self.published.borrow().clone();
        session.last_activity_at = session.last_activity_at.max(self.activity.last(now));
        session
    }

    pub(crate) fn state(&self) -> SessionState {
        self.published.borrow().state
    }

    pub(crate) fn guest(&self) -> Option<Arc<dyn Guest>> {
        self.guest.read().expect("no holder of this lock panics").clone()
    }

    pub(crate) fn set_guest(&self, guest: Option<Arc<dyn Guest>>) {
        *self.guest.write().expect("no holder of this lock panics") = guest;
    }

    /// The first cause is the true one.
    pub(crate) fn set_exit(&self, exit: Exit) {
        self.exit.lock().expect("no holder of this lock panics").get_or_insert(exit);
    }

    pub(crate) fn take_exit(&self) -> Option<Exit> {
        self.exit.lock().expect("no holder of this lock panics").take()
    }

    pub(crate) fn tell_recorded(&self) {
        self.recorded.send_modify(|times| *times = times.wrapping_add(1));
    }

    pub(crate) fn touch(&self, now: UnixMs) {
        let Activity { last, unsaved, .. } = &self.activity;
        // Looked at first: it mostly stands there already, and many requests at a time would fight for it.
        if last.load(Ordering::Relaxed) < now {
            last.fetch_max(now, Ordering::AcqRel);
        }
        if !unsaved.load(Ordering::Acquire) && !unsaved.swap(true, Ordering::AcqRel) {
            self.alarm.notify_one();
        }
    }

    pub(crate) fn enter(&self, now: UnixMs) {
        self.activity.open.fetch_add(1, Ordering::Relaxed);
        self.touch(now);
    }

    pub(crate) fn leave(&self, now: UnixMs) {
        self.activity.open.fetch_sub(1, Ordering::Relaxed);
        self.touch(now);
    }

    /// Sends a message to the session's task and waits for the answer.
    ///
    /// The message takes effect even if the asking future is dropped.
    pub(crate) async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.mailbox.send(message(reply)).await.is_ok();
        self.answer(sent, answer).await
    }

    /// The same for what needs the driver.
    pub(crate) async fn ask_job<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.jobs.send(job(reply)).await.is_ok();
        self.answer(sent, answer).await
    }

    async fn answer<T>(&self, sent: bool, answer: oneshot::Receiver<Result<T, Error>>) -> Result<T, Error> {
        if sent && let Ok(answer) = answer.await {
            return answer;
        }
        let state = self.state();
        Err(match (state.is_terminal(), self.mailbox.is_closed()) {
            (true, _) => Code::SessionTerminated.into(),
            // The task is gone: the engine stops.
            (false, true) => Code::Draining.into(),
            // It dropped the question together with the sandbox that it was for.
            (false, false) => Error::new(Code::SessionNotRunning, format!("(state={})", state.name())),
        })
    }
}

/// Counts as use of the session while it lives.
pub(crate) struct InUse {
    pub(crate) live: Arc<SessionHandle>,
    clock: Arc<dyn Clock>,
}

impl InUse {
    pub(crate) fn new(live: Arc<SessionHandle>, clock: Arc<dyn Clock>) -> Self {
        live.enter(clock.now());
        Self { live, clock }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.live.leave(self.clock.now());
    }
}
