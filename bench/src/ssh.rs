//! SSH into a sandbox beside OpenSSH's own server on the host, with OpenSSH's clients on loopback.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nagaya_api::tenki::v1;
use nagaya_testkit::{Client, Server, Wanted};
use tempfile::TempDir;

use crate::Effort;
use crate::samples::{Report, milliseconds};

const OURS: &str = "ssh to a sandbox";
const PEER: &str = "ssh to sshd on the host";
const SSHD: &str = "/usr/sbin/sshd";

/// Where an SSH client goes.
struct Place {
    name: &'static str,
    options: Vec<String>,
    target: String,
}

impl Place {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(["-F", "none", "-q", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]);
        command.args(["-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"]).args(&self.options);
        command
    }
}

pub async fn run(report: &mut Report, effort: Effort) {
    if !Path::new(SSHD).exists() || Command::new("ssh").arg("-V").output().is_err() {
        return report.not_run(PEER, "OpenSSH's client and server are not both installed");
    }
    let place = TempDir::new().expect("a temporary directory can be made");
    let key = place.path().join("key");
    make_key(&key);
    let ours_port = free_port();
    let server = Server::start_with(&format!("[pools]\nslots_ready = 2\n[ssh]\nlisten = \"127.0.0.1:{ours_port}\"\n"));
    let client = Client::of(&server);
    let sandbox = client.create(&Wanted::default()).await.expect("the server has room");
    let certificate = certify(&client, &sandbox.id, &key).await;
    let peer_port = free_port();
    let sshd = Sshd::start(place.path(), &key, peer_port);
    let to = |name, port: u16, target: String| {
        let options = vec!["-i".to_owned(), key.display().to_string(), "-o".to_owned(), format!("Port={port}")];
        Place { name, options, target }
    };
    let mut ours = to(OURS, ours_port, format!("root@{}@127.0.0.1", sandbox.id));
    ours.options.extend(["-o".to_owned(), format!("CertificateFile={}", certificate.display())]);
    let places = [ours, to(PEER, peer_port, "root@127.0.0.1".to_owned())];
    tokio::task::block_in_place(|| {
        connects(report, &places, effort.of(40, 5));
        commands(report, &places, effort.of(200, 10));
        transfers(report, &places, place.path(), effort.of(5, 1));
    });
    drop(sshd);
    sandbox.terminate().await.expect("terminating works");
}

/// From nothing to the exit of a first command. Both take turns, so that the machine's moods hit both.
fn connects(report: &mut Report, places: &[Place; 2], rounds: usize) {
    let mut samples = [Vec::new(), Vec::new()];
    for round in 0..rounds + 2 {
        for (place, samples) in places.iter().zip(&mut samples) {
            let start = Instant::now();
            let status = place.command("ssh").arg(&place.target).arg("true").stdin(Stdio::null()).status();
            assert!(status.is_ok_and(|status| status.success()), "{} works", place.name);
            if round >= 2 {
                samples.push(milliseconds(start.elapsed()));
            }
        }
    }
    for (place, samples) in places.iter().zip(samples) {
        report.timing(&format!("{}: connect and run true", place.name), samples);
    }
    report.ratios(&format!("{OURS}: connect and run true"), &[&format!("{PEER}: connect and run true")]);
}

