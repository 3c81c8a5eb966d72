//! The life of a command from its start to its outcome.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Signal, WaitStatus};
use rustix::termios::Winsize;
use rustix::time::Timespec;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::Agent;
use super::clock::Clock;
use super::detached::Execution;
use super::memory;
use super::program::Running;
use super::session::Session;
use super::signals;
use super::terminal;
use crate::frame::{DATA_BYTES_MAX, Kind};
use crate::messages::{self, Exit, Input, input};
use crate::mux::{Incoming, Receiver, Sender, charge};

/// Between TERM and KILL.
const GRACE: Duration = Duration::from_secs(5);
/// How long after KILL the outputs may still be held open by processes that were set free.
const AFTER_KILL: Duration = Duration::from_secs(1);
/// What the reader of a command's output is told when that was cut off.
const HELD: &[u8] =
    b"\n[nagaya: processes that this command set free still run and hold its output, which was cut off here]\n";
/// The character that means end of file at a terminal.
const END_OF_FILE: Bytes = Bytes::from_static(&[4]);

/// Where a command's output goes.
#[derive(Debug, Clone)]
pub enum Sink {
    Stream(Sender),
    Spool(Arc<Agent>, Arc<Execution>),
}

/// Who can tell a command something.
#[derive(Debug)]
pub enum Control {
    Stream(Receiver),
    /// Notified once when the command shall end.
    Cancel(Arc<Notify>),
}

enum Asked {
    Stdin(Bytes),
    StdinClose,
    Signal(Signal),
    Resize(Winsize),
    Nothing,
    /// The holder vanished: the command must end.
    Stop,
    /// The connection was lost: the command goes on, unheard.
    Alone,
}

/// Sees a command through to its end.
pub async fn supervise(
    agent: &Agent,
    mut running: Running,
    timeout_ms: u64,
    sink: Sink,
    mut control: Option<Control>,
) -> Exit {
    let clock = &agent.clock;
    let mut session = Session::new(running.pid);
    let (stdout, stderr) = (&running.stdout, &running.stderr);
    let outputs = async {
        tokio::join!(pump(stdout, Kind::Data, &sink), async {
            if let Some(stderr) = stderr {
                pump(stderr, Kind::ErrorData, &sink).await;
            }
        })
    };
    let mut outputs = Box::pin(outputs);
    let (mut outputs_open, mut cut) = (true, false);
    let mut status = None;
    let mut stdin = Stdin {
        pipe: running.stdin,
        queue: VecDeque::new(),
        closing: control.is_none(),
        terminal: running.terminal.is_some(),
    };
    let mut ending = Ending::new(clock.clone(), timeout_ms, running.started);

    while outputs_open || status.is_none() {
        tokio::select! {
            _ = &mut outputs, if outputs_open => outputs_open = false,
            ended = ended(&mut running.ended), if status.is_none() => {
                status = Some(ended);
                session.leader_ended();
            }
            asked = asked(&mut control), if control.is_some() => match asked {
                Asked::Stdin(data) => stdin.push(data, &mut control),
                Asked::StdinClose => stdin.close(),
                Asked::Signal(Signal::KILL) => ending.kill(session),
                Asked::Signal(signal) => session.signal(signal),
                Asked::Resize(size) => resize(&running.terminal, size),
                Asked::Nothing => {}
                // Returning closes its streams, which is all that it is to notice.
                Asked::Stop | Asked::Alone if running.hang_up => return Exit { reason: "hung_up".into(), ..Exit::default() },
                Asked::Stop => {
                    control = None;
                    stdin.close();
                    ending.stop(session);
                }
                Asked::Alone => {
                    control = None;
                    stdin.close();
                }
            },
            used = stdin.write() => if let Some(Control::Stream(receiver)) = &mut control {
                receiver.release(used);
            },
            _ = clock.sleep_until(ending.next.unwrap_or(running.started)), if ending.next.is_some() => {
                let held = || is_held(stdout) || stderr.as_ref().is_some_and(is_held);
                if ending.escalate(session) && (ending.stopping || held()) {
                    (outputs_open, cut) = (false, outputs_open && held());
                }
            }
        }
    }
    // The rest of a piece that was being sent.
    drop(outputs);
    if cut {
        tell_held(&sink, if stderr.is_some() { Kind::ErrorData } else { Kind::Data }).await;
    }
    ending.finish_off(session);
    let duration_ms = (clock.now() - running.started).as_millis() as u64;
    let mut exit = exit(status.expect("the loop ends with a status"), &ending, duration_ms);
    // What ends well is not looked at: that is to cost nothing.
    if exit.code != 0 {
        exit.memory_kills = memory::kills(&agent.settings).saturating_sub(running.memory_kills);
    }
    exit
}

