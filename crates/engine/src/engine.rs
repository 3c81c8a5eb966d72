//! What callers see of the engine.
//!
//! Every entry point takes the caller first; ids are looked up in one place, where unknown and
//! foreign ones become the same "not found".

use std::collections::BTreeMap;
use std::sync::Arc;

use nagaya_api::error::Error;
use nagaya_api::ids::{ExecutionId, PreviewId, SessionId, SnapshotId, VolumeId, WorkspaceId};
use tokio::sync::{mpsc, watch};

use crate::access::{Access, Caller};
use crate::config::EngineConfig;
use crate::deadlines::Deadlines;
use crate::dispatch::dispatch;
use crate::engine_core::EngineCore;
use crate::errors::store_error;
use crate::event_log::EventFollower;
use crate::explain::Finding;
use crate::model::{
    Attachment, Binding, Connection, Egress, Event, Execution, Session, Snapshot, UnixMs, Volume, Workspace,
    WorkspaceSettings,
};
use crate::open::{OpenSession, PreviewConnection, SshSession};
use crate::ports::{FreedImages, Image, ImageReader, Ports, ProcessEvent, PullWatcher};
use crate::recovery;
use crate::requests::{
    Certificate, Fork, ListPreviews, ListSessions, ListSnapshots, ListVolumes, NewExecution, NewExposure, NewMount,
    NewPreview, NewSession, NewSnapshot, NewVolume, OpenPreview, PreviewTarget, PreviewUrl, SessionUpdate,
    SnapshotUpdate, Usage, VolumeUpdate, WorkspaceSettingsUpdate,
};
use crate::shared::{Shared, certificate_key, lasting_secret};
use crate::tasks::Tasks;

/// The engine. Clones share it.
#[derive(Clone)]
pub struct Engine(Arc<EngineCore>);

impl Engine {
    /// What the operator decided.
    pub fn config(&self) -> &EngineConfig {
        &self.0.shared.config
    }

    /// Starts the engine: recovers everything recorded, then serves. The ingress is asked to publish before this returns;
    /// visitors who come so early have to wait for it.
    pub async fn start(config: EngineConfig, ports: Ports) -> Result<Self, Error> {
        let Ports { store, drivers, host, images, blobs, ingress, clock, entropy } = ports;
        let key = certificate_key(&*store, &*entropy).await?;
        let workspaces = store.workspaces().await.map_err(store_error)?;
        let keys = store.api_keys().await.map_err(store_error)?;
        let records = recovery::read(&*store).await?;
        let access = Access::new(workspaces, keys, key);
        let (deadlines, tasks) = (Deadlines::new(), Tasks::new());
        let shared = Arc::new(Shared { config, store, drivers, host, clock, entropy, access, deadlines, tasks });
        let core = Arc::new(EngineCore::new(shared, images, blobs, ingress, &records));
        let ends = core.shared.drivers.all().map(|(_, driver)| driver.ends()).collect();
        let events = core.shared.host.events();
        recovery::recover(&core, records).await?;
        dispatch(&core, ends, events)?;
        Ok(Self(core))
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

    /// Records a new session and starts to create its sandbox. Returns when the record is durable,
    /// in state CREATING; watch the session for what becomes of it.
    pub async fn create_session(&self, caller: &Caller, new: NewSession) -> Result<Session, Error> {
        self.0.sessions.create(caller, new).await
    }

    /// The images of this host that came from elsewhere, by digest. Images are the server's, not a workspace's.
    pub async fn images(&self) -> Result<Vec<Image>, Error> {
        self.0.images.list().await
    }

    /// An image of this host, by name, alias, digest, or the first twelve or more digits of one.
    pub async fn image(&self, name: &str) -> Result<Image, Error> {
        self.0.images.find(name).await
    }

    /// Fetches an image. Dropping the future ends it; what has arrived as a whole is not fetched again.
    pub async fn pull_image(&self, name: &str, watcher: PullWatcher) -> Result<Image, Error> {
        self.0.images.pull(name, watcher).await
    }

    /// Reads images from an archive: an OCI layout, or what `docker save` writes.
    pub async fn import_images(
        &self,
        archive: Box<dyn std::io::Read + Send>,
        name: Option<&str>,
    ) -> Result<Vec<Image>, Error> {
        self.0.images.import(archive, name).await
    }

    /// Takes a name of an image away, or all names of a digest, and removes what then nobody needs.
    pub async fn remove_image(&self, name: &str) -> Result<FreedImages, Error> {
        self.0.images.remove(name).await
    }

    /// Removes images without names on which no session and no snapshot stands.
    pub async fn prune_images(&self) -> Result<FreedImages, Error> {
        self.0.images.prune().await
    }

    /// Makes sessions from the disk of one that is RUNNING or stopped: all of them or none. They are
    /// answered in CREATING. Their memory is fresh: processes are not carried over.
    pub async fn fork_session(&self, caller: &Caller, id: SessionId, fork: Fork) -> Result<Vec<Session>, Error> {
        self.0.sessions.fork(caller, id, fork).await
    }

    /// The session now and whenever it changes. The channel closes after TERMINATED, or when the
    /// engine shuts down.
    pub async fn watch_session(&self, caller: &Caller, id: SessionId) -> Result<watch::Receiver<Session>, Error> {
        self.0.sessions.watch(caller, id).await
    }

    pub async fn session(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        self.0.sessions.get(caller, id).await
    }

    /// The session that is found by this name: one that has not ended, of those whose names are unique in the caller's
    /// workspace.
    pub fn session_by_name(&self, caller: &Caller, name: &str) -> Result<Session, Error> {
        self.0.sessions.by_name(caller, name)
    }

    /// One page of sessions, newest first, and the token of the next page; empty at the end.
    pub async fn list_sessions(&self, caller: &Caller, list: ListSessions) -> Result<(Vec<Session>, String), Error> {
        self.0.sessions.list(caller, list).await
    }

    pub async fn update_session(
        &self,
        caller: &Caller,
        id: SessionId,
        update: SessionUpdate,
    ) -> Result<Session, Error> {
        self.0.sessions.update(caller, id, update).await
    }

    /// Moves the session's deadline; one without deadline gets it counted from now.
    pub async fn extend_session(&self, caller: &Caller, id: SessionId, additional_ms: u64) -> Result<Session, Error> {
        self.0.sessions.extend(caller, id, additional_ms).await
    }

    /// Ends the session. Returns when it is TERMINATED; it is idempotent.
    pub async fn terminate_session(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        self.0.sessions.terminate(caller, id).await
    }

    /// Stops the session where it is: its processes and memory are kept. Returns when it is PAUSED;
    /// pausing a stopped one has no effect.
    pub async fn pause_session(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        self.0.sessions.pause(caller, id).await
    }

    /// Lets a stopped session go on. Returns when it is RUNNING; resuming one that runs has no effect.
    pub async fn resume_session(&self, caller: &Caller, id: SessionId) -> Result<Session, Error> {
        self.0.sessions.resume(caller, id).await
    }

    /// Notes that the session is in use; returns when that was.
    pub async fn report_activity(&self, caller: &Caller, id: SessionId) -> Result<UnixMs, Error> {
        self.0.sessions.report_activity(caller, id).await
    }

    /// What the caller's workspace uses now, and may use.
    pub async fn usage(&self, caller: &Caller, workspace_id: Option<WorkspaceId>) -> Result<Usage, Error> {
        self.0.sessions.usage(caller, workspace_id)
    }

    /// How many live sessions are in each state, over all workspaces.
    pub fn session_counts(&self) -> BTreeMap<&'static str, u64> {
        self.0.sessions.counts()
    }

