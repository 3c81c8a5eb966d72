//! The command line: `nagaya sandbox …`, and the same under the name `tenki`.
//!
//! Words become calls of the SDK here, and answers become tables, JSON or YAML. Absent on purpose: any knowledge of
//! the wire protocol, of the server's parts and of its data directory but for two files, `address` and `api-key`.

mod account;
mod connect;
mod copy;
mod errors;
mod exec;
mod explain;
mod files;
mod images;
mod output;
mod parse;
mod ports;
mod resolve;
mod session;
mod shell;
mod snapshots;
mod ssh;
mod ssh_config;
mod terminal;
mod unpack;
mod volumes;

use std::process::ExitCode;

use clap::{Args, Command, Subcommand};

use errors::{Failure, Local};
use output::OutputOptions;

/// With what the program ends when the command line itself is wrong.
pub const USAGE_EXIT: u8 = Local::Usage.exit_code();

/// The verbs beside those of the server.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create and use sandboxes.
    #[command(alias = "sbx")]
    Sandbox(Sandbox),
    /// Fetch and manage the images that sandboxes can stand on.
    Image(images::Images),
    /// Save a server's address and API key.
    Login(With<account::Login>),
    /// Remove what `login` saved.
    Logout(With<Nothing>),
    /// Show the current identity and server.
    #[command(alias = "status")]
    Whoami(With<Nothing>),
    /// Print the shell completion script.
    Completions(shell::Completions),
    /// Write man pages to a directory.
    Man(shell::Man),
}

/// Options of a verb, and how to show what comes out.
#[derive(Debug, Args)]
pub struct With<T: Args> {
    #[command(flatten)]
    output: OutputOptions,
    #[command(flatten)]
    verb: T,
}

#[derive(Debug, Args)]
pub struct Nothing {}

#[derive(Debug, Args)]
#[command(arg_required_else_help = true)]
pub struct Sandbox {
    #[command(flatten)]
    output: OutputOptions,
    #[command(subcommand)]
    verb: SandboxVerb,
}

#[derive(Debug, Subcommand)]
enum SandboxVerb {
    /// Create a sandbox and wait until it runs.
    #[command(alias = "new")]
    Create(Box<session::Create>),
    /// List sandboxes.
    #[command(alias = "ls")]
    List(session::List),
    /// Show details of a sandbox.
    Get(session::Get),
    /// Run a command; its output, input and exit code are as if it ran here.
    Exec(exec::Exec),
    /// Write a file.
    Write(files::Write),
    /// Read a file.
    Read(files::Read),
    /// Copy files and directories in or out.
    Cp(copy::Copy),
    /// Expose a port of the sandbox under a URL.
    Expose(ports::Expose),
    /// List exposed ports.
    Ports(ports::Ports),
    /// Stop exposing a port.
    Unexpose(ports::Unexpose),
    /// Manage preview URLs that outlive sandboxes.
    #[command(subcommand, alias = "preview-url")]
    Preview(ports::Preview),
    /// Pause the sandbox, keeping its memory or disk.
    Pause(session::Pause),
    /// Resume a paused sandbox.
    Resume(session::Resume),
    /// Extend the sandbox's deadline.
    Extend(session::Extend),
    /// Change name, tags and timeouts.
    Update(session::Update),
    /// Terminate the sandbox and delete its disk.
    #[command(aliases = ["rm", "kill"])]
    Terminate(session::Terminate),
    /// Fork the sandbox: create others from its disk.
    Fork(session::Fork),
    /// Show the sandbox's events.
    Logs(explain::Logs),
    /// Explain the sandbox's state and what to do about it.
    Explain(explain::Explain),
    /// Log in, forward ports and run commands with the local OpenSSH.
    Ssh(ssh::Ssh),
    /// Manage the SSH keys that may log in.
    #[command(subcommand)]
    SshKeys(ssh::SshKeys),
    #[command(hide = true)]
    SshPrepare(ssh::SshPrepare),
    #[command(hide = true)]
    SshProxy(ssh::SshProxy),
    /// Manage snapshots of disks.
    #[command(subcommand)]
    Snapshot(snapshots::SnapshotVerb),
    /// Manage volumes: disks that outlive sandboxes.
    #[command(subcommand)]
    Volume(volumes::VolumeVerb),
    /// Show usage and quota.
    Usage(account::Usage),
    /// Show the current identity and server.
    Whoami,
}

