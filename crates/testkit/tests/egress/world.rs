//! A server, and an internet of its own behind it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use connectrpc::ConnectError;
use nagaya_api::nagaya::v1::{ListSessionConnectionsRequest, SessionConnection, UpdateSessionEgressRequest};
use nagaya_api::tenki::v1::{self, SessionEgressPolicy};
use nagaya_testkit::{Client, Running, Sandbox, Server};

const OUTSIDE: &str = include_str!("outside.py");
const PYTHON: &str = "/usr/bin/python3";
/// Where something echoes on port 80.
pub const ECHOES: [&str; 12] = [
    "11.22.33.1",
    "11.22.33.2",
    "11.22.33.3",
    "11.22.33.4",
    "11.22.33.5",
    "11.22.33.6",
    "11.22.33.7",
    "11.22.33.8",
    "11.22.33.9",
    "11.22.33.10",
    "11.22.33.11",
    "10.77.0.5",
];

/// Says whether something can be reached: NAME PORT, then `REACHED` or why not.
const REACH: &str = "
import socket, sys
try:
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3) as stream:
        stream.sendall(b'hello')
        stream.settimeout(3)
        print('REACHED' if stream.recv(16) == b'hello' else 'SILENT')
except OSError as error:
    print(type(error).__name__, error)
";

pub struct World {
    pub server: Server,
    pub client: Client,
    machine: Child,
    echoes: Child,
}

impl World {
    pub fn make() -> Self {
        let mut sleeper = Command::new("unshare");
        sleeper.args(["--net", "--", "/bin/sh", "-c", "echo READY; read -r _"]);
        let machine = started(sleeper);
        let pid = machine.id();
        must("ip link set lo up");
        // An address of the host that looks public.
        must("ip addr add 11.99.0.1/32 dev lo");
        must(&format!("ip link add outside0 type veth peer name outside1 netns {pid}"));
        must("ip addr add 198.51.100.1/24 dev outside0");
        must("ip link set outside0 up");
        let there = |line: &str| must(&format!("nsenter --net=/proc/{pid}/ns/net {line}"));
        there("ip link set lo up");
        there("ip addr add 198.51.100.2/24 dev outside1");
        there("ip link set outside1 up");
        there("ip route add default via 198.51.100.1");
        for address in ECHOES.iter().chain(&["11.22.33.53"]) {
            there(&format!("ip addr add {address}/32 dev lo"));
        }
        must("ip route add default via 198.51.100.2");
        let mut echoes = Command::new("nsenter");
        echoes.arg(format!("--net=/proc/{pid}/ns/net")).args([PYTHON, "-c", OUTSIDE]).args(ECHOES);
        let echoes = started(echoes);
        let configuration = "[pools]\nslots_ready = 4\nisolated_slots_ready = 1\n\
                             [network]\ncidr = \"10.200.0.0/16\"\nname_server = \"11.22.33.53\"\n";
        let server = Server::start_with(configuration);
        let client = Client::of(&server);
        Self { server, client, machine, echoes }
    }

    pub async fn sandbox(&self, egress: Option<SessionEgressPolicy>) -> Sandbox {
        self.create(true, egress).await.unwrap()
    }

    pub async fn create(&self, outbound: bool, egress: Option<SessionEgressPolicy>) -> Result<Sandbox, ConnectError> {
        self.create_from(v1::CreateSessionRequest {
            owner_id: "self".into(),
            owner_type: "SERVICE".into(),
            cpu_cores: Some(1),
            memory_mb: Some(512),
            allow_outbound: Some(outbound),
            egress: egress.into(),
            wait_ready: true,
            ..Default::default()
        })
        .await
    }

    pub async fn create_from(&self, request: v1::CreateSessionRequest) -> Result<Sandbox, ConnectError> {
        let answer = self.client.control.create_session(request).await?;
        if answer.session.state.as_known() != Some(v1::SessionState::Running) {
            return Err(ConnectError::internal(format!("not running: {}", answer.session.terminal_error)));
        }
        Ok(self.client.open(&answer.session.id, &answer.credential.credential))
    }

