//! What must be true, from what clients were told and from what can be seen of the world.

use std::collections::{BTreeMap, BTreeSet};

use nagaya_api::ids::{PreviewId, SessionId, SnapshotId, VolumeId};
use nagaya_engine::fake::Fakes;
use nagaya_engine::model::{
    Binding, EndReason, ExecutionStatus, Limit, RestoreMode, Resume, Session, SessionState, SnapshotState,
};

use crate::audit::{self, ensure};
use crate::keepers::DISK_LOG;

/// What the clients know, and what was seen of each session before.
#[derive(Default)]
pub struct Model {
    /// Acknowledged creations, with the tenant who made them.
    pub created: BTreeMap<SessionId, usize>,
    /// Somebody asked for their end; whether that was acknowledged does not matter.
    pub asked_to_end: BTreeSet<SessionId>,
    /// Their end was acknowledged.
    pub ended: BTreeSet<SessionId>,
    /// Clients saw them RUNNING.
    pub ran: BTreeSet<SessionId>,
    /// Their sandbox was killed from outside.
    pub killed: BTreeSet<SessionId>,
    /// Names a session may have: the last acknowledged, and those whose fate is unknown.
    pub names: BTreeMap<SessionId, Vec<String>>,
    /// Sessions with a change of name under way.
    pub renaming: BTreeSet<SessionId>,
    pub certificates: BTreeMap<SessionId, String>,
    pub logs: BTreeMap<Place, Log>,
    /// Logs that are being written to.
    pub writing: BTreeSet<Place>,
    /// Somebody asked for their deletion.
    pub doomed: BTreeSet<Place>,
    /// Acknowledged exposures without an end, that nobody asked to take back since; with what they were told.
    pub exposed: BTreeMap<(SessionId, u16), PreviewId>,
    /// Acknowledged named previews that nobody asked to delete, and where each leads: none where that is not known.
    pub named: BTreeMap<PreviewId, (usize, Option<Option<Binding>>)>,
    /// Exposures and named previews that somebody is changing.
    pub exposing: BTreeSet<(SessionId, u16)>,
    pub binding: BTreeSet<PreviewId>,
    /// Visitors got in.
    pub visited: bool,
    /// How often resuming was asked for, and how many of these were not answered.
    resumes: BTreeMap<SessionId, (u64, u64)>,
    /// Acknowledged as paused, with nobody having asked to resume them since.
    paused: BTreeSet<SessionId>,
    seen: BTreeMap<SessionId, Session>,
}

/// Something that holds a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Disk(SessionId),
    Volume(VolumeId),
    Snapshot(SnapshotId),
}

impl Place {
    pub fn volume(self) -> Option<VolumeId> {
        if let Self::Volume(id) = self { Some(id) } else { None }
    }
}

/// What was acknowledged of a log: it is the beginning of what is there.
#[derive(Debug, Clone)]
pub struct Log {
    pub tenant: usize,
    pub content: String,
    /// Its place was acknowledged as usable.
    pub ready: bool,
}

/// Whether it counts against quotas.
pub fn is_active(row: &Session) -> bool {
    use SessionState as S;
    matches!(row.state, S::Creating | S::Running | S::Pausing | S::Resuming)
}

/// Whether a record may go from one state to another, over any number of steps.
fn follows(before: SessionState, after: SessionState) -> bool {
    use SessionState as S;
    match before {
        S::Terminated => after == S::Terminated,
        S::Terminating => after.is_terminal(),
        S::Creating => true,
        _ => after != S::Creating,
    }
}

impl Model {
    /// Sessions that clients may name, in a fixed order.
    pub fn known(&self) -> Vec<(SessionId, usize)> {
        self.created.iter().map(|(id, tenant)| (*id, *tenant)).collect()
    }

