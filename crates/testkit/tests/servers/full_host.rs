//! The host's disk is full: what needs space is refused with a clear error, and nothing that was kept is lost.

use std::fs;
use std::time::{Duration, Instant};

use connectrpc::{ConnectError, ErrorCode};
use nagaya_api::tenki::v1::{self, SessionState, SnapshotState};
use nagaya_testkit::{Client, Sandbox, Server, SmallDisk, Wanted, leftovers, settle};

#[tokio::test(flavor = "multi_thread")]
async fn a_full_host_refuses_what_needs_space_and_keeps_what_there_is() {
    if !rustix::process::geteuid().is_root() {
        println!("full host: not run: only root can start the namespace driver");
        return;
    }
    let disk = SmallDisk::mount(1_024);
    // Without the limit that would refuse everything long before the disk is full.
    let configuration = "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n[namespace]\ndisk_free_mb_min = 0\n";
    let mut server = Server::start_in(&disk.path(), configuration);
    let client = Client::of(&server);
    let sandbox = client.create(&Wanted::default()).await.unwrap();
    sandbox.shell("head -c 20M /dev/urandom >kept && sha256sum kept >sum && sync", false).await;
    let request = v1::CreateVolumeRequest { name: "v".into(), size_bytes: 64 << 20, ..Default::default() };
    let volume = client.control.create_volume(request).await.unwrap().volume.id.clone();

    let filler = disk.fill();
    refused("a snapshot", snapshot(&client, &sandbox.id).await);
    check(&sandbox).await;
    grow_refused_or_harmless(&client, &volume).await;
    let paused = client.control.pause_session(v1::PauseSessionRequest { session_id: sandbox.id.clone() }).await;
    let state = client.session(&sandbox.id).await.unwrap().state.as_known().unwrap();
    match &paused {
        // Pausing takes no space but for its record.
        Ok(_) => assert_eq!(state, SessionState::Paused),
        // Nor can it always be recorded that it was taken back.
        Err(_) => assert!(matches!(state, SessionState::Running | SessionState::Pausing), "{state:?}"),
    }

    fs::remove_file(&filler).unwrap();
    let state = settled_state(&client, &sandbox.id).await;
    if state == SessionState::Paused {
        client.control.resume_session(v1::ResumeSessionRequest { session_id: sandbox.id.clone() }).await.unwrap();
    }
    let sandbox = client.attach(&sandbox.id).await.unwrap();
    check(&sandbox).await;
    let taken = snapshot(&client, &sandbox.id).await.unwrap();
    assert_eq!(taken.state.as_known(), Some(SnapshotState::Ready), "{}", taken.failure_reason);
    grow(&client, &volume, 256 << 20).await.unwrap();
    sandbox.terminate().await.unwrap();
    drop(client);
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
    drop(server);
}

/// The session's state when it is none that passes.
async fn settled_state(client: &Client, id: &str) -> SessionState {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let state = client.session(id).await.unwrap().state.as_known().unwrap();
        if state != SessionState::Pausing {
            return state;
        }
        assert!(Instant::now() < deadline, "the failed pause is never taken back");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn snapshot(client: &Client, id: &str) -> Result<v1::Snapshot, ConnectError> {
    let request = v1::CreateSnapshotRequest { session_id: id.into(), ..Default::default() };
    let answer = client.control.create_snapshot(request).await?;
    Ok(answer.snapshot.as_option().cloned().unwrap_or_default())
}

async fn grow(client: &Client, id: &str, new_size_bytes: i64) -> Result<i64, ConnectError> {
    let request = v1::ResizeVolumeRequest { volume_id: id.into(), new_size_bytes };
    Ok(client.control.resize_volume(request).await?.volume.size_bytes)
}

/// Images are sparse, so a little growth may still fit; a refusal must leave the old size.
async fn grow_refused_or_harmless(client: &Client, id: &str) {
    let outcome = grow(client, id, 128 << 20).await;
    let request = v1::GetVolumeRequest { volume_id: id.into() };
    let size = client.control.get_volume(request).await.unwrap().volume.size_bytes;
    match outcome {
        Ok(_) => assert_eq!(size, 128 << 20),
        Err(error) => {
            assert_ne!(error.code, ErrorCode::Unknown, "{error}");
            assert_eq!(size, 64 << 20, "{error}");
        }
    }
}

/// The error names the cause in words a person understands.
fn refused<T>(what: &str, outcome: Result<T, ConnectError>) {
    let error = outcome.err().unwrap_or_else(|| panic!("{what} fitted on a full disk"));
    let message = error.message.clone().unwrap_or_default();
    println!("{what} on a full host: {message}");
    assert_eq!(error.code, ErrorCode::ResourceExhausted, "{what}: {error}");
    assert!(message.contains("space on the host's disk"), "{what}: {error}");
}

/// The sandbox runs commands and has its file.
async fn check(sandbox: &Sandbox) {
    assert_eq!(sandbox.shell("sha256sum -c sum", false).await, "kept: OK");
}
