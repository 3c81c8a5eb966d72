//! Pausing, resuming, forking and the settings of a workspace, as clients see them.

use std::collections::BTreeMap;

use connectrpc::ErrorCode;
use http::Request;
use nagaya_api::nagaya::v1 as own;
use nagaya_api::tenki::v1 as wire;
use nagaya_api::tenki::v1::{SessionState, SnapshotDurabilityState, SnapshotState, SnapshotType};
use nagaya_engine::ports::DriverError;
use serde_json::json;

use crate::sessions::{get, seconds, wait};
use crate::support::*;

pub fn pause(id: &str) -> wire::PauseSessionRequest {
    wire::PauseSessionRequest { session_id: id.into() }
}

fn resume(id: &str) -> wire::ResumeSessionRequest {
    wire::ResumeSessionRequest { session_id: id.into() }
}

async fn active_sessions(world: &World) -> i64 {
    let usage = world.control().get_workspace_sandbox_usage(Default::default()).await.unwrap();
    usage.limits.iter().find(|limit| limit.key == "active_sessions").unwrap().current
}

pub async fn metrics(world: &World) -> String {
    let request = Request::get("/metrics").header("host", "x").body(Default::default()).unwrap();
    String::from_utf8(world.http1(request).await.into_body().to_vec()).unwrap()
}

#[tokio::test]
async fn a_paused_session_says_so_and_resumes_where_it_was() {
    let world = World::new().await;
    let client = world.control();
    let request = wire::CreateSessionRequest { pause_retention: seconds(3_600), ..create() };
    let id = client.create_session(request).await.unwrap().session.id.clone();

    let paused = client.pause_session(pause(&id)).await.unwrap().session;
    assert_eq!(paused.state, SessionState::Paused);
    assert!(paused.paused_at.is_set());
    assert_eq!(paused.pause_expires_at.seconds - paused.paused_at.seconds, 3_600);
    let snapshot = &paused.pause_snapshot;
    assert_eq!(paused.pause_snapshot_id.as_deref(), Some(snapshot.id.as_str()));
    assert_eq!(snapshot.state, SnapshotState::Ready);
    assert_eq!(snapshot.r#type, SnapshotType::Pause);
    assert_eq!(snapshot.durability_state, SnapshotDurabilityState::LocalReady);
    let request = wire::GetSnapshotRequest { snapshot_id: snapshot.id.clone() };
    assert_eq!(
        *client.get_snapshot(request).await.unwrap().snapshot,
        **snapshot,
        "the session tells what the snapshot is"
    );
    assert_eq!(*client.pause_session(pause(&id)).await.unwrap().session, *paused, "pausing again changes nothing");
    assert_eq!(active_sessions(&world).await, 0);
    assert!(metrics(&world).await.contains("nagaya_sessions{state=\"PAUSED\"} 1"));
    let request = wire::ListWorkspaceSandboxesRequest { state: SessionState::Paused.into(), ..Default::default() };
    assert_eq!(client.list_workspace_sandboxes(request).await.unwrap().sessions.len(), 1);

    let request = wire::CreateSessionCredentialRequest { session_id: id.clone() };
    let refused = client.create_session_credential(request).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::FailedPrecondition);
    assert!(refused.message.unwrap().contains("state=PAUSED"), "clients stop trying at this word");

    let resumed = client.resume_session(resume(&id)).await.unwrap().session;
    assert_eq!(resumed.state, SessionState::Running);
    assert!(resumed.paused_at.is_unset() && resumed.pause_snapshot.is_unset() && resumed.pause_expires_at.is_unset());
    assert_eq!(resumed.pause_snapshot_id, None);
    assert_eq!(resumed.metadata["restore_mode"], "memory");
    assert_eq!(resumed.metadata["restore_degraded"], "false");
    assert_eq!(client.resume_session(resume(&id)).await.unwrap().session.state, SessionState::Running);
    assert_eq!(active_sessions(&world).await, 1);
    let certificate = world.certificate(&id).await;
    let request = wire::StatRequest { session_id: id.clone(), path: "/home/tenki".into() };
    let request = wire::SandboxSessionDataPlaneServiceStatRequest { request: request.into() };
    assert!(world.data(&certificate).stat(request).await.unwrap().response.exists);
}

