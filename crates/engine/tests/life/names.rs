//! Names that are unique in their workspace.

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::{KeyId, SessionId, WorkspaceId};
use nagaya_engine::model::{Session, SessionState, Workspace, WorkspaceSettings};
use nagaya_engine::ports::{Change, Store};
use nagaya_engine::{Caller, Fork, NewSession, SessionUpdate};

use crate::support::{World, code, idle};

fn unique(name: &str) -> NewSession {
    NewSession { name: name.into(), name_is_unique: true, ..NewSession::default() }
}

fn to(name: &str) -> SessionUpdate {
    SessionUpdate { name: Some(name.into()), ..SessionUpdate::default() }
}

fn found_by_name(name_is_unique: bool) -> SessionUpdate {
    SessionUpdate { name_is_unique: Some(name_is_unique), ..SessionUpdate::default() }
}

impl World {
    fn find(&self, name: &str) -> Option<SessionId> {
        self.engine.session_by_name(&self.caller, name).ok().map(|session| session.id)
    }

    async fn create_named(&self, name: &str) -> Result<Session, Error> {
        self.engine.create_session(&self.caller, unique(name)).await
    }

    async fn rename(&self, id: SessionId, update: SessionUpdate) -> Result<Session, Error> {
        self.engine.update_session(&self.caller, id, update).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_that_was_asked_for_as_unique_leads_to_one_session() {
    let world = World::new().await;
    let web = world.run(unique("web")).await.id;
    assert_eq!(world.find("web"), Some(web));
    assert_eq!(code(world.create_named("web").await), Code::SessionNameTaken);
    assert_eq!((world.active().await, world.fakes.store.all_sessions().len()), (1, 1), "nothing is left of it");
    // Who did not ask for it may have the same name, and is not found by it.
    let plain = world.run(NewSession { name: "web".into(), ..NewSession::default() }).await.id;
    world.run(NewSession { name: "plain".into(), ..NewSession::default() }).await;
    assert_eq!((world.find("web"), world.find("plain"), world.find("")), (Some(web), None, None));
    world.rename(plain, to("api")).await.unwrap();
    world.rename(plain, to("web")).await.unwrap();
    assert_eq!(code(world.rename(plain, found_by_name(true)).await), Code::SessionNameTaken);
    assert!(!world.session(plain).await.name_is_unique);
    assert_eq!(code(world.create_named("").await), Code::InvalidArgument);
    // Forks are not found by the names that they get.
    let fork = Fork { count: 2, name: Some("web".into()) };
    let forks = world.engine.fork_session(&world.caller, web, fork).await.unwrap();
    assert!(forks.iter().all(|fork| fork.name == "web" && !fork.name_is_unique));
    assert_eq!(world.find("web"), Some(web));
}

#[tokio::test(start_paused = true)]
async fn each_workspace_has_names_of_its_own() {
    let world = World::new().await;
    let other = Caller { workspace_id: WorkspaceId::new(1, [1; 10]), key_id: KeyId::new(1, [1; 10]) };
    let settings = WorkspaceSettings::default();
    let workspace = Workspace { id: other.workspace_id, name: "other".into(), created_at: 1, settings };
    world.fakes.store.commit(vec![Change::Workspace(workspace)]).await.unwrap();
    let world = world.restart(|_| ()).await;
    let mine = world.run(unique("web")).await.id;
    assert_eq!(code(world.engine.session_by_name(&other, "web")), Code::SessionNotFound);
    let theirs = world.engine.create_session(&other, unique("web")).await.unwrap().id;
    assert_eq!(world.engine.session_by_name(&other, "web").unwrap().id, theirs);
    assert_eq!(world.find("web"), Some(mine));
}

#[tokio::test(start_paused = true)]
async fn a_rename_takes_the_new_name_and_frees_the_old_one() {
    let world = World::new().await;
    let (web, api) = (world.run(unique("web")).await.id, world.run(unique("api")).await.id);
    assert_eq!(code(world.rename(web, to("api")).await), Code::SessionNameTaken);
    assert_eq!(world.session(web).await.name, "web");
    assert_eq!(code(world.rename(web, to("")).await), Code::InvalidArgument);
    world.rename(web, to("web")).await.unwrap();
    world.rename(web, SessionUpdate { sticky: Some(true), ..SessionUpdate::default() }).await.unwrap();
    assert_eq!(world.find("web"), Some(web), "what changes nothing of its name leaves it");
    world.rename(web, to("shop")).await.unwrap();
    assert_eq!((world.find("web"), world.find("shop"), world.find("api")), (None, Some(web), Some(api)));
    world.rename(api, to("web")).await.unwrap();
    // A name may be given up, and be asked for later.
    world.rename(web, found_by_name(false)).await.unwrap();
    assert_eq!(world.find("shop"), None);
    let next = world.run(unique("shop")).await.id;
    assert_eq!(code(world.rename(web, found_by_name(true)).await), Code::SessionNameTaken);
    world.rename(web, SessionUpdate { name_is_unique: Some(true), ..to("cart") }).await.unwrap();
    assert_eq!((world.find("shop"), world.find("cart")), (Some(next), Some(web)));
    let nameless = world.running().await;
    assert_eq!(code(world.rename(nameless, found_by_name(true)).await), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_session_keeps_its_name_until_it_has_ended() {
    let world = World::new().await;
    let id = world.run(unique("web")).await.id;
    world.pause(id).await;
    assert_eq!(world.engine.session_by_name(&world.caller, "web").unwrap().state, SessionState::Paused);
    assert_eq!(code(world.create_named("web").await), Code::SessionNameTaken);
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    assert_eq!(world.find("web"), None);
    let next = world.run(unique("web")).await.id;
    assert_eq!(world.find("web"), Some(next));
    assert_eq!(code(world.rename(id, to("other")).await), Code::SessionTerminated);
    // One that cannot be created ends, too.
    world.engine.terminate_session(&world.caller, next).await.unwrap();
    world.fakes.driver.refuse_next(nagaya_engine::ports::DriverError::Failed("no".into()));
    let failed = world.create_named("web").await.unwrap().id;
    assert_eq!(world.settled(failed).await.state, SessionState::Terminated);
    world.run(unique("web")).await;
}

#[tokio::test(start_paused = true)]
async fn names_are_still_taken_after_a_restart() {
    let world = World::new().await;
    let (web, api) = (world.run(unique("web")).await.id, world.run(unique("api")).await.id);
    let ended = world.run(unique("ended")).await.id;
    world.pause(api).await;
    world.rename(api, to("shop")).await.unwrap();
    world.engine.terminate_session(&world.caller, ended).await.unwrap();
    let world = world.restart(|_| ()).await;
    assert_eq!((world.find("web"), world.find("shop")), (Some(web), Some(api)));
    assert_eq!((world.find("api"), world.find("ended")), (None, None));
    assert_eq!(code(world.create_named("shop").await), Code::SessionNameTaken);
    world.run(unique("api")).await;
    world.engine.terminate_session(&world.caller, api).await.unwrap();
    world.run(unique("shop")).await;
}

#[tokio::test(start_paused = true)]
async fn of_many_creations_at_once_one_gets_the_name() {
    let world = World::new().await;
    let creations: Vec<_> = (0..10)
        .map(|_| {
            let (engine, caller) = (world.engine.clone(), world.caller);
            tokio::spawn(async move { engine.create_session(&caller, unique("web")).await.map(|session| session.id) })
        })
        .collect();
    let mut made = Vec::new();
    for creation in creations {
        match creation.await.unwrap() {
            Ok(id) => made.push(id),
            Err(error) => assert_eq!(error.code, Code::SessionNameTaken),
        }
    }
    assert_eq!((made.len(), world.find("web")), (1, made.first().copied()));
    // The same of renames.
    let (a, b) = (world.run(unique("a")).await.id, world.run(unique("b")).await.id);
    let (first, second) = tokio::join!(world.rename(a, to("c")), world.rename(b, to("c")));
    assert_eq!([&first, &second].into_iter().filter(|answer| answer.is_ok()).count(), 1);
    assert_eq!(world.find("c"), Some(if first.is_ok() { a } else { b }));
}

#[tokio::test(start_paused = true)]
async fn a_name_that_could_not_be_recorded_is_free() {
    let world = World::new().await;
    let id = world.run(unique("web")).await.id;
    idle().await;
    world.fakes.store.fail_commits(true);
    assert_eq!(code(world.create_named("api").await), Code::Internal);
    assert_eq!(code(world.rename(id, to("shop")).await), Code::Internal);
    assert_eq!((world.find("web"), world.find("shop"), world.find("api")), (Some(id), None, None));
    world.fakes.store.fail_commits(false);
    world.run(unique("api")).await;
    world.run(unique("shop")).await;
    assert_eq!(code(world.create_named("web").await), Code::SessionNameTaken);
}
