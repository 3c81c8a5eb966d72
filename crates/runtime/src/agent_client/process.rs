//! Running commands, as their holder sees them.

use std::collections::VecDeque;

use bytes::Bytes;
use nagaya_api::error::Code;
use nagaya_engine::ports::{
    Builtin, Command, ExitReason, ExitStatus, GuestError, Process, ProcessEvent, ProcessInput, Signal, Terminal,
    TerminalSize, User, WhenLeft,
};
use nagaya_guest::frame::{DATA_BYTES_MAX, Kind};
use nagaya_guest::messages::{self, EnvironmentVariable, Exit, Input, Resize, TerminalMode, event, outcome, request};
use nagaya_guest::mux::{Incoming, Receiver, Sender, charge};
use tokio::sync::mpsc;

use super::{Counter, Link, briefly, event_of, finish, guest_error, unexpected};

/// Events that wait for their reader, beyond what the stream's window holds.
const EVENTS_MAX: usize = 4;
const INPUTS_MAX: usize = 4;
/// Standard input that is kept here while the command does not read, so that signals behind it in
/// the same queue still arrive. Bytes.
const STDIN_BYTES_MAX: usize = 1024 * 1024;

pub(super) fn to_message(command: Command) -> messages::Command {
    messages::Command {
        argv: command.argv,
        env: command.env.into_iter().map(|(name, value)| EnvironmentVariable { name, value }).collect(),
        cwd: command.cwd,
        privileged: command.user == User::Root,
        pty: command.pty,
        stdin: command.stdin,
        timeout_ms: command.timeout_ms,
        builtin: match command.builtin {
            Some(Builtin::Sftp) => nagaya_guest::agent::SFTP.into(),
            Some(Builtin::Shell) => nagaya_guest::agent::SHELL.into(),
            None => String::new(),
        },
        terminal: terminal(command.terminal).into(),
        hang_up: command.when_left == WhenLeft::HangUp,
    }
}

fn terminal(terminal: Terminal) -> messages::Terminal {
    let mode = |(opcode, value): (u8, u32)| TerminalMode { opcode: opcode.into(), value };
    messages::Terminal { size: terminal.size.map(size).into(), modes: terminal.modes.into_iter().map(mode).collect() }
}

fn size(size: TerminalSize) -> Resize {
    Resize {
        columns: size.columns.into(),
        rows: size.rows.into(),
        width_px: size.width_px.into(),
        height_px: size.height_px.into(),
    }
}

/// Waits until a command has started; its process id.
pub(super) async fn started(receiver: &mut Receiver) -> Result<u32, GuestError> {
    match receiver.next().await {
        Some(Incoming::Message(message)) => match event_of(&message) {
            Some(event::Kind::Started(started)) => Ok(started.pid),
            _ => Err(unexpected(Some(Incoming::Message(message)))),
        },
        Some(Incoming::End(end)) => Err(finish(&end).err().unwrap_or_else(|| unexpected(Some(Incoming::End(end))))),
        other => Err(unexpected(other)),
    }
}

/// Whether memory ran out while a command was running.
#[derive(Clone)]
pub(super) struct OutOfMemory {
    count: Option<Counter>,
    before: u64,
}

impl OutOfMemory {
    /// Remembers the count of now.
    fn watch(link: &Link) -> Self {
        let count = link.out_of_memory_kills.get().cloned();
        let before = count.as_ref().map_or(0, |count| count());
        Self { count, before }
    }

    /// Says of a command that failed how many processes were killed because memory ran out meanwhile, unless that is left
    /// to the agent, and corrects the reason of one that the kernel killed. What ends well is not looked at: that is to cost nothing.
    fn explain(&self, mut status: ExitStatus) -> ExitStatus {
        if status.code == 0 {
            status.memory_kills = 0;
        } else if let Some(count) = &self.count {
            status.memory_kills = count().saturating_sub(self.before);
        }
        if status.reason == ExitReason::Signaled && status.signal == "SIGKILL" && status.memory_kills > 0 {
            status.reason = ExitReason::OutOfMemory;
        }
        status
    }
}

pub(super) async fn run(link: &Link, command: Command) -> Result<Process, GuestError> {
    let out_of_memory = OutOfMemory::watch(link);
    let message = to_message(command);
    let (sender, mut receiver) = link.open(request::Kind::Run(Box::new(message))).await?;
    let pid = briefly(started(&mut receiver)).await?;
    let (input, inputs) = mpsc::channel(INPUTS_MAX);
    let (events, reader) = mpsc::channel(EVENTS_MAX);
    tokio::spawn(attend(sender, receiver, out_of_memory, inputs, events));
    Ok(Process { pid, input, events: reader })
}

/// Carries a command's input and output until it ends or its holder has gone, which ends it.
async fn attend(
    sender: Sender,
    receiver: Receiver,
    out_of_memory: OutOfMemory,
    inputs: mpsc::Receiver<ProcessInput>,
    events: mpsc::Sender<ProcessEvent>,
) {
    let holder = events.clone();
    tokio::select! {
        // Dropping both halves of the stream resets it.
        _ = holder.closed() => {}
        _ = deliver(receiver, out_of_memory, events) => {}
        _ = feed(sender, inputs) => {}
    }
}

