//! Commands in a sandbox.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use connectrpc::client::{BidiRecvHalf, BidiSendHalf, BidiStream};
use hyper::body::Incoming;
use nagaya_api::tenki::client::Whole;
use nagaya_api::tenki::v1::run_request::Payload as Input;
use nagaya_api::tenki::v1::run_response::Payload as Answer;
use nagaya_api::tenki::v1::run_signal::Sig;
use nagaya_api::tenki::v1::{self, SandboxSessionDataPlaneServiceRunRequest as Request};
use serde::{Serialize, Serializer};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::pipe::{AbortOnDrop, FRAME_BYTES_MAX, Pipe, pipe};
use crate::{Error, RefusalKind, Result, Session, Status, wire};

/// Names the command in a server's records; only servers of Nagaya send it.
const EXECUTION_ID: &str = "x-nagaya-execution-id";
/// Signals that wait to be sent.
const SIGNALS_MAX: usize = 8;

type Stream = BidiStream<Incoming, Request, Whole<v1::SandboxSessionDataPlaneServiceRunResponse>>;
type Answers = BidiRecvHalf<Incoming, Whole<v1::SandboxSessionDataPlaneServiceRunResponse>>;

/// A command that is about to be run. Nothing interprets its arguments: a shell is one more argument vector.
#[derive(Clone)]
#[must_use = "a command does nothing until it is started"]
pub struct Command {
    session: Session,
    start: v1::RunStart,
    stdin: Option<Bytes>,
}

/// Signals that can be sent to a command and all it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Signal {
    Term,
    Kill,
    Int,
    Hup,
    Usr1,
    Usr2,
}

/// What a running command wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Stdout(Bytes),
    Stderr(Bytes),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandStatus {
    /// With exit code 0.
    Succeeded,
    Failed,
    /// It was ended because it ran longer than it was given.
    TimedOut,
}

/// What a command did.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Output {
    pub status: CommandStatus,
    /// -1 when a signal ended it.
    pub exit_code: i32,
    /// The name of the signal that ended it, such as `KILL`.
    pub signal: Option<String>,
    /// Why it ended, in the server's words, such as `exit` or `timeout`.
    pub reason: String,
    pub errno: i32,
    #[serde(serialize_with = "wire::serialize_span")]
    pub duration: Duration,
    #[serde(serialize_with = "serialize_text")]
    pub stdout: Bytes,
    #[serde(serialize_with = "serialize_text")]
    pub stderr: Bytes,
    /// The command's name in the server's records; `None` where the server has none.
    pub execution_id: Option<String>,
}

fn serialize_text<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&String::from_utf8_lossy(bytes))
}

impl Session {
    /// A command with this program and these arguments.
    ///
    /// The program is looked up in the sandbox's `PATH` and runs as the user `tenki` in `/home/tenki`,
    /// without a time limit.
    pub fn command(&self, argv: impl IntoIterator<Item = impl Into<String>>) -> Command {
        let start = v1::RunStart {
            session_id: self.id().to_owned(),
            cmd: argv.into_iter().map(Into::into).collect(),
            stream_stdin: true,
            ..Default::default()
        };
        Command { session: self.clone(), start, stdin: None }
    }

    /// A script for the sandbox's `sh`, run as by a login.
    pub fn shell(&self, script: impl Into<String>) -> Command {
        self.command(["sh".to_owned(), "-lc".to_owned(), script.into()])
    }
}

