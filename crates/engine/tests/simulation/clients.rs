//! One request of one client each: what is asked, and what the answer must be.

use std::rc::Rc;

use nagaya_api::error::{Code, Error};
use nagaya_api::ids::SessionId;
use nagaya_engine::fake::Rng;
use nagaya_engine::model::{ExecutionStatus, SessionState};
use nagaya_engine::ports::Clock;
use nagaya_engine::{Caller, Engine, ListSessions, NewExecution, NewSession, SessionUpdate};

use crate::audit::ensure;
use crate::keepers::{self, Keeping};
use crate::viewers::{self, Viewing};
use crate::world::World;

/// What a client is about to do.
#[derive(Debug, Clone)]
pub enum Action {
    Create {
        tenant: usize,
        limits: Limits,
        /// A name that is unique; else one that everybody has.
        name: Option<&'static str>,
        wait: bool,
    },
    Keep(Keeping),
    View(Viewing),
    Terminate(SessionId, usize),
    Rename(SessionId, usize),
    Extend(SessionId, usize, u64),
    Shorten(SessionId, usize, u64),
    Execute(SessionId, usize, &'static str),
    Open(SessionId, usize, u64),
    Touch(SessionId, usize),
    Get(SessionId, usize),
    List {
        tenant: usize,
        page_size: u32,
    },
    /// Another tenant tries everything with this session.
    Trespass(SessionId, usize),
}

/// When a session ends or pauses by itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    pub max_duration_ms: Option<u64>,
    pub idle_timeout_minutes: Option<u32>,
    pub pause_retention_ms: Option<u64>,
}

impl Action {
    pub fn choose(world: &World, rng: &mut Rng) -> Self {
        let known = world.model.borrow().known();
        // Sessions made lately are the interesting ones; an old one is tried now and then.
        let tail = rng.below(4 + 4 * rng.clone().below(2)) as usize;
        let Some(&(id, tenant)) = known.iter().rev().nth(tail).or(known.last()) else {
            return Self::create(rng);
        };
        if rng.per_mille(600) {
            return Self::Keep(Keeping::choose(world, rng, id, tenant));
        }
        if rng.per_mille(400) {
            return Self::View(Viewing::choose(world, rng, id, tenant));
        }
        match rng.below(100) {
            0..25 => Self::create(rng),
            25..35 => Self::Terminate(id, tenant),
            35..47 => Self::Rename(id, tenant),
            47..50 => Self::Extend(id, tenant, 1 + rng.below(5_000)),
            50..53 => Self::Shorten(id, tenant, 1 + rng.below(5_000)),
            53..68 => {
                let programs = ["true", "false", "hang", "echo", "hang", "no-such-program"];
                Self::Execute(id, tenant, programs[rng.below(6) as usize])
            }
            68..80 => Self::Open(id, tenant, rng.below(300)),
            80..85 => Self::Touch(id, tenant),
            85..90 => Self::Get(id, tenant),
            90..95 => Self::List { tenant, page_size: 1 + rng.below(4) as u32 },
            _ => Self::Trespass(id, 1 - tenant),
        }
    }

    pub fn create_and_wait(tenant: usize) -> Self {
        Self::Create { tenant, limits: Limits::default(), name: None, wait: true }
    }

    fn create(rng: &mut Rng) -> Self {
        let limits = Limits {
            max_duration_ms: rng.per_mille(300).then(|| 1 + rng.below(10_000)),
            idle_timeout_minutes: rng.per_mille(300).then_some(1),
            pause_retention_ms: rng.per_mille(300).then(|| 1 + rng.below(10_000)),
        };
        let name = rng.per_mille(300).then(|| ["web", "api"][rng.below(2) as usize]);
        Self::Create { tenant: rng.below(2) as usize, limits, name, wait: rng.per_mille(500) }
    }
}

