//! The life of sessions, as clients of the control plane see it.

use std::time::Duration;

use buffa_types::google::protobuf::Duration as WireDuration;
use connectrpc::ErrorCode;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::{DataPlaneRouteStatus, SessionState};
use nagaya_engine::model::Limit;
use nagaya_engine::ports::DriverError;

use crate::support::*;

pub fn seconds(seconds: i64) -> buffa::MessageField<WireDuration, buffa::Inline<WireDuration>> {
    WireDuration { seconds, ..Default::default() }.into()
}

pub fn get(id: &str) -> wire::GetSessionRequest {
    wire::GetSessionRequest { session_id: id.into() }
}

pub fn wait(id: &str) -> wire::WaitSessionRequest {
    wire::WaitSessionRequest { session_id: id.into() }
}

pub fn terminate(id: &str) -> wire::TerminateSessionRequest {
    wire::TerminateSessionRequest { session_id: id.into() }
}

#[tokio::test]
async fn a_quick_sandbox_is_answered_running_with_everything_a_client_needs() {
    let world = World::new().await;
    let request = wire::CreateSessionRequest {
        name: "box".into(),
        env: pairs(&[("A", "1")]),
        metadata: pairs(&[("team", "red")]),
        tags: vec!["a".into(), "b".into(), "a".into()],
        max_duration: seconds(600),
        cpu_cores: Some(3),
        memory_mb: Some(512),
        disk_size_gb: Some(7),
        idle_timeout_minutes: Some(0),
        pause_retention: seconds(60),
        sticky: true,
        allow_inbound: Some(false),
        ..create()
    };
    let answer = world.control().create_session(request).await.unwrap();
    let session = &answer.session;
    assert_eq!(session.state, SessionState::Running);
    assert_eq!(answer.data_plane_endpoint, world.url());
    assert_eq!(answer.route_status, DataPlaneRouteStatus::Verified);
    assert!(answer.credential.credential.starts_with("nsc1."));
    assert!(answer.credential.expires_at.seconds > session.created_at.seconds);
    assert_eq!((session.cpu_cores, session.memory_mb, session.disk_size_gb), (3, 512, 7));
    assert_eq!((session.inbound_enabled, session.outbound_enabled, session.sticky), (false, true, true));
    assert_eq!(session.tags, ["a", "b"]);
    assert_eq!(
        session.metadata,
        pairs(&[("team", "red"), ("nagaya_driver", "fake"), ("nagaya_isolation", "shared kernel")])
    );
    assert_eq!(session.timeout_at.seconds - session.created_at.seconds, 600);
    assert_eq!(session.idle_timeout_minutes, Some(0));
    assert_eq!(session.pause_retention.seconds, 60);
    assert_eq!(session.project_id, session.workspace_id);

    let found = world.control().get_session(get(&session.id)).await.unwrap();
    assert_eq!(*found.session, **session);
}

#[tokio::test]
async fn flags_that_are_absent_are_off() {
    let world = World::new().await;
    let request = wire::CreateSessionRequest { allow_inbound: None, allow_outbound: None, ..create() };
    let answer = world.control().create_session(request).await.unwrap();
    assert!(!answer.session.inbound_enabled);
    assert!(!answer.session.outbound_enabled);
}

#[tokio::test]
async fn a_slow_sandbox_is_answered_creating_and_waited_for() {
    let world = World::new().await;
    world.hold_creations.send_replace(true);
    let answer = world.control().create_session(create()).await.unwrap();
    assert_eq!(answer.session.state, SessionState::Creating);
    assert_eq!(answer.data_plane_endpoint, world.url(), "clients connect ahead");
    assert_eq!(answer.route_status, DataPlaneRouteStatus::NotReady);
    assert!(answer.credential.is_unset());

    let mut waiting = world.control().wait_session(wait(&answer.session.id)).await.unwrap();
    let first = soon(waiting.message()).await.unwrap().unwrap();
    assert_eq!(first.session.state, SessionState::Creating);
    assert_eq!(first.data_plane_endpoint, world.url());
    assert!(first.credential.is_unset());

    world.hold_creations.send_replace(false);
    let last = soon(waiting.message()).await.unwrap().unwrap();
    assert_eq!(last.session.state, SessionState::Running);
    assert_eq!(last.route_status, DataPlaneRouteStatus::Verified);
    let stat = stat_home(&last.session.id);
    assert!(world.data(&last.credential.credential).stat(stat).await.unwrap().response.exists);
    assert!(soon(waiting.message()).await.unwrap().is_none(), "the stream ends with RUNNING");
}

