//! Sessions to be: fresh ones, from snapshots, and forks.

use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{DiskImageId, SessionId};
use tokio::sync::oneshot;

use super::Sessions;
use crate::access::Caller;
use crate::actor::{DiskPreparation, StartMode};
use crate::handle::{Job, SessionHandle};
use crate::images::Chosen;
use crate::model::{DiskSource, EventKind, Machine, Resources, Session, SessionState, Snapshot, SnapshotKind};
use crate::ports::Change;
use crate::requests::{Fork, NewSession};
use crate::session::Request;
use crate::{egress, validate};

impl Sessions {
    pub(crate) async fn create(&self, caller: &Caller, new: NewSession) -> Result<Session, Error> {
        let running = self.shared.tasks.enter()?;
        self.shared.access.workspace(caller, new.workspace_id)?;
        // Until the session is known, its snapshot must stay and nobody else may become sticky.
        let quiet = match new.snapshot_id.is_some() || new.sticky {
            true => Some(self.workspaces.quiet().await),
            false => None,
        };
        let snapshot = match new.snapshot_id {
            Some(id) => Some(self.snapshots.usable(caller, id).await?),
            None => None,
        };
        // Kept until the session is known.
        let image = self.image_for(&new, snapshot.as_ref()).await?;
        let mut session = self.new_session(caller, new, snapshot.as_ref(), image.as_ref())?;
        let source = self.source(&mut session, snapshot)?;
        if session.sticky {
            self.registry.check_sticky(caller.workspace_id, None)?;
        }
        let slot = self.registry.reserve(session.workspace_id, &session.machine.resources)?;
        let name = self.registry.live.claim_name(&session)?;
        self.volumes.hold_all(&session)?;
        // From here on the session's own task does everything, so that a caller who goes away
        // leaves nothing half done.
        let (reply, answer) = oneshot::channel();
        self.actors.spawn(session, Some(slot), name, StartMode::New { source, reply }, running);
        drop((quiet, image));
        answer.await.unwrap_or_else(|_| Err(Code::Draining.into()))
    }

    pub(crate) async fn fork(
        self: &Arc<Self>,
        caller: &Caller,
        id: SessionId,
        fork: Fork,
    ) -> Result<Vec<Session>, Error> {
        let sessions = self.clone();
        let max = self.shared.config.forks_max;
        if !(1..=max).contains(&fork.count) {
            return Err(Error::new(Code::InvalidArgument, format!("count must be 1 to forks_max, which is {max}")));
        }
        if let Some(name) = &fork.name {
            validate::name(name)?;
        }
        let live = self.registry.find_live(caller, id, Request::Copy).await?;
        let caller = *caller;
        self.shared.detached(async move { sessions.make_forks(&caller, live, fork).await }).await
    }

    /// What the session's disk is made from.
    fn source(&self, session: &mut Session, snapshot: Option<Snapshot>) -> Result<DiskPreparation, Error> {
        let Some(snapshot) = snapshot else { return Ok(DiskPreparation::Fresh) };
        let image = DiskImageId::new(self.shared.clock.now(), self.shared.random());
        session.source_snapshot_id = Some(snapshot.id);
        session.source_image_id = Some(image);
        if snapshot.kind != SnapshotKind::Pause {
            return Ok(DiskPreparation::Snapshot { manifest: snapshot.manifest, image });
        }
        let paused = self.registry.live.get(snapshot.session_id).ok_or(Code::SnapshotNotFound)?;
        Ok(DiskPreparation::Pause { session: paused, snapshot_id: snapshot.id, image })
    }