/// An answer that any request may get when steps fail or the server stops, else a broken promise.
fn excuse(world: &World, action: &Action, error: &Error) -> Result<(), String> {
    let excused = match error.code {
        Code::Internal => world.failures_possible.get(),
        Code::Draining => world.draining.get(),
        _ => false,
    };
    ensure!(excused, "{action:?} was answered {error}");
    Ok(())
}

/// Acts, and checks the answer.
pub async fn act(world: Rc<World>, engine: Engine, action: Action) -> Result<(), String> {
    let world = &*world;
    let result = match action.clone() {
        Action::Create { tenant, limits, name, wait } => create(world, &engine, tenant, limits, name, wait).await,
        Action::Keep(keeping) => keepers::keep(world, &engine, keeping).await,
        Action::View(viewing) => viewers::view(world, &engine, viewing).await,
        Action::Terminate(id, tenant) => terminate(world, &engine, id, tenant).await,
        Action::Rename(id, tenant) => rename(world, &engine, id, tenant).await,
        Action::Extend(id, tenant, by) => extend(world, &engine, id, tenant, by).await,
        Action::Shorten(id, tenant, to) => {
            let update = SessionUpdate { max_duration_ms: Some(to), ..SessionUpdate::default() };
            let answer = engine.update_session(&world.tenants[tenant], id, update).await;
            allow(answer.map(|_| ()), &[Code::SessionTerminated])
        }
        Action::Execute(id, tenant, program) => execute(world, &engine, id, tenant, program).await,
        Action::Open(id, tenant, for_ms) => open(world, &engine, id, tenant, for_ms).await,
        Action::Touch(id, tenant) => touch(world, &engine, id, tenant).await,
        Action::Get(id, tenant) => get(world, &engine, id, tenant).await,
        Action::List { tenant, page_size } => list(world, &engine, tenant, page_size).await,
        Action::Trespass(id, tenant) => trespass(world, &engine, id, tenant).await,
    };
    match result {
        Ok(()) => Ok(()),
        Err(Failure::Broken(why)) => Err(format!("{action:?}: {why}")),
        Err(Failure::Refused(error)) => excuse(world, &action, &error),
    }
}

pub enum Failure {
    Broken(String),
    Refused(Error),
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self::Broken(why)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

pub type Outcome = Result<(), Failure>;

macro_rules! must {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(Failure::Broken(format!($($message)*)));
        }
    };
}

pub(crate) use must;

/// Takes these refusals for granted.
pub fn allow(answer: Result<(), Error>, codes: &[Code]) -> Outcome {
    match answer {
        Err(error) if codes.contains(&error.code) => Ok(()),
        other => other.map_err(Failure::Refused),
    }
}

async fn create(
    world: &World,
    engine: &Engine,
    tenant: usize,
    limits: Limits,
    unique_name: Option<&str>,
    wait: bool,
) -> Outcome {
    let caller: &Caller = &world.tenants[tenant];
    let name = unique_name.unwrap_or("new");
    let new = NewSession {
        name: name.into(),
        name_is_unique: unique_name.is_some(),
        max_duration_ms: limits.max_duration_ms,
        idle_timeout_minutes: limits.idle_timeout_minutes,
        pause_retention_ms: limits.pause_retention_ms,
        tags: vec!["a".into()],
        inbound: true,
        ..NewSession::default()
    };
    let session = match engine.create_session(caller, new).await {
        Ok(session) => session,
        Err(error) if error.code == Code::SessionNameTaken && unique_name.is_some() => return Ok(()),
        Err(error) => return allow(Err(error), &[Code::QuotaExceeded, Code::CapacityUnavailable]),
    };
    let id = session.id;
    world.model.borrow_mut().created.insert(id, tenant);
    world.model.borrow_mut().names.insert(id, vec![name.into()]);
    must!(session.state == SessionState::Creating, "{id} was answered in {}", session.state.name());
    if !wait {
        return Ok(());
    }
    let mut states = engine.watch_session(caller, id).await?;
    let settled = states.wait_for(|session| session.state != SessionState::Creating).await;
    let settled = settled.map(|session| session.state);
    match settled {
        Ok(state) if state != SessionState::Terminating && state != SessionState::Terminated => {
            world.model.borrow_mut().ran.insert(id);
            match engine.certificate(caller, id).await {
                Ok((certificate, _)) => {
                    world.model.borrow_mut().certificates.insert(id, certificate.text);
                }
                Err(error) => allow(Err(error), &UNUSABLE)?,
            }
        }
        Ok(_) => {}
        Err(_) => must!(world.draining.get(), "the state of {id} is not told any more"),
    }
    Ok(())
}

