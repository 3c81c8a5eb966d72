//! Clients who stop sessions and let them go on, and keep what is in them: in snapshots, volumes and forks.

use std::time::Duration;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{SessionId, SnapshotId, VolumeId};
use nagaya_engine::fake::Rng;
use nagaya_engine::model::{AttachmentState, SessionState, SnapshotState};
use nagaya_engine::ports::{Guest, WriteOptions};
use nagaya_engine::{Engine, Fork, NewMount, NewSession, NewSnapshot, NewVolume};

use crate::clients::{Failure, Outcome, UNUSABLE, allow, must};
use crate::model::{Log, Place};
use crate::world::World;

const MIB: u64 = 1 << 20;
/// Where logs are on disks. On volumes, which are mounted at `/data`, they are named after them.
pub const DISK_LOG: &str = "/root/log";

#[derive(Debug, Clone)]
pub enum Keeping {
    Pause(SessionId, usize),
    Resume(SessionId, usize),
    /// Adds a record to the log on the disk or on the volume.
    Write(SessionId, usize, bool),
    Snapshot(SessionId, usize, bool),
    DeleteSnapshot(SnapshotId, usize),
    CreateFrom(SnapshotId, usize, Option<VolumeId>),
    CreateFromPause(SessionId, usize),
    Fork(SessionId, usize, u32),
    CreateVolume(usize),
    Grow(VolumeId, usize, u64),
    DeleteVolume(VolumeId, usize),
    Attach(SessionId, usize, VolumeId, bool),
    Detach(SessionId, usize, VolumeId, bool),
}

impl Keeping {
    pub fn choose(world: &World, rng: &mut Rng, id: SessionId, tenant: usize) -> Self {
        let model = world.model.borrow();
        let mut pick = |places: Vec<Place>| {
            let mine: Vec<Place> = places.into_iter().filter(|place| model.tenant_of(*place) == tenant).collect();
            let tail = rng.below(4) as usize;
            mine.iter().rev().nth(tail).or(mine.last()).copied()
        };
        let snapshot = pick(model.snapshots());
        let volume = pick(model.volumes());
        match (rng.below(100), snapshot, volume) {
            (0..16, ..) => Self::Pause(id, tenant),
            (16..32, ..) => Self::Resume(id, tenant),
            (32..52, ..) => Self::Write(id, tenant, rng.per_mille(400)),
            (52..60, ..) => Self::Snapshot(id, tenant, rng.per_mille(700)),
            (60..63, Some(Place::Snapshot(snapshot)), _) => Self::DeleteSnapshot(snapshot, tenant),
            (63..69, Some(Place::Snapshot(snapshot)), volume) => {
                let volume = volume.filter(|_| rng.per_mille(300)).and_then(Place::volume);
                Self::CreateFrom(snapshot, tenant, volume)
            }
            (69..71, ..) => Self::CreateFromPause(id, tenant),
            (71..75, ..) => Self::Fork(id, tenant, 1 + rng.below(2) as u32),
            (75..79, ..) => Self::CreateVolume(tenant),
            (79..82, _, Some(Place::Volume(volume))) => Self::Grow(volume, tenant, (1 + rng.below(4)) * MIB),
            (82..84, _, Some(Place::Volume(volume))) => Self::DeleteVolume(volume, tenant),
            (84..93, _, Some(Place::Volume(volume))) => Self::Attach(id, tenant, volume, rng.per_mille(300)),
            (93..100, _, Some(Place::Volume(volume))) => Self::Detach(id, tenant, volume, rng.per_mille(300)),
            _ => Self::CreateVolume(tenant),
        }
    }
}