async fn ended(ended: &mut oneshot::Receiver<WaitStatus>) -> Option<WaitStatus> {
    ended.await.ok()
}

async fn asked(control: &mut Option<Control>) -> Asked {
    match control {
        Some(Control::Stream(receiver)) => match receiver.next().await {
            Some(Incoming::Data(data)) => Asked::Stdin(data),
            Some(Incoming::End(_)) => Asked::StdinClose,
            Some(Incoming::Message(message)) => understand(&message),
            Some(Incoming::Reset | Incoming::ErrorData(_)) => Asked::Stop,
            None => Asked::Alone,
        },
        Some(Control::Cancel(cancel)) => {
            cancel.notified().await;
            Asked::Stop
        }
        None => std::future::pending().await,
    }
}

/// What this agent does not understand comes from a newer server, and is skipped.
fn understand(message: &[u8]) -> Asked {
    match messages::decode::<Input>(message).ok().and_then(|input| input.kind) {
        Some(input::Kind::Signal(signal)) => signals::from_message(signal).map_or(Asked::Nothing, Asked::Signal),
        Some(input::Kind::Resize(size)) => Asked::Resize(terminal::winsize(&size)),
        None => Asked::Nothing,
    }
}

fn resize(terminal: &Option<std::os::fd::OwnedFd>, size: Winsize) {
    if let Some(terminal) = terminal {
        let _ = rustix::termios::tcsetwinsize(terminal, size);
    }
}

/// How a command is brought to its end: TERM, then KILL, then its outputs are let go.
struct Ending {
    clock: Arc<Clock>,
    /// When the next step is due.
    next: Option<Instant>,
    timed_out: bool,
    /// It did not end by itself, nor by a signal of its holder: a holder that does not read is not waited for.
    stopping: bool,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Running,
    Terminated,
    Killed,
}

impl Ending {
    fn new(clock: Arc<Clock>, timeout_ms: u64, started: Instant) -> Self {
        let next = (timeout_ms > 0).then(|| started.checked_add(Duration::from_millis(timeout_ms))).flatten();
        Self { clock, next, timed_out: false, stopping: false, stage: Stage::Running }
    }

    fn stop(&mut self, session: Session) {
        self.stopping = true;
        if self.stage == Stage::Running {
            session.signal(Signal::TERM);
            self.stage = Stage::Terminated;
            self.next = Some(self.clock.now() + GRACE);
        }
    }

    fn kill(&mut self, session: Session) {
        session.kill();
        if self.stage != Stage::Killed {
            self.stage = Stage::Killed;
            self.next = Some(self.clock.now() + AFTER_KILL);
        }
    }

    /// Takes the step that is due. True when the outputs must not be waited for any longer.
    fn escalate(&mut self, session: Session) -> bool {
        match self.stage {
            Stage::Running => {
                self.timed_out = true;
                self.stop(session);
                false
            }
            Stage::Terminated => {
                self.kill(session);
                false
            }
            Stage::Killed => {
                self.next = None;
                true
            }
        }
    }

    /// The command is over; processes of it that ignored TERM still get their KILL.
    fn finish_off(&self, session: Session) {
        if let (Stage::Terminated, Some(due), true) = (self.stage, self.next, session.exists()) {
            let clock = self.clock.clone();
            tokio::spawn(async move {
                clock.sleep_until(due).await;
                session.kill();
            });
        }
    }
}

/// What the command has not read yet.
struct Stdin {
    pipe: Option<pipe::Sender>,
    /// With what each chunk cost of the stream's window.
    queue: VecDeque<(Bytes, u32)>,
    closing: bool,
    terminal: bool,
}

impl Stdin {
    fn push(&mut self, data: Bytes, control: &mut Option<Control>) {
        let cost = charge(data.len());
        if self.pipe.is_some() && !self.closing {
            self.queue.push_back((data, cost));
        } else if let Some(Control::Stream(receiver)) = control {
            // Nobody will read it; the window is given back so that the stream does not stall.
            receiver.release(cost);
        }
    }

