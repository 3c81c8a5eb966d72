//! What happened to a session, why it is as it is, and git.

use connectrpc::ErrorCode;
use connectrpc::Protocol;
use connectrpc::client::HttpClient;
use nagaya_api::nagaya::v1 as own;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::{run_request, run_response};
use serde_json::json;

use crate::support::*;

const OWN: &str = "nagaya.v1.NagayaService";

fn client(world: &World) -> own::NagayaServiceClient<HttpClient> {
    let config = world.config(Protocol::Grpc).with_default_header("authorization", format!("Bearer {}", world.secret));
    own::NagayaServiceClient::new(HttpClient::plaintext_http2_only(), config)
}

/// Runs a command until it ends, and returns the id that the answer's headers name it by.
async fn run(data: &DataClient, start: wire::RunStart, kill: bool) -> (String, wire::RunExit) {
    let frame = |payload: run_request::Payload| wire::SandboxSessionDataPlaneServiceRunRequest {
        frame: wire::RunRequest { payload: Some(payload) }.into(),
    };
    let mut stream = data.run().await.unwrap();
    stream.send(frame(start.into())).await.unwrap();
    if kill {
        let signal = wire::RunSignal { signal: wire::run_signal::Sig::Kill.into() };
        stream.send(frame(signal.into())).await.unwrap();
    }
    let mut exit = None;
    while let Some(message) = soon(stream.message()).await.unwrap() {
        if let Some(run_response::Payload::Exit(status)) = message.frame.payload.clone() {
            exit = Some(*status);
        }
    }
    let id = stream.headers().unwrap().get("x-nagaya-execution-id").expect("every Run is named");
    (id.to_str().unwrap().to_owned(), exit.expect("the command ended"))
}

fn start(id: &str, argument: &str) -> wire::RunStart {
    wire::RunStart { session_id: id.into(), cmd: vec![argument.into()], ..Default::default() }
}

#[tokio::test]
async fn events_of_a_session_are_listed_with_their_particulars() {
    let world = World::new().await;
    let (id, data) = world.session().await;
    let commits = world.fakes.store.commits();
    let (first, _) = run(&data, start(&id, "true"), false).await;
    assert_eq!(world.fakes.store.commits(), commits, "a command that succeeds was written down");
    let (killed, exit) = run(&data, start(&id, "hang"), true).await;
    assert_eq!(exit.signal, "SIGKILL");
    assert_ne!(first, killed);
    assert_eq!(uuid::Uuid::parse_str(&killed).unwrap().get_version_num(), 7);
    world.control().terminate_session(wire::TerminateSessionRequest { session_id: id.clone() }).await.unwrap();
    let request = own::ListSessionEventsRequest { session_id: id.clone(), after: 0, page_size: 0 };
    let answer = client(&world).list_session_events(request).await.unwrap();
    assert_eq!(answer.next_after, 0);
    let told: Vec<_> = answer.events.iter().map(|event| (event.sequence, event.kind.as_str())).collect();
    assert_eq!(told, [(1, "created"), (2, "ready"), (3, "command_killed"), (4, "terminated")]);
    let event = &answer.events[2];
    assert_eq!(event.execution_id, killed);
    assert_eq!(event.summary, "hang was killed by SIGKILL");
    assert_eq!(event.details, [("program".into(), "hang".into()), ("signal".into(), "SIGKILL".into())].into());
    assert!(event.at.seconds > 0);
    assert_eq!(answer.events[0].details, [("source".into(), "fresh".into())].into());
    assert_eq!(answer.events[3].details, [("reason".into(), "requested".into())].into());
    // Page by page, and in JSON.
    let body = json!({ "sessionId": id, "pageSize": 3, "after": "1" });
    let (status, page) = world.json_of(OWN, "ListSessionEvents", body).await;
    assert_eq!((status, page["events"].as_array().unwrap().len()), (200, 3), "{page}");
    assert_eq!((&page["events"][0]["kind"], &page["nextAfter"]), (&json!("ready"), &serde_json::Value::Null));
    let (_, page) = world.json_of(OWN, "ListSessionEvents", json!({ "sessionId": id, "pageSize": 2 })).await;
    assert_eq!(page["nextAfter"], "2");
    assert!(page["events"][1]["details"]["after_ms"].is_string(), "{page}");
}

