use std::collections::BTreeSet;

use nagaya_api::ids::{KeyId, SessionId, SnapshotId, WorkspaceId};

use super::*;
use crate::model::{Machine, Pause, Resources};

const NOW: UnixMs = 1_000_000;

fn session(state: SessionState) -> Session {
    Session {
        id: SessionId::new(1, [1; 10]),
        workspace_id: WorkspaceId::new(1, [1; 10]),
        owner_id: KeyId::new(1, [1; 10]),
        name: String::new(),
        name_is_unique: false,
        state,
        machine: Machine {
            image: String::new(),
            resources: Resources::of(2, 256, 5),
            root: Default::default(),
            outbound: true,
            egress: None,
        },
        inbound: true,
        env: Default::default(),
        metadata: Default::default(),
        tags: Vec::new(),
        ssh_authorized_keys: Vec::new(),
        sticky: false,
        idle_timeout_minutes: Some(5),
        pause_retention_ms: None,
        wake_on_visit: None,
        created_at: NOW - 60_000,
        ready_at: Some(NOW - 59_900),
        terminated_at: None,
        timeout_at: None,
        last_activity_at: NOW,
        end_reason: None,
        terminal_error: String::new(),
        exhausted: None,
        isolation: None,
        driver: "fake".into(),
        source_snapshot_id: None,
        source_image_id: None,
        pause: None,
        last_resume_error: String::new(),
        last_resume: None,
        attachments: Vec::new(),
    }
}

fn paused(state: SessionState, disk_reason: Option<DiskOnlyReason>, idle: bool, error: &str) -> Session {
    let pause = Pause {
        paused_at: NOW - 1_000,
        expires_at: None,
        snapshot_id: SnapshotId::new(1, [1; 10]),
        in_memory: disk_reason.is_none(),
        disk_reason,
        idle,
    };
    Session { pause: Some(pause), last_resume_error: error.into(), ..session(state) }
}

fn ended(reason: EndReason, cause: &str, ready: bool) -> Session {
    let before = session(SessionState::Terminated);
    let ready_at = before.ready_at.filter(|_| ready);
    Session { end_reason: Some(reason), terminal_error: cause.into(), terminated_at: Some(NOW), ready_at, ..before }
}

fn event(sequence: u64, fact: EventKind) -> Event {
    Event { session_id: SessionId::new(1, [1; 10]), sequence, at: NOW - 500 + sequence, fact, execution_id: None }
}

fn connection(destination: &str, name: &str, denied: &str) -> Connection {
    Connection {
        at: NOW - 7,
        destination: destination.into(),
        protocol: "tcp".into(),
        name: name.into(),
        bytes_sent: 60,
        bytes_received: 0,
        denied: denied.into(),
    }
}

fn told(session: &Session, events: &[Event], now: &Now) -> Vec<(&'static str, String)> {
    let found = findings(session, events, now, NOW);
    found.into_iter().map(|finding| (finding.code.name(), finding.detail)).collect()
}

fn of_session(session: &Session) -> Vec<(&'static str, String)> {
    told(session, &[], &Now::default())
}

fn with_load(load: ResourceUsage) -> Vec<(&'static str, String)> {
    told(&session(SessionState::Running), &[], &Now { load: Some(load), connections: Vec::new() })
}

fn one(code: &'static str, detail: &str) -> Vec<(&'static str, String)> {
    vec![(code, detail.to_owned())]
}

