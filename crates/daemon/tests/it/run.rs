//! Commands: the Run stream, and the deprecated rpcs for clients without HTTP/2.

use bytes::Bytes;
use connectrpc::{ConnectError, ErrorCode};
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::run_signal::Sig;
use nagaya_api::tenki::v1::{run_request, run_response};
use serde_json::json;

use crate::support::*;

fn frame(payload: run_request::Payload) -> wire::SandboxSessionDataPlaneServiceRunRequest {
    let frame = wire::RunRequest { payload: Some(payload) };
    wire::SandboxSessionDataPlaneServiceRunRequest { frame: frame.into() }
}

fn start(id: &str, cmd: &[&str]) -> wire::RunStart {
    wire::RunStart {
        session_id: id.into(),
        cmd: cmd.iter().map(|argument| argument.to_string()).collect(),
        stream_stdin: true,
        ..Default::default()
    }
}

fn signal(signal: Sig) -> run_request::Payload {
    wire::RunSignal { signal: signal.into() }.into()
}

#[derive(Debug, Default)]
struct Outcome {
    started: Option<wire::RunStarted>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Option<wire::RunExit>,
    largest: usize,
}

type Stream = connectrpc::client::BidiStream<
    hyper::body::Incoming,
    wire::SandboxSessionDataPlaneServiceRunRequest,
    nagaya_api::tenki::client::Whole<wire::SandboxSessionDataPlaneServiceRunResponse>,
>;

async fn begin(client: &DataClient, frames: Vec<run_request::Payload>) -> Stream {
    let mut stream = client.run().await.unwrap();
    for payload in frames {
        // The server may have refused already, which the next message tells.
        let _ = stream.send(frame(payload)).await;
    }
    stream
}

/// Reads to the end, and checks the order of frames.
async fn finish(mut stream: Stream) -> Result<Outcome, ConnectError> {
    let mut outcome = Outcome::default();
    while let Some(message) = soon(stream.message()).await? {
        assert!(outcome.exit.is_none(), "exit is the last frame");
        let payload = message.frame.payload.clone().expect("every frame has a payload");
        assert_eq!(
            outcome.started.is_none(),
            matches!(payload, run_response::Payload::Started(_)),
            "started is the first frame"
        );
        match payload {
            run_response::Payload::Started(started) => outcome.started = Some(*started),
            run_response::Payload::Stdout(bytes) => {
                outcome.largest = outcome.largest.max(bytes.len());
                outcome.stdout.extend_from_slice(&bytes);
            }
            run_response::Payload::Stderr(bytes) => outcome.stderr.extend_from_slice(&bytes),
            run_response::Payload::Exit(exit) => outcome.exit = Some(*exit),
            run_response::Payload::Flow(_) => {}
        }
    }
    Ok(outcome)
}

async fn run(client: &DataClient, start: wire::RunStart) -> Result<Outcome, ConnectError> {
    let mut stream = begin(client, vec![start.into(), run_request::Payload::StdinClose(true)]).await;
    stream.close_send();
    finish(stream).await
}

#[tokio::test]
async fn a_command_gives_its_outputs_and_one_exit() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let outcome = run(&client, start(&id, &["both", "to stdout", "to stderr"])).await.unwrap();
    let started = outcome.started.unwrap();
    assert_eq!((started.pid, started.stdin_window_bytes > 0), (42, true));
    assert_eq!((&outcome.stdout[..], &outcome.stderr[..]), (&b"to stdout"[..], &b"to stderr"[..]));
    let exit = outcome.exit.unwrap();
    assert_eq!((exit.exit_code, exit.signal.as_str(), exit.reason.as_str()), (0, "", "exit"));
    assert_eq!(run(&client, start(&id, &["exit", "7"])).await.unwrap().exit.unwrap().exit_code, 7);
    // An empty argument is one, too.
    let outcome = run(&client, start(&id, &["both", "", "to stderr"])).await.unwrap();
    assert_eq!((&outcome.stdout[..], &outcome.stderr[..]), (&b""[..], &b"to stderr"[..]));
}

#[tokio::test]
async fn input_is_echoed_while_it_is_written_and_ends_the_command_when_it_ends() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let mut stream = begin(&client, vec![start(&id, &["cat"]).into()]).await;
    let started = soon(stream.message()).await.unwrap().unwrap();
    assert!(matches!(started.frame.payload, Some(run_response::Payload::Started(_))));
    for text in ["one", "two"] {
        stream.send(frame(run_request::Payload::Stdin(text.into()))).await.unwrap();
        let echoed = soon(stream.message()).await.unwrap().unwrap();
        assert_eq!(echoed.frame.payload, Some(run_response::Payload::Stdout(text.into())));
    }
    // Ending the client's side is the end of input, with or without a stdin_close.
    stream.close_send();
    let exit = soon(stream.message()).await.unwrap().unwrap();
    assert!(matches!(&exit.frame.payload, Some(run_response::Payload::Exit(exit)) if exit.exit_code == 0));
    assert!(soon(stream.message()).await.unwrap().is_none());
}

