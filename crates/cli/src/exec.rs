//! `exec`: a command in a sandbox, as if it ran here.

use std::future::pending;
use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::Args;
use nagaya_client::{Command, CommandStatus, Event, Output, Running, Session, Signal, Signaller};
use serde::Serialize;
use tokio::io::{AsyncWriteExt, copy, stderr, stdin, stdout};
use tokio::signal::unix::{SignalKind, signal};

use crate::errors::Failure;
use crate::output::{Format, Screen, span};
use crate::resolve::{self, Among};
use crate::terminal::{self, RawMode};
use crate::{connect, parse};

#[derive(Debug, Args)]
pub struct Exec {
    /// Session: an id, the beginning of one, or a name. Without it NAGAYA_SESSION, or else the first word.
    #[arg(long, value_name = "SESSION")]
    session: Option<String>,
    /// End the command after this time, such as 30s or 2m.
    #[arg(long, value_name = "TIME", value_parser = parse::duration)]
    timeout: Option<Duration>,
    /// A variable for the command (repeatable).
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse::pair)]
    env: Vec<(String, String)>,
    /// Its directory; relative ones begin at the home directory.
    #[arg(long, value_name = "PATH")]
    cwd: Option<String>,
    /// Give it a terminal: keys, window size and Ctrl-C are the command's.
    #[arg(long, short)]
    tty: bool,
    /// Run it as root.
    #[arg(long)]
    privileged: bool,
    /// Leave stdin alone; loops that read lists from it need this.
    #[arg(long)]
    no_stdin: bool,
    /// Print no status line at the end.
    #[arg(long, short)]
    quiet: bool,
    /// A line for the sandbox's shell instead of a command.
    #[arg(long = "shell", short = 'c', value_name = "LINE")]
    line: Option<String>,
    /// [SESSION] and the command with its arguments.
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    words: Vec<String>,
}

/// How a command ended, for `--output json`.
#[derive(Serialize)]
struct Told {
    status: String,
    exit_code: i32,
    signal: Option<String>,
    reason: String,
    duration_ms: u128,
    execution_id: Option<String>,
    stdout: String,
    stderr: String,
}

impl Exec {
    pub async fn run(self, screen: Screen) -> Result<u8, Failure> {
        let (session, argv) = self.words()?;
        let session = resolve::session(&connect::client()?, &session, Among::Live).await?;
        let command = self.command(&session, argv);
        match screen.format {
            Format::Table => self.live(&session, command).await,
            _ => self.told(command, screen).await,
        }
    }

    /// The session's text, and the command.
    fn words(&self) -> Result<(String, Vec<String>), Failure> {
        let mut words = self.words.clone();
        let is_default = std::env::var_os(resolve::DEFAULT_SESSION).is_some_and(|value| !value.is_empty());
        let session = match &self.session {
            Some(session) => session.clone(),
            None if is_default => resolve::default_session()?,
            None if words.is_empty() => resolve::default_session()?,
            None => words.remove(0),
        };
        if words.first().is_some_and(|word| word == "--") {
            words.remove(0);
        }
        if let Some(word) = words.first().filter(|word| word.starts_with('-')) {
            let remedy = "Options go first: `exec --timeout 2m SESSION COMMAND`, `exec -c LINE SESSION`.";
            return Err(Failure::usage(format!("{word:?} is no command"), remedy));
        }
        match (&self.line, words.first()) {
            (Some(_), Some(word)) => {
                Err(Failure::usage(format!("unexpected word {word:?}"), "The line after -c is the whole command."))
            }
            (Some(line), None) => Ok((session, vec!["sh".into(), "-lc".into(), line.clone()])),
            (None, Some(_)) => Ok((session, words)),
            (None, None) => {
                Err(Failure::usage("there is no command to run", "Name one: `exec --session ID bash -lc 'ls'`."))
            }
        }
    }

    fn command(&self, session: &Session, argv: Vec<String>) -> Command {
        let argv = if self.tty { sized(argv) } else { argv };
        let mut command = session.command(argv).envs(self.env.clone()).privileged(self.privileged).pty(self.tty);
        if let Some(directory) = &self.cwd {
            command = command.cwd(directory);
        }
        if let Some(timeout) = self.timeout {
            command = command.timeout(timeout);
        }
        if let (true, Ok(terminal)) = (self.tty, std::env::var("TERM"))
            && !self.env.iter().any(|(key, _)| key == "TERM")
        {
            command = command.env("TERM", terminal);
        }
        command
    }

