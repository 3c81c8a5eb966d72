//! What callers of the engine may rely on, one promise per test. What must hold under faults and
//! crashes is the simulation's.

// On a paused runtime tokio's time is virtual, and is what the fake clock shows.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

use nagaya_api::error::Code;
use nagaya_api::ids::SessionId;
use nagaya_engine::fake::{self, Fakes};
use nagaya_engine::model::{EventKind, Limit};
use nagaya_engine::model::{ExecutionStatus, Resources, Session, SessionState};
use nagaya_engine::ports::{Clock, Command, DriverError, Entropy, ExitStatus, ProcessEvent, Store};
use nagaya_engine::{Caller, Engine, EngineConfig, ListSessions, NewExecution, NewSession, SessionUpdate};

async fn world() -> (Engine, Caller, Fakes) {
    let (engine, _, caller, fakes) = fake::start(EngineConfig::default()).await;
    (engine, caller, fakes)
}

/// Waits until the session has left CREATING, and whatever follows has settled.
async fn settled(engine: &Engine, caller: &Caller, id: SessionId) -> Session {
    let mut states = engine.watch_session(caller, id).await.unwrap();
    let resting = |session: &Session| matches!(session.state, SessionState::Running | SessionState::Terminated);
    states.wait_for(resting).await.unwrap().clone()
}

async fn running(engine: &Engine, caller: &Caller, new: NewSession) -> Session {
    let created = engine.create_session(caller, new).await.unwrap();
    assert_eq!(created.state, SessionState::Creating);
    let session = settled(engine, caller, created.id).await;
    assert_eq!(session.state, SessionState::Running, "{}", session.terminal_error);
    session
}

/// Lets every task do what it can without time passing.
async fn idle() {
    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
}

fn code<T>(result: Result<T, nagaya_api::error::Error>) -> Code {
    result.err().expect("this must be refused").code
}

fn run(command: &str) -> NewExecution {
    NewExecution { command: command.into(), ..NewExecution::default() }
}

#[tokio::test(start_paused = true)]
async fn a_new_session_runs_and_ends_when_asked() {
    let (engine, caller, fakes) = world().await;
    let new = NewSession { name: "n".into(), tags: vec!["t".into()], outbound: true, ..NewSession::default() };
    let session = running(&engine, &caller, new).await;
    assert_eq!((session.driver.as_str(), session.machine.resources), ("fake", Resources::of(2, 4_096, 5)));
    assert!(session.ready_at.is_some() && session.machine.outbound);
    assert_eq!(engine.usage(&caller, None).await.unwrap().active_sessions, 1);

    let ended = engine.terminate_session(&caller, session.id).await.unwrap();
    assert_eq!((ended.state, ended.terminal_error.as_str()), (SessionState::Terminated, ""));
    idle().await;
    assert!(fakes.driver.sandboxes().is_empty());
    assert_eq!(engine.usage(&caller, None).await.unwrap().active_sessions, 0);
    assert_eq!(engine.terminate_session(&caller, session.id).await.unwrap(), ended, "it is idempotent");
    assert_eq!(code(engine.extend_session(&caller, session.id, 1).await), Code::SessionTerminated);
    let states = engine.watch_session(&caller, session.id).await.unwrap();
    assert_eq!(*states.borrow(), ended);
    assert!(states.has_changed().is_err(), "nothing more will come");
}

#[tokio::test(start_paused = true)]
async fn unknown_and_foreign_sessions_look_the_same() {
    let (engine, caller, _fakes) = world().await;
    let unknown = SessionId::new(1, [1; 10]);
    let refusal = engine.session(&caller, unknown).await.unwrap_err();
    let session = running(&engine, &caller, NewSession::default()).await;
    let stranger = Caller { workspace_id: nagaya_api::ids::WorkspaceId::new(1, [1; 10]), ..caller };
    assert_eq!(engine.session(&stranger, session.id).await.unwrap_err(), refusal);
    engine.terminate_session(&caller, session.id).await.unwrap();
    assert_eq!(engine.session(&stranger, session.id).await.unwrap_err(), refusal);
    assert_eq!(engine.terminate_session(&stranger, session.id).await.unwrap_err(), refusal);
    let list = ListSessions { workspace_id: Some(stranger.workspace_id), ..ListSessions::default() };
    assert_eq!(code(engine.list_sessions(&caller, list).await), Code::WorkspaceNotFound);
}