#[tokio::test]
async fn large_input_and_output_pass_in_frames_of_a_bounded_size() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let content = Bytes::from((0..3_000_000u32).map(|n| (n % 253) as u8).collect::<Vec<_>>());
    let (mut send, mut receive) = client.run().await.unwrap().into_split();
    let writer = tokio::spawn({
        let (id, content) = (id.clone(), content.clone());
        async move {
            send.send(frame(start(&id, &["cat"]).into())).await.unwrap();
            send.send(frame(run_request::Payload::Stdin(content))).await.unwrap();
            send.send(frame(run_request::Payload::StdinClose(true))).await.unwrap();
        }
    });
    let mut echoed = Vec::new();
    while let Some(message) = soon(receive.message()).await.unwrap() {
        if let Some(run_response::Payload::Stdout(bytes)) = &message.frame.payload {
            assert!(bytes.len() <= 32 * 1024);
            echoed.extend_from_slice(bytes);
        }
    }
    writer.await.unwrap();
    assert!(echoed == content);
    let outcome = run(&client, start(&id, &["yes", "1000000"])).await.unwrap();
    assert_eq!((outcome.stdout.len(), outcome.largest), (1_000_000, 32 * 1024));
}

#[tokio::test]
async fn the_commands_environment_lies_over_the_sessions() {
    let world = World::new().await;
    let request = wire::CreateSessionRequest { env: pairs(&[("A", "session"), ("B", "session")]), ..create() };
    let session = world.control().create_session(request).await.unwrap();
    let client = world.data(&session.credential.credential);
    let start =
        wire::RunStart { env: pairs(&[("B", "command")]), privileged: true, ..start(&session.session.id, &["env"]) };
    let text = String::from_utf8(run(&client, start).await.unwrap().stdout).unwrap();
    assert_eq!(text, "A=session\nB=command\nUSER=root\n");
}

#[tokio::test]
async fn signals_reach_the_command_also_after_its_input_has_ended() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    for (sent, name) in [
        (Sig::SIG_TERM, "SIGTERM"),
        (Sig::SIG_KILL, "SIGKILL"),
        (Sig::SIG_INT, "SIGINT"),
        (Sig::SIG_HUP, "SIGHUP"),
        (Sig::SIG_USR1, "SIGUSR1"),
        (Sig::SIG_USR2, "SIGUSR2"),
        (Sig::SIG_UNSPECIFIED, "SIGTERM"),
    ] {
        let close = run_request::Payload::StdinClose(true);
        let stream = begin(&client, vec![start(&id, &["hang"]).into(), close, signal(sent)]).await;
        let exit = finish(stream).await.unwrap().exit.unwrap();
        assert_eq!((exit.exit_code, exit.signal.as_str(), exit.reason.as_str()), (-1, name, "signaled"));
    }
}

#[tokio::test]
async fn a_timeout_is_reported_in_the_exit() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let exit = run(&client, wire::RunStart { timeout_ms: 20, ..start(&id, &["hang"]) }).await.unwrap().exit.unwrap();
    assert!(exit.timed_out);
    assert_eq!((exit.exit_code, exit.reason.as_str()), (-1, "timeout"));
}

#[tokio::test]
async fn a_command_that_cannot_start_is_a_status_and_never_an_exit() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let unknown = "01980000-0000-7000-8000-000000000000";
    for (start, expected) in [
        (start(&id, &["no-such-program"]), ErrorCode::NotFound),
        (wire::RunStart { cwd: "nowhere".into(), ..start(&id, &["true"]) }, ErrorCode::NotFound),
        (start(&id, &[]), ErrorCode::InvalidArgument),
        (start(&id, &[""]), ErrorCode::InvalidArgument),
        (start(&id, &["a\0b"]), ErrorCode::InvalidArgument),
        (wire::RunStart { cwd: "a\0b".into(), ..start(&id, &["true"]) }, ErrorCode::InvalidArgument),
        (wire::RunStart { env: pairs(&[("A\0", "")]), ..start(&id, &["true"]) }, ErrorCode::InvalidArgument),
        (start("nonsense", &["true"]), ErrorCode::InvalidArgument),
        (start(unknown, &["true"]), ErrorCode::Unauthenticated),
    ] {
        let shown = format!("{start:?}");
        assert_eq!(code(run(&client, start).await), expected, "{shown}");
    }
    assert_eq!(*world.running.borrow(), 0);
}