pub async fn keep(world: &World, engine: &Engine, keeping: Keeping) -> Outcome {
    match keeping {
        Keeping::Pause(id, tenant) => pause(world, engine, id, tenant).await,
        Keeping::Resume(id, tenant) => resume(world, engine, id, tenant).await,
        Keeping::Write(id, tenant, on_volume) => write(world, engine, id, tenant, on_volume).await,
        Keeping::Snapshot(id, tenant, wait) => snapshot(world, engine, id, tenant, wait).await,
        Keeping::DeleteSnapshot(id, tenant) => delete_snapshot(world, engine, id, tenant).await,
        Keeping::CreateFrom(id, tenant, volume) => {
            let log = world.model.borrow().log(Place::Snapshot(id));
            create_from(world, engine, id, tenant, volume, log).await
        }
        Keeping::CreateFromPause(id, tenant) => {
            let session = engine.session(&world.tenants[tenant], id).await?;
            let Some(pause) = session.pause else { return Ok(()) };
            let log = world.model.borrow().log(Place::Disk(id));
            create_from(world, engine, pause.snapshot_id, tenant, None, log).await
        }
        Keeping::Fork(id, tenant, count) => fork(world, engine, id, tenant, count).await,
        Keeping::CreateVolume(tenant) => create_volume(world, engine, tenant).await,
        Keeping::Grow(id, tenant, size) => grow(world, engine, id, tenant, size).await,
        Keeping::DeleteVolume(id, tenant) => delete_volume(world, engine, id, tenant).await,
        Keeping::Attach(id, tenant, volume, readonly) => attach(world, engine, id, tenant, volume, readonly).await,
        Keeping::Detach(id, tenant, volume, force) => {
            let answer = engine.detach_volume(&world.tenants[tenant], id, volume, force).await;
            let codes = [Code::VolumeNotFound, Code::VolumeBusy];
            allow_failing(world, answer, &codes, &[Code::VolumeFailed])
        }
    }
}

/// Takes some refusals for granted, and others while steps may fail; also all of a session that cannot be used.
fn allow_failing(world: &World, answer: Result<(), Error>, always: &[Code], failing: &[Code]) -> Outcome {
    // The host's disk may be full at any time.
    let mut codes = [always, &UNUSABLE, &[Code::CapacityUnavailable]].concat();
    if world.failures_possible.get() {
        codes.extend_from_slice(failing);
    }
    allow(answer, &codes)
}

async fn pause(world: &World, engine: &Engine, id: SessionId, tenant: usize) -> Outcome {
    let before = world.model.borrow().resumes(id);
    match engine.pause_session(&world.tenants[tenant], id).await {
        Ok(session) => {
            let stopped = matches!(session.state, SessionState::Paused | SessionState::UserShutdown);
            must!(stopped && session.pause.is_some(), "pause answered {}", session.state.name());
            world.model.borrow_mut().acknowledge_pause(id, before);
            Ok(())
        }
        // Its sandbox may die in the middle, whether or not steps fail.
        Err(error) => allow_failing(world, Err(error), &[Code::PauseFailed], &[]),
    }
}

async fn resume(world: &World, engine: &Engine, id: SessionId, tenant: usize) -> Outcome {
    world.model.borrow_mut().begin_resume(id);
    let answer = engine.resume_session(&world.tenants[tenant], id).await;
    world.model.borrow_mut().end_resume(id);
    match answer {
        Ok(session) => {
            must!(session.state == SessionState::Running, "resume answered {}", session.state.name());
            must!(session.pause.is_none() && session.last_resume_error.is_empty(), "a resumed session is {session:?}");
            Ok(())
        }
        // The driver may have no room, and sandboxes die.
        Err(error) => allow_failing(world, Err(error), &[Code::ResumeFailed], &[]),
    }
}

/// Adds a record to a log as a client of the data plane would. It counts once it was acknowledged.
async fn write(world: &World, engine: &Engine, id: SessionId, tenant: usize, on_volume: bool) -> Outcome {
    let known = world.model.borrow().certificates.get(&id).cloned();
    let certificate = match known {
        Some(certificate) => certificate,
        None => match engine.certificate(&world.tenants[tenant], id).await {
            Ok((certificate, _)) => certificate.text,
            Err(error) => return allow(Err(error), &UNUSABLE),
        },
    };
    world.model.borrow_mut().certificates.insert(id, certificate.clone());
    let open = match engine.open(&certificate, id).await {
        Ok(open) => open,
        Err(error) if error.code == Code::InvalidCertificate => {
            world.model.borrow_mut().certificates.remove(&id);
            return Ok(());
        }
        Err(error) => return allow(Err(error), &UNUSABLE),
    };
    let place = match on_volume {
        false => Some(Place::Disk(id)),
        true => writable_volume(world, id).map(Place::Volume),
    };
    let Some(place) = place else { return Ok(()) };
    if !world.model.borrow_mut().writing.insert(place) {
        return Ok(());
    }
    let path = match place {
        Place::Volume(volume) => format!("/data/{volume}"),
        _ => DISK_LOG.to_owned(),
    };
    // A frozen sandbox does not answer; what becomes of the record is then not known.
    let written = tokio::time::timeout(Duration::from_secs(2), append(&*open.guest, &path)).await;
    let mut model = world.model.borrow_mut();
    model.writing.remove(&place);
    // A volume may have been taken away meanwhile: then the record is on the disk below, and nobody's concern.
    let still_there = place == Place::Disk(id) || writable_volume(world, id).map(Place::Volume) == Some(place);
    if let Ok(Some(content)) = written
        && still_there
    {
        model.acknowledge_log(place, content);
    }
    Ok(())
}

