//! The command line beside the SDK that it stands on.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nagaya_client::ClientOptions;
use nagaya_testkit::{Client, Server, Wanted, binary};

use crate::Effort;
use crate::samples::{Report, milliseconds};

const VERSION: &str = "command line: --version";
const EXEC: &str = "command line: exec true";
const SDK: &str = "SDK: connect and exec true";
/// Tells the memory of another program; its own does not count.
const TIME: &str = "/usr/bin/time";

pub async fn run(report: &mut Report, effort: Effort) {
    tokio::task::block_in_place(|| version(report, effort.of(100, 10)));
    let server = Server::start_with("[pools]\nslots_ready = 2\n");
    let sandbox = Client::of(&server).create(&Wanted::default()).await.expect("the server has room");
    let mut samples = [Vec::new(), Vec::new()];
    // They take turns, so that the machine's moods hit both.
    for round in 0..effort.of(100, 10) + 3 {
        let start = Instant::now();
        sdk(&server, &sandbox.id).await;
        let by_sdk = milliseconds(start.elapsed());
        let start = Instant::now();
        tokio::task::block_in_place(|| command_line(&server, &sandbox.id));
        let by_command_line = milliseconds(start.elapsed());
        if round >= 3 {
            samples[0].push(by_command_line);
            samples[1].push(by_sdk);
        }
    }
    let [by_command_line, by_sdk] = samples;
    report.timing(EXEC, by_command_line);
    report.timing(SDK, by_sdk);
    let median = |report: &Report, name: &str| report.value(name).expect("it was measured above");
    report.figure("exec true: added by the command line, p50", median(report, EXEC) - median(report, SDK), "ms");
    sandbox.terminate().await.expect("terminating works");
}

fn version(report: &mut Report, rounds: usize) {
    let mut samples = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        let status = Command::new(binary()).arg("--version").stdout(Stdio::null()).status();
        assert!(status.is_ok_and(|status| status.success()), "it tells its version");
        samples.push(milliseconds(start.elapsed()));
    }
    report.timing(VERSION, samples);
    if !Path::new(TIME).exists() {
        return report.not_run("command line: --version, memory", "package time is not installed");
    }
    let told = Command::new(TIME).args(["-f", "%M"]).arg(binary()).arg("--version").output().expect("it runs");
    let text = String::from_utf8_lossy(&told.stderr).trim().parse::<f64>();
    report.figure("command line: --version, memory", text.expect("one number, KiB") / 1024.0, "MiB");
}

/// As a program does that begins with nothing: connect, get a certificate, run.
async fn sdk(server: &Server, id: &str) {
    let options = ClientOptions::default().endpoint(Some(server.endpoint().to_owned())).token(Some(server.api_key()));
    let client = nagaya_client::Client::new(options).expect("address and key are valid");
    let output = client.session(id).command(["true"]).output().await.expect("the sandbox runs");
    assert!(output.is_success(), "true succeeds");
}

fn command_line(server: &Server, id: &str) {
    let status = Command::new(binary())
        .args(["sandbox", "exec", "--session", id, "true"])
        .env("TENKI_API_ENDPOINT", server.endpoint())
        .env("TENKI_API_KEY", server.api_key())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.is_ok_and(|status| status.success()), "true succeeds");
}
