//! Resume never loses a byte: sandboxes keep growing, checksummed logs while they are paused, resumed, snapshotted,
//! restored, forked, and while their server is killed at random moments. Every record that was acknowledged is
//! there afterwards, in every line of descent.
//!
//! `NAGAYA_KEEP_ROUNDS` sets how many things happen (default 200), `NAGAYA_KEEP_SEED` repeats the choices of an
//! earlier run as far as the machine's own timing lets it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use connectrpc::ConnectError;
use nagaya_api::nagaya::v1 as own;
use nagaya_api::tenki::v1::{self, SessionState, SnapshotState};
use nagaya_engine::fake::Rng;
use nagaya_testkit::{Client, Sandbox, Server, fresh_seed, leftovers, number, settle};

/// Sandboxes and snapshots alive at once.
const LINES_MAX: usize = 6;
const SNAPSHOTS_MAX: usize = 4;
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the server keeps memory of paused sandboxes here: about half of the pauses outlast it.
const CONFIGURATION: &str = "[pools]\nslots_ready = 4\nisolated_slots_ready = 4\n\
     [engine]\npause_in_memory_max_ms = 150\n";

/// What happens in the first rounds; the numbers are those of [`World::round`].
const OPENING: [u64; 6] = [0, 3, 5, 6, 7, 10];