    /// Holds at every moment, also in the middle of everything.
    pub fn check_always(&mut self, fakes: &Fakes, sessions_max: usize) -> Result<(), String> {
        let rows: BTreeMap<SessionId, Session> = fakes.store.all_sessions().into_iter().map(|s| (s.id, s)).collect();
        let sandboxes = fakes.driver.sandboxes();
        for id in self.created.keys() {
            ensure!(rows.contains_key(id), "the acknowledged session {id} is lost");
        }
        for (id, row) in &rows {
            let ended = row.state == SessionState::Terminated;
            if let Some(before) = self.seen.get(id) {
                ensure!(
                    follows(before.state, row.state),
                    "{id} went from {} to {}",
                    before.state.name(),
                    row.state.name()
                );
                ensure!(
                    before.state != SessionState::Terminated || before == row,
                    "the record of {id} changed after its end: {before:?} {row:?}"
                );
            }
            ensure!(!ended || sandboxes.get(id) != Some(&true), "{id} is TERMINATED, but its sandbox is alive");
            ensure!(ended || !self.ended.contains(id), "{id} was acknowledged as ended, but is {}", row.state.name());
            if ended {
                self.check_reason(row)?;
            }
            audit::check_events(fakes, row)?;
            if let Some(names) = self.names.get(id) {
                ensure!(names.contains(&row.name), "{id} is named {:?}, not one of {names:?}", row.name);
            }
        }
        let named = rows.values().filter(|row| row.name_is_unique && row.state != SessionState::Terminated);
        let mut names = BTreeSet::new();
        for row in named {
            ensure!(names.insert((row.workspace_id, &row.name)), "two sessions have the unique name {:?}", row.name);
        }
        let live = rows.values().filter(|row| is_active(row)).count();
        ensure!(live <= sessions_max, "{live} sessions live, {sessions_max} are allowed");
        for execution in fakes.store.all_executions() {
            let session = rows.get(&execution.session_id);
            let ended = session.is_none_or(|session| session.state == SessionState::Terminated);
            ensure!(
                !ended || execution.status != ExecutionStatus::Running,
                "execution {} runs in an ended session",
                execution.id
            );
        }
        let violations = [fakes.driver.violations(), fakes.blobs.violations(), fakes.ingress.violations()].concat();
        ensure!(violations.is_empty(), "a port was misused: {violations:?}");
        self.check_logs(fakes, &rows)?;
        self.check_previews(fakes, &rows)?;
        for id in &self.paused {
            let stopped = [SessionState::Paused, SessionState::UserShutdown].contains(&rows[id].state);
            ensure!(stopped || rows[id].state.is_terminal(), "{id} was paused, but is {}", rows[id].state.name());
        }
        self.seen = rows;
        Ok(())
    }

    /// Nothing that was acknowledged as written is lost, wherever it has gone since.
    fn check_logs(&self, fakes: &Fakes, rows: &BTreeMap<SessionId, Session>) -> Result<(), String> {
        let snapshots: BTreeMap<_, _> = fakes.store.snapshots_now().into_iter().map(|of| (of.id, of)).collect();
        for (place, log) in self.logs.iter().filter(|(place, _)| !self.doomed.contains(place)) {
            let found = match place {
                Place::Disk(id) => {
                    let row = &rows[id];
                    // One that has begun to end may have lost its disk; one that is not ready may not have it yet.
                    if row.state.is_terminal() || row.ready_at.is_none() || log.content.is_empty() {
                        continue;
                    }
                    fakes.driver.disk_file(*id, DISK_LOG)
                }
                Place::Volume(id) if log.content.is_empty() => {
                    let there = fakes.driver.volumes_now().contains_key(id);
                    ensure!(there, "the acknowledged volume {id} is lost");
                    continue;
                }
                Place::Volume(id) => fakes.driver.volume_file(*id, &format!("/{id}")),
                Place::Snapshot(id) => {
                    let snapshot = snapshots.get(id);
                    let kept = snapshot.is_some_and(|of| !log.ready || of.state == SnapshotState::Ready);
                    ensure!(kept, "the acknowledged snapshot {id} is now {snapshot:?}");
                    continue;
                }
            };
            let found = String::from_utf8(found.unwrap_or_default()).unwrap_or_default();
            ensure!(found.starts_with(&log.content), "{place:?} holds {found:?}, acknowledged was {:?}", log.content);
        }
        Ok(())
    }

