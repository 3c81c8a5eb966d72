use nagaya_api::error::Code;
use nagaya_api::ids::ExecutionId;

use super::*;

fn id(number: u8) -> ExecutionId {
    ExecutionId::new(1_700_000_000_000, [number; 10])
}

#[tokio::test]
async fn output_is_followed_from_the_beginning_live_and_to_the_exit() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let script =
        format!("echo one; echo two >&2; while [ ! -e {} ]; do sleep 0.01; done; echo three; exit 4", agent.path("go"));
    let pid = link.run_detached(id(1), shell(&script)).await.unwrap();
    assert!(is_alive(pid));
    let mut early = link.follow(id(1)).await.unwrap();
    assert!(matches!(early.recv().await, Some(ProcessEvent::Stdout(_) | ProcessEvent::Stderr(_))));
    std::fs::write(agent.home().join("go"), "").unwrap();
    assert_eq!(collect(&mut early).await.exit.unwrap().code, 4);

    let late = collect(&mut link.follow(id(1)).await.unwrap()).await;
    assert_eq!((late.stdout.as_slice(), late.stderr.as_slice()), (&b"one\nthree\n"[..], &b"two\n"[..]));
    assert_eq!(late.exit.unwrap().code, 4);
}

#[tokio::test]
async fn repeating_a_start_does_not_start_twice() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let wanted = shell(&format!("echo x >> {}; sleep 1000", agent.path("trace")));
    let (first, second) =
        tokio::join!(link.run_detached(id(1), wanted.clone()), link.run_detached(id(1), wanted.clone()));
    assert_eq!(first.unwrap(), second.unwrap());
    let again = agent.connect().await;
    again.run_detached(id(1), wanted).await.unwrap();
    until("it has run", || std::fs::read(agent.home().join("trace")).is_ok_and(|trace| trace == b"x\n")).await;
    again.forget(id(1)).await.unwrap();
}

#[tokio::test]
async fn output_survives_the_connection() {
    let agent = Agent::start();
    let first = agent.connect().await;
    let script =
        format!("head -c 5000000 /dev/zero; echo x > {}; head -c 5000000 /dev/zero; exit 2", agent.path("trace"));
    first.run_detached(id(1), shell(&script)).await.unwrap();
    drop(first);
    let second = agent.connect().await;
    let ended = collect(&mut second.follow(id(1)).await.unwrap()).await;
    assert_eq!((ended.stdout.len(), ended.exit.unwrap().code), (10_000_000, 2));
}

#[tokio::test]
async fn forgetting_ends_what_runs_and_drops_what_was_kept() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let pid = link.run_detached(id(1), shell("sleep 1000")).await.unwrap();
    link.forget(id(1)).await.unwrap();
    until("it has ended", || !is_alive(pid)).await;
    assert_eq!(link.follow(id(1)).await.unwrap_err().code, Code::ExecutionNotFound);
    link.forget(id(9)).await.unwrap();
}

#[tokio::test]
async fn the_oldest_finished_executions_give_way() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let lasting = link.run_detached(id(200), command(&["sleep", "1000"])).await.unwrap();
    for number in 0..66 {
        link.run_detached(id(number), command(&["echo", "x"])).await.unwrap();
        collect(&mut link.follow(id(number)).await.unwrap()).await;
    }
    assert_eq!(link.follow(id(0)).await.unwrap_err().code, Code::ExecutionNotFound);
    assert_eq!(link.follow(id(1)).await.unwrap_err().code, Code::ExecutionNotFound);
    assert_eq!(collect(&mut link.follow(id(2)).await.unwrap()).await.stdout, b"x\n");
    assert!(is_alive(lasting));
    link.forget(id(200)).await.unwrap();
}

#[tokio::test]
async fn a_command_that_cannot_start_leaves_no_execution() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let error = link.run_detached(id(1), command(&["surely-no-such-command"])).await.unwrap_err();
    assert_eq!(error.code, Code::CommandNotFound);
    assert_eq!(link.follow(id(1)).await.unwrap_err().code, Code::ExecutionNotFound);
}

