//! A database that is lost, older or damaged: what is noticed of it, and what is put back from the second copy.

#![allow(clippy::unwrap_used)]
#![allow(dead_code)] // the suite is shared

mod suite;

use std::fs;
use std::path::{Path, PathBuf};

use nagaya_engine::model::{ApiKey, Session, SessionState, Snapshot, Volume};
use nagaya_engine::ports::{Change, PreviewQuery, Store, StoreError};
use nagaya_store::{Kind, SqliteStore, backup};
use proptest::prelude::*;
use rusqlite::Connection;

use suite::kept::{snapshot, volume};
use suite::previews::preview;
use suite::{key, runtime, session, workspace};

const FILE: &str = "state.db";

fn open(directory: &Path) -> SqliteStore {
    SqliteStore::open(&directory.join(FILE)).unwrap()
}

fn commit(store: &SqliteStore, changes: Vec<Change>) {
    runtime().block_on(store.commit(changes)).unwrap();
}

/// Removes the database and what belongs to it.
fn lose(directory: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(directory.join(format!("{FILE}{suffix}")));
    }
}

fn names(store: &SqliteStore, kind: Kind) -> Vec<String> {
    store.lost().get(&kind).cloned().unwrap_or_default()
}

fn copies(directory: &Path) -> Vec<PathBuf> {
    let kinds = fs::read_dir(directory.join("records")).unwrap();
    let mut found: Vec<PathBuf> =
        kinds.flat_map(|kind| fs::read_dir(kind.unwrap().path()).unwrap().map(|file| file.unwrap().path())).collect();
    found.sort();
    found
}

fn one_of_each() -> Vec<Change> {
    vec![
        Change::Workspace(workspace(1)),
        Change::ApiKey(ApiKey { id: key(1), workspace_id: workspace(1).id, secret_hash: [7; 32], created_at: 1 }),
        Change::Setting { name: "session_certificate_key".into(), value: vec![1, 2, 3] },
        Change::Session(session(1, 1)),
        Change::Snapshot(snapshot(1, 1)),
        Change::Volume(volume(1, 1)),
        Change::Preview(preview(1, 1)),
    ]
}

fn ended(created_at: u64, number: u32) -> Session {
    Session { state: SessionState::Terminated, terminated_at: Some(9), ..session(created_at, number) }
}

#[test]
fn everything_alive_is_put_back_when_the_database_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    commit(&store, one_of_each());
    commit(&store, vec![Change::Session(session(2, 2)), Change::Session(ended(2, 2))]);
    drop(store);
    lose(directory.path());
    for attempt in ["lost", "put back", "put back again"] {
        let store = open(directory.path());
        assert_eq!(store.lost().len(), if attempt == "put back again" { 0 } else { 7 }, "{attempt}");
        assert_eq!(names(&store, Kind::Session).contains(&session(1, 1).id.to_string()), attempt != "put back again");
        if attempt == "lost" {
            continue;
        }
        runtime().block_on(async {
            assert_eq!(store.put_back().await.unwrap(), (7, 0));
            assert_eq!(store.workspaces().await.unwrap(), [workspace(1)]);
            assert_eq!(store.api_keys().await.unwrap()[0].secret_hash, [7; 32]);
            assert_eq!(store.setting("session_certificate_key").await.unwrap(), Some(vec![1, 2, 3]));
            assert_eq!(store.live_sessions().await.unwrap(), [session(1, 1)]);
            assert_eq!(store.all_snapshots().await.unwrap(), [snapshot(1, 1)]);
            assert_eq!(store.all_volumes().await.unwrap(), [volume(1, 1)]);
            assert_eq!(store.all_previews().await.unwrap(), [preview(1, 1)]);
        });
    }
}

#[test]
fn a_database_that_was_restored_lacks_what_came_later_and_nothing_that_ended() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    commit(&store, one_of_each());
    let saved = directory.path().join("saved");
    backup(&directory.path().join(FILE), &saved).unwrap();
    commit(&store, vec![Change::Session(session(2, 2)), Change::Volume(volume(2, 2)), Change::Session(ended(1, 1))]);
    let renamed = Session { name: "renamed".into(), ..session(2, 2) };
    commit(&store, vec![Change::Session(renamed.clone())]);
    drop(store);
    lose(directory.path());
    fs::copy(&saved, directory.path().join(FILE)).unwrap();

    let store = open(directory.path());
    assert_eq!(names(&store, Kind::Session), [session(2, 2).id.to_string()]);
    assert_eq!(names(&store, Kind::Volume), [volume(2, 2).id.to_string()]);
    assert_eq!(store.lost().len(), 2);
    runtime().block_on(async {
        store.put_back().await.unwrap();
        assert_eq!(store.session(renamed.id).await.unwrap(), Some(renamed));
    });
}