async fn terminate(world: &World, engine: &Engine, id: SessionId, tenant: usize) -> Outcome {
    world.model.borrow_mut().asked_to_end.insert(id);
    let session = engine.terminate_session(&world.tenants[tenant], id).await?;
    must!(session.state == SessionState::Terminated, "terminate answered {}", session.state.name());
    let alive = world.fakes.driver.sandboxes().get(&id) == Some(&true);
    must!(!alive, "terminate answered before the sandbox was gone");
    world.model.borrow_mut().ended.insert(id);
    Ok(())
}

async fn rename(world: &World, engine: &Engine, id: SessionId, tenant: usize) -> Outcome {
    if !world.model.borrow_mut().renaming.insert(id) {
        return Ok(());
    }
    let name = format!("name {}", world.fakes.faults.effects());
    let before = world.model.borrow().names.get(&id).cloned().unwrap_or_default();
    world.model.borrow_mut().names.entry(id).or_default().push(name.clone());
    let update = SessionUpdate { name: Some(name.clone()), ..SessionUpdate::default() };
    let answer = engine.update_session(&world.tenants[tenant], id, update).await;
    let mut model = world.model.borrow_mut();
    model.renaming.remove(&id);
    match answer {
        Ok(session) => {
            must!(session.name == name, "the renamed session is called {:?}", session.name);
            model.names.insert(id, vec![name]);
            Ok(())
        }
        Err(error) => {
            model.names.insert(id, before);
            allow(Err(error), &[Code::SessionTerminated])
        }
    }
}

async fn extend(world: &World, engine: &Engine, id: SessionId, tenant: usize, by: u64) -> Outcome {
    let caller = &world.tenants[tenant];
    let start = world.fakes.clock.now();
    match engine.extend_session(caller, id, by).await {
        Ok(session) => {
            // What has no end gets none.
            let Some(deadline) = session.timeout_at else { return Ok(()) };
            // Shortening may have put the deadline before now; only then it can stay there.
            must!(deadline >= session.created_at + by, "{id} extended at {start} ends at {deadline}");
            Ok(())
        }
        Err(error) => allow(Err(error), &[Code::SessionTerminated]),
    }
}

async fn execute(world: &World, engine: &Engine, id: SessionId, tenant: usize, program: &str) -> Outcome {
    let new = NewExecution { command: program.into(), args: vec!["x".into()], ..NewExecution::default() };
    let wait = program != "hang";
    match engine.execute(&world.tenants[tenant], id, new, wait).await {
        Ok(execution) => {
            must!(program != "no-such-program", "a program that does not exist was started");
            let expected = match program {
                "hang" => ExecutionStatus::Running,
                "false" => ExecutionStatus::Failed,
                _ => ExecutionStatus::Succeeded,
            };
            let failed = execution.status == ExecutionStatus::Failed;
            must!(failed || execution.status == expected, "{program} is {:?}", execution.status);
            Ok(())
        }
        Err(error) if error.code == Code::CommandNotFound && program == "no-such-program" => Ok(()),
        Err(error) => allow(Err(error), &UNUSABLE),
    }
}

/// What a session that cannot be used just now answers.
pub const UNUSABLE: [Code; 4] =
    [Code::SessionTerminated, Code::SessionNotRunning, Code::GuestUnreachable, Code::QuotaExceeded];

