//! The store's promises on SQLite, and what only a file on a disk can promise.

#![allow(clippy::unwrap_used)]

mod suite;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nagaya_engine::model::{
    ApiKey, EndReason, ImageDigest, Limit, Machine, Preview, Session, SessionState, Snapshot, Volume, Workspace,
    WorkspaceSettings,
};
use nagaya_engine::ports::{Change, SessionQuery, Store};
use nagaya_store::SqliteStore;
use rusqlite::Connection;

use suite::kept::{snapshot, volume};
use suite::previews::preview;
use suite::{execution, join_all, key, runtime, session, workspace};

const FILE: &str = "state.db";

fn open(directory: &Path) -> SqliteStore {
    SqliteStore::open(&directory.join(FILE)).unwrap()
}

#[test]
fn sqlite_keeps_every_promise_of_a_store() {
    suite::every_promise(|| {
        let directory = tempfile::tempdir().unwrap();
        (Box::new(open(directory.path())) as Box<dyn Store>, directory)
    });
}

#[test]
fn a_commit_that_cannot_be_written_changes_nothing_and_hurts_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    runtime().block_on(async {
        store.commit(vec![Change::Workspace(workspace(1))]).await.unwrap();
        let orphan = |number| Session { workspace_id: workspace(9).id, ..session(2, number) };
        let outcomes = join_all((0..100).map(|number| {
            let second = if number % 10 == 3 { orphan(number) } else { session(2, number) };
            store.commit(vec![Change::Session(session(1, number)), Change::Session(second)])
        }))
        .await;
        for (number, outcome) in (0..).zip(outcomes) {
            let refused = number % 10 == 3;
            assert_eq!(outcome.is_err(), refused, "commit {number}");
            for created_at in [1, 2] {
                let found = store.session(session(created_at, number).id).await.unwrap();
                assert_eq!(found.is_none(), refused, "commit {number}, row {created_at}");
            }
        }
        let nobodys = workspace(9).id;
        for change in [
            Change::Snapshot(Snapshot { workspace_id: nobodys, ..snapshot(1, 1) }),
            Change::Volume(Volume { workspace_id: nobodys, ..volume(1, 1) }),
            Change::Snapshot(Snapshot { size_bytes: u64::MAX, ..snapshot(1, 1) }),
            Change::Volume(Volume { growing_to_bytes: Some(u64::MAX), ..volume(1, 1) }),
        ] {
            store.commit(vec![Change::Session(session(4, 4)), change]).await.unwrap_err();
        }
        assert_eq!(store.session(session(4, 4).id).await.unwrap(), None);
        let too_late = Session { timeout_at: Some(u64::MAX), ..session(3, 3) };
        store.commit(vec![Change::Session(too_late)]).await.unwrap_err();
    });
}

#[test]
fn everything_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let session = session(1, 1);
    let execution = execution(session.id, 1);
    let store = open(directory.path());
    runtime()
        .block_on(store.commit(vec![
            Change::Workspace(workspace(1)),
            Change::Session(session.clone()),
            Change::Execution(execution.clone()),
            Change::Snapshot(snapshot(1, 1)),
            Change::Volume(volume(1, 1)),
        ]))
        .unwrap();
    drop(store);
    let store = open(directory.path());
    runtime().block_on(async {
        assert_eq!(store.workspaces().await.unwrap(), [workspace(1)]);
        assert_eq!(store.live_sessions().await.unwrap(), std::slice::from_ref(&session));
        assert_eq!(store.executions(session.id).await.unwrap(), [execution]);
        assert_eq!(store.all_snapshots().await.unwrap(), [snapshot(1, 1)]);
        assert_eq!(store.all_volumes().await.unwrap(), [volume(1, 1)]);
    });
}

