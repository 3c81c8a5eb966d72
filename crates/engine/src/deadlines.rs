//! When sessions, snapshots and previews want to be woken: one timer for all of them.

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;

use nagaya_api::ids::{PreviewId, SessionId, SnapshotId};
use tokio::sync::Notify;

use crate::model::UnixMs;
use crate::ports::Clock;
use crate::tasks::Tasks;

/// Who wants to be woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Sleeper {
    Session(SessionId),
    Snapshot(SnapshotId),
    Preview(PreviewId),
}

/// At most one time per sleeper, who knows what is due then.
pub(crate) struct Deadlines {
    table: Mutex<Table>,
    /// The earliest time moved forward.
    earlier: Notify,
}

#[derive(Default)]
struct Table {
    by_time: BTreeSet<(UnixMs, Sleeper)>,
    by_sleeper: HashMap<Sleeper, UnixMs>,
}

impl Deadlines {
    pub(crate) fn new() -> Self {
        Self { table: Mutex::default(), earlier: Notify::new() }
    }

    /// Replaces the sleeper's time; `None` removes it.
    pub(crate) fn set(&self, id: Sleeper, at: Option<UnixMs>) {
        let mut table = self.table.lock().expect("no holder of this lock panics");
        let table = &mut *table;
        let before = match at {
            Some(at) => table.by_sleeper.insert(id, at),
            None => table.by_sleeper.remove(&id),
        };
        if before == at {
            return;
        }
        if let Some(before) = before {
            table.by_time.remove(&(before, id));
        }
        if let Some(at) = at {
            table.by_time.insert((at, id));
            if table.by_time.first() == Some(&(at, id)) {
                self.earlier.notify_one();
            }
        }
    }

    fn first(&self) -> Option<UnixMs> {
        let table = self.table.lock().expect("no holder of this lock panics");
        table.by_time.first().map(|(at, _)| *at)
    }

    fn take_due(&self, now: UnixMs) -> Vec<Sleeper> {
        let mut table = self.table.lock().expect("no holder of this lock panics");
        let mut due = Vec::new();
        while let Some(&(at, id)) = table.by_time.first() {
            if at > now {
                break;
            }
            table.by_time.pop_first();
            table.by_sleeper.remove(&id);
            due.push(id);
        }
        due
    }

    /// The timer: calls `wake` for each sleeper whose time has come, until the engine stops.
    pub(crate) async fn run(&self, clock: &dyn Clock, tasks: &Tasks, wake: impl Fn(Sleeper)) {
        loop {
            let first = self.first();
            let sleep = async {
                match first {
                    Some(at) => clock.sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = tasks.stopping() => return,
                () = self.earlier.notified() => {}
                () = sleep => self.take_due(clock.now()).into_iter().for_each(&wake),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sleeper_is_due_once_at_its_latest_time() {
        let deadlines = Deadlines::new();
        let [a, b, c] = [1, 2, 3].map(|n| Sleeper::Session(SessionId::new(n, [0; 10])));
        deadlines.set(a, Some(10));
        deadlines.set(b, Some(20));
        deadlines.set(c, Some(30));
        deadlines.set(a, Some(25));
        deadlines.set(c, None);
        assert_eq!(deadlines.first(), Some(20));
        assert_eq!(deadlines.take_due(19), []);
        assert_eq!(deadlines.take_due(25), [b, a]);
        assert_eq!(deadlines.first(), None);
        assert_eq!(deadlines.take_due(u64::MAX), []);
    }
}