/// Passes on what a command puts out, and its exit.
pub(super) async fn deliver(mut receiver: Receiver, out_of_memory: OutOfMemory, events: mpsc::Sender<ProcessEvent>) {
    while let Some(incoming) = receiver.next().await {
        let (event, cost) = match incoming {
            Incoming::Data(data) => charged(data, ProcessEvent::Stdout),
            Incoming::ErrorData(data) => charged(data, ProcessEvent::Stderr),
            Incoming::End(end) => {
                if let Ok(Some(outcome::Kind::Exit(exit))) = finish(&end) {
                    let _ = events.send(ProcessEvent::Exit(out_of_memory.explain(to_status(*exit)))).await;
                }
                return;
            }
            // Something a newer agent says beside.
            Incoming::Message(_) => continue,
            Incoming::Reset => return,
        };
        if events.send(event).await.is_err() {
            return;
        }
        receiver.release(cost);
    }
}

fn charged(data: Bytes, event: fn(Bytes) -> ProcessEvent) -> (ProcessEvent, u32) {
    let cost = charge(data.len());
    (event(data), cost)
}

fn to_status(exit: Exit) -> ExitStatus {
    let short = |text: String| text.chars().take(100).collect();
    ExitStatus {
        code: exit.code,
        signal: short(exit.signal),
        timed_out: exit.timed_out,
        duration_ms: exit.duration_ms,
        // A newer agent may have more of them.
        reason: ExitReason::from_name(&exit.reason).unwrap_or_default(),
        errno: exit.errno,
        memory_kills: exit.memory_kills,
    }
}

/// Passes on what the holder sends. Never returns: the stream's end is the other direction's matter.
async fn feed(sender: Sender, mut inputs: mpsc::Receiver<ProcessInput>) {
    let mut stdin: VecDeque<Bytes> = VecDeque::new();
    let mut waiting = 0;
    let mut open = true;
    let mut closing = false;
    // A second end, or content after it, would break the protocol, and cost the sandbox its connection.
    let mut closed = false;
    loop {
        if closing && stdin.is_empty() {
            sender.end_content();
            closing = false;
        }
        let next = stdin.front().map(Bytes::len);
        tokio::select! {
            input = inputs.recv(), if open && waiting < STDIN_BYTES_MAX => match input {
                Some(ProcessInput::Stdin(data)) if !data.is_empty() && !closed => {
                    waiting += data.len();
                    stdin.extend(split(data));
                }
                Some(ProcessInput::Stdin(_)) => {}
                Some(ProcessInput::StdinClose) if !closed => (closing, closed) = (true, true),
                Some(ProcessInput::StdinClose) => {}
                Some(ProcessInput::Signal(signal)) => tell(&sender, to_signal(signal)).await,
                Some(ProcessInput::Resize(wanted)) => {
                    tell(&sender, messages::input::Kind::Resize(Box::new(size(wanted)))).await;
                }
                None => open = false,
            },
            reserved = sender.reserve(next.unwrap_or(0)), if next.is_some() => {
                let Some(data) = stdin.pop_front().filter(|_| reserved.is_ok()) else {
                    return std::future::pending().await;
                };
                waiting -= data.len();
                let _ = sender.reserved(Kind::Data, data).await;
            }
            else => return std::future::pending().await,
        }
    }
}

fn split(mut data: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || (!data.is_empty()).then(|| data.split_to(data.len().min(DATA_BYTES_MAX))))
}

async fn tell(sender: &Sender, kind: messages::input::Kind) {
    let input = Input { kind: Some(kind) };
    // A closed stream means that the command has ended.
    let _ = sender.message(messages::encode(&input)).await;
}

fn to_signal(signal: Signal) -> messages::input::Kind {
    let signal = match signal {
        Signal::Term => messages::Signal::SIGNAL_TERM,
        Signal::Kill => messages::Signal::SIGNAL_KILL,
        Signal::Int => messages::Signal::SIGNAL_INT,
        Signal::Hup => messages::Signal::SIGNAL_HUP,
        Signal::Usr1 => messages::Signal::SIGNAL_USR1,
        Signal::Usr2 => messages::Signal::SIGNAL_USR2,
    };
    messages::input::Kind::Signal(signal.into())
}

/// The output of a detached command.
pub(super) async fn follow(
    link: &Link,
    id: String,
    exit_only: bool,
) -> Result<mpsc::Receiver<ProcessEvent>, GuestError> {
    let out_of_memory = OutOfMemory::watch(link);
    let request = messages::Follow { execution_id: id, exit_only };
    let (sender, mut receiver) = link.open(request).await?;
    // The first thing that comes tells whether there is such an execution.
    let (events, reader) = mpsc::channel(EVENTS_MAX);
    match receiver.next().await {
        Some(Incoming::Message(message)) if matches!(event_of(&message), Some(event::Kind::Started(_))) => {}
        Some(Incoming::End(end)) => {
            return Err(finish(&end).err().unwrap_or_else(|| guest_error(Code::GuestUnreachable, "")));
        }
        other => return Err(unexpected(other)),
    }
    tokio::spawn(async move {
        let holder = events.clone();
        tokio::select! {
            _ = holder.closed() => {}
            _ = deliver(receiver, out_of_memory, events) => {}
        }
        drop(sender);
    });
    Ok(reader)
}
