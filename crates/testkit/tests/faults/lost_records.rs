//! The database is missing, empty, damaged, older, or another one: nothing is removed because no record names it.

use std::fs;
use std::path::{Path, PathBuf};

use nagaya_api::tenki::v1::{self, SessionState, SnapshotState};
use nagaya_testkit::{Client, Outcome, Server, leftovers, settle};

use crate::cases;

cases![
    a_missing_or_empty_database_is_refused_and_put_back_with_everything,
    a_database_damaged_in_the_middle_ends_the_start_and_is_rebuilt,
    a_backup_of_a_running_server_brings_back_what_it_had_and_loses_nothing_that_came_later,
    what_has_no_record_at_all_gets_one_by_recover,
    only_discard_removes_what_has_no_record,
    a_data_directory_of_the_version_before_goes_on,
];

const CONFIGURATION: &str = "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n";
const DATABASE: &str = "nagaya.db";

/// What a server has, and is to have after all that happens to its records.
struct Kept {
    running: String,
    paused: String,
    volume: String,
    snapshot: String,
    /// The running sandbox's process that must live on.
    pid: String,
}

async fn fill(server: &Server) -> Kept {
    let client = Client::of(server);
    let create = async |name: &str| {
        let wanted = nagaya_testkit::Wanted { name: name.into(), ..Default::default() };
        client.create(&wanted).await.unwrap()
    };
    let (running, paused) = (create("running").await, create("paused").await);
    for sandbox in [&running, &paused] {
        sandbox.shell(&format!("echo {} >kept && sync", sandbox.id), false).await;
    }
    let request = v1::CreateVolumeRequest { name: "data".into(), size_bytes: 16 << 20, ..Default::default() };
    let volume = client.control.create_volume(request).await.unwrap().volume.id.clone();
    let mount = v1::VolumeMount { volume_id: volume.clone(), mount_path: "/mnt/data".into(), ..Default::default() };
    let request = v1::AttachVolumeRequest { session_id: running.id.clone(), volume: mount.into() };
    client.control.attach_volume(request).await.unwrap();
    running.shell("echo volume >/mnt/data/kept && sync", false).await;
    let request =
        v1::CreateSnapshotRequest { session_id: running.id.clone(), name: Some("before".into()), ..Default::default() };
    let snapshot = client.control.create_snapshot(request).await.unwrap().snapshot.id.clone();
    settle_snapshot(&client, &snapshot).await;
    client.control.pause_session(v1::PauseSessionRequest { session_id: paused.id.clone() }).await.unwrap();
    let pid = running.shell("setsid sleep 100000 >/dev/null 2>&1 & echo $!", false).await;
    Kept { running: running.id, paused: paused.id, volume, snapshot, pid }
}

