//! What callers see of the engine.
//!
//! Every entry point takes the caller first; ids are looked up in one place, where unknown and
//! foreign ones become the same "not found".

use std::collections::BTreeMap;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{ExecutionId, PreviewId, SessionId, SnapshotId, VolumeId, WorkspaceId};
use tokio::sync::{mpsc, watch};

use crate::access::{Access, Caller};
use crate::actor::Actors;
use crate::config::EngineConfig;
use crate::deadlines::{Deadlines, Sleeper};
use crate::engine_core::{Engine, EngineCore};
use crate::errors::{guest_error, store_error};
use crate::event_log::{CommandLog, EventFollower, Events};
use crate::handle::{Exit, InUse, Job, Message, SessionHandle};
use crate::model::{
    Attachment, Binding, Connection, Egress, Event, EventKind, Execution, ExecutionStatus, Session, SessionState,
    Snapshot, UnixMs, Volume, Workspace, WorkspaceSettings,
};
use crate::open::{OpenSession, PreviewConnection};
use crate::ports::{Ended, HostEvent, ImageReader, Ports, ProcessEvent, SessionQuery};
use crate::previews::Previews;
use crate::registry::{Found, Registry};
use crate::requests::{
    Certificate, ListPreviews, ListSessions, ListSnapshots, ListVolumes, NewExecution, NewExposure, NewMount,
    NewPreview, NewSnapshot, NewVolume, OpenPreview, PreviewTarget, PreviewUrl, SessionUpdate, SnapshotUpdate, Usage,
    VolumeUpdate, WorkspaceSettingsUpdate,
};
use crate::session::{Request, check};
use crate::shared::{Shared, certificate_key};
use crate::snapshots::Snapshots;
use crate::tasks::Tasks;
use crate::volumes::Volumes;
use crate::workspaces::Workspaces;
use crate::{egress, query, recovery};

impl Engine {
    /// What the operator decided.
    pub fn config(&self) -> &EngineConfig {
        &self.0.shared.config
    }

    /// Starts the engine: recovers everything recorded, then serves. The ingress is asked to publish before this returns;
    /// visitors who come so early have to wait for it.
    pub async fn start(config: EngineConfig, ports: Ports) -> Result<Self, Error> {
        let Ports { store, drivers, host, blobs, ingress, clock, entropy } = ports;
        let key = certificate_key(&*store, &*entropy).await?;
        let workspaces = store.workspaces().await.map_err(store_error)?;
        let keys = store.api_keys().await.map_err(store_error)?;
        let records = recovery::read(&*store).await?;
        let access = Access::new(workspaces, keys, key);
        let (deadlines, tasks) = (Deadlines::new(), Tasks::new());
        let shared = Arc::new(Shared { config, store, drivers, host, clock, entropy, access, deadlines, tasks });
        let registry = Arc::new(Registry::new(shared.clone()));
        let events = Arc::new(Events::new(shared.clone(), registry.clone()));
        let workspaces = Arc::new(Workspaces::new(shared.clone()));
        let (of_volumes, of_sessions) = (&records.volumes, &records.sessions);
        let volumes = Volumes::new(shared.clone(), workspaces.clone(), registry.clone(), of_volumes, of_sessions);
        let volumes = Arc::new(volumes);
        let snapshots = Snapshots::new(
            shared.clone(),
            workspaces.clone(),
            registry.clone(),
            events.clone(),
            volumes.clone(),
            blobs,
        );
        let previews = Previews::new(shared.clone(), registry.clone(), ingress, &records.previews);
        let (snapshots, previews) = (Arc::new(snapshots), Arc::new(previews));
        let actors = Actors::new(
            shared.clone(),
            registry.clone(),
            events.clone(),
            volumes.clone(),
            snapshots.clone(),
            previews.clone(),
        );
        let inner = Arc::new(EngineCore {
            registry,
            events,
            shared,
            workspaces,
            actors: Arc::new(actors),
            snapshots,
            volumes,
            previews,
        });
        let ends: Vec<_> = inner.shared.drivers.all().map(|(_, driver)| driver.ends()).collect();
        let news = inner.shared.host.events();
        recovery::recover(&inner, records).await?;
        ends.into_iter().try_for_each(|ends| inner.spawn_ends(ends))?;
        inner.spawn_events(news)?;
        inner.spawn_timer()?;
        Ok(Self(inner))
    }