#[tokio::test]
async fn a_sandbox_that_powers_itself_off_is_resumed_by_a_boot() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    assert!(world.fakes.driver.power_off(id.parse().unwrap()));
    soon(async {
        while client.get_session(get(&id)).await.unwrap().session.state != SessionState::UserShutdown {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let resumed = client.resume_session(resume(&id)).await.unwrap().session;
    assert_eq!(resumed.state, SessionState::Running);
    let expected =
        pairs(&[("restore_mode", "cold_boot"), ("restore_degraded", "false"), ("restore_reason", "powered_off")]);
    let told: BTreeMap<_, _> = resumed.metadata.iter().filter(|(key, _)| key.starts_with("restore_")).collect();
    assert_eq!(told, expected.iter().collect());
}

/// Clients raise their typed error when they find the session PAUSED again, with its reason.
#[tokio::test]
async fn a_resume_that_fails_is_answered_with_the_session_and_its_reason() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    assert!(world.fakes.driver.kill(id.parse().unwrap(), "the sandbox's first process was killed"));
    soon(async {
        while client.get_session(get(&id)).await.unwrap().session.state != SessionState::Paused {
            tokio::task::yield_now().await;
        }
    })
    .await;
    world.fakes.driver.refuse_next(DriverError::Failed("no network left for it".into()));
    let answer = client.resume_session(resume(&id)).await.unwrap().session;
    assert_eq!(answer.state, SessionState::Paused);
    assert!(answer.last_resume_error.contains("no network left for it"), "{}", answer.last_resume_error);
    let resumed = client.resume_session(resume(&id)).await.unwrap().session;
    assert_eq!(resumed.state, SessionState::Running);
    assert_eq!(resumed.last_resume_error, "");
    assert_eq!(resumed.metadata["restore_reason"], "sandbox_ended");
    assert_eq!(resumed.metadata["restore_degraded"], "true");
}

#[tokio::test]
async fn a_full_server_refuses_a_resume_and_keeps_the_session() {
    let world = World::with_engine(|config| config.sessions_max = 1).await;
    let client = world.control();
    let paused = world.session().await.0;
    client.pause_session(pause(&paused)).await.unwrap();
    world.session().await;
    let refused = client.resume_session(resume(&paused)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::ResourceExhausted);
    assert_eq!(client.get_session(get(&paused)).await.unwrap().session.state, SessionState::Paused);
}

#[tokio::test]
async fn what_cannot_be_paused_or_resumed_is_refused() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    client.terminate_session(wire::TerminateSessionRequest { session_id: id.clone() }).await.unwrap();
    for refused in
        [client.pause_session(pause(&id)).await.map(drop), client.resume_session(resume(&id)).await.map(drop)]
    {
        let error = refused.unwrap_err();
        assert_eq!(error.code, ErrorCode::FailedPrecondition);
        assert!(error.message.unwrap().contains("terminated"));
    }
    for (id, expected) in
        [("nonsense", ErrorCode::InvalidArgument), ("01980000-0000-7000-8000-000000000000", ErrorCode::NotFound)]
    {
        assert_eq!(code(client.pause_session(pause(id)).await), expected);
        assert_eq!(code(client.resume_session(resume(id)).await), expected);
    }
}

