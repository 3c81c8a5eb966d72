//! `make bench`: Nagaya and its peers, measured in one run on one machine.
//!
//! Options: `--quick` (few rounds, for a look and for CI), `--name NAME` (directory below
//! `bench/results/`), `--only PART` (create, bursts, exec, files,
//! memory, sustained, pauses, snapshots, forks, volumes, previews, ssh, cli, peers).

mod cli;
mod life;
mod own;
mod peers;
mod previews;
mod samples;
mod ssh;

use std::path::Path;
use std::process::ExitCode;

use samples::Report;

/// How many rounds a measurement gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    Full,
    Quick,
}

impl Effort {
    pub fn of(self, full: usize, quick: usize) -> usize {
        match self {
            Self::Full => full,
            Self::Quick => quick,
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |option: &str| {
        let index = arguments.iter().position(|argument| argument == option)?;
        arguments.get(index + 1).cloned()
    };
    let effort = if arguments.iter().any(|argument| argument == "--quick") { Effort::Quick } else { Effort::Full };
    let name = value("--name").unwrap_or_else(|| if effort == Effort::Quick { "quick" } else { "latest" }.to_owned());
    let only = value("--only");
    let wants = |part: &str| only.as_ref().is_none_or(|only| only == part);

    let mut report = Report::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("results").join(name));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime can be made");
    runtime.block_on(async {
        if wants("create") {
            own::create(&mut report, effort).await;
        }
        if wants("bursts") {
            own::bursts(&mut report, effort).await;
        }
        if wants("exec") {
            own::exec(&mut report, effort).await;
        }
        if wants("files") {
            own::files(&mut report, effort).await;
        }
        if wants("memory") {
            own::memory(&mut report, effort).await;
        }
        if wants("sustained") {
            own::sustained(&mut report, effort).await;
        }
        if wants("pauses") {
            life::pauses(&mut report, effort).await;
        }
        if wants("snapshots") {
            life::snapshots(&mut report, effort).await;
        }
        if wants("forks") {
            life::forks(&mut report, effort).await;
        }
        if wants("volumes") {
            life::volumes(&mut report, effort).await;
        }
        if wants("previews") {
            previews::run(&mut report, effort).await;
        }
        if wants("ssh") {
            ssh::run(&mut report, effort).await;
        }
        if wants("cli") {
            cli::run(&mut report, effort).await;
        }
    });
    if wants("peers") {
        peers::run(&mut report, effort);
        println!();
        let runs = ["bubblewrap: run true", "crun: run true", "runc: run true", "runsc: run true", "docker: run true"];
        report.ratios("create + first exec, pools full", &runs);
        report.ratios(
            "sustained create, exec, terminate",
            &[
                "bubblewrap: sustained run true",
                "crun: sustained run true",
                "runc: sustained run true",
                "runsc: sustained run true",
            ],
        );
        report.ratios("pause, memory kept", &["runc: pause", "docker: pause"]);
        report.ratios("resume from memory", &["runc: resume", "docker: unpause"]);
        report.ratios("snapshot, 10 MB dirty", &["runsc: checkpoint", "docker: commit, 10 MB dirty"]);
        report.ratios("restore, 10 MB dirty: to first exec", &["runsc: restore"]);
        report.ratios("exec round trip of true", &["crun: exec true", "runc: exec true", "runsc: exec true"]);
    }
    println!("\nraw samples: {}", report.path().display());
    ExitCode::SUCCESS
}
