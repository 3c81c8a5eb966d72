//! Why a session is as it is: findings from its record, its events, its connections and what its sandbox uses now.
//!
//! [`findings`] is pure; every rule of it has a case in the tests.

use nagaya_api::error::Error;

use crate::errors::store_error;
use crate::model::{
    CONNECTIONS_USED_UP, Connection, DiskOnlyReason, EndReason, Event, EventKind, Limit, Resource, Session,
    SessionState, UnixMs,
};
use crate::ports::ResourceUsage;
use crate::shared::Shared;

/// A creation that takes longer than this is worth a word.
const CREATION_SLOW_MS: u64 = 10_000;
/// How much of a limit is nearly all of it.
const NEARLY_PERCENT: u64 = 90;
/// Time on processors, had or waited for, of all that the sandbox may have.
const BUSY_PERCENT: u64 = 80;
/// Spans of time in which the share of processors was used up, of all in which they were used; and how many spans it
/// takes to tell.
const THROTTLED_PERCENT: u64 = 10;
const SPANS_MIN: u64 = 10;
/// Destinations that are named.
const DESTINATIONS_MAX: usize = 3;

macro_rules! codes {
    ($($variant:ident => $name:literal, $title:literal, $remedy:literal;)*) => {
        /// A stable code for everything that a session's state can be explained with, the most important first. Never
        /// renamed, never reused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum FindingCode {
            $($variant,)*
        }

        impl FindingCode {
            /// Every code, in the order of the documentation and of answers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What is the matter.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$variant => $title,)* }
            }

            /// What to do about it; empty when there is nothing to do.
            pub const fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $remedy,)* }
            }
        }
    };
}

codes! {
    NoCapacity => "no_capacity", "the host had no room for the sandbox", "Try again when other sandboxes have ended, ask for a smaller machine, or raise the limit that is named.";
    CreationFailed => "creation_failed", "the sandbox could not be created", "Remove the cause that is named and create it again; the server's log has more.";
    EndedByFailure => "ended_by_failure", "the session ended because something failed", "Create a new session; the server's log has more.";
    EndedAtMaxDuration => "ended_at_max_duration", "the session reached its maximum duration", "Create it with a longer max_duration, or extend it in time.";
    EndedAtPauseRetention => "ended_at_pause_retention", "the session was paused for as long as paused sessions are kept", "Resume in time, create it with a longer pause_retention, or keep its disk as a snapshot.";
    EndedByRequest => "ended_by_request", "the session was terminated by request", "";
    CreationSlow => "creation_slow", "the sandbox is still being created", "Wait; when it stays so, look at what the host lacks and at the server's log.";
    ResumeFailed => "resume_failed", "the session could not be resumed", "Its disk is intact: remove the cause that is named and resume it again.";
    PausedByFailure => "paused_by_failure", "the sandbox stopped by itself", "Its disk is intact: resume it, and look at what ran in it.";
    PoweredOff => "powered_off", "the sandbox powered itself off", "Resume it: it boots from its disk.";
    PausedIdle => "paused_idle", "the session is paused because nobody used it", "Resume it; create it with a longer idle timeout, or sticky, if it is to go on working by itself.";
    PausedByRequest => "paused_by_request", "the session is paused by request", "Resume it.";
    MemoryReleased => "memory_released", "only the disk of the session is kept", "Resuming boots it again: start what ran in it.";
    DiskFailed => "disk_failed", "the sandbox's disk takes no more writes", "Free space on the host, then pause and resume the session: its disk is repaired, and it boots from it.";
    HostDiskFull => "host_disk_full", "the sandbox's disk takes nothing new because the host's is nearly full", "Free space on the host, or end sessions that are not needed; it goes on by itself. Removing files in the sandbox helps too.";
    Halted => "halted", "the sandbox's first process is stopped", "Somebody on the host stopped it: send it SIGCONT, or terminate the session.";
    OutOfMemory => "out_of_memory", "processes were killed because the sandbox's memory was used up", "Use less memory, or create the session with more.";
    DiskNearlyFull => "disk_nearly_full", "the sandbox's disk is nearly full", "Remove files, or create the session with a larger disk.";
    MemoryNearlyFull => "memory_nearly_full", "the sandbox's memory is nearly used up", "Use less memory, or create the session with more, before processes are killed.";
    ProcessesNearlyFull => "processes_nearly_full", "the sandbox has nearly all the processes it may have", "End processes that are not needed; the operator can raise processes_max.";
    CpuThrottled => "cpu_throttled", "the sandbox is slow because it uses up its share of processors", "Run less at once, or create the session with more cores.";
    CpuBusy => "cpu_busy", "the sandbox's processors are busy", "Run less at once, or create the session with more cores; where it mostly waits, the host itself is busy.";
    DestinationsDenied => "destinations_denied", "connections to the outside were denied", "Allow the destinations with the session's egress, or with network_allow where the operator may.";
    LimitReached => "limit_reached", "a request was refused at a limit", "Free what is not needed any more, or have the limit raised that is named.";
    CommandTimedOut => "command_timed_out", "commands ran into their timeout", "Give them more time, or find out why they hang.";
    CommandKilled => "command_killed", "commands were killed by a signal", "Nothing, if you sent it; otherwise look at what in the sandbox did.";
    CommandNotFound => "command_not_found", "commands were not found in the sandbox", "Install them, or give a name that is on the sandbox's PATH.";
    SnapshotFailed => "snapshot_failed", "a snapshot failed", "Remove the cause that is named and take it again.";
    Healthy => "healthy", "nothing is wrong", "";
}

