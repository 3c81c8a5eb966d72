//! Somebody at a shell: a home of their own, a working directory, and a server on their machine.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nagaya_testkit::{Server, binary};
use tempfile::TempDir;

pub struct Person {
    home: TempDir,
    data_dir: PathBuf,
    /// In place of the server's data directory, where set.
    pub variables: Vec<(String, String)>,
}

/// What a command line did.
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Person {
    pub fn of(server: &Server) -> Self {
        Self::with_data_dir(server.data_dir())
    }

    pub fn with_data_dir(data_dir: &Path) -> Self {
        let home = tempfile::Builder::new().prefix("nagaya-person-").tempdir().unwrap();
        fs::create_dir_all(home.path().join("bin")).unwrap();
        for name in ["tenki", "nagaya"] {
            symlink(binary().canonicalize().unwrap(), home.path().join("bin").join(name)).unwrap();
        }
        Self { home, data_dir: data_dir.to_owned(), variables: Vec::new() }
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.home.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// A shell's command line, not started yet.
    pub fn shell(&self, line: &str) -> Command {
        let mut command = Command::new("bash");
        let path = format!("{}/bin:/usr/sbin:/usr/bin:/sbin:/bin", self.home.path().display());
        command.args(["-c", line]).env_clear().env("PATH", path).env("HOME", self.home.path());
        command.env("NAGAYA_DATA_DIR", &self.data_dir).env("TERM", "dumb").envs(self.variables.clone());
        command.current_dir(self.home.path()).stdin(Stdio::null());
        command
    }

    pub fn run(&self, line: &str) -> Done {
        Done::from(self.shell(line).output().unwrap())
    }

    /// With this on stdin.
    pub fn run_with(&self, line: &str, input: &[u8]) -> Done {
        let mut child = self.start(line);
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writing = std::thread::spawn(move || {
            // A program need not read all of it.
            let _ = stdin.write_all(&input);
        });
        let output = child.wait_with_output().unwrap();
        writing.join().unwrap();
        Done::from(output)
    }

    pub fn start(&self, line: &str) -> Child {
        self.shell(line).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// A command line that must succeed; what it prints.
    pub fn get(&self, line: &str) -> String {
        let done = self.run(line);
        assert_eq!(done.code, 0, "{line}\n{}{}", done.stdout, done.stderr);
        done.stdout
    }

    /// A new sandbox's id.
    pub fn create(&self, options: &str) -> String {
        self.get(&format!("tenki sandbox create --memory-mb 512 --quiet {options}")).trim().to_owned()
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let code = output.status.code().or_else(|| output.status.signal().map(|number| 128 + number)).unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code, stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Done {
    /// Everything that a person sees.
    pub fn transcript(&self) -> String {
        let mut text = self.stdout.clone();
        for line in self.stderr.lines() {
            text.push_str(&format!("! {line}\n"));
        }
        if self.code != 0 {
            text.push_str(&format!("= {}\n", self.code));
        }
        text
    }
}

/// Whether real sandboxes can be made here; says so when they cannot.
pub fn can_run(what: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("{what}: not run: only root can start the namespace driver");
    }
    root
}

/// Runs the check with every value that differs from run to run replaced.
pub fn steady(check: impl FnOnce()) {
    let mut settings = insta::Settings::clone_current();
    settings.add_filter(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "[time]");
    settings.add_filter(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "[id]");
    settings.add_filter(r"127\.0\.0\.1:\d+", "127.0.0.1:[port]");
    settings.add_filter(r"\b\d+(\.\d+)? (ms|s)\b", "[span]");
    settings.add_filter(r"\b\d+[smhd]\b", "[age]");
    settings.add_filter(r#""duration_ms": \d+"#, r#""duration_ms": "[span]""#);
    settings.add_filter(r"\b\d+(\.\d+)? KiB\b", "[size]");
    // Columns are as wide as what was replaced.
    settings.add_filter(r" {2,}", "  ");
    settings.add_filter(r"/[^ ]*/nagaya-(test|person)-[A-Za-z0-9]+", "[directory]");
    settings.bind(check);
}
