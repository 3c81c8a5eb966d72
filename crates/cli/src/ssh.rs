//! SSH into sandboxes with the OpenSSH of this machine, which brings terminals, forwarding, sftp and rsync along.
//!
//! The server's gateway is reached through a WebSocket, so OpenSSH gets a `ProxyCommand`: this program, which carries
//! the bytes. It logs in with a certificate that is asked for right before.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use nagaya_client::{Client, Session, SshCertificateOptions};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, split, stdin, stdout};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use crate::connect;
use crate::errors::{Failure, Local};
use crate::output::Screen;
use crate::parse;
use crate::resolve::{self, Among};
use crate::session::authorized_keys;
use crate::ssh_config::{self, replace};

/// Hosts of OpenSSH's configuration begin with this; a session's id, its beginning or its name follows.
const HOST_PREFIX: &str = "sbx-";
/// How long certificates are good for. Connections outlive them: they are checked at the login.
const CERTIFICATE_TIME: Duration = Duration::from_secs(600);
/// When a certificate that `ssh-prepare` left behind is removed.
const LEFTOVER_TIME: Duration = Duration::from_secs(86_400);

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Ssh {
    #[command(subcommand)]
    verb: Option<SshVerb>,
    /// Session: an id, the beginning of one, or a name.
    #[arg(long, value_name = "SESSION")]
    session: Option<String>,
    /// Who to be there.
    #[arg(long, default_value = "root")]
    user: String,
    /// A private key of this machine to log in with; without it one is made for this connection.
    #[arg(long, value_name = "FILE")]
    identity_file: Option<PathBuf>,
    /// Never ask.
    #[arg(long)]
    batch_mode: bool,
    /// How long connecting may take, such as 10s.
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    connect_timeout: Option<Duration>,
    /// Whether to trust a gateway that its authority does not vouch for: yes, accept-new, no or ask.
    #[arg(
        long, value_name = "HOW", default_value = "accept-new", value_parser = ["yes", "accept-new", "no",
        "ask", "true", "false"],
    )]
    strict_host_key_checking: String,
    /// [SESSION] and arguments of ssh, such as -L 8080:127.0.0.1:8080 or a command.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    words: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum SshVerb {
    /// Let `ssh sbx-SESSION` work, and sftp, scp and rsync, by a block in ~/.ssh/config.
    #[command(subcommand)]
    Config(ConfigVerb),
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub enum ConfigVerb {
    /// Write the block, or bring it up to date.
    Install,
    /// Tell whether it is there.
    Status,
    /// Remove it.
    Uninstall,
}

/// A time span, or a bare number of seconds as ssh takes it.
fn seconds(text: &str) -> Result<Duration, String> {
    text.parse().map(Duration::from_secs).or_else(|_| parse::duration(text))
}

impl Ssh {
    pub async fn run(self, screen: Screen) -> Result<u8, Failure> {
        if let Some(SshVerb::Config(verb)) = self.verb {
            return config(verb, screen).map(|()| 0);
        }
        let (text, arguments) = self.words()?;
        let session = resolve::session(&connect::client()?, &text, Among::Live).await?;
        let place = tempfile::Builder::new().prefix("nagaya-ssh-").tempdir();
        let place = place.map_err(|error| Failure::writing(&std::env::temp_dir(), &error))?;
        let identity = match &self.identity_file {
            Some(file) => file.clone(),
            None => make_key(place.path().join("key")).await?,
        };
        let certificate = place.path().join("key-cert.pub");
        let known_hosts = place.path().join("known_hosts");
        certify(&session, &identity, &certificate, &known_hosts).await?;
        let mut ssh = Command::new("ssh");
        for option in self.options(&session, &identity, &certificate, &known_hosts)? {
            ssh.args(["-o", &option]);
        }
        ssh.arg(format!("{}@{}", self.user, session.id())).args(arguments);
        run_program(ssh).await
    }

    /// The session's text, and what is ssh's.
    fn words(&self) -> Result<(String, Vec<String>), Failure> {
        let mut words = self.words.clone();
        let session = match &self.session {
            Some(session) => session.clone(),
            None if words.first().is_some_and(|word| !word.starts_with('-')) => words.remove(0),
            None => resolve::default_session()?,
        };
        Ok((session, words))
    }

    fn options(
        &self,
        session: &Session,
        identity: &Path,
        certificate: &Path,
        known_hosts: &Path,
    ) -> Result<Vec<String>, Failure> {
        let word = |path: &Path| path.to_string_lossy().replace('%', "%%");
        let program = shlex::try_quote(&word(&own_program()?)).map(|quoted| quoted.into_owned());
        let program =
            program.map_err(|_| Failure::new(Local::CannotRead, "this program's path holds a NUL byte", ""))?;
        let strictness = match self.strict_host_key_checking.as_str() {
            "true" => "yes",
            "false" => "no",
            word => word,
        };
        let mut options = vec![
            format!("ProxyCommand={program} sandbox ssh-proxy {}", session.id()),
            format!("IdentityFile=\"{}\"", word(identity)),
            format!("CertificateFile=\"{}\"", word(certificate)),
            format!("UserKnownHostsFile=\"{}\"", word(known_hosts)),
            format!("StrictHostKeyChecking={strictness}"),
            "IdentitiesOnly=yes".to_owned(),
            "LogLevel=ERROR".to_owned(),
        ];
        if self.batch_mode {
            options.push("BatchMode=yes".to_owned());
        }
        if let Some(timeout) = self.connect_timeout {
            options.push(format!("ConnectTimeout={}", timeout.as_secs().max(1)));
        }
        Ok(options)
    }
}

