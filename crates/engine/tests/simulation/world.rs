//! One schedule: several lives of a server in one fake world, then the final reckoning.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_api::ids::{KeyId, WorkspaceId};
use nagaya_engine::fake::{Fakes, Rng};
use nagaya_engine::model::{ApiKey, SessionState, Workspace, WorkspaceSettings};
use nagaya_engine::ports::{Change, Clock, ExitStatus, Store};
use nagaya_engine::{Caller, Engine, EngineConfig, ListPreviews, ListSessions, ListSnapshots, ListVolumes, NewSession};
use tokio::task::LocalSet;

use crate::audit::ensure;
use crate::clients::{Action, act};
use crate::keepers::Keeping;
use crate::model::{Model, Place, is_active};
use crate::viewers::Viewing;

/// What a test of the simulator breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// The server finds no leftovers when it starts.
    NoSweep,
    /// The store loses its newest record in a crash.
    LostRecord,
    /// The store loses an event in a crash, though not the transition that it belongs to.
    LostEvent,
    /// Timers never fire.
    DeafClock,
}

const SESSIONS_MAX: u32 = 8;
/// Of the second tenant; the first has none of its own.
const WORKSPACE_SESSIONS_MAX: u32 = 3;
/// Longer than what passes in quiet, so that both those with their memory and those without are seen there.
const PAUSE_IN_MEMORY_MAX_MS: u64 = 15_000;
/// Longer than any pause of the engine, in virtual time: whatever takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(3_600);

pub struct World {
    pub fakes: Fakes,
    pub model: RefCell<Model>,
    pub tenants: [Caller; 2],
    pub failures_possible: Cell<bool>,
    pub draining: Cell<bool>,
    trace: RefCell<Vec<String>>,
}

/// What happened in a schedule that kept every promise.
pub struct Schedule {
    pub trace: Vec<String>,
    pub crashes: u64,
    pub reasons: Vec<String>,
    /// What else of interest it came to.
    pub seen: Vec<String>,
}

/// What all schedules together did: a simulation that never does something does not test it.
#[derive(Debug, Default)]
pub struct Totals {
    crashes: u64,
    sessions: u64,
    ended: std::collections::BTreeMap<String, u64>,
    seen: std::collections::BTreeMap<String, u64>,
}

impl Totals {
    pub fn add(&mut self, schedule: &Schedule) {
        self.crashes += schedule.crashes;
        self.sessions += schedule.reasons.len() as u64;
        for reason in &schedule.reasons {
            // Ids and digests would make every one of them another.
            let short = reason.split(['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']).next().unwrap_or_default();
            *self.ended.entry(short.to_owned()).or_default() += 1;
        }
        for seen in &schedule.seen {
            *self.seen.entry(seen.clone()).or_default() += 1;
        }
    }

    /// `all` asks also for what few schedules come to.
    pub fn check_coverage(&self, all: bool) {
        assert!(self.crashes > 0);
        for reason in [
            "",
            "maximum duration reached",
            "pause retention expired",
            "the server stopped while the sandbox was being created",
            "the sandbox could not be created: a driver step failed, as this test asked for",
            "no capacity left on this server: slots_max",
        ] {
            assert!(self.ended.contains_key(reason), "no session ended with {reason:?}");
        }
        let often = [
            "restore memory",
            "from a snapshot",
            "a log on a disk",
            "a log on a volume",
            "a log in a snapshot",
            "a visit",
        ];
        for seen in often {
            assert!(self.seen.contains_key(seen), "never seen: {seen}");
        }
        if !all {
            return;
        }
        for seen in [
            "restore cold_boot memory_time_limit",
            "restore cold_boot host_restarted",
            "restore cold_boot sandbox_ended",
            "restore cold_boot powered_off",
        ] {
            assert!(self.seen.contains_key(seen), "never seen: {seen}");
        }
    }
}