    /// Whether what arrives at our stdin is for the command. A terminal's keys are only with a terminal of its own:
    /// else a command in the background would stop at the first read.
    fn feeds(&self) -> bool {
        !self.no_stdin && (self.tty || !io::stdin().is_terminal())
    }

    async fn live(&self, session: &Session, command: Command) -> Result<u8, Failure> {
        let mut running = command.start().await?;
        let raw = match self.tty {
            true => RawMode::enter().map_err(|error| Failure::printing(&error))?,
            false => None,
        };
        let helpers = self.helpers(session, &mut running);
        let ended = show(running).await;
        helpers.iter().for_each(tokio::task::JoinHandle::abort);
        drop(raw);
        let end = End::from(&ended?);
        if !self.quiet {
            eprintln!("{}", end.line());
        }
        Ok(end.exit_code())
    }

    /// What goes on beside the output: stdin, signals, and the size of the window.
    fn helpers(&self, session: &Session, running: &mut Running) -> Vec<tokio::task::JoinHandle<()>> {
        let stdin = running.take_stdin();
        let mut helpers = vec![tokio::spawn(pass_signals(running.signaller()))];
        match (self.feeds(), stdin) {
            (true, Some(stdin)) => helpers.push(tokio::spawn(feed(stdin))),
            // Its end is the command's end of input.
            (_, closed) => drop(closed),
        }
        if self.tty {
            helpers.push(tokio::spawn(pass_sizes(session.clone(), running.pid(), self.privileged)));
        }
        helpers
    }

    async fn told(&self, command: Command, screen: Screen) -> Result<u8, Failure> {
        let mut running = command.start().await?;
        let stdin = running.take_stdin();
        let signals = tokio::spawn(pass_signals(running.signaller()));
        let feeding = match (self.feeds(), stdin) {
            (true, Some(stdin)) => Some(tokio::spawn(feed(stdin))),
            _ => None,
        };
        let output = running.wait().await?;
        signals.abort();
        feeding.inspect(tokio::task::JoinHandle::abort);
        let told = Told {
            status: output.status.to_string(),
            exit_code: output.exit_code,
            signal: output.signal.clone(),
            reason: output.reason.clone(),
            duration_ms: output.duration.as_millis(),
            execution_id: output.execution_id.clone(),
            stdout: output.stdout_text().into_owned(),
            stderr: output.stderr_text().into_owned(),
        };
        screen.item(&told, |_| Vec::new())?;
        Ok(End::from(&output).exit_code())
    }
}

/// The command, once its terminal has the size of ours. The protocol has no message for that.
fn sized(argv: Vec<String>) -> Vec<String> {
    let Some((rows, columns)) = terminal::size() else { return argv };
    let line = format!("stty rows {rows} cols {columns} 2>/dev/null; exec \"$@\"");
    ["sh".to_owned(), "-c".to_owned(), line, "sh".to_owned()].into_iter().chain(argv).collect()
}

/// Writes what the command says until it ends.
async fn show(mut running: Running) -> Result<Output, Failure> {
    let (mut out, mut err) = (stdout(), stderr());
    while let Some(event) = running.next().await? {
        let written = match &event {
            Event::Stdout(bytes) => write_now(&mut out, bytes).await,
            Event::Stderr(bytes) => write_now(&mut err, bytes).await,
        };
        // The command ends with `running` when nobody wants its output any more.
        written.map_err(|error| Failure::printing(&error))?;
    }
    Ok(running.wait().await?)
}