#[tokio::test]
async fn a_timeout_ends_a_detached_command_too() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell("echo begun; sleep 1000");
    wanted.timeout_ms = 100;
    link.run_detached(id(1), wanted).await.unwrap();
    let ended = collect(&mut link.follow(id(1)).await.unwrap()).await;
    let exit = ended.exit.unwrap();
    assert_eq!((ended.stdout.as_slice(), exit.timed_out, exit.reason.name()), (&b"begun\n"[..], true, "timeout"));
}

/// Output of a command's own, by its number.
async fn put_out(link: &Link, number: u8, bytes: usize) {
    let script = format!("head -c {bytes} /dev/zero | tr '\\0' {}", char::from(b'a' + number));
    link.run_detached(id(number), shell(&script)).await.unwrap();
    let exit = collect(&mut link.follow_exit(id(number)).await.unwrap()).await;
    assert_eq!((exit.exit.unwrap().code, exit.stdout.len() + exit.stderr.len()), (0, 0), "only the end was asked for");
}

async fn kept(link: &Link, number: u8) -> (usize, String) {
    let ended = collect(&mut link.follow(id(number)).await.unwrap()).await;
    assert_eq!(ended.exit.unwrap().code, 0);
    assert!(ended.stdout.iter().all(|byte| *byte == b'a' + number), "what is kept is whole");
    (ended.stdout.len(), String::from_utf8_lossy(&ended.stderr).into_owned())
}

const MIB: usize = 1 << 20;

#[tokio::test]
async fn kept_output_is_bounded_in_sum_and_the_oldest_goes_first_even_of_one_command() {
    let agent = Agent::start_as(&["--kept-output-bytes-max=4194304"], &[]);
    let link = agent.connect().await;
    for number in 0..3 {
        put_out(&link, number, 3 * MIB / 2).await;
    }
    let sum = link.kept_output().await.unwrap() as usize;
    assert!(sum <= 4 * MIB && sum > 3 * MIB, "{sum} bytes are kept");
    let (first, told) = kept(&link, 0).await;
    assert!(first < 3 * MIB / 2 && told.contains("of older output were not kept"), "{first} {told}");
    assert_eq!(kept(&link, 1).await, (3 * MIB / 2, String::new()));
    assert_eq!(kept(&link, 2).await, (3 * MIB / 2, String::new()));
    // One that puts out more than all may keeps the end of it.
    put_out(&link, 3, 10 * MIB).await;
    let (last, told) = kept(&link, 3).await;
    assert!(last <= 4 * MIB && last > 3 * MIB && told.contains("not kept"), "{last} {told}");
    assert_eq!(kept(&link, 2).await.0, 0);
    assert!(link.kept_output().await.unwrap() as usize <= 4 * MIB);
}

#[tokio::test]
async fn what_was_read_goes_before_what_nobody_has_read() {
    let agent = Agent::start_as(&["--kept-output-bytes-max=4194304"], &[]);
    let link = agent.connect().await;
    put_out(&link, 0, MIB).await;
    put_out(&link, 1, MIB).await;
    assert_eq!(kept(&link, 1).await.0, MIB);
    put_out(&link, 2, 5 * MIB / 2).await;
    assert_eq!(kept(&link, 0).await, (MIB, String::new()));
    assert!(kept(&link, 1).await.0 < MIB);
}

#[tokio::test]
async fn kept_output_is_gone_with_its_time_and_when_it_is_forgotten() {
    let agent = Agent::start_as(&["--kept-output-seconds-max=1"], &[]);
    let link = agent.connect().await;
    put_out(&link, 0, MIB).await;
    let open = || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", agent.process.id())).unwrap().flatten();
        files.filter_map(|file| std::fs::metadata(file.path()).ok()).map(|file| blocks(&file)).sum::<u64>()
    };
    until("its space is free", || open() < MIB as u64 / 2).await;
    assert_eq!(kept(&link, 0).await.0, 0);

    let agent = Agent::start();
    let link = agent.connect().await;
    put_out(&link, 0, MIB).await;
    assert!(link.kept_output().await.unwrap() as usize > MIB);
    link.forget(id(0)).await.unwrap();
    assert_eq!(link.kept_output().await.unwrap(), 0);
}

/// Bytes that a regular file takes on its disk.
fn blocks(file: &std::fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    if file.is_file() && file.nlink() == 0 { file.blocks() * 512 } else { 0 }
}
