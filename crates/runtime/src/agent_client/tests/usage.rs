//! What the agent tells of the sandbox's resources; here it is one among the host's processes.

use std::fs::File;
use std::io::{Seek, Write};

use nagaya_engine::ports::ExitReason;

use super::*;

const MIB: u64 = 1 << 20;

fn file(text: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[tokio::test]
async fn figures_are_those_of_the_control_groups_that_the_agent_was_given() {
    let [used, limit] = [300 * MIB, 512 * MIB].map(|bytes| file(&format!("{bytes}\n")));
    let statistics = file(&format!("anon 1\nactive_file {}\ninactive_file {}\n", 60 * MIB, 40 * MIB));
    let events = file("low 0\noom 9\noom_kill 3\noom_group_kill 1\n");
    let most = file("128\n");
    let groups = ["5\n", "2\n"].map(|processes| (file(""), file(processes)));
    let mut descriptors = vec![
        ("memory-usage", used.as_fd()),
        ("memory-limit", limit.as_fd()),
        ("memory-statistics", statistics.as_fd()),
        ("memory-events", events.as_fd()),
        ("processes-limit", most.as_fd()),
    ];
    for (join, processes) in &groups {
        descriptors.extend([("group-procs", join.as_fd()), ("group-processes", processes.as_fd())]);
    }
    let agent = Agent::start_with(&descriptors);
    let link = agent.connect().await;
    let usage = link.usage().await.unwrap();
    assert_eq!((usage.memory_bytes, usage.memory_limit_bytes), (200 * MIB, 512 * MIB));
    assert_eq!((usage.memory_kills, usage.processes, usage.processes_max), (3, 7, 128));
    let disk = rustix::fs::statvfs("/").unwrap();
    assert_eq!(usage.disk_size_bytes, disk.f_blocks * disk.f_frsize);
    assert!((1..=usage.disk_size_bytes).contains(&usage.disk_used_bytes), "{usage:?}");
    assert_eq!((usage.kept_output_bytes, link.kept_output().await.unwrap()), (0, 0));
}

#[tokio::test]
async fn without_control_groups_they_are_those_of_the_machine() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut endless = link.run(shell("echo go; while :; do :; done")).await.unwrap();
    assert!(endless.events.recv().await.is_some());
    let usage = link.usage().await.unwrap();
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
    assert_eq!(usage.memory_limit_bytes, total);
    assert!((1..total).contains(&usage.memory_bytes), "{usage:?}");
    assert!((2..=usage.processes_max).contains(&usage.processes), "{usage:?}");
    assert!(usage.cpu_window_us >= 250_000, "{usage:?}");
    // On a busy host it waits for what it does not get.
    assert!(usage.cpu_used_us + usage.cpu_waited_us >= usage.cpu_window_us / 2, "{usage:?}");
}

#[tokio::test]
async fn output_that_is_kept_is_told() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let id = nagaya_api::ids::ExecutionId::new(1, [0; 10]);
    link.run_detached(id, shell("head -c 100000 /dev/zero")).await.unwrap();
    let mut events = link.follow_exit(id).await.unwrap();
    while events.recv().await.is_some() {}
    assert!(link.usage().await.unwrap().kept_output_bytes >= 100_000);
}

#[tokio::test]
async fn an_agent_counts_kills_for_want_of_memory_itself() {
    let mut events = file("oom_kill 7\n");
    let agent = Agent::start_with(&[("memory-events", events.as_fd())]);
    let link = agent.connect().await;
    let (_, exit) = run(&link, shell("kill -KILL $$")).await;
    assert_eq!((exit.reason, exit.memory_kills), (ExitReason::Signaled, 0));
    let mut kill = |number: u32| {
        events.rewind().unwrap();
        writeln!(events, "oom_kill {number}").unwrap();
    };
    for (script, number, reason, kills) in [
        ("echo go; read go; kill -KILL $$", 8, ExitReason::OutOfMemory, 1),
        // It stands it that others are killed, and fails; or does not.
        ("echo go; read go; exit 3", 10, ExitReason::Exited, 2),
        ("echo go; read go; true", 11, ExitReason::Exited, 0),
    ] {
        let mut process = link.run(Command { stdin: true, ..shell(script) }).await.unwrap();
        assert!(process.events.recv().await.is_some());
        kill(number);
        process.input.send(nagaya_engine::ports::ProcessInput::StdinClose).await.unwrap();
        let (_, exit) = finish(process).await;
        assert_eq!((exit.reason, exit.memory_kills), (reason, kills), "{script}");
    }
}
