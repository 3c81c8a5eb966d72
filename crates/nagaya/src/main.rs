//! The one binary of Nagaya.

mod backup;
mod config;
mod demo;
mod doctor;
mod guard;
mod images;
mod output;
mod purge;
mod recover;
mod serve;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use config::{Config, Flags};
pub use output::say;
use tracing_subscriber::EnvFilter;

/// A sandbox cloud that anyone can run: isolated Linux machines in milliseconds.
#[derive(Parser)]
#[command(name = "nagaya", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    #[command(flatten)]
    Client(nagaya_cli::Verb),
    #[command(flatten)]
    Server(ServerVerb),
}

#[derive(Subcommand)]
enum ServerVerb {
    /// Run the server. Sandboxes live on when it stops; the next start takes them over.
    Serve {
        #[command(flatten)]
        flags: Flags,
        /// Remove sandboxes, volumes and snapshots that the database does not name, for good; without this, a start that would is refused.
        #[arg(long)]
        discard: bool,
    },
    /// Show that it works: one sandbox, a program in it, a file written and read, all removed.
    Demo,
    /// Tell what this host can do, what is missing, and what fixes it.
    Doctor(Flags),
    /// Write a consistent copy of the records to a new file, also while the server runs.
    Backup {
        /// The file to write; it must not exist.
        file: PathBuf,
        #[command(flatten)]
        flags: Flags,
    },
    /// Give records again to what lies in a data directory whose database is missing, damaged or older. The server must not run.
    Recover(Flags),
    /// Remove every sandbox of a data directory, and the directory's content.
    Purge(Flags),
}

fn main() -> ExitCode {
    match Arguments::try_parse() {
        Ok(Arguments { verb: Verb::Client(verb) }) => nagaya_cli::run(verb, Arguments::command),
        Ok(Arguments { verb: Verb::Server(verb) }) => serve_or_report(verb),
        Err(error) => {
            // Nobody is left to tell when this cannot be printed.
            let _ = error.print();
            if error.use_stderr() { nagaya_cli::USAGE_EXIT.into() } else { ExitCode::SUCCESS }
        }
    }
}

fn serve_or_report(verb: ServerVerb) -> ExitCode {
    let quiet = matches!(verb, ServerVerb::Demo | ServerVerb::Doctor(_));
    let filter =
        EnvFilter::try_from_env("NAGAYA_LOG").unwrap_or_else(|_| EnvFilter::new(if quiet { "error" } else { "info" }));
    let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colour)
        // It would be told on standard error, with a panic when that fails too.
        .log_internal_errors(false)
        .with_writer(output::start_log())
        .init();
    let done = match verb {
        ServerVerb::Serve { flags, discard } => Config::load(flags).and_then(|mut config| {
            config.engine.discard_unrecorded = discard;
            serve::run(config)
        }),
        ServerVerb::Backup { file, flags } => Config::load(flags).and_then(|config| backup::run(&config, &file)),
        ServerVerb::Recover(flags) => Config::load(flags).and_then(recover::run),
        ServerVerb::Demo => demo::run(),
        ServerVerb::Doctor(flags) => Config::load(flags).and_then(|config| doctor::run(&config)),
        ServerVerb::Purge(flags) => Config::load(flags).and_then(purge::run),
    };
    let code = done.unwrap_or_else(|error| {
        output::complain(format_args!("nagaya: {error:#}"));
        ExitCode::FAILURE
    });
    output::flush_log();
    code
}

/// How long the program's end waits for work that blocks.
const RUNTIME_END_MAX: Duration = Duration::from_secs(5);

/// The threads of the server; nothing is started before the configuration was read.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