impl Command {
    /// Sets a variable on top of the session's environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.start.env.insert(name.into(), value.into());
        self
    }

    pub fn envs(mut self, env: impl IntoIterator<Item = (impl Into<String>, impl Into<String>)>) -> Self {
        let env: BTreeMap<String, String> = env.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        self.start.env.extend(env);
        self
    }

    /// The directory it runs in; relative ones begin at `/home/tenki`.
    pub fn cwd(mut self, path: impl Into<String>) -> Self {
        self.start.cwd = path.into();
        self
    }

    /// How long it may run, to the millisecond. The server ends it then; zero is no limit.
    pub fn timeout(mut self, limit: Duration) -> Self {
        let milliseconds = limit.as_millis().max(u128::from(!limit.is_zero()));
        self.start.timeout_ms = u32::try_from(milliseconds).unwrap_or(u32::MAX);
        self
    }

    /// Whether it runs as root of the sandbox.
    pub fn privileged(mut self, privileged: bool) -> Self {
        self.start.privileged = privileged;
        self
    }

    /// Whether it gets a terminal of its own; stdout and stderr are one then.
    pub fn pty(mut self, pty: bool) -> Self {
        self.start.pty = pty;
        self
    }

    /// All that it reads from stdin. Otherwise [`Running::take_stdin`] writes there, or nobody does.
    pub fn stdin(mut self, content: impl Into<Bytes>) -> Self {
        self.stdin = Some(content.into());
        self
    }

    /// Runs it to its end and collects what it writes.
    pub async fn output(self) -> Result<Output> {
        self.start().await?.wait().await
    }

    /// Starts it.
    ///
    /// Fails with [`RefusalKind::FileNotFound`](crate::RefusalKind::FileNotFound) when the program or the directory does not exist, and with
    /// [`Error::StartFailed`] when it cannot be started for another reason.
    pub async fn start(self) -> Result<Running> {
        let (stream, pid) = self.open().await?;
        let header = stream.headers().and_then(|headers| headers.get(EXECUTION_ID));
        let execution_id = header.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let (requests, answers) = stream.into_split();
        let (pipe, input) = pipe(FRAME_BYTES_MAX);
        let (signals, sent) = mpsc::channel(SIGNALS_MAX);
        let mut stdin = Some(CommandStdin { pipe });
        let feed = self.stdin.and_then(|content| {
            let mut stdin = stdin.take()?;
            // A command that does not read it all is nothing unusual.
            let feed = async move { drop(stdin.write_all(&content).await) };
            Some(AbortOnDrop(tokio::spawn(feed)))
        });
        Ok(Running {
            pid,
            execution_id,
            answers,
            stdin,
            signaller: Signaller { signals },
            exit: None,
            _pump: AbortOnDrop(tokio::spawn(pump(requests, input, sent))),
            _feed: feed,
        })
    }

    /// The stream of a command that runs, and its process.
    async fn open(&self) -> Result<(Stream, u64)> {
        if self.start.cmd.is_empty() {
            return Err(Error::InvalidOptions("a command needs at least the name of its program".into()));
        }
        let opened = self.session.data().call(|data| {
            let start = request(Input::Start(Box::new(self.start.clone())));
            async move {
                let mut stream = data.run().await?;
                // When it cannot be sent, the answer says why.
                let _ = stream.send(start).await;
                let first = stream.message().await?;
                Ok((stream, first.and_then(|message| message.frame.payload.clone())))
            }
        });
        let (stream, first) = opened.await.map_err(Error::or_capability)?;
        match first {
            Some(Answer::Started(started)) => Ok((stream, started.pid)),
            Some(Answer::Exit(exit)) => {
                let failed = Error::StartFailed { reason: exit.reason.clone(), errno: exit.errno };
                Err(ended_otherwise(&exit).unwrap_or(failed))
            }
            Some(_) => Err(Error::bad_answer("output of a command that was not started")),
            None => Err(Error::StreamClosed("the server did not say whether the command started".into())),
        }
    }
}

fn request(payload: Input) -> Request {
    Request { frame: v1::RunRequest { payload: Some(payload) }.into() }
}

/// Carries input and signals to a command. Signals do not wait for input.
async fn pump(
    mut requests: BidiSendHalf<Request>,
    mut stdin: mpsc::Receiver<Bytes>,
    mut signals: mpsc::Receiver<Signal>,
) {
    let mut open = true;
    loop {
        let payload = tokio::select! {
            biased;
            Some(signal) = signals.recv() => {
                Input::Signal(Box::new(v1::RunSignal { signal: signal.wire().into() }))
            }
            bytes = stdin.recv(), if open => match bytes {
                Some(bytes) => Input::Stdin(bytes),
                None => {
                    open = false;
                    Input::StdinClose(true)
                }
            },
            else => return,
        };
        if requests.send(request(payload)).await.is_err() {
            return;
        }
    }
}

