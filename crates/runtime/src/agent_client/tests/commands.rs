use nagaya_api::error::Code;
use nagaya_engine::ports::{Builtin, ExitReason, ProcessInput, Signal, Terminal, TerminalSize, User, WhenLeft};

use super::*;

#[tokio::test]
async fn output_and_exit_code_arrive_and_the_exit_is_last() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let (ended, exit) = run(&link, shell("echo out; echo err >&2; exit 3")).await;
    assert_eq!(ended.stdout, b"out\n");
    assert_eq!(ended.stderr, b"err\n");
    assert_eq!((exit.code, exit.reason.name(), exit.signal.as_str()), (3, "exit", ""));
    assert!(!exit.timed_out);
}

#[tokio::test]
async fn commands_run_as_the_user_in_its_home_with_its_environment() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell("id -u; id -g; id -G; pwd; echo $HOME $USER $LOGNAME $SHELL $LANG $A; umask; ulimit -c");
    wanted.cwd = String::new();
    wanted.env.insert("A".into(), "b c".into());
    let (ended, _) = run(&link, wanted).await;
    let home = agent.home().display().to_string();
    let expected = format!("1000\n1000\n1000\n{home}\n{home} user user /bin/bash C.UTF-8 b c\n0022\n0\n");
    assert_eq!(String::from_utf8_lossy(&ended.stdout), expected);

    let mut wanted = shell("id -u; echo $HOME $USER $PATH");
    wanted.user = User::Root;
    wanted.env.insert("PATH".into(), "/usr/bin:/bin".into());
    let (ended, _) = run(&link, wanted).await;
    assert_eq!(ended.stdout, b"0\n/root root /usr/bin:/bin\n");
}

#[tokio::test]
async fn relative_directories_start_at_home() {
    let agent = Agent::start();
    let link = agent.connect().await;
    std::fs::create_dir(agent.home().join("work")).unwrap();
    let mut wanted = command(&["pwd"]);
    wanted.cwd = "work".into();
    let (ended, _) = run(&link, wanted).await;
    assert_eq!(String::from_utf8_lossy(&ended.stdout).trim(), agent.path("work"));
}

#[tokio::test]
async fn stdin_reaches_the_command_and_its_end_too() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = command(&["cat"]);
    wanted.stdin = true;
    let process = link.run(wanted).await.unwrap();
    let text = bytes(&"0123456789".repeat(100_000));
    let (input, sent) = (process.input.clone(), text.clone());
    tokio::spawn(async move {
        let mut rest = sent;
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(50_000));
            input.send(ProcessInput::Stdin(piece)).await.unwrap();
        }
        input.send(ProcessInput::StdinClose).await.unwrap();
    });
    let (ended, exit) = finish(process).await;
    assert_eq!(exit.code, 0);
    assert!(ended.stdout == text, "{} bytes came back", ended.stdout.len());
}

#[tokio::test]
async fn stdin_ends_once_however_often_it_is_ended() {
    let agent = Agent::start();
    let link = agent.connect().await;
    // More than may be sent while nobody reads, so that a part waits when the end comes.
    let mut wanted = shell("sleep 0.3; wc -c");
    wanted.stdin = true;
    let process = link.run(wanted).await.unwrap();
    for _ in 0..6 {
        process.input.send(ProcessInput::Stdin(Bytes::from(vec![0; 64 * 1024]))).await.unwrap();
    }
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    process.input.send(ProcessInput::Stdin(bytes("too late"))).await.unwrap();
    let (ended, exit) = finish(process).await;
    assert_eq!((String::from_utf8_lossy(&ended.stdout).trim(), exit.code), ("393216", 0));
    assert!(!link.is_closed());
}

#[tokio::test]
async fn without_stdin_a_command_reads_nothing() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let (ended, exit) = run(&link, command(&["cat"])).await;
    assert_eq!((ended.stdout.len(), exit.code), (0, 0));
}

#[tokio::test]
async fn a_command_that_does_not_read_still_gets_its_signals() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = command(&["sleep", "1000"]);
    wanted.stdin = true;
    let process = link.run(wanted).await.unwrap();
    for _ in 0..10 {
        process.input.send(ProcessInput::Stdin(Bytes::from(vec![0; 64 * 1024]))).await.unwrap();
    }
    process.input.send(ProcessInput::Signal(Signal::Kill)).await.unwrap();
    let (_, exit) = finish(process).await;
    assert_eq!((exit.code, exit.signal.as_str(), exit.reason.name()), (-1, "SIGKILL", "signaled"));
}