    /// Stops serving: new work is refused, work under way is finished or left to the next start,
    /// sandboxes keep running. Returns when all is quiet.
    pub async fn shut_down(&self) {
        self.0.shared.tasks.stop().await;
    }

    /// Whether [`Engine::shut_down`] was called.
    pub fn is_draining(&self) -> bool {
        self.0.shared.tasks.is_stopping()
    }

    /// Makes sure that there is a workspace and a key.
    ///
    /// A `secret` that is no key yet becomes one. Without one, and without any key so far, a new
    /// secret is made and returned: it is stored nowhere else.
    pub async fn first_start(&self, secret: Option<&str>) -> Result<Option<String>, Error> {
        self.0.workspaces.first_start(secret).await
    }

    /// Who shows this token; `unauthenticated` for an unknown one.
    pub fn authenticate(&self, token: &str) -> Result<Caller, Error> {
        self.0.shared.access.authenticate(token)
    }

    /// The caller's workspace.
    pub fn workspace(&self, caller: &Caller) -> Workspace {
        self.0.shared.access.workspace(caller, None).expect("a caller is made from a key whose workspace is loaded")
    }

    pub async fn settings(
        &self,
        caller: &Caller,
        workspace_id: Option<WorkspaceId>,
    ) -> Result<(WorkspaceId, WorkspaceSettings), Error> {
        self.0.workspaces.settings(caller, workspace_id)
    }

    /// Changes limits and retentions. They hold for what is done from now on.
    pub async fn update_settings(
        &self,
        caller: &Caller,
        workspace_id: Option<WorkspaceId>,
        update: WorkspaceSettingsUpdate,
    ) -> Result<(WorkspaceId, WorkspaceSettings), Error> {
        self.0.workspaces.update_settings(caller, workspace_id, update).await
    }

    /// The session now and whenever it changes. The channel closes after TERMINATED, or when the
    /// engine shuts down.
    pub async fn watch_session(&self, caller: &Caller, id: SessionId) -> Result<watch::Receiver<Session>, Error> {
        Ok(match self.0.registry.find(caller, id).await? {
            Found::Live(live) => live.published.clone(),
            Found::Ended(session) => watch::channel(session).1,
        })
    }

    pub async fn session(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        Ok(match self.0.registry.find(caller, id).await? {
            Found::Live(live) => live.session(self.0.shared.clock.now()),
            Found::Ended(session) => session,
        })
    }

    /// One page of sessions, newest first, and the token of the next page; empty at the end.
    pub async fn list_sessions(&self, caller: &Caller, list: ListSessions) -> Result<(Vec<Session>, String), Error> {
        let inner = &*self.0;
        let workspace = inner.shared.access.workspace(caller, list.workspace_id)?;
        let size = query::page_size(list.page_size)?;
        let query = SessionQuery {
            workspace_id: Some(workspace.id),
            owner_id: list.owner_id,
            state: list.state,
            tags: list.tags,
            sticky: list.sticky,
            include_terminated: list.include_terminated,
            before: query::parse_page_token(&list.page_token)?.map(|(at, id)| (at, SessionId::from_uuid(id))),
            // One more than asked tells whether there is another page.
            limit: size + 1,
        };
        let mut sessions = inner.shared.store.sessions(query).await.map_err(store_error)?;
        let next = query::page(&mut sessions, size, |last| (last.created_at, *last.id.as_uuid()));
        let now = inner.shared.clock.now();
        for session in &mut sessions {
            if let Some(live) = inner.registry.live.get(session.id) {
                session.last_activity_at = session.last_activity_at.max(live.activity.last(now));
            }
        }
        Ok((sessions, next))
    }