/// Runs a program in our place and takes its exit code. Signals of the terminal are its own business.
async fn run_program(mut program: Command) -> Result<u8, Failure> {
    let missing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => {
            let remedy = "Install OpenSSH's client (Debian: apt-get install openssh-client).";
            Failure::new(Local::ProgramMissing, "ssh is not installed on this machine", remedy)
        }
        _ => Failure::new(Local::ProgramMissing, format!("cannot run ssh: {error}"), ""),
    };
    let listen = |kind| signal(kind).map_err(|error| Failure::printing(&error));
    let (mut interrupts, mut quits) = (listen(SignalKind::interrupt())?, listen(SignalKind::quit())?);
    let mut child = program.kill_on_drop(true).spawn().map_err(missing)?;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status.map_err(missing)?,
            _ = interrupts.recv() => {}
            _ = quits.recv() => {}
        }
    };
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|number| 128 + number)).unwrap_or(255);
    Ok(u8::try_from(code).unwrap_or(255))
}

/// Makes a key pair that no passphrase protects, because its certificate ends in minutes.
async fn make_key(path: PathBuf) -> Result<PathBuf, Failure> {
    let mut program = Command::new("ssh-keygen");
    program.args(["-q", "-t", "ed25519", "-N", "", "-C", "nagaya", "-f"]).arg(&path).stdin(Stdio::null());
    match run_program(program).await? {
        0 => Ok(path),
        code => {
            Err(Failure::new(Local::CannotWrite, format!("ssh-keygen ended with {code}"), "Its own message is above."))
        }
    }
}

/// Asks for a certificate for a key and writes it, and a file of known hosts that trusts its authority.
async fn certify(session: &Session, key: &Path, certificate: &Path, known_hosts: &Path) -> Result<(), Failure> {
    let public_key = public_half(key).await?;
    let wish = SshCertificateOptions::default()
        .public_key(public_key)
        .ttl(Some(CERTIFICATE_TIME))
        .source_addresses(Vec::new());
    let issued = session.issue_ssh_certificate(wish).await?;
    let write =
        |path: &Path, text: String| replace(path, text.as_bytes()).map_err(|error| Failure::writing(path, &error));
    write(certificate, format!("{}\n", issued.certificate.trim()))?;
    let authority = issued.authority.trim();
    let line = if authority.is_empty() { String::new() } else { format!("@cert-authority * {authority}\n") };
    write(known_hosts, line)
}

/// The public half of a private key: the file beside it, or what ssh-keygen computes.
async fn public_half(key: &Path) -> Result<String, Failure> {
    let mut beside = key.as_os_str().to_owned();
    beside.push(".pub");
    if let Ok(text) = fs::read_to_string(&beside) {
        return Ok(text.trim().to_owned());
    }
    fs::File::open(key).map_err(|error| Failure::reading(key, &error))?;
    let mut program = Command::new("ssh-keygen");
    program.args(["-y", "-f"]).arg(key).stdin(Stdio::inherit()).stderr(Stdio::inherit());
    let output = program.output().await.map_err(|error| Failure::reading(Path::new("ssh-keygen"), &error))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => {
            let what = format!("{} is not a private key that ssh-keygen can read", key.display());
            Err(Failure::new(Local::CannotRead, what, "Its own message is above."))
        }
    }
}

fn own_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|error| Failure::reading(Path::new("/proc/self/exe"), &error))
}

/// Where `ssh-prepare` puts its key and certificates.
fn state_directory() -> Result<PathBuf, Failure> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")));
    base.map(|base| base.join("nagaya/ssh")).ok_or_else(no_home)
}

fn no_home() -> Failure {
    Failure::usage("HOME is not set", "Set it to your home directory.")
}

fn config(verb: ConfigVerb, screen: Screen) -> Result<(), Failure> {
    let home = std::env::var_os("HOME").map(PathBuf::from).ok_or_else(no_home)?;
    let file = home.join(".ssh/config");
    let state = state_directory()?;
    let block = ssh_config::block(&own_program()?, &state)?;
    let changed = match verb {
        ConfigVerb::Install => ssh_config::install(&file, &block)?,
        ConfigVerb::Status => false,
        ConfigVerb::Uninstall => {
            let changed = ssh_config::uninstall(&file)?;
            match fs::remove_dir_all(&state) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Failure::writing(&state, &error)),
                _ => changed,
            }
        }
    };
    let status = ssh_config::status(&file, &block)?;
    let done = json!({ "file": file, "status": status.name(), "changed": changed });
    screen.done(&done, |_| {
        let hint = match verb {
            ConfigVerb::Install => "; try `ssh sbx-SESSION`",
            _ => "",
        };
        format!("{}: {}{hint}", file.display(), status.name())
    })
}

