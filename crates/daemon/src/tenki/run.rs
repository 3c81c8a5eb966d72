//! Commands: the Run stream, and the output of detached ones.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use connectrpc::{ConnectError, RequestContext, Response, ServiceResult, ServiceStream};
use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use nagaya_api::error::{Code, Error};
use nagaya_api::ids::ExecutionId;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::{run_request, run_response};
use nagaya_engine::OpenSession;
use nagaya_engine::event_log::CommandLog;
use nagaya_engine::ports::{Command, ExitStatus, ProcessEvent, ProcessInput, User};
use nagaya_engine::validate;
use tokio::sync::{mpsc, oneshot};

use super::answers::AbortOnDrop;
use super::messages;
use super::service::TenkiService;
use crate::rpc::convert;
use crate::rpc::parse::required;
use crate::rpc::service::caller;

/// Leading metadata of a Run: the id under which the session's events name the command.
const EXECUTION_HEADER: &str = "x-nagaya-execution-id";

type Request = wire::SandboxSessionDataPlaneServiceRunRequest;
type Answer = wire::SandboxSessionDataPlaneServiceRunResponse;

/// Largest piece of output in one frame; clients read with buffers of this size.
const OUTPUT_BYTES_MAX: usize = 32 * 1024;
/// The guest takes this much at once.
const INPUT_BYTES_MAX: usize = 64 * 1024;

fn protocol(problem: &str) -> ConnectError {
    Error::new(Code::StreamProtocol, problem).into()
}

impl TenkiService {
    pub(super) async fn run(
        self: &Arc<Self>,
        context: &RequestContext,
        mut requests: ServiceStream<Request>,
    ) -> ServiceResult<ServiceStream<Answer>> {
        let Some(first) = requests.next().await.transpose()? else {
            return Err(protocol("the stream ended before its start frame"));
        };
        let Some(run_request::Payload::Start(start)) = required(first.frame.into_option(), "frame")?.payload else {
            return Err(protocol("the first frame is not start"));
        };
        let started_at = Instant::now();
        let open = self.open(context, &start.session_id).await?;
        let takes_input = start.stream_stdin;
        let command = command(self, &open, *start)?;
        let noted = Noted { log: open.commands.clone(), id: open.commands.new_execution(), program: program(&command) };
        // A command that cannot be started is a status, never an exit: clients wait for `started`.
        let process = match open.guest.run(command).await {
            Ok(process) => process,
            Err(error) => {
                noted.log.not_started(noted.id, &noted.program, &error).await;
                return Err(messages::guest_error(error));
            }
        };
        let execution_id = noted.id.to_string();
        self.metrics.run_started(started_at.elapsed());

        let started = wire::RunStarted {
            pid: process.pid.into(),
            stdin_window_bytes: if takes_input { self.stdin_window_bytes } else { 0 },
        };
        let (failed, failure) = oneshot::channel();
        let input = process.input;
        let pump = tokio::spawn(async move {
            if let Err(error) = pump(&mut requests, &input, takes_input).await {
                // Nobody listens any more when the command has ended.
                let _ = failed.send(error);
            }
        });
        let running = Running {
            frames: VecDeque::from([frame(run_response::Payload::from(started))]),
            events: Some(process.events),
            failure: Some(failure),
            noted,
            ending: None,
            _pump: AbortOnDrop(pump),
            _open: open,
        };
        Ok(Response::stream(running).try_with_header(EXECUTION_HEADER, execution_id).expect("ids are fit for headers"))
    }
}

/// What of a command is recorded when it ends abnormally.
struct Noted {
    log: CommandLog,
    id: ExecutionId,
    program: String,
}

fn program(command: &Command) -> String {
    command.argv.first().cloned().unwrap_or_default()
}

fn command(tenki: &TenkiService, open: &OpenSession, start: wire::RunStart) -> Result<Command, Error> {
    let mut env = open.env.clone();
    env.extend(start.env);
    let command = Command {
        argv: start.cmd,
        env,
        cwd: start.cwd,
        user: if start.privileged { User::Root } else { User::Image },
        pty: start.pty,
        stdin: start.stream_stdin,
        timeout_ms: start.timeout_ms.into(),
        ..Command::default()
    };
    validate::command(&command, tenki.engine.config())?;
    Ok(command)
}

/// Carries a client's frames to its command until the client has no more. A client that ends its
/// side without `stdin_close` has no more input either.
async fn pump(
    requests: &mut ServiceStream<Request>,
    input: &mpsc::Sender<ProcessInput>,
    takes_input: bool,
) -> Result<(), ConnectError> {
    let mut open = takes_input;
    while let Some(message) = requests.next().await.transpose()? {
        match required(message.frame.into_option(), "frame")?.payload {
            Some(run_request::Payload::Start(_)) => return Err(protocol("a second start frame")),
            Some(run_request::Payload::Stdin(mut bytes)) if open => {
                while !bytes.is_empty() {
                    let piece = bytes.split_to(bytes.len().min(INPUT_BYTES_MAX));
                    if input.send(ProcessInput::Stdin(piece)).await.is_err() {
                        break;
                    }
                }
            }
            Some(run_request::Payload::StdinClose(true)) if open => {
                open = false;
                let _ = input.send(ProcessInput::StdinClose).await;
            }
            Some(run_request::Payload::Signal(signal)) => {
                let signal = signal.signal.as_known().map_or(nagaya_engine::ports::Signal::Term, messages::signal);
                let _ = input.send(ProcessInput::Signal(signal)).await;
            }
            // Input after its end, and kinds of frames that this server does not know. Frames for
            // a command that has ended are read and forgotten until the client notices.
            _ => {}
        }
    }
    if open {
        let _ = input.send(ProcessInput::StdinClose).await;
    }
    Ok(())
}