    pub async fn update_session(
        &self,
        caller: &Caller,
        id: SessionId,
        update: SessionUpdate,
    ) -> Result<Session, Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Change).await?;
        let _quiet = match update.sticky {
            Some(true) => {
                let quiet = self.0.workspaces.quiet().await;
                self.0.registry.check_sticky(live.workspace_id, Some(id))?;
                Some(quiet)
            }
            _ => None,
        };
        live.ask(|reply| Message::Update { update, reply }).await
    }

    /// Moves the session's deadline; one without deadline gets it counted from now.
    pub async fn extend_session(&self, caller: &Caller, id: SessionId, additional_ms: u64) -> Result<Session, Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Change).await?;
        live.ask(|reply| Message::Extend { additional_ms, reply }).await
    }

    /// Ends the session. Returns when it is TERMINATED; it is idempotent.
    pub async fn terminate_session(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        let live = match self.0.registry.find(caller, id).await? {
            Found::Ended(session) if session.state == SessionState::Terminated => return Ok(session),
            Found::Ended(_) => return Err(Code::Draining.into()),
            Found::Live(live) => live,
        };
        self.0.shared.tasks.check()?;
        let result = live.ask(|reply| Message::Terminate { reply }).await;
        // Somebody else's request may have ended it first.
        let session = live.published.borrow().clone();
        match result {
            _ if session.state == SessionState::Terminated => Ok(session),
            // The engine stops before the end is reached; the next start goes on with it.
            Err(error) if error.code == Code::SessionTerminated => Err(Code::Draining.into()),
            other => other,
        }
    }

    /// Stops the session where it is: its processes and memory are kept. Returns when it is PAUSED;
    /// pausing a stopped one has no effect.
    pub async fn pause_session(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Pause).await?;
        live.ask_job(|reply| Job::Pause { reply }).await
    }

    /// Lets a stopped session go on. Returns when it is RUNNING; resuming one that runs has no effect.
    pub async fn resume_session(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Resume).await?;
        live.ask_job(|reply| Job::Resume { reply }).await
    }

    /// Notes that the session is in use; returns when that was.
    pub async fn report_activity(&self, caller: &Caller, id: SessionId) -> Result<UnixMs, Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Activity).await?;
        let now = self.0.shared.clock.now();
        live.touch(now);
        Ok(live.session(now).last_activity_at)
    }

    /// What the caller's workspace uses now, and may use.
    pub async fn usage(&self, caller: &Caller, workspace_id: Option<WorkspaceId>) -> Result<Usage, Error> {
        let workspace = self.0.shared.access.workspace(caller, workspace_id)?;
        let used = self.0.registry.live.used(workspace.id);
        let server = u64::from(self.0.shared.config.sessions_max);
        Ok(Usage {
            active_sessions: u64::from(used.sessions),
            sessions_max: Some(workspace.settings.sessions_max.map_or(server, |max| server.min(u64::from(max)))),
            cpu_millis: used.cpu_millis,
            memory_bytes: used.memory_bytes,
            disk_bytes: used.disk_bytes,
        })
    }

    /// How many live sessions are in each state, over all workspaces.
    pub fn session_counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts: BTreeMap<_, _> = SessionState::ALL
            .into_iter()
            .filter(|state| *state != SessionState::Terminated)
            .map(|state| (state.name(), 0))
            .collect();
        for live in self.0.registry.live.all() {
            *counts.entry(live.state().name()).or_default() += 1;
        }
        counts
    }

    /// A certificate for the data plane of a RUNNING session, and the session.
    pub async fn certificate(&self, caller: &Caller, id: SessionId) -> Result<(Certificate, Session), Error> {
        let live = self.0.registry.find_live(caller, id, Request::Use).await?;
        let now = self.0.shared.clock.now();
        let expires_at = now + self.0.shared.config.certificate_ttl_ms;
        let text = self.0.shared.access.certify(id, expires_at);
        Ok((Certificate { text, expires_at }, live.session(now)))
    }

    /// Opens a running sandbox for one call of the data plane.
    pub async fn open(&self, certificate: &str, id: SessionId) -> Result<OpenSession, Error> {
        let mut open = self.probe(certificate, id).await?;
        // The session may have ended meanwhile; then the guest says so.
        if let Some(live) = self.0.registry.live.get(id) {
            open._activity = Some(InUse::new(live, self.0.shared.clock.clone()));
        }
        Ok(open)
    }

    /// Opens a running sandbox for a caller whose right to it is that to the session.
    pub async fn open_session(&self, caller: &Caller, id: SessionId) -> Result<OpenSession, Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Use).await?;
        let mut open = self.open_live(&live)?;
        open._activity = Some(InUse::new(live, self.0.shared.clock.clone()));
        Ok(open)
    }

    /// Which session a certificate opens, as far as that can be told without looking at the session:
    /// what a façade asks before it takes in a large message.
    pub fn certified_session(&self, certificate: &str) -> Result<SessionId, Error> {
        self.0.shared.access.certified(certificate, self.0.shared.clock.now())
    }

    /// Like [`Engine::open`], but does not count as activity.
    pub async fn probe(&self, certificate: &str, id: SessionId) -> Result<OpenSession, Error> {
        let inner = &*self.0;
        inner.shared.tasks.check()?;
        inner.shared.access.verify(certificate, id, inner.shared.clock.now())?;
        self.open_live(&*inner.registry.find_certified(id).await?)
    }

    fn open_live(&self, live: &SessionHandle) -> Result<OpenSession, Error> {
        let (env, memory_bytes) = {
            let session = live.published.borrow();
            check(session.state, Request::Use)?;
            (session.env.clone(), session.machine.resources.memory_bytes)
        };
        let guest = live.guest().ok_or(Code::GuestUnreachable)?;
        let commands = CommandLog { events: self.0.events.clone(), session_id: live.id, memory_bytes };
        Ok(OpenSession { guest, env, commands, _activity: None })
    }

    /// Starts a command that belongs to the session. With `wait` it returns when the command has
    /// ended, else when it runs; a caller that goes away does not end it.
    pub async fn execute(
        &self,
        caller: &Caller,
        id: SessionId,
        new: NewExecution,
        wait: bool,
    ) -> Result<Execution, Error> {
        self.0.shared.tasks.check()?;
        let live = self.0.registry.find_live(caller, id, Request::Use).await?;
        let _in_use = InUse::new(live.clone(), self.0.shared.clock.clone());
        let mut started = live.ask(|reply| Message::Execute { new, reply }).await?;
        if !wait {
            return Ok(started.execution);
        }
        let ended = started.published.wait_for(|execution| execution.status != ExecutionStatus::Running).await;
        ended.map(|execution| execution.clone()).map_err(|_| Code::Draining.into())
    }

    /// The record of an execution of this session.
    pub async fn execution(
        &self,
        caller: &Caller,
        id: SessionId,
        execution_id: ExecutionId,
    ) -> Result<Execution, Error> {
        self.0.registry.find(caller, id).await?;
        let execution = self.0.shared.store.execution(execution_id).await.map_err(store_error)?;
        execution.filter(|execution| execution.session_id == id).ok_or_else(|| Code::ExecutionNotFound.into())
    }

    /// The output of an execution from its beginning, then live, then its exit.
    pub async fn follow_execution(
        &self,
        caller: &Caller,
        id: SessionId,
        execution_id: ExecutionId,
    ) -> Result<mpsc::Receiver<ProcessEvent>, Error> {
        let live = self.0.registry.find_live(caller, id, Request::Use).await?;
        self.execution(caller, id, execution_id).await?;
        let guest = live.guest().ok_or(Code::GuestUnreachable)?;
        guest.follow(execution_id).await.map_err(guest_error)
    }

    /// A page of a session's events after this one, oldest first, and the `after` of the next page; 0 at the end.
    pub async fn events(
        &self,
        caller: &Caller,
        id: SessionId,
        after: u64,
        page_size: u32,
    ) -> Result<(Vec<Event>, u64), Error> {
        self.0.events.page(caller, id, after, page_size).await
    }

    /// All of a session's events after this one, those to come included, until it has ended.
    pub async fn follow_events(&self, caller: &Caller, id: SessionId, after: u64) -> Result<EventFollower, Error> {
        self.0.events.follow(caller, id, after).await
    }

    /// Makes an empty volume. Returns when it can be attached.
    pub async fn create_volume(&self, caller: &Caller, new: NewVolume) -> Result<Volume, Error> {
        self.0.volumes.create(caller, new).await
    }

    /// A volume, and where it is attached.
    pub async fn volume(&self, caller: &Caller, id: VolumeId) -> Result<(Volume, Vec<(SessionId, Attachment)>), Error> {
        self.0.volumes.get(caller, id)
    }

    /// One page of volumes, newest first, each with whether it is attached anywhere, and the token of the next page.
    pub async fn list_volumes(
        &self,
        caller: &Caller,
        list: ListVolumes,
    ) -> Result<(Vec<(Volume, bool)>, String), Error> {
        self.0.volumes.list(caller, list).await
    }

    pub async fn update_volume(&self, caller: &Caller, id: VolumeId, update: VolumeUpdate) -> Result<Volume, Error> {
        self.0.volumes.update(caller, id, update).await
    }

    /// Makes a volume larger, also while it is attached for writing.
    pub async fn resize_volume(&self, caller: &Caller, id: VolumeId, size_bytes: u64) -> Result<Volume, Error> {
        self.0.volumes.resize(caller, id, size_bytes).await
    }

    /// Removes a volume that no session has.
    pub async fn delete_volume(&self, caller: &Caller, id: VolumeId) -> Result<(), Error> {
        self.0.volumes.delete(caller, id).await
    }

    /// Mounts a volume in a RUNNING session.
    pub async fn attach_volume(&self, caller: &Caller, id: SessionId, mount: NewMount) -> Result<Attachment, Error> {
        self.0.volumes.attach(caller, id, mount).await
    }

    /// Unmounts a volume; with `force` also when processes have files of it open.
    pub async fn detach_volume(
        &self,
        caller: &Caller,
        id: SessionId,
        volume_id: VolumeId,
        force: bool,
    ) -> Result<(), Error> {
        self.0.volumes.detach(caller, id, volume_id, force).await
    }

    /// Takes a snapshot of the session's disk, whether it runs or is stopped. Answered when it is recorded, or
    /// with `wait` when it is READY; a caller that goes away does not stop it.
    pub async fn create_snapshot(&self, caller: &Caller, id: SessionId, new: NewSnapshot) -> Result<Snapshot, Error> {
        self.0.snapshots.create(caller, id, new).await
    }

    pub async fn snapshot(&self, caller: &Caller, id: SnapshotId) -> Result<Snapshot, Error> {
        self.0.snapshots.get(caller, id).await
    }

    /// One page of snapshots, newest first, and the token of the next page; empty at the end.
    pub async fn list_snapshots(&self, caller: &Caller, list: ListSnapshots) -> Result<(Vec<Snapshot>, String), Error> {
        self.0.snapshots.list(caller, list).await
    }

    pub async fn update_snapshot(
        &self,
        caller: &Caller,
        id: SnapshotId,
        update: SnapshotUpdate,
    ) -> Result<Snapshot, Error> {
        self.0.snapshots.update(caller, id, update).await
    }

    /// Removes a snapshot and frees the space that only it needs. Answers with what it was.
    pub async fn delete_snapshot(&self, caller: &Caller, id: SnapshotId) -> Result<Snapshot, Error> {
        self.0.snapshots.delete(caller, id).await
    }

    /// The disk image of a READY snapshot.
    pub async fn open_snapshot(&self, caller: &Caller, id: SnapshotId) -> Result<ImageReader, Error> {
        self.0.snapshots.open(caller, id).await
    }

    /// How long snapshots stopped their sources since the last call, microseconds.
    pub fn take_source_stops(&self) -> Vec<u64> {
        self.0.snapshots.take_source_stops()
    }

    /// Makes a port reachable from outside, or changes until when it is.
    pub async fn expose_port(&self, caller: &Caller, id: SessionId, new: NewExposure) -> Result<PreviewUrl, Error> {
        self.0.previews.expose(caller, id, new).await
    }

    /// Takes a port off the outside. Named previews that led there stay, unbound. It is idempotent.
    pub async fn unexpose_port(&self, caller: &Caller, id: SessionId, port: u16) -> Result<(), Error> {
        self.0.previews.unexpose(caller, id, port).await
    }

    /// What leads to a session that has not ended, private previews aside.
    pub async fn exposed_ports(&self, caller: &Caller, id: SessionId) -> Result<Vec<PreviewUrl>, Error> {
        self.0.previews.exposed(caller, id).await
    }

    /// Makes a preview under a name of the caller's choice, which outlives sessions.
    pub async fn create_preview(&self, caller: &Caller, new: NewPreview) -> Result<PreviewUrl, Error> {
        self.0.previews.create(caller, new).await
    }

    pub async fn preview(&self, caller: &Caller, id: PreviewId) -> Result<PreviewUrl, Error> {
        self.0.previews.get(caller, id)
    }

    pub async fn preview_by_slug(&self, caller: &Caller, slug: &str) -> Result<PreviewUrl, Error> {
        self.0.previews.get_by_slug(caller, slug)
    }

    /// One page of named previews, newest first, and the token of the next page; empty at the end.
    pub async fn list_previews(&self, caller: &Caller, list: ListPreviews) -> Result<(Vec<PreviewUrl>, String), Error> {
        self.0.previews.list(caller, list).await
    }

    /// Leads a named preview to a port of a session; from elsewhere, if it led there. Visits under way are not touched.
    pub async fn bind_preview(
        &self,
        caller: &Caller,
        id: PreviewId,
        binding: Binding,
        expires_at: Option<UnixMs>,
    ) -> Result<PreviewUrl, Error> {
        self.0.previews.bind(caller, id, binding, expires_at).await
    }

    /// Lets a named preview lead nowhere. It is idempotent.
    pub async fn unbind_preview(&self, caller: &Caller, id: PreviewId) -> Result<PreviewUrl, Error> {
        self.0.previews.unbind(caller, id).await
    }

    pub async fn delete_preview(&self, caller: &Caller, id: PreviewId) -> Result<(), Error> {
        self.0.previews.delete(caller, id).await
    }

    /// Lets a visitor in who knows the preview's label, and has its viewer token if it is private. Waits until the
    /// session runs, and resumes it where visits may. While the answer lives the session is in use.
    ///
    /// - `preview_not_found`: there is no such label, or its time is over;
    /// - `preview_private`: it is private, and the token is missing, expired or for another one;
    /// - `preview_unbound`: it leads nowhere now;
    /// - `session_terminated`: the session that it led to has ended;
    /// - `inbound_disabled`: the session does not let itself be reached;
    /// - `preview_paused`: the session is stopped and not to be woken; the detail tells its state;
    /// - `session_not_running`: it is on its way from one state to another, and that takes too long;
    /// - what a resume is refused with: `quota_exceeded`, `capacity_unavailable`, `resume_failed`;
    /// - `guest_unreachable`, `draining`.
    pub async fn enter_preview(&self, label: &str, viewer_token: Option<&str>) -> Result<PreviewConnection, Error> {
        self.0.previews.enter(label, viewer_token).await
    }

    /// Opens a private preview of a port for whoever gets the token. Without `expires_at` it stays open while it is
    /// visited or touched, within the token's longest life.
    pub async fn open_preview(
        &self,
        caller: &Caller,
        id: SessionId,
        port: u16,
        expires_at: Option<UnixMs>,
    ) -> Result<OpenPreview, Error> {
        self.0.previews.open(caller, id, port, expires_at).await
    }

    /// Notes that somebody looks at a preview: its session is in use, and a private one stays open. Returns when that was.
    pub async fn touch_preview(&self, caller: &Caller, token: &str) -> Result<UnixMs, Error> {
        self.0.previews.touch(caller, token).await
    }

    /// Where the token of a preview leads: a viewer token, or the label that stands in its URL.
    pub async fn resolve_preview_token(&self, caller: &Caller, token: &str) -> Result<PreviewTarget, Error> {
        self.0.previews.resolve_token(caller, token)
    }

    /// Names the only destinations that a session reaches from now on; `None` lifts that. When it is answered,
    /// connections to what is not allowed any more are cut. A session without outbound access keeps it for its forks.
    pub async fn set_egress(&self, caller: &Caller, id: SessionId, egress: Option<Egress>) -> Result<Session, Error> {
        self.0.shared.tasks.check()?;
        let egress = egress.map(egress::checked).transpose()?;
        let live = self.0.registry.find_live(caller, id, Request::Change).await?;
        live.ask_job(|reply| Job::Restrict { egress, reply }).await
    }

    /// What is known of a live session's connections to the outside, oldest first: the last ones, while it runs.
    pub async fn connections(&self, caller: &Caller, id: SessionId) -> Result<Vec<Connection>, Error> {
        self.0.registry.find_live(caller, id, Request::Change).await?;
        self.0.shared.host.connections(id).await.map_err(egress::egress_error)
    }
}