#[tokio::test]
async fn waiting_for_a_paused_session_goes_on_until_somebody_resumes_it() {
    let world = World::new().await;
    let client = world.control();
    let id = world.session().await.0;
    client.pause_session(pause(&id)).await.unwrap();
    let mut waiting = client.wait_session(wait(&id)).await.unwrap();
    let first = soon(waiting.message()).await.unwrap().unwrap();
    assert_eq!(first.session.state, SessionState::Paused);
    assert_eq!(first.route_status, wire::DataPlaneRouteStatus::NotReady);
    client.resume_session(resume(&id)).await.unwrap();
    let mut last = first;
    while let Some(message) = soon(waiting.message()).await.unwrap() {
        last = message;
    }
    assert_eq!(last.session.state, SessionState::Running);
    assert!(last.credential.is_set());
}

#[tokio::test]
async fn forks_are_new_sessions_with_the_sources_disk() {
    let world = World::new().await;
    let client = world.control();
    let request = wire::CreateSessionRequest {
        name: "tree".into(),
        cpu_cores: Some(3),
        metadata: pairs(&[("team", "red")]),
        tags: vec!["a".into()],
        sticky: true,
        ..create()
    };
    let source = client.create_session(request).await.unwrap().session;
    let fork = |count, name: Option<&str>| {
        let config = world
            .config(connectrpc::Protocol::Grpc)
            .with_default_header("authorization", format!("Bearer {}", world.secret));
        let client = own::NagayaServiceClient::new(connectrpc::client::HttpClient::plaintext_http2_only(), config);
        let request = own::ForkSessionRequest { session_id: source.id.clone(), count, name: name.map(str::to_owned) };
        async move { client.fork_session(request).await }
    };
    let answer = fork(2, None).await.unwrap();
    assert_eq!(answer.memory_carried, Some(false));
    let mut names: Vec<_> = answer.sessions.iter().map(|session| session.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["tree-fork-1", "tree-fork-2"]);
    for session in &answer.sessions {
        assert_ne!(session.id, source.id);
        assert_eq!(session.state, SessionState::Running);
        assert_eq!((session.cpu_cores, session.sticky, &session.tags[..]), (3, false, &["a".to_owned()][..]));
        assert_eq!(session.metadata["team"], "red");
    }
    let one = fork(0, Some("sapling")).await.unwrap();
    assert_eq!(one.sessions.iter().map(|session| session.name.as_str()).collect::<Vec<_>>(), ["sapling"]);
    let long = "x".repeat(256);
    assert_eq!(fork(1, Some(&long)).await.unwrap().sessions[0].name, long, "our own service has the server's bound");
    for (count, name) in [(-1, None), (101, None), (1, Some("x".repeat(257)))] {
        assert_eq!(code(fork(count, name.as_deref()).await), ErrorCode::InvalidArgument, "{count}");
    }

    let body = json!({"sessionId": source.id, "count": 1});
    let (status, answer) = world.json_of("nagaya.v1.NagayaService", "ForkSession", body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["memoryCarried"], false, "it is said, not left out");
}

#[tokio::test]
async fn our_own_service_wants_the_same_credential() {
    let world = World::new().await;
    let client = own::NagayaServiceClient::new(
        connectrpc::client::HttpClient::plaintext_http2_only(),
        world.config(connectrpc::Protocol::Grpc),
    );
    assert_eq!(code(client.fork_session(Default::default()).await), ErrorCode::Unauthenticated);
}