/// The volume that a session can write to now.
fn writable_volume(world: &World, id: SessionId) -> Option<VolumeId> {
    let session = world.fakes.store.all_sessions().into_iter().find(|of| of.id == id)?;
    let mut attached = session.attachments.iter().filter(|of| !of.readonly && of.state == AttachmentState::Attached);
    attached.next().map(|of| of.volume_id)
}

/// Returns the log with the new record, once that is written.
async fn append(guest: &dyn Guest, path: &str) -> Option<String> {
    let mut content = Vec::new();
    if let Ok(mut reader) = guest.read_file(path, 0, 0, 0).await {
        while let Some(chunk) = reader.chunks.recv().await {
            content.extend_from_slice(&chunk.ok()?);
        }
    }
    let mut content = String::from_utf8(content).ok()?;
    content.push_str(&format!("{};", content.len()));
    let options = WriteOptions { mode: 0, truncate: true, sync: true };
    let writer = guest.write_file(path, options).await.ok()?;
    writer.chunks.send(content.clone().into()).await.ok()?;
    writer.finish().await.ok()?;
    Some(content)
}

async fn snapshot(world: &World, engine: &Engine, id: SessionId, tenant: usize, wait: bool) -> Outcome {
    // What was acknowledged before is in it.
    let log = world.model.borrow().log(Place::Disk(id));
    let new = NewSnapshot { wait, ..NewSnapshot::default() };
    match engine.create_snapshot(&world.tenants[tenant], id, new).await {
        Ok(snapshot) => {
            let expected = if wait { SnapshotState::Ready } else { SnapshotState::Creating };
            must!(snapshot.state == expected, "a snapshot was answered {:?}", snapshot.state);
            let log = Log { tenant, content: log, ready: wait };
            world.model.borrow_mut().logs.insert(Place::Snapshot(snapshot.id), log);
            Ok(())
        }
        Err(error) => allow_failing(world, Err(error), &[], &[Code::SnapshotFailed]),
    }
}

async fn delete_snapshot(world: &World, engine: &Engine, id: SnapshotId, tenant: usize) -> Outcome {
    world.model.borrow_mut().doomed.insert(Place::Snapshot(id));
    match engine.delete_snapshot(&world.tenants[tenant], id).await {
        Ok(_) => {
            let gone = !world.fakes.store.snapshots_now().iter().any(|of| of.id == id);
            // Another deletion of the same may be the one that finishes it.
            must!(gone || world.failures_possible.get(), "a deleted snapshot is still recorded");
            let sessions = world.fakes.store.all_sessions();
            let user = sessions.iter().find(|of| of.source_snapshot_id == Some(id) && !of.state.is_terminal());
            must!(user.is_none(), "a snapshot was deleted that {user:?} was made from");
            Ok(())
        }
        Err(error) => allow(Err(error), &[Code::SnapshotNotFound, Code::SnapshotInUse, Code::SnapshotFailed]),
    }
}