    fn close(&mut self) {
        if !self.closing && self.terminal {
            self.queue.push_back((END_OF_FILE, 0));
        }
        self.closing = true;
        self.close_when_written();
    }

    fn close_when_written(&mut self) {
        if self.closing && self.queue.is_empty() {
            self.pipe = None;
        }
    }

    /// Writes some, and returns the cost of chunks that are used up. Cancelling loses nothing.
    async fn write(&mut self) -> u32 {
        loop {
            self.close_when_written();
            let (Some(pipe), Some((data, cost))) = (&self.pipe, self.queue.front_mut()) else {
                return std::future::pending().await;
            };
            let result = match pipe.writable().await {
                Ok(()) => pipe.try_write(data),
                Err(error) => Err(error),
            };
            match result {
                Ok(written) => data.advance(written),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                // Its reader is gone.
                Err(_) => {
                    self.pipe = None;
                    return self.queue.drain(..).map(|(_, cost)| cost).sum();
                }
            }
            if data.is_empty() {
                let cost = *cost;
                self.queue.pop_front();
                if cost > 0 {
                    self.close_when_written();
                    return cost;
                }
            }
        }
    }
}

/// Whether some process can still write to an output.
fn is_held(output: &pipe::Receiver) -> bool {
    let mut state = [PollFd::new(output, PollFlags::IN)];
    let looked = rustix::event::poll(&mut state, Some(&Timespec::default()));
    looked.is_ok() && !state[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Tells the reader why the output ends, unless it does not read what came before.
async fn tell_held(sink: &Sink, kind: Kind) {
    match sink {
        Sink::Stream(sender) => {
            let _ = tokio::time::timeout(AFTER_KILL, sender.data(kind, Bytes::from_static(HELD))).await;
        }
        Sink::Spool(agent, execution) => agent.executions.append(execution, kind, Bytes::from_static(HELD)).await,
    }
}

/// Moves output to its sink until end of file. When the sink is gone the output is still read, so
/// that the command does not notice.
async fn pump(output: &pipe::Receiver, kind: Kind, sink: &Sink) {
    let mut buffer = BytesMut::new();
    let mut heard = true;
    loop {
        if output.readable().await.is_err() {
            return;
        }
        if heard && let Sink::Stream(sender) = sink {
            heard = sender.reserve(DATA_BYTES_MAX).await.is_ok();
        }
        if buffer.capacity() < DATA_BYTES_MAX / 4 {
            buffer.reserve(DATA_BYTES_MAX);
        }
        let room = buffer.capacity().min(DATA_BYTES_MAX);
        let read = match output.try_read_buf(&mut bytes::BufMut::limit(&mut buffer, room)) {
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => usize::MAX,
            // A terminal whose last user has left reports an error instead of its end.
            Err(_) => 0,
        };
        let length = if read == usize::MAX { 0 } else { read };
        if heard && let Sink::Stream(sender) = sink {
            sender.unreserve(DATA_BYTES_MAX, length);
        }
        if read == 0 {
            return;
        }
        if length == 0 {
            continue;
        }
        if !heard {
            buffer.clear();
            continue;
        }
        let data = buffer.split().freeze();
        match sink {
            Sink::Stream(sender) => heard = sender.reserved(kind, data).await.is_ok(),
            Sink::Spool(agent, execution) => agent.executions.append(execution, kind, data).await,
        }
    }
}

fn exit(status: Option<WaitStatus>, ending: &Ending, duration_ms: u64) -> Exit {
    let signal = status.and_then(|status| status.terminating_signal());
    let code = status.and_then(|status| status.exit_status()).unwrap_or(-1);
    let reason = match (ending.timed_out, ending.stage, signal) {
        (true, Stage::Killed, _) => "grace_timeout",
        (true, _, _) => "timeout",
        (false, _, Some(_)) => "signaled",
        (false, _, None) => "exit",
    };
    Exit {
        code,
        signal: signal.map(signals::name).unwrap_or_default(),
        timed_out: ending.timed_out,
        duration_ms,
        reason: reason.into(),
        errno: 0,
        memory_kills: 0,
    }
}
