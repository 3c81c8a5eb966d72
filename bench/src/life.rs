//! What keeping sandboxes costs: pause, resume, snapshot, restore, fork, volumes.

use std::time::{Duration, Instant};

use nagaya_api::nagaya::v1 as nagaya;
use nagaya_api::tenki::v1;
use nagaya_testkit::{Client, Sandbox, Server, Wanted};

use crate::Effort;
use crate::samples::{Report, milliseconds};

const TRUE: &[&str] = &["/bin/true"];
const MEBIBYTE: i64 = 1 << 20;

/// Memory of paused sandboxes is given up at once in the server of the second kind.
fn server(pause_in_memory_max_ms: u64) -> (Server, Client) {
    let configuration = format!(
        "[pools]\nslots_ready = 4\nisolated_slots_ready = 16\n[engine]\npause_in_memory_max_ms = {pause_in_memory_max_ms}\n"
    );
    let server = Server::start_with(&configuration);
    let client = Client::of(&server);
    (server, client)
}

async fn sandbox(client: &Client) -> Sandbox {
    let sandbox = client.create(&Wanted::default()).await.expect("the server has room");
    must_run(&sandbox).await;
    sandbox
}

async fn must_run(sandbox: &Sandbox) {
    let finished = sandbox.run(TRUE).await.expect("the sandbox runs commands");
    assert_eq!(finished.exit.exit_code, 0, "{}", finished.describe());
}

async fn pause(client: &Client, id: &str) {
    let request = v1::PauseSessionRequest { session_id: id.into() };
    client.control.pause_session(request).await.expect("pausing works");
}

async fn resume(client: &Client, id: &str) -> String {
    let request = v1::ResumeSessionRequest { session_id: id.into() };
    let answer = client.control.resume_session(request).await.expect("resuming works");
    answer.session.metadata.get("restore_mode").cloned().unwrap_or_default()
}

pub async fn pauses(report: &mut Report, effort: Effort) {
    let (_server, client) = server(600_000);
    let sandbox = sandbox(&client).await;
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for _ in 0..effort.of(200, 10) {
        let start = Instant::now();
        pause(&client, &sandbox.id).await;
        pauses.push(milliseconds(start.elapsed()));
        let start = Instant::now();
        assert_eq!(resume(&client, &sandbox.id).await, "memory");
        resumes.push(milliseconds(start.elapsed()));
    }
    report.timing("pause, memory kept", pauses);
    report.timing("resume from memory", resumes);
    sandbox.terminate().await.expect("terminating works");

    let (_server, client) = server(0);
    let sandbox = self::sandbox(&client).await;
    let (mut boots, mut first) = (Vec::new(), Vec::new());
    for _ in 0..effort.of(30, 3) {
        pause(&client, &sandbox.id).await;
        // What is measured is the boot, not the rest of the stop before it.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let start = Instant::now();
        let mode = resume(&client, &sandbox.id).await;
        boots.push(milliseconds(start.elapsed()));
        assert_eq!(mode, "cold_boot");
        must_run(&client.attach(&sandbox.id).await.expect("a running sandbox gives certificates")).await;
        first.push(milliseconds(start.elapsed()));
    }
    report.timing("resume from disk", boots);
    report.timing("resume from disk + first exec", first);
    sandbox.terminate().await.expect("terminating works");
}

/// Fills the sandbox's disk with data that nothing can leave out.
async fn dirty(sandbox: &Sandbox, megabytes: usize) {
    let script = format!("head -c {megabytes}M /dev/urandom >dirty.$$ && sync");
    let finished = sandbox.run(&["/bin/sh", "-c", &script]).await.expect("the sandbox runs commands");
    assert_eq!(finished.exit.exit_code, 0, "{}", finished.describe());
}

