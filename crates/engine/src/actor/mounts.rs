//! Volumes that come into a running session and leave it, and copies of its disk.

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{AttachmentId, DiskImageId, SnapshotId, VolumeId};

use super::work::{Done, Work, work};
use super::{Actor, Reply};
use crate::model::{Attachment, AttachmentState, EventKind};
use crate::ports::DriverError;
use crate::requests::NewMount;
use crate::session::{Request, check};

/// Who waits for an attachment.
pub(super) enum PendingMount {
    Attach(Reply<Attachment>),
    Detach(Reply<()>),
}

impl PendingMount {
    fn fail(self, error: Error) {
        match self {
            Self::Attach(reply) => drop(reply.send(Err(error))),
            Self::Detach(reply) => drop(reply.send(Err(error))),
        }
    }

    fn succeed(self, attachment: &Attachment) {
        match self {
            Self::Attach(reply) => drop(reply.send(Ok(attachment.clone()))),
            Self::Detach(reply) => drop(reply.send(Ok(()))),
        }
    }
}

impl Actor {
    pub(super) async fn attach(&mut self, mount: NewMount, reply: Reply<Attachment>) {
        match self.record_attaching(mount).await {
            Ok(id) => drop(self.asked.insert(id, PendingMount::Attach(reply))),
            Err(error) => {
                self.note_refusal("attaching a volume", &error).await;
                drop(reply.send(Err(error)));
            }
        }
        self.retry_at = None;
    }

    async fn record_attaching(&mut self, mount: NewMount) -> Result<AttachmentId, Error> {
        check(self.session.state, Request::Mount)?;
        let mut session = self.session.clone();
        let attachment = self.actors.volumes.new_attachment(&mount, &session.attachments)?;
        let (id, session_id) = (attachment.id, session.id);
        self.actors.volumes.hold(session.workspace_id, session_id, &mount)?;
        session.attachments.push(attachment);
        if let Err(error) = self.commit(session, Vec::new()).await {
            self.actors.volumes.release(mount.volume_id, session_id);
            return Err(error);
        }
        Ok(id)
    }

    pub(super) async fn detach(&mut self, volume_id: VolumeId, force: bool, reply: Reply<()>) {
        match self.record_detaching(volume_id).await {
            Ok(id) => {
                self.asked.insert(id, PendingMount::Detach(reply));
                if force {
                    self.forced.insert(id);
                }
            }
            Err(error) => drop(reply.send(Err(error))),
        }
        self.retry_at = None;
    }

    async fn record_detaching(&mut self, volume_id: VolumeId) -> Result<AttachmentId, Error> {
        check(self.session.state, Request::Mount)?;
        let mut session = self.session.clone();
        let attachment = session.attachments.iter_mut().find(|of| of.volume_id == volume_id);
        let Some(attachment) = attachment else {
            return Err(Error::new(Code::VolumeNotFound, "it is not attached here"));
        };
        let id = attachment.id;
        if attachment.state != AttachmentState::SyncPending {
            attachment.state = AttachmentState::SyncPending;
            self.commit(session, Vec::new()).await?;
        }
        Ok(id)
    }

    pub(super) fn has_unsettled_mounts(&self) -> bool {
        self.session.attachments.iter().any(|of| of.state != AttachmentState::Attached)
    }

    /// Mounts what is Attaching and unmounts what is SyncPending.
    pub(super) fn settle_mounts(&self) -> Work {
        let (actors, session) = (self.actors.clone(), self.session.clone());
        let unsettled = self.session.attachments.iter().filter(|of| of.state != AttachmentState::Attached);
        let unsettled: Vec<_> = unsettled.map(|of| (of.clone(), self.forced.contains(&of.id))).collect();
        work(async move {
            let mut results = Vec::new();
            for (attachment, force) in unsettled {
                let result = match attachment.state {
                    AttachmentState::SyncPending => actors.volumes.unmount(&session, &attachment, force).await,
                    _ => actors.volumes.mount(&session, &attachment).await,
                };
                results.push((attachment.id, result));
            }
            Done::Mounts(results)
        })
    }

