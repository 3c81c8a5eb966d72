use std::fs::File;
use std::io::Read;

use nagaya_api::error::Code;
use nagaya_engine::ports::{ProcessInput, WriteOptions};

use super::*;

fn file(directory: &TempDir, name: &str, content: &str) -> File {
    let path = directory.path().join(name);
    std::fs::write(&path, content).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

#[tokio::test]
async fn every_command_enters_the_control_groups_before_it_runs() {
    let directory = TempDir::new().unwrap();
    let groups = [file(&directory, "one", ""), file(&directory, "two", "")];
    let agent = Agent::start_with(&[("cgroup-procs", groups[0].as_fd()), ("cgroup-procs", groups[1].as_fd())]);
    let link = agent.connect().await;
    assert_eq!(run(&link, command(&["true"])).await.1.code, 0);
    for name in ["one", "two"] {
        assert_eq!(std::fs::read_to_string(directory.path().join(name)).unwrap(), "0");
    }
}

#[tokio::test]
async fn a_command_joins_the_group_with_the_fewest_processes_and_equals_take_turns() {
    let directory = TempDir::new().unwrap();
    let files: Vec<[File; 2]> = ["9", "3", "3", "max"]
        .iter()
        .enumerate()
        .map(|(number, count)| {
            [file(&directory, &format!("procs{number}"), ""), file(&directory, &format!("count{number}"), count)]
        })
        .collect();
    let named =
        files.iter().flat_map(|[procs, count]| [("group-procs", procs.as_fd()), ("group-processes", count.as_fd())]);
    let agent = Agent::start_with(&named.collect::<Vec<_>>());
    let link = agent.connect().await;
    for _ in 0..8 {
        assert_eq!(run(&link, command(&["true"])).await.1.code, 0);
    }
    let joined = |number: usize| std::fs::read(directory.path().join(format!("procs{number}"))).unwrap().len();
    assert_eq!((joined(0), joined(3), joined(1) + joined(2)), (0, 0, 8));
    assert!(joined(1) > 0 && joined(2) > 0, "one of two equals was never used");
}

#[tokio::test]
async fn a_command_that_cannot_enter_its_control_group_does_not_run() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let agent = Agent::start_with(&[("cgroup-procs", full.as_fd())]);
    let link = agent.connect().await;
    let trace = agent.path("trace");
    for _ in 0..3 {
        let error = link.run(command(&["touch", &trace])).await.map(|_| ()).unwrap_err();
        assert_eq!((error.code, error.errno), (Code::CapacityUnavailable, libc::ENOSPC));
    }
    assert_eq!(link.stat(&trace).await.unwrap(), None);
}

#[tokio::test]
async fn it_says_when_it_is_ready_and_shows_the_memory_of_the_sandbox() {
    let directory = TempDir::new().unwrap();
    let usage = file(&directory, "usage", "536870912\n");
    let limit = file(&directory, "limit", "1073741824\n");
    let meminfo = file(&directory, "meminfo", "");
    let (mut ready, control) = std::io::pipe().unwrap();
    let agent = Agent::start_with(&[
        ("memory-usage", usage.as_fd()),
        ("memory-limit", limit.as_fd()),
        ("meminfo", meminfo.as_fd()),
        ("control", control.as_fd()),
    ]);
    drop(control);
    let mut said = Vec::new();
    // Ends because the agent closes its end: no command could hold it open.
    ready.read_to_end(&mut said).unwrap();
    assert_eq!(said.len(), 1);
    let shown = || std::fs::read_to_string(directory.path().join("meminfo")).unwrap();
    assert!(shown().contains("MemTotal:            1048576 kB\nMemFree:              524288 kB\n"), "{}", shown());

    std::fs::write(directory.path().join("usage"), "1073741824\n").unwrap();
    let link = agent.connect().await;
    let mut wanted = command(&["cat"]);
    wanted.stdin = true;
    let process = link.run(wanted).await.unwrap();
    until("it is refreshed", || shown().contains("MemFree:                   0 kB\n")).await;
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    finish(process).await;
}

#[tokio::test]
async fn arguments_it_does_not_understand_stop_it() {
    let without_user = &["--listen-fd=9"][..];
    for arguments in [without_user, &["--listen-fd=0"], &["--listen-fd=x"], &["--user=x:0:a"], &["--what=1"], &[]] {
        let program = crate::programs::agent().unwrap();
        let _alone = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
        let output = std::process::Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        assert!(output.stderr.starts_with(b"nagaya-agent: "), "{arguments:?}");
    }
}

#[tokio::test]
async fn it_is_small_again_after_heavy_use() {
    assert!(rustix::fs::fstat(crate::programs::agent().unwrap()).unwrap().st_size <= 4 << 20);
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut transfers = tokio::task::JoinSet::new();
    for number in 0..8 {
        let link = link.clone();
        transfers.spawn(async move {
            let name = format!("file{number}");
            let writer = link.write_file(&name, WriteOptions { mode: 0, truncate: true, sync: false }).await.unwrap();
            for _ in 0..200 {
                writer.chunks.send(Bytes::from(vec![1; 65_536])).await.unwrap();
            }
            writer.finish().await.unwrap();
            let mut reader = link.read_file(&name, 0, 0, 0).await.unwrap();
            while reader.chunks.recv().await.is_some() {}
        });
    }
    while let Some(result) = transfers.join_next().await {
        result.unwrap();
    }
    until("its memory is given back", || agent.own_memory_kib() <= 768).await;
}

#[tokio::test]
async fn an_agent_that_nobody_took_ends_with_its_lifeline() {
    let (lifeline, held) = std::io::pipe().unwrap();
    let mut agent = Agent::start_with(&[("lifeline", lifeline.as_fd())]);
    drop((lifeline, held));
    let status = tokio::task::spawn_blocking(move || agent.process.wait().unwrap()).await.unwrap();
    assert!(status.success());
}

#[tokio::test]
async fn an_agent_that_was_taken_lives_on_without_its_lifeline() {
    let directory = TempDir::new().unwrap();
    let meminfo = file(&directory, "meminfo", "");
    std::fs::create_dir(directory.path().join("processors")).unwrap();
    let processors = File::open(directory.path().join("processors")).unwrap();
    let (lifeline, held) = std::io::pipe().unwrap();
    let shown = [("meminfo", meminfo.as_fd()), ("processors", processors.as_fd())];
    let agent = Agent::start_with(&[&[("lifeline", lifeline.as_fd())], &shown[..]].concat());
    let link = agent.connect().await;
    drop((lifeline, held));
    assert_eq!(link.stat("/nowhere").await.unwrap(), None);
    drop(link);
    let again = agent.connect().await;
    assert_eq!(again.stat("/nowhere").await.unwrap(), None);
    let shown = std::fs::read_to_string(directory.path().join("processors/online")).unwrap();
    assert!(shown.starts_with(|first: char| first.is_ascii_digit()) && shown.ends_with('\n'), "{shown:?}");
}