async fn settle_snapshot(client: &Client, id: &str) {
    for _ in 0..600 {
        let request = v1::GetSnapshotRequest { snapshot_id: id.into() };
        let found = client.control.get_snapshot(request).await.unwrap().snapshot.clone();
        if found.state.as_known() == Some(SnapshotState::Ready) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("the snapshot does not become ready");
}

/// Everything is there and works, under its own name.
async fn check(server: &Server, kept: &Kept) {
    let client = Client::of(server);
    let running = client.session(&kept.running).await.unwrap();
    assert_eq!((running.state.as_known(), running.name.as_str()), (Some(SessionState::Running), "running"));
    let sandbox = client.attach(&kept.running).await.unwrap();
    assert_eq!(sandbox.shell("cat kept", false).await, kept.running);
    assert_eq!(sandbox.shell("cat /mnt/data/kept", false).await, "volume");
    assert_eq!(sandbox.shell(&format!("cat /proc/{}/comm", kept.pid), false).await, "sleep");
    let paused = client.session(&kept.paused).await.unwrap();
    assert_eq!((paused.state.as_known(), paused.name.as_str()), (Some(SessionState::Paused), "paused"));
    client.control.resume_session(v1::ResumeSessionRequest { session_id: kept.paused.clone() }).await.unwrap();
    let sandbox = client.attach(&kept.paused).await.unwrap();
    assert_eq!(sandbox.shell("cat kept", false).await, kept.paused);
    client.control.pause_session(v1::PauseSessionRequest { session_id: kept.paused.clone() }).await.unwrap();
    let request = v1::GetVolumeRequest { volume_id: kept.volume.clone() };
    assert_eq!(client.control.get_volume(request).await.unwrap().volume.name, "data");
    let restored = restore(&client, &kept.snapshot).await;
    let sandbox = client.attach(&restored).await.unwrap();
    assert_eq!(sandbox.shell("cat kept", false).await, kept.running);
    sandbox.terminate().await.unwrap();
}

/// A sandbox from a snapshot.
async fn restore(client: &Client, snapshot: &str) -> String {
    let request = v1::CreateSessionRequest {
        owner_id: "self".into(),
        owner_type: "SERVICE".into(),
        snapshot_id: Some(snapshot.into()),
        wait_ready: true,
        ..Default::default()
    };
    let answer = client.control.create_session(request).await.unwrap();
    assert_eq!(answer.session.state.as_known(), Some(SessionState::Running), "{}", answer.session.terminal_error);
    answer.session.id.clone()
}

fn database(server: &Server) -> PathBuf {
    server.data_dir().join(DATABASE)
}

fn lose(server: &Server) {
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", database(server).display()));
    }
}

/// Names of all that a sweep could take, with sizes of what is not written to.
fn holdings(data_dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for place in ["sandboxes", "volumes", "blobs/chunks", "blobs/images"] {
        for entry in fs::read_dir(data_dir.join(place)).unwrap() {
            found.push(format!("{place}/{}", entry.unwrap().file_name().to_string_lossy()));
        }
    }
    found.sort();
    found
}

/// The start is refused with these words, and has touched nothing.
fn refused(server: &mut Server, words: &[&str]) {
    let before = holdings(server.data_dir());
    let said = server.refused_start(&[]);
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    assert_eq!(holdings(server.data_dir()), before);
}