/// A line to a shell and back, over a connection that is there.
fn commands(report: &mut Report, places: &[Place; 2], rounds: usize) {
    for place in places {
        let mut child = place
            .command("ssh")
            .arg(&place.target)
            .arg("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("ssh starts");
        let mut input = child.stdin.take().expect("its input is a pipe");
        let mut output = BufReader::new(child.stdout.take().expect("its output is a pipe"));
        let mut samples = Vec::new();
        for round in 0..rounds + 10 {
            let start = Instant::now();
            let mut line = String::new();
            input.write_all(b"x\n").expect("cat reads");
            output.read_line(&mut line).expect("cat answers");
            if round >= 10 {
                samples.push(milliseconds(start.elapsed()));
            }
        }
        drop(input);
        let _ = child.wait();
        report.timing(&format!("{}: round trip of a line", place.name), samples);
    }
    report.ratios(&format!("{OURS}: round trip of a line"), &[&format!("{PEER}: round trip of a line")]);
}

/// Large files by sftp, with the cipher that OpenSSH prefers and the one that its users choose for speed.
fn transfers(report: &mut Report, places: &[Place; 2], directory: &Path, rounds: usize) {
    const MEGABYTES: usize = 256;
    let file = directory.join("large");
    fs::write(&file, vec![7; MEGABYTES * 1_000_000]).expect("there is room for a large file");
    for cipher in ["chacha20-poly1305@openssh.com", "aes128-gcm@openssh.com"] {
        let short = cipher.split('@').next().unwrap_or(cipher);
        for (verb, script) in [
            ("put", format!("put {} /tmp/nagaya-bench-large\n", file.display())),
            ("get", format!("get /tmp/nagaya-bench-large {}\n", directory.join("back").display())),
        ] {
            let mut speeds = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                for (place, speeds) in places.iter().zip(&mut speeds) {
                    speeds.push(MEGABYTES as f64 / transfer(place, cipher, &script).as_secs_f64());
                }
            }
            for (place, speeds) in places.iter().zip(speeds) {
                let best = speeds.into_iter().fold(0.0, f64::max);
                report.figure(&format!("{}: sftp {verb}, {short}", place.name), best, "MB/s");
            }
            let [ours, peer] = [OURS, PEER].map(|name| report.value(&format!("{name}: sftp {verb}, {short}")));
            if let (Some(ours), Some(peer)) = (ours, peer) {
                report.figure(&format!("sftp {verb}, {short}: ours of sshd's"), ours / peer, "x");
            }
        }
    }
    let _ = fs::remove_file("/tmp/nagaya-bench-large");
}

fn transfer(place: &Place, cipher: &str, script: &str) -> Duration {
    let mut command = place.command("sftp");
    command.args(["-c", cipher, "-b", "-"]).arg(&place.target);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("sftp starts");
    let start = Instant::now();
    child.stdin.take().expect("its input is a pipe").write_all(script.as_bytes()).expect("sftp reads");
    let status = child.wait().expect("sftp ends");
    assert!(status.success(), "{}: sftp works", place.name);
    start.elapsed()
}

fn make_key(path: &Path) {
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path).status();
    assert!(made.is_ok_and(|status| status.success()), "ssh-keygen works");
}

async fn certify(client: &Client, session_id: &str, key: &Path) -> PathBuf {
    let public_key = fs::read_to_string(key.with_extension("pub")).expect("the key was made");
    let request = v1::IssueSandboxSSHCertRequest {
        session_id: session_id.to_owned(),
        public_key: public_key.trim().to_owned(),
        ..Default::default()
    };
    let issued = client.gateways.issue_sandbox_ssh_cert(request).await.expect("certificates are made");
    let path = key.with_file_name("key-cert.pub");
    fs::write(&path, &issued.ssh_cert).expect("the certificate can be written");
    path
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there are free ports");
    listener.local_addr().expect("a listener has an address").port()
}

/// OpenSSH's server with a configuration of its own, in the foreground.
struct Sshd(Child);

impl Sshd {
    fn start(place: &Path, key: &Path, port: u16) -> Self {
        let host_key = place.join("host-key");
        make_key(&host_key);
        // It insists on this directory.
        let _ = fs::create_dir_all("/run/sshd");
        let configuration = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\n\
             PermitRootLogin yes\nSubsystem sftp internal-sftp\n",
            host_key.display(),
            key.with_extension("pub").display()
        );
        let path = place.join("sshd_config");
        fs::write(&path, configuration).expect("the configuration can be written");
        let child = Command::new(SSHD).args(["-D", "-q", "-f"]).arg(&path).spawn().expect("sshd starts");
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "sshd listens");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self(child)
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