#[tokio::test]
async fn signals_work_after_stdin_was_closed() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell("trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.01; done");
    wanted.stdin = true;
    let mut process = link.run(wanted).await.unwrap();
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    assert_eq!(process.events.recv().await, Some(ProcessEvent::Stdout(bytes("ready\n"))));
    process.input.send(ProcessInput::Signal(Signal::Usr1)).await.unwrap();
    let (ended, exit) = finish(process).await;
    assert_eq!((ended.stdout.as_slice(), exit.code), (&b"got\n"[..], 5));
}

#[tokio::test]
async fn starts_that_cannot_be_are_refused_with_a_reason() {
    let agent = Agent::start();
    let link = agent.connect().await;
    std::fs::write(agent.home().join("file"), "#!/bin/sh\n").unwrap();
    let refused = async |command: Command| link.run(command).await.map(|_| ()).unwrap_err();
    let at = |cwd: &str| Command { cwd: cwd.into(), ..command(&["true"]) };
    let cases = [
        (command(&[]), Code::InvalidCommand, 0),
        (command(&["a\0b"]), Code::InvalidCommand, 0),
        (command(&[""]), Code::CommandNotFound, libc::ENOENT),
        (command(&["surely-no-such-command"]), Code::CommandNotFound, libc::ENOENT),
        (command(&["/surely/no/such/command"]), Code::CommandNotFound, libc::ENOENT),
        (command(&["/etc"]), Code::PermissionDenied, libc::EACCES),
        (command(&[&agent.path("file")]), Code::PermissionDenied, libc::EACCES),
        (at("/surely/missing"), Code::FileNotFound, libc::ENOENT),
        (at(&agent.path("file")), Code::InvalidCommand, libc::ENOTDIR),
        (at("a\0b"), Code::InvalidCommand, 0),
        (Command { env: [("A=B".into(), "c".into())].into(), ..command(&["true"]) }, Code::InvalidCommand, 0),
        (Command { env: [("A".into(), "c\0".into())].into(), ..command(&["true"]) }, Code::InvalidCommand, 0),
        (command(&["true", &"x".repeat(200_000)]), Code::InvalidCommand, libc::E2BIG),
        (command(&["true", &"x".repeat(2_000_000)]), Code::MessageTooLarge, 0),
    ];
    for (index, (command, code, errno)) in cases.into_iter().enumerate() {
        let error = refused(command).await;
        assert_eq!((error.code, error.errno), (code, errno), "case {index}: {error}");
        assert!(!error.detail.contains("surely"), "{error}");
    }
    assert_eq!(run(&link, command(&["true"])).await.1.code, 0);
}

#[tokio::test]
async fn nothing_of_the_agent_leaks_into_commands() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let (ended, _) = run(
        &link,
        shell("ls -l /proc/self/fd | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status; ps -o pid=,sid=,pgid= -p $$"),
    )
    .await;
    let text = String::from_utf8_lossy(&ended.stdout).into_owned();
    let mut lines = text.lines();
    // A total, the three streams, and the directory that `ls` reads.
    assert_eq!(lines.next().unwrap().trim(), "5", "{text}");
    assert!(lines.next().unwrap().ends_with("0000000000000000"), "{text}");
    assert!(lines.next().unwrap().ends_with("0000000000000000"), "{text}");
    let ids: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{text}");
}

#[tokio::test]
async fn a_timeout_ends_a_command_with_term() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = command(&["sleep", "1000"]);
    wanted.timeout_ms = 100;
    let (_, exit) = run(&link, wanted).await;
    assert_eq!((exit.code, exit.signal.as_str(), exit.reason.name()), (-1, "SIGTERM", "timeout"));
    assert!(exit.timed_out && exit.duration_ms >= 100, "{exit:?}");
}

#[tokio::test]
async fn a_command_that_ignores_term_is_killed_after_the_grace() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell("trap '' TERM; sleep 1000");
    wanted.timeout_ms = 50;
    let (_, exit) = run(&link, wanted).await;
    assert_eq!((exit.signal.as_str(), exit.reason.name(), exit.timed_out), ("SIGKILL", "grace_timeout", true));
    assert!(exit.duration_ms >= 5_000, "{exit:?}");
}

