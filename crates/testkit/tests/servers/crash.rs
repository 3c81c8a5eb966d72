//! The server is killed at random moments under load. Afterwards no sandbox may be lost, none may
//! have come back from the dead, and when all are ended nothing of them may be left on the host.
//!
//! `NAGAYA_CRASH_KILLS` sets how often (default 50), `NAGAYA_CRASH_SEED` repeats the choices of
//! an earlier run as far as the machine's own timing lets it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use connectrpc::client::{ClientConfig, HttpClient};
use nagaya_api::tenki::v1::{self, SandboxServiceClient, SandboxSessionDataPlaneServiceClient, SessionState};
use nagaya_engine::fake::Rng;
use nagaya_testkit::{Kind, Leftovers, Server, fresh_seed, leftovers, number, settle};

const WORKERS: usize = 6;
/// Sandboxes alive at once, so that the load stays the same over the whole run.
const ALIVE_MAX: usize = 12;

/// What callers were told, which is what the server must keep.
#[derive(Default)]
struct Promises {
    /// Told RUNNING, and never asked to end.
    running: BTreeMap<String, Promise>,
    /// Asked to end, without an answer: either is right.
    unknown: BTreeSet<String>,
    /// Told TERMINATED.
    ended: BTreeSet<String>,
}

/// What a running sandbox was acknowledged to have.
#[derive(Clone, Default)]
struct Promise {
    /// What is in its file; 0 when the writing was not acknowledged.
    content: u64,
    /// A command that runs until it is ended.
    execution: Option<String>,
}

#[derive(Clone)]
struct Clients {
    control: SandboxServiceClient<HttpClient>,
    http: HttpClient,
    uri: http::Uri,
}

impl Clients {
    fn of(server: &Server) -> Self {
        let uri: http::Uri = server.endpoint().parse().unwrap();
        let http = HttpClient::plaintext_http2_only();
        let config = ClientConfig::new(uri.clone())
            .with_protocol(connectrpc::Protocol::Grpc)
            .with_default_header("authorization", format!("Bearer {}", server.api_key()))
            .with_default_timeout(Duration::from_secs(60));
        Self { control: SandboxServiceClient::new(http.clone(), config), http, uri }
    }

    async fn data(&self, id: &str) -> Option<SandboxSessionDataPlaneServiceClient<HttpClient>> {
        let request = v1::CreateSessionCredentialRequest { session_id: id.into() };
        let answer = self.control.create_session_credential(request).await.ok()?;
        let config = ClientConfig::new(self.uri.clone())
            .with_protocol(connectrpc::Protocol::Grpc)
            .with_default_header("x-tenki-session-cert", answer.credential.credential.clone())
            .with_default_timeout(Duration::from_secs(60));
        Some(SandboxSessionDataPlaneServiceClient::new(self.http.clone(), config))
    }
}

/// False, and said so, where the suite cannot run.
fn can_run() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("crash suite: not run: only root can start the namespace driver");
    }
    root
}

#[test]
fn a_server_told_to_stop_leaves_its_sandboxes_running_and_the_next_one_takes_them_over() {
    if !can_run() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut server = Server::start();
    let promises = Mutex::new(Promises::default());
    assert!(runtime.block_on(create(&Clients::of(&server), &promises, 42)));
    let status = server.terminate();
    assert!(status.success(), "the server ended with {status}:\n{}", server.log());
    assert!(leftovers(server.data_dir()).count(Kind::Process) >= 2, "the agent and the command should run on");
    server.restart();
    let clients = Clients::of(&server);
    runtime.block_on(check(&clients, &mut promises.lock().unwrap(), 0));
    runtime.block_on(end_everything(&clients));
    drop(clients);
    let status = server.terminate();
    assert!(status.success(), "the server ended with {status}:\n{}", server.log());
    server.purge();
    settle_empty(server.data_dir());
}