/// A database as the first released schema left it, with rows of every table.
fn database_of_schema_1(directory: &Path) {
    let script = include_str!("../migrations/0001_sessions.sql");
    let database = Connection::open(directory.join(FILE)).unwrap();
    database.execute_batch(script).unwrap();
    database
        .execute_batch(
            "CREATE TABLE schema_migrations (number INTEGER PRIMARY KEY, checksum TEXT NOT NULL) STRICT;
             INSERT INTO workspaces VALUES
                 ('00000000-0001-7101-8101-010101010101', 'workspace 1', 1700000000001, NULL),
                 ('00000000-0002-7202-8202-020202020202', 'workspace 2', 1700000000002, 7);
             INSERT INTO api_keys VALUES ('00000000-0001-7101-8101-010101010101',
                 '00000000-0001-7101-8101-010101010101', zeroblob(32), 5);
             INSERT INTO settings VALUES ('certificate_key', x'00ff01');",
        )
        .unwrap();
    let checksum = blake3::hash(script.as_bytes()).to_hex().to_string();
    database.execute("INSERT INTO schema_migrations VALUES (1, ?1)", [checksum]).unwrap();
    for state in SessionState::ALL {
        let session = session(1, state as u32);
        database
            .execute(
                "INSERT INTO sessions VALUES (?1, ?2, ?3, 'a', ?4, 2, 4096, 5, 1, 0, '{\"A\":\"b\"}', '{}',
                     '[\"tag\"]', '[]', 1, 30, 86400000, 1, 2, NULL, 4, 5, '', 'namespace')",
                (session.id.to_string(), session.workspace_id.to_string(), key(1).to_string(), state as i64),
            )
            .unwrap();
    }
    let owner = session(1, SessionState::Running as u32).id;
    let execution = execution(owner, 1);
    database
        .execute(
            "INSERT INTO executions VALUES (?1, ?2, 'sh', '[\"-c\",\"exit 3\",\"\"]', 4, -1, 12, 1001, 1012)",
            (execution.id.to_string(), owner.to_string()),
        )
        .unwrap();
}

#[test]
fn sessions_that_ended_under_schema_1_have_the_reasons_that_their_words_tell() {
    let directory = tempfile::tempdir().unwrap();
    database_of_schema_1(directory.path());
    let database = Connection::open(directory.path().join(FILE)).unwrap();
    let cases = [
        ("", true, EndReason::Requested, None),
        ("maximum duration reached", true, EndReason::MaxDuration, None),
        ("pause retention expired", true, EndReason::PauseRetention, None),
        ("the sandbox's disk is gone", true, EndReason::Failed, None),
        ("no capacity left on this server: slots_max", false, EndReason::Failed, Some(Limit::Slots)),
        ("no capacity left on this server: space on the host's disk", false, EndReason::Failed, Some(Limit::HostDisk)),
        ("no capacity left on this server: disks_max", false, EndReason::Failed, Some(Limit::Unknown)),
    ];
    let id = |index: usize| session(7, index as u32).id;
    for (index, (words, ready, ..)) in cases.iter().enumerate() {
        database
            .execute(
                "INSERT INTO sessions VALUES (?1, ?2, ?3, 'a', 6, 2, 4096, 5, 1, 0, '{}', '{}', '[]', '[]', 1, 30, NULL, 1, ?4,
                     3, NULL, 5, ?5, 'namespace')",
                (id(index).to_string(), session(7, 1).workspace_id.to_string(), key(1).to_string(), ready.then_some(2), words),
            )
            .unwrap();
    }
    drop(database);
    let store = open(directory.path());
    runtime().block_on(async {
        for (index, (words, _, reason, exhausted)) in cases.into_iter().enumerate() {
            let ended = store.session(id(index)).await.unwrap().unwrap();
            assert_eq!((ended.end_reason, ended.exhausted), (Some(reason), exhausted), "{words}");
        }
        let running = store.session(session(1, SessionState::Running as u32).id).await.unwrap().unwrap();
        assert_eq!((running.end_reason, running.exhausted), (None, None));
    });
}

#[test]
fn a_session_paused_under_schema_2_is_one_that_was_paused_by_request() {
    let directory = tempfile::tempdir().unwrap();
    database_of_schema_1(directory.path());
    let script = include_str!("../migrations/0002_life.sql");
    let database = Connection::open(directory.path().join(FILE)).unwrap();
    database.execute_batch(script).unwrap();
    let checksum = blake3::hash(script.as_bytes()).to_hex().to_string();
    database.execute("INSERT INTO schema_migrations VALUES (2, ?1)", [checksum]).unwrap();
    let id = session(1, SessionState::Paused as u32).id;
    let pause = format!(
        "{{\"paused_at\":5,\"expires_at\":null,\"snapshot_id\":\"{id}\",\"in_memory\":true,\"disk_reason\":\"\"}}"
    );
    database.execute("UPDATE sessions SET pause = ?1 WHERE id = ?2", (pause, id.to_string())).unwrap();
    drop(database);
    let store = open(directory.path());
    runtime().block_on(async {
        let pause = store.session(id).await.unwrap().unwrap().pause.unwrap();
        assert_eq!((pause.paused_at, pause.in_memory, pause.idle), (5, true, false));
        assert_eq!(store.all_previews().await.unwrap(), []);
        store.commit(vec![Change::Preview(preview(1, 1))]).await.unwrap();
        let same_label = Preview { label: preview(1, 1).label, ..preview(1, 2) };
        assert!(store.commit(vec![Change::Preview(same_label)]).await.is_err(), "a label of two previews");
    });
}

