//! What must be true of the world when nothing is under way: records and world agree, and nothing is left that no
//! record names.

use std::collections::{BTreeMap, BTreeSet};

use nagaya_api::ids::{SessionId, VolumeId};
use nagaya_engine::fake::Fakes;
use nagaya_engine::model::{
    AttachmentState, ExecutionStatus, PreviewKind, PreviewState, Session, SessionState, SnapshotKind, SnapshotState,
    VolumeState,
};
use nagaya_engine::model::{EventKind, PauseReason};

macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(format!($($message)*));
        }
    };
}
#[allow(unused_imports)] // one of the two crates that include this file has no use for it
pub(crate) use ensure;

pub fn check_quiet(fakes: &Fakes) -> Result<(), String> {
    let sessions: BTreeMap<SessionId, Session> = fakes.store.all_sessions().into_iter().map(|s| (s.id, s)).collect();
    for session in sessions.values() {
        check_session(fakes, session)?;
    }
    for id in fakes.driver.sandboxes().keys() {
        let live = sessions.get(id).is_some_and(|session| session.state != SessionState::Terminated);
        ensure!(live, "the sandbox {id} belongs to no session");
    }
    check_volumes(fakes, &sessions)?;
    check_snapshots(fakes, &sessions)?;
    check_previews(fakes, &sessions)?;
    for execution in fakes.store.all_executions().iter().filter(|e| e.status == ExecutionStatus::Running) {
        // Whether it was started before the sandbox was frozen is not known until that is thawed.
        if fakes.driver.is_frozen(execution.session_id) {
            continue;
        }
        let guest = fakes.driver.guest(execution.session_id);
        let runs = guest.is_some_and(|guest| guest.running().contains(&execution.id));
        ensure!(runs, "execution {} is RUNNING on record only", execution.id);
    }
    let violations = [fakes.driver.violations(), fakes.blobs.violations(), fakes.ingress.violations()].concat();
    ensure!(violations.is_empty(), "a port was misused: {violations:?}");
    Ok(())
}

/// What is remembered of a session leads to where its record says it is: both are in the store, or neither is.
pub fn check_events(fakes: &Fakes, session: &Session) -> Result<(), String> {
    let (id, state) = (session.id, session.state);
    let mut told = (None, false);
    let events = fakes.store.events_now(id);
    for (number, event) in (1..).zip(&events) {
        ensure!(event.sequence == number, "event {number} of {id} has the number {}", event.sequence);
        told = match &event.fact {
            EventKind::Created(_) => (Some(SessionState::Creating), false),
            EventKind::Ready { .. } | EventKind::Resumed { .. } => (Some(SessionState::Running), false),
            EventKind::Paused { reason: PauseReason::Requested | PauseReason::Idle, .. } => {
                (Some(SessionState::Paused), true)
            }
            EventKind::Paused { .. } => (Some(SessionState::Paused), false),
            EventKind::PoweredOff => (Some(SessionState::UserShutdown), false),
            EventKind::MemoryReleased { .. } => (told.0, false),
            EventKind::ResumeFailed { .. } => (Some(SessionState::Paused), told.1),
            EventKind::Terminated { reason, cause } => {
                ensure!(Some(*reason) == session.end_reason, "{id} is told to have ended as {reason:?}");
                ensure!(*cause == session.terminal_error, "{id} is told to have ended with {cause:?}");
                (Some(SessionState::Terminated), false)
            }
            _ => told,
        };
    }
    let in_memory = session.pause.as_ref().is_some_and(|pause| pause.in_memory);
    let fits = match (state, told) {
        (SessionState::Terminating, (told, _)) => told.is_some_and(|told| told != SessionState::Terminated),
        (SessionState::Resuming, (told, memory)) => {
            matches!(told, Some(SessionState::Paused | SessionState::UserShutdown)) && memory == in_memory
        }
        _ => told == (Some(state), in_memory),
    };
    ensure!(fits, "{id} is {} (in memory: {in_memory}), but its events say {told:?}: {events:?}", state.name());
    Ok(())
}

fn check_session(fakes: &Fakes, session: &Session) -> Result<(), String> {
    check_events(fakes, session)?;
    let (id, state) = (session.id, session.state);
    let alive = fakes.driver.sandboxes().get(&id) == Some(&true);
    let frozen = fakes.driver.is_frozen(id);
    let stopped = matches!(state, SessionState::Paused | SessionState::UserShutdown);
    let in_memory = session.pause.as_ref().is_some_and(|pause| pause.in_memory);
    ensure!(session.pause.is_some() == stopped, "{id} is {} with {:?}", state.name(), session.pause);
    ensure!(session.source_image_id.is_none(), "{id} is {} and still names an image", state.name());
    let fits = match state {
        SessionState::Running => alive && !frozen,
        SessionState::Paused if in_memory => alive && frozen,
        SessionState::Paused | SessionState::UserShutdown => fakes.driver.is_only_a_disk(id),
        SessionState::Terminated => !fakes.driver.sandboxes().contains_key(&id),
        _ => return Err(format!("{id} is stuck in {}", state.name())),
    };
    ensure!(fits, "{id} is {} (in memory: {in_memory}), its sandbox alive: {alive}, frozen: {frozen}", state.name());
    for attachment in &session.attachments {
        let expected = match state {
            SessionState::Running => attachment.state == AttachmentState::Attached,
            SessionState::Paused if in_memory => attachment.state != AttachmentState::Attaching,
            SessionState::Paused | SessionState::UserShutdown => attachment.state == AttachmentState::Attaching,
            _ => false,
        };
        ensure!(expected, "{id} is {} with {attachment:?}", state.name());
    }
    Ok(())
}