#[test]
fn a_server_killed_between_database_and_copy_has_lost_nothing() {
    type Accident = fn(&Path);
    let accidents: [(&str, Accident); 4] = [
        ("before anything was copied", |data| copies(data).iter().for_each(|file| fs::remove_file(file).unwrap())),
        ("in the middle of a copy", |data| copies(data).iter().for_each(|file| fs::write(file, "{").unwrap())),
        ("before a copy had its name", |data| {
            copies(data).iter().for_each(|file| fs::rename(file, file.with_extension("new")).unwrap())
        }),
        ("before a removal from the copy", |data| {
            let place = data.join("records/sessions");
            let text = fs::read_to_string(place.join(format!("{}.json", session(1, 1).id))).unwrap();
            let old = text.replace(&session(1, 1).id.to_string(), &session(2, 2).id.to_string());
            fs::write(place.join(format!("{}.json", session(2, 2).id)), old).unwrap();
        }),
    ];
    for (what, accident) in accidents {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        commit(&store, one_of_each());
        commit(&store, vec![Change::Session(ended(2, 2))]);
        drop(store);
        let before: Vec<(PathBuf, Vec<u8>)> =
            copies(directory.path()).into_iter().map(|file| (file.clone(), fs::read(file).unwrap())).collect();
        accident(directory.path());
        let store = open(directory.path());
        assert!(store.lost().is_empty(), "{what}: {:?}", store.lost());
        let after: Vec<(PathBuf, Vec<u8>)> =
            copies(directory.path()).into_iter().map(|file| (file.clone(), fs::read(file).unwrap())).collect();
        assert_eq!(after, before, "{what}");
    }
}

#[test]
fn a_data_directory_of_the_version_before_is_copied_at_its_first_start() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    commit(&store, one_of_each());
    drop(store);
    fs::remove_dir_all(directory.path().join("records")).unwrap();
    let store = open(directory.path());
    assert!(store.lost().is_empty());
    assert_eq!(copies(directory.path()).len(), 7);
}

#[test]
fn what_is_forgotten_leaves_the_copy_too() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    commit(&store, one_of_each());
    commit(
        &store,
        vec![
            Change::Session(ended(1, 1)),
            Change::ForgetSnapshot(snapshot(1, 1).id),
            Change::ForgetVolume(volume(1, 1).id),
            Change::ForgetPreview(preview(1, 1).id),
        ],
    );
    drop(store);
    assert_eq!(copies(directory.path()).len(), 3);
}

#[test]
fn a_copy_that_cannot_be_read_is_set_aside_and_the_others_are_put_back() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    commit(&store, one_of_each());
    drop(store);
    lose(directory.path());
    let records = directory.path().join("records");
    fs::write(records.join(format!("volumes/{}.json", volume(1, 1).id)), "").unwrap();
    // A whole record under the name of another one.
    let workspaces = records.join("workspaces");
    fs::rename(
        workspaces.join(format!("{}.json", workspace(1).id)),
        workspaces.join(format!("{}.json", workspace(2).id)),
    )
    .unwrap();
    let store = open(directory.path());
    runtime().block_on(async {
        assert_eq!(store.put_back().await.unwrap(), (5, 2));
        assert_eq!(store.live_sessions().await.unwrap(), [session(1, 1)]);
        assert!(store.all_volumes().await.unwrap().is_empty());
        // Whose record is lost for good has its things nevertheless.
        assert_eq!(store.workspaces().await.unwrap()[0].id, workspace(1).id);
    });
    drop(store);
    assert!(open(directory.path()).lost().is_empty());
}

#[test]
fn what_is_discarded_is_lost_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    commit(&store, one_of_each());
    drop(store);
    lose(directory.path());
    let store = open(directory.path());
    store.discard_lost().unwrap();
    drop(store);
    assert!(open(directory.path()).lost().is_empty());
    assert!(copies(directory.path()).is_empty());
}

#[test]
fn a_database_damaged_anywhere_is_refused_unchanged() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    commit(&store, one_of_each());
    let many = (0..400).map(|number| Change::Session(session(3, number)));
    commit(&store, many.collect());
    drop(store);
    let path = directory.path().join(FILE);
    Connection::open(&path).unwrap().pragma_update(None, "wal_checkpoint", "truncate").unwrap();
    let sound = fs::read(&path).unwrap();
    let pages = sound.len() / 4096;
    assert!(pages > 50, "{pages} pages");
    for page in [0, 1, 2, pages / 4, pages / 2, pages - 2] {
        let mut damaged = sound.clone();
        damaged[page * 4096..(page + 1) * 4096].fill(0x5a);
        fs::write(&path, &damaged).unwrap();
        let refused = SqliteStore::open(&path).unwrap_err();
        assert!(matches!(refused, StoreError::Damaged(_)), "page {page}: {refused}");
        assert_eq!(fs::read(&path).unwrap(), damaged, "page {page}");
    }
    // Cut off in the middle.
    fs::write(&path, &sound[..sound.len() / 2]).unwrap();
    let refused = SqliteStore::open(&path).unwrap_err();
    assert!(matches!(refused, StoreError::Damaged(_)), "{refused}");
}