#[tokio::test]
async fn frames_out_of_order_end_the_stream_and_the_command() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let stdin = || run_request::Payload::Stdin("x".into());
    let hang = || run_request::Payload::from(start(&id, &["hang"]));
    for frames in
        [vec![stdin(), hang()], vec![run_request::Payload::StdinClose(true)], vec![signal(Sig::SIG_TERM)], vec![]]
    {
        let mut stream = begin(&client, frames).await;
        stream.close_send();
        assert_eq!(code(finish(stream).await), ErrorCode::InvalidArgument);
    }
    let stream = begin(&client, vec![hang(), hang()]).await;
    assert_eq!(code(finish(stream).await), ErrorCode::InvalidArgument);
    let mut running = world.running.clone();
    soon(running.wait_for(|running| *running == 0)).await.unwrap();
}

#[tokio::test]
async fn a_client_that_vanishes_ends_its_command() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let mut running = world.running.clone();
    let mut stream = begin(&client, vec![start(&id, &["hang"]).into()]).await;
    soon(stream.message()).await.unwrap();
    assert_eq!(*running.borrow_and_update(), 1);
    drop(stream);
    soon(running.wait_for(|running| *running == 0)).await.unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_read_stalls_only_its_own_command() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let mut stalled = begin(&client, vec![start(&id, &["yes", "100000000"]).into()]).await;
    soon(stalled.message()).await.unwrap();
    for _ in 0..3 {
        assert!(run(&client, start(&id, &["true"])).await.is_ok());
    }
    assert_eq!(*world.running.borrow(), 1, "the stalled command waits");
    drop(stalled);
    let mut running = world.running.clone();
    soon(running.wait_for(|running| *running == 0)).await.unwrap();
}

#[tokio::test]
async fn commands_end_with_their_session_and_say_why() {
    let world = World::new().await;
    let (id, client) = world.session().await;
    let mut stream = begin(&client, vec![start(&id, &["hang"]).into()]).await;
    soon(stream.message()).await.unwrap();
    let request = wire::TerminateSessionRequest { session_id: id };
    world.control().terminate_session(request).await.unwrap();
    let exit = soon(stream.message()).await.unwrap().unwrap();
    let Some(run_response::Payload::Exit(exit)) = &exit.frame.payload else {
        panic!("an exit: {exit:?}", exit = exit.frame)
    };
    assert!(exit.reason.starts_with("session_terminated:"), "{}", exit.reason);
}

#[tokio::test]
async fn clients_without_http2_run_commands_and_read_their_output_later() {
    let world = World::new().await;
    let (id, _) = world.session().await;
    let (status, answer) =
        world.json("ExecuteCommand", json!({"sessionId": id, "command": "exit", "args": ["3"], "timeout": "5s"})).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["execution"]["status"], "COMMAND_STATUS_FAILED");
    assert_eq!(answer["execution"]["exitCode"], 3);

    let client = world.control();
    let request = wire::ExecuteCommandRequest {
        session_id: id.clone(),
        command: "both".into(),
        args: vec!["out".into(), "err".into()],
        stream_output: true,
        ..Default::default()
    };
    let execution = client.execute_command(request).await.unwrap().execution.clone();
    let request = wire::StreamCommandOutputRequest { session_id: id.clone(), execution_id: execution.id.clone() };
    let mut stream = client.stream_command_output(request).await.unwrap();
    let (mut out, mut err, mut last) = (Vec::new(), Vec::new(), None);
    while let Some(message) = soon(stream.message()).await.unwrap() {
        assert_eq!(message.execution_id, execution.id);
        if message.is_stderr {
            err.extend_from_slice(&message.data)
        } else {
            out.extend_from_slice(&message.data)
        }
        last = Some((message.is_final, message.exit_code, message.timed_out));
    }
    assert_eq!((&out[..], &err[..], last), (&b"out"[..], &b"err"[..], Some((true, 0, false))));
}

#[tokio::test]
async fn a_waited_for_command_is_ended_by_its_timeout() {
    let world = World::new().await;
    let (id, _) = world.session().await;
    let (status, answer) =
        world.json("ExecuteCommand", json!({"sessionId": id, "command": "hang", "timeout": "0.020s"})).await;
    assert_eq!((status, &answer["execution"]["status"]), (200, &json!("COMMAND_STATUS_TIMED_OUT")), "{answer}");
    for body in [json!({"sessionId": id, "command": ""}), json!({"sessionId": "x", "command": "true"})] {
        assert_eq!(world.json("ExecuteCommand", body).await.0, 400);
    }
    let unknown = "01980000-0000-7000-8000-000000000000";
    let request = wire::StreamCommandOutputRequest { session_id: id, execution_id: unknown.into() };
    let outcome = match world.control().stream_command_output(request).await {
        Ok(mut stream) => code(stream.message().await),
        Err(error) => error.code,
    };
    assert_eq!(outcome, ErrorCode::NotFound);
}
