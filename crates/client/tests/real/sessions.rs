use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use nagaya_client::{
    Change, Code, EgressPolicy, Error, ForkOptions, ListOptions, RefusalKind, SessionState, Status, UpdateOptions,
    Wait, WorkspaceSettingsUpdate,
};

use crate::world::{World, say, small};

crate::cases!(
    a_session_lives_and_ends,
    a_session_sleeps_and_wakes,
    sessions_are_found_again,
    errors_are_typed,
    a_workspace_has_limits,
    a_fork_has_its_sources_disk,
    destinations_can_be_changed,
);

const WAIT: Duration = Duration::from_secs(60);

async fn a_session_lives_and_ends(world: &World) {
    let options = small()
        .metadata(BTreeMap::from([("purpose".into(), "test".into())]))
        .tags(vec!["One".into(), "two".into()])
        .env(BTreeMap::from([("GREETING".into(), "hello".into())]))
        .max_duration(Some(Duration::from_secs(600)))
        .wait(Wait::No);
    let session = world.client.create(options).await.unwrap();
    let info = session.wait_ready(WAIT).await.unwrap();
    assert_eq!((info.name.as_str(), info.state, info.cpu_cores), ("small", SessionState::Running, 1));
    assert_eq!((&info.metadata["purpose"][..], info.tags.as_slice()), ("test", &["one".into(), "two".into()][..]));
    assert!(info.is_ready() && !info.is_terminal() && info.inbound_enabled && !info.outbound_enabled);
    assert!(info.created_at.unwrap() <= SystemTime::now() && info.ready_at >= info.created_at);
    assert_eq!(say(&session, "echo $GREETING").await, "hello");

    let before = info.timeout_at.unwrap();
    let extended = session.extend(Duration::from_secs(300)).await.unwrap().timeout_at.unwrap();
    assert_eq!(extended.duration_since(before).unwrap().as_secs(), 300);
    let updated = session.update(UpdateOptions::default().name(Some("renamed".into()))).await.unwrap();
    assert_eq!((updated.name.as_str(), updated.tags.len()), ("renamed", 2));
    assert!(session.update_tags(Vec::new()).await.unwrap().tags.is_empty());
    assert!(session.report_activity().await.unwrap().is_some());
    let json = serde_json::to_value(session.refresh().await.unwrap()).unwrap();
    assert_eq!(json["state"], "running");
    assert!(json["created_at"].as_str().unwrap().ends_with('Z'), "{json}");

    assert!(session.close().await.unwrap().is_terminal());
    session.close().await.unwrap();
    session.close_if_open().await.unwrap();
    let refused = session.shell("true").output().await.unwrap_err();
    assert!(matches!(refused, Error::Refused { kind: RefusalKind::SessionTerminated, .. }), "{refused:?}");
    let refused = session.wait_ready(WAIT).await.unwrap_err();
    assert!(matches!(refused, Error::Refused { kind: RefusalKind::SessionTerminated, .. }), "{refused:?}");
}

async fn a_session_sleeps_and_wakes(world: &World) {
    let session = world.client.create(small()).await.unwrap();
    session.files().write("kept", "content").await.unwrap();
    let paused = session.pause().await.unwrap();
    assert_eq!(paused.state, SessionState::Paused);
    assert!(paused.paused_at.is_some());
    let refused = session.files().read("kept").await.unwrap_err();
    assert!(refused.message().contains("state=PAUSED"), "it is refused at once: {refused:?}");
    session.resume().await.unwrap();
    assert_eq!(session.wait_resumed(WAIT).await.unwrap().state, SessionState::Running);
    assert_eq!(&session.files().read("kept").await.unwrap()[..], b"content");
    session.close().await.unwrap();
}

async fn sessions_are_found_again(world: &World) {
    let options = |tag: &str| small().tags(vec!["found".into(), tag.into()]);
    let first = world.client.create(options("a")).await.unwrap();
    let second = world.client.create(options("b")).await.unwrap();
    let list = |tags: &[&str], include_terminated| {
        let tags = tags.iter().map(ToString::to_string).collect();
        world.client.list(ListOptions::default().tags(tags).include_terminated(include_terminated))
    };
    assert_eq!(list(&["found"], false).await.unwrap().len(), 2);
    let only = list(&["found", "b"], false).await.unwrap();
    assert_eq!(only.iter().map(|each| each.id()).collect::<Vec<_>>(), [second.id()]);
    assert!(only[0].info().unwrap().is_ready());

    // A handle without its session's description finds its own way to the data plane.
    let handle = world.client.session(first.id());
    assert!(handle.info().is_none());
    assert_eq!(say(&handle, "echo found").await, "found");
    assert_eq!(world.client.get(first.id()).await.unwrap().info().unwrap().id, first.id());

    let unknown = "0190a000-0000-7000-8000-000000000000".to_owned();
    let ids = [first.id().to_owned(), second.id().to_owned(), unknown.clone()];
    let done = world.client.terminate_many(&ids).await.unwrap();
    assert_eq!(done.sessions.len(), 2);
    assert_eq!(done.failures.iter().map(|each| &each.session_id).collect::<Vec<_>>(), [&unknown]);
    assert_eq!(list(&["found"], false).await.unwrap().len(), 0);
    assert_eq!(list(&["found"], true).await.unwrap().len(), 2);
}