/// Appends records `first..first + count`, each with a checksum, each on disk before the next.
const APPEND: &str = r#"
import os, sys, zlib
first, count = int(sys.argv[1]), int(sys.argv[2])
log = os.open("/home/tenki/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in range(first, first + count):
    text = "record %d %s" % (number, "x" * (number * 37 % 3000))
    os.write(log, ("%s %08x\n" % (text, zlib.crc32(text.encode()))).encode())
    os.fsync(log)
"#;

/// Prints how many records the log has, or fails at the first that is not what was written.
const COUNT: &str = r#"
import os, zlib
number = 0
if os.path.exists("/home/tenki/log"):
    for line in open("/home/tenki/log"):
        text, checksum = line.rstrip("\n").rsplit(" ", 1)
        assert int(checksum, 16) == zlib.crc32(text.encode()), "record %d is damaged" % number
        assert text.split(" ")[1] == str(number), "record %d is missing" % number
        number += 1
print(number)
"#;

/// A sandbox and what it was acknowledged to have.
#[derive(Debug, Clone)]
struct Line {
    id: String,
    /// Records 0..kept are on its disk.
    kept: u64,
    /// A process of it that lives as long as its memory does: its pid and start time inside, and that boot's id.
    process: String,
}

/// How often each thing happened.
type Tally = BTreeMap<&'static str, u64>;

struct World {
    server: Server,
    client: Client,
    runtime: tokio::runtime::Runtime,
    random: Rng,
    lines: Vec<Line>,
    /// Ids with the records that were acknowledged before each was asked for.
    snapshots: Vec<(String, u64)>,
    tally: Tally,
}

#[test]
fn no_acknowledged_record_is_lost_by_pauses_snapshots_forks_and_kills() {
    if !rustix::process::geteuid().is_root() {
        println!("never lose: not run: only root can start the namespace driver");
        return;
    }
    let rounds = number("NAGAYA_KEEP_ROUNDS").unwrap_or(200);
    let seed = number("NAGAYA_KEEP_SEED").unwrap_or_else(fresh_seed);
    println!("never lose: {rounds} rounds, repeat with NAGAYA_KEEP_SEED={seed}");
    let server = Server::start_with(CONFIGURATION);
    let mut world = World {
        client: Client::of(&server),
        server,
        runtime: tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap(),
        random: Rng::new(seed),
        lines: Vec::new(),
        snapshots: Vec::new(),
        tally: Tally::new(),
    };
    for round in 0..rounds {
        world.round(round);
    }
    world.verify_all();
    println!("never lose: {:?}", world.tally);
    for needed in ["append", "pause", "resume: memory", "resume: cold_boot", "snapshot", "restore", "fork", "kill"] {
        let happened = world.tally.get(needed).copied().unwrap_or(0);
        assert!(rounds < 200 || happened > 0, "{needed} never happened: {:?}", world.tally);
    }
    world.end();
}

#[test]
fn what_was_synced_to_a_volume_is_there_after_kills_and_ends_and_in_other_sandboxes() {
    if !rustix::process::geteuid().is_root() {
        println!("never lose: not run: only root can start the namespace driver");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut server = Server::start_with(CONFIGURATION);
    let client = Client::of(&server);
    let (volume, first) = runtime.block_on(async {
        let request = v1::CreateVolumeRequest { name: "kept".into(), size_bytes: 32 << 20, ..Default::default() };
        let volume = client.control.create_volume(request).await.unwrap().volume.id.clone();
        let first = create(&client, None).await.unwrap();
        mount(&client, &first.id, &volume, false).await.unwrap();
        first.shell("echo one >/mnt/kept/log && sync /mnt/kept/log", false).await;
        (volume, first.id)
    });
    server.kill();
    server.restart();
    let client = Client::of(&server);
    runtime.block_on(async {
        let first = client.attach(&first).await.unwrap();
        first.shell("echo two >>/mnt/kept/log && sync /mnt/kept/log", false).await;
        // Memory is given up, and with it the mount; a cold boot brings it back.
        pause(&client, &first.id).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        let resumed = resume(&client, &first.id).await.unwrap();
        assert_eq!(resumed.metadata.get("restore_mode").map(String::as_str), Some("cold_boot"));
        let first = client.attach(&first.id).await.unwrap();
        first.shell("echo three >>/mnt/kept/log && sync /mnt/kept/log", false).await;
        let second = create(&client, None).await.unwrap();
        let refused = mount(&client, &second.id, &volume, false).await.expect_err("a volume has one writer");
        assert!(refused.message.clone().unwrap_or_default().contains("volume is in use"), "{refused}");
        first.terminate().await.unwrap();
        let third = create(&client, None).await.unwrap();
        for reader in [&second, &third] {
            mount(&client, &reader.id, &volume, true).await.unwrap();
            assert_eq!(reader.shell("cat /mnt/kept/log", false).await, "one\ntwo\nthree");
            reader.shell("! echo four 2>/dev/null >>/mnt/kept/log", false).await;
        }
        for reader in [second, third] {
            reader.terminate().await.unwrap();
        }
        client.control.delete_volume(v1::DeleteVolumeRequest { volume_id: volume }).await.unwrap();
    });
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
}

async fn mount(client: &Client, id: &str, volume_id: &str, readonly: bool) -> Result<(), ConnectError> {
    let volume = v1::VolumeMount { volume_id: volume_id.into(), mount_path: "/mnt/kept".into(), readonly };
    let request = v1::AttachVolumeRequest { session_id: id.into(), volume: volume.into() };
    client.control.attach_volume(request).await.map(drop)
}

impl World {
    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn round(&mut self, round: u64) {
        if self.lines.is_empty() {
            let sandbox = self.runtime.block_on(create(&self.client, None)).unwrap();
            self.lines.push(Line { id: sandbox.id, kept: 0, process: String::new() });
        }
        let index = self.random.below(self.lines.len() as u64) as usize;
        let full = self.lines.len() >= LINES_MAX;
        let chance = self.random.below(12);
        // Each thing once at first: later there may be no room for some by chance.
        match OPENING.get(round as usize).copied().unwrap_or(chance) {
            0..=2 => self.append(index),
            3 | 4 => self.pause_and_resume(index),
            5 => self.snapshot(index),
            6 if !self.snapshots.is_empty() && !full => self.restore(),
            7 | 8 if !full => self.fork(index),
            9 if full => self.terminate(index),
            _ => self.kill(index),
        }
        if round % 10 == 9 {
            self.verify_all();
        }
    }

    fn append(&mut self, index: usize) {
        let count = 1 + self.random.below(5);
        let line = &mut self.lines[index];
        // Records that were written and not acknowledged are there too: go on after them.
        let first = self.runtime.block_on(verify(&self.client, line)).unwrap();
        let sandbox = self.runtime.block_on(self.client.attach(&line.id)).unwrap();
        self.runtime.block_on(append(&sandbox, first, count)).unwrap();
        line.kept = first + count;
        self.count("append");
    }

    fn pause_and_resume(&mut self, index: usize) {
        let line = self.lines[index].clone();
        let process = self.runtime.block_on(keep_process(&self.client, &line)).unwrap();
        self.lines[index].process = process;
        let paused = self.runtime.block_on(pause(&self.client, &line.id)).unwrap();
        assert_eq!(paused, SessionState::Paused);
        self.count("pause");
        // Sometimes long enough for the memory to be given up.
        std::thread::sleep(Duration::from_millis(self.random.below(400)));
        let resumed = self.runtime.block_on(resume(&self.client, &line.id)).unwrap();
        self.check_resumed(index, &resumed);
    }

    /// A resumed sandbox has its records; when it says that it has its memory, it has its processes.
    fn check_resumed(&mut self, index: usize, session: &v1::SandboxSession) {
        assert_eq!(session.state.as_known(), Some(SessionState::Running), "{}", session.last_resume_error);
        let line = &self.lines[index];
        self.runtime.block_on(verify(&self.client, line)).unwrap();
        let alive = self.runtime.block_on(process_lives(&self.client, line)).unwrap();
        match session.metadata.get("restore_mode").map(String::as_str) {
            Some("memory") => {
                assert!(alive, "{} was resumed from memory without its process", line.id);
                self.count("resume: memory");
            }
            Some("cold_boot") => {
                assert!(!alive);
                assert_eq!(session.metadata.get("restore_degraded").map(String::as_str), Some("true"));
                assert!(session.metadata.contains_key("restore_reason"));
                self.lines[index].process.clear();
                self.count("resume: cold_boot");
            }
            other => panic!("a resumed session says restore_mode {other:?}"),
        }
    }

    fn snapshot(&mut self, index: usize) {
        let line = &self.lines[index];
        let snapshot = self.runtime.block_on(snapshot(&self.client, &line.id)).unwrap();
        assert_eq!(snapshot.state.as_known(), Some(SnapshotState::Ready), "{}", snapshot.failure_reason);
        self.snapshots.push((snapshot.id, line.kept));
        self.count("snapshot");
        if self.snapshots.len() > SNAPSHOTS_MAX {
            // One that a living sandbox came from may not be deleted, and then it stays.
            let (id, kept) = self.snapshots.remove(0);
            let request = v1::DeleteSnapshotRequest { snapshot_id: id.clone() };
            match self.runtime.block_on(self.client.control.delete_snapshot(request)) {
                Ok(_) => self.count("snapshot deleted"),
                Err(error) => {
                    assert_eq!(error.code, connectrpc::ErrorCode::FailedPrecondition, "{error}");
                    self.snapshots.push((id, kept));
                }
            }
        }
    }

    fn restore(&mut self) {
        let index = self.random.below(self.snapshots.len() as u64) as usize;
        let (snapshot, kept) = self.snapshots[index].clone();
        let sandbox = self.runtime.block_on(create(&self.client, Some(snapshot))).unwrap();
        self.adopt_line(sandbox.id, kept);
        self.count("restore");
    }

    fn fork(&mut self, index: usize) {
        let line = self.lines[index].clone();
        let sessions = self.runtime.block_on(fork(&self.client, &line.id)).unwrap();
        assert_eq!(sessions.len(), 1);
        for id in sessions {
            self.runtime.block_on(until_running(&self.client, &id));
            self.adopt_line(id, line.kept);
        }
        self.count("fork");
    }

    fn adopt_line(&mut self, id: String, kept: u64) {
        let line = Line { id, kept, process: String::new() };
        self.runtime.block_on(verify(&self.client, &line)).unwrap();
        self.lines.push(line);
    }

    fn terminate(&mut self, index: usize) {
        let line = self.lines.remove(index);
        self.runtime.block_on(self.client.terminate(&line.id)).unwrap();
        self.count("terminate");
    }

    /// Kills the server at a random moment of something that is under way, and starts it again.
    fn kill(&mut self, index: usize) {
        let (client, line) = (self.client.clone(), self.lines[index].clone());
        let what = self.random.below(5);
        let snapshots: Vec<String> = self.snapshots.iter().map(|(id, _)| id.clone()).collect();
        let chosen = snapshots.get(self.random.below(snapshots.len().max(1) as u64) as usize).cloned();
        let work = self.runtime.spawn(async move {
            // Whether any of it succeeds is for the check after the restart to find out.
            match what {
                0 => drop(snapshot(&client, &line.id).await),
                1 => drop(fork(&client, &line.id).await),
                2 => drop(create(&client, chosen).await),
                _ => {
                    drop(pause(&client, &line.id).await);
                    drop(resume(&client, &line.id).await);
                }
            }
        });
        std::thread::sleep(Duration::from_millis(self.random.below(80)));
        self.server.kill();
        self.runtime.block_on(work).unwrap();
        self.server.restart();
        self.client = Client::of(&self.server);
        self.count("kill");
        self.runtime.block_on(end_strangers(&self.client, &self.lines));
        for index in 0..self.lines.len() {
            let id = self.lines[index].id.clone();
            let state = self.runtime.block_on(until_settled(&self.client, &id));
            if state == SessionState::Paused {
                let resumed = self.runtime.block_on(resume(&self.client, &id)).unwrap();
                assert_eq!(resumed.state.as_known(), Some(SessionState::Running), "{}", resumed.last_resume_error);
                self.lines[index].process.clear();
            }
        }
    }

    fn verify_all(&mut self) {
        for line in &self.lines {
            self.runtime.block_on(verify(&self.client, line)).unwrap();
        }
    }

    /// Removes everything, and finds nothing left.
    fn end(mut self) {
        self.runtime.block_on(end_strangers(&self.client, &[]));
        let request = v1::ListSnapshotsRequest { page_size: 100, ..Default::default() };
        let snapshots = self.runtime.block_on(self.client.control.list_snapshots(request)).unwrap().snapshots.clone();
        for snapshot in snapshots {
            let request = v1::DeleteSnapshotRequest { snapshot_id: snapshot.id };
            self.runtime.block_on(self.client.control.delete_snapshot(request)).unwrap();
        }
        let files = |directory: &str| files_below(&self.server.storage().join(directory));
        // Beside the images there is a file that names the host's run, and with the blobs their owner's name may be.
        settle("no blob and no image is left", || {
            files("blobs/chunks") + files("blobs/images") == 0 && files("disks") == 1
        });
        let status = self.server.terminate();
        assert!(status.success(), "the server ended with {status}:\n{}", self.server.log());
        self.server.purge();
        settle("nothing is left on the host", || leftovers(self.server.data_dir()).is_empty());
    }
}

async fn create(client: &Client, snapshot_id: Option<String>) -> Result<Sandbox, ConnectError> {
    let inherits = snapshot_id.is_some();
    let request = v1::CreateSessionRequest {
        owner_id: "self".into(),
        owner_type: "SERVICE".into(),
        cpu_cores: (!inherits).then_some(1),
        memory_mb: (!inherits).then_some(256),
        snapshot_id,
        wait_ready: true,
        ..Default::default()
    };
    let answer = client.control.create_session(request).await?;
    assert_eq!(answer.session.state.as_known(), Some(SessionState::Running), "{}", answer.session.terminal_error);
    assert_eq!(answer.session.memory_mb, 256, "a restored session inherits its machine");
    Ok(client.open(&answer.session.id, &answer.credential.credential))
}

async fn pause(client: &Client, id: &str) -> Result<SessionState, ConnectError> {
    let answer = client.control.pause_session(v1::PauseSessionRequest { session_id: id.into() }).await?;
    Ok(answer.session.state.as_known().unwrap())
}

async fn resume(client: &Client, id: &str) -> Result<v1::SandboxSession, ConnectError> {
    let answer = client.control.resume_session(v1::ResumeSessionRequest { session_id: id.into() }).await?;
    Ok(answer.session.as_option().cloned().unwrap_or_default())
}

async fn snapshot(client: &Client, id: &str) -> Result<v1::Snapshot, ConnectError> {
    let request = v1::CreateSnapshotRequest { session_id: id.into(), ..Default::default() };
    let answer = client.control.create_snapshot(request).await?;
    Ok(answer.snapshot.as_option().cloned().unwrap_or_default())
}

async fn fork(client: &Client, id: &str) -> Result<Vec<String>, ConnectError> {
    let request = own::ForkSessionRequest { session_id: id.into(), count: 1, ..Default::default() };
    let answer = client.own.fork_session(request).await?;
    assert_eq!(answer.memory_carried, Some(false), "this driver carries no memory, and must say so");
    Ok(answer.sessions.iter().map(|session| session.id.clone()).collect())
}

async fn append(sandbox: &Sandbox, first: u64, count: u64) -> Result<(), ConnectError> {
    let (first, count) = (first.to_string(), count.to_string());
    let finished = sandbox.run(&["python3", "-c", APPEND, &first, &count]).await?;
    assert_eq!(finished.exit.exit_code, 0, "{}", finished.describe());
    Ok(())
}

/// How many records there are, after making sure that all acknowledged ones are.
async fn verify(client: &Client, line: &Line) -> Result<u64, ConnectError> {
    let finished = client.attach(&line.id).await?.run(&["python3", "-c", COUNT]).await?;
    assert_eq!(finished.exit.exit_code, 0, "{}: {}", line.id, finished.describe());
    let found: u64 = finished.text().parse().unwrap();
    assert!(found >= line.kept, "{} has {found} records, but {} were acknowledged", line.id, line.kept);
    Ok(found)
}

/// Starts a process that lives as long as the sandbox's memory, unless there is one; tells which it is.
async fn keep_process(client: &Client, line: &Line) -> Result<String, ConnectError> {
    if process_lives(client, line).await? {
        return Ok(line.process.clone());
    }
    let request = v1::ExecuteCommandRequest {
        session_id: line.id.clone(),
        command: "sh".into(),
        args: vec!["-c".into(), "echo $$ >/tmp/pid.new && mv /tmp/pid.new /tmp/pid; exec sleep 100000".into()],
        stream_output: true,
        ..Default::default()
    };
    client.control.execute_command(request).await?;
    let script = "while [ ! -e /tmp/pid ]; do sleep 0.01; done; pid=$(cat /tmp/pid); rm /tmp/pid; \
                  echo $pid $(cut -d' ' -f22 /proc/$pid/stat) $(cat /proc/sys/kernel/random/boot_id)";
    let finished = client.attach(&line.id).await?.run(&["sh", "-c", script]).await?;
    Ok(finished.text())
}

async fn process_lives(client: &Client, line: &Line) -> Result<bool, ConnectError> {
    let Some((pid, started)) = line.process.split_once(' ') else { return Ok(false) };
    // Numbers and times begin anew with each boot, and may be those of another process then.
    let script = format!("echo $(cut -d' ' -f22 /proc/{pid}/stat) $(cat /proc/sys/kernel/random/boot_id)");
    let finished = client.attach(&line.id).await?.run(&["sh", "-c", &script]).await?;
    Ok(finished.text() == started)
}

async fn until_running(client: &Client, id: &str) {
    assert_eq!(until_settled(client, id).await, SessionState::Running);
}

/// The state of a session that is not on its way to another.
async fn until_settled(client: &Client, id: &str) -> SessionState {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let session = client.session(id).await.unwrap();
        match session.state.as_known().unwrap() {
            state @ (SessionState::Running | SessionState::Paused) => return state,
            SessionState::Creating | SessionState::Pausing | SessionState::Resuming => {}
            lost => panic!("{id} is {lost:?}: {}", session.terminal_error),
        }
        assert!(Instant::now() < deadline, "{id} does not settle");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Ends every session that is none of ours: made by calls that nobody got an answer to.
async fn end_strangers(client: &Client, lines: &[Line]) {
    loop {
        let request = v1::ListSessionsRequest { page_size: 100, ..Default::default() };
        let sessions = client.control.list_sessions(request).await.unwrap().sessions.clone();
        let strangers: Vec<String> = sessions
            .into_iter()
            .map(|session| session.id)
            .filter(|id| lines.iter().all(|line| line.id != *id))
            .collect();
        if strangers.is_empty() {
            return;
        }
        let request = v1::TerminateSessionsRequest { session_ids: strangers };
        let answer = client.control.terminate_sessions(request).await.unwrap();
        assert!(answer.failures.is_empty(), "{:?}", answer.failures);
    }
}

fn files_below(directory: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files_below(&entry.path()),
            _ => 1,
        })
        .sum()
}
