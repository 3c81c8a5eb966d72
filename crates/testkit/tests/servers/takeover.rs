//! A data directory of the version before is taken over with everything in it.
//!
//! `NAGAYA_OLD_BIN` names a binary of an earlier version, e.g. built from the commit before a change of what is kept:
//! `cargo build --bin nagaya` in a worktree of that commit. Without it the test is not run; see CONTRIBUTING.md.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nagaya_api::nagaya::v1 as own;
use nagaya_api::tenki::v1::{self, SessionState, SnapshotState};
use nagaya_testkit::{Client, Sandbox, Server, Wanted};

const MIB: i64 = 1 << 20;

/// Counts on, once a second, from when its sandbox was started.
const TICKS: &str =
    "nohup sh -c 'n=0; while :; do n=$((n + 1)); echo $n > /home/tenki/ticks; sleep 0.2; done' > /dev/null 2>&1 &";

async fn new(client: &Client, name: &str) -> Sandbox {
    let wanted = Wanted { name: name.into(), cpu_cores: 1, memory_mb: 256, inbound: true, ..Wanted::default() };
    let sandbox = client.create(&wanted).await.unwrap();
    sandbox.write("/home/tenki/note", name.to_owned()).await.unwrap();
    sandbox.shell("sync", false).await;
    sandbox
}

async fn state(client: &Client, id: &str) -> SessionState {
    client.session(id).await.unwrap().state.as_known().unwrap()
}

async fn snapshot_state(client: &Client, id: &str) -> SnapshotState {
    let request = v1::GetSnapshotRequest { snapshot_id: id.into() };
    client.control.get_snapshot(request).await.unwrap().snapshot.state.as_known().unwrap()
}

async fn resume(client: &Client, id: &str) -> Sandbox {
    client.control.resume_session(v1::ResumeSessionRequest { session_id: id.into() }).await.unwrap();
    client.wait_running(id).await.unwrap();
    client.attach(id).await.unwrap()
}

async fn text(sandbox: &Sandbox, path: &str) -> String {
    String::from_utf8(sandbox.read(path).await.unwrap().to_vec()).unwrap().trim().to_owned()
}

/// A directory of the last server that knew one image, one driver and whole units. Its host was started again since: two
/// sandboxes ran, of which one was paused, and one had powered itself off. The base layer under their disks is a made-up one.
const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/data-of-schema-6.tar.gz");
const KEY: &str = "tk_of_a_test_that_takes_data_over_0123456789";