async fn errors_are_typed(world: &World) {
    let unknown = world.client.get("0190a000-0000-7000-8000-000000000000").await.unwrap_err();
    assert!(matches!(unknown, Error::Refused { kind: RefusalKind::SessionNotFound, .. }), "{unknown:?}");
    assert_eq!(unknown.code(), Some(Code::SessionNotFound));
    let no_id = world.client.get("x").await.unwrap_err();
    assert!(no_id.status() == Some(Status::InvalidArgument), "{no_id:?}");
    assert_eq!(no_id.code(), Some(Code::InvalidId));
    let elsewhere = world.client.usage("0190a000-0000-7000-8000-000000000000").await.unwrap_err();
    assert!(matches!(elsewhere, Error::Refused { kind: RefusalKind::NotFound, .. }), "{elsewhere:?}");

    let stranger = nagaya_client::ClientOptions::default()
        .token(Some("tk_0000000000000000000000000000000000000000000".into()))
        .endpoint(Some(world.client.endpoint()));
    let stranger = nagaya_client::Client::new(stranger).unwrap();
    let refused = stranger.who_am_i().await.unwrap_err();
    assert!(
        matches!(refused, Error::Refused { kind: RefusalKind::Unauthorized, .. })
            && refused.code() == Some(Code::Unauthenticated),
        "{refused:?}"
    );
}

async fn a_workspace_has_limits(world: &World) {
    let who = world.client.who_am_i().await.unwrap();
    let workspace = &who.workspaces[0];
    assert!(!who.owner_id.is_empty() && !workspace.id.is_empty());
    for id in ["", &workspace.id] {
        let usage = world.client.usage(id).await.unwrap();
        let sessions = usage.iter().find(|limit| limit.key == "active_sessions").unwrap();
        assert!(sessions.current >= 1, "{usage:?}");
    }
    let set = |max_volumes| {
        let update = WorkspaceSettingsUpdate::default().max_volumes(max_volumes);
        world.client.update_workspace_settings(&workspace.id, update)
    };
    assert_eq!(set(Change::Set(7)).await.unwrap().max_volumes, Some(7));
    assert_eq!(world.client.workspace_settings(&workspace.id).await.unwrap().max_volumes, Some(7));
    assert_eq!(set(Change::Keep).await.unwrap().max_volumes, Some(7));
    assert_ne!(set(Change::Clear).await.unwrap().max_volumes, Some(7));
}

async fn a_fork_has_its_sources_disk(world: &World) {
    let source = world.client.create(small()).await.unwrap();
    source.files().write("here", "before the fork").await.unwrap();
    let forked = source.fork(ForkOptions::default().count(2).name(None)).await.unwrap();
    assert_eq!(forked.sessions.len(), 2);
    source.files().write("here", "after the fork").await.unwrap();
    for fork in &forked.sessions {
        fork.wait_ready(WAIT).await.unwrap();
        assert_eq!(&fork.files().read("here").await.unwrap()[..], b"before the fork");
        assert_ne!(fork.id(), source.id());
        fork.close().await.unwrap();
    }
    source.close().await.unwrap();
}

async fn destinations_can_be_changed(world: &World) {
    let session = world.client.create(small().allow_outbound(true)).await.unwrap();
    let policy = EgressPolicy { allow_domains: vec!["example.com".into()], allow_cidrs: Vec::new() };
    assert_eq!(session.set_egress(Some(policy.clone())).await.unwrap().egress, Some(policy));
    // Nothing leaves this machine: the address is not on the list.
    let refused = session.command(["python3", "-c", "import socket; socket.create_connection(('192.0.2.1', 9), 2)"]);
    assert!(!refused.output().await.unwrap().is_success());
    let connections = session.connections().await.unwrap();
    let denied = connections.iter().find(|each| each.destination.starts_with("192.0.2.1")).unwrap();
    assert!(!denied.allowed && !denied.reason.is_empty(), "{denied:?}");
    assert_eq!(session.set_egress(None).await.unwrap().egress, None);
    session.close().await.unwrap();
}