    pub(super) async fn mounts_done(&mut self, results: Vec<(AttachmentId, Result<(), DriverError>)>) {
        let mut session = self.session.clone();
        let mut failures = Vec::new();
        let mut gone = Vec::new();
        let mut facts = Vec::new();
        let mut stuck = false;
        for (id, result) in results {
            let Some(at) = session.attachments.iter().position(|of| of.id == id) else { continue };
            let attachment = &mut session.attachments[at];
            match (attachment.state, result) {
                (AttachmentState::SyncPending, Ok(())) => {
                    facts.push(detached(attachment));
                    gone.push(session.attachments.remove(at));
                }
                (AttachmentState::SyncPending, Err(DriverError::Busy)) => {
                    attachment.state = AttachmentState::Attached;
                    failures.push((id, mount_error(DriverError::Busy)));
                }
                (AttachmentState::SyncPending, Err(error)) => {
                    stuck = true;
                    failures.push((id, mount_error(error)));
                }
                (_, Ok(())) => {
                    attachment.state = AttachmentState::Attached;
                    facts.push(attached(attachment));
                }
                (_, Err(DriverError::Refused(reason))) => {
                    gone.push(session.attachments.remove(at));
                    failures.push((id, mount_error(DriverError::Refused(reason))));
                }
                (_, Err(error)) => {
                    // It may be half there: take it away again.
                    attachment.state = AttachmentState::SyncPending;
                    self.forced.insert(id);
                    failures.push((id, mount_error(error)));
                }
            }
        }
        if session != self.session && self.commit_with(session, facts).await.is_err() {
            // All of it can be repeated, and who asked goes on waiting.
            return self.try_later();
        }
        if stuck {
            self.try_later();
        }
        self.tell_mounts(failures, gone);
    }

    fn tell_mounts(&mut self, failures: Vec<(AttachmentId, Error)>, gone: Vec<Attachment>) {
        for (id, error) in failures {
            if let Some(asked) = self.asked.remove(&id) {
                asked.fail(error);
            }
        }
        for attachment in gone {
            self.forced.remove(&attachment.id);
            self.actors.volumes.release(attachment.volume_id, self.session.id);
            if let Some(asked) = self.asked.remove(&attachment.id) {
                asked.succeed(&attachment);
            }
        }
        let attached = self.session.attachments.iter().filter(|of| of.state == AttachmentState::Attached);
        for attachment in attached {
            self.forced.remove(&attachment.id);
            if let Some(asked) = self.asked.remove(&attachment.id) {
                asked.succeed(attachment);
            }
        }
    }

    /// The sandbox is gone: volumes on their way into it are not to come back with it.
    pub(super) fn mark_given_up(&self, attachments: &mut [Attachment]) {
        let wanted = |of: &&mut Attachment| matches!(self.asked.get(&of.id), Some(PendingMount::Attach(_)));
        attachments.iter_mut().filter(wanted).for_each(|of| of.state = AttachmentState::SyncPending);
    }

    /// Tells those who asked for them.
    pub(super) fn give_up_attaching(&mut self) {
        for (_, asked) in self.asked.extract_if(.., |_, asked| matches!(asked, PendingMount::Attach(_))) {
            asked.fail(Error::new(Code::SessionNotRunning, "the sandbox ended"));
        }
    }

    /// The sandbox is stopped, so what was to be unmounted is.
    pub(super) async fn drop_detached(&mut self) {
        let mut session = self.session.clone();
        let pending = |of: &mut Attachment| of.state == AttachmentState::SyncPending;
        let gone: Vec<Attachment> = session.attachments.extract_if(.., pending).collect();
        if gone.is_empty() {
            return;
        }
        if self.commit_with(session, gone.iter().map(detached).collect()).await.is_err() {
            self.stop_owed = true;
            return self.try_later();
        }
        self.tell_mounts(Vec::new(), gone);
    }

    /// Copies the disk, whether the sandbox runs or is stopped.
    pub(super) fn copy(&mut self, images: Vec<DiskImageId>, pause: Option<SnapshotId>, reply: Reply<u64>) {
        let other_pause = pause.is_some() && self.session.pause.as_ref().map(|of| of.snapshot_id) != pause;
        let refusal = match check(self.session.state, Request::Copy) {
            Err(error) => Some(error),
            Ok(()) if other_pause => Some(Code::SnapshotNotFound.into()),
            Ok(()) => None,
        };
        if let Some(refusal) = refusal {
            let _ = reply.send(Err(refusal));
            return;
        }
        let (shared, id) = (self.shared.clone(), self.session.id);
        self.work = Some(work(async move {
            let result = shared.host.copy_disk(id, &images).await;
            Done::Copied { result, reply }
        }));
    }
}

pub(super) fn attached(of: &Attachment) -> EventKind {
    EventKind::VolumeAttached { volume_id: of.volume_id, path: of.mount_path.clone() }
}

fn detached(of: &Attachment) -> EventKind {
    EventKind::VolumeDetached { volume_id: of.volume_id, path: of.mount_path.clone() }
}

/// Why a volume could not be mounted or unmounted, in the words of the table.
fn mount_error(error: DriverError) -> Error {
    match error {
        DriverError::Busy => Code::VolumeBusy.into(),
        DriverError::Refused(reason) => Error::new(Code::PathRefused, reason),
        DriverError::Exhausted(limit) => Error::new(Code::CapacityUnavailable, limit.name()),
        DriverError::Gone => Code::GuestUnreachable.into(),
        error => Error::new(Code::VolumeFailed, error.to_string()),
    }
}
