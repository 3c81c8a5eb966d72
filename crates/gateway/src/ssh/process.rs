//! Shells, commands and the file server: from a channel to a process in the sandbox.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use nagaya_engine::ports::{Builtin, Command, ExitStatus, Process, ProcessEvent, ProcessInput, Terminal, WhenLeft};
use russh::server::Msg;
use russh::{ChannelWriteHalf, Sig};
use tokio::sync::mpsc;

use super::connection::Visitor;
use super::inbound::{ChannelReader, Item};

/// Extended data of this kind is standard error.
const STANDARD_ERROR: u32 = 1;
/// The guest takes this much at once.
const INPUT_BYTES_MAX: usize = 64 * 1024;
/// With what a command ends that could not be started, or whose end is not known.
const NO_STATUS: u32 = 255;
/// Where images that have sftp-server keep it: for sandboxes older than the file server that all have.
const SFTP_SERVER: &str = "/usr/lib/openssh/sftp-server";
/// For accounts whose own shell is missing, and for sandboxes that are older than the question for it.
const BASH: &str = "/bin/bash";
const SHELL: &str = "/bin/sh";

/// What a client asked to run on a channel.
#[derive(Debug)]
pub enum Program {
    Shell,
    Command(String),
    FileServer,
}

/// What was agreed on for a channel before something is started on it.
#[derive(Debug, Default)]
pub struct Preparation {
    pub env: BTreeMap<String, String>,
    /// A terminal, with its kind, such as `xterm`.
    pub terminal: Option<(String, Terminal)>,
}

/// Runs a program to its end, or until the channel is closed: the program loses its streams then, and no more.
pub async fn run(
    visitor: Arc<Visitor>,
    program: Program,
    preparation: Preparation,
    write: ChannelWriteHalf<Msg>,
    mut intake: ChannelReader,
) {
    let id = write.id();
    let hangs_up = preparation.terminal.is_some();
    let command = command(&visitor, &program, preparation).await;
    let name = command.argv.first().cloned().unwrap_or_default();
    let execution = visitor.commands().new_execution();
    let process = match visitor.guest().run(command).await {
        Ok(process) => process,
        Err(error) => {
            visitor.commands().not_started(execution, &name, &error).await;
            tracing::debug!(session = %visitor.session_id(), %error, "a program was not started for an SSH client");
            if matches!(program, Program::FileServer) {
                let _ = visitor.handle.channel_failure(id).await;
            } else {
                let _ = visitor.handle.channel_success(id).await;
                let text = format!("nagaya: {error}\r\n");
                let _ = write.extended_data_bytes(STANDARD_ERROR, Bytes::from(text)).await;
                let _ = write.exit_status(NO_STATUS).await;
            }
            let _ = write.close().await;
            return;
        }
    };
    let _ = visitor.handle.channel_success(id).await;
    let Process { input, mut events, .. } = process;
    let expired = intake.expired();
    tokio::select! {
        biased;
        // Going away drops the events, and so closes the program's streams.
        () = expired => {}
        () = feed(&mut intake, &input, hangs_up) => {}
        status = deliver(&mut events, &write) => {
            if let Some(status) = &status {
                visitor.commands().ended(execution, &name, status).await;
            }
            tell_end(&visitor, status, &write).await;
        }
    }
}

async fn command(visitor: &Visitor, program: &Program, preparation: Preparation) -> Command {
    let Preparation { env: asked, terminal } = preparation;
    let mut env = visitor.env();
    env.extend(asked);
    let pty = terminal.is_some();
    let (kind, terminal) = terminal.unwrap_or_default();
    if !kind.is_empty() {
        env.insert("TERM".to_owned(), kind);
    }
    let shell = visitor.shell(BASH, SHELL).await.to_owned();
    let (builtin, argv) = match program {
        Program::Shell => (Builtin::Shell, vec![shell, "-l".to_owned()]),
        Program::Command(command) => (Builtin::Shell, vec![shell, "-c".to_owned(), command.clone()]),
        Program::FileServer => (Builtin::Sftp, vec![SFTP_SERVER.to_owned()]),
    };
    Command {
        argv,
        env,
        user: visitor.user(),
        pty,
        stdin: true,
        builtin: Some(builtin),
        terminal,
        when_left: WhenLeft::HangUp,
        ..Command::default()
    }
}

/// Passes on what the client sends. When the channel is closed a program at a terminal has lost it, and this returns;
/// any other may still work on what it was sent, as long as that is waited for.
async fn feed(intake: &mut ChannelReader, input: &mpsc::Sender<ProcessInput>, hangs_up: bool) {
    // A client may say anything after its end of file; a program has one.
    let mut ended = false;
    while let Some(item) = intake.next().await {
        let sent = match item {
            Item::Data(_) | Item::EndOfFile if ended => Ok(()),
            Item::Data(mut data) => {
                while data.len() > INPUT_BYTES_MAX {
                    let _ = input.send(ProcessInput::Stdin(data.split_to(INPUT_BYTES_MAX))).await;
                }
                input.send(ProcessInput::Stdin(data)).await
            }
            Item::EndOfFile => {
                ended = true;
                input.send(ProcessInput::StdinClose).await
            }
            Item::Signal(signal) => input.send(ProcessInput::Signal(signal)).await,
            Item::Resize(size) => input.send(ProcessInput::Resize(size)).await,
        };
        if sent.is_err() {
            // The program has ended; how is told by its events.
            return std::future::pending().await;
        }
    }
    if !hangs_up {
        if !ended {
            let _ = input.send(ProcessInput::StdinClose).await;
        }
        std::future::pending::<()>().await;
    }
}

/// Passes on what the program puts out, as the client makes room; how it ended, if that is known.
async fn deliver(events: &mut mpsc::Receiver<ProcessEvent>, write: &ChannelWriteHalf<Msg>) -> Option<ExitStatus> {
    loop {
        let sent = match events.recv().await? {
            ProcessEvent::Stdout(data) => write.data_bytes(data).await,
            ProcessEvent::Stderr(data) => write.extended_data_bytes(STANDARD_ERROR, data).await,
            ProcessEvent::Exit(status) => return Some(status),
        };
        sent.ok()?;
    }
}

async fn tell_end(visitor: &Visitor, status: Option<ExitStatus>, write: &ChannelWriteHalf<Msg>) {
    let _ = write.eof().await;
    match status {
        Some(status) if !status.signal.is_empty() => {
            let name = status.signal.strip_prefix("SIG").unwrap_or(&status.signal).to_owned();
            let handle = &visitor.handle;
            let _ = handle
                .exit_signal_request(
                    write.id(),
                    Sig::Custom(name),
                    false,
                    status.reason.name().to_owned(),
                    String::new(),
                )
                .await;
        }
        Some(status) => {
            let _ = write.exit_status(u32::try_from(status.code).unwrap_or(NO_STATUS)).await;
        }
        // The connection to the sandbox was lost: a channel that closes without a status says so.
        None => {}
    }
    let _ = write.close().await;
}