#[test]
fn every_state_is_explained() {
    let waiting = Session { created_at: NOW - 12_000, ready_at: None, ..session(SessionState::Creating) };
    let cases = [
        (session(SessionState::Running), one("healthy", "the session is RUNNING")),
        (Session { created_at: NOW - 9_999, ..waiting.clone() }, one("healthy", "the session is CREATING")),
        (waiting, one("creation_slow", "asked for 12 s ago")),
        (ended(EndReason::Requested, "", true), one("ended_by_request", "it lived for 60 s")),
        (
            ended(EndReason::MaxDuration, "maximum duration reached", true),
            one("ended_at_max_duration", "it lived for 60 s"),
        ),
        (
            ended(EndReason::PauseRetention, "pause retention expired", true),
            one("ended_at_pause_retention", "pause retention expired"),
        ),
        (
            ended(EndReason::Failed, "the sandbox's disk is gone", true),
            one("ended_by_failure", "the sandbox's disk is gone"),
        ),
        (ended(EndReason::Failed, "out of luck", false), one("creation_failed", "out of luck")),
        (paused(SessionState::Paused, None, false, ""), one("paused_by_request", "it was asked to pause")),
        (paused(SessionState::Paused, None, true, ""), one("paused_idle", "its idle timeout is 5 minutes")),
        (paused(SessionState::Paused, None, false, "no thaw"), one("resume_failed", "no thaw")),
    ];
    for (session, expected) in cases {
        assert_eq!(of_session(&session), expected, "{}", session.state.name());
    }
    let died = of_session(&paused(
        SessionState::Paused,
        Some(DiskOnlyReason::SandboxEnded),
        false,
        "its first process was killed",
    ));
    assert_eq!(died[0], ("paused_by_failure", "its first process was killed".into()));
    assert_eq!(died[1], ("memory_released", "its processes ended".into()));
    let off = of_session(&paused(SessionState::UserShutdown, Some(DiskOnlyReason::PoweredOff), false, ""));
    assert_eq!(off.iter().map(|(code, _)| *code).collect::<Vec<_>>(), ["powered_off", "memory_released"]);
    let parked = of_session(&paused(SessionState::Paused, Some(DiskOnlyReason::MemoryPressure), false, ""));
    assert_eq!(parked[1], ("memory_released", "the host was short of memory".into()));
}

#[test]
fn what_the_host_lacked_is_named() {
    for (limit, lacks) in [
        (Limit::MemoryAvailableMin, "memory is short on the host"),
        (Limit::DiskFreeMin, "disk space is short on the host"),
        (Limit::HostDisk, "disk space is short on the host"),
        (Limit::Slots, "the host has as many sandboxes as it may"),
        (Limit::ServerOpenFiles, "the host has no more of it"),
    ] {
        let session = Session { exhausted: Some(limit), ..ended(EndReason::Failed, "no capacity", false) };
        assert_eq!(of_session(&session), one("no_capacity", &format!("{lacks} ({limit})")));
    }
}

#[test]
fn of_what_happened_the_last_of_each_kind_is_told() {
    let memory = |program: &str| EventKind::OutOfMemory { program: program.into(), limit_mb: 256 };
    let events = [
        event(1, memory("make")),
        event(2, EventKind::Ready { after_ms: 3 }),
        event(3, EventKind::CommandTimedOut { program: "sleep".into(), after_ms: 1_000 }),
        event(4, memory("python3")),
        event(5, EventKind::CommandKilled { program: "sh".into(), signal: "SIGKILL".into() }),
        event(6, EventKind::CommandNotFound { program: "nope".into() }),
        event(7, EventKind::Refused { request: "resuming the session".into(), limit: "sessions_max is 1".into() }),
        event(8, EventKind::SnapshotFailed { snapshot_id: SnapshotId::new(1, [1; 10]), cause: "full".into() }),
    ];
    let found = findings(&session(SessionState::Running), &events, &Now::default(), NOW);
    let codes: Vec<&str> = found.iter().map(|finding| finding.code.name()).collect();
    let expected = [
        "out_of_memory",
        "limit_reached",
        "command_timed_out",
        "command_killed",
        "command_not_found",
        "snapshot_failed",
    ];
    assert_eq!(codes, expected);
    assert_eq!(
        found[0].detail,
        "a process was killed because memory ran out while python3 ran (limit 256 MB); 1 more before"
    );
    assert_eq!(found[0].at, Some(NOW - 496));
}

