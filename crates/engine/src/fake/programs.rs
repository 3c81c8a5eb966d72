//! What fake sandboxes can run: `true`, `false`, `exit N`, `echo …`, `both OUT ERR`, `env`, `pwd`,
//! `cat`, `yes BYTES` (that many on stdout), `hang` (until a signal or the timeout).

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use nagaya_api::error::Code;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::guest::refuse;
use crate::ports::{Command, ExitReason, ExitStatus, GuestError, Process, ProcessEvent, ProcessInput, Signal, User};

const CHANNEL_MAX: usize = 4;
/// Every fake command says that this is its number.
pub(super) const PID: u32 = 42;
const PROGRAMS: [&str; 10] = ["true", "false", "exit", "echo", "both", "env", "pwd", "cat", "yes", "hang"];

/// Starts a command that says where it runs, in a sandbox whose user has this name.
pub(super) fn start(
    command: Command,
    user: &str,
    death: watch::Receiver<Option<String>>,
) -> Result<Process, GuestError> {
    match command.argv.first() {
        None => return refuse(Code::InvalidCommand, 0),
        Some(program) if !PROGRAMS.contains(&program.as_str()) => return refuse(Code::CommandNotFound, 2),
        Some(_) => {}
    }
    let (input, inputs) = mpsc::channel(CHANNEL_MAX);
    let (outputs, events) = mpsc::channel(CHANNEL_MAX);
    let user = if command.user == User::Root { "root" } else { user };
    tokio::spawn(live(command, user.to_owned(), inputs, outputs, death));
    Ok(Process { pid: PID, input, events })
}

fn exit(code: i32) -> ExitStatus {
    ExitStatus { code, ..ExitStatus::default() }
}

/// Runs the program until it ends, is killed, times out, or its sandbox dies.
async fn live(
    command: Command,
    user: String,
    inputs: mpsc::Receiver<ProcessInput>,
    outputs: mpsc::Sender<ProcessEvent>,
    mut death: watch::Receiver<Option<String>>,
) {
    let started = Instant::now();
    let timeout_ms = command.timeout_ms;
    let timeout = async {
        match timeout_ms {
            0 => std::future::pending().await,
            // The sandbox has its own time; the engine's clock does not reach into it.
            #[allow(clippy::disallowed_methods)]
            ms => tokio::time::sleep(Duration::from_millis(ms)).await,
        }
    };
    let death = async { drop(death.wait_for(Option::is_some).await) };
    let mut status = tokio::select! {
        biased;
        () = death => {
            ExitStatus { code: -1, reason: ExitReason::SessionEnded, ..ExitStatus::default() }
        }
        // Its holder let go.
        () = outputs.closed() => return,
        () = timeout => ExitStatus {
            code: -1,
            signal: "SIGTERM".to_owned(),
            timed_out: true,
            reason: ExitReason::TimedOut,
            ..ExitStatus::default()
        },
        status = program(command, user, inputs, &outputs) => status,
    };
    status.duration_ms = started.elapsed().as_millis() as u64;
    let _ = outputs.send(ProcessEvent::Exit(status)).await;
}

async fn program(
    command: Command,
    user: String,
    mut inputs: mpsc::Receiver<ProcessInput>,
    outputs: &mpsc::Sender<ProcessEvent>,
) -> ExitStatus {
    let out = |text: String| outputs.send(ProcessEvent::Stdout(text.into()));
    let argument = |index: usize| command.argv.get(index).map_or("", String::as_str);
    match argument(0) {
        "false" => return exit(1),
        "exit" => return exit(argument(1).parse().unwrap_or(2)),
        "echo" => {
            let _ = out(format!("{}\n", command.argv[1..].join(" "))).await;
        }
        "both" => {
            let _ = out(argument(1).to_owned()).await;
            let _ = outputs.send(ProcessEvent::Stderr(argument(2).to_owned().into())).await;
        }
        "env" => {
            let mut env = BTreeMap::from([("USER".to_owned(), user)]);
            env.extend(command.env.clone());
            let _ = out(env.iter().map(|(key, value)| format!("{key}={value}\n")).collect()).await;
        }
        "pwd" => {
            let _ = out(format!("{}\n", command.cwd)).await;
        }
        "yes" => {
            let mut left: usize = argument(1).parse().unwrap_or(0);
            let block = Bytes::from(vec![b'y'; 64 * 1024]);
            while left > 0 {
                let next = block.slice(..left.min(block.len()));
                left -= next.len();
                if outputs.send(ProcessEvent::Stdout(next)).await.is_err() {
                    break;
                }
            }
        }
        "cat" if command.stdin => return listen(&mut inputs, Some(outputs)).await,
        "hang" => return listen(&mut inputs, None).await,
        _ => {}
    }
    exit(0)
}

/// Waits for input: what arrives on stdin is copied to `echo` where given, and its end is the end.
async fn listen(inputs: &mut mpsc::Receiver<ProcessInput>, echo: Option<&mpsc::Sender<ProcessEvent>>) -> ExitStatus {
    while let Some(input) = inputs.recv().await {
        match (input, echo) {
            (ProcessInput::Stdin(bytes), Some(echo)) => {
                let _ = echo.send(ProcessEvent::Stdout(bytes)).await;
            }
            (ProcessInput::StdinClose, Some(_)) => return exit(0),
            (ProcessInput::Signal(signal), _) => {
                let signal = match signal {
                    Signal::Term => "SIGTERM",
                    Signal::Kill => "SIGKILL",
                    Signal::Int => "SIGINT",
                    Signal::Hup => "SIGHUP",
                    Signal::Usr1 => "SIGUSR1",
                    Signal::Usr2 => "SIGUSR2",
                };
                let (signal, reason) = (signal.to_owned(), ExitReason::Signaled);
                return ExitStatus { code: -1, signal, reason, ..ExitStatus::default() };
            }
            _ => {}
        }
    }
    // No more input will come, which is no reason to end.
    std::future::pending().await
}
