//! What every store must do, whatever it keeps its records in.

// Each test program uses its own part of this.
#![allow(clippy::unwrap_used, dead_code)]

pub mod events;
pub mod kept;
pub mod previews;

use std::collections::BTreeMap;

use nagaya_api::ids::{AttachmentId, DiskImageId, ExecutionId, KeyId, SessionId, SnapshotId, VolumeId, WorkspaceId};
use nagaya_engine::model::{
    ApiKey, Attachment, AttachmentState, DiskOnlyReason, Egress, EndReason, Execution, ExecutionStatus, ImageDigest,
    Limit, Machine, Pause, Resources, RestoreMode, Resume, Session, SessionState, WakeOnVisit, Workspace,
    WorkspaceSettings,
};
use nagaya_engine::ports::{Change, SessionQuery, Store};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// Everything that all stores promise. `fresh` makes an empty one, with whatever keeps it alive.
pub fn every_promise<Keep>(fresh: impl Fn() -> (Box<dyn Store>, Keep)) {
    let runtime = runtime();
    for (name, promise) in PROMISES.iter().chain(kept::PROMISES).chain(previews::PROMISES).chain(events::PROMISES) {
        println!("promise: {name}");
        let (store, _keep) = fresh();
        runtime.block_on(promise(store.as_ref()));
    }
    queries_agree_with_a_naive_model(&runtime, &fresh);
    kept::queries_agree_with_a_naive_model(&runtime, &fresh);
    previews::queries_agree_with_a_naive_model(&runtime, &fresh);
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub type Promise = for<'a> fn(&'a dyn Store) -> std::pin::Pin<Box<dyn Future<Output = ()> + 'a>>;

macro_rules! promises {
    ($($name:ident),* $(,)?) => {
        const PROMISES: &[(&str, Promise)] = &[$((stringify!($name), |store| Box::pin($name(store)))),*];
    };
}

promises![
    an_empty_store_answers_with_nothing,
    records_come_back_as_they_were_written,
    a_second_write_replaces_the_whole_record,
    replacing_a_session_keeps_its_executions,
    a_forgotten_execution_is_gone_and_others_stay,
    live_sessions_are_all_but_the_terminated,
    pages_cover_every_session_once_newest_first,
    concurrent_commits_are_all_kept,
    an_acknowledged_commit_is_seen_by_the_next_read,
];

pub fn workspace(number: u8) -> Workspace {
    Workspace {
        id: WorkspaceId::new(u64::from(number), [number; 10]),
        name: format!("workspace {number}"),
        created_at: 1_700_000_000_000 + u64::from(number),
        settings: if number.is_multiple_of(2) { every_setting() } else { WorkspaceSettings::default() },
    }
}

fn every_setting() -> WorkspaceSettings {
    WorkspaceSettings {
        pause_retention_ms: Some(1),
        snapshot_retention_ms: Some(u64::MAX),
        snapshots_max: Some(0),
        templates_max: Some(3),
        volumes_max: Some(4),
        bytes_max: Some(u64::MAX),
        sessions_max: Some(u32::MAX),
        sticky_sessions_max: Some(7),
        preview_urls_max: Some(8),
    }
}

pub fn key(number: u8) -> KeyId {
    KeyId::new(1, [number; 10])
}

pub fn egress() -> Option<Egress> {
    Some(Egress {
        allow_domains: vec!["*.example.com".into()],
        allow_cidrs: vec!["1.2.3.0/24".into(), "4.5.6.7/32".into()],
    })
}

