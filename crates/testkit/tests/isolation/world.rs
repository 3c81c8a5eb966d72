//! A server, a sandbox to attack from, one to attack, and a host full of secrets.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::Command;

use nagaya_testkit::{Client, Running, Sandbox, Server, Wanted};
use tempfile::NamedTempFile;

use super::host::{Helper, Markers, Outside, PORT};

const PRELUDE: &str = include_str!("payloads/prelude.py");
const LISTENER: &str = include_str!("payloads/listener.py");
const GIVER: &str = include_str!("payloads/giver.py");
const SEGMENT: &str = include_str!("payloads/segment.py");
const PYTHON: &str = "/usr/bin/python3";

pub struct World {
    pub client: Client,
    pub attacker: Sandbox,
    /// Has no outbound access.
    pub isolated: Sandbox,
    pub victim: Sandbox,
    pub victim_address: String,
    pub gateway: String,
    /// Is in the command line of a process of the victim.
    pub victim_secret: String,
    /// Names what the attacker has of its own, for controls.
    pub own_marker: String,
    pub outside: Outside,
    pub markers: Markers,
    pub abstract_name: String,
    pub shared_memory_key: String,
    pub server: Server,
    /// The victim's programs; they end with the world.
    pub victim_process: Option<Running>,
    _victim_programs: Vec<Running>,
    _helpers: Vec<Helper>,
    _abstract_listener: UnixListener,
    /// A file of the host that whoever started the server had left open.
    pub left_open: NamedTempFile,
}

/// How a payload ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Reached(String),
    Refused(String),
    Absent(String),
    /// It did not come to a verdict, so it says nothing.
    Broken(String),
}

impl Verdict {
    pub fn parse(output: &str, details: impl FnOnce() -> String) -> Self {
        let last = output.lines().next_back().unwrap_or_default();
        match last.split_once(' ').unwrap_or((last, "")) {
            ("REACHED", text) => Self::Reached(text.to_owned()),
            ("REFUSED", text) => Self::Refused(text.to_owned()),
            ("ABSENT", text) => Self::Absent(text.to_owned()),
            _ => Self::Broken(details()),
        }
    }
}

/// A payload as one Python program.
pub fn program(module: &str, function: &str) -> String {
    format!("{PRELUDE}\n{module}\n{function}()\nraise SystemExit('no verdict')\n")
}

impl World {
    pub async fn make() -> Self {
        let nonce = format!("{}-{:x}", std::process::id(), clock());
        let outside = Outside::make(LISTENER);
        let left_open = NamedTempFile::with_prefix("nagaya-left-open-").unwrap();
        // Not closed on exec, as it is with a shell's.
        let inherited = rustix::io::dup(&left_open).unwrap();
        let server = Server::start();
        drop(inherited);
        let client = Client::of(&server);
        let wanted = |name: &str, outbound| Wanted { name: name.into(), outbound, ..Wanted::default() };
        let attacker = client.create(&wanted("attacker", true)).await.unwrap();
        let isolated = client.create(&wanted("isolated", false)).await.unwrap();
        let victim = client.create(&wanted("victim", true)).await.unwrap();

        let markers = Markers::place(&format!("nagaya-marker-{nonce}"), server.data_dir());
        let own_marker = format!("nagaya-own-{nonce}");
        for place in ["/srv", "/home/tenki"] {
            let script = format!("echo own > {place}/{own_marker} && chmod 644 {place}/{own_marker}");
            attacker.shell(&script, true).await;
        }
        let victim_secret = format!("nagaya-victim-{nonce}");
        victim.write(&format!("/home/tenki/{victim_secret}"), "secret").await.unwrap();

        let addresses = "import socket,fcntl,struct; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); \
             print(socket.inet_ntoa(fcntl.ioctl(s,0x8915,struct.pack('256s',b'eth0'))[20:24]))";
        let victim_address = victim.run(&[PYTHON, "-c", addresses]).await.unwrap().text();
        let gateway = attacker.shell("sed -n 's/^nameserver //p' /etc/resolv.conf", false).await;
        let listen = [PYTHON, "-c", LISTENER, PORT, "VICTIM", &victim_address, "127.0.0.1"];
        let listening = ready(&victim, &listen).await;
        let giving = ready(&victim, &[PYTHON, "-c", GIVER, &victim_secret, "descriptor"]).await;
        let waiting = ["/bin/sh", "-c", "echo READY; read -r _", &victim_secret];
        let victim_process = ready(&victim, &waiting).await;

        let own = [outside.own[0].as_str(), &outside.own[1], "127.0.0.1", "::1", &gateway];
        let host_listener = Helper::python(LISTENER, &[&[PORT, "HOST"], own.as_slice()].concat());
        let shared_memory_key = (1_000_000 + clock() % 1_000_000_000).to_string();
        let segment = Helper::python(SEGMENT, &[&shared_memory_key]);
        let abstract_name = format!("nagaya-abstract-{nonce}");
        let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        let abstract_listener = UnixListener::bind_addr(&address).unwrap();
        Self {
            client,
            attacker,
            isolated,
            victim,
            victim_address,
            gateway,
            victim_secret,
            own_marker,
            outside,
            markers,
            abstract_name,
            shared_memory_key,
            server,
            victim_process: Some(victim_process),
            _victim_programs: vec![listening, giving],
            _helpers: vec![host_listener, segment],
            left_open,
            _abstract_listener: abstract_listener,
        }
    }

    /// The host's addresses that a sandbox could try.
    pub fn host_addresses(&self) -> Vec<String> {
        let own = self.outside.own.iter().map(String::as_str);
        own.chain([self.gateway.as_str(), "127.0.0.1", "::1", "0.0.0.0", "localhost"]).map(str::to_owned).collect()
    }

    pub async fn close(mut self) {
        self.victim_process = None;
        self._victim_programs.clear();
        for sandbox in [&self.attacker, &self.isolated, &self.victim] {
            sandbox.terminate().await.unwrap();
        }
        let status = self.server.terminate();
        assert!(status.success(), "{status}\n{}", self.server.log());
    }
}

/// Starts a program in a sandbox and waits for its line `READY`.
pub async fn ready(sandbox: &Sandbox, argv: &[&str]) -> Running {
    let mut running = sandbox.start(argv, false).await.unwrap();
    running.wait_for("READY").await;
    running
}

/// Runs a payload in a sandbox.
pub async fn inside(sandbox: &Sandbox, program: &str, arguments: &[String], privileged: bool) -> Verdict {
    let mut argv = vec![PYTHON, "-c", program];
    argv.extend(arguments.iter().map(String::as_str));
    let finished =
        sandbox.run_as(&argv, privileged).await.unwrap_or_else(|error| panic!("the payload did not run: {error}"));
    Verdict::parse(&finished.text(), || finished.describe())
}

/// Runs a payload on the host, as root, behind a command that may take it somewhere harmless.
pub async fn on_host(prefix: &[&str], program: &str, arguments: &[String]) -> Verdict {
    let mut words: Vec<String> = prefix.iter().map(|word| (*word).to_owned()).collect();
    words.extend([PYTHON, "-c", program].map(str::to_owned));
    words.extend_from_slice(arguments);
    let output = tokio::task::spawn_blocking(move || Command::new(&words[0]).args(&words[1..]).output().unwrap());
    let output = output.await.unwrap();
    Verdict::parse(String::from_utf8_lossy(&output.stdout).trim_end(), || format!("{output:?}"))
}

pub fn clock() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
}
