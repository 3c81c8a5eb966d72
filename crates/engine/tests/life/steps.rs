//! Runs a workflow with a failure at each of its effects, with each step repeated, and with a crash after each
//! effect; afterwards nothing may be left, and nothing may be lost.

use std::time::Duration;

use nagaya_api::error::Error;
use nagaya_api::ids::{SessionId, SnapshotId, VolumeId};
use nagaya_engine::fake::Fakes;
use nagaya_engine::model::{SessionState, SnapshotKind};
use nagaya_engine::{EngineConfig, ListPreviews, ListSessions, ListSnapshots, ListVolumes, NewSession, NewSnapshot};
use tokio::runtime::{Builder, Runtime};

use crate::audit;
use crate::support::{World, mount};

/// The world in which every workflow runs: a session with a volume, another volume, and a snapshot.
pub struct Stage {
    pub world: World,
    pub session: SessionId,
    pub attached: VolumeId,
    pub free: VolumeId,
    pub snapshot: SnapshotId,
}

/// One piece of work in several steps.
pub trait Workflow {
    /// What has to be done before, without faults.
    async fn prepare(&self, _stage: &Stage) {}
    /// The work; an error may be answered only when something fails.
    async fn act(&self, stage: &Stage) -> Result<(), Error>;
    /// What must be true once the work was acknowledged, whatever happened since.
    async fn check(&self, stage: &Stage);
    /// What must be true when the work was refused because something failed.
    async fn check_refused(&self, _stage: &Stage) {}
    /// Whether the session's disk is there afterwards.
    fn keeps_session(&self) -> bool {
        true
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Repeat,
    Fail(u64),
    Crash(u64),
}

fn config() -> EngineConfig {
    EngineConfig { retry_first_ms: 10, retry_max_ms: 1_000, ..EngineConfig::default() }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().start_paused(true).build().unwrap()
}

/// Longer than every pause between attempts.
async fn quiet() {
    tokio::time::sleep(Duration::from_secs(20)).await;
}

async fn set_up() -> Stage {
    let world = World::with(config()).await;
    let attached = world.volume().await.id;
    let free = world.volume().await.id;
    let new = NewSession { mounts: vec![mount(attached, "/data")], inbound: true, ..NewSession::default() };
    let session = world.run(new).await.id;
    world.write(session, "/root/log", "kept").await;
    world.write(session, "/data/log", "kept too").await;
    let new = NewSnapshot { wait: true, ..NewSnapshot::default() };
    let snapshot = world.engine.create_snapshot(&world.caller, session, new).await.unwrap().id;
    Stage { world, session, attached, free, snapshot }
}

/// Runs a workflow under every fault.
pub fn run(workflow: &impl Workflow) {
    let effects = run_once(workflow, Fault::None);
    assert!(effects > 0, "a workflow without effects");
    run_once(workflow, Fault::Repeat);
    for effect in 0..effects {
        run_once(workflow, Fault::Fail(effect));
        run_once(workflow, Fault::Crash(effect));
    }
}

/// Returns how many effects the work had.
fn run_once(workflow: &impl Workflow, fault: Fault) -> u64 {
    let first = runtime();
    let (stage, result, effects, now) = first.block_on(async {
        let stage = set_up().await;
        workflow.prepare(&stage).await;
        quiet().await;
        let faults = stage.world.fakes.faults.clone();
        let before = faults.effects();
        match fault {
            Fault::None => {}
            Fault::Repeat => faults.repeat(true),
            Fault::Fail(effect) => faults.fail_after(effect),
            Fault::Crash(effect) => faults.crash_after(effect),
        }
        let mut result = None;
        tokio::select! {
            biased;
            () = faults.crashed() => {}
            () = async {
                result = Some(workflow.act(&stage).await);
                quiet().await;
            } => {}
        }
        let now = nagaya_engine::ports::Clock::now(&*stage.world.fakes.clock);
        (stage, result, faults.effects() - before, now)
    });
    let crashed = stage.world.fakes.faults.has_crashed();
    assert!(crashed || result.is_some(), "{fault:?}: neither crashed nor done");
    let Stage { world, session, attached, free, snapshot } = stage;
    let World { engine, caller, fakes, config } = world;
    fakes.faults.repeat(false);
    if !crashed {
        first.block_on(async {
            audit_now(&fakes, fault);
            engine.shut_down().await;
        });
    }
    // Everything of the first engine dies here, wherever it was.
    drop(engine);
    drop(first);
    fakes.faults.recover();
    runtime().block_on(async {
        fakes.clock.set(now);
        let engine = fakes.start(config.clone()).await.unwrap();
        quiet().await;
        audit_now(&fakes, fault);
        let stage = Stage { world: World { engine, caller, fakes, config }, session, attached, free, snapshot };
        reckon(workflow, &stage, fault, result).await;
    });
    effects
}

fn audit_now(fakes: &Fakes, fault: Fault) {
    if let Err(why) = audit::check_quiet(fakes) {
        panic!("{fault:?}: {why}");
    }
}

/// Nothing that was acknowledged is lost, and everything can be removed.
async fn reckon(workflow: &impl Workflow, stage: &Stage, fault: Fault, result: Option<Result<(), Error>>) {
    let Stage { world, session, attached, .. } = stage;
    let (engine, caller, fakes) = (&world.engine, &world.caller, &world.fakes);
    match result {
        Some(Ok(())) => workflow.check(stage).await,
        Some(Err(error)) => {
            assert!(matches!(fault, Fault::Fail(_)), "{fault:?}: refused without a reason: {error}");
            workflow.check_refused(stage).await;
        }
        // Nobody was told anything.
        None => {}
    }
    let kept = fakes.driver.disk_file(*session, "/root/log");
    let ended = world.session(*session).await.state == SessionState::Terminated;
    assert!(kept.as_deref() == Some(b"kept") || (ended && !workflow.keeps_session()), "{fault:?}: {kept:?}");
    let kept = fakes.driver.volume_file(*attached, "/log");
    assert_eq!(kept.as_deref(), Some(b"kept too".as_slice()), "{fault:?}");

    let list = ListSessions { page_size: 100, ..ListSessions::default() };
    for session in engine.list_sessions(caller, list).await.unwrap().0 {
        engine.terminate_session(caller, session.id).await.unwrap();
    }
    for snapshot in engine.list_snapshots(caller, ListSnapshots::default()).await.unwrap().0 {
        assert_eq!(snapshot.kind, SnapshotKind::User, "{fault:?}");
        engine.delete_snapshot(caller, snapshot.id).await.unwrap();
    }
    for (volume, attached) in engine.list_volumes(caller, ListVolumes::default()).await.unwrap().0 {
        assert!(!attached, "{fault:?}");
        engine.delete_volume(caller, volume.id).await.unwrap();
    }
    for preview in engine.list_previews(caller, ListPreviews::default()).await.unwrap().0 {
        engine.delete_preview(caller, preview.preview.id).await.unwrap();
    }
    quiet().await;
    audit_now(fakes, fault);
    assert!(fakes.store.previews_now().is_empty() && fakes.ingress.published().is_empty(), "{fault:?}");
    assert!(fakes.driver.sandboxes().is_empty() && fakes.driver.volumes_now().is_empty(), "{fault:?}");
    assert!(fakes.store.snapshots_now().is_empty() && fakes.blobs.stored().is_empty(), "{fault:?}");
    assert_eq!(world.active().await, 0, "{fault:?}");
    engine.shut_down().await;
}