    /// The image of a new session, or `None` where it is its snapshot's.
    async fn image_for(&self, new: &NewSession, snapshot: Option<&Snapshot>) -> Result<Option<Chosen<'_>>, Error> {
        match (&new.image, snapshot) {
            (Some(_), Some(_)) => Err(Error::new(Code::InvalidArgument, "a snapshot brings its image with it")),
            (None, Some(_)) => Ok(None),
            (image, None) => self.images.choose(image.as_deref()).await.map(Some),
        }
    }

    /// The name of the driver that was asked for, or of the server's default.
    fn choose_driver(&self, asked: Option<String>) -> Result<String, Error> {
        let Some(name) = asked else { return Ok(self.shared.drivers.default_name().to_owned()) };
        if self.shared.drivers.find(&name).is_none() {
            let known: Vec<&str> = self.shared.drivers.names().collect();
            let detail = format!("this server has no driver {name:?}, but {}", known.join(", "));
            return Err(Error::new(Code::InvalidArgument, detail));
        }
        Ok(name)
    }

    fn new_session(
        &self,
        caller: &Caller,
        new: NewSession,
        snapshot: Option<&Snapshot>,
        image: Option<&Chosen<'_>>,
    ) -> Result<Session, Error> {
        let inherited = snapshot.map(|snapshot| &snapshot.machine);
        let env = match snapshot {
            Some(snapshot) => snapshot.env.clone().into_iter().chain(new.env).collect(),
            None => new.env,
        };
        validate::session_name(&new.name, new.name_is_unique)?;
        validate::env(&env, &self.shared.config)?;
        validate::metadata(&new.metadata, &self.shared.config)?;
        let ssh_authorized_keys = validate::ssh_authorized_keys(new.ssh_authorized_keys, &self.shared.config)?;
        if let Some(duration_ms) = new.max_duration_ms {
            validate::max_duration_ms(duration_ms, &self.shared.config)?;
        }
        let base = inherited.map_or(new.default_resources, |machine| machine.resources);
        let resources = Resources {
            cpu_millis: new.cpu_millis.unwrap_or(base.cpu_millis),
            memory_bytes: new.memory_bytes.unwrap_or(base.memory_bytes),
            disk_bytes: new.disk_bytes.unwrap_or(base.disk_bytes),
        };
        validate::resources(&resources)?;
        if inherited.is_some_and(|inherited| resources.disk_bytes < inherited.resources.disk_bytes) {
            return Err(Error::new(Code::InvalidResources, "the disk is smaller than the snapshot's"));
        }
        let egress = match new.egress {
            Some(egress) => Some(egress::checked(egress)?),
            None => inherited.and_then(|machine| machine.egress.clone()),
        };
        let of_snapshot = || inherited.map(|machine| (machine.root.clone(), machine.image.clone()));
        let chosen = image.map(|image| (image.digest.clone(), new.image.unwrap_or_default()));
        let (root, image) = chosen.or_else(of_snapshot).ok_or(Code::SnapshotNotFound)?;
        let machine = Machine { resources, root, image, outbound: new.outbound, egress };
        let driver = self.choose_driver(new.driver)?;
        let isolation = Some(self.shared.drivers.of(&driver).capabilities().isolation);
        let mut attachments = Vec::new();
        for mount in &new.mounts {
            attachments.push(self.volumes.new_attachment(mount, &attachments)?);
        }
        let now = self.shared.clock.now();
        Ok(Session {
            id: SessionId::new(now, self.shared.random()),
            workspace_id: caller.workspace_id,
            owner_id: caller.key_id,
            name: new.name,
            name_is_unique: new.name_is_unique,
            state: SessionState::Creating,
            machine,
            inbound: new.inbound,
            env,
            metadata: new.metadata,
            tags: validate::tags(new.tags)?,
            ssh_authorized_keys,
            sticky: new.sticky,
            idle_timeout_minutes: new.idle_timeout_minutes,
            pause_retention_ms: new.pause_retention_ms,
            wake_on_visit: new.wake_on_visit,
            created_at: now,
            ready_at: None,
            terminated_at: None,
            timeout_at: new.max_duration_ms.map(|duration_ms| now.saturating_add(duration_ms)),
            last_activity_at: now,
            end_reason: None,
            terminal_error: String::new(),
            exhausted: None,
            isolation,
            driver,
            source_snapshot_id: None,
            source_image_id: None,
            pause: None,
            last_resume_error: String::new(),
            last_resume: None,
            attachments,
        })
    }

    /// Copies the disk once for each fork, records all of them at once, and lets them be created.
    async fn make_forks(&self, caller: &Caller, live: Arc<SessionHandle>, fork: Fork) -> Result<Vec<Session>, Error> {
        let parent = live.published.borrow().clone();
        let forks: Vec<Session> = (1..=fork.count).map(|n| self.forked(caller, &parent, &fork, n)).collect();
        let mut slots = Vec::new();
        for session in &forks {
            slots.push(self.registry.reserve(session.workspace_id, &session.machine.resources)?);
        }
        let images: Vec<DiskImageId> = forks.iter().filter_map(|session| session.source_image_id).collect();
        let copy = |reply| Job::Copy { images: images.clone(), pause: None, reply };
        if let Err(error) = live.ask_job(copy).await {
            self.discard_images(images);
            return Err(error);
        }
        let mut recorded = Vec::new();
        for ((session, slot), image) in forks.iter().zip(slots).zip(&images) {
            let Ok(running) = self.shared.tasks.enter() else { break };
            let (sender, receiver) = oneshot::channel();
            let start = StartMode::Recorded { source: DiskPreparation::Image(*image), recorded: receiver };
            self.actors.spawn(session.clone(), Some(slot), None, start, running);
            recorded.push(sender);
        }
        if recorded.len() < forks.len() {
            self.discard_images(images);
            return Err(Code::Draining.into());
        }
        let mut changes = vec![self.events.event(live.id, EventKind::Forked { sessions: fork.count })];
        for session in &forks {
            changes.push(Change::Session(session.clone()));
            changes.push(self.events.event(session.id, EventKind::Created(DiskSource::Fork { session_id: live.id })));
        }
        if let Err(error) = self.shared.write(changes).await {
            self.discard_images(images);
            return Err(error);
        }
        live.tell_recorded();
        for sender in recorded {
            // A task that is gone was stopped with the engine; its record is there.
            let _ = sender.send(());
        }
        Ok(forks)
    }

    /// Removes images that nothing names. Those that a stopping engine leaves are swept at the next start.
    fn discard_images(&self, images: Vec<DiskImageId>) {
        let snapshots = self.snapshots.clone();
        self.shared.background(async move {
            for image in images {
                snapshots.remove_image(image).await;
            }
        });
    }

    /// The record of a fork: what its parent was made with, an identity of its own.
    fn forked(&self, caller: &Caller, parent: &Session, fork: &Fork, n: u32) -> Session {
        let now = self.shared.clock.now();
        let duration_ms = parent.timeout_at.map(|at| at.saturating_sub(parent.created_at));
        Session {
            id: SessionId::new(now, self.shared.random()),
            owner_id: caller.key_id,
            name: fork.name.clone().unwrap_or_else(|| fork_name(&parent.name, n)),
            // Several may be given the same one.
            name_is_unique: false,
            state: SessionState::Creating,
            sticky: false,
            created_at: now,
            ready_at: None,
            timeout_at: duration_ms.map(|duration_ms| now.saturating_add(duration_ms)),
            last_activity_at: now,
            source_snapshot_id: None,
            source_image_id: Some(DiskImageId::new(now, self.shared.random())),
            pause: None,
            last_resume_error: String::new(),
            last_resume: None,
            attachments: Vec::new(),
            ..parent.clone()
        }
    }
}

/// `<name>-fork-<n>`, with as much of the name as fits.
fn fork_name(name: &str, n: u32) -> String {
    let suffix = format!("-fork-{n}");
    let kept = name.floor_char_boundary(validate::NAME_BYTES_MAX - suffix.len());
    format!("{}{suffix}", &name[..kept])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_forks_fit() {
        assert_eq!(fork_name("a", 1), "a-fork-1");
        assert_eq!(fork_name("", 100), "-fork-100");
        let long = fork_name(&"長".repeat(85), 12);
        assert!((254..=256).contains(&long.len()) && validate::name(&long).is_ok(), "{long}");
        assert!(long.ends_with("長-fork-12"), "{long}");
    }
}
