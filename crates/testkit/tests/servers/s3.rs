//! Snapshots of a real server with a bucket behind it, on a real S3 server that is spoken to over a socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::{TokioExecutor, TokioIo};
use nagaya_api::tenki::v1::{self, SessionState, SnapshotDurabilityState as Durability, SnapshotState};
use nagaya_testkit::{Client, Sandbox, Server, Wanted, settle};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const BUCKET: &str = "snapshots";
const DEADLINE: Duration = Duration::from_secs(60);

/// Keeps its objects as files below a directory, and checks signatures.
struct Bucket {
    directory: TempDir,
    port: u16,
    serving: JoinHandle<()>,
}

impl Bucket {
    async fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("nagaya-bucket-").tempdir().unwrap();
        fs::create_dir(directory.path().join(BUCKET)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(serve(listener, directory.path().to_owned()));
        Self { directory, port, serving }
    }

    /// Nobody listens any more; what was kept stays.
    async fn stop(&mut self) {
        self.serving.abort();
        let _ = (&mut self.serving).await;
    }

    async fn start_again(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).await.unwrap();
        self.serving = tokio::spawn(serve(listener, self.directory.path().to_owned()));
    }

    fn objects(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        files(&self.directory.path().join(BUCKET), &mut found);
        found
    }

    fn configuration(&self) -> String {
        let credentials = self.directory.path().join("credentials");
        fs::write(&credentials, "an-access-key\na-secret-access-key\n").unwrap();
        fs::set_permissions(&credentials, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        format!(
            "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n[blobs.s3]\nbucket = \"{BUCKET}\"\nprefix = \"one\"\n\
             endpoint = \"http://127.0.0.1:{}\"\nallow_http = true\ncredentials_file = \"{}\"\n",
            self.port,
            credentials.display()
        )
    }
}

async fn serve(listener: TcpListener, directory: PathBuf) {
    let mut service = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(directory).unwrap());
    service.set_auth(s3s::auth::SimpleAuth::from_single("an-access-key", "a-secret-access-key"));
    let service = service.build();
    // Connections end with the listener, as those of a server that was stopped.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (socket, _) = listener.accept().await.unwrap();
        let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        let connection = builder.serve_connection(TokioIo::new(socket), service.clone()).into_owned();
        connections.spawn(async move {
            let _ = connection.await;
        });
    }
}

/// Every file of the store itself: not its own notes, which begin with a dot.
fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => files(&entry.path(), found),
            false if !entry.file_name().to_string_lossy().starts_with('.') => found.push(entry.path()),
            false => {}
        }
    }
}

async fn snapshot(client: &Client, sandbox: &Sandbox) -> v1::Snapshot {
    let request = v1::CreateSnapshotRequest { session_id: sandbox.id.clone(), ..Default::default() };
    let snapshot = client.control.create_snapshot(request).await.unwrap().snapshot.as_option().cloned().unwrap();
    assert_eq!(snapshot.state.as_known(), Some(SnapshotState::Ready), "{}", snapshot.failure_reason);
    snapshot
}

async fn until(client: &Client, id: &str, wanted: Durability) -> v1::Snapshot {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let request = v1::GetSnapshotRequest { snapshot_id: id.into() };
        let snapshot = client.control.get_snapshot(request).await.unwrap().snapshot.as_option().cloned().unwrap();
        if snapshot.durability_state.as_known() == Some(wanted) {
            return snapshot;
        }
        assert!(Instant::now() < deadline, "{id} is {:?} and not {wanted:?}", snapshot.durability_state);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A sandbox made from a snapshot, or why there is none.
async fn restore(client: &Client, snapshot: &v1::Snapshot) -> Result<Sandbox, String> {
    let request = v1::CreateSessionRequest {
        owner_id: "self".into(),
        owner_type: "SERVICE".into(),
        snapshot_id: Some(snapshot.id.clone()),
        wait_ready: true,
        ..Default::default()
    };
    let answer = client.control.create_session(request).await.map_err(|error| error.to_string())?;
    match answer.session.state.as_known() {
        Some(SessionState::Running) => Ok(client.attach(&answer.session.id).await.unwrap()),
        _ => Err(answer.session.terminal_error.clone()),
    }
}

/// What this machine has of the snapshots' bytes is lost; who it is, is not.
fn lose_local(server: &Server) {
    for kind in ["chunks", "images"] {
        let directory = server.storage().join("blobs").join(kind);
        fs::remove_dir_all(&directory).unwrap();
        fs::create_dir(&directory).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_survive_this_machine_in_a_bucket_and_leave_it_when_they_are_deleted() {
    if !rustix::process::geteuid().is_root() {
        println!("s3: not run: only root can start the namespace driver");
        return;
    }
    let mut bucket = Bucket::start().await;
    let mut server = Server::start_with(&bucket.configuration());
    let client = Client::of(&server);
    let source = client.create(&Wanted::default()).await.unwrap();
    source.shell("head -c 5M /dev/urandom >kept && sha256sum kept >sum && sync", false).await;

    // The bucket is away for a while: what is here can be used, and says that it is only here.
    bucket.stop().await;
    let first = snapshot(&client, &source).await;
    let failed = until(&client, &first.id, Durability::PropagationFailed).await;
    assert!(!failed.propagation_error.is_empty() && !failed.propagation_error.contains("a-secret-access-key"));
    bucket.start_again().await;
    let second = snapshot(&client, &source).await;
    until(&client, &second.id, Durability::Durable).await;
    assert!(!bucket.objects().is_empty());
    // A server that starts again brings there what was not.
    drop(client);
    assert!(server.terminate().success(), "{}", server.log());
    server.restart();
    let client = Client::of(&server);
    until(&client, &first.id, Durability::Durable).await;

    // Everything here is lost.
    drop(client);
    server.kill();
    lose_local(&server);
    server.restart();
    let client = Client::of(&server);
    for taken in [&first, &second] {
        let copy = restore(&client, taken).await.unwrap();
        assert_eq!(copy.shell("sha256sum -c sum", false).await, "kept: OK");
        copy.terminate().await.unwrap();
    }

    // One part is lost here and changed there: nothing starts, and the part is named.
    drop(client);
    server.kill();
    lose_local(&server);
    let largest = bucket.objects().into_iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let whole = fs::read(&largest).unwrap();
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    fs::write(&largest, changed).unwrap();
    server.restart();
    let client = Client::of(&server);
    let refused = restore(&client, &second).await.err().expect("a damaged snapshot starts nothing");
    let digest = largest.file_name().unwrap().to_string_lossy().into_owned();
    assert!(refused.contains("is corrupt") && refused.contains(&digest), "{digest}: {refused}");
    fs::write(&largest, whole).unwrap();
    let copy = restore(&client, &second).await.unwrap();
    assert_eq!(copy.shell("sha256sum -c sum", false).await, "kept: OK");

    for id in [&source.id, &copy.id] {
        client.terminate(id).await.unwrap();
    }
    for taken in [&first, &second] {
        let request = v1::DeleteSnapshotRequest { snapshot_id: taken.id.clone() };
        client.control.delete_snapshot(request).await.unwrap();
    }
    settle("nothing is left in the bucket", || {
        bucket.objects().iter().all(|path| fs::metadata(path).unwrap().len() < 1 << 10)
    });
    drop(client);
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
}