#[tokio::test]
async fn an_exit_code_after_the_timeout_is_still_a_timeout() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell("trap 'exit 0' TERM; while :; do sleep 0.01; done");
    wanted.timeout_ms = 100;
    let (_, exit) = run(&link, wanted).await;
    assert_eq!((exit.code, exit.reason.name(), exit.timed_out), (0, "timeout", true));
}

#[tokio::test]
async fn a_background_child_that_holds_the_output_keeps_the_run_open() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let (ended, exit) = run(&link, shell("(sleep 0.3; echo late) & echo early")).await;
    assert_eq!(ended.stdout, b"early\nlate\n");
    assert!(exit.code == 0 && exit.duration_ms >= 300, "{exit:?}");
}

#[tokio::test]
async fn dropping_the_events_terminates_the_group() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut process = link.run(shell("sleep 1000 & echo $!; wait")).await.unwrap();
    let Some(ProcessEvent::Stdout(child)) = process.events.recv().await else { panic!("no output") };
    let child: u32 = String::from_utf8_lossy(&child).trim().parse().unwrap();
    assert!(is_alive(child));
    let pid = process.pid;
    drop(process);
    until("both are gone", || !is_alive(pid) && !is_alive(child)).await;
}

#[tokio::test]
async fn dropping_the_events_kills_what_ignores_term() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut process = link.run(shell("trap '' TERM; echo ready; while :; do sleep 0.1; done")).await.unwrap();
    process.events.recv().await.unwrap();
    let (pid, dropped) = (process.pid, std::time::Instant::now());
    drop(process);
    until("it is gone", || !is_alive(pid)).await;
    assert!(dropped.elapsed() >= Duration::from_secs(5));
}

#[tokio::test]
async fn what_is_to_be_left_alone_loses_its_streams_and_nothing_else() {
    let agent = Agent::start();
    for (number, link_is_lost) in [false, true].into_iter().enumerate() {
        let link = agent.connect().await;
        let mark = agent.path(&format!("mark-{number}"));
        let mut wanted = shell(&format!("sleep 1000 & echo $!; cat; echo ended > {mark}; exec sleep 1000"));
        (wanted.stdin, wanted.when_left) = (true, WhenLeft::HangUp);
        let mut process = link.run(wanted).await.unwrap();
        let Some(ProcessEvent::Stdout(child)) = process.events.recv().await else { panic!("no output") };
        let child: u32 = std::str::from_utf8(&child).unwrap().trim().parse().unwrap();
        let pid = process.pid;
        // A newer connection takes the place of an older one.
        let _newer = if link_is_lost { Some(agent.connect().await) } else { None };
        drop(process);
        until("its input ended", || std::fs::read_to_string(&mark).is_ok_and(|text| text == "ended\n")).await;
        assert!(is_alive(pid) && is_alive(child), "{link_is_lost}");
    }
}

#[tokio::test]
async fn a_terminal_that_is_left_hangs_up() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell("trap '' HUP; sleep 1000 & echo $!; trap - HUP; sleep 1000 & echo $!; exec sleep 1000");
    (wanted.pty, wanted.stdin, wanted.when_left) = (true, true, WhenLeft::HangUp);
    let mut process = link.run(wanted).await.unwrap();
    let mut text = String::new();
    while text.lines().count() < 2 || !text.ends_with('\n') {
        let Some(ProcessEvent::Stdout(data)) = process.events.recv().await else { panic!("no output") };
        text.push_str(std::str::from_utf8(&data).unwrap());
    }
    let children: Vec<u32> = text.lines().map(|line| line.trim().parse().unwrap()).collect();
    let pid = process.pid;
    drop(process);
    until("those who mind are gone", || !is_alive(pid) && !is_alive(children[1])).await;
    assert!(is_alive(children[0]));
}

