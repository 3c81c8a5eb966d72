//! What ends with a command, and what does not.

use nagaya_engine::ports::{ProcessInput, Signal};

use super::*;

/// Reads numbers of processes, one a line, until there are as many as wanted.
async fn pids(process: &mut Process, wanted: usize) -> Vec<u32> {
    let mut text = String::new();
    while text.lines().count() < wanted || !text.ends_with('\n') {
        match process.events.recv().await {
            Some(ProcessEvent::Stdout(bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} after {text}"),
        }
    }
    text.lines().map(|line| line.parse().unwrap()).collect()
}

/// Starts something in a process group of its own, in the middle of a shell script, as `timeout` does.
const APART: &str = "bash -c 'set -m; sleep 1000 & echo $! $$ | tr \" \" \"\n\"; wait'; true";

#[derive(Debug, Clone, Copy)]
enum End {
    Timeout,
    Kill,
    Term,
    Vanish,
}

#[tokio::test]
async fn all_that_a_command_started_ends_with_it_whatever_process_groups_it_made() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for (terminal, end) in [false, true]
        .into_iter()
        .flat_map(|terminal| [End::Timeout, End::Kill, End::Term, End::Vanish].map(|end| (terminal, end)))
    {
        let mut wanted = shell(APART);
        wanted.pty = terminal;
        wanted.timeout_ms = if matches!(end, End::Timeout) { 1_000 } else { 0 };
        let mut process = link.run(wanted).await.unwrap();
        let mut started = pids(&mut process, 2).await;
        started.push(process.pid);
        let groups: std::collections::BTreeSet<_> = started.iter().map(|pid| group(*pid)).collect();
        assert_eq!(groups.len(), 2, "{end:?}: not in a group of its own");
        match end {
            End::Timeout => assert!(finish(process).await.1.timed_out),
            End::Kill | End::Term => {
                let signal = if matches!(end, End::Kill) { Signal::Kill } else { Signal::Term };
                process.input.send(ProcessInput::Signal(signal)).await.unwrap();
                let (ended, exit) = finish(process).await;
                assert!(!exit.signal.is_empty() && ended.stderr.is_empty(), "{end:?}: {exit:?} {ended:?}");
            }
            End::Vanish => drop(process),
        }
        until(&format!("{started:?} are gone after {end:?}, terminal: {terminal}"), || {
            !started.iter().any(|pid| is_alive(*pid))
        })
        .await;
    }
}

fn group(pid: u32) -> i32 {
    let pid = rustix::process::Pid::from_raw(pid as i32);
    rustix::process::getpgid(pid).unwrap().as_raw_nonzero().get()
}

#[tokio::test]
async fn what_ignores_term_in_a_group_of_its_own_is_killed() {
    let agent = Agent::start();
    let link = agent.connect().await;
    // Its output is elsewhere, so the run is over before its time is.
    let script =
        "bash -c 'trap \"\" TERM; set -m; (while :; do sleep 0.1; done) >/dev/null 2>&1 & echo $!'; sleep 1000";
    let mut process = link.run(shell(script)).await.unwrap();
    let stubborn = pids(&mut process, 1).await[0];
    drop(process);
    until("it is killed", || !is_alive(stubborn)).await;
}

#[tokio::test]
async fn a_run_answers_after_the_kill_though_what_was_set_free_holds_its_output() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for terminal in [false, true] {
        let mut wanted = shell("setsid sh -c 'echo $$; exec sleep 1000' & wait");
        wanted.pty = terminal;
        let mut process = link.run(wanted).await.unwrap();
        let free = pids(&mut process, 1).await[0];
        process.input.send(ProcessInput::Signal(Signal::Kill)).await.unwrap();
        let (ended, exit) = finish(process).await;
        assert_eq!(exit.signal, "SIGKILL");
        let told = if terminal { ended.stdout } else { ended.stderr };
        // The end of a terminal is told to all who use it, and `sleep` does not survive that.
        if !terminal {
            assert!(String::from_utf8_lossy(&told).contains("set free still run"), "{told:?}");
            assert!(is_alive(free), "what was set free lives on");
        }
    }
    // Without a kill it keeps the run open.
    let (ended, _) = run(&link, shell("setsid sh -c 'sleep 0.3; echo late' & echo early")).await;
    assert_eq!(ended.stdout, b"early\nlate\n");
}

#[tokio::test]
async fn output_that_was_written_before_a_kill_arrives_however_slowly_it_is_read() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut process = link.run(shell("head -c 300000 /dev/zero; echo >&2; sleep 1000")).await.unwrap();
    // Its last words are under way: all before them is in the pipe or further.
    let mut received = 0;
    loop {
        match process.events.recv().await {
            Some(ProcessEvent::Stdout(bytes)) => received += bytes.len(),
            Some(ProcessEvent::Stderr(_)) => break,
            other => panic!("{other:?}"),
        }
    }
    process.input.send(ProcessInput::Signal(Signal::Kill)).await.unwrap();
    let (ended, exit) = finish(process).await;
    assert_eq!((received + ended.stdout.len(), exit.signal.as_str()), (300_000, "SIGKILL"));
}

#[tokio::test]
async fn what_a_command_leaves_behind_lives_on_when_it_ends_by_itself() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for (script, code) in
        [("nohup sleep 1000 >/dev/null 2>&1 & echo $!", 0), ("setsid sleep 1000 >/dev/null 2>&1 & echo $!; exit 3", 3)]
    {
        let (ended, exit) = run(&link, shell(script)).await;
        let left: u32 = String::from_utf8_lossy(&ended.stdout).trim().parse().unwrap();
        assert_eq!(exit.code, code);
        assert!(is_alive(left), "{script}");
    }
}