async fn open(world: &World, engine: &Engine, id: SessionId, tenant: usize, for_ms: u64) -> Outcome {
    let certificate = world.model.borrow().certificates.get(&id).cloned();
    let Some(certificate) = certificate else {
        return match engine.certificate(&world.tenants[tenant], id).await {
            Ok((certificate, _)) => {
                world.model.borrow_mut().certificates.insert(id, certificate.text);
                Ok(())
            }
            Err(error) => allow(Err(error), &UNUSABLE),
        };
    };
    let ended_before = world.model.borrow().ended.contains(&id);
    match engine.open(&certificate, id).await {
        Ok(open) => {
            must!(!ended_before, "an ended session was opened");
            world.sleep(for_ms).await;
            drop(open);
            Ok(())
        }
        Err(error) if ended_before => allow(Err(error), &[Code::SessionTerminated, Code::InvalidCertificate]),
        Err(error) if error.code == Code::InvalidCertificate => {
            world.model.borrow_mut().certificates.remove(&id);
            Ok(())
        }
        Err(error) => allow(Err(error), &UNUSABLE),
    }
}

async fn touch(world: &World, engine: &Engine, id: SessionId, tenant: usize) -> Outcome {
    let before = world.fakes.clock.now();
    match engine.report_activity(&world.tenants[tenant], id).await {
        Ok(at) => {
            must!(at >= before, "activity at {before} was noted at {at}");
            Ok(())
        }
        Err(error) => allow(Err(error), &[Code::SessionTerminated]),
    }
}

async fn get(world: &World, engine: &Engine, id: SessionId, tenant: usize) -> Outcome {
    let ended_before = world.model.borrow().ended.contains(&id);
    let session = engine.session(&world.tenants[tenant], id).await?;
    must!(session.id == id, "asked for {id}, got {}", session.id);
    must!(!ended_before || session.state == SessionState::Terminated, "an ended session is {}", session.state.name());
    Ok(())
}

async fn list(world: &World, engine: &Engine, tenant: usize, page_size: u32) -> Outcome {
    let mut expected: Vec<SessionId> = Vec::new();
    expected.extend(world.model.borrow().known().iter().filter(|(_, of)| *of == tenant).map(|(id, _)| *id));
    let mut found: Vec<(u64, SessionId)> = Vec::new();
    let mut page_token = String::new();
    loop {
        let list = ListSessions { include_terminated: true, page_size, page_token, ..ListSessions::default() };
        let (page, next) = engine.list_sessions(&world.tenants[tenant], list).await?;
        must!(page.len() <= page_size as usize, "a page of {page_size} has {} rows", page.len());
        for session in page {
            let foreign = session.workspace_id != world.tenants[tenant].workspace_id;
            must!(!foreign, "a session of another workspace is listed");
            found.push((session.created_at, session.id));
        }
        if next.is_empty() {
            break;
        }
        page_token = next;
    }
    must!(found.is_sorted_by(|a, b| a > b), "the list is not strictly newest first: {found:?}");
    for id in expected {
        must!(found.iter().any(|(_, of)| *of == id), "{id} is missing in the list");
    }
    Ok(())
}

async fn trespass(world: &World, engine: &Engine, id: SessionId, tenant: usize) -> Outcome {
    let caller = &world.tenants[tenant];
    let answers = [
        engine.session(caller, id).await.err(),
        engine.watch_session(caller, id).await.err(),
        engine.terminate_session(caller, id).await.err(),
        engine.extend_session(caller, id, 1).await.err(),
        engine.update_session(caller, id, SessionUpdate::default()).await.err(),
        engine.certificate(caller, id).await.err(),
        engine.report_activity(caller, id).await.err(),
        engine
            .execute(caller, id, NewExecution { command: "true".into(), ..NewExecution::default() }, false)
            .await
            .err(),
    ];
    for answer in answers {
        match answer {
            None => return Err(Failure::Broken("a foreign session was reached".into())),
            Some(error) => allow(Err(error), &[Code::SessionNotFound, Code::Draining])?,
        }
    }
    Ok(())
}
