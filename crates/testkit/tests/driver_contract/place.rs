//! Where a driver is tried: the fake's world, or this host.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nagaya_api::ids::{DiskImageId, SessionId};
use nagaya_engine::fake::{FakeDriver, Fakes};
use nagaya_engine::model::{DiskOrigin, ImageUser, Resources, RootImage, SandboxSpec};
pub use nagaya_engine::ports::User;
use nagaya_engine::ports::{
    self, Adopted, Command, Driver, Ended, ExitStatus, Guest, GuestError, Host as _, HostEvent, Process, ProcessEvent,
    ProcessInput, WriteOptions,
};
use nagaya_runtime::host::{Config, Host, HostPort};
use nagaya_runtime::namespace::{self, NamespaceDriver, Pools};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// Sandboxes that fit into a place.
pub const SLOTS_MAX: u32 = 8;
/// Processes of one sandbox.
pub const PROCESSES_MAX: u64 = 128;
const WAIT_MAX: Duration = Duration::from_secs(30);

pub struct Place {
    kind: Kind,
    ends: mpsc::UnboundedReceiver<Ended>,
    pub events: mpsc::UnboundedReceiver<HostEvent>,
}

enum Kind {
    Fake(Arc<FakeDriver>),
    Namespace { data: TempDir, server: Option<Server>, shortcuts: bool },
}

/// What a server has of a host.
struct Server {
    host: Arc<Host>,
    driver: Arc<NamespaceDriver>,
}

impl Place {
    pub fn fake() -> Self {
        let driver = Fakes::new(1).driver;
        driver.set_sandboxes_max(Some(SLOTS_MAX as usize));
        let (ends, events) = (driver.ends(), driver.events());
        Self { kind: Kind::Fake(driver), ends, events }
    }

    /// `Err` says why this host has no namespace driver.
    pub async fn namespace() -> Result<Self, String> {
        Self::namespace_with(directory(), |_| ()).await
    }

    /// The same, but all that a sandbox's agent can do is left to it, as where sandboxes have a kernel of their own.
    pub async fn namespace_without_shortcuts() -> Result<Self, String> {
        Self::start(directory(), |_| (), false).await
    }

    /// A namespace driver with this data directory, set up otherwise than usual.
    pub async fn namespace_with(data: TempDir, set_up: impl FnOnce(&mut Config)) -> Result<Self, String> {
        Self::start(data, set_up, true).await
    }

    async fn start(data: TempDir, set_up: impl FnOnce(&mut Config), shortcuts: bool) -> Result<Self, String> {
        let server = start(data.path(), set_up, shortcuts).await?;
        let (ends, events) = (server.driver.ends(), HostPort(server.host.clone()).events());
        Ok(Self { kind: Kind::Namespace { data, server: Some(server), shortcuts }, ends, events })
    }

    /// The data directory of a driver that has one.
    pub fn data(&self) -> &Path {
        match &self.kind {
            Kind::Fake(_) => panic!("the fake has no directory"),
            Kind::Namespace { data, .. } => data.path(),
        }
    }

    /// The next sandbox that ended unasked: its id, whether it powered itself off, and the cause.
    pub async fn ended(&mut self) -> (SessionId, bool, String) {
        let Ended { id, powered_off, cause } =
            tokio::time::timeout(WAIT_MAX, self.ends.recv()).await.expect("an event").unwrap();
        (id, powered_off, cause)
    }

    /// A new sandbox: small, and without a way out.
    pub fn fresh(&self) -> SandboxSpec {
        let root = match &self.kind {
            Kind::Fake(driver) => RootImage {
                digest: driver.default_root(),
                layers: Vec::new(),
                user: ImageUser { name: "tenki".into(), uid: 1000, gid: 1000, home: "/home/tenki".into() },
                workdir: None,
                env: BTreeMap::new(),
            },
            Kind::Namespace { server, .. } => server.as_ref().expect(BETWEEN).host.default_root_image(),
        };
        let resources = Resources::of(1, 256, 5);
        SandboxSpec { resources, root, disk: DiskOrigin::Fresh, memory: None, outbound: false, egress: None }
    }

    pub fn from(&self, image: DiskImageId) -> SandboxSpec {
        SandboxSpec { disk: DiskOrigin::Image(image), ..self.fresh() }
    }

    pub fn kept(&self) -> SandboxSpec {
        SandboxSpec { disk: DiskOrigin::Kept, ..self.fresh() }
    }

    /// The host of a real driver, for another one on it.
    pub fn shared_host(&self) -> Arc<Host> {
        match &self.kind {
            Kind::Fake(_) => panic!("the fake is on no host"),
            Kind::Namespace { server, .. } => server.as_ref().expect(BETWEEN).host.clone(),
        }
    }

    pub fn host(&self) -> Arc<dyn ports::Host> {
        match &self.kind {
            Kind::Fake(driver) => driver.clone(),
            Kind::Namespace { server, .. } => Arc::new(HostPort(server.as_ref().expect(BETWEEN).host.clone())),
        }
    }