/// The answers of one Run. Dropping it ends the command.
struct Running {
    frames: VecDeque<Answer>,
    /// `None` when the last frame was made.
    events: Option<mpsc::Receiver<ProcessEvent>>,
    /// Why the client's frames could not be followed any further.
    failure: Option<oneshot::Receiver<ConnectError>>,
    noted: Noted,
    /// The exit, while it is being recorded.
    ending: Option<BoxFuture<'static, Answer>>,
    _pump: AbortOnDrop,
    /// Keeps the session in use.
    _open: OpenSession,
}

impl Stream for Running {
    type Item = Result<Answer, ConnectError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(frame) = self.frames.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if let Some(failure) = &mut self.failure
            && let Poll::Ready(failed) = Pin::new(failure).poll(context)
        {
            self.failure = None;
            if let Ok(error) = failed {
                self.events = None;
                return Poll::Ready(Some(Err(error)));
            }
        }
        if let Some(ending) = &mut self.ending {
            let exit = ready!(ending.as_mut().poll(context));
            self.ending = None;
            return Poll::Ready(Some(Ok(exit)));
        }
        let Some(events) = &mut self.events else {
            return Poll::Ready(None);
        };
        match ready!(events.poll_recv(context)) {
            Some(ProcessEvent::Stdout(bytes)) => self.push(bytes, run_response::Payload::Stdout),
            Some(ProcessEvent::Stderr(bytes)) => self.push(bytes, run_response::Payload::Stderr),
            Some(ProcessEvent::Exit(status)) => {
                self.events = None;
                self.failure = None;
                if self.noted.log.is_abnormal(&status) {
                    // Whoever hears of the end finds it explained.
                    self.ending = Some(self.noted.record(status));
                    return self.poll_next(context);
                }
                self.frames.push_back(exit_frame(status));
            }
            None => {
                self.events = None;
                let lost = Error::new(Code::GuestUnreachable, "the connection to the command was lost");
                return Poll::Ready(Some(Err(lost.into())));
            }
        }
        Poll::Ready(self.frames.pop_front().map(Ok))
    }
}

impl Running {
    /// Queues output as frames; an empty piece still makes one, so that there is a next item.
    fn push(&mut self, mut bytes: Bytes, payload: fn(Bytes) -> run_response::Payload) {
        while bytes.len() > OUTPUT_BYTES_MAX {
            self.frames.push_back(frame(payload(bytes.split_to(OUTPUT_BYTES_MAX))));
        }
        self.frames.push_back(frame(payload(bytes)));
    }
}

impl Noted {
    fn record(&self, status: ExitStatus) -> BoxFuture<'static, Answer> {
        let (log, id, program) = (self.log.clone(), self.id, self.program.clone());
        Box::pin(async move {
            log.ended(id, &program, &status).await;
            exit_frame(status)
        })
    }
}

fn exit_frame(status: ExitStatus) -> Answer {
    frame(run_response::Payload::from(messages::exit(status)))
}

fn frame(payload: run_response::Payload) -> Answer {
    let frame = wire::RunResponse { payload: Some(payload) };
    Answer { frame: frame.into() }
}

impl TenkiService {
    /// The output of a command started by ExecuteCommand, from its beginning. The last message says
    /// how it ended.
    pub(super) async fn stream_command_output(
        self: &Arc<Self>,
        context: &RequestContext,
        request: wire::StreamCommandOutputRequest,
    ) -> ServiceResult<ServiceStream<wire::StreamCommandOutputResponse>> {
        let caller = caller(context)?;
        let session_id = convert::id(&request.session_id, "session_id")?;
        let execution_id = convert::id(&request.execution_id, "execution_id")?;
        let events = self.engine.follow_execution(&caller, session_id, execution_id).await?;
        let execution_id = request.execution_id;
        Response::stream_ok(futures::stream::unfold(Some(events), move |events| {
            let execution_id = execution_id.clone();
            async move {
                let mut events = events?;
                let message = wire::StreamCommandOutputResponse { execution_id, ..Default::default() };
                let (message, events) = match events.recv().await {
                    Some(ProcessEvent::Stdout(data)) => {
                        (Ok(wire::StreamCommandOutputResponse { data, ..message }), Some(events))
                    }
                    Some(ProcessEvent::Stderr(data)) => {
                        (Ok(wire::StreamCommandOutputResponse { data, is_stderr: true, ..message }), Some(events))
                    }
                    Some(ProcessEvent::Exit(status)) => {
                        let message = wire::StreamCommandOutputResponse {
                            is_final: true,
                            exit_code: status.code,
                            duration_ms: i64::try_from(status.duration_ms).unwrap_or(i64::MAX),
                            timed_out: status.timed_out,
                            ..message
                        };
                        (Ok(message), None)
                    }
                    None => {
                        (Err(Error::new(Code::GuestUnreachable, "the connection to the command was lost").into()), None)
                    }
                };
                Some((message, events))
            }
        }))
    }
}
