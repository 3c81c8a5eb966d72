//! Suites of named cases that share what is slow to make, and that tell what could not be run.
//!
//! Rust's own harness knows passed and failed only, and never drops what its tests share. A suite
//! is a program of its own (`harness = false`): it runs its cases one after the other, counts those
//! that this host cannot run apart from the passed ones, and cleans up at the end.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use futures::FutureExt;

/// No case needs this long, even on a busy machine.
const CASE_TIMEOUT: Duration = Duration::from_secs(180);

/// Set where the suite is in a network of its own already.
const INSIDE: &str = "NAGAYA_SUITE_NAMESPACE";

/// Why a case says nothing on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotRun(pub String);

/// What a case returns; a failure is a panic, as in any test.
pub type Outcome = Result<(), NotRun>;

/// A running suite.
pub struct Suite {
    title: &'static str,
    filters: Vec<String>,
    list_only: bool,
    passed: usize,
    failed: Vec<String>,
    not_run: Vec<(String, NotRun)>,
}

/// Runs a suite in a network namespace of its own, where it may have any address. Without root its cases count as not run.
pub fn run_in_own_network<'a>(
    title: &'static str,
    names: impl Iterator<Item = &'a str>,
    cases: impl AsyncFnOnce(&mut Suite),
) -> ExitCode {
    let mut suite = Suite::start(title);
    if suite.list_only {
        names.for_each(|name| println!("{name}: test"));
        return suite.finish();
    }
    if !rustix::process::geteuid().is_root() {
        names.for_each(|name| suite.skip(name, "only root can start the namespace driver"));
        return suite.finish();
    }
    if std::env::var_os(INSIDE).is_none() {
        let status = Command::new("unshare")
            .args(["--net", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(std::env::args_os().skip(1))
            .env(INSIDE, "1")
            .status()
            .unwrap();
        return if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(cases(&mut suite));
    suite.finish()
}

impl Suite {
    /// Takes name filters from the command line, as `cargo test -- NAME` gives them.
    pub fn start(title: &'static str) -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let list_only = arguments.iter().any(|argument| argument == "--list");
        let filters = arguments.into_iter().filter(|argument| !argument.starts_with('-')).collect();
        Self { title, filters, list_only, passed: 0, failed: Vec::new(), not_run: Vec::new() }
    }

    /// Whether anything is to be run at all; listing names is not.
    pub fn is_listing(&self) -> bool {
        self.list_only
    }

    pub fn wants(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter))
    }

    /// Runs one case, unless the command line leaves it out.
    pub async fn case(&mut self, name: &str, work: impl Future<Output = Outcome>) {
        if !self.wants(name) {
            return;
        }
        if self.list_only {
            println!("{name}: test");
            return;
        }
        let started = Instant::now();
        let outcome = tokio::time::timeout(CASE_TIMEOUT, AssertUnwindSafe(work).catch_unwind()).await;
        let time_ms = started.elapsed().as_millis();
        match outcome {
            Ok(Ok(Ok(()))) => {
                self.passed += 1;
                println!("{} {name} ... ok ({time_ms} ms)", self.title);
            }
            Ok(Ok(Err(reason))) => self.skip(name, &reason.0),
            Ok(Err(_)) => {
                println!("{} {name} ... FAILED ({time_ms} ms)", self.title);
                self.failed.push(name.to_owned());
            }
            Err(_) => {
                println!("{} {name} ... FAILED: not done after {CASE_TIMEOUT:?}", self.title);
                self.failed.push(name.to_owned());
            }
        }
    }

    /// Counts a case that this host cannot run.
    pub fn skip(&mut self, name: &str, reason: &str) {
        if !self.wants(name) {
            return;
        }
        println!("{} {name} ... not run: {reason}", self.title);
        self.not_run.push((name.to_owned(), NotRun(reason.to_owned())));
    }

    /// Prints the sums; fails when a case failed.
    pub fn finish(self) -> ExitCode {
        if self.list_only {
            return ExitCode::SUCCESS;
        }
        println!(
            "\n{}: {} passed, {} failed, {} not run",
            self.title,
            self.passed,
            self.failed.len(),
            self.not_run.len()
        );
        for name in &self.failed {
            println!("  failed: {name}");
        }
        for (name, reason) in &self.not_run {
            println!("  not run: {name}: {}", reason.0);
        }
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