#[test]
fn a_database_of_schema_1_keeps_every_row_and_can_be_used_on() {
    let directory = tempfile::tempdir().unwrap();
    database_of_schema_1(directory.path());
    let migrated = |state: SessionState| Session {
        name: "a".into(),
        state,
        // What was not recorded.
        name_is_unique: false,
        wake_on_visit: None,
        machine: Machine { egress: None, root: ImageDigest::default(), ..session(1, state as u32).machine },
        env: [("A".into(), "b".into())].into(),
        metadata: Default::default(),
        tags: vec!["tag".into()],
        ssh_authorized_keys: Vec::new(),
        idle_timeout_minutes: Some(30),
        ready_at: Some(2),
        timeout_at: Some(4),
        last_activity_at: 5,
        end_reason: state.is_terminal().then_some(EndReason::Requested),
        terminal_error: String::new(),
        exhausted: None,
        source_snapshot_id: None,
        source_image_id: None,
        pause: None,
        last_resume_error: String::new(),
        last_resume: None,
        attachments: Vec::new(),
        ..session(1, state as u32)
    };
    let limited = WorkspaceSettings { sessions_max: Some(7), ..WorkspaceSettings::default() };
    // The second opening finds nothing left to do.
    for _ in 0..2 {
        let store = open(directory.path());
        runtime().block_on(async {
            let second = Workspace { settings: limited.clone(), ..workspace(2) };
            assert_eq!(store.workspaces().await.unwrap(), [workspace(1), second]);
            let secret_hash = [0; 32];
            let api_key = ApiKey { id: key(1), workspace_id: workspace(1).id, secret_hash, created_at: 5 };
            assert_eq!(store.api_keys().await.unwrap(), [api_key]);
            assert_eq!(store.setting("certificate_key").await.unwrap(), Some(vec![0, 255, 1]));
            for state in SessionState::ALL {
                let kept = store.session(session(1, state as u32).id).await.unwrap();
                assert_eq!(kept, Some(migrated(state)), "{state:?}");
            }
            let owner = session(1, SessionState::Running as u32).id;
            assert_eq!(store.executions(owner).await.unwrap(), [execution(owner, 1)]);
        });
    }
    let store = open(directory.path());
    runtime().block_on(async {
        let full = session(1, SessionState::Running as u32);
        store
            .commit(vec![
                Change::Session(full.clone()),
                Change::Snapshot(snapshot(2, 2)),
                Change::Volume(volume(3, 3)),
                Change::Workspace(workspace(2)),
            ])
            .await
            .unwrap();
        assert_eq!(store.session(full.id).await.unwrap(), Some(full));
        assert_eq!(store.workspaces().await.unwrap(), [1, 2].map(workspace));
    });
}

#[test]
fn commits_whose_callers_went_away_are_still_written_before_the_store_closes() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    runtime().block_on(async {
        store.commit(vec![Change::Workspace(workspace(1))]).await.unwrap();
        for number in 0..50 {
            let mut commit = store.commit(vec![Change::Session(session(1, number))]);
            // One poll puts it into the queue; then the caller gives up.
            std::future::poll_fn(|context| {
                let _ = commit.as_mut().poll(context);
                std::task::Poll::Ready(())
            })
            .await;
        }
    });
    drop(store);
    let store = open(directory.path());
    assert_eq!(runtime().block_on(store.live_sessions()).unwrap().len(), 50);
}

#[test]
fn only_the_owner_can_read_the_files() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(FILE), "").unwrap();
    std::fs::set_permissions(directory.path().join(FILE), std::fs::Permissions::from_mode(0o644)).unwrap();
    let store = open(directory.path());
    runtime().block_on(store.commit(vec![Change::Workspace(workspace(1))])).unwrap();
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        let mode = if entry.path().is_dir() { 0o700 } else { 0o600 };
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, mode, "{:?}", entry.file_name());
        names.push(entry.file_name().into_string().unwrap());
    }
    assert!(names.contains(&format!("{FILE}-wal")), "{names:?}");
}

#[test]
fn a_second_server_on_the_same_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let refused = SqliteStore::open(&directory.path().join(FILE)).unwrap_err();
    assert!(refused.to_string().contains(&format!("in use by process {}", std::process::id())), "{refused}");
    drop(store);
    open(directory.path());
}

