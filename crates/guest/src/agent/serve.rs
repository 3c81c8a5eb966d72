//! Answers the requests of one connection.

use std::sync::Arc;

use buffa::Message;
use nagaya_api::error::Code;

use super::command::{Control, Sink, supervise};
use super::directories::Listing;
use super::failure::Failure;
use super::{Agent, blocking, directories, files, program, save, sockets, tcp, usage};
use crate::frame::MESSAGE_BYTES_MAX;
use crate::messages::{self, Command, Entries, Event, Kept, Outcome, Request, Started, encode, request};
use crate::mux::{self, Receiver, Sender};

/// Answers one request, to the end of its stream.
pub async fn answer(agent: Arc<Agent>, incoming: mux::Request) {
    let mux::Request { payload, sender, mut receiver } = incoming;
    let request = messages::decode::<Request>(&payload).ok().and_then(|request| request.kind);
    // The payload is as large as a command's environment; it is not needed any more.
    drop(payload);
    let result = match request {
        Some(request::Kind::Run(command)) => run(&agent, *command, &sender, receiver).await,
        Some(request) => other(&agent, request, &sender, &mut receiver).await,
        // A newer server asks for something this agent does not know.
        None => Err(Failure::new(Code::CapabilityUnavailable, "the sandbox's agent does not know this request")),
    };
    let outcome = result.unwrap_or_else(|failure| failure.outcome());
    sender.end(encode(&outcome));
    agent.answered.notify_one();
}

async fn other(
    agent: &Arc<Agent>,
    request: request::Kind,
    sender: &Sender,
    receiver: &mut Receiver,
) -> Result<Outcome, Failure> {
    use request::Kind;
    let files = agent.clone();
    Ok(match request {
        Kind::Run(_) => unreachable!("answered by the caller"),
        Kind::RunDetached(request) => {
            let command = request.command.into_option().unwrap_or_default();
            let pid = agent.executions.start(agent, request.execution_id, command).await?;
            started(sender, pid).await?;
            Outcome::default()
        }
        Kind::Follow(request) => {
            let exit = match request.exit_only {
                true => agent.executions.follow_exit(&request.execution_id, sender).await?,
                false => agent.executions.follow(&agent.clock, &request.execution_id, sender).await?,
            };
            Outcome { kind: exit.into() }
        }
        Kind::Forget(request) => {
            agent.executions.forget(&request.execution_id);
            Outcome::default()
        }
        Kind::KeptOutput(_) => {
            let kept = Kept { bytes: agent.executions.kept() };
            Outcome { kind: kept.into() }
        }
        Kind::MeasureUsage(_) => Outcome { kind: usage::measure(agent).await?.into() },
        Kind::Suspend(_) => {
            agent.clock.suspend();
            Outcome::default()
        }
        Kind::Continue(_) => {
            agent.clock.go_on();
            Outcome::default()
        }
        Kind::AwaitPowerOff(_) => {
            tokio::select! {
                () = agent.power.off() => {}
                () = sender.closed() => {}
            }
            Outcome::default()
        }
        Kind::Connect(request) => sockets::connect(agent, *request, sender, receiver).await?,
        Kind::Listen(request) => sockets::listen(agent, *request, sender, receiver).await?,
        Kind::ConnectTcp(request) => tcp::connect(*request, sender, receiver).await?,
        Kind::ListenTcp(request) => tcp::listen(agent, *request, sender, receiver).await?,
        Kind::Accept(request) => sockets::accept(agent, *request, sender, receiver).await?,
        Kind::ReadFile(request) => files::read(agent, *request, sender).await?,
        Kind::WriteFile(request) => save::write(agent, *request, sender, receiver).await?,
        Kind::Stat(request) => {
            let status = blocking(move || directories::status(&files.root, &request.path)).await?;
            Outcome { kind: status.into() }
        }
        Kind::MakeDirectory(request) => {
            let made = blocking(move || directories::make(&files.root, &request)).await?;
            Outcome { kind: made.into() }
        }
        Kind::Remove(request) => {
            let removed = blocking(move || directories::remove(&files.root, &request)).await?;
            Outcome { kind: removed.into() }
        }
        Kind::ListDirectory(request) => {
            let mut listing = blocking(move || Listing::begin(&files.root, &request)).await?;
            loop {
                let (rest, part) = blocking(move || listing.read().map(|part| (listing, part))).await?;
                listing = rest;
                if part.is_empty() {
                    break;
                }
                send_entries(part, sender).await?;
            }
            Outcome::default()
        }
    })
}

async fn run(agent: &Arc<Agent>, command: Command, sender: &Sender, receiver: Receiver) -> Result<Outcome, Failure> {
    let timeout_ms = command.timeout_ms;
    let running = program::start(agent, command).await?;
    agent.busy.notify_one();
    // When nobody listens any more, supervision finds out in its own way.
    let _ = started(sender, running.pid as u32).await;
    let exit =
        supervise(agent, running, timeout_ms, Sink::Stream(sender.clone()), Some(Control::Stream(receiver))).await;
    Ok(Outcome { kind: exit.into() })
}

/// Tells that a command has been started.
pub async fn started(sender: &Sender, pid: u32) -> Result<(), Failure> {
    let event = Event { kind: Started { pid }.into() };
    sender.message(encode(&event)).await.map_err(|_| Failure::new(Code::GuestUnreachable, ""))
}

async fn send_entries(entries: Vec<messages::Entry>, sender: &Sender) -> Result<(), Failure> {
    // Room for the largest entry: a name of 255 bytes, three per unreadable one, and its numbers.
    const PART_BYTES_MAX: usize = MESSAGE_BYTES_MAX - 1024;
    let mut part = Entries::default();
    let mut bytes = 0;
    let mut entries = entries.into_iter().peekable();
    while let Some(entry) = entries.next() {
        bytes += entry.encoded_len() as usize + 8;
        part.entries.push(entry);
        if bytes >= PART_BYTES_MAX || entries.peek().is_none() {
            let event = Event { kind: std::mem::take(&mut part).into() };
            sender.message(encode(&event)).await.map_err(|_| Failure::new(Code::GuestUnreachable, ""))?;
            bytes = 0;
        }
    }
    Ok(())
}