#[tokio::test]
async fn a_follower_hears_events_until_the_end() {
    let world = World::new().await;
    let (id, data) = world.session().await;
    let request = own::WatchSessionEventsRequest { session_id: id.clone(), after: 0 };
    let mut events = client(&world).watch_session_events(request).await.unwrap();
    let mut next = async || soon(events.message()).await.unwrap().map(|message| message.event.kind.clone());
    assert_eq!(next().await.as_deref(), Some("created"));
    assert_eq!(next().await.as_deref(), Some("ready"));
    let late = wire::RunStart { timeout_ms: 5, ..start(&id, "hang") };
    let (_, exit) = run(&data, late, false).await;
    assert!(exit.timed_out);
    assert_eq!(next().await.as_deref(), Some("command_timed_out"));
    world.control().terminate_session(wire::TerminateSessionRequest { session_id: id.clone() }).await.unwrap();
    assert_eq!(next().await.as_deref(), Some("terminated"));
    assert_eq!(next().await, None);
}

#[tokio::test]
async fn a_follower_is_told_when_the_server_stops() {
    let world = World::new().await;
    let (id, _) = world.session().await;
    let request = own::WatchSessionEventsRequest { session_id: id, after: 2 };
    let mut events = client(&world).watch_session_events(request).await.unwrap();
    let stopping = tokio::spawn(world.daemon.shut_down());
    assert_eq!(code(soon(events.message()).await), ErrorCode::Unavailable);
    soon(stopping).await.unwrap();
}

#[tokio::test]
async fn a_session_explains_itself() {
    let world = World::new().await;
    let (id, data) = world.session().await;
    let explain = async || {
        let request = own::ExplainSessionRequest { session_id: id.clone() };
        client(&world).explain_session(request).await.unwrap().findings.clone()
    };
    let healthy = explain().await;
    assert_eq!((healthy.len(), healthy[0].code.as_str(), healthy[0].at.is_set()), (1, "healthy", false));
    let refused = data.stat(wire::SandboxSessionDataPlaneServiceStatRequest::default()).await;
    assert!(refused.is_err());
    let _ = run(&data, start(&id, "hang"), true).await;
    let findings = explain().await;
    assert_eq!((findings.len(), findings[0].code.as_str()), (1, "command_killed"));
    assert!(findings[0].at.is_set() && !findings[0].remedy.is_empty() && !findings[0].title.is_empty());
    assert_eq!(findings[0].detail, "hang was killed by SIGKILL");
}

#[tokio::test]
async fn malformed_and_foreign_sessions_are_refused() {
    let world = World::new().await;
    let (id, _) = world.session().await;
    let unknown = "01980000-0000-7000-8000-000000000000";
    for (method, body, code) in [
        ("ListSessionEvents", json!({ "sessionId": "x" }), "invalid_argument"),
        ("ListSessionEvents", json!({ "sessionId": unknown }), "not_found"),
        ("ListSessionEvents", json!({ "sessionId": id, "after": "-1" }), "invalid_argument"),
        ("ListSessionEvents", json!({ "sessionId": id, "pageSize": -1 }), "invalid_argument"),
        ("ListSessionEvents", json!({ "sessionId": id, "pageSize": 201 }), "invalid_argument"),
        ("ExplainSession", json!({ "sessionId": "x" }), "invalid_argument"),
        ("ExplainSession", json!({ "sessionId": unknown }), "not_found"),
    ] {
        let (_, answer) = world.json_of(OWN, method, body.clone()).await;
        assert_eq!(answer["code"], code, "{method} {body}: {answer}");
    }
    for (session_id, after) in [("x", 0), (unknown, 0), (id.as_str(), -1)] {
        let request = own::WatchSessionEventsRequest { session_id: session_id.into(), after };
        let refused = match client(&world).watch_session_events(request).await {
            Ok(mut events) => soon(events.message()).await.map(drop),
            Err(error) => Err(error),
        };
        assert!(matches!(code(refused), ErrorCode::InvalidArgument | ErrorCode::NotFound), "{session_id} {after}");
    }
}

#[tokio::test]
async fn git_says_clearly_when_the_sandbox_has_none() {
    let world = World::new().await;
    let (id, _) = world.session().await;
    let body = json!({ "sessionId": id, "operation": "clone", "args": { "repo": "https://a.example/b" } });
    let (_, answer) = world.json("GitOperation", body).await;
    assert_eq!(answer["code"], "failed_precondition", "{answer}");
    let message = answer["message"].as_str().unwrap();
    assert!(
        message.starts_with("git clone failed (exit_code=127); check the repository, ref and access token: git is"),
        "{message}"
    );
    for (operation, args) in [("push", json!({})), ("clone", json!({ "repo": "--upload-pack=x" }))] {
        let body = json!({ "sessionId": id, "operation": operation, "args": args });
        let (_, answer) = world.json("GitOperation", body).await;
        assert_eq!(answer["code"], "invalid_argument", "{answer}");
    }
    let (_, page) = world.json_of(OWN, "ListSessionEvents", json!({ "sessionId": id, "after": "2" })).await;
    assert_eq!(page["events"][0]["summary"], "git was not found in the sandbox", "{page}");
}