/// A command that was started. Dropping it ends the command.
pub struct Running {
    pid: u64,
    execution_id: Option<String>,
    answers: Answers,
    stdin: Option<CommandStdin>,
    signaller: Signaller,
    exit: Option<v1::RunExit>,
    _pump: AbortOnDrop<()>,
    _feed: Option<AbortOnDrop<()>>,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl Running {
    /// The process in the sandbox.
    pub fn pid(&self) -> u64 {
        self.pid
    }

    /// The command's name in the server's records; `None` where the server has none.
    pub fn execution_id(&self) -> Option<&str> {
        self.execution_id.as_deref()
    }

    /// The command's stdin, once. Shutting it down or dropping it is the end of the input.
    pub fn take_stdin(&mut self) -> Option<CommandStdin> {
        self.stdin.take()
    }

    /// What the command wrote next; `None` once it has ended. May be dropped and called again without loss.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        loop {
            let message = match self.answers.message().await {
                Ok(message) => message,
                // How it ended is known already.
                Err(_) if self.exit.is_some() => None,
                Err(error) => return Err(Error::of_rpc(error)),
            };
            match message.map(|message| message.frame.payload.clone()) {
                Some(Some(Answer::Stdout(bytes))) => return Ok(Some(Event::Stdout(bytes))),
                Some(Some(Answer::Stderr(bytes))) => return Ok(Some(Event::Stderr(bytes))),
                Some(Some(Answer::Exit(exit))) => self.exit = Some(*exit),
                Some(_) => {}
                None if self.exit.is_some() => return Ok(None),
                None => return Err(Error::StreamClosed("the server did not say how the command ended".into())),
            }
        }
    }

    /// Sends a signal to the command and all it started. One to a command that has ended is forgotten.
    ///
    /// It comes after the input that is on its way: a command that reads none of megabytes of input gets it late or
    /// never. Dropping this ends any command.
    pub async fn signal(&self, signal: Signal) {
        self.signaller.signal(signal).await;
    }

    pub async fn kill(&self) {
        self.signal(Signal::Kill).await;
    }

    /// Sends signals from elsewhere while this one waits.
    pub fn signaller(&self) -> Signaller {
        self.signaller.clone()
    }

    /// Waits until it ends; collects what it wrote and [`Running::next`] did not take. Its input ends
    /// unless [`Running::take_stdin`] took it.
    pub async fn wait(mut self) -> Result<Output> {
        drop(self.stdin.take());
        let (mut stdout, mut stderr) = (BytesMut::new(), BytesMut::new());
        while let Some(event) = self.next().await? {
            match event {
                Event::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                Event::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            }
        }
        let exit = self.exit.take().unwrap_or_default();
        match ended_otherwise(&exit) {
            Some(error) => Err(error),
            None => Ok(Output::new(exit, stdout.freeze(), stderr.freeze(), self.execution_id.take())),
        }
    }
}

/// What else than the command's own end a server reports as its end.
fn ended_otherwise(exit: &v1::RunExit) -> Option<Error> {
    let reason = &exit.reason;
    if reason.starts_with("capability_unavailable") || reason.starts_with("first_frame_timeout") {
        Some(Error::capability(reason.clone()))
    } else if let Some(cause) = reason.strip_prefix("session_terminated:") {
        let message = format!("session is terminated: {cause} [session_terminated]");
        Some(Error::refused(RefusalKind::SessionTerminated, Status::FailedPrecondition, message))
    } else {
        None
    }
}

/// Sends signals to a running command. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Signaller {
    signals: mpsc::Sender<Signal>,
}

impl Signaller {
    /// Sends a signal. One to a command that has ended is forgotten.
    pub async fn signal(&self, signal: Signal) {
        let _ = self.signals.send(signal).await;
    }