pub fn session(created_at: u64, number: u32) -> Session {
    let mut random = [0; 10];
    random[..4].copy_from_slice(&number.to_be_bytes());
    Session {
        id: SessionId::new(created_at, random),
        workspace_id: workspace(1).id,
        owner_id: key(1),
        name: "a \"quoted\" name, a ' and a 長屋".into(),
        name_is_unique: true,
        state: SessionState::Running,
        machine: Machine {
            image: String::new(),
            resources: Resources::of(2, 4096, 5),
            root: ImageDigest::new("host:1"),
            outbound: true,
            egress: egress(),
        },
        inbound: false,
        env: BTreeMap::from([("EMPTY".into(), String::new()), ("LINES".into(), "a\nb".into())]),
        metadata: BTreeMap::from([("purpose".into(), "test".into())]),
        tags: vec!["zebra".into(), "ant".into()],
        ssh_authorized_keys: vec!["ssh-ed25519 AAAA me".into()],
        sticky: true,
        idle_timeout_minutes: Some(0),
        pause_retention_ms: Some(86_400_000),
        wake_on_visit: Some(WakeOnVisit::Always),
        created_at,
        ready_at: Some(created_at + 5),
        terminated_at: None,
        timeout_at: Some(created_at + 3_600_000),
        last_activity_at: created_at + 9,
        end_reason: Some(EndReason::PauseRetention),
        terminal_error: "pause \"retention\" expired".into(),
        exhausted: Some(Limit::HostDisk),
        isolation: None,
        driver: "namespace".into(),
        source_snapshot_id: Some(SnapshotId::new(1, [1; 10])),
        source_image_id: Some(DiskImageId::new(2, [2; 10])),
        pause: Some(Pause {
            paused_at: created_at + 7,
            expires_at: Some(created_at + 8),
            snapshot_id: SnapshotId::new(3, [3; 10]),
            in_memory: true,
            disk_reason: Some(DiskOnlyReason::HostRestarted),
            idle: true,
        }),
        last_resume_error: "no \"space\" for it".into(),
        last_resume: Some(Resume { mode: RestoreMode::ColdBoot, disk_reason: Some(DiskOnlyReason::MemoryPressure) }),
        attachments: [AttachmentState::Attaching, AttachmentState::Attached, AttachmentState::SyncPending]
            .into_iter()
            .zip(4..)
            .map(|(state, number)| Attachment {
                id: AttachmentId::new(number.into(), [number; 10]),
                volume_id: VolumeId::new(number.into(), [number; 10]),
                mount_path: format!("/home/user/a 'b' {number}/長屋"),
                readonly: number == 4,
                state,
            })
            .collect(),
    }
}

pub fn execution(session_id: SessionId, number: u8) -> Execution {
    Execution {
        id: ExecutionId::new(u64::from(number), [number; 10]),
        session_id,
        command: "sh".into(),
        args: vec!["-c".into(), "exit 3".into(), String::new()],
        status: ExecutionStatus::Failed,
        exit_code: -1,
        duration_ms: 12,
        started_at: 1_000 + u64::from(number),
        ended_at: Some(1_012),
    }
}

fn everything() -> SessionQuery {
    SessionQuery { include_terminated: true, limit: 1_000, ..SessionQuery::default() }
}

async fn an_empty_store_answers_with_nothing(store: &dyn Store) {
    assert_eq!(store.workspaces().await.unwrap(), []);
    assert_eq!(store.api_keys().await.unwrap(), []);
    assert_eq!(store.setting("certificate_key").await.unwrap(), None);
    assert_eq!(store.session(session(1, 1).id).await.unwrap(), None);
    assert_eq!(store.sessions(everything()).await.unwrap(), []);
    assert_eq!(store.live_sessions().await.unwrap(), []);
    assert_eq!(store.execution(execution(session(1, 1).id, 1).id).await.unwrap(), None);
    assert_eq!(store.executions(session(1, 1).id).await.unwrap(), []);
    store.commit(Vec::new()).await.unwrap();
}