/// Runs a verb and says with what the program ends. `whole` is the whole program's command line.
pub fn run(verb: Verb, whole: impl FnOnce() -> Command) -> ExitCode {
    let done = match verb {
        Verb::Completions(completions) => completions.run(whole()).map(|()| 0),
        Verb::Man(man) => man.run(whole()).map(|()| 0),
        Verb::Logout(with) => account::logout(with.output.screen()).map(|()| 0),
        Verb::Login(with) => block_on(async { with.verb.run(with.output.screen()).await.map(|()| 0) }),
        Verb::Whoami(with) => block_on(async { account::whoami(with.output.screen()).await.map(|()| 0) }),
        Verb::Sandbox(sandbox) => block_on(sandbox.run()),
        Verb::Image(images) => block_on(async { images.run().await.map(|()| 0) }),
    };
    match done {
        Ok(code) => code.into(),
        Err(failure) => {
            failure.tell(output::stderr_colour());
            failure.exit_code().into()
        }
    }
}

/// One thread is enough for one command, and is there at once.
fn block_on(verb: impl Future<Output = Result<u8, Failure>>) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(Local::Broken, format!("cannot start: {error}"), ""))?;
    let done = runtime.block_on(verb);
    // A read of stdin that nobody waits for any more must not hold the end.
    runtime.shutdown_background();
    done
}

impl Sandbox {
    async fn run(self) -> Result<u8, Failure> {
        let screen = self.output.screen();
        match self.verb {
            SandboxVerb::Exec(verb) => return verb.run(screen).await,
            SandboxVerb::Ssh(verb) => return verb.run(screen).await,
            SandboxVerb::Create(verb) => verb.run(screen).await,
            SandboxVerb::List(verb) => verb.run(screen).await,
            SandboxVerb::Get(verb) => verb.run(screen).await,
            SandboxVerb::Write(verb) => verb.run(screen).await,
            SandboxVerb::Read(verb) => verb.run(screen).await,
            SandboxVerb::Cp(verb) => verb.run().await,
            SandboxVerb::Expose(verb) => verb.run(screen).await,
            SandboxVerb::Ports(verb) => verb.run(screen).await,
            SandboxVerb::Unexpose(verb) => verb.run(screen).await,
            SandboxVerb::Preview(verb) => verb.run(screen).await,
            SandboxVerb::Pause(verb) => verb.run(screen).await,
            SandboxVerb::Resume(verb) => verb.run(screen).await,
            SandboxVerb::Extend(verb) => verb.run(screen).await,
            SandboxVerb::Update(verb) => verb.run(screen).await,
            SandboxVerb::Terminate(verb) => verb.run(screen).await,
            SandboxVerb::Fork(verb) => verb.run(screen).await,
            SandboxVerb::Logs(verb) => verb.run(screen).await,
            SandboxVerb::Explain(verb) => verb.run(screen).await,
            SandboxVerb::SshKeys(verb) => verb.run(screen).await,
            SandboxVerb::SshPrepare(verb) => verb.run().await,
            SandboxVerb::SshProxy(verb) => verb.run().await,
            SandboxVerb::Snapshot(verb) => verb.run(screen).await,
            SandboxVerb::Volume(verb) => verb.run(screen).await,
            SandboxVerb::Usage(verb) => verb.run(screen).await,
            SandboxVerb::Whoami => account::whoami(screen).await,
        }
        .map(|()| 0)
    }
}