#[test]
fn what_is_nearly_used_up_is_told_with_figures() {
    assert_eq!(with_load(ResourceUsage::default()), one("healthy", "the session is RUNNING"), "nothing is known");
    let mb = |mb: u64| mb << 20;
    let calm = ResourceUsage {
        memory_bytes: mb(229),
        memory_limit_bytes: mb(256),
        processes: 89,
        processes_max: 100,
        disk_used_bytes: mb(89),
        disk_size_bytes: mb(100),
        cpu_periods: 1_000,
        cpu_periods_throttled: 99,
        cpu_window_us: 250_000,
        cpu_used_us: 300_000,
        cpu_waited_us: 99_000,
        ..ResourceUsage::default()
    };
    assert_eq!(with_load(calm.clone()), one("healthy", "the session is RUNNING"));
    let memory = ResourceUsage { memory_bytes: mb(240), ..calm.clone() };
    assert_eq!(with_load(memory), one("memory_nearly_full", "240 of 256 MB are used"));
    let disk = ResourceUsage { disk_used_bytes: mb(90), ..calm.clone() };
    let kept = ResourceUsage { kept_output_bytes: 30 << 20, ..disk.clone() };
    assert_eq!(with_load(disk), one("disk_nearly_full", "90 of 100 MB are used"));
    let detail = "90 of 100 MB are used, 30 MB of it by output of commands that is kept for its readers";
    assert_eq!(with_load(kept), one("disk_nearly_full", detail));
    let processes = ResourceUsage { processes: 90, ..calm.clone() };
    assert_eq!(with_load(processes), one("processes_nearly_full", "90 of 100 processes and threads exist"));
    let throttled = ResourceUsage { cpu_periods_throttled: 500, cpu_throttled_us: 2_340_000, ..calm.clone() };
    let detail = "it was halted in 50 % of the time it worked, for 2.3 s in all; it has 2 cores";
    assert_eq!(with_load(throttled), one("cpu_throttled", detail));
    let few = ResourceUsage { cpu_periods: 9, cpu_periods_throttled: 9, ..calm.clone() };
    assert_eq!(with_load(few), one("healthy", "the session is RUNNING"), "too few to tell");
    let busy = ResourceUsage { cpu_waited_us: 150_000, ..calm.clone() };
    assert_eq!(with_load(busy), one("cpu_busy", "its threads use 60 % of its 2 cores, and wait for another 30 %"));
    for (load, code) in [
        (ResourceUsage { disk_failed: true, ..calm.clone() }, "disk_failed"),
        (ResourceUsage { disk_held: true, ..calm.clone() }, "host_disk_full"),
        (ResourceUsage { halted: true, ..calm.clone() }, "halted"),
    ] {
        assert_eq!(with_load(load)[0].0, code);
    }
    let killed = ResourceUsage { memory_kills: 3, ..calm };
    assert_eq!(with_load(killed), one("out_of_memory", "3 since the sandbox started; its limit is 256 MB"));
}

#[test]
fn denied_destinations_are_named_once_each() {
    let denied =
        |connections: Vec<Connection>| told(&session(SessionState::Running), &[], &Now { load: None, connections });
    assert_eq!(denied(vec![connection("1.2.3.4:443", "", "")]), one("healthy", "the session is RUNNING"));
    let two = vec![
        connection("1.2.3.4:443", "", ""),
        connection("", "evil\x1b.example", "not allowed"),
        connection("10.0.0.1:22", "", "private"),
        connection("10.0.0.1:22", "", "private"),
    ];
    let detail = "3 of the last 4: 10.0.0.1:22 (private), evil.example (not allowed)";
    assert_eq!(denied(two), one("destinations_denied", detail));
    // Those beyond its share are no matter of destinations: an event tells of them.
    let beyond = vec![connection("1.2.3.4:443", "", crate::model::CONNECTIONS_USED_UP)];
    assert_eq!(denied(beyond), one("healthy", "the session is RUNNING"));
    let many = (0..5).map(|n| connection(&format!("10.0.0.{n}:1"), "", "private")).collect();
    assert!(denied(many)[0].1.ends_with("10.0.0.2:1 (private) and 2 more"));
}

#[test]
fn codes_are_stable_words_with_texts() {
    let mut names = BTreeSet::new();
    for code in FindingCode::ALL {
        let name = code.name();
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
        assert!(names.insert(name), "{name} stands for two things");
        assert!(!code.title().is_empty() && !code.title().ends_with('.'), "{name}");
        assert!(code.remedy().is_empty() || code.remedy().ends_with('.'), "{name}");
    }
}