/// One reason why a session is as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub code: FindingCode,
    /// Why, with figures.
    pub detail: String,
    /// When it happened last; `None` for what is so now.
    pub at: Option<UnixMs>,
}

/// Says why a session is as it is.
pub(crate) async fn explain(shared: &Shared, mut session: Session) -> Result<Vec<Finding>, Error> {
    session.wake_on_visit.get_or_insert(shared.config.wake_on_visit);
    let events = shared.store.events(session.id, 0, u32::MAX).await.map_err(store_error)?;
    let now = match session.state {
        SessionState::Running => seen_now(shared, &session).await,
        _ => Now::default(),
    };
    Ok(findings(&session, &events, &now, shared.clock.now()))
}

/// What can be seen of a sandbox that runs; empty where it cannot be seen, which explains nothing.
#[derive(Default)]
struct Now {
    load: Option<ResourceUsage>,
    connections: Vec<Connection>,
}

async fn seen_now(shared: &Shared, session: &Session) -> Now {
    let id = session.id;
    let logged = |error| tracing::debug!(session = %id, %error, "a sandbox could not be looked at");
    Now {
        load: shared.driver_of(session).usage(id).await.map_err(logged).ok(),
        connections: shared.host.connections(id).await.map_err(logged).unwrap_or_default(),
    }
}

fn findings(session: &Session, events: &[Event], now: &Now, at: UnixMs) -> Vec<Finding> {
    let mut found: Vec<Finding> = of_state(session, at).into_iter().collect();
    if let Some(pause) = session.pause.as_ref().filter(|pause| !pause.in_memory) {
        let why = match pause.disk_reason {
            Some(DiskOnlyReason::MemoryTimeLimit) => "it was paused for longer than pause_in_memory_max_ms",
            Some(DiskOnlyReason::MemoryPressure) => "the host was short of memory",
            Some(DiskOnlyReason::HostRestarted) => "the host was restarted",
            Some(DiskOnlyReason::PoweredOff) => "it powered itself off",
            Some(DiskOnlyReason::SandboxEnded) | None => "its processes ended",
        };
        found.push(finding(FindingCode::MemoryReleased, why, None));
    }
    found.extend(of_events(events));
    if let Some(load) = &now.load {
        of_load(session, load, &mut found);
    }
    found.extend(of_connections(&now.connections));
    if found.is_empty() {
        let state = session.state.name();
        found.push(finding(FindingCode::Healthy, format!("the session is {state}"), None));
    }
    found.sort_by_key(|finding| finding.code);
    found
}

fn finding(code: FindingCode, detail: impl Into<String>, at: Option<UnixMs>) -> Finding {
    Finding { code, detail: detail.into(), at }
}