#[tokio::test]
async fn a_terminal_is_as_it_was_asked_for_from_the_start() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell("stty size; stty -a");
    wanted.pty = true;
    let size = TerminalSize { columns: 123, rows: 45, ..TerminalSize::default() };
    // VINTR and ECHO.
    wanted.terminal = Terminal { size: Some(size), modes: vec![(1, 24), (53, 0)] };
    let (ended, _) = run(&link, wanted).await;
    let text = String::from_utf8_lossy(&ended.stdout).into_owned();
    for part in ["45 123\r\n", "intr = ^X;", " -echo ", " iutf8"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[tokio::test]
async fn the_accounts_shell_is_started_in_place_of_the_one_that_is_named() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = command(&["/nonexistent", "-c", "echo $0 $BASH_VERSION"]);
    wanted.builtin = Some(Builtin::Shell);
    let (ended, _) = run(&link, wanted).await;
    assert!(ended.stdout.starts_with(b"bash 5"), "{ended:?}");
    let mut wanted = command(&["/nonexistent", "-l"]);
    (wanted.builtin, wanted.stdin) = (Some(Builtin::Shell), true);
    let process = link.run(wanted).await.unwrap();
    process.input.send(ProcessInput::Stdin(bytes("shopt login_shell; echo $0\n"))).await.unwrap();
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    let (ended, _) = finish(process).await;
    let text = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(text.contains("on\n-bash\n"), "{text}");
}

#[tokio::test]
async fn a_terminal_has_a_size_one_output_and_job_control() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut wanted = shell("read go; stty size; tty; test -t 2 && echo terminal >&2; echo $TERM; cat; echo end");
    (wanted.pty, wanted.stdin) = (true, true);
    let process = link.run(wanted).await.unwrap();
    process
        .input
        .send(ProcessInput::Resize(TerminalSize { columns: 123, rows: 45, ..TerminalSize::default() }))
        .await
        .unwrap();
    process.input.send(ProcessInput::Stdin(bytes("go\n"))).await.unwrap();
    process.input.send(ProcessInput::Stdin(bytes("hello\n"))).await.unwrap();
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    let (ended, exit) = finish(process).await;
    let text = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert_eq!((exit.code, ended.stderr.len()), (0, 0), "{text}");
    for part in ["45 123", "/dev/pts/", "terminal\r\n", "xterm-256color", "hello\r\n", "end\r\n"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[tokio::test]
async fn a_slow_reader_stalls_only_its_own_command() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut stalled = link.run(shell("yes")).await.unwrap();
    let mut others = Vec::new();
    for _ in 0..20 {
        others.push(link.run(shell("yes | head -c 3000000")).await.unwrap());
    }
    for other in others {
        let (ended, exit) = finish(other).await;
        assert_eq!((ended.stdout.len(), exit.code), (3_000_000, 0));
    }
    assert!(stalled.events.recv().await.is_some());
    assert!(is_alive(stalled.pid));
}

#[tokio::test]
async fn orphans_are_collected() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let (ended, _) = run(&link, shell("(setsid sleep 0.2 >/dev/null 2>&1 & echo $!)")).await;
    let orphan: u32 = String::from_utf8_lossy(&ended.stdout).trim().parse().unwrap();
    until("the orphan is collected", || !std::path::Path::new(&format!("/proc/{orphan}")).exists()).await;
}

#[tokio::test]
async fn a_kill_for_want_of_memory_is_told_as_such() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let kills = Arc::new(std::sync::atomic::AtomicU64::new(7));
    let count = kills.clone();
    link.count_out_of_memory_kills(move || count.load(std::sync::atomic::Ordering::SeqCst));
    assert_eq!(run(&link, shell("kill -KILL $$")).await.1.reason, ExitReason::Signaled);
    let process = link.run(shell("read go; kill -KILL $$").with_stdin()).await.unwrap();
    kills.store(8, std::sync::atomic::Ordering::SeqCst);
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    assert_eq!(finish(process).await.1.reason, ExitReason::OutOfMemory);
}

trait WithStdin {
    fn with_stdin(self) -> Self;
}

impl WithStdin for Command {
    fn with_stdin(mut self) -> Self {
        self.stdin = true;
        self
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_commands_at_once_all_end() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let mut runs = tokio::task::JoinSet::new();
    for number in 0..200 {
        let link = link.clone();
        runs.spawn(async move {
            let (ended, exit) = run(&link, command(&["echo", &number.to_string()])).await;
            assert_eq!((String::from_utf8_lossy(&ended.stdout).trim(), exit.code), (number.to_string().as_str(), 0));
        });
    }
    while let Some(result) = runs.join_next().await {
        result.unwrap();
    }
}