    /// After a restart of the server: the same sandbox at its new port.
    pub async fn again(&self, sandbox: &Sandbox) -> Sandbox {
        self.client.attach(&sandbox.id).await.unwrap()
    }

    pub async fn set(
        &self,
        sandbox: &Sandbox,
        egress: Option<SessionEgressPolicy>,
    ) -> Result<v1::SandboxSession, ConnectError> {
        let request = UpdateSessionEgressRequest { session_id: sandbox.id.clone(), egress: egress.into() };
        let answer = self.client.own.update_session_egress(request).await?;
        Ok(answer.session.as_option().cloned().unwrap())
    }

    pub async fn connections(&self, sandbox: &Sandbox) -> Vec<SessionConnection> {
        let request = ListSessionConnectionsRequest { session_id: sandbox.id.clone() };
        self.client.own.list_session_connections(request).await.unwrap().connections.clone()
    }

    /// Waits until the log has what is looked for: the kernel tells of packets a moment later.
    pub async fn logged(&self, sandbox: &Sandbox, is: impl Fn(&SessionConnection) -> bool) -> SessionConnection {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let all = self.connections(sandbox).await;
            if let Some(found) = all.iter().find(|connection| is(connection)) {
                return found.clone();
            }
            assert!(Instant::now() < deadline, "it is not in the log: {all:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// IPv4 packets that the machine outside has received. The host itself asks for its neighbour's address at times of
    /// its own; that is none.
    pub fn packets_outside(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/net/snmp", self.machine.id())).unwrap();
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Ip: "));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let index = names.split(' ').position(|name| name == "InReceives").unwrap();
        values.split(' ').nth(index).unwrap().parse().unwrap()
    }

    pub fn close(mut self) {
        let status = self.server.terminate();
        assert!(status.success(), "{status}\n{}", self.server.log());
        for child in [&mut self.echoes, &mut self.machine] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn list(domains: &[&str], cidrs: &[&str]) -> Option<SessionEgressPolicy> {
    let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
    Some(SessionEgressPolicy { allow_domains: texts(domains), allow_cidrs: texts(cidrs) })
}

/// What came of connecting to a name or address at port 80.
pub async fn try_to_reach(sandbox: &Sandbox, target: &str) -> String {
    let finished = sandbox.run(&[PYTHON, "-c", REACH, target, "80"]).await.unwrap();
    assert_eq!(finished.exit.exit_code, 0, "{}", finished.describe());
    finished.text()
}

pub async fn reaches(sandbox: &Sandbox, target: &str) {
    assert_eq!(try_to_reach(sandbox, target).await, "REACHED", "{target}");
}

/// All at once: each takes as long as nobody answers.
pub async fn reaches_none_of(sandbox: &Sandbox, targets: &[&str]) {
    let tries = targets.iter().map(|target| async { (*target, try_to_reach(sandbox, target).await) });
    for (target, outcome) in futures::future::join_all(tries).await {
        assert_ne!(outcome, "REACHED", "{target}");
    }
}

/// Runs a Python program in the sandbox; its output.
pub async fn python(sandbox: &Sandbox, program: &str, arguments: &[&str]) -> String {
    let argv = [&[PYTHON, "-c", program], arguments].concat();
    let finished = sandbox.run(&argv).await.unwrap();
    assert_eq!(finished.exit.exit_code, 0, "{}", finished.describe());
    finished.text()
}

fn started(mut command: Command) -> Child {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "READY", "{command:?}");
    child
}

fn must(line: &str) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Starts a program in a sandbox and waits for its line `READY`.
pub async fn ready(sandbox: &Sandbox, argv: &[&str]) -> Running {
    let mut running = sandbox.start(argv, false).await.unwrap();
    running.wait_for("READY").await;
    running
}
