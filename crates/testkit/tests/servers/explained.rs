//! Sandboxes that were killed, slow, denied or over say why, from what really happened to them.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nagaya_api::nagaya::v1::{ExplainSessionRequest, Finding, ListSessionEventsRequest, SessionEvent};
use nagaya_api::tenki::v1;
use nagaya_testkit::{Client, Sandbox, Server, Wanted, instance_name};

/// Nothing here takes this long, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Takes more than any sandbox here has.
const GREEDY: [&str; 2] = ["tail", "/dev/zero"];
const LOOP: [&str; 3] = ["/bin/sh", "-c", "while :; do :; done"];

async fn explain(client: &Client, id: &str) -> Vec<Finding> {
    let request = ExplainSessionRequest { session_id: id.into() };
    client.own.explain_session(request).await.unwrap().findings.clone()
}

async fn events(client: &Client, id: &str) -> Vec<SessionEvent> {
    let request = ListSessionEventsRequest { session_id: id.into(), after: 0, page_size: 100 };
    client.own.list_session_events(request).await.unwrap().events.clone()
}

fn of<'a>(findings: &'a [Finding], code: &str) -> Option<&'a Finding> {
    findings.iter().find(|finding| finding.code == code)
}

/// Asks until there is such a finding.
async fn found(client: &Client, id: &str, code: &str) -> Finding {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let findings = explain(client, id).await;
        if let Some(finding) = of(&findings, code) {
            return finding.clone();
        }
        assert!(Instant::now() < deadline, "no {code}: {findings:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_says_why_it_is_as_it_is() {
    let server = Server::start();
    let client = Client::of(&server);
    killed_for_memory(&client).await;
    killed_for_memory_below_a_command(&client).await;
    slow(&client, server.data_dir()).await;
    denied(&client).await;
    full(&client).await;
    over(&client).await;
}

async fn killed_for_memory(client: &Client) {
    let sandbox = client.create(&Wanted { memory_mb: 128, ..Wanted::default() }).await.unwrap();
    let healthy = explain(client, &sandbox.id).await;
    assert_eq!((healthy.len(), healthy[0].code.as_str()), (1, "healthy"), "{healthy:?}");
    let exit = sandbox.run(&GREEDY).await.unwrap().exit;
    assert_eq!(exit.reason, "out_of_memory");
    let findings = explain(client, &sandbox.id).await;
    assert_eq!(findings[0].code, "out_of_memory", "{findings:?}");
    assert_eq!(findings[0].detail, "a process was killed because memory ran out while tail ran (limit 128 MB)");
    assert!(findings[0].at.is_set());
    let last = events(client, &sandbox.id).await.pop().unwrap();
    assert_eq!((last.kind.as_str(), last.details["limit_mb"].as_str()), ("out_of_memory", "128"));
    assert!(!last.execution_id.is_empty());
    // The server knows it also after it was started again, and counts it once.
    sandbox.terminate().await.unwrap();
    let findings = explain(client, &sandbox.id).await;
    let codes: Vec<&str> = findings.iter().map(|finding| finding.code.as_str()).collect();
    assert_eq!(codes, ["ended_by_request", "out_of_memory"]);
}

/// What a command started is killed; the command itself only fails.
async fn killed_for_memory_below_a_command(client: &Client) {
    let sandbox = client.create(&Wanted { memory_mb: 128, ..Wanted::default() }).await.unwrap();
    let exit = sandbox.run(&["/bin/sh", "-c", "tail /dev/zero; exit 3"]).await.unwrap().exit;
    assert_eq!((exit.exit_code, exit.reason.as_str()), (3, "exit"));
    let detail = found(client, &sandbox.id, "out_of_memory").await.detail;
    assert!(detail.contains("while sh ran"), "{detail}");
    // An ordinary failure afterwards is none of memory.
    let before = events(client, &sandbox.id).await.len();
    assert_eq!(sandbox.run(&["false"]).await.unwrap().exit.exit_code, 1);
    assert_eq!(events(client, &sandbox.id).await.len(), before);
    sandbox.terminate().await.unwrap();
    // A command that copes is none either, but the sandbox's count tells.
    let sandbox = client.create(&Wanted { memory_mb: 128, ..Wanted::default() }).await.unwrap();
    assert_eq!(sandbox.run(&["/bin/sh", "-c", "tail /dev/zero; exit 0"]).await.unwrap().exit.exit_code, 0);
    assert_eq!(events(client, &sandbox.id).await.len(), 2);
    assert_eq!(
        found(client, &sandbox.id, "out_of_memory").await.detail,
        "1 since the sandbox started; its limit is 128 MB"
    );
    sandbox.terminate().await.unwrap();
}

async fn slow(client: &Client, data_dir: &Path) {
    let sandbox = client.create(&Wanted::default()).await.unwrap();
    let endless = sandbox.start(&LOOP, false).await.unwrap();
    let busy = found(client, &sandbox.id, "cpu_busy").await;
    assert!(busy.detail.contains("of its 1 cores"), "{busy:?}");
    assert!(of(&explain(client, &sandbox.id).await, "cpu_throttled").is_none());
    // A smaller share than the sandbox's processors amount to, as a host with less to give would have it.
    let groups = quotas(&std::fs::canonicalize(data_dir).unwrap());
    assert!(!groups.is_empty(), "no limits of processors were found");
    for (file, share) in groups {
        std::fs::write(&file, share).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
    let throttled = found(client, &sandbox.id, "cpu_throttled").await;
    assert!(throttled.detail.contains("it has 1 cores"), "{throttled:?}");
    drop(endless);
    sandbox.terminate().await.unwrap();
}

/// The files that hold every sandbox's share of processors, and what makes it a twentieth of one.
fn quotas(data_dir: &Path) -> Vec<(PathBuf, &'static str)> {
    let instance = instance_name(data_dir);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let roots = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup").then(|| Path::new(path).join("nagaya").join(&instance))
    });
    let slots = roots.filter_map(|root| std::fs::read_dir(root).ok()).flatten().flatten();
    let files = slots.flat_map(|slot| {
        let commands = slot.path().join("commands");
        [(commands.join("cpu.max"), "5000 100000"), (commands.join("cpu.cfs_quota_us"), "5000")]
    });
    files.filter(|(file, _)| file.exists()).collect()
}