async fn records_come_back_as_they_were_written(store: &dyn Store) {
    let keys = [1, 2].map(|number| ApiKey {
        id: key(number),
        workspace_id: workspace(number).id,
        secret_hash: [number; 32],
        created_at: u64::from(number),
    });
    let mut sessions = Vec::new();
    for (number, state) in (1..).zip(SessionState::ALL) {
        let mut session = session(number, 1);
        session.state = state;
        sessions.push(session);
    }
    let bare = Session {
        env: BTreeMap::new(),
        metadata: BTreeMap::new(),
        tags: Vec::new(),
        ssh_authorized_keys: Vec::new(),
        idle_timeout_minutes: None,
        pause_retention_ms: None,
        wake_on_visit: None,
        name_is_unique: false,
        ready_at: None,
        terminated_at: Some(77),
        timeout_at: None,
        terminal_error: "maximum duration reached".into(),
        isolation: None,
        driver: String::new(),
        source_snapshot_id: None,
        source_image_id: None,
        pause: None,
        last_resume_error: String::new(),
        last_resume: None,
        attachments: Vec::new(),
        sticky: false,
        inbound: true,
        machine: Machine {
            image: String::new(),
            resources: Resources::of(16, 65_536, 100),
            root: ImageDigest::new("host:1"),
            outbound: false,
            egress: None,
        },
        ..session(100, 2)
    };
    sessions.push(bare);
    let executions = [1, 2, 3, 4].map(|number| execution(sessions[0].id, number));
    let executions: Vec<Execution> = executions
        .into_iter()
        .zip([ExecutionStatus::Running, ExecutionStatus::Succeeded, ExecutionStatus::Failed, ExecutionStatus::TimedOut])
        .map(|(execution, status)| Execution {
            status,
            ended_at: (status != ExecutionStatus::Running).then_some(2_000),
            ..execution
        })
        .collect();

    // Written in the order that refers to what does not exist yet: only the end of a commit counts.
    let mut changes: Vec<Change> = executions.iter().cloned().map(Change::Execution).collect();
    changes.extend(sessions.iter().cloned().map(Change::Session));
    changes.extend(keys.iter().cloned().map(Change::ApiKey));
    changes.extend([1, 2].map(workspace).map(Change::Workspace));
    changes.push(Change::Setting { name: "certificate_key".into(), value: vec![0, 255, 1] });
    store.commit(changes).await.unwrap();

    assert_eq!(store.workspaces().await.unwrap(), [1, 2].map(workspace));
    assert_eq!(store.api_keys().await.unwrap(), keys);
    assert_eq!(store.setting("certificate_key").await.unwrap(), Some(vec![0, 255, 1]));
    for session in &sessions {
        assert_eq!(store.session(session.id).await.unwrap().as_ref(), Some(session));
    }
    for execution in &executions {
        assert_eq!(store.execution(execution.id).await.unwrap().as_ref(), Some(execution));
    }
    assert_eq!(store.executions(sessions[0].id).await.unwrap(), executions);
    assert_eq!(store.executions(sessions[1].id).await.unwrap(), []);
}

async fn a_second_write_replaces_the_whole_record(store: &dyn Store) {
    let before = session(1, 1);
    let after = Session {
        name: "renamed".into(),
        state: SessionState::Terminated,
        tags: vec!["other".into()],
        env: BTreeMap::new(),
        timeout_at: None,
        terminated_at: Some(9),
        terminal_error: "gone".into(),
        sticky: false,
        last_activity_at: 99,
        source_snapshot_id: None,
        source_image_id: None,
        pause: None,
        last_resume_error: String::new(),
        last_resume: None,
        attachments: before.attachments[1..].to_vec(),
        ..before.clone()
    };
    let renamed = Workspace { name: "renamed".into(), settings: every_setting(), ..workspace(1) };
    store.commit(vec![Change::Workspace(workspace(1)), Change::Session(before.clone())]).await.unwrap();
    store.commit(vec![Change::Workspace(renamed.clone()), Change::Session(after.clone())]).await.unwrap();
    for value in [vec![1], vec![2, 3]] {
        store.commit(vec![Change::Setting { name: "x".into(), value }]).await.unwrap();
    }
    assert_eq!(store.workspaces().await.unwrap(), [renamed]);
    assert_eq!(store.sessions(everything()).await.unwrap(), [after]);
    assert_eq!(store.setting("x").await.unwrap(), Some(vec![2, 3]));
}

