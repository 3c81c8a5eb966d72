//! What is remembered of a session, and how it explains why the session is as it is.

use nagaya_api::error::Code;
use nagaya_api::ids::{KeyId, SessionId, WorkspaceId};
use nagaya_engine::model::{Connection, DiskOnlyReason, Egress, Limit};
use nagaya_engine::model::{DiskSource, EndReason, Event, EventKind, PauseReason, RestoreMode};
use nagaya_engine::ports::{Command, DriverError, Process, ProcessEvent, ProcessInput, ResourceUsage, Signal};
use nagaya_engine::{Caller, EngineConfig, Fork, NewExecution, NewSession, NewSnapshot, OpenSession, SessionUpdate};

use crate::support::{World, code, idle, mount};

impl World {
    async fn facts(&self, id: SessionId) -> Vec<EventKind> {
        let (events, next) = self.engine.events(&self.caller, id, 0, 100).await.unwrap();
        assert_eq!(next, 0, "more than a page");
        events.into_iter().map(|event| event.fact).collect()
    }

    async fn open(&self, id: SessionId) -> OpenSession {
        let (certificate, _) = self.engine.certificate(&self.caller, id).await.unwrap();
        self.engine.open(&certificate.text, id).await.unwrap()
    }

    async fn codes(&self, id: SessionId) -> Vec<&'static str> {
        let findings = self.engine.explain(&self.caller, id).await.unwrap();
        findings.into_iter().map(|finding| finding.code.name()).collect()
    }
}

fn paused(reason: PauseReason) -> EventKind {
    EventKind::Paused { reason, cause: String::new() }
}

fn resumed(mode: RestoreMode, reason: Option<DiskOnlyReason>) -> EventKind {
    EventKind::Resumed { mode, reason }
}

fn command(argv: &[&str]) -> Command {
    Command { argv: argv.iter().map(|argument| (*argument).to_owned()).collect(), ..Command::default() }
}