#[test]
fn a_directory_of_schema_6_is_taken_over() {
    if !rustix::process::geteuid().is_root() {
        println!("take-over: not run: only root can start the namespace driver");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let server = Server::start_on(Path::new(DATA), KEY);
    runtime.block_on(async {
        let client = Client::new(server.endpoint(), KEY);
        let list = client.control.list_sessions(v1::ListSessionsRequest::default()).await.unwrap().sessions.clone();
        let find = |name: &str| list.iter().find(|session| session.name == name).unwrap().clone();
        let states = ["running", "paused", "off"].map(|name| find(name).state.as_known().unwrap());
        assert_eq!(states, [SessionState::Paused, SessionState::Paused, SessionState::UserShutdown]);
        let off = find("off");
        assert_eq!((off.cpu_cores, off.memory_mb, off.disk_size_gb), (2, 512, 5));
        assert_eq!(find("paused").metadata.get("restore_mode").map(String::as_str), Some("memory"));

        let explained = own::ExplainSessionRequest { session_id: off.id.clone() };
        let explained = client.own.explain_session(explained).await.unwrap();
        assert_eq!((explained.driver.as_str(), explained.root_image.as_str()), ("namespace", "host:0000000000000000"));
        for name in ["running", "paused", "off"] {
            let sandbox = resume(&client, &find(name).id).await;
            assert_eq!(text(&sandbox, "/home/tenki/note").await, name);
            assert_eq!(
                sandbox.shell("id -un; ls /etc", false).await,
                "tenki\ngroup\npasswd",
                "it stands on its own image"
            );
        }
        let running = client.attach(&find("running").id).await.unwrap();
        assert_eq!(text(&running, "/data/note").await, "volume");
        let ports = v1::ListExposedPortsRequest { session_id: running.id.clone() };
        assert_eq!(client.control.list_exposed_ports(ports).await.unwrap().ports[0].port, 8000);

        let snapshots = client.control.list_snapshots(v1::ListSnapshotsRequest::default()).await.unwrap();
        let kept = snapshots.snapshots.iter().find(|snapshot| snapshot.name.as_deref() == Some("kept")).unwrap();
        let request = v1::CreateSessionRequest {
            owner_id: "self".into(),
            owner_type: "USER".into(),
            snapshot_id: Some(kept.id.clone()),
            wait_ready: true,
            ..Default::default()
        };
        let restored = client.control.create_session(request).await.unwrap().session.id.clone();
        assert_eq!(text(&client.attach(&restored).await.unwrap(), "/home/tenki/note").await, "running");
    });
}

#[test]
fn everything_of_the_version_before_is_there() {
    let Some(old) = std::env::var_os("NAGAYA_OLD_BIN").map(PathBuf::from) else {
        println!("take-over: not run: NAGAYA_OLD_BIN names no server of an earlier version");
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut server = Server::start_version(&old);
    let ids = runtime.block_on(async {
        let client = Client::of(&server);
        let running = new(&client, "running").await;
        running.shell(TICKS, false).await;
        let frozen = new(&client, "frozen").await;
        frozen.shell(TICKS, false).await;
        let off = new(&client, "off").await;
        let resumed = new(&client, "resumed").await;

        let request = v1::CreateVolumeRequest { name: "data".into(), size_bytes: 16 * MIB, ..Default::default() };
        let volume = client.control.create_volume(request).await.unwrap().volume.id.clone();
        let mount = v1::VolumeMount { volume_id: volume.clone(), mount_path: "/data".into(), ..Default::default() };
        let request = v1::AttachVolumeRequest { session_id: running.id.clone(), volume: mount.into() };
        client.control.attach_volume(request).await.unwrap();
        running.write("/data/note", "on the volume").await.unwrap();
        let request = v1::CreateSnapshotRequest { session_id: running.id.clone(), ..Default::default() };
        let snapshot = client.control.create_snapshot(request).await.unwrap().snapshot.id.clone();
        while snapshot_state(&client, &snapshot).await != SnapshotState::Ready {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let exposed = v1::ExposePortRequest { session_id: running.id.clone(), port: 8000, ..Default::default() };
        let url = client.control.expose_port(exposed).await.unwrap().preview_url.clone();

        for sandbox in [&frozen, &resumed] {
            let pause = v1::PauseSessionRequest { session_id: sandbox.id.clone() };
            client.control.pause_session(pause).await.unwrap();
        }
        client.control.resume_session(v1::ResumeSessionRequest { session_id: resumed.id.clone() }).await.unwrap();
        let _ = off.run_as(&["poweroff"], true).await;
        while state(&client, &off.id).await != SessionState::UserShutdown {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        (running.id, frozen.id, off.id, resumed.id, volume, snapshot, url)
    });
    let (running, frozen, off, resumed, volume, snapshot, url) = ids;
    server.terminate();

    server.update();
    server.restart();
    runtime.block_on(async {
        let client = Client::of(&server);
        assert_eq!(state(&client, &running).await, SessionState::Running);
        assert_eq!(state(&client, &frozen).await, SessionState::Paused);
        assert_eq!(state(&client, &off).await, SessionState::UserShutdown);

        // Processes went on, or stand where they stood; commands, files and volumes are there.
        let sandbox = client.attach(&running).await.unwrap();
        assert_eq!(text(&sandbox, "/home/tenki/note").await, "running");
        assert_eq!(text(&sandbox, "/data/note").await, "on the volume");
        let before: u64 = text(&sandbox, "/home/tenki/ticks").await.parse().unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let after: u64 = text(&sandbox, "/home/tenki/ticks").await.parse().unwrap();
        assert!(before > 3 && after > before, "its processes were started again: {before}, {after}");
        assert_eq!(sandbox.shell("id -un", false).await, "tenki");
        let session = client.session(&running).await.unwrap();
        assert_eq!((session.cpu_cores, session.memory_mb, session.disk_size_gb), (1, 256, 5));
        assert_eq!(session.metadata.get("nagaya_driver").map(String::as_str), Some("namespace"));
        let told = client.session(&resumed).await.unwrap().metadata;
        assert_eq!(told.get("restore_mode").map(String::as_str), Some("memory"), "{told:?}");

        let sandbox = resume(&client, &frozen).await;
        let ticks: u64 = text(&sandbox, "/home/tenki/ticks").await.parse().unwrap();
        assert!(ticks > 0 && text(&sandbox, "/home/tenki/note").await == "frozen");
        let sandbox = resume(&client, &off).await;
        assert_eq!(text(&sandbox, "/home/tenki/note").await, "off");

        // What is made of what was kept.
        assert_eq!(snapshot_state(&client, &snapshot).await, SnapshotState::Ready);
        let request = v1::CreateSessionRequest {
            owner_id: "self".into(),
            owner_type: "SERVICE".into(),
            name: "restored".into(),
            snapshot_id: Some(snapshot),
            wait_ready: true,
            ..Default::default()
        };
        let restored = client.control.create_session(request).await.unwrap();
        let restored = client.attach(&restored.session.id).await.unwrap();
        assert_eq!(text(&restored, "/home/tenki/note").await, "running");
        let request = own::ForkSessionRequest { session_id: running.clone(), count: 1, ..Default::default() };
        let fork = client.own.fork_session(request).await.unwrap().sessions[0].id.clone();
        client.wait_running(&fork).await.unwrap();
        assert_eq!(text(&client.attach(&fork).await.unwrap(), "/home/tenki/note").await, "running");

        let ports = client.control.list_exposed_ports(v1::ListExposedPortsRequest { session_id: running.clone() });
        assert!(ports.await.unwrap().ports.iter().any(|port| port.preview_url == url), "the preview keeps its URL");

        // A sandbox that was started by the old server stops and starts under the new one, over its own image.
        let sandbox = client.attach(&running).await.unwrap();
        let _ = sandbox.run_as(&["poweroff"], true).await;
        while state(&client, &running).await != SessionState::UserShutdown {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let sandbox = resume(&client, &running).await;
        assert_eq!(text(&sandbox, "/home/tenki/note").await, "running");
        assert_eq!(text(&sandbox, "/data/note").await, "on the volume");
        let detach = v1::DetachVolumeRequest { session_id: running.clone(), volume_id: volume, ..Default::default() };
        client.control.detach_volume(detach).await.unwrap();
    });
}