fn check_volumes(fakes: &Fakes, sessions: &BTreeMap<SessionId, Session>) -> Result<(), String> {
    let recorded: BTreeMap<VolumeId, _> = fakes.store.volumes_now().into_iter().map(|v| (v.id, v)).collect();
    let existing = fakes.driver.volumes_now();
    ensure!(recorded.keys().eq(existing.keys()), "volumes recorded {:?}, existing {existing:?}", recorded.keys());
    for (id, volume) in recorded {
        let made = &existing[&id];
        let rests = volume.state == VolumeState::Available && volume.growing_to_bytes.is_none();
        ensure!(rests && volume.size_bytes == made.size_bytes, "{volume:?} is not {made:?}");
        let mut expected: Vec<(SessionId, String, bool)> = Vec::new();
        for session in sessions.values() {
            let mounted = session.attachments.iter().filter(|of| of.volume_id == id);
            let mounted = mounted.filter(|of| of.state == AttachmentState::Attached);
            expected.extend(mounted.map(|of| (session.id, of.mount_path.clone(), of.readonly)));
        }
        let mut mounts = made.mounts.clone();
        let unmounting = |session_id: SessionId| {
            let attachments = sessions.get(&session_id).map(|session| session.attachments.clone()).unwrap_or_default();
            attachments.iter().any(|of| of.volume_id == id && of.state == AttachmentState::SyncPending)
        };
        mounts.retain(|(session_id, _, _)| !unmounting(*session_id));
        mounts.sort();
        ensure!(mounts == expected, "volume {id} is mounted at {mounts:?}, recorded are {expected:?}");
    }
    Ok(())
}

fn check_snapshots(fakes: &Fakes, sessions: &BTreeMap<SessionId, Session>) -> Result<(), String> {
    let images = fakes.driver.images_now();
    ensure!(images.is_empty(), "images are left: {images:?}");
    let stored: BTreeSet<String> = fakes.blobs.stored().into_iter().collect();
    let mut needed = BTreeSet::new();
    let mut pauses: BTreeSet<_> = sessions.values().filter_map(|of| Some(of.pause.as_ref()?.snapshot_id)).collect();
    for snapshot in fakes.store.snapshots_now() {
        let id = snapshot.id;
        if snapshot.kind == SnapshotKind::Pause {
            ensure!(pauses.remove(&id), "snapshot {id} is that of a pause that is over");
            continue;
        }
        match snapshot.state {
            SnapshotState::Ready => drop(needed.insert(snapshot.manifest.clone())),
            SnapshotState::Failed => ensure!(snapshot.manifest.is_empty(), "{snapshot:?} failed, yet has blobs"),
            state => return Err(format!("snapshot {id} is stuck in {state:?}")),
        }
        let outcome = fakes.store.events_now(snapshot.session_id).into_iter().find_map(|event| match event.fact {
            EventKind::SnapshotCreated { snapshot_id } if snapshot_id == id => Some(SnapshotState::Ready),
            EventKind::SnapshotFailed { snapshot_id, .. } if snapshot_id == id => Some(SnapshotState::Failed),
            _ => None,
        });
        ensure!(outcome == Some(snapshot.state), "{snapshot:?} is remembered as {outcome:?}");
    }
    ensure!(pauses.is_empty(), "pauses without their snapshot: {pauses:?}");
    ensure!(stored == needed, "stored are {stored:?}, needed {needed:?}");
    Ok(())
}

fn check_previews(fakes: &Fakes, sessions: &BTreeMap<SessionId, Session>) -> Result<(), String> {
    let recorded = fakes.store.previews_now();
    for preview in &recorded {
        ensure!(preview.state == PreviewState::Live, "{preview:?} is stuck");
        let session = preview.binding.and_then(|binding| sessions.get(&binding.session_id));
        let lives = session.is_some_and(|session| session.state != SessionState::Terminated);
        ensure!(lives || preview.kind == PreviewKind::Named, "{preview:?} outlived its session");
    }
    let published = fakes.ingress.published();
    let expected: BTreeMap<String, u16> = recorded.iter().map(|of| (of.label.clone(), of.ingress_port)).collect();
    ensure!(expected.len() == recorded.len(), "two previews have one label: {recorded:?}");
    ensure!(published == expected, "published are {published:?}, recorded {expected:?}");
    Ok(())
}