pub async fn snapshots(report: &mut Report, effort: Effort) {
    for (name, megabytes, rounds) in [("10 MB", 10, effort.of(20, 3)), ("1 GB", 1024, effort.of(3, 1))] {
        let (_server, client) = server(600_000);
        let (mut taken, mut stopped, mut restored) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let source = sandbox(&client).await;
            dirty(&source, megabytes).await;
            let before = source_stopped_ms(&client).await;
            let start = Instant::now();
            let request = v1::CreateSnapshotRequest { session_id: source.id.clone(), ..Default::default() };
            let answer = client.control.create_snapshot(request).await.expect("snapshots can be taken");
            taken.push(milliseconds(start.elapsed()));
            stopped.push(source_stopped_ms(&client).await - before);
            let id = answer.snapshot.id.clone();
            source.terminate().await.expect("terminating works");

            let start = Instant::now();
            let request = v1::CreateSessionRequest {
                owner_id: "self".into(),
                owner_type: "SERVICE".into(),
                snapshot_id: Some(id.clone()),
                wait_ready: true,
                ..Default::default()
            };
            let answer = client.control.create_session(request).await.expect("snapshots can be restored");
            let sandbox = client.open(&answer.session.id, &answer.credential.credential);
            must_run(&sandbox).await;
            restored.push(milliseconds(start.elapsed()));
            sandbox.terminate().await.expect("terminating works");
            let request = v1::DeleteSnapshotRequest { snapshot_id: id };
            client.control.delete_snapshot(request).await.expect("unused snapshots can be deleted");
        }
        report.timing(&format!("snapshot, {name} dirty"), taken);
        report.timing(&format!("snapshot, {name} dirty: source stopped"), stopped);
        report.timing(&format!("restore, {name} dirty: to first exec"), restored);
    }
}

/// How long all snapshots' sources were frozen together, as the server's metrics tell.
async fn source_stopped_ms(client: &Client) -> f64 {
    client.metric("nagaya_snapshot_source_stopped_seconds_sum").await.unwrap_or(0.0) * 1e3
}

pub async fn forks(report: &mut Report, effort: Effort) {
    let (_server, client) = server(600_000);
    let source = sandbox(&client).await;
    dirty(&source, 10).await;
    for count in [1, 10] {
        let mut samples = Vec::new();
        for _ in 0..effort.of(20, 2) {
            let start = Instant::now();
            let request = nagaya::ForkSessionRequest { session_id: source.id.clone(), count, ..Default::default() };
            let answer = client.own.fork_session(request).await.expect("forking works");
            let forks: Vec<String> = answer.sessions.iter().map(|session| session.id.clone()).collect();
            for id in &forks {
                client.wait_running(id).await.expect("forks start");
                must_run(&client.attach(id).await.expect("a running sandbox gives certificates")).await;
            }
            samples.push(milliseconds(start.elapsed()));
            for id in forks {
                client.terminate(&id).await.expect("terminating works");
            }
        }
        report.timing(&format!("fork x {count}, 10 MB dirty: to first exec of all"), samples);
    }
    source.terminate().await.expect("terminating works");
}

pub async fn volumes(report: &mut Report, effort: Effort) {
    let (_server, client) = server(600_000);
    let sandbox = sandbox(&client).await;
    let request = v1::CreateVolumeRequest { name: "bench".into(), size_bytes: 1024 * MEBIBYTE, ..Default::default() };
    let id = client.control.create_volume(request).await.expect("volumes can be made").volume.id.clone();
    let (mut attach, mut detach) = (Vec::new(), Vec::new());
    for _ in 0..effort.of(30, 3) {
        let start = Instant::now();
        let volume = v1::VolumeMount { volume_id: id.clone(), mount_path: "/mnt/bench".into(), readonly: false };
        let request = v1::AttachVolumeRequest { session_id: sandbox.id.clone(), volume: volume.into() };
        client.control.attach_volume(request).await.expect("volumes can be attached");
        attach.push(milliseconds(start.elapsed()));
        let start = Instant::now();
        let request =
            v1::DetachVolumeRequest { session_id: sandbox.id.clone(), volume_id: id.clone(), force_detach: false };
        client.control.detach_volume(request).await.expect("idle volumes can be detached");
        detach.push(milliseconds(start.elapsed()));
    }
    report.timing("volume attach to a running sandbox", attach);
    report.timing("volume detach", detach);
    sandbox.terminate().await.expect("terminating works");
    let request = v1::DeleteVolumeRequest { volume_id: id };
    client.control.delete_volume(request).await.expect("unused volumes can be deleted");
}
