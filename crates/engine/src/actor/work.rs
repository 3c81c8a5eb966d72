//! What the driver does for a session: futures that touch the world and nothing of the session's task.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{AttachmentId, DiskImageId, SnapshotId};

use super::{Actor, Actors};
use crate::handle::{Exit, Job, Reply, SessionHandle};
use crate::model::{AttachmentState, DiskOrigin, Egress, Execution, Limit, SandboxSpec, Session, SessionState};
use crate::ports::{Adopted, BlobError, BoxFuture, DriverError, Guest};
use crate::shared::Shared;

pub(super) struct Work {
    pub(super) future: BoxFuture<Done>,
    /// Whether the driver is at something that must not be dropped half-way.
    pub(super) begun: Arc<AtomicBool>,
}

pub(super) enum Done {
    Created(Result<Arc<dyn Guest>, StartFailure>),
    Adopted(Result<(Adopted, Vec<Execution>), AdoptError>),
    Frozen {
        result: Result<(), DriverError>,
        reply: Option<Reply<Session>>,
    },
    Thawed {
        result: Result<(), DriverError>,
        reply: Reply<Session>,
    },
    Booted {
        result: Result<Arc<dyn Guest>, StartFailure>,
        reply: Option<Reply<Session>>,
    },
    /// A pause or resume that failed has been taken back.
    Undone,
    Probed {
        exit: Exit,
        result: Result<(), DriverError>,
    },
    Stopped(Result<(), DriverError>),
    Copied {
        result: Result<u64, DriverError>,
        reply: Reply<u64>,
    },
    Mounts(Vec<(AttachmentId, Result<(), DriverError>)>),
    Restricted {
        result: Result<(), DriverError>,
        /// What held before.
        before: Option<Egress>,
        reply: Reply<Session>,
    },
}

pub(super) enum AdoptError {
    Gone,
    Other(String),
}

/// Why a sandbox did not come up.
#[derive(Debug)]
pub(super) enum StartFailure {
    NoCapacity(Limit),
    /// With a code of its own.
    Refused(Error),
    /// In words for the user.
    Other(String),
}

impl StartFailure {
    /// What whoever asked for a resume is told.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Refused(error) => error,
            cause => Error::new(Code::ResumeFailed, cause.to_string()),
        }
    }

    /// What the driver's errors mean wherever it starts a sandbox; `None` for those that depend on where.
    fn of(error: &DriverError) -> Option<Self> {
        match error {
            DriverError::Exhausted(limit) => Some(Self::NoCapacity(*limit)),
            DriverError::OtherRoot { .. } => Some(Self::Refused(Error::new(Code::RootMismatch, error.to_string()))),
            _ => None,
        }
    }
}

impl std::fmt::Display for StartFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoCapacity(limit) => write!(f, "{}", Error::new(Code::CapacityUnavailable, limit.name())),
            Self::Refused(error) => f.write_str(&error.coded_text()),
            Self::Other(cause) => f.write_str(cause),
        }
    }
}

/// What a new sandbox's disk starts with.
pub(crate) enum DiskPreparation {
    Fresh,
    Image(DiskImageId),
    /// A stored snapshot, to be restored to the image.
    Snapshot {
        manifest: String,
        image: DiskImageId,
    },
    /// The disk of a paused session, to be copied to the image.
    Pause {
        session: Arc<SessionHandle>,
        snapshot_id: SnapshotId,
        image: DiskImageId,
    },
}

/// Completes with the work; never while there is none.
pub(super) async fn next_done(work: &mut Option<Work>) -> Done {
    let Some(running) = work else { return std::future::pending().await };
    let done = running.future.as_mut().await;
    *work = None;
    done
}

/// Work that is waited for, once begun, whatever happens.
pub(super) fn work(future: impl Future<Output = Done> + Send + 'static) -> Work {
    Work { future: Box::pin(future), begun: Arc::new(AtomicBool::new(true)) }
}

/// Comes back with the same after a pause; may be dropped.
pub(super) fn later(shared: &Shared, pause_ms: u64, done: Done) -> Work {
    let wake = shared.clock.sleep_until(shared.clock.now() + pause_ms);
    let future = Box::pin(async move {
        wake.await;
        done
    });
    Work { future, begun: Arc::new(AtomicBool::new(false)) }
}

impl Actor {
    pub(super) fn create(&self, source: DiskPreparation) -> Work {
        let begun = Arc::new(AtomicBool::new(false));
        let (actors, session, begun_too) = (self.actors.clone(), self.session.clone(), begun.clone());
        let future = Box::pin(async move {
            // Fetching an image may take long: others are created meanwhile, and an end does not wait for it.
            if let Err(error) = actors.images.provide(&session.machine).await {
                return Done::Created(Err(StartFailure::Refused(error)));
            }
            let _permit = actors.creates.acquire().await.expect("the semaphore is never closed");
            begun_too.store(true, Ordering::Release);
            Done::Created(create(&actors, &session, source).await)
        });
        Work { future, begun }
    }