async fn create_from(
    world: &World,
    engine: &Engine,
    id: SnapshotId,
    tenant: usize,
    volume: Option<VolumeId>,
    log: String,
) -> Outcome {
    let mounts = volume.map(mount).into_iter().collect();
    let new = NewSession { name: "from".into(), snapshot_id: Some(id), mounts, inbound: true, ..NewSession::default() };
    let session = match engine.create_session(&world.tenants[tenant], new).await {
        Ok(session) => session,
        Err(error) => {
            let codes = [
                Code::QuotaExceeded,
                Code::CapacityUnavailable,
                Code::SnapshotNotFound,
                Code::SnapshotNotReady,
                Code::VolumeNotFound,
                Code::VolumeInUse,
                Code::VolumeSyncPending,
            ];
            return allow(Err(error), &codes);
        }
    };
    must!(session.source_snapshot_id == Some(id), "a session is not from the snapshot it was asked to be from");
    let mut model = world.model.borrow_mut();
    model.created.insert(session.id, tenant);
    model.names.insert(session.id, vec![session.name]);
    model.logs.insert(Place::Disk(session.id), Log { tenant, content: log, ready: false });
    Ok(())
}

fn mount(volume_id: VolumeId) -> NewMount {
    NewMount { volume_id, path: "/data".into(), readonly: false }
}

async fn fork(world: &World, engine: &Engine, id: SessionId, tenant: usize, count: u32) -> Outcome {
    let log = world.model.borrow().log(Place::Disk(id));
    match engine.fork_session(&world.tenants[tenant], id, Fork { count, name: None }).await {
        Ok(forks) => {
            must!(forks.len() == count as usize, "{count} forks were asked for, {} made", forks.len());
            let mut model = world.model.borrow_mut();
            for fork in forks {
                model.created.insert(fork.id, tenant);
                model.names.insert(fork.id, vec![fork.name]);
                let log = Log { tenant, content: log.clone(), ready: false };
                model.logs.insert(Place::Disk(fork.id), log);
            }
            Ok(())
        }
        Err(error) => allow_failing(world, Err(error), &[], &[Code::SnapshotFailed]),
    }
}

async fn create_volume(world: &World, engine: &Engine, tenant: usize) -> Outcome {
    let new = NewVolume { name: "v".into(), size_bytes: MIB, workspace_id: None };
    match engine.create_volume(&world.tenants[tenant], new).await {
        Ok(volume) => {
            let log = Log { tenant, content: String::new(), ready: true };
            world.model.borrow_mut().logs.insert(Place::Volume(volume.id), log);
            Ok(())
        }
        Err(error) => allow_failing(world, Err(error), &[], &[Code::VolumeFailed]),
    }
}

async fn grow(world: &World, engine: &Engine, id: VolumeId, tenant: usize, size_bytes: u64) -> Outcome {
    match engine.resize_volume(&world.tenants[tenant], id, size_bytes).await {
        Ok(volume) => {
            must!(volume.size_bytes >= size_bytes, "a volume grown to {size_bytes} has {}", volume.size_bytes);
            Ok(())
        }
        Err(error) => {
            let codes = [Code::VolumeNotFound, Code::VolumeBusy, Code::InvalidArgument];
            allow_failing(world, Err(error), &codes, &[Code::VolumeFailed])
        }
    }
}

async fn delete_volume(world: &World, engine: &Engine, id: VolumeId, tenant: usize) -> Outcome {
    world.model.borrow_mut().doomed.insert(Place::Volume(id));
    match engine.delete_volume(&world.tenants[tenant], id).await {
        Ok(()) => {
            must!(!world.fakes.driver.volumes_now().contains_key(&id), "a deleted volume is still there");
            Ok(())
        }
        Err(error) => {
            let codes = [Code::VolumeNotFound, Code::VolumeInUse, Code::VolumeSyncPending];
            allow_failing(world, Err(error), &codes, &[Code::VolumeFailed])
        }
    }
}

async fn attach(
    world: &World,
    engine: &Engine,
    id: SessionId,
    tenant: usize,
    volume: VolumeId,
    readonly: bool,
) -> Outcome {
    let new = NewMount { readonly, ..mount(volume) };
    match engine.attach_volume(&world.tenants[tenant], id, new).await {
        Ok(attachment) => {
            must!(attachment.readonly == readonly && attachment.volume_id == volume, "attached {attachment:?}");
            Ok(())
        }
        Err(error) => {
            let codes = [Code::VolumeNotFound, Code::VolumeInUse, Code::VolumeSyncPending, Code::PathRefused];
            allow_failing(world, Err(error), &codes, &[Code::VolumeFailed])
        }
    }
}