#[test]
fn a_database_of_a_newer_version_is_refused_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path()));
    let path = directory.path().join(FILE);
    let database = Connection::open(&path).unwrap();
    database.execute("INSERT INTO schema_migrations VALUES (99, 'of the future')", []).unwrap();
    database.execute("CREATE TABLE of_the_future (x TEXT)", []).unwrap();
    drop(database);
    let before = std::fs::read(&path).unwrap();
    let refused = SqliteStore::open(&path).unwrap_err();
    assert!(refused.to_string().contains("schema 99") && refused.to_string().contains("newer version"), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn an_edited_migration_and_a_foreign_database_are_refused_unchanged() {
    for (prepare, words) in [
        ("UPDATE schema_migrations SET checksum = 'another'", "another form"),
        ("DROP TABLE schema_migrations", "another program"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        drop(open(directory.path()));
        let path = directory.path().join(FILE);
        Connection::open(&path).unwrap().execute_batch(prepare).unwrap();
        let before = std::fs::read(&path).unwrap();
        let refused = SqliteStore::open(&path).unwrap_err();
        assert!(refused.to_string().contains(words), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE);
    std::fs::write(&path, "this is a letter, not a database, and a fairly long one at that").unwrap();
    SqliteStore::open(&path).unwrap_err();
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("this is a letter"));
}

#[test]
fn common_lists_read_an_index_in_order() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path()));
    let database = Connection::open(directory.path().join(FILE)).unwrap();
    for (table, condition, index, column) in [
        ("sessions", "workspace_id = ?", "sessions_by_age", "workspace_id"),
        ("sessions", "workspace_id = ? AND state <> 6", "sessions_alive_by_age", "workspace_id"),
        ("snapshots", "workspace_id = ?", "snapshots_by_age", "workspace_id"),
        ("snapshots", "session_id = ?", "snapshots_by_session", "session_id"),
        ("volumes", "workspace_id = ?", "volumes_by_age", "workspace_id"),
    ] {
        let sql = format!(
            "EXPLAIN QUERY PLAN SELECT * FROM {table} WHERE {condition}
             AND (created_at, id) < (?, ?) ORDER BY created_at DESC, id DESC LIMIT ?"
        );
        let plan: Vec<String> = database
            .prepare(&sql)
            .unwrap()
            .query_map([1, 2, 3, 4], |row| row.get(3))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(plan.len(), 1, "no separate sorting: {plan:?}");
        assert!(plan[0].contains(&format!("INDEX {index} ({column}=?")), "{plan:?}");
    }
}

/// The program that the next test kills: writes sessions, and prints the number of each one that
/// was acknowledged.
#[test]
#[ignore = "started by the kill -9 test with a directory in NAGAYA_STORE_TEST"]
fn program_that_commits_until_it_is_killed() {
    let directory = std::env::var("NAGAYA_STORE_TEST").unwrap();
    let store = open(Path::new(&directory));
    runtime().block_on(async {
        store.commit(vec![Change::Workspace(workspace(1))]).await.unwrap();
        let known = store.sessions(SessionQuery { include_terminated: true, limit: u32::MAX, ..Default::default() });
        let first = known.await.unwrap().len() as u32;
        join_all((0..8).map(|writer| {
            let store = &store;
            async move {
                for number in (first + writer..).step_by(8) {
                    let session = session(1, number);
                    let execution = nagaya_engine::model::Execution {
                        id: nagaya_api::ids::ExecutionId::from_uuid(*session.id.as_uuid()),
                        ..execution(session.id, 1)
                    };
                    let ended = Session { state: SessionState::Terminated, ..session.clone() };
                    store.commit(vec![Change::Session(session), Change::Execution(execution)]).await.unwrap();
                    store.commit(vec![Change::Session(ended)]).await.unwrap();
                    // Below the test harness's own capturing of output.
                    let mut output = std::fs::File::from(rustix::io::dup(rustix::stdio::stdout()).unwrap());
                    writeln!(output, "acknowledged {number}").unwrap();
                }
            }
        }))
        .await;
    });
}

#[test]
fn kill_9_in_the_middle_of_commits_loses_nothing_that_was_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    for round in 0..6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "program_that_commits_until_it_is_killed"])
            .env("NAGAYA_STORE_TEST", directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        for line in lines {
            let line = line.unwrap();
            // The test harness prints the test's name without ending the line.
            if let Some((_, number)) = line.split_once("acknowledged ") {
                acknowledged.push(number.parse::<u32>().unwrap());
                seen += 1;
                if seen == 20 + 97 * round {
                    child.kill().unwrap();
                }
            }
        }
        assert!(!child.wait().unwrap().success());
        assert!(seen >= 20 + 97 * round);

        let store = open(directory.path());
        assert!(store.lost().is_empty(), "the second copy has what the database has not: {:?}", store.lost());
        runtime().block_on(async {
            for number in &acknowledged {
                let kept = store.session(session(1, *number).id).await.unwrap().unwrap();
                assert_eq!(kept.state, SessionState::Terminated, "session {number}");
            }
            let query = SessionQuery { include_terminated: true, limit: u32::MAX, ..Default::default() };
            for kept in store.sessions(query).await.unwrap() {
                assert_eq!(store.executions(kept.id).await.unwrap().len(), 1, "a commit is all or nothing");
            }
        });
    }
}
