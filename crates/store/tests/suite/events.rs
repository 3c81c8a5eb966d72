//! Promises about what happened to sessions.

use nagaya_api::ids::{ExecutionId, SnapshotId, VolumeId};
use nagaya_engine::model::{DiskOnlyReason, DiskSource, EndReason, Event, EventKind, PauseReason, RestoreMode};
use nagaya_engine::model::{Session, SessionState};
use nagaya_engine::ports::{Change, Store};

use super::{Promise, execution, session, workspace};

macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        pub const PROMISES: &[(&str, Promise)] = &[$((stringify!($name), |store| Box::pin($name(store)))),*];
    };
}

promises![
    an_empty_store_has_no_events,
    every_fact_comes_back_as_it_was_written,
    events_are_counted_for_each_session_and_read_in_pages,
    the_oldest_events_go_and_their_numbers_are_not_used_again,
    events_are_written_with_what_they_belong_to,
    sessions_that_ended_first_are_forgotten_first_with_all_of_theirs,
];

fn event(session_number: u32, at: u64, fact: EventKind) -> Event {
    Event { session_id: session(1, session_number).id, sequence: 0, at, fact, execution_id: None }
}

fn written(event: &Event, events_max: u32) -> Change {
    Change::Event { event: event.clone(), events_max }
}

fn ready(after_ms: u64) -> EventKind {
    EventKind::Ready { after_ms }
}

async fn an_empty_store_has_no_events(store: &dyn Store) {
    assert_eq!(store.events(session(1, 1).id, 0, 10).await.unwrap(), []);
}

async fn every_fact_comes_back_as_it_was_written(store: &dyn Store) {
    let (snapshot_id, volume_id) = (SnapshotId::new(1, [1; 10]), VolumeId::new(2, [2; 10]));
    let (path, cause) = ("/data/長屋".to_owned(), "a \"cause\"".to_owned());
    let (program, signal) = ("sh".to_owned(), "SIGKILL".to_owned());
    let facts = [
        EventKind::Created(DiskSource::Fresh),
        EventKind::Created(DiskSource::Snapshot { snapshot_id }),
        EventKind::Created(DiskSource::Fork { session_id: session(1, 9).id }),
        ready(u64::MAX),
        EventKind::Paused { reason: PauseReason::Requested, cause: String::new() },
        EventKind::Paused { reason: PauseReason::SandboxEnded, cause: cause.clone() },
        EventKind::MemoryReleased { reason: DiskOnlyReason::MemoryPressure },
        EventKind::PoweredOff,
        EventKind::Resumed { mode: RestoreMode::Memory, reason: None },
        EventKind::Resumed { mode: RestoreMode::ColdBoot, reason: Some(DiskOnlyReason::HostRestarted) },
        EventKind::ResumeFailed { cause: cause.clone() },
        EventKind::Extended { by_ms: 1, timeout_at_ms: 2 },
        EventKind::Forked { sessions: 3 },
        EventKind::SnapshotCreated { snapshot_id },
        EventKind::SnapshotFailed { snapshot_id, cause: cause.clone() },
        EventKind::VolumeAttached { volume_id, path: path.clone() },
        EventKind::VolumeDetached { volume_id, path },
        EventKind::EgressChanged { unrestricted: false, domains: 1, networks: 0 },
        EventKind::CommandKilled { program: program.clone(), signal },
        EventKind::CommandTimedOut { program: program.clone(), after_ms: 1_000 },
        EventKind::CommandNotFound { program: program.clone() },
        EventKind::GitFailed { operation: "diff".into(), exit_code: 129, said: "usage: git\n  diff".into() },
        EventKind::OutOfMemory { program, limit_mb: 128 },
        EventKind::Refused { request: "resuming".into(), limit: "sessions_max is 1".into() },
        EventKind::Terminated { reason: EndReason::MaxDuration, cause },
        EventKind::Unknown,
    ];
    let mut expected = Vec::new();
    for (number, fact) in (1..).zip(facts) {
        let execution_id = (number % 2 == 0).then(|| ExecutionId::new(number, [3; 10]));
        let event = Event { execution_id, ..event(1, number * 10, fact) };
        store.commit(vec![written(&event, 100)]).await.unwrap();
        expected.push(Event { sequence: number, ..event });
    }
    assert_eq!(store.events(session(1, 1).id, 0, u32::MAX).await.unwrap(), expected);
}

