//! What must be true, from what clients were told and from what can be seen of the world.

use std::collections::{BTreeMap, BTreeSet};

use nagaya_api::ids::SessionId;
use nagaya_engine::fake::Fakes;
use nagaya_engine::model::{ExecutionStatus, Session, SessionState};

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
    seen: BTreeMap<SessionId, Session>,
}

fn rank(state: SessionState) -> u8 {
    match state {
        SessionState::Creating => 0,
        SessionState::Running => 1,
        SessionState::Terminating => 2,
        SessionState::Terminated => 3,
        other => panic!("nothing makes {}", other.name()),
    }
}

macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(format!($($message)*));
        }
    };
}
pub(crate) use ensure;

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
                    rank(before.state) <= rank(row.state),
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
            if let Some(names) = self.names.get(id) {
                ensure!(names.contains(&row.name), "{id} is named {:?}, not one of {names:?}", row.name);
            }
        }
        let live = rows.values().filter(|row| row.state != SessionState::Terminated).count();
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
        let violations = fakes.driver.violations();
        ensure!(violations.is_empty(), "the driver was misused: {violations:?}");
        self.seen = rows;
        Ok(())
    }

    fn check_reason(&self, row: &Session) -> Result<(), String> {
        let id = row.id;
        let ended_at = row.terminated_at;
        ensure!(ended_at.is_some(), "{id} has no time of its end");
        ensure!(row.ready_at.is_some() || !self.ran.contains(&id), "{id} was seen RUNNING, but was never ready");
        match row.terminal_error.as_str() {
            "" => ensure!(self.asked_to_end.contains(&id), "{id} ended without reason"),
            "maximum duration reached" => {
                ensure!(
                    row.timeout_at <= ended_at && row.timeout_at.is_some(),
                    "{id} ended before its deadline: {row:?}"
                );
            }
            "killed from outside" | "the sandbox was no longer running when the server started again" => {
                ensure!(self.killed.contains(&id), "{id} ended for a reason that is not true: {}", row.terminal_error);
            }
            "the server stopped while the sandbox was being created" => {
                ensure!(row.ready_at.is_none(), "{id} was ready, yet is said to have been in creation");
            }
            other => ensure!(
                other.starts_with("the sandbox could not be created: ")
                    || other == "no capacity left on this server: network_slots_max"
                    || other == "the server could not record the sandbox",
                "{id} ended for an unknown reason: {other}"
            ),
        }
        Ok(())
    }

    /// Holds when nothing is under way and nothing fails.
    pub fn check_quiet(&self, fakes: &Fakes, now: u64) -> Result<(), String> {
        let sandboxes = fakes.driver.sandboxes();
        for row in self.seen.values() {
            let id = row.id;
            match row.state {
                SessionState::Running => {
                    // What is due this very moment may not have had its turn.
                    ensure!(sandboxes.get(&id) == Some(&true), "{id} is RUNNING, but its sandbox is not");
                    ensure!(
                        row.timeout_at.is_none_or(|at| at + 10 > now),
                        "{id} outlived its deadline {:?}",
                        row.timeout_at
                    );
                }
                SessionState::Terminated => {}
                other => return Err(format!("{id} is stuck in {}", other.name())),
            }
        }
        for id in sandboxes.keys() {
            let row = self.seen.get(id);
            ensure!(
                row.is_some_and(|row| row.state == SessionState::Running),
                "the sandbox {id} belongs to no session"
            );
        }
        for execution in fakes.store.all_executions().iter().filter(|e| e.status == ExecutionStatus::Running) {
            let guest = fakes.driver.guest(execution.session_id);
            let runs = guest.is_some_and(|guest| guest.running().contains(&execution.id));
            ensure!(runs, "execution {} is RUNNING on record only", execution.id);
        }
        Ok(())
    }

    pub fn live(&self) -> impl Iterator<Item = &Session> {
        self.seen.values().filter(|row| row.state != SessionState::Terminated)
    }

    pub fn all(&self) -> impl Iterator<Item = &Session> {
        self.seen.values()
    }
}