#[test]
fn nothing_is_lost_and_nothing_is_left_when_the_server_is_killed_at_random_moments_under_load() {
    if !can_run() {
        return;
    }
    let kills = number("NAGAYA_CRASH_KILLS").unwrap_or(50);
    let seed = number("NAGAYA_CRASH_SEED").unwrap_or_else(fresh_seed);
    println!("crash suite: {kills} kills, repeat with NAGAYA_CRASH_SEED={seed}");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let random = Arc::new(Mutex::new(Rng::new(seed)));
    let promises = Arc::new(Mutex::new(Promises::default()));

    let mut server = Server::start();
    for kill in 1..=kills {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = Clients::of(&server);
        let workers: Vec<_> = (0..WORKERS)
            .map(|_| runtime.spawn(load(clients.clone(), promises.clone(), random.clone(), stop.clone())))
            .collect();
        // The one wait that is meant: the moment of the accident.
        let accident = Duration::from_millis(random.lock().unwrap().below(400));
        std::thread::sleep(accident);
        server.kill();
        stop.store(true, Ordering::Relaxed);
        runtime.block_on(async {
            for worker in workers {
                worker.await.unwrap();
            }
        });
        server.restart();
        runtime.block_on(check(&Clients::of(&server), &mut promises.lock().unwrap(), kill));
    }

    let clients = Clients::of(&server);
    runtime.block_on(end_everything(&clients));
    settle("no sandbox's directory is left", || leftovers(server.data_dir()).count(Kind::Directory) == 0);
    drop(clients);
    let status = server.terminate();
    assert!(status.success(), "the server ended with {status}:\n{}", server.log());
    server.purge();
    settle_empty(server.data_dir());
    let promises = promises.lock().unwrap();
    println!(
        "crash suite: {} sandboxes ended, {} were still running at the end",
        promises.ended.len(),
        promises.running.len()
    );
    assert!(promises.ended.len() as u64 >= kills / 5, "too little happened for this to be a test");
}

/// Creates, uses and ends sandboxes until told to stop, or until the server is gone.
async fn load(clients: Clients, promises: Arc<Mutex<Promises>>, random: Arc<Mutex<Rng>>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let (alive, candidate) = {
            let promises = promises.lock().unwrap();
            let index = random.lock().unwrap().below(promises.running.len() as u64) as usize;
            (promises.running.len(), promises.running.keys().nth(index).cloned())
        };
        let (choice, content) = {
            let mut random = random.lock().unwrap();
            (random.below(3), random.next() | 1)
        };
        let went_well = match (choice, candidate) {
            (0, Some(id)) | (_, Some(id)) if alive >= ALIVE_MAX => end(&clients, &promises, id).await,
            (0, Some(id)) => use_sandbox(&clients, &id).await,
            (1, Some(id)) if alive > ALIVE_MAX / 2 => end(&clients, &promises, id).await,
            _ => create(&clients, &promises, content).await,
        };
        if !went_well {
            return;
        }
    }
}

async fn create(clients: &Clients, promises: &Mutex<Promises>, content: u64) -> bool {
    let request = v1::CreateSessionRequest {
        owner_id: "self".into(),
        owner_type: "SERVICE".into(),
        cpu_cores: Some(1),
        memory_mb: Some(128),
        wait_ready: true,
        ..Default::default()
    };
    let Ok(answer) = clients.control.create_session(request).await else { return false };
    assert_eq!(answer.session.state.as_known(), Some(SessionState::Running), "{}", answer.session.terminal_error);
    let id = answer.session.id.clone();
    let mut promise = Promise::default();
    let kept = keep(clients, &id, content, &mut promise).await;
    promises.lock().unwrap().running.insert(id, promise);
    kept.is_some()
}

/// Fills in what was acknowledged; `None` when the server was lost on the way.
async fn keep(clients: &Clients, id: &str, content: u64, promise: &mut Promise) -> Option<()> {
    let data = clients.data(id).await?;
    let request =
        v1::WriteFileRequest { session_id: id.into(), path: "promise".into(), content: content.to_string().into() };
    let request = v1::SandboxSessionDataPlaneServiceWriteFileRequest { request: request.into() };
    data.write_file(request).await.ok()?;
    promise.content = content;
    let request = v1::ExecuteCommandRequest {
        session_id: id.into(),
        command: "sh".into(),
        args: vec!["-c".into(), "echo begun; exec sleep 100000".into()],
        stream_output: true,
        ..Default::default()
    };
    let answer = clients.control.execute_command(request).await.ok()?;
    promise.execution = Some(answer.execution.id.clone());
    Some(())
}

