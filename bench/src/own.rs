//! Nagaya itself, through its API on loopback.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use nagaya_api::tenki::v1;
use nagaya_testkit::{Client, Sandbox, Server, Wanted};

use crate::Effort;
use crate::samples::{Report, milliseconds};

const TRUE: &[&str] = &["/bin/true"];

fn wanted() -> Wanted {
    Wanted { outbound: true, ..Wanted::default() }
}

/// From the call to the exit of the first command.
async fn create_and_run(client: &Client) -> (Sandbox, f64) {
    let start = Instant::now();
    let sandbox = client.create(&wanted()).await.expect("the server has room");
    let finished = sandbox.run(TRUE).await.expect("the sandbox runs commands");
    assert_eq!(finished.exit.exit_code, 0, "{}", finished.describe());
    (sandbox, milliseconds(start.elapsed()))
}

async fn end(sandboxes: Vec<Sandbox>) {
    futures::stream::iter(sandboxes)
        .for_each_concurrent(8, |sandbox| async move { sandbox.terminate().await.expect("terminating works") })
        .await;
}

/// Waits until nothing is left of ended sandboxes and the pool is full again.
async fn settle(server: &Server, ready: usize) {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let slots = ready_slots(server.endpoint());
        let sandboxes = fs::read_dir(server.storage().join("sandboxes")).map_or(0, |entries| entries.count());
        if slots >= ready && sandboxes == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "the pools did not fill: {slots} of {ready}; {sandboxes} sandboxes left");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the server's metrics say about its pool.
fn ready_slots(endpoint: &str) -> usize {
    let address = endpoint.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).expect("the server answers");
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("the server answers");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the server answers");
    let line = answer.lines().find_map(|line| line.strip_prefix("nagaya_pool_ready{pool=\"slots\"}"));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

fn pools(ready: usize) -> String {
    format!("[pools]\nslots_ready = {ready}\nisolated_slots_ready = 0\n")
}

pub async fn create(report: &mut Report, effort: Effort) {
    let rounds = effort.of(100, 10);
    for (name, ready) in [("create + first exec, pools empty", 0), ("create + first exec, pools full", 16)] {
        let server = Server::start_with(&pools(ready));
        let client = Client::of(&server);
        let mut samples = Vec::new();
        let mut terminate = Vec::new();
        for round in 0..rounds + 3 {
            settle(&server, ready).await;
            let (sandbox, time) = create_and_run(&client).await;
            let start = Instant::now();
            sandbox.terminate().await.expect("terminating works");
            // The first few find caches cold.
            if round >= 3 {
                samples.push(time);
                terminate.push(milliseconds(start.elapsed()));
            }
        }
        report.timing(name, samples);
        if ready > 0 {
            report.timing("terminate", terminate);
        }
    }
}

pub async fn bursts(report: &mut Report, effort: Effort) {
    let large = effort.of(100, 20);
    for (burst, ready) in [(10, 16), (large, 16), (large, large + 16)] {
        let server = Server::start_with(&pools(ready));
        let client = Client::of(&server);
        settle(&server, ready).await;
        end(vec![create_and_run(&client).await.0]).await;
        settle(&server, ready).await;
        let start = Instant::now();
        let made = futures::future::join_all((0..burst).map(|_| create_and_run(&client))).await;
        let whole = milliseconds(start.elapsed());
        let (sandboxes, samples): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        report.timing(&format!("burst of {burst}, pool of {ready}: each"), samples);
        report.figure(&format!("burst of {burst}, pool of {ready}: all done after"), whole, "ms");
        end(sandboxes).await;
    }
}

pub async fn exec(report: &mut Report, effort: Effort) {
    let server = Server::start_with(&pools(2));
    let client = Client::of(&server);
    let (sandbox, _) = create_and_run(&client).await;
    let rounds = effort.of(500, 50);
    let (mut samples, mut bare) = (Vec::new(), Vec::new());
    // Side by side, so that both see the same machine.
    for _ in 0..rounds {
        let start = Instant::now();
        sandbox.run(TRUE).await.expect("the sandbox runs commands");
        samples.push(milliseconds(start.elapsed()));
        let start = Instant::now();
        let status = tokio::task::block_in_place(|| std::process::Command::new(TRUE[0]).status());
        assert!(status.is_ok_and(|status| status.success()));
        bare.push(milliseconds(start.elapsed()));
    }
    report.timing("exec round trip of true", samples);
    report.timing("bare spawn of true on the host", bare);
    end(vec![sandbox]).await;
}

pub async fn files(report: &mut Report, effort: Effort) {
    let server = Server::start_with(&pools(2));
    let client = Client::of(&server);
    let wanted = Wanted { memory_mb: 2_048, cpu_cores: 2, ..wanted() };
    let sandbox = client.create(&wanted).await.expect("the server has room");
    let size = effort.of(256, 32) << 20;
    let before_kib = memory_kib(server.pid(), "VmHWM:");
    for round in 0..effort.of(3, 1) {
        let start = Instant::now();
        write(&sandbox, size).await;
        report.figure(&format!("file write, round {}", round + 1), speed(size, start), "MB/s");
        let start = Instant::now();
        let read = read(&sandbox).await;
        assert_eq!(read, size);
        report.figure(&format!("file read, round {}", round + 1), speed(size, start), "MB/s");
    }
    let grown_kib = memory_kib(server.pid(), "VmHWM:").saturating_sub(before_kib);
    report.figure("server's peak memory while moving files", grown_kib as f64 / 1024.0, "MiB more");
    end(vec![sandbox]).await;
}