    /// A certificate for the data plane of a RUNNING session, and the session.
    pub async fn certificate(&self, caller: &Caller, id: SessionId) -> Result<(Certificate, Session), Error> {
        self.0.sessions.certificate(caller, id).await
    }

    /// Opens a running sandbox for one call of the data plane.
    pub async fn open(&self, certificate: &str, id: SessionId) -> Result<OpenSession, Error> {
        self.0.sessions.open(certificate, id).await
    }

    /// Opens a running sandbox for a caller whose right to it is that to the session.
    pub async fn open_session(&self, caller: &Caller, id: SessionId) -> Result<OpenSession, Error> {
        self.0.sessions.open_session(caller, id).await
    }

    /// Which session a certificate opens, as far as that can be told without looking at the session:
    /// what a façade asks before it takes in a large message.
    pub fn certified_session(&self, certificate: &str) -> Result<SessionId, Error> {
        self.0.shared.access.certified(certificate, self.0.shared.clock.now())
    }

    /// Like [`Engine::open`], but does not count as activity.
    pub async fn probe(&self, certificate: &str, id: SessionId) -> Result<OpenSession, Error> {
        self.0.sessions.probe(certificate, id).await
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
        self.0.sessions.execute(caller, id, new, wait).await
    }

    /// The record of an execution of this session.
    pub async fn execution(
        &self,
        caller: &Caller,
        id: SessionId,
        execution_id: ExecutionId,
    ) -> Result<Execution, Error> {
        self.0.sessions.execution(caller, id, execution_id).await
    }

    /// The output of an execution from its beginning, then live, then its exit.
    pub async fn follow_execution(
        &self,
        caller: &Caller,
        id: SessionId,
        execution_id: ExecutionId,
    ) -> Result<mpsc::Receiver<ProcessEvent>, Error> {
        self.0.sessions.follow_execution(caller, id, execution_id).await
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

    /// Names the only destinations that a session reaches from now on; `None` lifts that. When it is answered,
    /// connections to what is not allowed any more are cut. A session without outbound access keeps it for its forks.
    pub async fn set_egress(&self, caller: &Caller, id: SessionId, egress: Option<Egress>) -> Result<Session, Error> {
        self.0.sessions.set_egress(caller, id, egress).await
    }

    /// What is known of a live session's connections to the outside, oldest first: the last ones, while it runs.
    pub async fn connections(&self, caller: &Caller, id: SessionId) -> Result<Vec<Connection>, Error> {
        self.0.sessions.connections(caller, id).await
    }

    /// Says why a session is as it is, whether it lives or has ended: the most important reason first, and always one.
    pub async fn explain(&self, caller: &Caller, id: SessionId) -> Result<Vec<Finding>, Error> {
        self.0.sessions.explain(caller, id).await
    }

    /// 32 random bytes that are made when they are first asked for, and are the same ever after.
    pub async fn lasting_secret(&self, name: &str) -> Result<[u8; 32], Error> {
        lasting_secret(&*self.0.shared.store, &*self.0.shared.entropy, name).await
    }

    /// Whether the caller may be let into this session by SSH, now or when it runs again.
    pub async fn check_visit(&self, caller: &Caller, id: SessionId) -> Result<(), Error> {
        self.0.sessions.check_visit(caller, id).await
    }

    /// Opens a session for a caller who wants to stay; one that does not run is woken where visits may.
    pub async fn visit(&self, caller: &Caller, id: SessionId) -> Result<SshSession, Error> {
        self.0.sessions.visit(caller, id).await
    }

    /// The same for somebody whose right to this very session was proved to the server by a certificate of its own.
    pub async fn visit_certified(&self, id: SessionId) -> Result<SshSession, Error> {
        self.0.sessions.visit_certified(id).await
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
}