    pub fn driver(&self) -> Arc<dyn Driver> {
        match &self.kind {
            Kind::Fake(driver) => driver.clone(),
            Kind::Namespace { server, .. } => server.as_ref().expect(BETWEEN).driver.clone(),
        }
    }

    /// Another driver takes the place over, as after a restart of the server.
    pub async fn restart(&mut self) {
        self.restart_with(|| ()).await;
    }

    /// As [`Place::restart`]; `meanwhile` runs while no driver does.
    pub async fn restart_with(&mut self, meanwhile: impl FnOnce()) {
        match &mut self.kind {
            Kind::Fake(driver) => {
                driver.disconnect();
                meanwhile();
            }
            Kind::Namespace { data, server, shortcuts } => {
                drop(server.take());
                meanwhile();
                *server = Some(start(data.path(), |_| (), *shortcuts).await.unwrap());
            }
        }
        (self.ends, self.events) = (self.driver().ends(), self.host().events());
    }

    /// Kills a sandbox's first process behind the driver's back.
    pub async fn kill_first_process(&self, id: SessionId, guest: &dyn Guest) {
        match &self.kind {
            Kind::Fake(driver) => assert!(driver.kill(id, "the sandbox's first process was killed")),
            Kind::Namespace { .. } => {
                let (_command, host_pid) = marked_process(guest).await;
                let first = first_process_of(host_pid);
                let pid = rustix::process::Pid::from_raw(first).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            }
        }
    }

    /// Lets a sandbox power itself off.
    pub async fn power_off(&self, id: SessionId, guest: &dyn Guest) {
        match &self.kind {
            Kind::Fake(driver) => assert!(driver.power_off(id)),
            Kind::Namespace { .. } => {
                let asked = Command { user: User::Root, ..command(&["poweroff"]) };
                let mut process = guest.run(asked).await.unwrap();
                // Letting go of it would end it.
                while !matches!(process.events.recv().await, None | Some(ProcessEvent::Exit(_))) {}
            }
        }
    }

    /// Ends the sandboxes that a failed case left.
    pub async fn clear(&mut self) {
        let driver = self.driver();
        for id in driver.list().await.unwrap() {
            driver.destroy(id).await.unwrap();
        }
        for id in self.host().images().await.unwrap() {
            self.host().remove_image(id).await.unwrap();
        }
        drop(driver);
        self.settled().await;
        while self.ends.try_recv().is_ok() {}
        while self.events.try_recv().is_ok() {}
    }

    /// Ends all sandboxes and gives back what the driver set on the host.
    pub async fn close(mut self) {
        self.clear().await;
        if let Kind::Namespace { data, server, .. } = &mut self.kind {
            let Server { host, driver } = server.take().expect(BETWEEN);
            driver.settled().await;
            tokio::task::spawn_blocking(move || {
                driver.shut_down();
                host.remove();
            })
            .await
            .unwrap();
            let directory = data.path().to_owned();
            eventually("the host has nothing left of it", || {
                let found = nagaya_testkit::leftovers(&directory);
                found.is_empty() || {
                    println!("still there:\n{found}");
                    false
                }
            })
            .await;
        }
    }

    /// Waits until everything of destroyed sandboxes is gone.
    pub async fn settled(&self) {
        match &self.kind {
            Kind::Fake(driver) => {
                let gone = |id: &SessionId| !driver.sandboxes().contains_key(id);
                let listed = driver.list().await.unwrap();
                while !driver.sandboxes().keys().all(|id| listed.contains(id) || gone(id)) {
                    tokio::task::yield_now().await;
                }
            }
            Kind::Namespace { server, .. } => {
                server.as_ref().expect(BETWEEN).driver.settled().await;
            }
        }
    }
}

fn directory() -> TempDir {
    tempfile::Builder::new().prefix("nagaya-contract-").tempdir().unwrap()
}

/// What is not so.
const BETWEEN: &str = "there is a server between restarts";

async fn start(data: &Path, set_up: impl FnOnce(&mut Config), shortcuts: bool) -> Result<Server, String> {
    let mut config = Config::default();
    config.limits.slots_max = SLOTS_MAX;
    config.limits.processes_max = PROCESSES_MAX;
    set_up(&mut config);
    let data = data.to_owned();
    let open = move || Host::open(&data, config).and_then(|host| host.make_image().map(|()| host));
    let opened = tokio::task::spawn_blocking(open).await.unwrap();
    let own = namespace::Config { pools: Pools { slots_ready: 1, isolated_slots_ready: 1 }, shortcuts };
    let driver = |host: Arc<Host>| Arc::new(NamespaceDriver::start(host, "namespace", &own));
    opened.map(|host| Server { driver: driver(host.clone()), host }).map_err(|error| {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        text
    })
}

