//! The real program, started on a free port with a data directory of its own.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
const READY: &str = "nagaya ready on ";

/// The program under test: `NAGAYA_BIN`, else the debug build of this workspace.
pub fn binary() -> PathBuf {
    let path = match std::env::var_os("NAGAYA_BIN") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/debug/nagaya"),
    };
    assert!(path.exists(), "there is no server binary at {}: build it, or name one in NAGAYA_BIN", path.display());
    path
}

/// A server and its data directory. Dropping it kills the server and purges what it made.
pub struct Server {
    /// What is started; [`binary`] unless told otherwise.
    program: PathBuf,
    data_dir: TempDir,
    child: Option<Child>,
    endpoint: String,
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Starts a server with small pools.
    pub fn start() -> Self {
        Self::start_with("[pools]\nslots_ready = 4\nisolated_slots_ready = 1\n")
    }

    /// Starts a server with this configuration (TOML), to which a network of its own is added
    /// unless it names one.
    pub fn start_with(configuration: &str) -> Self {
        Self::start_in(&std::env::temp_dir(), configuration)
    }

    /// As [`Server::start_with`], with what it prints going there. Ready when it has written down its address.
    pub fn start_printing(configuration: &str, stdout: Stdio, stderr: Stdio) -> Self {
        let mut server = Self::prepare(&std::env::temp_dir(), configuration);
        server.child = Some(server.serve(&[]).stdout(stdout).stderr(stderr).spawn().unwrap());
        let address = server.data_dir().join("address");
        let begin = Instant::now();
        loop {
            if let Ok(endpoint) = fs::read_to_string(&address) {
                server.endpoint = endpoint.trim().to_owned();
                return server;
            }
            assert!(begin.elapsed() < START_TIMEOUT, "the server did not become ready");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// As [`Server::start_with`], with the data directory in this one.
    pub fn start_in(parent: &Path, configuration: &str) -> Self {
        let mut server = Self::prepare(parent, configuration);
        server.restart();
        server
    }

    /// A server of another version, with small pools.
    pub fn start_version(program: &Path) -> Self {
        let mut server = Self::prepare(&std::env::temp_dir(), "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n");
        program.clone_into(&mut server.program);
        server.restart();
        server
    }

    /// A server on a data directory that lies in an archive of the test's, with this key.
    pub fn start_on(archive: &Path, api_key: &str) -> Self {
        let mut server = Self::prepare(&std::env::temp_dir(), "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n");
        let unpacked = Command::new("tar").arg("-xzSf").arg(archive).arg("-C").arg(server.data_dir()).status();
        assert!(unpacked.unwrap().success(), "{} cannot be unpacked", archive.display());
        server.restart_with(&["--api-key", api_key]);
        server
    }

    /// From the next start on it is the version under test.
    pub fn update(&mut self) {
        self.program = binary();
    }

    fn prepare(parent: &Path, configuration: &str) -> Self {
        let data_dir = tempfile::Builder::new().prefix("nagaya-test-").tempdir_in(parent).unwrap();
        let mut configuration = configuration.to_string();
        if !configuration.contains("[network]") {
            configuration.push_str(&format!("[network]\ncidr = \"{}\"\n", free_network()));
        }
        fs::write(data_dir.path().join("test.toml"), configuration).unwrap();
        Self { program: binary(), data_dir, child: None, endpoint: String::new(), log: Arc::default() }
    }

    fn serve(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(self.data_dir.path())
            .arg("--config")
            .arg(self.data_dir.path().join("test.toml"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Starts the server again on the same data, after [`Server::terminate`] or [`Server::kill`].
    pub fn restart(&mut self) {
        self.restart_with(&[]);
    }

    /// As [`Server::restart`], with further arguments.
    pub fn restart_with(&mut self, arguments: &[&str]) {
        assert!(self.child.is_none(), "the server is running already");
        let mut child = self.serve(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let log = self.log.clone();
        std::thread::spawn(move || collect(stderr, &log));
        let stdout = child.stdout.take().unwrap();
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            // Reads on after the first line, so that the pipe never fills up.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(endpoint) = line.strip_prefix(READY) {
                    let _ = send.send(endpoint.trim().to_string());
                }
            }
        });
        self.child = Some(child);
        match receive.recv_timeout(START_TIMEOUT) {
            Ok(endpoint) => self.endpoint = endpoint,
            Err(reason) => panic!("the server did not become ready ({reason}):\n{}", self.log()),
        }
    }

    /// Starts the server in vain; what it says about that.
    pub fn refused_start(&mut self, arguments: &[&str]) -> String {
        assert!(self.child.is_none(), "the server is running already");
        let mut child = self.serve(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (mut stderr, kept) = (child.stderr.take().unwrap(), log.clone());
        let reading = std::thread::spawn(move || collect(&mut stderr, &kept));
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begin.elapsed() > START_TIMEOUT {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("a start that should be refused goes on:\n{}", log.lock().unwrap());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        reading.join().unwrap();
        let said = log.lock().unwrap().clone();
        assert!(!status.success(), "a start that should be refused ended well:\n{said}");
        said
    }

    /// Runs another command of the program on this data directory.
    pub fn command(&self, verb: &str, arguments: &[&str]) -> std::process::Output {
        let mut command = Command::new(binary());
        command.arg(verb).args(arguments).arg("--data-dir").arg(self.data_dir.path());
        command.arg("--config").arg(self.data_dir.path().join("test.toml")).output().unwrap()
    }

    /// `http://HOST:PORT`; another port after every start.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub fn data_dir(&self) -> &Path {
        self.data_dir.path()
    }

    /// Where its disks, images, volumes and blobs are.
    pub fn storage(&self) -> PathBuf {
        crate::storage_root(self.data_dir.path())
    }

    /// The key that the first start made. Checks that only its owner can read it.
    pub fn api_key(&self) -> String {
        use std::os::unix::fs::PermissionsExt;
        let path = self.data_dir.path().join("api-key");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{} must be readable by its owner alone", path.display());
        fs::read_to_string(&path).unwrap().trim().to_string()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server is running").id()
    }

    /// What all servers on this data directory have written to stderr so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Asks the server to end, as an operator would, and waits. Its sandboxes go on.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        let mut child = self.child.take().unwrap();
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("the server did not end after SIGTERM:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the server as an accident would: `kill -9`. Its sandboxes go on.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the server is running");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Sends a signal to the running server.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// `nagaya purge`: removes every sandbox and everything they left. The server must not run.
    pub fn purge(&self) {
        assert!(self.child.is_none(), "the server is still running");
        let output = Command::new(binary()).args(["purge", "--data-dir"]).arg(self.data_dir.path()).output().unwrap();
        assert!(
            output.status.success(),
            "purge ended with {}:\n{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
        if std::thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
            // A second panic would hide the first; what cannot be purged is reported by the shell.
            let _ = Command::new(binary()).args(["purge", "--data-dir"]).arg(self.data_dir.path()).status();
        } else {
            self.purge();
        }
    }
}

/// A network that no other server on this host uses: tests run several beside each other.
fn free_network() -> String {
    static STARTED: AtomicU32 = AtomicU32::new(0);
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    // Destinations are little endian: 0000F60A is 10.246.0.0.
    let used = |number: u32| {
        let ending = format!("{number:02X}0A");
        routes.lines().filter_map(|line| line.split('\t').nth(1)).any(|destination| destination.ends_with(&ending))
    };
    let first = std::process::id() + STARTED.fetch_add(1, Ordering::Relaxed);
    let number = (0..128).map(|count| 64 + (first + count) % 128).find(|number| !used(*number));
    format!("10.{}.0.0/16", number.expect("no host has a route to every network that a test server could use"))
}

fn collect(mut from: impl Read, log: &Mutex<String>) {
    let mut buffer = [0; 8192];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        log.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
}