#[tokio::test(start_paused = true)]
async fn a_full_server_names_its_limit_and_changes_nothing() {
    let config = EngineConfig { sessions_max: 2, ..EngineConfig::default() };
    let (engine, _, caller, fakes) = fake::start(config).await;
    for _ in 0..2 {
        running(&engine, &caller, NewSession::default()).await;
    }
    let error = engine.create_session(&caller, NewSession::default()).await.unwrap_err();
    assert_eq!(error.code, Code::CapacityUnavailable);
    assert!(error.to_string().contains("capacity") && error.to_string().contains("sessions_max"), "{error}");
    assert_eq!(fakes.store.all_sessions().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn bad_input_creates_nothing() {
    let (engine, caller, fakes) = world().await;
    let bad = [
        NewSession { name: "a".repeat(257), ..NewSession::default() },
        NewSession { cpu_millis: Some(0), ..NewSession::default() },
        NewSession { memory_bytes: Some(1 << 11), ..NewSession::default() },
        NewSession { disk_bytes: Some(0), ..NewSession::default() },
        NewSession { tags: vec!["line\n".into()], ..NewSession::default() },
        NewSession { env: [("A\0".into(), "".into())].into(), ..NewSession::default() },
        NewSession { max_duration_ms: Some(0), ..NewSession::default() },
        NewSession { ssh_authorized_keys: vec!["a\nb".into()], ..NewSession::default() },
        NewSession { ssh_authorized_keys: vec!["\r\n".into()], ..NewSession::default() },
        NewSession { metadata: [("k".into(), "v".repeat(65_536))].into(), ..NewSession::default() },
    ];
    for new in bad {
        let error = engine.create_session(&caller, new).await.unwrap_err();
        assert_eq!(error.code.status(), nagaya_api::error::Status::InvalidArgument, "{error}");
    }
    assert!(fakes.store.all_sessions().is_empty());
    assert_eq!(engine.usage(&caller, None).await.unwrap().active_sessions, 0);
}

#[tokio::test(start_paused = true)]
async fn a_driver_out_of_something_says_so_in_the_sessions_end() {
    let (engine, caller, fakes) = world().await;
    fakes.driver.refuse_next(DriverError::Exhausted(Limit::DiskFreeMin));
    let created = engine.create_session(&caller, NewSession::default()).await.unwrap();
    let ended = settled(&engine, &caller, created.id).await;
    assert_eq!(ended.state, SessionState::Terminated);
    assert_eq!(ended.terminal_error, "no capacity left on this server: disk_free_mb_min");
    fakes.driver.refuse_next(DriverError::Failed("mount refused".into()));
    let created = engine.create_session(&caller, NewSession::default()).await.unwrap();
    let ended = settled(&engine, &caller, created.id).await;
    assert_eq!(ended.terminal_error, "the sandbox could not be created: mount refused");
    assert_eq!(engine.usage(&caller, None).await.unwrap().active_sessions, 0);
}

#[tokio::test(start_paused = true)]
async fn a_session_being_created_can_be_changed_and_ended() {
    let (engine, caller, fakes) = world().await;
    fakes.driver.hold_creates(true);
    let id = engine.create_session(&caller, NewSession::default()).await.unwrap().id;
    idle().await;
    let update = SessionUpdate { name: Some("later".into()), ..SessionUpdate::default() };
    assert_eq!(engine.update_session(&caller, id, update).await.unwrap().name, "later");
    let refused = engine.certificate(&caller, id).await.unwrap_err();
    assert_eq!(refused.to_string(), "session not RUNNING: (state=CREATING)");

    let ending = tokio::spawn({
        let engine = engine.clone();
        async move { engine.terminate_session(&caller, id).await }
    });
    idle().await;
    assert_eq!(engine.session(&caller, id).await.unwrap().state, SessionState::Terminating);
    assert!(!ending.is_finished(), "what the driver is making must be there before it can be destroyed");
    fakes.driver.hold_creates(false);
    assert_eq!(ending.await.unwrap().unwrap().state, SessionState::Terminated);
    idle().await;
    assert!(fakes.driver.sandboxes().is_empty());
    assert_eq!(fakes.driver.violations(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_session_that_waits_for_its_turn_ends_without_waiting() {
    let config = EngineConfig { creates_concurrent_max: 1, ..EngineConfig::default() };
    let (engine, _, caller, fakes) = fake::start(config).await;
    fakes.driver.hold_creates(true);
    let first = engine.create_session(&caller, NewSession::default()).await.unwrap().id;
    let second = engine.create_session(&caller, NewSession::default()).await.unwrap().id;
    idle().await;
    assert_eq!(fakes.driver.sandboxes().len(), 1);
    let ended = engine.terminate_session(&caller, second).await.unwrap();
    assert_eq!(ended.state, SessionState::Terminated);
    fakes.driver.hold_creates(false);
    assert_eq!(settled(&engine, &caller, first).await.state, SessionState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_session_ends_at_its_deadline_and_not_before() {
    let (engine, caller, fakes) = world().await;
    let new = NewSession { max_duration_ms: Some(60_000), ..NewSession::default() };
    let session = running(&engine, &caller, new).await;
    assert_eq!(session.timeout_at, Some(session.created_at + 60_000));
    let extended = engine.extend_session(&caller, session.id, 30_000).await.unwrap();
    assert_eq!(extended.timeout_at, Some(session.created_at + 90_000));
    fakes.clock.set(session.created_at + 89_990);
    idle().await;
    assert_eq!(engine.session(&caller, session.id).await.unwrap().state, SessionState::Running);
    fakes.clock.advance(10);
    idle().await;
    let ended = engine.session(&caller, session.id).await.unwrap();
    assert_eq!((ended.state, ended.terminal_error.as_str()), (SessionState::Terminated, "maximum duration reached"));
}

#[tokio::test(start_paused = true)]
async fn deadlines_are_counted_from_creation_by_update() {
    let (engine, caller, fakes) = world().await;
    let a = running(&engine, &caller, NewSession::default()).await;
    let b = running(&engine, &caller, NewSession::default()).await;
    fakes.clock.advance(10_000);
    let update = |ms| SessionUpdate { max_duration_ms: Some(ms), ..SessionUpdate::default() };
    engine.update_session(&caller, a.id, update(600_000)).await.unwrap();
    let updated = engine.update_session(&caller, b.id, update(20_000)).await.unwrap();
    assert_eq!(updated.timeout_at, Some(b.created_at + 20_000));
    engine.update_session(&caller, b.id, update(1_000)).await.unwrap();
    assert_eq!(settled(&engine, &caller, a.id).await.state, SessionState::Running);
    idle().await;
    let ended = engine.session(&caller, b.id).await.unwrap();
    assert_eq!((ended.state, ended.terminal_error.as_str()), (SessionState::Terminated, "maximum duration reached"));
    for bad in [0, u64::MAX, 366 * 24 * 3_600_000] {
        assert_eq!(code(engine.extend_session(&caller, a.id, bad).await), Code::InvalidArgument, "{bad}");
        assert_eq!(code(engine.update_session(&caller, a.id, update(bad)).await), Code::InvalidArgument, "{bad}");
    }
}

/// More time is never less: whatever has no deadline gets none from an extension, in every state and of every make.
#[tokio::test(start_paused = true)]
async fn what_has_no_deadline_is_given_none_by_an_extension() {
    let (engine, caller, fakes) = world().await;
    let plain = running(&engine, &caller, NewSession::default()).await.id;
    let sticky = running(&engine, &caller, NewSession { sticky: true, ..NewSession::default() }).await.id;
    let paused = running(&engine, &caller, NewSession::default()).await.id;
    engine.pause_session(&caller, paused).await.unwrap();
    for id in [plain, sticky, paused] {
        let extended = engine.extend_session(&caller, id, 1_000).await.unwrap();
        assert_eq!(extended.timeout_at, None, "{id}");
        assert_eq!(extended, engine.session(&caller, id).await.unwrap());
        for bad in [0, u64::MAX, 366 * 24 * 3_600_000] {
            assert_eq!(code(engine.extend_session(&caller, id, bad).await), Code::InvalidArgument, "{bad}");
        }
    }
    fakes.clock.advance(3_600_000);
    idle().await;
    for id in [plain, sticky, paused] {
        assert!(!engine.session(&caller, id).await.unwrap().state.is_terminal(), "{id}");
    }
    let told = engine.events(&caller, plain, 0, 0).await.unwrap().0;
    assert!(!told.iter().any(|event| matches!(event.fact, EventKind::Extended { .. })), "nothing was moved: {told:?}");
}

/// A deadline in the past of a stopped session is moved from where it stands.
#[tokio::test(start_paused = true)]
async fn a_paused_session_is_extended_from_its_deadline() {
    let (engine, caller, _) = world().await;
    let new = NewSession { max_duration_ms: Some(60_000), ..NewSession::default() };
    let session = running(&engine, &caller, new).await;
    engine.pause_session(&caller, session.id).await.unwrap();
    let extended = engine.extend_session(&caller, session.id, 30_000).await.unwrap();
    assert_eq!(extended.timeout_at, Some(session.created_at + 90_000));
}

#[tokio::test(start_paused = true)]
async fn a_refused_update_changes_nothing_and_empty_tags_clear() {
    let (engine, caller, _fakes) = world().await;
    let new = NewSession { name: "old".into(), tags: vec!["a".into()], ..NewSession::default() };
    let session = running(&engine, &caller, new).await;
    let bad = SessionUpdate { name: Some("new".into()), tags: Some(vec![String::new()]), ..SessionUpdate::default() };
    assert_eq!(code(engine.update_session(&caller, session.id, bad).await), Code::InvalidArgument);
    let unchanged = engine.session(&caller, session.id).await.unwrap();
    assert_eq!((unchanged.name.as_str(), unchanged.tags.len()), ("old", 1));
    let good = SessionUpdate { tags: Some(vec![]), sticky: Some(true), ..SessionUpdate::default() };
    let updated = engine.update_session(&caller, session.id, good).await.unwrap();
    assert_eq!((updated.name.as_str(), updated.tags.len(), updated.sticky), ("old", 0, true));
}

#[tokio::test(start_paused = true)]
async fn pages_hold_every_session_once_and_filters_hold_on_each() {
    let (engine, caller, fakes) = world().await;
    let mut expected = Vec::new();
    for n in 0..7 {
        let tags = if n % 2 == 0 { vec!["even".into(), "all".into()] } else { vec!["all".into()] };
        expected.push(running(&engine, &caller, NewSession { tags, ..NewSession::default() }).await.id);
        fakes.clock.advance(1);
    }
    engine.terminate_session(&caller, expected[0]).await.unwrap();
    expected.reverse();
    let mut found = Vec::new();
    let mut list = ListSessions { include_terminated: true, page_size: 3, ..ListSessions::default() };
    loop {
        let (page, next) = engine.list_sessions(&caller, list.clone()).await.unwrap();
        found.push(page.iter().map(|session| session.id).collect::<Vec<_>>());
        if next.is_empty() {
            break;
        }
        list.page_token = next;
    }
    assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 1]);
    assert_eq!(found.concat(), expected);
    let tags = vec!["all".into(), "even".into()];
    let (even, next) = engine.list_sessions(&caller, ListSessions { tags, ..ListSessions::default() }).await.unwrap();
    assert_eq!((even.len(), next.as_str()), (3, ""), "four have the tags, one of them has ended");
    let list = ListSessions { page_size: 201, ..ListSessions::default() };
    assert_eq!(code(engine.list_sessions(&caller, list).await), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_opens_its_session_while_that_runs() {
    let (engine, caller, fakes) = world().await;
    let new = NewSession { env: [("A".into(), "1".into())].into(), ..NewSession::default() };
    let session = running(&engine, &caller, new).await;
    let other = running(&engine, &caller, NewSession::default()).await;
    let (certificate, _) = engine.certificate(&caller, session.id).await.unwrap();
    assert_eq!(certificate.expires_at, fakes.clock.now() + 600_000);
    let open = engine.open(&certificate.text, session.id).await.unwrap();
    assert_eq!(open.env["A"], "1");
    let command = Command { argv: vec!["echo".into(), "hi".into()], ..Command::default() };
    let mut process = open.guest.run(command).await.unwrap();
    assert_eq!(process.events.recv().await, Some(ProcessEvent::Stdout("hi\n".into())));
    assert_eq!(code(engine.open(&certificate.text, other.id).await), Code::InvalidCertificate);
    assert_eq!(code(engine.open("", session.id).await), Code::InvalidCertificate);

    let (late, _) = engine.certificate(&caller, other.id).await.unwrap();
    engine.terminate_session(&caller, other.id).await.unwrap();
    assert_eq!(code(engine.open(&late.text, other.id).await), Code::SessionTerminated);
    fakes.clock.advance(600_000);
    assert_eq!(code(engine.open(&certificate.text, session.id).await), Code::InvalidCertificate);
}

#[tokio::test(start_paused = true)]
async fn use_is_activity_a_probe_is_not_and_it_is_written_down_in_time() {
    let (engine, caller, fakes) = world().await;
    let session = running(&engine, &caller, NewSession::default()).await;
    let (certificate, _) = engine.certificate(&caller, session.id).await.unwrap();
    let stored = async || fakes.store.session(session.id).await.unwrap().unwrap().last_activity_at;
    let seen = async || engine.session(&caller, session.id).await.unwrap().last_activity_at;
    let start = seen().await;
    fakes.clock.advance(1_000);
    drop(engine.probe(&certificate.text, session.id).await.unwrap());
    assert_eq!(seen().await, start);

    let open = engine.open(&certificate.text, session.id).await.unwrap();
    fakes.clock.advance(7_000);
    assert_eq!(seen().await, start + 8_000, "a session in use is active now");
    drop(open);
    fakes.clock.advance(1_000);
    assert_eq!(seen().await, start + 8_000);
    idle().await;
    assert_eq!(stored().await, start, "not for every call");
    fakes.clock.advance(30_000);
    idle().await;
    assert_eq!(stored().await, start + 8_000);

    let reported = engine.report_activity(&caller, session.id).await.unwrap();
    assert_eq!(reported, fakes.clock.now());
    engine.shut_down().await;
    assert_eq!(stored().await, reported, "nothing is lost by stopping");
}

#[tokio::test(start_paused = true)]
async fn activity_that_could_not_be_written_down_is_written_later() {
    let (engine, caller, fakes) = world().await;
    let id = running(&engine, &caller, NewSession::default()).await.id;
    let reported = engine.report_activity(&caller, id).await.unwrap();
    fakes.clock.advance(5_000);
    let reported = reported.max(engine.report_activity(&caller, id).await.unwrap());
    idle().await;
    fakes.faults.fail_per_mille(1_000);
    fakes.clock.advance(30_000);
    idle().await;
    fakes.faults.fail_per_mille(0);
    fakes.clock.advance(30_000);
    idle().await;
    assert_eq!(fakes.store.session(id).await.unwrap().unwrap().last_activity_at, reported);
}

#[tokio::test(start_paused = true)]
async fn commands_of_the_session_are_run_recorded_and_followed() {
    let (engine, caller, _fakes) = world().await;
    let new = NewSession { env: [("A".into(), "1".into()), ("B".into(), "1".into())].into(), ..NewSession::default() };
    let id = running(&engine, &caller, new).await.id;
    let exited = NewExecution { command: "exit".into(), args: vec!["3".into()], ..NewExecution::default() };
    let execution = engine.execute(&caller, id, exited, true).await.unwrap();
    assert_eq!((execution.status, execution.exit_code), (ExecutionStatus::Failed, 3));
    assert_eq!(engine.execution(&caller, id, execution.id).await.unwrap(), execution);

    let hang = NewExecution { timeout_ms: 2_000, ..run("hang") };
    let execution = engine.execute(&caller, id, hang, true).await.unwrap();
    assert_eq!((execution.status, execution.duration_ms), (ExecutionStatus::TimedOut, 2_000));

    let env = NewExecution { env: [("B".into(), "2".into())].into(), ..run("env") };
    let execution = engine.execute(&caller, id, env, false).await.unwrap();
    assert_eq!(execution.status, ExecutionStatus::Running);
    let mut events = engine.follow_execution(&caller, id, execution.id).await.unwrap();
    assert_eq!(events.recv().await, Some(ProcessEvent::Stdout("A=1\nB=2\nUSER=user\n".into())));
    assert!(matches!(events.recv().await, Some(ProcessEvent::Exit(ExitStatus { code: 0, .. }))));

    assert_eq!(code(engine.execute(&caller, id, run("no-such"), false).await), Code::CommandNotFound);
    assert_eq!(code(engine.execute(&caller, id, run(""), false).await), Code::InvalidCommand);
    let other = running(&engine, &caller, NewSession::default()).await.id;
    assert_eq!(code(engine.follow_execution(&caller, other, execution.id).await), Code::ExecutionNotFound);
}

#[tokio::test(start_paused = true)]
async fn new_commands_push_out_finished_ones_but_not_running_ones() {
    let config = EngineConfig { executions_per_session_max: 2, ..EngineConfig::default() };
    let (engine, _, caller, fakes) = fake::start(config).await;
    let id = running(&engine, &caller, NewSession::default()).await.id;
    let hanging = engine.execute(&caller, id, run("hang"), false).await.unwrap();
    let first = engine.execute(&caller, id, run("true"), true).await.unwrap();
    let second = engine.execute(&caller, id, run("hang"), false).await.unwrap();
    assert_eq!(code(engine.execution(&caller, id, first.id).await), Code::ExecutionNotFound);
    let refused = engine.execute(&caller, id, run("true"), true).await.unwrap_err();
    assert_eq!(refused.code, Code::QuotaExceeded);
    assert!(refused.to_string().contains("executions_per_session_max"), "{refused}");

    let waiting = tokio::spawn({
        let engine = engine.clone();
        async move { engine.terminate_session(&caller, id).await }
    });
    waiting.await.unwrap().unwrap();
    for execution in [hanging.id, second.id] {
        let execution = fakes.store.execution(execution).await.unwrap().unwrap();
        assert_eq!((execution.status, execution.exit_code), (ExecutionStatus::Failed, -1));
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_command_learns_that_its_session_ended() {
    let (engine, caller, _fakes) = world().await;
    let id = running(&engine, &caller, NewSession::default()).await.id;
    let waiting = tokio::spawn({
        let engine = engine.clone();
        async move { engine.execute(&caller, id, run("hang"), true).await }
    });
    idle().await;
    engine.terminate_session(&caller, id).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().status, ExecutionStatus::Failed);
}

#[tokio::test(start_paused = true)]
async fn sessions_and_their_commands_outlive_the_engine() {
    let (engine, caller, fakes) = world().await;
    let id = running(&engine, &caller, NewSession::default()).await.id;
    let gone = running(&engine, &caller, NewSession::default()).await.id;
    let execution = engine.execute(&caller, id, run("hang"), false).await.unwrap();
    let (certificate, _) = engine.certificate(&caller, id).await.unwrap();
    engine.shut_down().await;
    assert_eq!(code(engine.create_session(&caller, NewSession::default()).await), Code::Draining);
    assert_eq!(code(engine.terminate_session(&caller, id).await), Code::Draining);
    assert_eq!(engine.session(&caller, id).await.unwrap().state, SessionState::Running);
    fakes.driver.kill(gone, "killed");

    let engine = fakes.start(EngineConfig::default()).await.unwrap();
    let stopped = engine.session(&caller, gone).await.unwrap();
    assert_eq!(stopped.last_resume_error, "the sandbox was no longer running when the server started again");
    assert!(engine.open(&certificate.text, id).await.is_ok(), "certificates stay good over a restart");
    let status = ExitStatus::default();
    fakes.driver.guest(id).unwrap().finish(execution.id, status);
    idle().await;
    let finished = engine.execution(&caller, id, execution.id).await.unwrap();
    assert_eq!(finished.status, ExecutionStatus::Succeeded);
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_that_cannot_be_adopted_yet_is_kept_and_tried_again() {
    let (engine, caller, fakes) = world().await;
    let id = running(&engine, &caller, NewSession::default()).await.id;
    let (certificate, _) = engine.certificate(&caller, id).await.unwrap();
    engine.shut_down().await;
    fakes.driver.set_unreachable(true);
    let engine = fakes.start(EngineConfig::default()).await.unwrap();
    assert_eq!(engine.session(&caller, id).await.unwrap().state, SessionState::Running);
    assert_eq!(code(engine.open(&certificate.text, id).await), Code::GuestUnreachable);
    assert_eq!(code(engine.execute(&caller, id, run("true"), true).await), Code::GuestUnreachable);
    fakes.driver.set_unreachable(false);
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert!(engine.open(&certificate.text, id).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn the_first_start_makes_one_key_and_later_ones_none() {
    let fakes = Fakes::new(3);
    let engine = fakes.start(EngineConfig::default()).await.unwrap();
    let secret = engine.first_start(None).await.unwrap().unwrap();
    assert!(secret.len() == 67 && secret.starts_with("tk_"), "{}", secret.len());
    assert!(secret[3..].bytes().all(|byte| byte.is_ascii_hexdigit()));
    assert_eq!(engine.first_start(None).await.unwrap(), None);
    let chosen = "tk_chosen_by_the_operator";
    assert_eq!(engine.first_start(Some(chosen)).await.unwrap(), None);
    assert_eq!(engine.first_start(Some(chosen)).await.unwrap(), None, "known by now");
    assert_eq!(code(engine.first_start(Some("weak")).await), Code::InvalidArgument);
    engine.shut_down().await;

    let engine = fakes.start(EngineConfig::default()).await.unwrap();
    assert_eq!(engine.first_start(None).await.unwrap(), None);
    let [a, b] = [secret.as_str(), chosen].map(|secret| engine.authenticate(secret).unwrap());
    assert_eq!(a.workspace_id, b.workspace_id);
    assert_ne!(a.key_id, b.key_id);
    assert_eq!(engine.workspace(&a).name, "default");
    assert_eq!(code(engine.authenticate("tk_other")), Code::Unauthenticated);
    assert_eq!(fakes.store.api_keys().await.unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_key_given_at_the_first_start_is_the_only_one() {
    let fakes = Fakes::new(4);
    let engine = fakes.start(EngineConfig::default()).await.unwrap();
    assert_eq!(engine.first_start(Some("tk_chosen_by_the_operator")).await.unwrap(), None);
    assert_eq!(engine.first_start(None).await.unwrap(), None);
    assert_eq!(fakes.store.api_keys().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_clients_on_many_threads_leave_nothing_behind() {
    let config = EngineConfig { sessions_max: 40, ..EngineConfig::default() };
    let (engine, _, caller, fakes) = fake::start(config).await;
    fakes.faults.yield_up_to(3);
    let client = |engine: Engine| async move {
        for round in 0..20 {
            let session = match engine.create_session(&caller, NewSession::default()).await {
                Ok(session) => session,
                Err(error) => {
                    assert_eq!(error.code, Code::CapacityUnavailable);
                    continue;
                }
            };
            if round % 3 > 0 {
                settled(&engine, &caller, session.id).await;
                let execution = engine.execute(&caller, session.id, run("true"), true).await.unwrap();
                assert_eq!(execution.status, ExecutionStatus::Succeeded);
                let (certificate, _) = engine.certificate(&caller, session.id).await.unwrap();
                engine.open(&certificate.text, session.id).await.unwrap();
            }
            let ended = engine.terminate_session(&caller, session.id).await.unwrap();
            assert_eq!(ended.state, SessionState::Terminated);
        }
    };
    let clients: Vec<_> = (0..50).map(|_| tokio::spawn(client(engine.clone()))).collect();
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(engine.usage(&caller, None).await.unwrap().active_sessions, 0);
    assert!(fakes.store.all_sessions().len() >= 40);
    assert!(fakes.store.all_sessions().iter().all(|session| session.state == SessionState::Terminated));
    assert!(fakes.driver.sandboxes().values().all(|alive| !alive));
    assert_eq!(fakes.driver.violations(), [""; 0]);
    engine.shut_down().await;
}

#[test]
fn fake_randomness_repeats_by_seed() {
    let draw = |seed| {
        let mut bytes = [0; 13];
        fake::FakeEntropy::new(seed).fill(&mut bytes);
        bytes
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}