    /// No preview that was acknowledged is lost, or leads elsewhere.
    fn check_previews(&self, fakes: &Fakes, rows: &BTreeMap<SessionId, Session>) -> Result<(), String> {
        let previews: BTreeMap<_, _> = fakes.store.previews_now().into_iter().map(|of| (of.id, of)).collect();
        for ((session_id, port), id) in &self.exposed {
            let found = previews.get(id).and_then(|of| of.binding);
            let expected = Binding { session_id: *session_id, port: *port };
            let ended = rows[session_id].state == SessionState::Terminated;
            ensure!(ended || found == Some(expected), "the exposed port {port} of {session_id} leads to {found:?}");
        }
        for (id, (_, expected)) in &self.named {
            let found = previews.get(id).ok_or_else(|| format!("the acknowledged preview {id} is lost"))?;
            let fits = expected.is_none_or(|expected| found.binding == expected) || self.binding.contains(id);
            ensure!(fits, "{found:?} was to lead to {expected:?}");
        }
        let labels: BTreeSet<_> = previews.values().map(|of| &of.label).collect();
        ensure!(labels.len() == previews.len(), "two previews have one label: {previews:?}");
        Ok(())
    }

    /// A life is over: what nobody was answered is not known.
    pub fn forget_changes_under_way(&mut self) {
        self.exposing.clear();
        for id in std::mem::take(&mut self.binding) {
            self.named.entry(id).and_modify(|(_, known)| *known = None);
        }
    }

    pub fn log(&self, place: Place) -> String {
        self.logs.get(&place).map(|log| log.content.clone()).unwrap_or_default()
    }

    pub fn acknowledge_log(&mut self, place: Place, content: String) {
        let tenant = self.tenant_of(place);
        self.logs.insert(place, Log { tenant, content, ready: true });
    }

    pub fn tenant_of(&self, place: Place) -> usize {
        match (place, self.logs.get(&place)) {
            (_, Some(log)) => log.tenant,
            (Place::Disk(id), None) => self.created.get(&id).copied().unwrap_or_default(),
            _ => 0,
        }
    }

    pub fn snapshots(&self) -> Vec<Place> {
        self.logs.keys().copied().filter(|place| matches!(place, Place::Snapshot(_))).collect()
    }

    pub fn volumes(&self) -> Vec<Place> {
        self.logs.keys().copied().filter(|place| matches!(place, Place::Volume(_))).collect()
    }

    pub fn resumes(&self, id: SessionId) -> (u64, u64) {
        self.resumes.get(&id).copied().unwrap_or_default()
    }

    pub fn begin_resume(&mut self, id: SessionId) {
        let (asked, unanswered) = self.resumes.entry(id).or_default();
        (*asked, *unanswered) = (*asked + 1, *unanswered + 1);
        self.paused.remove(&id);
    }

    pub fn end_resume(&mut self, id: SessionId) {
        if let Some((_, unanswered)) = self.resumes.get_mut(&id) {
            *unanswered -= 1;
        }
    }

    /// A pause was acknowledged; `before` is what was known of resumes when it was asked for.
    pub fn acknowledge_pause(&mut self, id: SessionId, before: (u64, u64)) {
        let (_, unanswered) = before;
        if unanswered == 0 && self.resumes(id) == before {
            self.paused.insert(id);
        }
    }