fn speed(bytes: usize, start: Instant) -> f64 {
    bytes as f64 / 1e6 / start.elapsed().as_secs_f64()
}

async fn write(sandbox: &Sandbox, size: usize) {
    const CHUNK: usize = 512 << 10;
    use v1::write_file_stream_request::Payload;
    let frame = |payload| v1::SandboxSessionDataPlaneServiceWriteFileStreamRequest {
        frame: v1::WriteFileStreamRequest { payload: Some(payload) }.into(),
    };
    let start = v1::WriteFileStreamStart {
        session_id: sandbox.id.clone(),
        path: "large".into(),
        truncate: true,
        ..Default::default()
    };
    let content = Bytes::from(vec![0x5a; CHUNK]);
    let chunks = (0..size / CHUNK).map(move |_| frame(Payload::Data(content.clone())));
    let frames = std::iter::once(frame(Payload::Start(Box::new(start)))).chain(chunks);
    let answer = sandbox.data.write_file_stream(futures::stream::iter(frames)).await.expect("writing works");
    assert_eq!(answer.response.bytes_written, size as i64);
}

async fn read(sandbox: &Sandbox) -> usize {
    let request =
        v1::ReadFileStreamRequest { session_id: sandbox.id.clone(), path: "large".into(), ..Default::default() };
    let request = v1::SandboxSessionDataPlaneServiceReadFileStreamRequest { request: request.into() };
    let mut stream = sandbox.data.read_file_stream(request).await.expect("reading works");
    let mut total = 0;
    while let Some(message) = stream.message().await.expect("reading works") {
        total += message.response.data.len();
    }
    total
}

pub async fn memory(report: &mut Report, effort: Effort) {
    memory_with(report, effort.of(200, 10)).await;
    if effort == Effort::Full {
        memory_with(report, 1_000).await;
    }
}

async fn memory_with(report: &mut Report, count: usize) {
    let room = format!("[engine]\nsessions_max = {count}\n[namespace]\nslots_max = {count}\n");
    let server = Server::start_with(&(pools(0) + &room));
    let client = Client::of(&server);
    let idle_kib = memory_kib(server.pid(), "VmRSS:");
    let made: Vec<_> =
        futures::stream::iter(0..count).map(|_| create_and_run(&client)).buffer_unordered(8).collect().await;
    let sandboxes: Vec<Sandbox> = made.into_iter().map(|(sandbox, _)| sandbox).collect();
    let instance = nagaya_testkit::instance_name(server.data_dir());
    let agents = processes(&instance);
    assert_eq!(agents.len(), count, "every sandbox has one process when it is idle");
    let private: u64 = agents.iter().map(|pid| private_kib(*pid)).sum();
    report.figure(&format!("private memory of an idle sandbox, of {count}"), private as f64 / count as f64, "KiB");
    let groups: u64 = group_bytes(&instance).iter().sum();
    report.figure(
        &format!("control group of an idle sandbox, of {count}"),
        groups as f64 / count as f64 / 1024.0,
        "KiB",
    );
    report.figure("server without sandboxes", idle_kib as f64 / 1024.0, "MiB");
    report.figure(&format!("server with {count} sandboxes"), memory_kib(server.pid(), "VmRSS:") as f64 / 1024.0, "MiB");
    end(sandboxes).await;
}

pub async fn sustained(report: &mut Report, effort: Effort) {
    let count = effort.of(400, 30);
    let server = Server::start_with(&pools(32));
    let client = Client::of(&server);
    settle(&server, 32).await;
    // Many more than are ready: it is the making that is measured.
    let start = Instant::now();
    let made: Vec<Sandbox> = futures::stream::iter(0..count)
        .map(|_| async { client.create(&wanted()).await.expect("the server has room") })
        .buffer_unordered(8)
        .collect()
        .await;
    report.figure("sustained create", count as f64 / start.elapsed().as_secs_f64(), "per second");
    end(made).await;
    settle(&server, 32).await;
    let start = Instant::now();
    let work = |_| async {
        let (sandbox, time) = create_and_run(&client).await;
        sandbox.terminate().await.expect("terminating works");
        time
    };
    let samples: Vec<f64> = futures::stream::iter(0..count).map(work).buffer_unordered(8).collect().await;
    report.figure("sustained create, exec, terminate", count as f64 / start.elapsed().as_secs_f64(), "per second");
    report.timing("create + first exec under that load", samples);
}

fn memory_kib(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    number_after(&status, field)
}

fn private_kib(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    number_after(&text, "Private_Clean:") + number_after(&text, "Private_Dirty:")
}

fn number_after(text: &str, field: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// The groups of one server's sandboxes, where memory is counted.
fn slots(instance: &str) -> Vec<PathBuf> {
    let roots = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"];
    let parent = roots.iter().map(|root| Path::new(root).join("nagaya").join(instance)).find(|path| path.is_dir());
    let entries = parent.and_then(|parent| fs::read_dir(parent).ok()).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn processes(instance: &str) -> Vec<u32> {
    let files = slots(instance)
        .into_iter()
        .flat_map(|slot| ["agent", "commands"].map(|part| slot.join(part).join("cgroup.procs")));
    files
        .flat_map(|file| {
            let text = fs::read_to_string(file).unwrap_or_default();
            text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<u32>>()
        })
        .collect()
}

fn group_bytes(instance: &str) -> Vec<u64> {
    let sizes = slots(instance).into_iter().map(|slot| {
        let part = |part: &str| {
            ["memory.current", "memory.usage_in_bytes"]
                .iter()
                .find_map(|name| fs::read_to_string(slot.join(part).join(name)).ok()?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        part("agent") + part("commands")
    });
    sizes.collect()
}