fn recover(server: &Server) -> String {
    let output = server.command("recover", &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn end(mut server: Server) {
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
}

async fn a_missing_or_empty_database_is_refused_and_put_back_with_everything() -> Outcome {
    let mut server = Server::start_with(CONFIGURATION);
    let kept = fill(&server).await;
    type Accident = fn(&Server);
    let accidents: [(&str, Accident); 3] = [
        ("missing", lose),
        ("empty", |server| fs::write(database(server), "").unwrap()),
        // As another program leaves it, or a server of another data directory.
        ("lacks the records", |server| {
            lose(server);
            let elsewhere = tempfile::tempdir().unwrap();
            let sound = elsewhere.path().join(DATABASE);
            drop(nagaya_store::SqliteStore::open(&sound).unwrap());
            fs::copy(sound, database(server)).unwrap();
        }),
    ];
    for (words, accident) in accidents {
        server.kill();
        accident(&server);
        refused(&mut server, &[words, "records_missing", "nagaya recover", "--discard"]);
        // Not once only.
        refused(&mut server, &["records_missing"]);
        recover(&server);
        server.restart();
        check(&server, &kept).await;
    }
    end(server).await;
    Ok(())
}

async fn a_database_damaged_in_the_middle_ends_the_start_and_is_rebuilt() -> Outcome {
    let mut server = Server::start_with(CONFIGURATION);
    let kept = fill(&server).await;
    // In one file: what a stopped server leaves may still be in its log, and then damage to the file is none.
    let backup = tempfile::tempdir().unwrap();
    let file = backup.path().join("records");
    let output = server.command("backup", &[file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(server.terminate().success());
    lose(&server);
    let mut bytes = fs::read(&file).unwrap();
    // All but the first page and the last: single ones may be free.
    let last = bytes.len() - 4096;
    bytes[4096..last].fill(0xa5);
    fs::write(database(&server), &bytes).unwrap();
    refused(&mut server, &["store_damaged", "nagaya recover"]);
    assert_eq!(fs::read(database(&server)).unwrap(), bytes, "what is damaged is not touched");
    let told = recover(&server);
    assert!(told.contains("set aside"), "{told}");
    assert_eq!(fs::read(server.data_dir().join(format!("{DATABASE}.damaged-1"))).unwrap(), bytes);
    server.restart();
    check(&server, &kept).await;
    end(server).await;
    Ok(())
}

async fn a_backup_of_a_running_server_brings_back_what_it_had_and_loses_nothing_that_came_later() -> Outcome {
    let mut server = Server::start_with(CONFIGURATION);
    let kept = fill(&server).await;
    let backup = tempfile::tempdir().unwrap();
    let file = backup.path().join("records");
    let output = server.command("backup", &[file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let client = Client::of(&server);
    let later = client.create(&Default::default()).await.unwrap();
    later.shell("echo later >kept && sync", false).await;
    server.kill();
    lose(&server);
    fs::copy(&file, database(&server)).unwrap();
    refused(&mut server, &["records_missing", "1 sandboxes"]);
    recover(&server);
    server.restart();
    check(&server, &kept).await;
    let later = Client::of(&server).attach(&later.id).await.unwrap();
    assert_eq!(later.shell("cat kept", false).await, "later");
    end(server).await;
    Ok(())
}

async fn what_has_no_record_at_all_gets_one_by_recover() -> Outcome {
    let mut server = Server::start_with(CONFIGURATION);
    let kept = fill(&server).await;
    server.kill();
    lose(&server);
    fs::remove_dir_all(server.data_dir().join("records")).unwrap();
    refused(&mut server, &["records_missing", "2 sandboxes", "1 volumes", "1 snapshots"]);
    let told = recover(&server);
    assert!(told.contains("2 sandboxes, 1 volumes, 1 snapshots"), "{told}");
    server.restart();
    let client = Client::of(&server);
    for id in [&kept.running, &kept.paused] {
        let session = client.session(id).await.unwrap();
        assert_eq!(
            session.state.as_known(),
            Some(SessionState::Running),
            "what ran runs on, and is not paused any more"
        );
        let sandbox = client.attach(id).await.unwrap();
        assert_eq!(&sandbox.shell("cat kept", false).await, id);
    }
    let request = v1::GetVolumeRequest { volume_id: kept.volume.clone() };
    assert_eq!(client.control.get_volume(request).await.unwrap().volume.size_bytes, 16 << 20);
    let snapshots = client.control.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap().snapshots.clone();
    let user = snapshots
        .iter()
        .find(|snapshot| snapshot.name.as_deref().unwrap_or_default().starts_with("recovered-"))
        .unwrap();
    let restored = restore(&client, &user.id).await;
    assert_eq!(client.attach(&restored).await.unwrap().shell("cat kept", false).await, kept.running);
    end(server).await;
    Ok(())
}

async fn only_discard_removes_what_has_no_record() -> Outcome {
    let mut server = Server::start_with(CONFIGURATION);
    fill(&server).await;
    server.kill();
    lose(&server);
    refused(&mut server, &["records_missing"]);
    server.restart_with(&["--discard"]);
    settle("everything is removed", || holdings(server.data_dir()).is_empty());
    assert!(server.terminate().success());
    // It is a new data directory now.
    server.restart();
    end(server).await;
    Ok(())
}

async fn a_data_directory_of_the_version_before_goes_on() -> Outcome {
    let mut server = Server::start_with(CONFIGURATION);
    let kept = fill(&server).await;
    server.kill();
    fs::remove_dir_all(server.data_dir().join("records")).unwrap();
    server.restart();
    check(&server, &kept).await;
    server.kill();
    lose(&server);
    refused(&mut server, &["records_missing"]);
    recover(&server);
    server.restart();
    check(&server, &kept).await;
    end(server).await;
    Ok(())
}