    /// Looks for a sandbox from before the start, and brings it to where its record says it is. Until
    /// it is moved, this may be dropped at any point: destroying copes with whatever there is.
    pub(super) fn adopt(&self, pause_ms: u64) -> Work {
        let begun = Arc::new(AtomicBool::new(false));
        let (shared, session, begun_too) = (self.shared.clone(), self.session.clone(), begun.clone());
        let future = Box::pin(async move {
            shared.clock.sleep_until(shared.clock.now() + pause_ms).await;
            Done::Adopted(adopt(&shared, &session, &begun_too).await)
        });
        Work { future, begun }
    }

    /// Starts the sandbox on its disk, and mounts its volumes. What is left when that fails is to be stopped.
    pub(super) fn boot(&self, reply: Option<Reply<Session>>) -> Work {
        let (actors, session, stop_first) = (self.actors.clone(), self.session.clone(), self.stop_owed);
        work(async move {
            let result = boot(&actors, &session, stop_first).await;
            Done::Booted { result, reply }
        })
    }

    /// Mounts what a sandbox that is up already has not mounted yet.
    pub(super) fn finish_boot(&self, guest: Arc<dyn Guest>) -> Work {
        let (actors, session) = (self.actors.clone(), self.session.clone());
        work(async move {
            let result = attach_all(&actors, &session).await.map(|()| guest);
            Done::Booted { result, reply: None }
        })
    }

    /// Ends all processes, and waits until nothing uses the volumes any more.
    pub(super) fn stop(&self) -> Work {
        let (actors, session) = (self.actors.clone(), self.session.clone());
        work(async move {
            let mut result = actors.shared.driver_of(&session).stop(session.id).await;
            for attachment in &session.attachments {
                if result.is_ok() {
                    result = actors.volumes.settle(attachment).await;
                }
            }
            Done::Stopped(result)
        })
    }

    /// Freezes or thaws, until that succeeds or there is nothing left to move.
    pub(super) fn undo(&self, freeze: bool) -> Work {
        let begun = Arc::new(AtomicBool::new(true));
        let (shared, id, begun_too) = (self.shared.clone(), self.session.id, begun.clone());
        let driver = shared.driver_of(&self.session);
        let future = Box::pin(async move {
            let mut backoff = shared.backoff();
            loop {
                let result = match freeze {
                    true => driver.freeze(id).await,
                    false => driver.thaw(id).await,
                };
                match result {
                    Ok(()) | Err(DriverError::Gone) => return Done::Undone,
                    Err(error) => tracing::warn!(session = %id, %error, "a failed move is still to be taken back"),
                }
                begun_too.store(false, Ordering::Release);
                shared.clock.sleep_until(shared.clock.now() + backoff.next_ms()).await;
                begun_too.store(true, Ordering::Release);
            }
        });
        Work { future, begun }
    }
}

async fn create(
    actors: &Arc<Actors>,
    session: &Session,
    source: DiskPreparation,
) -> Result<Arc<dyn Guest>, StartFailure> {
    let disk = match source {
        DiskPreparation::Fresh => DiskOrigin::Fresh,
        DiskPreparation::Image(image) => DiskOrigin::Image(image),
        DiskPreparation::Snapshot { manifest, image } => {
            let path = actors.shared.host.prepare_image(image).await.map_err(creation_failure)?;
            actors.snapshots.restore(&manifest, &path).await.map_err(restore_failure)?;
            DiskOrigin::Image(image)
        }
        DiskPreparation::Pause { session, snapshot_id, image } => {
            let pause = Some(snapshot_id);
            let copied = session.ask_job(|reply| Job::Copy { images: vec![image], pause, reply }).await;
            copied.map_err(|error| {
                StartFailure::Other(format!("the paused session's disk could not be copied: {error}"))
            })?;
            DiskOrigin::Image(image)
        }
    };
    let spec = spec(actors, session, disk).await.map_err(root_failure(session))?;
    let guest = actors.shared.driver_of(session).start(session.id, &spec).await.map_err(creation_failure)?;
    attach_all(actors, session).await?;
    Ok(guest)
}

/// What the driver is told to start a session's sandbox.
async fn spec(actors: &Actors, session: &Session, disk: DiskOrigin) -> Result<SandboxSpec, DriverError> {
    let machine = &session.machine;
    Ok(SandboxSpec {
        resources: machine.resources,
        root: actors.images.root(&machine.root).await?,
        disk,
        memory: None,
        outbound: machine.outbound,
        egress: machine.egress.clone(),
    })
}