async fn replacing_a_session_keeps_its_executions(store: &dyn Store) {
    let session = session(1, 1);
    let execution = execution(session.id, 1);
    store
        .commit(vec![
            Change::Workspace(workspace(1)),
            Change::Session(session.clone()),
            Change::Execution(execution.clone()),
        ])
        .await
        .unwrap();
    store.commit(vec![Change::Workspace(workspace(1)), Change::Session(session.clone())]).await.unwrap();
    assert_eq!(store.executions(session.id).await.unwrap(), [execution]);
}

async fn a_forgotten_execution_is_gone_and_others_stay(store: &dyn Store) {
    let session = session(1, 1);
    let executions = [1, 2, 3].map(|number| execution(session.id, number));
    let mut changes = vec![Change::Workspace(workspace(1)), Change::Session(session.clone())];
    changes.extend(executions.iter().cloned().map(Change::Execution));
    store.commit(changes).await.unwrap();
    store.commit(vec![Change::ForgetExecution(executions[1].id)]).await.unwrap();
    store.commit(vec![Change::ForgetExecution(executions[1].id)]).await.unwrap();
    assert_eq!(store.execution(executions[1].id).await.unwrap(), None);
    assert_eq!(store.executions(session.id).await.unwrap(), [executions[0].clone(), executions[2].clone()]);
}

async fn live_sessions_are_all_but_the_terminated(store: &dyn Store) {
    let mut changes = vec![Change::Workspace(workspace(1)), Change::Workspace(workspace(2))];
    for (number, state) in (1..).zip(SessionState::ALL) {
        for workspace_number in [1, 2] {
            changes.push(Change::Session(Session {
                state,
                workspace_id: workspace(workspace_number).id,
                ..session(number, workspace_number.into())
            }));
        }
    }
    store.commit(changes).await.unwrap();
    let live = store.live_sessions().await.unwrap();
    assert_eq!(live.len(), 2 * (SessionState::ALL.len() - 1));
    assert!(live.iter().all(|session| session.state != SessionState::Terminated));
}

async fn pages_cover_every_session_once_newest_first(store: &dyn Store) {
    // Several share one creation time, so that the id must decide.
    let mut sessions: Vec<Session> = (0..25).map(|number| session(1_000 + u64::from(number / 4), number)).collect();
    let mut changes = vec![Change::Workspace(workspace(1))];
    changes.extend(sessions.iter().cloned().map(Change::Session));
    store.commit(changes).await.unwrap();
    let mut seen = Vec::new();
    let mut before = None;
    loop {
        let page = store.sessions(SessionQuery { before, limit: 4, ..everything() }).await.unwrap();
        assert!(page.len() <= 4);
        let Some(last) = page.last() else { break };
        before = Some((last.created_at, last.id));
        seen.extend(page);
    }
    sessions.sort_by_key(|session| std::cmp::Reverse((session.created_at, session.id)));
    assert_eq!(seen, sessions);
}

async fn concurrent_commits_are_all_kept(store: &dyn Store) {
    store.commit(vec![Change::Workspace(workspace(1))]).await.unwrap();
    let sessions: Vec<Session> = (0..500).map(|number| session(5, number)).collect();
    let commits = sessions.iter().map(|session| store.commit(vec![Change::Session(session.clone())]));
    for outcome in join_all(commits).await {
        outcome.unwrap();
    }
    assert_eq!(store.live_sessions().await.unwrap().len(), sessions.len());
}

async fn an_acknowledged_commit_is_seen_by_the_next_read(store: &dyn Store) {
    store.commit(vec![Change::Workspace(workspace(1))]).await.unwrap();
    let mut session = session(1, 1);
    for activity in 0..200 {
        session.last_activity_at = activity;
        store.commit(vec![Change::Session(session.clone())]).await.unwrap();
        assert_eq!(store.session(session.id).await.unwrap().unwrap().last_activity_at, activity);
        assert_eq!(store.live_sessions().await.unwrap()[0].last_activity_at, activity);
    }
}

