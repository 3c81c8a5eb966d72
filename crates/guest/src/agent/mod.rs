//! The agent: process 1 of every sandbox.
//!
//! It listens on one socket for a server, which may come and go; the newest connection counts.
//! Commands belong to the sandbox's life, not to the connection: when it is lost they run on.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::time::Duration;

use nagaya_api::error::Code;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::time::Timespec;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Notify};

use crate::handshake::Handshake;
use crate::mux::{Mux, Role};
use account::Accounts;
use clock::Clock;
use detached::Executions;
use failure::Failure;
use machine::Machine;
use paths::Root;
use power::Power;
pub use program::{SFTP, SHELL};
use reaper::Reaper;
use settings::Settings;
use sockets::Peers;

mod account;
mod charge;
mod clock;
mod command;
mod detached;
mod directories;
mod failure;
mod files;
mod gate;
mod groups;
mod limits;
mod machine;
mod memory;
mod paths;
mod power;
mod processes;
mod program;
mod reaper;
mod save;
mod score;
mod serve;
mod session;
mod settings;
mod shares;
mod signals;
mod sockets;
mod sys;
mod syslog;
mod tcp;
mod terminal;
mod usage;

/// Threads for calls that may wait for a disk.
const BLOCKING_THREADS_MAX: usize = 32;
/// How long such a thread waits for more work.
const BLOCKING_THREAD_IDLE: Duration = Duration::from_secs(2);
const BLOCKING_THREAD_STACK_BYTES: usize = 256 * 1024;
/// Between an answer and giving memory back.
const TIDY_UP_AFTER: Duration = Duration::from_secs(3);
/// Connections that have not greeted yet.
const GREETINGS_MAX: usize = 8;

/// What all parts of the agent share.
#[derive(Debug)]
pub struct Agent {
    settings: Settings,
    root: Root,
    /// `/dev/null`, opened before anybody could put something else there.
    null: OwnedFd,
    reaper: Arc<Reaper>,
    turn: groups::Turn,
    accounts: Accounts,
    executions: Executions,
    /// What all waiting on behalf of commands goes by.
    clock: Arc<Clock>,
    power: Power,
    peers: Peers,
    machine: Machine,
    /// Notified when a command starts.
    busy: Notify,
    /// Notified when a request has been answered.
    answered: Notify,
}