async fn end(clients: &Clients, promises: &Mutex<Promises>, id: String) -> bool {
    // From here on it may be gone, whatever is answered.
    if promises.lock().unwrap().running.remove(&id).is_none() {
        return true;
    }
    promises.lock().unwrap().unknown.insert(id.clone());
    let request = v1::TerminateSessionRequest { session_id: id.clone() };
    if clients.control.terminate_session(request).await.is_err() {
        return false;
    }
    let mut promises = promises.lock().unwrap();
    promises.unknown.remove(&id);
    promises.ended.insert(id);
    true
}

async fn use_sandbox(clients: &Clients, id: &str) -> bool {
    let request = v1::ExecuteCommandRequest {
        session_id: id.into(),
        command: "sleep".into(),
        args: vec!["600".into()],
        stream_output: true,
        ..Default::default()
    };
    // Another worker may end the sandbox meanwhile; only a lost server ends this one's work.
    match clients.control.execute_command(request).await {
        Ok(_) => true,
        Err(error) => !matches!(error.code, connectrpc::ErrorCode::Unavailable),
    }
}

/// Every promise that was made before the server was killed still holds.
async fn check(clients: &Clients, promises: &mut Promises, kill: u64) {
    for (id, Promise { content, execution }) in &promises.running {
        let session = get(clients, id).await;
        assert_eq!(
            session.state.as_known(),
            Some(SessionState::Running),
            "after kill {kill} the sandbox {id} is lost: {}",
            session.terminal_error
        );
        let data = clients.data(id).await.expect("a running sandbox gives certificates");
        let request = v1::ReadFileRequest { session_id: id.clone(), path: "promise".into() };
        let request = v1::SandboxSessionDataPlaneServiceReadFileRequest { request: request.into() };
        match data.read_file(request).await {
            Ok(answer) if *content != 0 => assert_eq!(answer.response.content, content.to_string().as_bytes()),
            Ok(_) => {}
            Err(error) => assert_eq!(*content, 0, "after kill {kill} the sandbox {id} lost its file: {error}"),
        }
        if let Some(execution) = execution {
            check_running(clients, id, execution, kill).await;
        }
    }
    for id in std::mem::take(&mut promises.unknown) {
        let request = v1::TerminateSessionRequest { session_id: id.clone() };
        clients.control.terminate_session(request).await.unwrap();
        promises.ended.insert(id);
    }
    for id in &promises.ended {
        let state = get(clients, id).await.state.as_known();
        assert_eq!(state, Some(SessionState::Terminated), "after kill {kill} the sandbox {id} came back");
    }
}

/// The command from before the kill can be followed from its first byte, and has not ended.
async fn check_running(clients: &Clients, id: &str, execution: &str, kill: u64) {
    let request = v1::StreamCommandOutputRequest { session_id: id.into(), execution_id: execution.into() };
    let mut output = clients.control.stream_command_output(request).await.unwrap();
    let first = output.message().await.unwrap_or_else(|error| panic!("after kill {kill}, {id}: {error}"));
    let first = first.expect("the output has a beginning");
    assert!(!first.is_final, "after kill {kill} the command of {id} has ended");
    assert_eq!(first.data, "begun\n", "after kill {kill} the output of the command of {id} is not whole");
}

async fn get(clients: &Clients, id: &str) -> v1::SandboxSession {
    let request = v1::GetSessionRequest { session_id: id.into() };
    let answer = clients.control.get_session(request).await.unwrap();
    answer.session.as_option().expect("an answer has its session").clone()
}

/// Also the sandboxes whose creator never heard of them.
async fn end_everything(clients: &Clients) {
    loop {
        let request = v1::ListSessionsRequest { page_size: 100, ..Default::default() };
        let sessions = clients.control.list_sessions(request).await.unwrap().sessions.clone();
        if sessions.is_empty() {
            return;
        }
        let session_ids = sessions.into_iter().map(|session| session.id).collect();
        let request = v1::TerminateSessionsRequest { session_ids };
        let answer = clients.control.terminate_sessions(request).await.unwrap();
        assert!(answer.failures.is_empty(), "{:?}", answer.failures);
    }
}

fn settle_empty(data_dir: &std::path::Path) {
    let mut found = Leftovers::default();
    settle("nothing is left on the host", || {
        found = leftovers(data_dir);
        found.is_empty() || {
            println!("still there:\n{found}");
            false
        }
    });
}