/// What its record says.
fn of_state(session: &Session, now: UnixMs) -> Option<Finding> {
    use FindingCode::{
        CreationSlow, EndedAtMaxDuration, EndedAtPauseRetention, EndedByFailure, EndedByRequest, PausedByFailure,
        PausedByRequest, PausedIdle, PoweredOff, ResumeFailed,
    };
    let lived = |until: Option<UnixMs>| seconds(until.unwrap_or(now).saturating_sub(session.created_at));
    let paused_at = session.pause.as_ref().map(|pause| pause.paused_at);
    Some(match session.state {
        SessionState::Creating => {
            let waited_ms = now.saturating_sub(session.created_at);
            if waited_ms < CREATION_SLOW_MS {
                return None;
            }
            let source =
                if session.source_snapshot_id.is_some() { "; its disk is restored from a snapshot" } else { "" };
            finding(CreationSlow, format!("asked for {} ago{source}", seconds(waited_ms)), None)
        }
        SessionState::Terminating | SessionState::Terminated => {
            let (cause, at) = (session.terminal_error.clone(), session.terminated_at);
            match session.end_reason.unwrap_or(EndReason::Failed) {
                EndReason::Requested => finding(EndedByRequest, format!("it lived for {}", lived(at)), at),
                EndReason::MaxDuration => finding(EndedAtMaxDuration, format!("it lived for {}", lived(at)), at),
                EndReason::PauseRetention => finding(EndedAtPauseRetention, cause, at),
                EndReason::Failed if session.ready_at.is_none() => not_created(session.exhausted, &cause, at),
                EndReason::Failed => finding(EndedByFailure, cause, at),
            }
        }
        SessionState::UserShutdown => finding(PoweredOff, format!("its disk is kept{}", of_visits(session)), paused_at),
        SessionState::Paused => {
            let ended = session.pause.as_ref().is_some_and(|pause| {
                matches!(pause.disk_reason, Some(DiskOnlyReason::SandboxEnded | DiskOnlyReason::HostRestarted))
            });
            match (&session.pause, session.last_resume_error.as_str()) {
                (_, cause) if !cause.is_empty() && ended => finding(PausedByFailure, cause, paused_at),
                (_, cause) if !cause.is_empty() => finding(ResumeFailed, cause, None),
                (Some(pause), _) if pause.idle => {
                    let detail = match session.idle_timeout_minutes {
                        Some(minutes) => format!("its idle timeout is {minutes} minutes"),
                        None => "the server's idle_timeout_default_minutes passed".to_owned(),
                    };
                    finding(PausedIdle, detail + of_visits(session), paused_at)
                }
                _ => finding(PausedByRequest, format!("it was asked to pause{}", of_visits(session)), paused_at),
            }
        }
        SessionState::Running | SessionState::Pausing | SessionState::Resuming => return None,
    })
}

/// What a visit from outside does to a session that is stopped.
fn of_visits(session: &Session) -> &'static str {
    match (session.wake_on_visit, &session.pause) {
        (Some(visits), Some(pause)) if visits.wakes(pause) => "; a visit resumes it",
        (Some(_), Some(_)) => "; visits do not resume it",
        _ => "",
    }
}

/// Why a session never ran: because the host ran out of something, or otherwise.
fn not_created(exhausted: Option<Limit>, cause: &str, at: Option<UnixMs>) -> Finding {
    let Some(limit) = exhausted else { return finding(FindingCode::CreationFailed, cause, at) };
    let lacks = match limit.resource() {
        Resource::Memory => "memory is short on the host",
        Resource::Disk => "disk space is short on the host",
        Resource::Sandboxes => "the host has as many sandboxes as it may",
        Resource::Other => "the host has no more of it",
    };
    finding(FindingCode::NoCapacity, format!("{lacks} ({limit})"), at)
}

/// What happened: of each kind the last one, and how often.
fn of_events(events: &[Event]) -> Vec<Finding> {
    const CODES: [FindingCode; 6] = [
        FindingCode::OutOfMemory,
        FindingCode::LimitReached,
        FindingCode::CommandTimedOut,
        FindingCode::CommandKilled,
        FindingCode::CommandNotFound,
        FindingCode::SnapshotFailed,
    ];
    let code_of = |event: &Event| match event.fact {
        EventKind::OutOfMemory { .. } => Some(FindingCode::OutOfMemory),
        EventKind::Refused { .. } => Some(FindingCode::LimitReached),
        EventKind::CommandTimedOut { .. } => Some(FindingCode::CommandTimedOut),
        EventKind::CommandKilled { .. } => Some(FindingCode::CommandKilled),
        EventKind::CommandNotFound { .. } => Some(FindingCode::CommandNotFound),
        EventKind::SnapshotFailed { .. } => Some(FindingCode::SnapshotFailed),
        _ => None,
    };
    let of_code = |code: FindingCode| {
        let mut of_it = events.iter().rev().filter(move |event| code_of(event) == Some(code));
        let last = of_it.next()?;
        let before = match of_it.count() {
            0 => String::new(),
            times => format!("; {times} more before"),
        };
        Some(finding(code, format!("{}{before}", last.fact.summary()), Some(last.at)))
    };
    CODES.into_iter().filter_map(of_code).collect()
}

