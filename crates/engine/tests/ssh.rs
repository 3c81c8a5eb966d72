//! What the server for SSH may rely on.

// On a paused runtime tokio's time is virtual, and is what the fake clock shows.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_api::ids::{SessionId, WorkspaceId};
use nagaya_engine::fake::{self, Fakes};
use nagaya_engine::model::{SessionState, WakeOnVisit};
use nagaya_engine::ports::Clock;
use nagaya_engine::{Caller, Engine, EngineConfig, NewSession, SessionUpdate};

async fn world(config: EngineConfig) -> (Engine, Caller, Fakes, SessionId) {
    let (engine, _, caller, fakes) = fake::start(config).await;
    let id = engine.create_session(&caller, NewSession::default()).await.unwrap().id;
    let mut states = engine.watch_session(&caller, id).await.unwrap();
    states.wait_for(|session| session.state == SessionState::Running).await.unwrap();
    (engine, caller, fakes, id)
}

fn code<T>(result: Result<T, nagaya_api::error::Error>) -> Code {
    result.err().expect("this must be refused").code
}

#[tokio::test(start_paused = true)]
async fn a_visit_is_activity_and_ends_with_its_session() {
    let (engine, caller, fakes, id) = world(EngineConfig::default()).await;
    let visit = engine.visit(&caller, id).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    assert_eq!(engine.session(&caller, id).await.unwrap().last_activity_at, fakes.clock.now());
    let ended = visit.ended();
    // Frozen in memory it is still there.
    engine.pause_session(&caller, id).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(60), visit.ended()).await.is_err());
    engine.resume_session(&caller, id).await.unwrap();
    engine.terminate_session(&caller, id).await.unwrap();
    assert_eq!(ended.await, "the session has ended");
    drop(visit);
    assert_eq!(code(engine.visit(&caller, id).await), Code::SessionTerminated);
    assert_eq!(code(engine.visit_certified(id).await), Code::SessionTerminated);
    assert_eq!(code(engine.check_visit(&caller, id).await), Code::SessionTerminated);
}

#[tokio::test(start_paused = true)]
async fn strangers_find_nothing_and_stopped_sessions_are_woken_where_that_is_wanted() {
    let (engine, caller, _, id) = world(EngineConfig::default()).await;
    let stranger = Caller { workspace_id: WorkspaceId::new(9, [9; 10]), ..caller };
    assert_eq!(code(engine.visit(&stranger, id).await), Code::SessionNotFound);
    assert_eq!(code(engine.check_visit(&stranger, id).await), Code::SessionNotFound);
    assert_eq!(code(engine.visit_certified(SessionId::new(9, [9; 10])).await), Code::SessionNotFound);
    engine.pause_session(&caller, id).await.unwrap();
    assert_eq!(code(engine.visit(&caller, id).await), Code::SessionNotRunning);
    engine.check_visit(&caller, id).await.unwrap();

    let always = EngineConfig { wake_on_visit: WakeOnVisit::Always, ..EngineConfig::default() };
    let (engine, caller, _, id) = world(always).await;
    engine.pause_session(&caller, id).await.unwrap();
    engine.visit(&caller, id).await.unwrap();
    assert_eq!(engine.session(&caller, id).await.unwrap().state, SessionState::Running);
}

#[tokio::test(start_paused = true)]
async fn keys_are_replaced_as_a_whole() {
    let (engine, caller, _, id) = world(EngineConfig::default()).await;
    let replace = |keys: &[&str]| {
        let keys = keys.iter().map(ToString::to_string).collect();
        let update = SessionUpdate { ssh_authorized_keys: Some(keys), ..SessionUpdate::default() };
        engine.update_session(&caller, id, update)
    };
    replace(&["one", "two"]).await.unwrap();
    replace(&["three"]).await.unwrap();
    assert_eq!(code(replace(&[]).await), Code::InvalidArgument);
    assert_eq!(code(replace(&["two\nlines"]).await), Code::InvalidArgument);
    assert_eq!(code(replace(&["many"; 33]).await), Code::InvalidArgument);
    for empty in ["", "\n", " \r\n", "\u{feff}\n"] {
        assert_eq!(code(replace(&["one", empty]).await), Code::InvalidArgument, "{empty:?}");
    }
    assert_eq!(engine.visit(&caller, id).await.unwrap().ssh_authorized_keys, ["three"]);
}

/// The texts of `.pub` files, as editors and systems write them, are the one line in them: at creation and later.
#[tokio::test(start_paused = true)]
async fn keys_may_come_with_what_a_file_has_around_its_line() {
    let (engine, caller, _, id) = world(EngineConfig::default()).await;
    for text in ["k a@b\n", "k a@b\r\n", "\u{feff}k a@b\n\n", "  k a@b\t", "\nk a@b"] {
        let update = SessionUpdate { ssh_authorized_keys: Some(vec![text.to_owned()]), ..SessionUpdate::default() };
        engine.update_session(&caller, id, update).await.unwrap();
        assert_eq!(engine.visit(&caller, id).await.unwrap().ssh_authorized_keys, ["k a@b"], "{text:?}");
        let new = NewSession { ssh_authorized_keys: vec![text.to_owned()], ..NewSession::default() };
        let created = engine.create_session(&caller, new).await.unwrap();
        assert_eq!(created.ssh_authorized_keys, ["k a@b"], "{text:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lasting_secret_lasts() {
    let (engine, _, _, _) = world(EngineConfig::default()).await;
    let first = engine.lasting_secret("a").await.unwrap();
    assert_eq!(engine.lasting_secret("a").await.unwrap(), first);
    assert_ne!(engine.lasting_secret("b").await.unwrap(), first);
}