async fn ended(mut process: Process) -> nagaya_engine::ports::ExitStatus {
    loop {
        if let ProcessEvent::Exit(status) = process.events.recv().await.unwrap() {
            return status;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_life_is_remembered_from_its_beginning_to_its_end() {
    let world = World::new().await;
    let (caller, volume_id) = (&world.caller, world.volume().await.id);
    let id = world.run(NewSession { outbound: true, max_duration_ms: Some(60_000), ..NewSession::default() }).await.id;
    world.attach(id, volume_id, "/data").await;
    let path = "/data".to_owned();
    let egress = Some(Egress { allow_domains: vec!["a.example".into()], allow_cidrs: Vec::new() });
    world.engine.set_egress(caller, id, egress).await.unwrap();
    let new = NewSnapshot { wait: true, ..NewSnapshot::default() };
    let snapshot_id = world.engine.create_snapshot(caller, id, new).await.unwrap().id;
    world.engine.detach_volume(caller, id, volume_id, false).await.unwrap();
    world.pause(id).await;
    world.resume(id).await;
    let hour = SessionUpdate { max_duration_ms: Some(3_600_000), ..SessionUpdate::default() };
    world.engine.update_session(caller, id, hour).await.unwrap();
    let timeout_at_ms = world.engine.extend_session(caller, id, 5_000).await.unwrap().timeout_at.unwrap();
    let fork = world.engine.fork_session(caller, id, Fork { count: 1, name: None }).await.unwrap()[0].id;
    world.settled(fork).await;
    world.engine.terminate_session(caller, id).await.unwrap();
    assert_eq!(
        world.facts(id).await,
        [
            EventKind::Created(DiskSource::Fresh),
            EventKind::Ready { after_ms: 0 },
            EventKind::VolumeAttached { volume_id, path: path.clone() },
            EventKind::EgressChanged { unrestricted: false, domains: 1, networks: 0 },
            EventKind::SnapshotCreated { snapshot_id },
            EventKind::VolumeDetached { volume_id, path },
            paused(PauseReason::Requested),
            resumed(RestoreMode::Memory, None),
            EventKind::Extended { by_ms: 5_000, timeout_at_ms },
            EventKind::Forked { sessions: 1 },
            EventKind::Terminated { reason: EndReason::Requested, cause: String::new() },
        ]
    );
    assert_eq!(world.facts(fork).await[..1], [EventKind::Created(DiskSource::Fork { session_id: id })]);
    let copy = world.run(NewSession { snapshot_id: Some(snapshot_id), ..NewSession::default() }).await.id;
    assert_eq!(world.facts(copy).await[..1], [EventKind::Created(DiskSource::Snapshot { snapshot_id })]);
    assert_eq!(world.codes(id).await, ["ended_by_request"]);
}

#[tokio::test(start_paused = true)]
async fn every_way_to_stop_and_to_go_on_says_why() {
    let config = EngineConfig { pause_in_memory_max_ms: Some(10_000), ..EngineConfig::default() };
    let world = World::with(config).await;
    let volume_id = world.volume().await.id;
    let new =
        NewSession { idle_timeout_minutes: Some(1), mounts: vec![mount(volume_id, "/data")], ..NewSession::default() };
    let id = world.run(new).await.id;
    tokio::time::sleep(std::time::Duration::from_secs(62)).await;
    assert_eq!(world.codes(id).await, ["paused_idle"]);
    tokio::time::sleep(std::time::Duration::from_secs(12)).await;
    assert_eq!(world.codes(id).await, ["paused_idle", "memory_released"]);
    world.fakes.driver.refuse_next(DriverError::Failed("no luck".into()));
    assert_eq!(code(world.engine.resume_session(&world.caller, id).await), Code::ResumeFailed);
    assert_eq!(world.codes(id).await, ["resume_failed", "memory_released"]);
    world.resume(id).await;
    world.fakes.driver.power_off(id);
    idle().await;
    assert_eq!(world.codes(id).await, ["powered_off", "memory_released"]);
    world.resume(id).await;
    assert!(world.fakes.driver.kill(id, "killed from outside"));
    idle().await;
    assert_eq!(world.codes(id).await, ["paused_by_failure", "memory_released"]);
    let facts = world.facts(id).await;
    let told = facts.iter().filter(|fact| !matches!(fact, EventKind::VolumeAttached { .. })).skip(2);
    let no_luck = "the sandbox could not be started: no luck";
    assert_eq!(
        told.cloned().collect::<Vec<_>>(),
        [
            paused(PauseReason::Idle),
            EventKind::MemoryReleased { reason: DiskOnlyReason::MemoryTimeLimit },
            EventKind::ResumeFailed { cause: no_luck.into() },
            resumed(RestoreMode::ColdBoot, Some(DiskOnlyReason::MemoryTimeLimit)),
            EventKind::PoweredOff,
            resumed(RestoreMode::ColdBoot, Some(DiskOnlyReason::PoweredOff)),
            EventKind::Paused { reason: PauseReason::SandboxEnded, cause: "killed from outside".into() },
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn deadlines_and_failures_are_ends_with_a_reason() {
    let world = World::new().await;
    let id = world.run(NewSession { max_duration_ms: Some(5_000), ..NewSession::default() }).await.id;
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    let last = world.facts(id).await.pop().unwrap();
    assert_eq!(
        last,
        EventKind::Terminated { reason: EndReason::MaxDuration, cause: "maximum duration reached".into() }
    );
    assert_eq!(world.codes(id).await, ["ended_at_max_duration"]);
    world.fakes.driver.refuse_next(DriverError::Exhausted(Limit::MemoryAvailableMin));
    let id = world.engine.create_session(&world.caller, NewSession::default()).await.unwrap().id;
    world.settled(id).await;
    let findings = world.engine.explain(&world.caller, id).await.unwrap();
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].code.name(), "no_capacity");
    assert_eq!(findings[0].detail, "memory is short on the host (memory_available_mb_min)");
    let facts = world.facts(id).await;
    assert!(
        matches!(facts[..], [EventKind::Created(_), EventKind::Terminated { reason: EndReason::Failed, .. }]),
        "{facts:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn commands_cost_a_write_only_when_they_end_abnormally() {
    let world = World::new().await;
    let id = world.running().await;
    let open = world.open(id).await;
    idle().await;
    let before = world.fakes.store.commits();
    for argv in [&["true"][..], &["exit", "1"], &["exit", "137"]] {
        let execution = open.commands.new_execution();
        let status = ended(open.guest.run(command(argv)).await.unwrap()).await;
        open.commands.ended(execution, argv[0], &status).await;
    }
    assert_eq!(world.fakes.store.commits(), before, "an ordinary end was written");
    let killed = open.commands.new_execution();
    let process = open.guest.run(command(&["hang"])).await.unwrap();
    process.input.send(ProcessInput::Signal(Signal::Kill)).await.unwrap();
    open.commands.ended(killed, "/bin/hang", &ended(process).await).await;
    let late = open.commands.new_execution();
    let slow = Command { timeout_ms: 1_000, ..command(&["hang"]) };
    open.commands.ended(late, "hang", &ended(open.guest.run(slow).await.unwrap()).await).await;
    let missing = open.commands.new_execution();
    let error = open.guest.run(command(&["nope", "secret"])).await.err().unwrap();
    open.commands.not_started(missing, "/opt/nope", &error).await;
    let (events, _) = world.engine.events(&world.caller, id, 2, 0).await.unwrap();
    let told: Vec<_> = events.into_iter().map(|event| (event.execution_id.unwrap(), event.fact)).collect();
    assert_eq!(
        told,
        [
            (killed, EventKind::CommandKilled { program: "hang".into(), signal: "SIGKILL".into() }),
            (late, EventKind::CommandTimedOut { program: "hang".into(), after_ms: 1_000 }),
            (missing, EventKind::CommandNotFound { program: "nope".into() }),
        ]
    );
    assert_eq!(world.codes(id).await, ["command_timed_out", "command_killed", "command_not_found"]);
}

#[tokio::test(start_paused = true)]
async fn a_detached_command_that_times_out_is_remembered_with_its_record() {
    let world = World::new().await;
    let id = world.running().await;
    let new = NewExecution { command: "/bin/hang".into(), timeout_ms: 500, ..NewExecution::default() };
    world.fakes.driver.guest(id).unwrap();
    let refused = world.engine.execute(&world.caller, id, new, true).await;
    assert_eq!(code(refused), Code::CommandNotFound, "the fake knows its programs by their names only");
    let new = NewExecution { command: "hang".into(), timeout_ms: 500, ..NewExecution::default() };
    let execution = world.engine.execute(&world.caller, id, new, true).await.unwrap();
    let (events, _) = world.engine.events(&world.caller, id, 2, 0).await.unwrap();
    let [event] = &events[..] else { panic!("{events:?}") };
    assert_eq!(event.execution_id, Some(execution.id));
    assert_eq!(event.fact, EventKind::CommandTimedOut { program: "hang".into(), after_ms: 500 });
}

#[tokio::test(start_paused = true)]
async fn followers_hear_everything_once_and_end_with_the_session() {
    let world = World::new().await;
    let id = world.running().await;
    let mut follower = world.engine.follow_events(&world.caller, id, 1).await.unwrap();
    let first = follower.next().await.unwrap().unwrap();
    assert_eq!((first.sequence, first.fact), (2, EventKind::Ready { after_ms: 0 }));
    let waiting = tokio::spawn(async move {
        let mut heard: Vec<Event> = Vec::new();
        while let Some(event) = follower.next().await {
            heard.push(event.unwrap());
        }
        heard
    });
    world.pause(id).await;
    world.resume(id).await;
    let open = world.open(id).await;
    open.commands
        .not_started(open.commands.new_execution(), "nope", &open.guest.run(command(&["nope"])).await.err().unwrap())
        .await;
    world.engine.terminate_session(&world.caller, id).await.unwrap();
    // Whoever still holds the session does not keep its followers waiting.
    let heard = waiting.await.unwrap();
    drop(open);
    assert_eq!(heard.iter().map(|event| event.sequence).collect::<Vec<_>>(), [3, 4, 5, 6]);
    assert!(matches!(heard[3].fact, EventKind::Terminated { .. }));
    // The ended session tells all of it again, and ends.
    let mut again = world.engine.follow_events(&world.caller, id, 5).await.unwrap();
    assert_eq!(again.next().await.unwrap().unwrap().sequence, 6);
    assert!(again.next().await.is_none());
    let mut nothing = world.engine.follow_events(&world.caller, id, 6).await.unwrap();
    assert!(nothing.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn followers_of_a_session_that_lives_on_hear_that_the_server_stops() {
    let world = World::new().await;
    let id = world.running().await;
    let mut follower = world.engine.follow_events(&world.caller, id, 0).await.unwrap();
    let waiting = tokio::spawn(async move {
        loop {
            if let Some(Err(error)) = follower.next().await {
                return (error.code, follower.next().await.is_none());
            }
        }
    });
    idle().await;
    let world = world.restart(|_| ()).await;
    assert_eq!(waiting.await.unwrap(), (Code::Draining, true));
    assert_eq!(world.facts(id).await.len(), 2, "a restart of the server is nothing that happens to a session");
}

#[tokio::test(start_paused = true)]
async fn only_the_last_events_are_kept_and_pages_go_through_all_of_them() {
    let world = World::with(EngineConfig { events_per_session_max: 5, ..EngineConfig::default() }).await;
    let id = world.running().await;
    for _ in 0..5 {
        world.pause(id).await;
        world.resume(id).await;
    }
    let page = async |after, size| world.engine.events(&world.caller, id, after, size).await;
    let sequences = |events: &[Event]| events.iter().map(|event| event.sequence).collect::<Vec<_>>();
    let (first, next) = page(0, 3).await.unwrap();
    assert_eq!((sequences(&first), next), (vec![8, 9, 10], 10));
    let (second, end) = page(next, 3).await.unwrap();
    assert_eq!((sequences(&second), end), (vec![11, 12], 0));
    assert_eq!(page(12, 3).await.unwrap(), (Vec::new(), 0));
    assert_eq!(code(page(0, 201).await), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn sessions_that_ended_long_ago_are_forgotten_when_others_end() {
    let world = World::with(EngineConfig { ended_sessions_kept_ms: 60_000, ..EngineConfig::default() }).await;
    let end = async |seconds| {
        let id = world.running().await;
        world.engine.terminate_session(&world.caller, id).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_secs(seconds)).await;
        id
    };
    let first = end(30).await;
    let second = end(40).await;
    assert_eq!(world.codes(first).await, ["ended_by_request"], "nothing has ended since its time was over");
    let third = end(0).await;
    assert_eq!(code(world.engine.session(&world.caller, first).await), Code::SessionNotFound);
    assert_eq!(code(world.engine.events(&world.caller, first, 0, 10).await), Code::SessionNotFound);
    for kept in [second, third] {
        assert_eq!(world.codes(kept).await, ["ended_by_request"]);
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_at_limits_are_remembered_once_a_minute() {
    let world = World::with(EngineConfig { sessions_max: 1, ..EngineConfig::default() }).await;
    let id = world.running().await;
    world.pause(id).await;
    let other = world.running().await;
    for _ in 0..3 {
        assert_eq!(code(world.engine.resume_session(&world.caller, id).await), Code::CapacityUnavailable);
    }
    let limit = "no capacity left on this server: the server's sessions_max is 1".to_owned();
    let refused = EventKind::Refused { request: "resuming the session".into(), limit };
    assert_eq!(world.facts(id).await[3..], *std::slice::from_ref(&refused));
    tokio::time::sleep(std::time::Duration::from_secs(61)).await;
    assert_eq!(code(world.engine.resume_session(&world.caller, id).await), Code::CapacityUnavailable);
    assert_eq!(world.facts(id).await[3..], [refused.clone(), refused]);
    assert_eq!(world.codes(id).await, ["paused_by_request", "limit_reached"]);
    assert_eq!(world.codes(other).await, ["healthy"]);
}

#[tokio::test(start_paused = true)]
async fn what_a_sandbox_uses_and_where_it_may_not_go_is_told_while_it_runs() {
    let world = World::new().await;
    let id = world.running().await;
    let load = ResourceUsage { disk_used_bytes: 95 << 20, disk_size_bytes: 100 << 20, ..ResourceUsage::default() };
    world.fakes.driver.set_load(id, load);
    let denied = Connection {
        at: 7,
        destination: "10.0.0.1:22".into(),
        protocol: "tcp".into(),
        name: String::new(),
        bytes_sent: 60,
        bytes_received: 0,
        denied: "private".into(),
    };
    world.fakes.driver.set_connections(id, vec![denied]);
    assert_eq!(world.codes(id).await, ["disk_nearly_full", "destinations_denied"]);
    world.pause(id).await;
    assert_eq!(world.codes(id).await, ["paused_by_request"], "nothing is seen of what stands still");
}

#[tokio::test(start_paused = true)]
async fn other_workspaces_learn_nothing() {
    let world = World::new().await;
    let id = world.running().await;
    let stranger = Caller { workspace_id: WorkspaceId::new(9, [9; 10]), key_id: KeyId::new(9, [9; 10]) };
    assert_eq!(code(world.engine.events(&stranger, id, 0, 0).await), Code::SessionNotFound);
    assert_eq!(code(world.engine.follow_events(&stranger, id, 0).await.map(drop)), Code::SessionNotFound);
    assert_eq!(code(world.engine.explain(&stranger, id).await), Code::SessionNotFound);
}