/// Why there is no root file system to start on.
fn root_failure(session: &Session) -> impl Fn(DriverError) -> StartFailure {
    let root = &session.machine.root;
    move |error| match error {
        DriverError::Gone => StartFailure::Refused(Error::new(Code::RootUnavailable, root.to_string())),
        error => StartFailure::Other(format!("the root file system {root} could not be opened: {error}")),
    }
}

fn creation_failure(error: DriverError) -> StartFailure {
    StartFailure::of(&error).unwrap_or_else(|| match error {
        DriverError::Gone => StartFailure::Other("the sandbox ended while it was being created".to_owned()),
        error => StartFailure::Other(format!("the sandbox could not be created: {error}")),
    })
}

fn restore_failure(error: BlobError) -> StartFailure {
    match error {
        BlobError::Exhausted(limit) => StartFailure::NoCapacity(limit),
        error => StartFailure::Other(format!("the snapshot could not be restored: {error}")),
    }
}

async fn adopt(
    shared: &Shared,
    session: &Session,
    begun: &AtomicBool,
) -> Result<(Adopted, Vec<Execution>), AdoptError> {
    let (id, driver) = (session.id, shared.driver_of(session));
    let other = |error: DriverError| AdoptError::Other(error.to_string());
    let adopted = match driver.adopt(id).await {
        Ok(adopted) => adopted,
        Err(DriverError::Gone) => return Err(AdoptError::Gone),
        Err(error) => return Err(other(error)),
    };
    if matches!(adopted, Adopted::Running(_) | Adopted::Frozen(_)) && session.machine.outbound {
        // The server may have been killed between recording destinations and setting them.
        shared.host.set_egress(id, session.machine.egress.as_ref()).await.map_err(other)?;
    }
    let executions = shared.store.executions(id).await.map_err(|error| AdoptError::Other(error.to_string()))?;
    let runs = matches!(session.state, SessionState::Running | SessionState::Pausing | SessionState::Resuming);
    let in_memory = session.pause.as_ref().is_some_and(|pause| pause.in_memory);
    begun.store(true, Ordering::Release);
    let settled = match adopted {
        Adopted::Frozen(guest) if runs => {
            driver.thaw(id).await.map_err(other)?;
            Adopted::Running(guest)
        }
        Adopted::Running(guest) if !runs && in_memory => {
            driver.freeze(id).await.map_err(other)?;
            Adopted::Frozen(guest)
        }
        // The server was killed before it had given up the memory.
        Adopted::Running(_) | Adopted::Frozen(_) if !runs && !in_memory => {
            Adopted::Stopped { powered_off: false, host_restarted: false }
        }
        other => other,
    };
    Ok((settled, executions))
}

async fn boot(actors: &Actors, session: &Session, stop_first: bool) -> Result<Arc<dyn Guest>, StartFailure> {
    if stop_first {
        actors.shared.driver_of(session).stop(session.id).await.map_err(boot_failure)?;
        for attachment in &session.attachments {
            actors.volumes.settle(attachment).await.map_err(boot_failure)?;
        }
    }
    let spec = spec(actors, session, DiskOrigin::Kept).await.map_err(root_failure(session))?;
    let guest = actors.shared.driver_of(session).start(session.id, &spec).await.map_err(boot_failure)?;
    attach_all(actors, session).await?;
    Ok(guest)
}

fn boot_failure(error: DriverError) -> StartFailure {
    StartFailure::of(&error).unwrap_or_else(|| match error {
        DriverError::Gone => StartFailure::Other("the sandbox ended while it was being started".to_owned()),
        error => StartFailure::Other(format!("the sandbox could not be started: {error}")),
    })
}

/// Mounts every volume of a sandbox that just came up.
async fn attach_all(actors: &Actors, session: &Session) -> Result<(), StartFailure> {
    for attachment in session.attachments.iter().filter(|of| of.state != AttachmentState::SyncPending) {
        actors.volumes.mount(session, attachment).await.map_err(|error| match error {
            DriverError::Exhausted(limit) => StartFailure::NoCapacity(limit),
            error => StartFailure::Other(format!("volume {} could not be mounted: {error}", attachment.volume_id)),
        })?;
    }
    Ok(())
}

/// Why a disk could not be copied, in the words of the table.
pub(super) fn copy_error(error: DriverError) -> Error {
    match error {
        DriverError::Exhausted(limit) => Error::new(Code::CapacityUnavailable, limit.name()),
        error => Error::new(Code::SnapshotFailed, format!("the disk could not be copied: {error}")),
    }
}