async fn events_are_counted_for_each_session_and_read_in_pages(store: &dyn Store) {
    for number in 1..=5 {
        let changes = [1, 2].map(|of| written(&event(of, number, ready(number)), 100));
        store.commit(changes.into()).await.unwrap();
    }
    // Two in one commit keep their order.
    store.commit([6, 7].map(|n| written(&event(1, n, ready(n)), 100)).into()).await.unwrap();
    let page = async |of, after, limit| {
        let events = store.events(session(1, of).id, after, limit).await.unwrap();
        events.into_iter().map(|event| (event.sequence, event.at)).collect::<Vec<_>>()
    };
    assert_eq!(page(1, 0, 3).await, [(1, 1), (2, 2), (3, 3)]);
    assert_eq!(page(1, 3, 3).await, [(4, 4), (5, 5), (6, 6)]);
    assert_eq!(page(1, 6, 3).await, [(7, 7)]);
    assert_eq!(page(1, 7, 3).await, []);
    assert_eq!(page(1, u64::MAX, 3).await, []);
    assert_eq!(page(2, 4, 3).await, [(5, 5)]);
    assert_eq!(page(3, 0, 3).await, []);
}

async fn the_oldest_events_go_and_their_numbers_are_not_used_again(store: &dyn Store) {
    let sequences = async |of| {
        let events = store.events(session(1, of).id, 0, u32::MAX).await.unwrap();
        events.into_iter().map(|event| event.sequence).collect::<Vec<_>>()
    };
    for number in 1..=10 {
        store.commit(vec![written(&event(1, number, ready(number)), 3)]).await.unwrap();
        store.commit(vec![written(&event(2, number, ready(number)), 100)]).await.unwrap();
    }
    assert_eq!(sequences(1).await, [8, 9, 10]);
    assert_eq!(sequences(2).await.len(), 10, "another session's stay");
    store.commit(vec![written(&event(1, 11, ready(11)), 1)]).await.unwrap();
    assert_eq!(sequences(1).await, [11]);
}

async fn events_are_written_with_what_they_belong_to(store: &dyn Store) {
    let told = written(&event(1, 1, ready(1)), 10);
    store.commit(vec![told, Change::Workspace(workspace(1)), Change::Session(session(1, 1))]).await.unwrap();
    assert!(store.session(session(1, 1).id).await.unwrap().is_some());
    assert_eq!(store.events(session(1, 1).id, 0, 10).await.unwrap().len(), 1);
}

async fn sessions_that_ended_first_are_forgotten_first_with_all_of_theirs(store: &dyn Store) {
    let ended = |number, at| Session { state: SessionState::Terminated, terminated_at: Some(at), ..session(1, number) };
    // The fourth has not ended: that it says when is nobody's business.
    let going = Session { state: SessionState::Terminating, terminated_at: Some(1), ..session(1, 4) };
    let mut changes = vec![Change::Workspace(workspace(1))];
    for (number, each) in (1..).zip([ended(1, 30), ended(2, 10), ended(3, 20), going]) {
        changes.push(Change::Execution(execution(each.id, number)));
        changes.push(Change::Event { event: Event { session_id: each.id, ..event(1, 1, ready(1)) }, events_max: 10 });
        changes.push(Change::Session(each));
    }
    store.commit(changes).await.unwrap();
    let left = async || {
        let mut left = Vec::new();
        for number in 1..=4 {
            let id = session(1, number).id;
            let known = store.session(id).await.unwrap().is_some();
            assert_eq!(known, !store.events(id, 0, 10).await.unwrap().is_empty(), "{number}");
            assert_eq!(known, !store.executions(id).await.unwrap().is_empty(), "{number}");
            left.extend(known.then_some(number));
        }
        left
    };
    let forget = async |ended_before, sessions_max| {
        store.commit(vec![Change::ForgetEnded { ended_before, sessions_max }]).await.unwrap();
    };
    forget(10, 9).await;
    assert_eq!(left().await, [1, 2, 3, 4], "those of that very moment are kept");
    forget(25, 1).await;
    assert_eq!(left().await, [1, 3, 4]);
    forget(25, 9).await;
    assert_eq!(left().await, [1, 4]);
    forget(u64::try_from(i64::MAX).unwrap(), 9).await;
    assert_eq!(left().await, [4]);
}