#[test]
fn a_backup_of_a_store_that_is_written_to_has_all_of_each_commit_or_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    commit(&store, vec![Change::Workspace(workspace(1))]);
    let target = directory.path().join("backup");
    let runtime = runtime();
    let commits = async {
        for number in 0..300 {
            let pair = vec![Change::Session(session(1, number)), Change::Volume(volume(1, number))];
            store.commit(pair).await.unwrap();
        }
    };
    std::thread::scope(|scope| {
        let backing_up = scope.spawn(|| {
            (0..5).for_each(|number| {
                backup(&directory.path().join(FILE), &target.with_extension(number.to_string())).unwrap();
            });
        });
        runtime.block_on(commits);
        backing_up.join().unwrap();
    });
    for number in 0..5 {
        let copy = target.with_extension(number.to_string());
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
        let database = Connection::open(&copy).unwrap();
        let count = |table: &str| -> u32 {
            database.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
        };
        assert_eq!(count("sessions"), count("volumes"));
        assert_eq!(count("workspaces"), 1);
    }
    // Nothing that exists is overwritten, and nothing half is left.
    backup(&directory.path().join(FILE), &target.with_extension("0")).unwrap_err();
    backup(&directory.path().join("none"), &target).unwrap_err();
    assert!(!target.exists());
}

#[derive(Debug, Clone)]
enum Step {
    Session {
        number: u32,
        ends: bool,
    },
    Snapshot {
        number: u32,
        goes: bool,
    },
    Volume {
        number: u32,
        goes: bool,
    },
    Restart,
    /// The database is lost, and put back.
    Lose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..4u32, any::<bool>()).prop_map(|(number, ends)| Step::Session { number, ends }),
        2 => (0..4u32, any::<bool>()).prop_map(|(number, goes)| Step::Snapshot { number, goes }),
        2 => (0..4u32, any::<bool>()).prop_map(|(number, goes)| Step::Volume { number, goes }),
        1 => Just(Step::Restart),
        1 => Just(Step::Lose),
    ];
    proptest::collection::vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever happens and whenever the database is lost: what is alive afterwards is what was alive before.
    #[test]
    fn losing_the_database_loses_nothing_alive(steps in steps()) {
        let directory = tempfile::tempdir().unwrap();
        let mut store = open(directory.path());
        commit(&store, vec![Change::Workspace(workspace(1))]);
        let alive = |store: &SqliteStore| runtime().block_on(async {
            let previews = store.previews(PreviewQuery { limit: 1, ..PreviewQuery::default() }).await.unwrap().len();
            let sessions: Vec<Session> = store.live_sessions().await.unwrap();
            let snapshots: Vec<Snapshot> = store.all_snapshots().await.unwrap();
            let volumes: Vec<Volume> = store.all_volumes().await.unwrap();
            (previews, sessions, snapshots, volumes)
        });
        for step in steps {
            match step {
                Step::Session { number, ends: false } => commit(&store, vec![Change::Session(session(1, number))]),
                Step::Session { number, ends: true } => commit(&store, vec![Change::Session(ended(1, number))]),
                Step::Snapshot { number, goes: false } => commit(&store, vec![Change::Snapshot(snapshot(1, number))]),
                Step::Snapshot { number, goes: true } => {
                    commit(&store, vec![Change::ForgetSnapshot(snapshot(1, number).id)]);
                }
                Step::Volume { number, goes: false } => commit(&store, vec![Change::Volume(volume(1, number))]),
                Step::Volume { number, goes: true } => commit(&store, vec![Change::ForgetVolume(volume(1, number).id)]),
                Step::Restart | Step::Lose => {
                    let before = alive(&store);
                    drop(store);
                    let loses = matches!(step, Step::Lose);
                    if loses {
                        lose(directory.path());
                    }
                    store = open(directory.path());
                    prop_assert_eq!(store.lost().is_empty(), !loses);
                    if loses {
                        runtime().block_on(store.put_back()).unwrap();
                    }
                    prop_assert_eq!(alive(&store), before);
                }
            }
        }
    }
}
