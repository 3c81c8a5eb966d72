//! The main test of the engine: seeded schedules of clients, sandboxes that die, steps that fail,
//! and crashes between any two effects, against a model of what must be true.
//!
//! `NAGAYA_SIMULATION_SCHEDULES` is how many schedules run (default 2,000), `NAGAYA_SIMULATION_SEED`
//! the seed of the first (default random); the next ones count up from it.

// On a paused runtime tokio's time is virtual, and is what the fake clock shows.
#![allow(clippy::disallowed_methods)]

#[path = "../common/audit.rs"]
mod audit;
mod clients;
mod keepers;
mod model;
mod viewers;
mod world;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;

use world::{Bug, run_schedule};

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

/// A seed that nothing repeats.
fn fresh_seed() -> u64 {
    // Shortened, so that it can be read over the phone.
    RandomState::new().build_hasher().finish() % 1_000_000_000
}

/// Prints past the test harness, which keeps what passing tests print to itself.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn no_schedule_breaks_a_promise() {
    let schedules = number("NAGAYA_SIMULATION_SCHEDULES").unwrap_or(2_000);
    let base = number("NAGAYA_SIMULATION_SEED").unwrap_or_else(fresh_seed);
    say(&format!("{schedules} schedules from NAGAYA_SIMULATION_SEED={base}"));
    let mut totals = world::Totals::default();
    for seed in base..base + schedules {
        match run_schedule(seed, None) {
            Ok(schedule) => totals.add(&schedule),
            Err(failure) => panic!(
                "schedule {seed} broke a promise: {failure}\nreproduce it with:\nNAGAYA_SIMULATION_SEED={seed} \
                 NAGAYA_SIMULATION_SCHEDULES=1 cargo test -p nagaya-engine --test simulation no_schedule -- --nocapture"
            ),
        }
    }
    say(&format!("{totals:?}"));
    if schedules >= 1_000 {
        totals.check_coverage(schedules >= 10_000);
    }
}

#[test]
fn a_seed_repeats_its_schedule_exactly() {
    for seed in 0..20 {
        let [first, second] = [(), ()].map(|()| run_schedule(seed, None).expect("these schedules pass").trace);
        assert_eq!(first, second, "seed {seed}");
    }
}

/// How many of some schedules notice a bug.
fn noticed(bug: Bug) -> usize {
    (0..300).filter(|seed| run_schedule(*seed, Some(bug)).is_err()).count()
}

#[test]
fn the_simulator_notices_a_server_that_leaves_leftovers() {
    assert!(noticed(Bug::NoSweep) > 0);
}

#[test]
fn the_simulator_notices_a_store_that_loses_what_it_acknowledged() {
    assert!(noticed(Bug::LostRecord) > 0);
}

#[test]
fn the_simulator_notices_events_that_are_lost_without_their_transition() {
    assert!(noticed(Bug::LostEvent) > 0);
}

#[test]
fn the_simulator_notices_a_clock_that_does_not_wake_sleepers() {
    assert!(noticed(Bug::DeafClock) > 0);
}
