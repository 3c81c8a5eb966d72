//! What the suite puts on the host, and takes away again.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const PYTHON: &str = "/usr/bin/python3";

/// Places of the host that hold secrets, or that a sandbox has under the same name.
const MARKED: [&str; 10] =
    ["/root", "/etc", "/opt", "/home", "/srv", "/mnt", "/var/lib", "/var/tmp", "/tmp", "/dev/shm"];

/// Files with the marker's name and a secret in them.
pub struct Markers {
    pub name: String,
    pub secret: String,
    pub paths: Vec<PathBuf>,
}

impl Markers {
    pub fn place(name: &str, data_dir: &std::path::Path) -> Self {
        let secret = format!("secret-of-{name}");
        let directories = MARKED.iter().map(PathBuf::from).chain([data_dir.to_owned()]);
        let paths = directories.filter(|path| path.is_dir()).map(|path| path.join(name)).collect();
        let markers = Self { name: name.to_owned(), secret, paths };
        for path in &markers.paths {
            fs::write(path, &markers.secret).unwrap();
        }
        markers
    }

    pub fn texts(&self) -> Vec<String> {
        self.paths.iter().map(|path| path.display().to_string()).collect()
    }
}

impl Drop for Markers {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
    }
}

/// A program that runs until it is dropped.
pub struct Helper(Child);

impl Helper {
    /// Starts a command and waits for its line `READY`.
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "READY", "{command:?}");
        Self(child)
    }

    pub fn python(script: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(PYTHON);
        command.args(["-c", script]).args(arguments);
        Self::start(command)
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Most end by themselves, and tidy up, when their stdin does.
        drop(self.0.stdin.take());
        for _ in 0..100 {
            if self.0.try_wait().is_ok_and(|status| status.is_some()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command that must succeed.
pub fn must(line: &str) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A machine beyond the host, with every address that matters; packets to anywhere go to it.
pub struct Outside {
    _machine: Helper,
    _server: Helper,
    _name_server: Helper,
    /// What cloud metadata services, private and shared networks would have.
    pub forbidden: Vec<String>,
    /// Like an address of the public internet.
    pub public: String,
    /// The host's own addresses.
    pub own: Vec<String>,
    /// The name server of the host, where its address can be played.
    pub name_server: Option<String>,
}

pub const PORT: &str = "7999";

impl Outside {
    /// Must run in a network namespace made for it: it takes over the default route.
    pub fn make(listener: &str) -> Self {
        let own = vec!["198.51.100.1".to_owned(), "fd00:198::1".to_owned()];
        let forbidden = [
            "169.254.169.254",
            "169.254.1.1",
            "10.77.0.5",
            "172.16.5.5",
            "172.31.255.1",
            "192.168.77.5",
            "100.64.5.5",
            "127.1.2.3",
            "192.0.2.77",
            "198.18.0.7",
            "203.0.113.9",
            "198.51.100.2",
        ];
        // An address of a range that no machine here has business with.
        let public = "11.22.33.44";
        let resolver = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let name_server = resolver
            .lines()
            .filter_map(|line| line.strip_prefix("nameserver")?.trim().parse::<std::net::Ipv4Addr>().ok())
            .find(|address| !address.is_loopback())
            .map(|address| address.to_string());

        let mut sleeper = Command::new("unshare");
        sleeper.args(["--net", "--", "/bin/sh", "-c", "echo READY; read -r _"]);
        let machine = Helper::start(sleeper);
        let pid = machine.pid();
        must("ip link set lo up");
        must(&format!("ip link add outside0 type veth peer name outside1 netns {pid}"));
        must("ip addr add 198.51.100.1/24 dev outside0");
        must("ip addr add fd00:198::1/64 dev outside0 nodad");
        must("ip link set outside0 up");
        let there = |line: &str| must(&format!("nsenter --net=/proc/{pid}/ns/net {line}"));
        there("ip link set lo up");
        there("ip addr add 198.51.100.2/24 dev outside1");
        there("ip link set outside1 up");
        there("ip route add default via 198.51.100.1");
        let mut addresses: Vec<String> = forbidden.iter().map(|address| (*address).to_owned()).collect();
        addresses.push(public.to_owned());
        addresses.extend(name_server.clone());
        for address in addresses.iter().filter(|address| !address.starts_with("127.") && *address != "198.51.100.2") {
            there(&format!("ip addr replace {address}/32 dev lo"));
            must(&format!("ip route replace {address}/32 via 198.51.100.2"));
        }
        must("ip route replace default via 198.51.100.2");

        let serve = |port: &str, addresses: &[String]| {
            let mut command = Command::new("nsenter");
            command
                .arg(format!("--net=/proc/{pid}/ns/net"))
                .args([PYTHON, "-c", listener, port, "OUTSIDE"])
                .args(addresses);
            Helper::start(command)
        };
        let server = serve(PORT, &addresses);
        let name_server_helper = serve("53", &addresses);
        Self {
            _machine: machine,
            _server: server,
            _name_server: name_server_helper,
            forbidden: addresses
                .into_iter()
                .filter(|address| address != public && Some(address) != name_server.as_ref())
                .collect(),
            public: public.to_owned(),
            own,
            name_server,
        }
    }
}