fn config() -> EngineConfig {
    EngineConfig {
        sessions_max: SESSIONS_MAX,
        creates_concurrent_max: 2,
        certificate_ttl_ms: 20_000,
        executions_per_session_max: 3,
        activity_flush_ms: 500,
        pause_in_memory_max_ms: Some(PAUSE_IN_MEMORY_MAX_MS),
        retry_first_ms: 10,
        retry_max_ms: 1_000,
        ..EngineConfig::default()
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let id = |n: u8| (WorkspaceId::new(1, [n; 10]), KeyId::new(1, [n; 10]));
        let tenants = [1, 2].map(|n| Caller { workspace_id: id(n).0, key_id: id(n).1 });
        Self {
            fakes: Fakes::new(seed),
            model: RefCell::default(),
            tenants,
            failures_possible: Cell::new(false),
            draining: Cell::new(false),
            trace: RefCell::default(),
        }
    }

    fn note(&self, what: impl FnOnce() -> String) {
        self.trace.borrow_mut().push(format!("{} {}", self.fakes.clock.now() % 10_000_000, what()));
    }

    /// Passes virtual time, in which everything that can happen happens.
    pub async fn sleep(&self, ms: u64) {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    fn fail_per_mille(&self, chance: u32) {
        self.fakes.faults.fail_per_mille(chance);
        if chance > 0 {
            self.failures_possible.set(true);
        }
    }

    fn check(&self) -> Result<(), String> {
        self.model.borrow_mut().check_always(&self.fakes, SESSIONS_MAX as usize)
    }

    async fn prepare(&self) {
        let mut changes = Vec::new();
        for (tenant, sessions_max) in self.tenants.iter().zip([None, Some(WORKSPACE_SESSIONS_MAX)]) {
            let (id, name) = (tenant.workspace_id, String::new());
            let settings = WorkspaceSettings { sessions_max, ..WorkspaceSettings::default() };
            changes.push(Change::Workspace(Workspace { id, name, created_at: 1, settings }));
            let secret_hash = [tenant.key_id.as_uuid().as_bytes()[15]; 32];
            changes.push(Change::ApiKey(ApiKey { id: tenant.key_id, workspace_id: id, secret_hash, created_at: 1 }));
        }
        self.fakes.store.commit(changes).await.expect("nothing fails yet");
    }

    async fn start(&self) -> Result<Engine, String> {
        for _ in 0..1_000 {
            match patiently("start", self.fakes.start(config())).await? {
                Ok(engine) => return Ok(engine),
                Err(error) => ensure!(
                    error.code == Code::Internal && self.failures_possible.get(),
                    "the engine did not start: {error}"
                ),
            }
        }
        Err("the engine did not start in 1,000 attempts".into())
    }
}

/// Waits for something that must not hang.
async fn patiently<T>(what: &str, future: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(PATIENCE, future).await.map_err(|_| format!("{what} hangs"))
}

/// Runs one schedule; the failure comes with what led to it.
pub fn run_schedule(seed: u64, bug: Option<Bug>) -> Result<Schedule, String> {
    let world = Rc::new(World::new(seed));
    let mut rng = Rng::new(seed.wrapping_mul(0x5851_f42d_4c95_7f2d));
    let mut crashes = 0;
    let result = lives(&world, &mut rng, bug, &mut crashes);
    let trace = world.trace.borrow().clone();
    match result {
        Ok(()) => {
            let reasons = world.model.borrow().all().map(|row| row.terminal_error.clone()).collect();
            Ok(Schedule { trace, crashes, reasons, seen: world.model.borrow().seen_of_interest() })
        }
        Err(why) => {
            let shown = &trace[trace.len().saturating_sub(60)..];
            Err(format!("{why}\n{}", shown.join("\n")))
        }
    }
}

fn lives(world: &Rc<World>, rng: &mut Rng, bug: Option<Bug>, crashes: &mut u64) -> Result<(), String> {
    world.fakes.driver.set_blind(bug == Some(Bug::NoSweep));
    world.fakes.clock.set_deaf(bug == Some(Bug::DeafClock));
    // Outside a runtime the fake clock runs with real time, so nothing asks it there.
    let mut now = 1_767_225_600_000;
    let lives = 1 + rng.below(3);
    for life in 0..=lives {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
        let last = life == lives;
        let (result, ended_at) = runtime.block_on(LocalSet::new().run_until(async {
            world.fakes.clock.set(now);
            if life == 0 {
                world.prepare().await;
            }
            world.fakes.faults.yield_up_to(rng.below(4) as u32);
            world.draining.set(false);
            world.failures_possible.set(false);
            if !last {
                world.fail_per_mille([0, 0, 20, 100][rng.below(4) as usize]);
                if rng.per_mille(700) {
                    world.fakes.faults.crash_after(rng.below(120));
                }
            }
            let result = tokio::select! {
                biased;
                () = world.fakes.faults.crashed() => Ok(()),
                result = async { if last { reckoning(world).await } else { life_of(world, rng).await } } => result,
            };
            (result, world.fakes.clock.now())
        }));
        // Everything of the engine dies here, wherever it was.
        drop(runtime);
        result?;
        if world.fakes.faults.has_crashed() {
            *crashes += 1;
            world.trace.borrow_mut().push("crash".into());
            if bug == Some(Bug::LostRecord) {
                world.fakes.store.lose_newest_session();
            }
            if bug == Some(Bug::LostEvent) {
                world.fakes.store.lose_newest_event();
            }
        }
        world.fakes.faults.recover();
        world.fakes.disconnect();
        world.fail_per_mille(0);
        world.model.borrow_mut().renaming.clear();
        world.model.borrow_mut().writing.clear();
        world.model.borrow_mut().forget_changes_under_way();
        world.check()?;
        between_lives(world, rng);
        now = ended_at + rng.below(8_000);
    }
    Ok(())
}

/// The server is down, the world is not.
fn between_lives(world: &World, rng: &mut Rng) {
    let known = world.model.borrow().known();
    if rng.per_mille(100) {
        world.fakes.driver.restart_host();
    }
    for (id, _) in known {
        if rng.per_mille(30) {
            world.fakes.driver.power_off(id);
        }
        if rng.per_mille(100) && world.fakes.driver.kill(id, "killed from outside") {
            world.model.borrow_mut().killed.insert(id);
        }
    }
    finish_commands(world, rng, 300);
}

/// Lets some of the running commands end.
fn finish_commands(world: &World, rng: &mut Rng, chance: u32) {
    for (id, _) in world.fakes.driver.sandboxes() {
        let Some(guest) = world.fakes.driver.guest(id) else { continue };
        for execution in guest.running() {
            if rng.per_mille(chance) {
                guest.finish(execution, ExitStatus::default());
            }
        }
    }
}

async fn life_of(world: &Rc<World>, rng: &mut Rng) -> Result<(), String> {
    let engine = world.start().await?;
    world.note(|| "started".into());
    world.check()?;
    world.fakes.driver.set_sandboxes_max(rng.per_mille(200).then(|| 1 + rng.below(5) as usize));
    let mut clients = Vec::new();
    if rng.per_mille(500) {
        furnish(world, &engine, rng).await?;
    }
    for _ in 0..4 + rng.below(16) {
        match rng.below(100) {
            0..15 => world.sleep(rng.below(3_000)).await,
            15..20 => world.fakes.clock.advance(rng.below(3_000)),
            20..26 => {
                let known = world.model.borrow().known();
                let victim = known.get(rng.below(known.len() as u64) as usize).map(|(id, _)| *id);
                if let Some(id) = victim.filter(|id| world.fakes.driver.kill(*id, "killed from outside")) {
                    world.note(|| format!("killed {id}"));
                    world.model.borrow_mut().killed.insert(id);
                }
            }
            26..30 => finish_commands(world, rng, 500),
            30..33 => quiet(world, &engine).await?,
            33..36 => disturb(world, rng),
            _ => {
                let action = Action::choose(world, rng);
                world.note(|| format!("{action:?}"));
                let acting = act(world.clone(), engine.clone(), action);
                let client = tokio::task::spawn_local(acting);
                match rng.below(10) {
                    0..5 => joined(client).await?,
                    5 => {
                        // This client loses patience, somewhere in the middle.
                        for _ in 0..rng.below(20) {
                            tokio::task::yield_now().await;
                        }
                        client.abort();
                    }
                    _ => clients.push(client),
                }
            }
        }
        world.check()?;
    }
    if rng.per_mille(500) {
        for client in clients.drain(..) {
            joined(client).await?;
        }
    }
    if rng.per_mille(300) {
        quiet(world, &engine).await?;
    }
    world.draining.set(true);
    patiently("shutting down", engine.shut_down()).await?;
    world.note(|| "shut down".into());
    for client in clients {
        joined(client).await?;
    }
    // The driver may still be taking sandboxes apart; that is its own business.
    world.sleep(1_000).await;
    let effects = world.fakes.faults.effects();
    world.sleep(100_000).await;
    ensure!(world.fakes.faults.effects() == effects, "something goes on after the engine was shut down");
    world.check()?;
    let model = world.model.borrow();
    let unfinished = model.live().find(|row| row.state == SessionState::Creating);
    // Where even records cannot be written, the next start has to roll back.
    ensure!(
        unfinished.is_none() || world.failures_possible.get(),
        "the engine shut down in the middle of a creation: {unfinished:?}"
    );
    Ok(())
}

/// Something to begin with: a session that has a volume and something written.
async fn furnish(world: &Rc<World>, engine: &Engine, rng: &mut Rng) -> Result<(), String> {
    let tenant = rng.below(2) as usize;
    let all = [Action::create_and_wait(tenant), Action::Keep(Keeping::CreateVolume(tenant))];
    for action in all {
        patiently("a client", act(world.clone(), engine.clone(), action)).await??;
    }
    let (mine, volume) = {
        let model = world.model.borrow();
        let mine = model.known().into_iter().rfind(|(_, of)| *of == tenant);
        (mine, model.volumes().into_iter().rfind(|place| model.tenant_of(*place) == tenant))
    };
    let (Some((id, _)), Some(volume)) = (mine, volume.and_then(Place::volume)) else { return Ok(()) };
    let all = [
        Keeping::Write(id, tenant, false),
        Keeping::Attach(id, tenant, volume, false),
        Keeping::Write(id, tenant, true),
        Keeping::Snapshot(id, tenant, true),
    ];
    for keeping in all {
        patiently("a client", act(world.clone(), engine.clone(), Action::Keep(keeping))).await??;
    }
    let all =
        [Viewing::Expose(id, tenant, 1, None), Viewing::Create(tenant, "slug-0".into()), Viewing::SshSession(0, 10)];
    for viewing in all {
        patiently("a client", act(world.clone(), engine.clone(), Action::View(viewing))).await??;
    }
    Ok(())
}

/// Things that happen to the host and inside sandboxes.
fn disturb(world: &World, rng: &mut Rng) {
    let known = world.model.borrow().known();
    match rng.below(7) {
        0 => (0..4).for_each(|_| world.fakes.driver.report_memory_low()),
        1 => world.fakes.blobs.set_offline(rng.per_mille(500)),
        2 => world.fakes.driver.set_full(rng.per_mille(300)),
        3 => world.fakes.clock.advance(61_000),
        4 => {
            for id in world.fakes.driver.volumes_now().into_keys() {
                world.fakes.driver.set_volume_in_use(id, rng.per_mille(300));
            }
        }
        5 => known.iter().for_each(|(id, _)| world.fakes.driver.report_end(*id)),
        _ => {
            if let Some((id, _)) = known.get(rng.below(known.len() as u64) as usize) {
                world.fakes.driver.power_off(*id);
            }
        }
    }
}

async fn joined(client: tokio::task::JoinHandle<Result<(), String>>) -> Result<(), String> {
    patiently("a client", client).await?.map_err(|error| format!("a client failed: {error}"))?
}

/// Lets nothing fail for a while, and looks at what all of it came to.
async fn quiet(world: &World, engine: &Engine) -> Result<(), String> {
    world.fakes.faults.fail_per_mille(0);
    world.fakes.blobs.set_offline(false);
    world.sleep(10_000).await;
    world.check()?;
    world.model.borrow().check_quiet(&world.fakes, world.fakes.clock.now(), PAUSE_IN_MEMORY_MAX_MS)?;
    let counted: u64 = engine.session_counts().values().sum();
    let live = world.model.borrow().live().count() as u64;
    ensure!(counted == live, "the engine counts {counted} sessions, {live} live");
    for tenant in &world.tenants {
        let used = engine.usage(tenant, None).await.map_err(|error| error.to_string())?;
        let model = world.model.borrow();
        let mine = || model.live().filter(|row| row.workspace_id == tenant.workspace_id && is_active(row));
        ensure!(used.active_sessions == mine().count() as u64, "{used:?} is not what the records say");
        let memory: u64 = mine().map(|row| row.machine.resources.memory_bytes).sum();
        ensure!(used.memory_bytes == memory, "{used:?} is not what the records say");
    }
    Ok(())
}

/// The last life: nothing fails any more, and everything is brought to its end.
async fn reckoning(world: &Rc<World>) -> Result<(), String> {
    let engine = world.start().await?;
    world.note(|| "started for the last time".into());
    world.fakes.driver.set_sandboxes_max(None);
    world.fakes.driver.set_full(false);
    quiet(world, &engine).await?;
    for tenant in &world.tenants {
        let list = ListSessions { page_size: 100, ..ListSessions::default() };
        let (sessions, _) = engine.list_sessions(tenant, list).await.map_err(|error| error.to_string())?;
        for session in sessions {
            world.model.borrow_mut().asked_to_end.insert(session.id);
            let ended = patiently("terminate", engine.terminate_session(tenant, session.id)).await?;
            ended.map_err(|error| format!("terminate of {}: {error}", session.id))?;
            world.model.borrow_mut().ended.insert(session.id);
            world.check()?;
        }
    }
    world.sleep(1_000).await;
    ensure!(world.fakes.driver.sandboxes().is_empty(), "sandboxes are left when every session has ended");
    delete_everything(world, &engine).await?;
    quotas(world, &engine).await?;
    world.draining.set(true);
    patiently("shutting down", engine.shut_down()).await
}

async fn delete_everything(world: &Rc<World>, engine: &Engine) -> Result<(), String> {
    let places: Vec<_> = world.model.borrow().logs.keys().copied().collect();
    world.model.borrow_mut().doomed.extend(places);
    for tenant in &world.tenants {
        let list = ListSnapshots { page_size: 100, ..ListSnapshots::default() };
        for snapshot in engine.list_snapshots(tenant, list).await.map_err(|error| error.to_string())?.0 {
            let deleted = patiently("delete a snapshot", engine.delete_snapshot(tenant, snapshot.id)).await?;
            deleted.map_err(|error| format!("delete of snapshot {}: {error}", snapshot.id))?;
        }
        let list = ListVolumes { page_size: 100, ..ListVolumes::default() };
        for (volume, attached) in engine.list_volumes(tenant, list).await.map_err(|error| error.to_string())?.0 {
            ensure!(!attached, "volume {} is attached when every session has ended", volume.id);
            let deleted = patiently("delete a volume", engine.delete_volume(tenant, volume.id)).await?;
            deleted.map_err(|error| format!("delete of volume {}: {error}", volume.id))?;
        }
        let list = ListPreviews { page_size: 100, ..ListPreviews::default() };
        for preview in engine.list_previews(tenant, list).await.map_err(|error| error.to_string())?.0 {
            world.model.borrow_mut().named.remove(&preview.preview.id);
            let deleted = patiently("delete a preview", engine.delete_preview(tenant, preview.preview.id)).await?;
            deleted.map_err(|error| format!("delete of preview {}: {error}", preview.preview.id))?;
        }
    }
    let left = (world.fakes.store.previews_now(), world.fakes.ingress.published());
    ensure!(left.0.is_empty() && left.1.is_empty(), "previews are left: {left:?}");
    let (driver, blobs, store) = (&world.fakes.driver, &world.fakes.blobs, &world.fakes.store);
    ensure!(driver.volumes_now().is_empty() && store.volumes_now().is_empty(), "volumes are left");
    ensure!(blobs.stored().is_empty() && store.snapshots_now().is_empty(), "snapshots or blobs are left");
    ensure!(driver.images_now().is_empty(), "images are left");
    Ok(())
}

/// With everything ended, exactly as many sessions as allowed can be made: no share was lost or kept.
async fn quotas(world: &Rc<World>, engine: &Engine) -> Result<(), String> {
    for (tenant, max, code) in [
        (1, WORKSPACE_SESSIONS_MAX, Code::QuotaExceeded),
        (0, SESSIONS_MAX - WORKSPACE_SESSIONS_MAX, Code::CapacityUnavailable),
    ] {
        let caller = &world.tenants[tenant];
        for n in 0..=max {
            match engine.create_session(caller, NewSession::default()).await {
                Ok(_) => ensure!(n < max, "session {n} of {max} was allowed"),
                Err(error) => ensure!(n == max && error.code == code, "session {n} of {max}: {error}"),
            }
        }
    }
    quiet(world, engine).await
}