/// What the sandbox uses, of what it may.
fn of_load(session: &Session, load: &ResourceUsage, found: &mut Vec<Finding>) {
    use FindingCode::{
        CpuBusy, CpuThrottled, DiskFailed, DiskNearlyFull, Halted, HostDiskFull, MemoryNearlyFull, OutOfMemory,
        ProcessesNearlyFull,
    };
    for (is_so, code, why) in [
        (load.disk_failed, DiskFailed, "the host could not write for it, most likely because its own disk was full"),
        (
            load.disk_held,
            HostDiskFull,
            "less than disk_free_mb_min is left on the host, or it uses most of what there was",
        ),
        (load.halted, Halted, "it got SIGSTOP"),
    ] {
        if is_so {
            found.push(finding(code, why, None));
        }
    }
    if load.memory_kills > 0 && !found.iter().any(|finding| finding.code == OutOfMemory) {
        let (kills, limit) = (load.memory_kills, session.machine.resources.memory_mib());
        found.push(finding(OutOfMemory, format!("{kills} since the sandbox started; its limit is {limit} MB"), None));
    }
    let nearly = |used: u64, all: u64| all > 0 && is_percent(used, all, NEARLY_PERCENT);
    let mut of_all = |code, used: u64, all: u64, unit: &str| {
        if nearly(used, all) {
            found.push(finding(code, format!("{used} of {all}{unit}"), None));
        }
    };
    let kept = match load.kept_output_bytes >> 20 {
        0 => String::new(),
        mb => format!(", {mb} MB of it by output of commands that is kept for its readers"),
    };
    of_all(DiskNearlyFull, load.disk_used_bytes >> 20, load.disk_size_bytes >> 20, &format!(" MB are used{kept}"));
    of_all(MemoryNearlyFull, load.memory_bytes >> 20, load.memory_limit_bytes >> 20, " MB are used");
    of_all(ProcessesNearlyFull, load.processes, load.processes_max, " processes and threads exist");
    if load.cpu_periods >= SPANS_MIN && is_percent(load.cpu_periods_throttled, load.cpu_periods, THROTTLED_PERCENT) {
        let percent = load.cpu_periods_throttled * 100 / load.cpu_periods;
        let (halted, cores) = (seconds(load.cpu_throttled_us / 1_000), session.machine.resources.cpus());
        let detail =
            format!("it was halted in {percent} % of the time it worked, for {halted} in all; it has {cores} cores");
        found.push(finding(CpuThrottled, detail, None));
    }
    let may_us = load.cpu_window_us.saturating_mul(u64::from(session.machine.resources.cpus()));
    let wanted_us = load.cpu_used_us.saturating_add(load.cpu_waited_us);
    if may_us > 0 && is_percent(wanted_us, may_us, BUSY_PERCENT) {
        let percent = |us: u64| us.saturating_mul(100) / may_us;
        let (used, waited, cores) =
            (percent(load.cpu_used_us), percent(load.cpu_waited_us), session.machine.resources.cpus());
        let detail = format!("its threads use {used} % of its {cores} cores, and wait for another {waited} %");
        found.push(finding(CpuBusy, detail, None));
    }
}

/// Where it wanted to go and may not.
fn of_connections(connections: &[Connection]) -> Option<Finding> {
    // Those beyond its share have an event of their own, and another remedy.
    let is_denied = |connection: &&Connection| !matches!(&*connection.denied, "" | CONNECTIONS_USED_UP);
    let denied: Vec<&Connection> = connections.iter().filter(is_denied).collect();
    let last = denied.last()?;
    let mut destinations: Vec<String> = Vec::new();
    for connection in denied.iter().rev() {
        let name = if connection.name.is_empty() { &connection.destination } else { &connection.name };
        // Names are the sandbox's own words.
        let name: String = name.chars().filter(|character| !character.is_control()).collect();
        let told = format!("{name} ({})", connection.denied);
        if !destinations.contains(&told) {
            destinations.push(told);
        }
    }
    let more = match destinations.len().saturating_sub(DESTINATIONS_MAX) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    destinations.truncate(DESTINATIONS_MAX);
    let detail = format!("{} of the last {}: {}{more}", denied.len(), connections.len(), destinations.join(", "));
    Some(finding(FindingCode::DestinationsDenied, detail, Some(last.at)))
}

fn is_percent(part: u64, all: u64, percent: u64) -> bool {
    u128::from(part) * 100 >= u128::from(all) * u128::from(percent)
}

fn seconds(ms: u64) -> String {
    match ms {
        ms if ms < 10_000 => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
        ms => format!("{} s", ms / 1_000),
    }
}

#[cfg(test)]
#[path = "explain_tests.rs"]
mod tests;
