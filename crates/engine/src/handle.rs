//! The sessions that have not ended: how the rest of the engine reaches them, and what they use up.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{DiskImageId, SessionId, SnapshotId, VolumeId, WorkspaceId};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::model::{Attachment, Egress, Execution, Resources, Session, SessionState, UnixMs};
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

/// All live sessions of the server, and the quotas they count against.
#[derive(Default)]
pub(crate) struct Registry(Mutex<Table>);

#[derive(Default)]
struct Table {
    live: BTreeMap<SessionId, Arc<SessionHandle>>,
    total: u32,
    used: BTreeMap<WorkspaceId, Used>,
}

/// What the live sessions of a workspace use together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) sessions: u32,
    pub(crate) cpu_millis: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) disk_bytes: u64,
}

/// A session's share of its workspace's and the server's quota; given back on drop.
pub(crate) struct Slot {
    registry: Arc<Registry>,
    workspace_id: WorkspaceId,
    resources: Resources,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.registry.with(|table| {
            table.total -= 1;
            if let Some(used) = table.used.get_mut(&self.workspace_id) {
                used.sessions -= 1;
                used.cpu_millis -= u64::from(self.resources.cpu_millis);
                used.memory_bytes -= self.resources.memory_bytes;
                used.disk_bytes -= self.resources.disk_bytes;
            }
        });
    }
}

impl Registry {
    fn with<T>(&self, action: impl FnOnce(&mut Table) -> T) -> T {
        action(&mut self.0.lock().expect("no holder of this lock panics"))
    }

    pub(crate) fn get(&self, id: SessionId) -> Option<Arc<SessionHandle>> {
        self.with(|table| table.live.get(&id).cloned())
    }

    pub(crate) fn insert(&self, live: Arc<SessionHandle>) {
        self.with(|table| table.live.insert(live.id, live));
    }

    pub(crate) fn remove(&self, id: SessionId) {
        self.with(|table| table.live.remove(&id));
    }

    pub(crate) fn all(&self) -> Vec<Arc<SessionHandle>> {
        self.with(|table| table.live.values().cloned().collect())
    }

    pub(crate) fn used(&self, workspace_id: WorkspaceId) -> Used {
        self.with(|table| table.used.get(&workspace_id).copied().unwrap_or_default())
    }

    /// Counts a new session, if both the workspace and the server have room for it.
    pub(crate) fn reserve(
        self: &Arc<Self>,
        workspace_id: WorkspaceId,
        resources: &Resources,
        of_workspace: Option<u32>,
        sessions_max: u32,
    ) -> Result<Slot, Error> {
        self.with(|table| {
            let used = table.used.get(&workspace_id).map_or(0, |used| used.sessions);
            if let Some(max) = of_workspace.filter(|max| used >= *max) {
                return Err(Error::new(Code::QuotaExceeded, format!("the workspace's sessions_max is {max}")));
            }
            if table.total >= sessions_max {
                let detail = format!("the server's sessions_max is {sessions_max}");
                return Err(Error::new(Code::CapacityUnavailable, detail));
            }
            table.count(workspace_id, resources);
            Ok(())
        })?;
        Ok(Slot { registry: self.clone(), workspace_id, resources: *resources })
    }

    /// Counts a session that exists already, whatever the limits say now.
    pub(crate) fn take(self: &Arc<Self>, workspace_id: WorkspaceId, resources: &Resources) -> Slot {
        self.with(|table| table.count(workspace_id, resources));
        Slot { registry: self.clone(), workspace_id, resources: *resources }
    }
}

impl Table {
    fn count(&mut self, workspace_id: WorkspaceId, resources: &Resources) {
        self.total += 1;
        let used = self.used.entry(workspace_id).or_default();
        used.sessions += 1;
        used.cpu_millis += u64::from(resources.cpu_millis);
        used.memory_bytes += resources.memory_bytes;
        used.disk_bytes += resources.disk_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn racing_creators_never_get_more_than_the_quota() {
        let registry = Arc::new(Registry::default());
        let workspace = WorkspaceId::new(1, [0; 10]);
        let resources = Resources::of(2, 256, 5);
        let taken = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        if let Ok(slot) = registry.reserve(workspace, &resources, Some(100), 1_000) {
                            taken.lock().unwrap().push(slot);
                        }
                    }
                });
            }
        });
        assert_eq!(taken.lock().unwrap().len(), 100);
        assert_eq!(
            registry.used(workspace),
            Used { sessions: 100, cpu_millis: 200_000, memory_bytes: 25_600 << 20, disk_bytes: 500 << 30 }
        );
        drop(taken);
        assert_eq!(registry.used(workspace), Used::default());
        assert!(registry.reserve(workspace, &resources, None, 0).is_err(), "the server's own limit");
    }
}