/// Runs the agent with the arguments after the program's name. Returns only when it cannot start or
/// go on, with the reason.
pub fn main(arguments: impl Iterator<Item = String>) -> Result<(), String> {
    sys::introduce();
    sys::close_on_exec_from(3);
    sys::reset_signals();
    sys::drop_groups();
    gate::use_power(false);
    sys::tune_heap();
    if !is_first_process() {
        sys::become_subreaper();
    }
    rustix::process::umask(Mode::empty());
    raise_open_files_limit();
    let settings = Settings::take(arguments).map_err(|error| error.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_keep_alive(BLOCKING_THREAD_IDLE)
        .thread_stack_size(BLOCKING_THREAD_STACK_BYTES)
        .build()
        .map_err(|error| format!("start the runtime: {error}"))?;
    runtime.block_on(serve(settings)).map_err(|error| format!("serve: {error}"))
}

fn is_first_process() -> bool {
    rustix::process::getpid().as_raw_nonzero().get() == 1
}

/// Every command and file takes descriptors; the agent may have as many as it can get.
fn raise_open_files_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    // Refused only where the limit is as it should be already.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

async fn serve(mut settings: Settings) -> std::io::Result<()> {
    let listener = StdUnixListener::from(settings.listener.try_clone()?);
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let control = settings.control.take();
    let mut lifeline = settings.lifeline.take().map(|pipe| tokio::spawn(end_with(pipe)));
    let agent = Arc::new(Agent {
        root: Root::open(&settings.user)?,
        null: rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?,
        reaper: Reaper::start()?,
        turn: groups::Turn::default(),
        accounts: Accounts::default(),
        executions: Executions::new(settings.kept_max),
        clock: Arc::default(),
        power: Power::default(),
        peers: Peers::default(),
        machine: Machine::default(),
        busy: Notify::new(),
        answered: Notify::new(),
        settings,
    });
    charge::begin(&agent);
    if is_first_process() {
        power::obey(&agent)?;
        syslog::start();
    }
    gate::start(&agent);
    machine::maintain(agent.clone());
    tokio::spawn(tidy_up(agent.clone()));
    let keeper = agent.clone();
    tokio::spawn(async move { keeper.executions.sweep(&keeper.clock).await });
    // Whoever waits for this sandbox already would wait for it to no gain.
    if lifeline.is_some() && !is_awaited(&listener) {
        warm_up(&agent).await;
    }
    if let Some(control) = control {
        // Whoever waits for it may have given up; that is not our trouble.
        let _ = rustix::io::write(&control, b"r");
    }
    let newest = Arc::new(Mutex::new(None::<Mux>));
    let greetings = Arc::new(tokio::sync::Semaphore::new(GREETINGS_MAX));
    loop {
        let permit = greetings.clone().acquire_owned().await.expect("never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // Out of descriptors or memory for a moment; the process must live.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // From here on the sandbox is somebody's, and lives on without a server.
        if let Some(lifeline) = lifeline.take() {
            lifeline.abort();
        }
        machine::show(&agent);
        let (agent, newest) = (agent.clone(), newest.clone());
        tokio::spawn(async move {
            let handshake = Handshake { powered_off: agent.power.is_off(), ..Handshake::default() };
            let greeted = greet(stream, handshake, &newest).await;
            drop(permit);
            if let Some(mut requests) = greeted {
                while let Some(request) = requests.recv().await {
                    tokio::spawn(serve::answer(agent.clone(), request));
                }
            }
        });
    }
}

/// Whether somebody has connected already.
fn is_awaited(listener: &UnixListener) -> bool {
    let mut connections = [PollFd::new(listener, PollFlags::IN)];
    matches!(rustix::event::poll(&mut connections, Some(&Timespec::default())), Ok(1))
}

/// Runs a command once while nobody waits for it, so that the first one that somebody waits for
/// finds its program's directories, its loader and this code in memory.
async fn warm_up(agent: &Arc<Agent>) {
    let command = crate::messages::Command { argv: vec!["true".into()], ..Default::default() };
    // An image without `true` starts cold.
    if let Ok(running) = program::start(agent, command).await {
        let _ = running.ended.await;
    }
}

/// Ends the agent when nobody holds the other end of the pipe any more.
async fn end_with(lifeline: OwnedFd) {
    if let Ok(mut lifeline) = tokio::net::unix::pipe::Receiver::from_owned_fd(lifeline) {
        let _ = tokio::io::AsyncReadExt::read_u8(&mut lifeline).await;
        std::process::exit(0);
    }
}

/// Gives memory back a while after it was used: there may be a thousand idle agents on a host.
async fn tidy_up(agent: Arc<Agent>) {
    loop {
        agent.answered.notified().await;
        tokio::time::sleep(TIDY_UP_AFTER).await;
        sys::trim_heap();
    }
}

/// Becomes the newest connection, once the other side has said who it is.
async fn greet(
    stream: UnixStream,
    handshake: Handshake,
    newest: &Mutex<Option<Mux>>,
) -> Option<tokio::sync::mpsc::UnboundedReceiver<crate::mux::Request>> {
    let (reader, writer) = stream.into_split();
    let (mux, requests) = Mux::start(reader, writer, Role::Agent, handshake).await.ok()?;
    if let Some(older) = newest.lock().await.replace(mux) {
        older.close("a newer connection took over");
    }
    Some(requests)
}

/// Runs something that may wait for a disk beside the main loop.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(Failure::new(Code::Internal, "a file operation ended abruptly")),
    }
}

/// A number nobody else has guessed, for names of temporary files.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // With no flags and a few bytes this only fails before the kernel has any randomness.
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}