    fn check_reason(&self, row: &Session) -> Result<(), String> {
        let id = row.id;
        let ended_at = row.terminated_at;
        ensure!(ended_at.is_some(), "{id} has no time of its end");
        ensure!(row.ready_at.is_some() || !self.ran.contains(&id), "{id} was seen RUNNING, but was never ready");
        let Some(reason) = row.end_reason else { return Err(format!("{id} ended without reason")) };
        ensure!(
            (reason == EndReason::Requested) == row.terminal_error.is_empty(),
            "{id} ended as {reason:?}: {:?}",
            row.terminal_error
        );
        match reason {
            EndReason::Requested => ensure!(self.asked_to_end.contains(&id), "nobody asked {id} to end"),
            EndReason::MaxDuration => {
                ensure!(
                    row.timeout_at <= ended_at && row.timeout_at.is_some(),
                    "{id} ended before its deadline: {row:?}"
                );
            }
            EndReason::PauseRetention => {
                ensure!(row.pause_retention_ms.is_some(), "{id} was to be kept for ever");
            }
            EndReason::Failed if row.terminal_error == "the server stopped while the sandbox was being created" => {
                ensure!(row.ready_at.is_none(), "{id} was ready, yet is said to have been in creation");
            }
            EndReason::Failed if row.exhausted.is_some() => {
                ensure!(row.exhausted == Some(Limit::Slots) && row.ready_at.is_none(), "{id}: {:?}", row.exhausted);
            }
            EndReason::Failed => ensure!(
                [
                    "the sandbox could not be created: ",
                    "the snapshot could not be restored: ",
                    "the paused session's disk could not be copied: ",
                    "volume ",
                ]
                .iter()
                .any(|known| row.terminal_error.starts_with(known))
                    || row.terminal_error == "the server could not record the sandbox",
                "{id} ended for an unknown reason: {}",
                row.terminal_error
            ),
        }
        Ok(())
    }

    /// Holds when nothing is under way and nothing fails.
    pub fn check_quiet(&self, fakes: &Fakes, now: u64, in_memory_max_ms: u64) -> Result<(), String> {
        audit::check_quiet(fakes)?;
        for row in self.seen.values().filter(|row| row.state != SessionState::Terminated) {
            let id = row.id;
            // What is due this very moment may not have had its turn.
            let overdue = |at: Option<u64>| at.is_some_and(|at| at + 10 <= now);
            let runs = row.state == SessionState::Running;
            ensure!(!runs || !overdue(row.timeout_at), "{id} outlived its deadline {:?}", row.timeout_at);
            let idle_ms = row.idle_timeout_minutes.map(|minutes| u64::from(minutes) * 60_000);
            let idle = idle_ms.map(|ms| row.last_activity_at + ms);
            ensure!(!runs || !overdue(idle), "{id} is idle since {}", row.last_activity_at);
            if let Some(pause) = &row.pause {
                ensure!(!overdue(pause.expires_at), "{id} outlived its retention {pause:?}");
                let parks_at = pause.in_memory.then_some(pause.paused_at + in_memory_max_ms);
                ensure!(!overdue(parks_at), "{id} still has its memory: {pause:?}");
            }
        }
        Ok(())
    }

    /// What the schedule came to, for counting.
    pub fn seen_of_interest(&self) -> Vec<String> {
        let mut seen = Vec::new();
        if self.visited {
            seen.push("a visit".to_owned());
        }
        for row in self.seen.values() {
            if let Some(Resume { mode, disk_reason }) = row.last_resume {
                let mode = match mode {
                    RestoreMode::Memory => "memory",
                    RestoreMode::ColdBoot => "cold_boot",
                };
                let reason = disk_reason.map(|reason| format!(" {}", reason.name())).unwrap_or_default();
                seen.push(format!("restore {mode}{reason}"));
            }
            if row.source_snapshot_id.is_some() && row.ready_at.is_some() {
                seen.push("from a snapshot".to_owned());
            }
        }
        for (place, _) in self.logs.iter().filter(|(_, log)| !log.content.is_empty()) {
            let what = match place {
                Place::Disk(_) => "a log on a disk",
                Place::Volume(_) => "a log on a volume",
                Place::Snapshot(_) => "a log in a snapshot",
            };
            seen.push(what.to_owned());
        }
        seen
    }

    pub fn live(&self) -> impl Iterator<Item = &Session> {
        self.seen.values().filter(|row| row.state != SessionState::Terminated)
    }

    pub fn all(&self) -> impl Iterator<Item = &Session> {
        self.seen.values()
    }
}