async fn write_now(to: &mut (impl tokio::io::AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

async fn feed(mut to: nagaya_client::CommandStdin) {
    // A command that does not read to the end is normal, and a read error of ours is an end.
    let _ = copy(&mut stdin(), &mut to).await;
    let _ = to.shutdown().await;
}

/// Signals for us are the command's. The second interrupt kills it, and the third gives up.
async fn pass_signals(to: Signaller) {
    let (Ok(mut interrupts), Ok(mut ends), Ok(mut hangs)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
    else {
        return pending().await;
    };
    // A signal may wait behind input that the command does not read; what comes next does not wait for it.
    let send = |signal| {
        let to = to.clone();
        drop(tokio::spawn(async move { to.signal(signal).await }));
    };
    let mut count = 0;
    loop {
        tokio::select! {
            _ = interrupts.recv() => {
                count += 1;
                match count {
                    1 => send(Signal::Int),
                    2 => send(Signal::Kill),
                    // The command ends with its connection.
                    _ => std::process::exit(130),
                }
            }
            _ = ends.recv() => send(Signal::Term),
            _ = hangs.recv() => send(Signal::Hup),
        }
    }
}

/// Gives the command's terminal the size of ours whenever that changes: as the command's own user, because nobody
/// else may look at its files.
async fn pass_sizes(session: Session, pid: u64, privileged: bool) {
    let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
    while changes.recv().await.is_some() {
        let Some((rows, columns)) = terminal::size() else { continue };
        let terminal = format!("/proc/{pid}/fd/0");
        let words = ["stty", "-F", &terminal, "rows", &rows.to_string(), "cols", &columns.to_string()];
        // A sandbox without stty keeps the first size.
        let _ = session.command(words.map(str::to_owned)).privileged(privileged).output().await;
    }
}

/// How a command ended.
struct End {
    status: CommandStatus,
    exit_code: i32,
    signal: Option<String>,
    reason: String,
    duration: Duration,
    execution_id: Option<String>,
}

impl From<&Output> for End {
    fn from(output: &Output) -> Self {
        Self {
            status: output.status,
            exit_code: output.exit_code,
            signal: output.signal.clone(),
            reason: output.reason.clone(),
            duration: output.duration,
            execution_id: output.execution_id.clone(),
        }
    }
}

impl End {
    /// What the program ends with: the command's own exit code, as shells count it.
    fn exit_code(&self) -> u8 {
        if self.status == CommandStatus::TimedOut {
            return 124;
        }
        match &self.signal {
            Some(name) => 128 + parse::signal_number(name),
            // Codes have eight bits; what a server invents beyond them is a failure.
            None => u8::try_from(self.exit_code).unwrap_or(255),
        }
    }

    fn line(&self) -> String {
        let how = match (&self.signal, self.status) {
            (_, CommandStatus::TimedOut) => "timed out".to_owned(),
            (Some(name), _) => format!("ended by SIG{}", name.trim_start_matches("SIG")),
            (None, status) => status.to_string(),
        };
        let reason = match self.reason.as_str() {
            "" | "exit" | "signaled" | "timeout" => String::new(),
            reason => format!(" ({})", crate::output::printable(reason)),
        };
        let mut line = format!("{how}{reason}, exit code {}, {}", self.exit_code(), span(self.duration));
        if let Some(id) = &self.execution_id {
            line.push_str(&format!(", execution {}", crate::output::printable(id)));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(status: CommandStatus, exit_code: i32, signal: Option<&str>) -> End {
        End {
            status,
            exit_code,
            signal: signal.map(str::to_owned),
            reason: String::new(),
            duration: Duration::from_millis(12),
            execution_id: None,
        }
    }

    #[test]
    fn exit_codes_are_the_commands() {
        let cases = [
            (end(CommandStatus::Succeeded, 0, None), 0, "succeeded, exit code 0, 12 ms"),
            (end(CommandStatus::Failed, 3, None), 3, "failed, exit code 3, 12 ms"),
            (end(CommandStatus::Failed, -1, Some("KILL")), 137, "ended by SIGKILL, exit code 137, 12 ms"),
            (end(CommandStatus::Failed, -1, Some("SIGTERM")), 143, "ended by SIGTERM, exit code 143, 12 ms"),
            (end(CommandStatus::TimedOut, -1, Some("TERM")), 124, "timed out, exit code 124, 12 ms"),
            (end(CommandStatus::Failed, 4096, None), 255, "failed, exit code 255, 12 ms"),
        ];
        for (end, code, line) in cases {
            assert_eq!((end.exit_code(), end.line().as_str()), (code, line));
        }
    }

    #[test]
    fn the_execution_is_named_where_the_server_names_it() {
        let mut end = end(CommandStatus::Succeeded, 0, None);
        end.execution_id = Some("0190".into());
        assert_eq!(end.line(), "succeeded, exit code 0, 12 ms, execution 0190");
    }
}