#[tokio::test]
async fn settings_are_changed_one_by_one_and_cleared() {
    let world = World::new().await;
    let client = world.control();
    let workspace_id = client.who_am_i(Default::default()).await.unwrap().workspaces[0].workspace_id.clone();
    let update = |change: fn(&mut wire::UpdateWorkspaceSandboxSettingsRequest)| {
        let mut request =
            wire::UpdateWorkspaceSandboxSettingsRequest { workspace_id: workspace_id.clone(), ..Default::default() };
        change(&mut request);
        let client = client.clone();
        async move { client.update_workspace_sandbox_settings(request).await }
    };
    let request = || wire::GetWorkspaceSandboxSettingsRequest { workspace_id: workspace_id.clone() };
    let settings = client.get_workspace_sandbox_settings(request()).await.unwrap().settings;
    assert_eq!(settings.workspace_id, workspace_id);
    assert!(settings.pause_retention.is_unset() && settings.max_volumes.is_none());
    let settings = update(|r| {
        r.pause_retention = seconds(60);
        r.max_volumes = Some(3);
        r.max_total_bytes = Some(1 << 40);
        r.max_sticky_sessions = Some(1);
        r.max_preview_urls_per_project = Some(7);
    });
    let settings = settings.await.unwrap().settings;
    assert_eq!(settings.pause_retention.seconds, 60);
    assert_eq!((settings.max_volumes, settings.max_total_bytes), (Some(3), Some(1 << 40)));
    assert_eq!((settings.max_preview_urls_per_workspace, settings.max_preview_urls_per_project), (Some(7), Some(7)));
    let settings = update(|r| r.clear_max_volumes = true).await.unwrap().settings;
    assert_eq!((settings.max_volumes, settings.max_sticky_sessions), (None, Some(1)));
    type Change = fn(&mut wire::UpdateWorkspaceSandboxSettingsRequest);
    let refused: &[(&str, Change)] = &[
        ("max_volumes 0", |r| r.max_volumes = Some(0)),
        ("max_snapshots -1", |r| r.max_snapshots = Some(-1)),
        ("max_total_bytes 0", |r| r.max_total_bytes = Some(0)),
        ("both", |r| (r.max_volumes, r.clear_max_volumes) = (Some(1), true)),
        ("retention 0", |r| r.pause_retention = seconds(0)),
        ("retention -1", |r| r.snapshot_retention = seconds(-1)),
        ("workspace_id", |r| r.workspace_id = "x".into()),
    ];
    for (name, change) in refused {
        assert_eq!(code(update(*change).await), ErrorCode::InvalidArgument, "{name}");
    }
    assert_eq!(*client.get_workspace_sandbox_settings(request()).await.unwrap().settings, *settings);
    let foreign = update(|r| r.workspace_id = "01980000-0000-7000-8000-000000000000".into()).await;
    assert_eq!(code(foreign), ErrorCode::NotFound);

    // The older pair of rpcs is a view of the same settings.
    let request = wire::UpdateWorkspaceSnapshotRetentionSettingsRequest {
        workspace_id: workspace_id.clone(),
        clear_pause_retention: true,
        snapshot_retention: seconds(7_200),
        ..Default::default()
    };
    let retention = client.update_workspace_snapshot_retention_settings(request).await.unwrap().settings;
    assert!(retention.pause_retention.is_unset());
    assert_eq!(retention.snapshot_retention.seconds, 7_200);
    let request = wire::GetWorkspaceSnapshotRetentionSettingsRequest { workspace_id };
    assert_eq!(*client.get_workspace_snapshot_retention_settings(request).await.unwrap().settings, *retention);
}

#[tokio::test]
async fn sticky_sessions_have_a_limit_of_their_own() {
    let world = World::new().await;
    let client = world.control();
    let workspace_id = client.who_am_i(Default::default()).await.unwrap().workspaces[0].workspace_id.clone();
    let request = wire::UpdateWorkspaceSandboxSettingsRequest {
        workspace_id,
        max_sticky_sessions: Some(1),
        ..Default::default()
    };
    client.update_workspace_sandbox_settings(request).await.unwrap();
    client.create_session(wire::CreateSessionRequest { sticky: true, ..create() }).await.unwrap();
    let second = client.create_session(wire::CreateSessionRequest { sticky: true, ..create() }).await;
    assert_eq!(code(second), ErrorCode::ResourceExhausted);
    let plain = client.create_session(create()).await.unwrap().session.id.clone();
    let request = wire::UpdateSessionRequest { session_id: plain, sticky: Some(true), ..Default::default() };
    assert_eq!(code(client.update_session(request).await), ErrorCode::ResourceExhausted);
}