fn stat_home(id: &str) -> wire::SandboxSessionDataPlaneServiceStatRequest {
    let request = wire::StatRequest { session_id: id.into(), path: "/home/tenki".into() };
    wire::SandboxSessionDataPlaneServiceStatRequest { request: request.into() }
}

#[tokio::test]
async fn wait_ready_holds_the_answer_until_running() {
    let world = World::new().await;
    world.hold_creations.send_replace(true);
    let client = world.control();
    let created = tokio::spawn(async move {
        client.create_session(wire::CreateSessionRequest { wait_ready: true, ..create() }).await
    });
    // The session is there before the answer is.
    let list = wire::ListSessionsRequest::default();
    soon(async {
        while world.control().list_sessions(list.clone()).await.unwrap().sessions.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(!created.is_finished());
    world.hold_creations.send_replace(false);
    let answer = soon(created).await.unwrap().unwrap();
    assert_eq!(answer.session.state, SessionState::Running);
    assert!(answer.credential.is_set());
}

#[tokio::test]
async fn a_held_create_is_answered_before_its_deadline() {
    let world = World::with(|config| config.tenki.deadline_margin_ms = 900).await;
    world.hold_creations.send_replace(true);
    let config = world
        .config(connectrpc::Protocol::Grpc)
        .with_default_header("authorization", format!("Bearer {}", world.secret))
        .with_default_timeout(Duration::from_secs(1));
    let client = ControlClient::new(connectrpc::client::HttpClient::plaintext_http2_only(), config);
    let answer = client.create_session(wire::CreateSessionRequest { wait_ready: true, ..create() }).await;
    assert_eq!(answer.unwrap().session.state, SessionState::Creating);
    world.hold_creations.send_replace(false);
}

#[tokio::test]
async fn a_creation_that_fails_tells_why() {
    let world = World::new().await;
    world.fakes.driver.refuse_next(DriverError::Exhausted(Limit::Slots));
    world.hold_creations.send_replace(true);
    let answer = world.control().create_session(create()).await.unwrap();
    assert_eq!(answer.session.state, SessionState::Creating);
    world.hold_creations.send_replace(false);
    soon(async {
        let mut waiting = world.control().wait_session(wait(&answer.session.id)).await.unwrap();
        let mut last = None;
        while let Some(message) = waiting.message().await.unwrap() {
            last = Some(message);
        }
        let last = last.expect("at least one message");
        assert_eq!(last.session.state, SessionState::Terminated);
        assert!(last.session.terminal_error.contains("capacity"), "{}", last.session.terminal_error);
        assert_eq!(last.route_status, DataPlaneRouteStatus::Failed);
    })
    .await;
}

#[tokio::test]
async fn a_server_without_room_refuses_a_creation_with_the_limits_name() {
    let world = World::new().await;
    world.fakes.driver.refuse_next(DriverError::Exhausted(Limit::Slots));
    let error = world.control().create_session(create()).await.unwrap_err();
    assert_eq!(error.code, connectrpc::ErrorCode::ResourceExhausted);
    let message = error.message.unwrap_or_default();
    assert!(message.contains("capacity") && message.contains("slots_max"), "{message}");
}

#[tokio::test]
async fn requests_against_the_contract_are_refused_and_create_nothing() {
    let world = World::new().await;
    let client = world.control();
    type Change = fn(&mut wire::CreateSessionRequest);
    let changes: &[(&str, Change)] = &[
        ("owner_id", |r| r.owner_id.clear()),
        ("owner_type", |r| r.owner_type = "ROBOT".into()),
        ("cpu 0", |r| r.cpu_cores = Some(0)),
        ("cpu 17", |r| r.cpu_cores = Some(17)),
        ("cpu -1", |r| r.cpu_cores = Some(-1)),
        ("memory 127", |r| r.memory_mb = Some(127)),
        ("memory odd", |r| r.memory_mb = Some(129)),
        ("memory 65537", |r| r.memory_mb = Some(65_537)),
        ("disk 4", |r| r.disk_size_gb = Some(4)),
        ("disk 101", |r| r.disk_size_gb = Some(101)),
        ("name", |r| r.name = "x".repeat(65)),
        ("tags", |r| r.tags = (0..21).map(|n| n.to_string()).collect()),
        ("tag", |r| r.tags = vec!["Upper".into()]),
        ("env", |r| r.env = pairs(&[("A\0", "b")])),
        ("env =", |r| r.env = pairs(&[("A=B", "b")])),
        ("idle", |r| r.idle_timeout_minutes = Some(-1)),
        ("max_duration", |r| r.max_duration = seconds(-1)),
        ("max_duration 0", |r| r.max_duration = seconds(0)),
        ("workspace_id", |r| r.workspace_id = Some("x".into())),
        ("project_id", |r| r.project_id = Some("x".into())),
        ("snapshot_id", |r| r.snapshot_id = Some("x".into())),
        ("two sources", |r| {
            r.snapshot_id = Some("01980000-0000-7000-8000-000000000000".into());
            r.registry_ref = Some("sandbox".into());
        }),
        ("volume without id", |r| r.volumes.push(Default::default())),
        ("egress names", |r| r.egress = egress(257, 0)),
        ("egress networks", |r| r.egress = egress(0, 65)),
        ("driver", |r| r.metadata = pairs(&[("nagaya_driver", "none")])),
        ("visits", |r| r.metadata = pairs(&[("nagaya_wake_on_visit", "sometimes")])),
    ];
    for (name, change) in changes {
        let mut request = create();
        change(&mut request);
        assert_eq!(code(client.create_session(request).await), ErrorCode::InvalidArgument, "{name}");
    }
    assert!(world.fakes.store.all_sessions().is_empty());
    assert!(world.fakes.driver.sandboxes().is_empty());
}

fn egress<T: From<Option<wire::SessionEgressPolicy>>>(domains: usize, cidrs: usize) -> T {
    let allow_domains = (0..domains).map(|n| format!("a{n}.example")).collect();
    let allow_cidrs = (0..cidrs).map(|n| format!("1.2.3.{n}")).collect();
    Some(wire::SessionEgressPolicy { allow_domains, allow_cidrs }).into()
}

#[tokio::test]
async fn a_session_may_say_which_visits_resume_it() {
    let world = World::new().await;
    let asked = |metadata: &[(&str, &str)]| wire::CreateSessionRequest { metadata: pairs(metadata), ..create() };
    let request = asked(&[("team", "red"), ("nagaya_wake_on_visit", "always")]);
    let session = world.control().create_session(request).await.unwrap().session;
    assert_eq!(session.metadata["nagaya_wake_on_visit"], "always");
    let recorded = world.fakes.store.all_sessions().remove(0);
    assert_eq!(recorded.wake_on_visit, Some(nagaya_engine::model::WakeOnVisit::Always));
    assert_eq!(recorded.metadata, pairs(&[("team", "red")]), "what is no metadata is not kept as such");
    let explain = async |id: &str| {
        let answer = world.json_of("nagaya.v1.NagayaService", "ExplainSession", serde_json::json!({ "sessionId": id }));
        answer.await.1["wakeOnVisit"].clone()
    };
    assert_eq!(explain(&session.id).await, "always");
    let plain = world.control().create_session(asked(&[])).await.unwrap().session;
    assert!(!plain.metadata.contains_key("nagaya_wake_on_visit"));
    assert_eq!(explain(&plain.id).await, "idle", "the server's");
    let refused = world.control().create_session(asked(&[("nagaya_wake_on_visit", "Never")])).await.unwrap_err();
    let text = refused.message.unwrap_or_default();
    assert!(
        text.contains("metadata nagaya_wake_on_visit is \"Never\", but must be one of never, idle, always"),
        "{text}"
    );
}

#[tokio::test]
async fn fields_that_are_not_built_yet_are_refused_by_name() {
    let world = World::new().await;
    let client = world.control();
    let id = "01980000-0000-7000-8000-000000000000";
    type Change = fn(&mut wire::CreateSessionRequest, &str);
    let changes: &[(&str, Change)] = &[
        ("template_spec_id", |r, id| r.template_spec_id = Some(id.into())),
        ("clone_repo_url", |r, _| r.clone_repo_url = "https://example.com/x.git".into()),
        ("enable_opencode", |r, _| r.enable_opencode = true),
        ("setup_env", |r, _| r.setup_env = pairs(&[("A", "b")])),
        ("setup_secrets", |r, _| r.setup_secrets = pairs(&[("A", "b")])),
    ];
    for (field, change) in changes {
        let mut request = create();
        change(&mut request, id);
        let error = client.create_session(request).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::Unimplemented, "{field}");
        assert!(error.message.unwrap_or_default().contains(field), "{field} is named");
    }
    assert!(world.fakes.store.all_sessions().is_empty());
    let on = |image: &str| wire::CreateSessionRequest { registry_ref: Some(image.into()), ..create() };
    for image in ["", "sandbox"] {
        assert!(client.create_session(on(image)).await.is_ok(), "{image:?} is the default image");
    }
    let error = client.create_session(on("acme/image")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
    assert!(error.message.unwrap_or_default().starts_with("registry image not found"), "as clients know it");
    world.fakes.images.publish("acme/image", "sha256:1");
    let session = client.create_session(on("acme/image")).await.unwrap().session;
    assert_eq!(session.source_registry_ref.as_deref(), Some("acme/image"));
}

#[tokio::test]
async fn malformed_ids_are_invalid_and_unknown_ones_not_found() {
    let world = World::new().await;
    let client = world.control();
    let unknown = "01980000-0000-7000-8000-000000000000";
    for (id, expected) in [
        ("", ErrorCode::InvalidArgument),
        ("nonsense", ErrorCode::InvalidArgument),
        ("01980000000070008000000000000000", ErrorCode::InvalidArgument),
        (unknown, ErrorCode::NotFound),
    ] {
        let session_id = || id.to_owned();
        assert_eq!(code(client.get_session(get(id)).await), expected, "{id}");
        assert_eq!(code(client.terminate_session(terminate(id)).await), expected, "{id}");
        let request =
            wire::UpdateSessionRequest { session_id: session_id(), name: Some("x".into()), ..Default::default() };
        assert_eq!(code(client.update_session(request).await), expected, "{id}");
        let request = wire::ExtendSessionRequest { session_id: session_id(), additional_duration: seconds(1) };
        assert_eq!(code(client.extend_session(request).await), expected, "{id}");
        let request = wire::CreateSessionCredentialRequest { session_id: session_id() };
        assert_eq!(code(client.create_session_credential(request).await), expected, "{id}");
        let request = wire::ReportSessionActivityRequest { session_id: session_id() };
        assert_eq!(code(client.report_session_activity(request).await), expected, "{id}");
        let mut stream = client.wait_session(wait(id)).await;
        let outcome = match &mut stream {
            Ok(stream) => code(stream.message().await),
            Err(error) => error.code,
        };
        assert_eq!(outcome, expected, "{id}");
    }
}

#[tokio::test]
async fn lists_filter_and_page_under_all_three_names() {
    let world = World::new().await;
    let client = world.control();
    for n in 0..5 {
        let request = wire::CreateSessionRequest {
            tags: if n % 2 == 0 { vec!["even".into()] } else { vec![] },
            sticky: n == 4,
            ..create()
        };
        let answer = client.create_session(request).await.unwrap();
        if n == 0 {
            client.terminate_session(terminate(&answer.session.id)).await.unwrap();
        }
        world.fakes.clock.advance(10);
    }
    let me = client.who_am_i(Default::default()).await.unwrap();
    let workspace_id = me.workspaces[0].workspace_id.clone();
    let sandboxes = |change: fn(&mut wire::ListWorkspaceSandboxesRequest)| {
        let mut request =
            wire::ListWorkspaceSandboxesRequest { workspace_id: workspace_id.clone(), ..Default::default() };
        change(&mut request);
        let client = client.clone();
        async move { client.list_workspace_sandboxes(request).await }
    };
    assert_eq!(sandboxes(|_| {}).await.unwrap().sessions.len(), 4);
    assert_eq!(sandboxes(|r| r.workspace_id.clear()).await.unwrap().sessions.len(), 4);
    assert_eq!(sandboxes(|r| r.include_terminated = true).await.unwrap().sessions.len(), 5);
    assert_eq!(sandboxes(|r| r.tags = vec!["even".into()]).await.unwrap().sessions.len(), 2);
    assert_eq!(sandboxes(|r| r.sticky = Some(true)).await.unwrap().sessions.len(), 1);
    assert_eq!(sandboxes(|r| r.state = SessionState::Running.into()).await.unwrap().sessions.len(), 4);
    assert_eq!(sandboxes(|r| r.state = SessionState::Paused.into()).await.unwrap().sessions.len(), 0);
    for (name, refused) in [
        ("workspace_id", sandboxes(|r| r.workspace_id = "x".into()).await),
        ("page_size 101", sandboxes(|r| r.page_size = 101).await),
        ("page_size -1", sandboxes(|r| r.page_size = -1).await),
        ("page_token", sandboxes(|r| r.page_token = "x".into()).await),
        ("state", sandboxes(|r| r.state = 77.into()).await),
    ] {
        assert_eq!(code(refused), ErrorCode::InvalidArgument, "{name}");
    }

    let mut token = String::new();
    let mut pages = Vec::new();
    loop {
        let request = wire::ListSessionsRequest {
            page_size: 3,
            page_token: token,
            owner_id: "self".into(),
            ..Default::default()
        };
        let page = client.list_sessions(request).await.unwrap();
        pages.push(page.sessions.len());
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(pages, [3, 1]);
    let request = wire::ListSessionsRequest { owner_id: "somebody".into(), ..Default::default() };
    assert!(client.list_sessions(request).await.unwrap().sessions.is_empty());
    let request = wire::ListProjectSandboxesRequest { project_id: workspace_id, ..Default::default() };
    assert_eq!(client.list_project_sandboxes(request).await.unwrap().sessions.len(), 4);
}

#[tokio::test]
async fn updates_change_what_they_name_and_nothing_else() {
    let world = World::new().await;
    let client = world.control();
    let request = wire::CreateSessionRequest { name: "old".into(), tags: vec!["a".into()], sticky: true, ..create() };
    let id = client.create_session(request).await.unwrap().session.id.clone();
    let update = |change: fn(&mut wire::UpdateSessionRequest)| {
        let mut request = wire::UpdateSessionRequest { session_id: id.clone(), ..Default::default() };
        change(&mut request);
        let client = client.clone();
        async move { client.update_session(request).await }
    };
    let session = update(|_| {}).await.unwrap().session;
    assert_eq!((session.name.as_str(), &session.tags[..], session.sticky), ("old", &["a".to_owned()][..], true));
    let session = update(|r| r.name = Some("new".into())).await.unwrap().session;
    assert_eq!((session.name.as_str(), session.tags.len()), ("new", 1));
    let session = update(|r| r.tags = vec!["b".into(), "c".into()]).await.unwrap().session;
    assert_eq!(session.tags, ["b", "c"]);
    let session = update(|r| r.clear_tags = true).await.unwrap().session;
    assert!(session.tags.is_empty());
    let session = update(|r| r.sticky = Some(false)).await.unwrap().session;
    assert!(!session.sticky && session.timeout_at.is_unset());
    let session = update(|r| r.max_duration = seconds(3600)).await.unwrap().session;
    assert_eq!(session.timeout_at.seconds - session.created_at.seconds, 3600);
    let both = update(|r| {
        r.clear_tags = true;
        r.tags = vec!["d".into()];
    });
    assert_eq!(code(both.await), ErrorCode::InvalidArgument);
    assert_eq!(code(update(|r| r.name = Some("x".repeat(65))).await), ErrorCode::InvalidArgument);
}

#[tokio::test]
async fn extending_moves_the_end_and_the_end_comes() {
    let world = World::new().await;
    let client = world.control();
    let answer =
        client.create_session(wire::CreateSessionRequest { max_duration: seconds(60), ..create() }).await.unwrap();
    let id = answer.session.id.clone();
    let extend = |additional_duration| {
        let request = wire::ExtendSessionRequest { session_id: id.clone(), additional_duration };
        let client = client.clone();
        async move { client.extend_session(request).await }
    };
    assert_eq!(code(extend(Default::default()).await), ErrorCode::InvalidArgument);
    assert_eq!(code(extend(seconds(0)).await), ErrorCode::InvalidArgument);
    let session = extend(seconds(60)).await.unwrap().session;
    assert_eq!(session.timeout_at.seconds - session.created_at.seconds, 120);
    world.fakes.clock.advance(121_000);
    soon(async {
        while client.get_session(get(&id)).await.unwrap().session.state != SessionState::Terminated {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let session = client.get_session(get(&id)).await.unwrap().session;
    assert!(session.terminal_error.contains("maximum duration"), "{}", session.terminal_error);
    let late = extend(seconds(60)).await.unwrap_err();
    assert_eq!(late.code, ErrorCode::FailedPrecondition);
    assert!(late.message.unwrap().to_lowercase().contains("terminated"));
}

#[tokio::test]
async fn terminating_twice_succeeds_and_a_batch_reports_each_failure() {
    let world = World::new().await;
    let client = world.control();
    let first = world.session().await.0;
    let second = world.session().await.0;
    for _ in 0..2 {
        let answer = client.terminate_session(terminate(&first)).await.unwrap();
        assert_eq!(answer.session.state, SessionState::Terminated);
    }
    let unknown = "01980000-0000-7000-8000-000000000000".to_owned();
    let batch = |session_ids| wire::TerminateSessionsRequest { session_ids };
    let answer = client.terminate_sessions(batch(vec![first, second, unknown.clone()])).await.unwrap();
    assert_eq!(answer.sessions.len(), 2);
    assert_eq!(answer.failures.len(), 1);
    assert_eq!(answer.failures[0].session_id, unknown);
    assert!(answer.failures[0].message.contains("not found"));
    assert!(world.fakes.driver.sandboxes().is_empty());
    for ids in [vec![], vec![unknown; 101], vec!["x".to_owned()]] {
        assert_eq!(code(client.terminate_sessions(batch(ids)).await), ErrorCode::InvalidArgument);
    }
}

#[tokio::test]
async fn credentials_are_given_for_running_sessions_only() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let request = || wire::CreateSessionCredentialRequest { session_id: id.clone() };
    let answer = client.create_session_credential(request()).await.unwrap();
    assert_eq!(answer.route_status, DataPlaneRouteStatus::Verified);
    assert_eq!(answer.data_plane_endpoint, world.url());
    assert!(answer.credential.expires_at.is_set());
    client.terminate_session(terminate(&id)).await.unwrap();
    let error = client.create_session_credential(request()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    assert!(error.message.unwrap().to_lowercase().contains("terminated"));

    world.hold_creations.send_replace(true);
    let creating = client.create_session(create()).await.unwrap().session.id.clone();
    let request = wire::CreateSessionCredentialRequest { session_id: creating };
    let error = client.create_session_credential(request).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    assert!(error.message.unwrap().contains("state=CREATING"));
    world.hold_creations.send_replace(false);
}

#[tokio::test]
async fn activity_and_usage_are_reported() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    let before = client.get_session(get(&id)).await.unwrap().session.last_activity_at.seconds;
    world.fakes.clock.advance(5_000);
    let request = wire::ReportSessionActivityRequest { session_id: id.clone() };
    let at = client.report_session_activity(request).await.unwrap().last_activity_at.seconds;
    assert!(at >= before + 5);
    assert_eq!(client.get_session(get(&id)).await.unwrap().session.last_activity_at.seconds, at);

    let usage = client.get_workspace_sandbox_usage(Default::default()).await.unwrap();
    let limit = |key: &str| usage.limits.iter().find(|limit| limit.key == key).unwrap();
    assert_eq!(limit("active_sessions").current, 1);
    assert_eq!(limit("active_sessions").max, Some(1_000));
    assert_eq!(limit("cpu_cores").current, 2);
    assert_eq!(limit("memory_bytes").current, 4096 << 20);
}

#[tokio::test]
async fn the_public_url_replaces_the_name_the_client_used() {
    let world = World::with(|config| config.public_url = Some("https://sandboxes.example".into())).await;
    let answer = world.control().create_session(create()).await.unwrap();
    assert_eq!(answer.data_plane_endpoint, "https://sandboxes.example");
}

#[tokio::test]
async fn a_full_server_names_its_limit() {
    let world = World::with_engine(|config| config.sessions_max = 1).await;
    world.session().await;
    let error = world.control().create_session(create()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    assert!(error.message.unwrap().contains("sessions_max"));
}
