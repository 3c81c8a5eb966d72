//! Pause, resume, idle time, retention, and sandboxes that end by themselves.

use std::time::Duration;

use nagaya_api::error::Code;
use nagaya_engine::model::{
    DiskOnlyReason, ExecutionStatus, RestoreMode, Resume, SessionState, SnapshotKind, SnapshotState,
};
use nagaya_engine::ports::{Clock, DriverError};
use nagaya_engine::{EngineConfig, NewExecution, NewSession, SessionUpdate, WorkspaceSettingsUpdate};

use crate::support::{World, code, idle};

fn hang() -> NewExecution {
    NewExecution { command: "hang".into(), ..NewExecution::default() }
}

const FROM_MEMORY: Option<Resume> = Some(Resume { mode: RestoreMode::Memory, disk_reason: None });

fn from_disk(reason: DiskOnlyReason) -> Option<Resume> {
    Some(Resume { mode: RestoreMode::ColdBoot, disk_reason: Some(reason) })
}

#[tokio::test(start_paused = true)]
async fn a_paused_session_keeps_its_processes_and_gives_its_quota_back() {
    let world = World::new().await;
    let id = world.running().await;
    let command = world.engine.execute(&world.caller, id, hang(), false).await.unwrap();
    let paused = world.pause(id).await;
    let pause = paused.pause.clone().unwrap();
    assert!(pause.in_memory && pause.disk_reason.is_none() && pause.expires_at.is_none());
    assert_eq!(pause.paused_at, world.fakes.clock.now());
    assert!(world.fakes.driver.is_frozen(id));
    assert_eq!(world.active().await, 0);
    assert_eq!(world.pause(id).await, paused, "pausing is idempotent");
    let refusal = world.engine.certificate(&world.caller, id).await.unwrap_err();
    assert_eq!(refusal.to_string(), "session not RUNNING: (state=PAUSED)");
    assert_eq!(code(world.engine.execute(&world.caller, id, hang(), false).await), Code::SessionNotRunning);

    let snapshot = world.engine.snapshot(&world.caller, pause.snapshot_id).await.unwrap();
    assert_eq!((snapshot.kind, snapshot.state), (SnapshotKind::Pause, SnapshotState::Ready));
    assert_eq!(code(world.engine.delete_snapshot(&world.caller, snapshot.id).await), Code::SnapshotInUse);

    let resumed = world.resume(id).await;
    assert_eq!((resumed.pause, resumed.last_resume_error.as_str()), (None, ""));
    assert_eq!(resumed.last_resume, FROM_MEMORY);
    assert_eq!(world.active().await, 1);
    assert_eq!(code(world.engine.snapshot(&world.caller, snapshot.id).await), Code::SnapshotNotFound);
    assert_eq!(world.resume(id).await.state, SessionState::Running, "resuming is idempotent");
    let running = world.engine.execution(&world.caller, id, command.id).await.unwrap();
    assert_eq!(running.status, ExecutionStatus::Running);
    assert_eq!(world.fakes.driver.guest(id).unwrap().running(), [command.id]);
}