async fn denied(client: &Client) {
    let sandbox = client.create(&Wanted { outbound: true, ..Wanted::default() }).await.unwrap();
    let reach = "import socket; socket.create_connection(('10.255.255.1', 4321), timeout=0.2)";
    assert_ne!(sandbox.run(&["python3", "-c", reach]).await.unwrap().exit.exit_code, 0);
    let denied = found(client, &sandbox.id, "destinations_denied").await;
    assert!(denied.detail.contains("10.255.255.1:4321"), "{denied:?}");
    sandbox.terminate().await.unwrap();
}

async fn full(client: &Client) {
    let sandbox = client.create(&Wanted::default()).await.unwrap();
    let line = "df --output=size -m /home/tenki | tail -1";
    let size_mb: u64 = sandbox.shell(line, false).await.trim().parse().unwrap();
    sandbox.shell(&format!("fallocate -l {}M large", size_mb * 95 / 100), false).await;
    let full = found(client, &sandbox.id, "disk_nearly_full").await;
    assert!(full.detail.ends_with("MB are used"), "{full:?}");
    sandbox.terminate().await.unwrap();
}

async fn over(client: &Client) {
    let sandbox = client.create(&Wanted::default()).await.unwrap();
    end_soon(client, &sandbox).await;
    let deadline = Instant::now() + PATIENCE;
    while client.session(&sandbox.id).await.unwrap().state.as_known() != Some(v1::SessionState::Terminated) {
        assert!(Instant::now() < deadline, "the session outlives its deadline");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let findings = explain(client, &sandbox.id).await;
    assert_eq!((findings.len(), findings[0].code.as_str()), (1, "ended_at_max_duration"), "{findings:?}");
    let last = events(client, &sandbox.id).await.pop().unwrap();
    assert_eq!((last.kind.as_str(), last.details["reason"].as_str()), ("terminated", "max_duration"));
}

/// Gives the session a maximum duration that is over already.
async fn end_soon(client: &Client, sandbox: &Sandbox) {
    let duration = buffa_types::google::protobuf::Duration { seconds: 1, ..Default::default() };
    let request = v1::UpdateSessionRequest {
        session_id: sandbox.id.clone(),
        max_duration: duration.into(),
        ..Default::default()
    };
    client.control.update_session(request).await.unwrap();
}