/// The session that a host of OpenSSH's configuration stands for.
async fn session_of_host(client: &Client, host: &str) -> Result<Session, Failure> {
    resolve::session(client, host.strip_prefix(HOST_PREFIX).unwrap_or(host), Among::Live).await
}

/// For `Match exec` of the managed block: gets key, certificate and known hosts ready for `sbx-SESSION`.
#[derive(Debug, Args)]
pub struct SshPrepare {
    host: String,
}

impl SshPrepare {
    pub async fn run(self) -> Result<(), Failure> {
        if self.host.contains('/') {
            return Err(Failure::usage("a host name holds no slash", ""));
        }
        let state = state_directory()?;
        let session = session_of_host(&connect::client()?, &self.host).await?;
        let key = lasting_key(&state).await?;
        let certificate = state.join(format!("{}-cert.pub", self.host));
        certify(&session, &key, &certificate, &state.join(format!("{}.known_hosts", self.host))).await?;
        sweep(&state);
        Ok(())
    }
}

/// The one key of all certificates, so that two connections at a time never see halves of two pairs.
async fn lasting_key(state: &Path) -> Result<PathBuf, Failure> {
    let (key, public) = (state.join("key"), state.join("key.pub"));
    if key.exists() && public.exists() {
        return Ok(key);
    }
    let problem = |error: io::Error| Failure::writing(state, &error);
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(state).map_err(problem)?;
    let draft = tempfile::Builder::new().prefix("new-").tempdir_in(state).map_err(problem)?;
    let made = make_key(draft.path().join("key")).await?;
    // The first one wins, also against another process at the same time: the private half decides.
    match fs::hard_link(&made, &key) {
        Ok(()) => fs::rename(draft.path().join("key.pub"), &public).map_err(problem)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let text = public_half(&key).await?;
            replace(&public, format!("{text}\n").as_bytes()).map_err(problem)?;
        }
        Err(error) => return Err(problem(error)),
    }
    Ok(key)
}

/// Removes what earlier connections left and nobody can use any more.
fn sweep(state: &Path) {
    let Ok(entries) = fs::read_dir(state) else { return };
    for entry in entries.flatten() {
        let is_ours = entry.file_name().to_string_lossy().starts_with(HOST_PREFIX);
        let age = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .map(|time| SystemTime::now().duration_since(time));
        if is_ours && matches!(age, Ok(Ok(age)) if age > LEFTOVER_TIME) {
            // Another process may have been faster.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// For `ProxyCommand`: carries the bytes of one SSH connection between stdin and stdout and the gateway.
#[derive(Debug, Args)]
pub struct SshProxy {
    host: String,
}

impl SshProxy {
    pub async fn run(self) -> Result<(), Failure> {
        let session = session_of_host(&connect::client()?, &self.host).await?;
        let (mut from, mut to) = split(session.ssh().await?);
        let sending = tokio::spawn(async move {
            // Its errors show on the other direction, which ends then.
            let _ = carry(&mut stdin(), &mut to).await;
            let _ = to.shutdown().await;
        });
        let received = carry(&mut from, &mut stdout()).await;
        sending.abort();
        match received {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::BrokenPipe),
            Err(error) => Err(nagaya_client::Error::from(error).into()),
            Ok(()) => Ok(()),
        }
    }
}

async fn carry(
    from: &mut (impl tokio::io::AsyncRead + Unpin),
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..length]).await?;
        to.flush().await?;
    }
}

/// The keys that may log in to a session.
#[derive(Debug, Subcommand)]
pub enum SshKeys {
    /// Replace them all.
    Set {
        /// Session: an id, the beginning of one, or a name.
        #[arg(long, value_name = "SESSION")]
        session: Option<String>,
        /// A file of public keys, a line each (repeatable); - is stdin.
        #[arg(long, value_name = "FILE", required = true)]
        keys_file: Vec<PathBuf>,
        /// [SESSION]
        #[arg(num_args = 0..=1, value_name = "SESSION")]
        words: Vec<String>,
    },
}

impl SshKeys {
    pub async fn run(self, screen: Screen) -> Result<(), Failure> {
        let Self::Set { session, keys_file, words } = self;
        let (text, _) = resolve::split(session, words, 0)?;
        let mut from_stdin = String::new();
        if keys_file.iter().any(|file| file == Path::new("-")) {
            io::stdin()
                .read_to_string(&mut from_stdin)
                .map_err(|error| Failure::reading(Path::new("stdin"), &error))?;
        }
        let lines = from_stdin.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let files: Vec<_> = keys_file.iter().filter(|file| *file != Path::new("-")).cloned().collect();
        let keys = authorized_keys(lines.map(str::to_owned).collect(), &files)?;
        let session = resolve::session(&connect::client()?, &text, Among::Live).await?;
        let count = keys.len();
        session.set_ssh_authorized_keys(keys).await?;
        screen
            .done(&json!({ "session_id": session.id(), "keys": count }), |_| format!("{}: {count} keys", session.id()))
    }
}