impl EngineCore {
    /// Passes on what a driver tells.
    fn spawn_ends(self: &Arc<Self>, mut ends: mpsc::UnboundedReceiver<Ended>) -> Result<(), Error> {
        let (engine, running) = (self.clone(), self.shared.tasks.enter()?);
        tokio::spawn(async move {
            let _running = running;
            loop {
                let Ended { id, powered_off, cause } = tokio::select! {
                    biased;
                    () = engine.shared.tasks.stopping() => return,
                    Some(ended) = ends.recv() => ended,
                };
                if let Some(live) = engine.registry.live.get(id) {
                    live.set_exit(Exit { cause, powered_off, host_restarted: false });
                    live.alarm.notify_one();
                }
            }
        });
        Ok(())
    }

    /// Passes on what the host tells.
    fn spawn_events(self: &Arc<Self>, mut events: mpsc::UnboundedReceiver<HostEvent>) -> Result<(), Error> {
        let (engine, running) = (self.clone(), self.shared.tasks.enter()?);
        tokio::spawn(async move {
            let _running = running;
            loop {
                let event = tokio::select! {
                    biased;
                    () = engine.shared.tasks.stopping() => return,
                    Some(event) = events.recv() => event,
                };
                match event {
                    HostEvent::MemoryLow => engine.registry.release_longest_paused(),
                    HostEvent::Refused { id, request, limit } => {
                        if engine.registry.live.get(id).is_some() {
                            engine.events.record(id, EventKind::Refused { request, limit }, None).await;
                        }
                    }
                }
            }
        });
        Ok(())
    }

    pub(crate) fn spawn_timer(self: &Arc<Self>) -> Result<(), Error> {
        let (engine, running) = (self.clone(), self.shared.tasks.enter()?);
        tokio::spawn(async move {
            let _running = running;
            let wake = |sleeper| match sleeper {
                Sleeper::Session(id) => {
                    if let Some(live) = engine.registry.live.get(id) {
                        live.alarm.notify_one();
                    }
                }
                Sleeper::Snapshot(id) => engine.snapshots.expire(id),
                Sleeper::Preview(id) => engine.previews.expire(id),
            };
            engine.shared.deadlines.run(&*engine.shared.clock, &engine.shared.tasks, wake).await;
        });
        Ok(())
    }
}