#[tokio::test(start_paused = true)]
async fn pause_and_resume_of_what_is_kept_in_memory_take_one_commit_each() {
    let world = World::new().await;
    let id = world.running().await;
    idle().await;
    for _ in 0..2 {
        let before = world.fakes.store.commits();
        world.pause(id).await;
        assert_eq!(world.fakes.store.commits() - before, 1);
        world.resume(id).await;
        assert_eq!(world.fakes.store.commits() - before, 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_server_refuses_to_resume_and_changes_nothing() {
    let world = World::with(EngineConfig { sessions_max: 1, ..EngineConfig::default() }).await;
    let id = world.running().await;
    let paused = world.pause(id).await;
    let other = world.running().await;
    let refusal = world.engine.resume_session(&world.caller, id).await.unwrap_err();
    assert_eq!(refusal.code, Code::CapacityUnavailable);
    assert_eq!(world.session(id).await, paused);
    world.engine.terminate_session(&world.caller, other).await.unwrap();
    world.resume(id).await;
}

#[tokio::test(start_paused = true)]
async fn memory_is_given_up_after_its_time_and_the_next_start_is_a_cold_boot() {
    let config = EngineConfig { pause_in_memory_max_ms: Some(60_000), ..EngineConfig::default() };
    let world = World::with(config).await;
    let id = world.running().await;
    world.write(id, "/root/kept", "yes").await;
    let command = world.engine.execute(&world.caller, id, hang(), false).await.unwrap();
    world.pause(id).await;
    world.fakes.clock.advance(59_000);
    idle().await;
    assert!(world.fakes.driver.is_frozen(id));
    world.fakes.clock.advance(1_000);
    idle().await;
    let parked = world.session(id).await;
    assert_eq!(parked.state, SessionState::Paused);
    assert_eq!(parked.pause.unwrap().disk_reason, Some(DiskOnlyReason::MemoryTimeLimit));
    assert!(world.fakes.driver.is_only_a_disk(id));
    let command = world.engine.execution(&world.caller, id, command.id).await.unwrap();
    assert_eq!((command.status, command.exit_code), (ExecutionStatus::Failed, -1));

    let resumed = world.resume(id).await;
    assert_eq!(resumed.last_resume, from_disk(DiskOnlyReason::MemoryTimeLimit));
    assert_eq!(world.read(id, "/root/kept").await.as_deref(), Some("yes"));
    world.pause(id).await;
    assert_eq!(world.resume(id).await.last_resume, FROM_MEMORY);
}

#[tokio::test(start_paused = true)]
async fn when_memory_is_low_the_longest_paused_gives_its_up_first() {
    let world = World::new().await;
    let [a, b] = [world.running().await, world.running().await];
    world.pause(b).await;
    world.fakes.clock.advance(1_000);
    world.pause(a).await;
    world.fakes.driver.report_memory_low();
    idle().await;
    assert!(world.fakes.driver.is_only_a_disk(b) && world.fakes.driver.is_frozen(a));
    world.fakes.driver.report_memory_low();
    idle().await;
    assert!(world.fakes.driver.is_only_a_disk(a));
    assert_eq!(world.resume(a).await.last_resume, from_disk(DiskOnlyReason::MemoryPressure));
}

#[tokio::test(start_paused = true)]
async fn an_unused_session_pauses_by_itself_unless_it_is_sticky() {
    let config = EngineConfig { idle_timeout_default_minutes: Some(5), ..EngineConfig::default() };
    let world = World::with(config).await;
    let new = |minutes, sticky| NewSession { idle_timeout_minutes: minutes, sticky, ..NewSession::default() };
    let one = world.run(new(Some(1), false)).await.id;
    let default = world.run(new(None, false)).await.id;
    let never = world.run(new(Some(0), false)).await.id;
    let sticky = world.run(new(Some(1), true)).await.id;
    let states = async || {
        idle().await;
        let mut states = Vec::new();
        for id in [one, default, never, sticky] {
            states.push(world.session(id).await.state == SessionState::Paused);
        }
        states
    };
    world.fakes.clock.advance(50_000);
    world.engine.report_activity(&world.caller, one).await.unwrap();
    world.fakes.clock.advance(50_000);
    assert_eq!(states().await, [false, false, false, false], "it was used");
    world.fakes.clock.advance(10_000);
    assert_eq!(states().await, [true, false, false, false]);
    world.fakes.clock.advance(200_000);
    assert_eq!(states().await, [true, true, false, false]);
    world.resume(one).await;
    assert_eq!(states().await, [false, true, false, false], "being resumed is being used");
    let update = SessionUpdate { sticky: Some(false), ..SessionUpdate::default() };
    world.engine.update_session(&world.caller, sticky, update).await.unwrap();
    assert_eq!(states().await, [false, true, false, true]);
}

#[tokio::test(start_paused = true)]
async fn an_open_stream_keeps_a_session_awake() {
    let world = World::new().await;
    let id = world.run(NewSession { idle_timeout_minutes: Some(1), ..NewSession::default() }).await.id;
    let (certificate, _) = world.engine.certificate(&world.caller, id).await.unwrap();
    let open = world.engine.open(&certificate.text, id).await.unwrap();
    for _ in 0..5 {
        world.fakes.clock.advance(59_000);
        idle().await;
    }
    assert_eq!(world.session(id).await.state, SessionState::Running);
    drop(open);
    world.fakes.clock.advance(61_000);
    idle().await;
    assert_eq!(world.session(id).await.state, SessionState::Paused);
}

#[tokio::test(start_paused = true)]
async fn a_deadline_stands_still_while_the_session_is_paused() {
    let world = World::new().await;
    let id = world.run(NewSession { max_duration_ms: Some(60_000), ..NewSession::default() }).await.id;
    let deadline = world.session(id).await.timeout_at.unwrap();
    world.fakes.clock.advance(10_000);
    world.pause(id).await;
    world.fakes.clock.advance(500_000);
    idle().await;
    assert_eq!(world.session(id).await.state, SessionState::Paused);
    assert_eq!(world.session(id).await.timeout_at, Some(deadline));
    let resumed = world.resume(id).await.timeout_at.unwrap();
    assert!(resumed.abs_diff(deadline + 500_000) < 10, "{resumed}");
    world.fakes.clock.set(resumed);
    idle().await;
    assert_eq!(world.session(id).await.terminal_error, "maximum duration reached");
}

#[tokio::test(start_paused = true)]
async fn a_paused_session_is_kept_as_long_as_it_or_its_workspace_says() {
    let world = World::new().await;
    let update = WorkspaceSettingsUpdate { pause_retention_ms: Some(Some(50_000)), ..Default::default() };
    world.engine.update_settings(&world.caller, None, update).await.unwrap();
    let own = world.run(NewSession { pause_retention_ms: Some(90_000), ..NewSession::default() }).await.id;
    let workspaces = world.running().await;
    let resumed = world.running().await;
    for id in [own, workspaces, resumed] {
        world.pause(id).await;
    }
    world.resume(resumed).await;
    world.fakes.clock.advance(50_000);
    idle().await;
    let ended = world.session(workspaces).await;
    assert_eq!((ended.state, ended.terminal_error.as_str()), (SessionState::Terminated, "pause retention expired"));
    assert_eq!(ended.pause, None);
    assert_eq!(world.session(own).await.state, SessionState::Paused);
    world.fakes.clock.advance(40_000);
    idle().await;
    assert_eq!(world.session(own).await.state, SessionState::Terminated);
    assert_eq!(world.session(resumed).await.state, SessionState::Running);
    assert!(world.fakes.store.snapshots_now().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_dies_leaves_its_disk_and_can_be_resumed() {
    let world = World::new().await;
    let id = world.running().await;
    world.write(id, "/root/kept", "yes").await;
    world.fakes.driver.kill(id, "the sandbox's first process was killed");
    idle().await;
    let paused = world.session(id).await;
    assert_eq!(paused.state, SessionState::Paused);
    assert_eq!(paused.last_resume_error, "the sandbox's first process was killed");
    assert!(world.fakes.driver.is_only_a_disk(id));
    assert_eq!(world.active().await, 0);
    let resumed = world.resume(id).await;
    assert_eq!(
        (resumed.last_resume, resumed.last_resume_error.as_str()),
        (from_disk(DiskOnlyReason::SandboxEnded), "")
    );
    assert_eq!(world.read(id, "/root/kept").await.as_deref(), Some("yes"));
}

#[tokio::test(start_paused = true)]
async fn power_off_is_a_stop_that_nothing_is_wrong_with() {
    let world = World::new().await;
    let id = world.running().await;
    world.fakes.driver.power_off(id);
    idle().await;
    let stopped = world.session(id).await;
    assert_eq!((stopped.state, stopped.last_resume_error.as_str()), (SessionState::UserShutdown, ""));
    assert_eq!(world.engine.pause_session(&world.caller, id).await.unwrap().state, SessionState::UserShutdown);
    let resumed = world.resume(id).await;
    assert_eq!(resumed.last_resume, from_disk(DiskOnlyReason::PoweredOff));
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_dies_while_it_is_frozen_is_started_from_its_disk() {
    let world = World::new().await;
    let id = world.running().await;
    world.pause(id).await;
    world.fakes.driver.kill(id, "out of memory");
    idle().await;
    let paused = world.session(id).await;
    assert_eq!(
        (paused.state, paused.pause.unwrap().disk_reason),
        (SessionState::Paused, Some(DiskOnlyReason::SandboxEnded))
    );
    assert_eq!(world.resume(id).await.last_resume, from_disk(DiskOnlyReason::SandboxEnded));
}

#[tokio::test(start_paused = true)]
async fn late_news_of_an_earlier_end_are_not_believed() {
    let world = World::new().await;
    let [running, frozen] = [world.running().await, world.running().await];
    world.pause(frozen).await;
    for id in [running, frozen] {
        world.fakes.driver.report_end(id);
    }
    idle().await;
    assert_eq!(world.session(running).await.state, SessionState::Running);
    assert!(world.session(frozen).await.pause.unwrap().in_memory && world.fakes.driver.is_frozen(frozen));
}

#[tokio::test(start_paused = true)]
async fn a_failed_resume_lands_in_paused_with_its_reason_and_the_disk() {
    let config = EngineConfig { pause_in_memory_max_ms: Some(0), ..EngineConfig::default() };
    let world = World::with(config).await;
    let id = world.running().await;
    world.write(id, "/root/kept", "yes").await;
    world.pause(id).await;
    idle().await;
    world.fakes.driver.refuse_next(DriverError::Failed("mount refused".into()));
    let refusal = world.engine.resume_session(&world.caller, id).await.unwrap_err();
    assert_eq!(refusal.code, Code::ResumeFailed);
    idle().await;
    let paused = world.session(id).await;
    assert_eq!(paused.state, SessionState::Paused);
    assert_eq!(paused.last_resume_error, "the sandbox could not be started: mount refused");
    assert!(world.fakes.driver.is_only_a_disk(id));
    assert_eq!(world.active().await, 0);
    assert_eq!(world.resume(id).await.last_resume_error, "");
    assert_eq!(world.read(id, "/root/kept").await.as_deref(), Some("yes"));
}

#[tokio::test(start_paused = true)]
async fn a_pause_that_cannot_be_recorded_did_not_happen() {
    let world = World::new().await;
    let id = world.running().await;
    idle().await;
    world.fakes.store.fail_commits(true);
    assert_eq!(code(world.engine.pause_session(&world.caller, id).await), Code::Internal);
    world.fakes.store.fail_commits(false);
    idle().await;
    assert_eq!(world.session(id).await.state, SessionState::Running);
    assert!(!world.fakes.driver.is_frozen(id));
    world.pause(id).await;
    world.fakes.store.fail_commits(true);
    assert_eq!(code(world.engine.resume_session(&world.caller, id).await), Code::Internal);
    world.fakes.store.fail_commits(false);
    idle().await;
    assert_eq!(world.session(id).await.state, SessionState::Paused);
    assert!(world.fakes.driver.is_frozen(id));
    assert_eq!(world.active().await, 0);
}

#[tokio::test(start_paused = true)]
async fn sessions_that_have_ended_or_begin_are_neither_paused_nor_resumed() {
    let world = World::new().await;
    let ended = world.running().await;
    world.engine.terminate_session(&world.caller, ended).await.unwrap();
    assert_eq!(code(world.engine.pause_session(&world.caller, ended).await), Code::SessionTerminated);
    assert_eq!(code(world.engine.resume_session(&world.caller, ended).await), Code::SessionTerminated);
    world.fakes.driver.hold_creates(true);
    let creating = world.engine.create_session(&world.caller, NewSession::default()).await.unwrap().id;
    assert_eq!(code(world.engine.pause_session(&world.caller, creating).await), Code::SessionNotRunning);
    assert_eq!(code(world.engine.resume_session(&world.caller, creating).await), Code::SessionNotRunning);
    world.fakes.driver.hold_creates(false);
}

#[tokio::test(start_paused = true)]
async fn pauses_and_resumes_at_once_wait_for_each_other() {
    let world = World::new().await;
    world.fakes.faults.yield_up_to(5);
    let id = world.running().await;
    for _ in 0..20 {
        let all: Vec<_> = (0..6)
            .map(|n| {
                let (engine, caller) = (world.engine.clone(), world.caller);
                tokio::spawn(async move {
                    match n % 2 {
                        0 => engine.pause_session(&caller, id).await,
                        _ => engine.resume_session(&caller, id).await,
                    }
                })
            })
            .collect();
        for one in all {
            one.await.unwrap().unwrap();
        }
    }
    assert_eq!(world.fakes.driver.violations(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_stopped_session_can_be_ended() {
    let world = World::new().await;
    let [a, b] = [world.running().await, world.running().await];
    world.pause(a).await;
    world.fakes.driver.power_off(b);
    idle().await;
    for id in [a, b] {
        let ended = world.engine.terminate_session(&world.caller, id).await.unwrap();
        assert_eq!((ended.state, ended.pause), (SessionState::Terminated, None));
    }
    idle().await;
    assert!(world.fakes.driver.sandboxes().is_empty() && world.fakes.store.snapshots_now().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_restart_of_the_server_changes_nothing_about_stopped_and_running_sessions() {
    let world = World::new().await;
    let [running, frozen, off] = [world.running().await, world.running().await, world.running().await];
    let paused = world.pause(frozen).await;
    world.fakes.driver.power_off(off);
    idle().await;
    let world = world.restart(|_| ()).await;
    assert_eq!(world.session(running).await.state, SessionState::Running);
    assert_eq!(world.session(frozen).await, paused);
    assert!(world.fakes.driver.is_frozen(frozen));
    assert_eq!(world.session(off).await.state, SessionState::UserShutdown);
    assert_eq!(world.active().await, 1);
    assert_eq!(world.resume(frozen).await.last_resume, FROM_MEMORY);
    assert_eq!(world.resume(off).await.last_resume, from_disk(DiskOnlyReason::PoweredOff));
}

#[tokio::test(start_paused = true)]
async fn a_restart_of_the_host_keeps_every_disk() {
    let world = World::new().await;
    let [running, frozen] = [world.running().await, world.running().await];
    world.write(running, "/root/kept", "yes").await;
    let command = world.engine.execute(&world.caller, running, hang(), false).await.unwrap();
    world.pause(frozen).await;
    let world = world.restart(|fakes| fakes.driver.restart_host()).await;
    let paused = world.session(running).await;
    assert_eq!((paused.state, paused.last_resume_error.as_str()), (SessionState::Paused, "the host was restarted"));
    assert_eq!(world.session(frozen).await.pause.unwrap().disk_reason, Some(DiskOnlyReason::HostRestarted));
    let command = world.engine.execution(&world.caller, running, command.id).await.unwrap();
    assert_eq!(command.status, ExecutionStatus::Failed);
    for id in [running, frozen] {
        assert!(world.fakes.driver.is_only_a_disk(id));
        assert_eq!(world.resume(id).await.last_resume, from_disk(DiskOnlyReason::HostRestarted));
    }
    assert_eq!(world.read(running, "/root/kept").await.as_deref(), Some("yes"));
}

#[tokio::test(start_paused = true)]
async fn sticky_sessions_have_a_limit_of_their_own() {
    let world = World::new().await;
    let update = WorkspaceSettingsUpdate { sticky_sessions_max: Some(Some(1)), ..Default::default() };
    world.engine.update_settings(&world.caller, None, update).await.unwrap();
    let sticky = NewSession { sticky: true, ..NewSession::default() };
    let first = world.run(sticky.clone()).await.id;
    assert_eq!(code(world.engine.create_session(&world.caller, sticky).await), Code::QuotaExceeded);
    let other = world.running().await;
    let update = |sticky| SessionUpdate { sticky: Some(sticky), ..SessionUpdate::default() };
    assert_eq!(code(world.engine.update_session(&world.caller, other, update(true)).await), Code::QuotaExceeded);
    world.engine.update_session(&world.caller, first, update(true)).await.unwrap();
    world.engine.update_session(&world.caller, first, update(false)).await.unwrap();
    world.engine.update_session(&world.caller, other, update(true)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn deadlines_survive_a_restart_and_a_jump_of_the_clock() {
    let world = World::new().await;
    let new =
        NewSession { idle_timeout_minutes: Some(10), pause_retention_ms: Some(3_600_000), ..NewSession::default() };
    let id = world.run(new).await.id;
    let world = world.restart(|_| ()).await;
    world.fakes.clock.advance(600_000);
    idle().await;
    assert_eq!(world.session(id).await.state, SessionState::Paused);
    let world = world.restart(|fakes| fakes.clock.advance(3_600_000)).await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(world.session(id).await.terminal_error, "pause retention expired");
}