    pub async fn kill(&self) {
        self.signal(Signal::Kill).await;
    }
}

impl Signal {
    fn wire(self) -> Sig {
        match self {
            Self::Term => Sig::Term,
            Self::Kill => Sig::Kill,
            Self::Int => Sig::Int,
            Self::Hup => Sig::Hup,
            Self::Usr1 => Sig::Usr1,
            Self::Usr2 => Sig::Usr2,
        }
    }
}

/// The stdin of a running command.
pub struct CommandStdin {
    pipe: Pipe,
}

impl AsyncWrite for CommandStdin {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(context)
    }
}

impl Output {
    fn new(exit: v1::RunExit, stdout: Bytes, stderr: Bytes, execution_id: Option<String>) -> Self {
        let status = match &exit {
            exit if exit.exit_code == 0 && exit.signal.is_empty() => CommandStatus::Succeeded,
            exit if exit.timed_out => CommandStatus::TimedOut,
            _ => CommandStatus::Failed,
        };
        Self {
            status,
            exit_code: exit.exit_code,
            signal: Some(exit.signal).filter(|signal| !signal.is_empty()),
            reason: exit.reason,
            errno: exit.errno,
            duration: Duration::from_millis(exit.duration_ms),
            stdout,
            stderr,
            execution_id,
        }
    }

    pub fn is_success(&self) -> bool {
        self.status == CommandStatus::Succeeded
    }

    /// What it wrote to stdout, with replacement characters for what is not UTF-8.
    pub fn stdout_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.stdout)
    }

    pub fn stderr_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.stderr)
    }

    /// This, or an error when the command did not succeed: [`Error::CommandTimedOut`] or [`Error::CommandFailed`].
    pub fn check(self) -> Result<Self> {
        match self.status {
            CommandStatus::Succeeded => Ok(self),
            CommandStatus::TimedOut => Err(Error::CommandTimedOut { output: Box::new(self) }),
            CommandStatus::Failed => Err(Error::CommandFailed { output: Box::new(self) }),
        }
    }

    pub(crate) fn describe_failure(&self) -> String {
        let end = match &self.signal {
            Some(signal) => format!("the command was ended by signal {signal}"),
            None => format!("the command ended with exit code {}", self.exit_code),
        };
        let stderr = self.stderr_text();
        match stderr.trim_end().lines().last() {
            Some(line) => format!("{end}: {line}"),
            None => end,
        }
    }
}

impl fmt::Display for CommandStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(exit_code: i32, signal: &str, timed_out: bool) -> Output {
        let exit = v1::RunExit { exit_code, signal: signal.into(), timed_out, ..Default::default() };
        Output::new(exit, Bytes::new(), Bytes::from_static(b"first\nlast\n"), None)
    }

    #[test]
    fn how_a_command_ended_follows_from_its_exit() {
        assert_eq!(output(0, "", false).status, CommandStatus::Succeeded);
        assert_eq!(output(-1, "KILL", true).status, CommandStatus::TimedOut);
        assert_eq!(output(124, "", true).status, CommandStatus::TimedOut);
        assert_eq!(output(0, "TERM", false).status, CommandStatus::Failed);
        assert!(output(0, "", false).check().is_ok());
        assert!(matches!(output(1, "", true).check(), Err(Error::CommandTimedOut { .. })));
        let failed = output(3, "", false).check().expect_err("exit code 3");
        assert_eq!(failed.to_string(), "the command ended with exit code 3: last");
    }

    #[test]
    fn some_ends_are_not_the_commands_own() {
        let of = |reason: &str| ended_otherwise(&v1::RunExit { reason: reason.into(), ..Default::default() });
        assert!(matches!(of("capability_unavailable: pty"), Some(Error::CapabilityUnavailable(_))));
        assert!(matches!(of("first_frame_timeout"), Some(Error::PrimitiveTimeout(_))));
        assert!(matches!(
            of("session_terminated:idle"),
            Some(Error::Refused { kind: RefusalKind::SessionTerminated, .. })
        ));
        assert!(of("exit").is_none());
    }
}