/// Drives all futures at once on one task, so that they really wait in the store together.
pub async fn join_all<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut pending: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        let mut ready = true;
        for (future, outcome) in pending.iter_mut().filter(|(_, outcome)| outcome.is_none()) {
            match future.as_mut().poll(context) {
                std::task::Poll::Ready(value) => *outcome = Some(value),
                std::task::Poll::Pending => ready = false,
            }
        }
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    pending.into_iter().map(|(_, outcome)| outcome.unwrap()).collect()
}

fn queries_agree_with_a_naive_model<Keep>(
    runtime: &tokio::runtime::Runtime,
    fresh: &impl Fn() -> (Box<dyn Store>, Keep),
) {
    let any_tags = || vec(prop::sample::select(vec!["a", "ab", "b:c", "d_1.x", "a-b"]), 0..4);
    let any_state = || prop::sample::select(SessionState::ALL.to_vec());
    let any_session = (0u64..6, 1u8..=2, 1u8..=3, any_state(), any_tags(), any::<bool>()).prop_map(
        |(created_at, workspace_number, key_number, state, tags, sticky)| Session {
            workspace_id: workspace(workspace_number).id,
            owner_id: key(key_number),
            state,
            tags: tags.into_iter().map(String::from).collect(),
            sticky,
            ..session(created_at, 0)
        },
    );
    let any_query = (
        option::of(1u8..=3),
        option::of(prop::sample::select(vec![
            key(1).to_string(),
            key(2).to_string(),
            key(9).to_string(),
            "' OR 1=1 --".into(),
            String::new(),
        ])),
        option::of(any_state()),
        any_tags(),
        option::of(any::<bool>()),
        any::<bool>(),
        option::of((0u64..7, 0u32..40)),
        0u32..12,
    )
        .prop_map(|(workspace_number, owner_id, state, tags, sticky, include_terminated, before, limit)| {
            SessionQuery {
                workspace_id: workspace_number.map(|number| workspace(number).id),
                owner_id,
                state,
                tags: tags.into_iter().map(String::from).collect(),
                sticky,
                include_terminated,
                before: before.map(|(created_at, number)| (created_at, session(created_at, number).id)),
                limit,
            }
        });
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let outcome = runner.run(&(vec(any_session, 0..40), vec(any_query, 40)), |(mut sessions, queries)| {
        for (number, session) in (0..).zip(&mut sessions) {
            session.id = self::session(session.created_at, number).id;
        }
        let (store, _keep) = fresh();
        runtime.block_on(async {
            let mut changes = vec![Change::Workspace(workspace(1)), Change::Workspace(workspace(2))];
            changes.extend(sessions.iter().cloned().map(Change::Session));
            store.commit(changes).await.unwrap();
            for query in queries {
                let found = store.sessions(query.clone()).await.unwrap();
                prop_assert_eq!(found, naive(&sessions, &query), "{:?}", query);
            }
            Ok(())
        })
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

fn naive(sessions: &[Session], query: &SessionQuery) -> Vec<Session> {
    let mut found: Vec<Session> = sessions
        .iter()
        .filter(|session| query.workspace_id.is_none_or(|id| session.workspace_id == id))
        .filter(|session| query.owner_id.as_ref().is_none_or(|id| session.owner_id.to_string() == *id))
        .filter(|session| query.state.is_none_or(|state| session.state == state))
        .filter(|session| query.tags.iter().all(|tag| session.tags.contains(tag)))
        .filter(|session| query.sticky.is_none_or(|sticky| session.sticky == sticky))
        .filter(|session| query.include_terminated || session.state != SessionState::Terminated)
        .filter(|session| query.before.is_none_or(|before| (session.created_at, session.id) < before))
        .cloned()
        .collect();
    found.sort_by_key(|session| std::cmp::Reverse((session.created_at, session.id)));
    found.truncate(query.limit as usize);
    found
}