/// A session id that no other has.
pub fn fresh_id() -> SessionId {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut random = [0; 10];
    random[..8].copy_from_slice(&number.to_le_bytes());
    SessionId::new(1_767_225_600_000 + number, random)
}

pub fn command(argv: &[&str]) -> Command {
    Command { argv: argv.iter().map(|argument| (*argument).to_owned()).collect(), ..Command::default() }
}

#[derive(Debug, Default)]
pub struct Finished {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: ExitStatus,
}

impl Finished {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }
}

/// Reads a command's events to the end.
pub async fn finish(events: &mut mpsc::Receiver<ProcessEvent>) -> Finished {
    let mut finished = Finished::default();
    while let Some(event) = events.recv().await {
        match event {
            ProcessEvent::Stdout(bytes) => finished.stdout.extend_from_slice(&bytes),
            ProcessEvent::Stderr(bytes) => finished.stderr.extend_from_slice(&bytes),
            ProcessEvent::Exit(exit) => {
                finished.exit = exit;
                return finished;
            }
        }
    }
    panic!("the events ended without an exit, after {finished:?}");
}

pub async fn run(guest: &dyn Guest, command: Command) -> Finished {
    let mut process = guest.run(command).await.unwrap();
    finish(&mut process.events).await
}

pub fn user(privileged: bool) -> User {
    if privileged { User::Root } else { User::Image }
}

/// Output of a shell script that must succeed.
pub async fn shell(guest: &dyn Guest, script: &str) -> String {
    shell_as(guest, script, false).await
}

pub async fn shell_as(guest: &dyn Guest, script: &str, privileged: bool) -> String {
    let finished = run(guest, Command { user: user(privileged), ..command(&["/bin/sh", "-c", script]) }).await;
    assert_eq!(finished.exit.code, 0, "{script}\n{finished:?}");
    finished.text()
}

/// Waits until stdout holds this line.
pub async fn wait_for_line(process: &mut Process, line: &str) {
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).lines().any(|each| each.trim_end() == line) {
        match process.events.recv().await {
            Some(ProcessEvent::Stdout(bytes)) => text.extend_from_slice(&bytes),
            other => panic!("waiting for {line}: {other:?} after {}", String::from_utf8_lossy(&text)),
        }
    }
}

pub async fn write(guest: &dyn Guest, path: &str, content: &[u8]) -> Result<u64, GuestError> {
    let options = WriteOptions { mode: 0, truncate: true, sync: false };
    let writer = guest.write_file(path, options).await?;
    for chunk in content.chunks(64 << 10) {
        if writer.chunks.send(chunk.to_vec().into()).await.is_err() {
            break;
        }
    }
    writer.finish().await
}

pub async fn read(guest: &dyn Guest, path: &str) -> Result<Vec<u8>, GuestError> {
    read_part(guest, path, 0, 0).await
}

pub async fn read_part(guest: &dyn Guest, path: &str, offset: u64, length: u64) -> Result<Vec<u8>, GuestError> {
    let mut reader = guest.read_file(path, offset, length, 0).await?;
    let mut content = Vec::new();
    while let Some(chunk) = reader.chunks.recv().await {
        content.extend_from_slice(&chunk?);
    }
    Ok(content)
}

pub async fn adopt_running(driver: &dyn Driver, id: SessionId) -> Arc<dyn Guest> {
    match driver.adopt(id).await.unwrap() {
        Adopted::Running(guest) => guest,
        Adopted::Frozen(_) => panic!("the sandbox is frozen"),
        Adopted::Stopped { .. } => panic!("the sandbox is stopped"),
    }
}

/// Asks again and again until it is so.
pub async fn eventually(what: &str, mut ask: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT_MAX;
    while !ask() {
        assert!(Instant::now() < deadline, "after {WAIT_MAX:?} still not so: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn close_stdin(process: &Process) {
    process.input.send(ProcessInput::StdinClose).await.unwrap();
}

/// A process of the sandbox, waiting, and its number on the host.
pub async fn marked_process(guest: &dyn Guest) -> (Process, i32) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let marker = format!("marked-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let script = "echo started; read -r _ || true";
    let mut process = guest.run(Command { stdin: true, ..command(&["/bin/sh", "-c", script, &marker]) }).await.unwrap();
    wait_for_line(&mut process, "started").await;
    let host_pid = host_processes().into_iter().find(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).split('\0').any(|argument| argument == marker)
    });
    (process, host_pid.expect("the host sees the sandbox's processes"))
}

pub fn host_processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The host's number of process 1 in the namespace of this one.
pub fn first_process_of(host_pid: i32) -> i32 {
    let namespace = fs::read_link(format!("/proc/{host_pid}/ns/pid")).unwrap();
    let first = host_processes().into_iter().find(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let inner = status.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last());
        inner == Some("1") && fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|each| each == namespace)
    });
    first.expect("a sandbox has a first process")
}
