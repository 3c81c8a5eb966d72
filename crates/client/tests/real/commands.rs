use std::time::Duration;

use bytes::Bytes;
use nagaya_client::{Code, CommandStatus, Error, Event, RefusalKind, Running, Signal};
use tokio::io::AsyncWriteExt;

use crate::world::{World, say};

crate::cases!(
    streams_are_apart_and_ends_are_told,
    commands_get_what_they_are_given,
    input_is_written_while_it_runs,
    signals_arrive,
    a_dropped_command_ends,
    what_cannot_start_is_an_error,
    much_output_is_complete,
    many_run_at_once,
);

async fn streams_are_apart_and_ends_are_told(world: &World) {
    let output = world.session.shell("echo out; echo err >&2; exit 3").output().await.unwrap();
    assert_eq!((&*output.stdout_text(), &*output.stderr_text()), ("out\n", "err\n"));
    assert_eq!((output.status, output.exit_code, output.is_success()), (CommandStatus::Failed, 3, false));
    assert!(matches!(output.check(), Err(Error::CommandFailed { output }) if output.exit_code == 3));

    let killed = world.session.shell("kill -9 $$").output().await.unwrap();
    assert_eq!((killed.exit_code, killed.status), (-1, CommandStatus::Failed));
    assert!(killed.signal.as_deref().is_some_and(|signal| signal.contains("KILL")), "{killed:?}");

    let timed_out = world.session.command(["sleep", "60"]).timeout(Duration::from_millis(200)).output().await.unwrap();
    assert_eq!(timed_out.status, CommandStatus::TimedOut);
    assert!(matches!(timed_out.check(), Err(Error::CommandTimedOut { .. })));
}

async fn commands_get_what_they_are_given(world: &World) {
    let session = &world.session;
    let printed = session.shell("echo $A$B; pwd; id -un").env("A", "1").envs([("B", "2")]).cwd("/tmp").output();
    assert_eq!(printed.await.unwrap().stdout_text(), "12\n/tmp\ntenki\n");
    assert_eq!(session.command(["id", "-u"]).privileged(true).output().await.unwrap().stdout_text(), "0\n");
    // Arguments are not for a shell.
    assert_eq!(session.command(["echo", "$HOME; *"]).output().await.unwrap().stdout_text(), "$HOME; *\n");
    let terminal = session.command(["sh", "-c", "test -t 0 && test -t 1 && echo yes"]).pty(true).output();
    assert_eq!(terminal.await.unwrap().stdout_text().trim_end(), "yes");
    assert_eq!(session.command(["cat"]).stdin("given").output().await.unwrap().stdout_text(), "given");
    // Without any, there is none.
    assert_eq!(session.command(["cat"]).output().await.unwrap().stdout_text(), "");
    let large = Bytes::from(vec![b'x'; 3 << 20]);
    let counted = session.command(["wc", "-c"]).stdin(large).output().await.unwrap();
    assert_eq!(counted.stdout_text().trim(), (3 << 20).to_string());
    // A program that does not read its input is normal.
    let unread = session.command(["true"]).stdin(vec![b'x'; 3 << 20]).output().await.unwrap();
    assert!(unread.is_success());
}

async fn next_line(running: &mut Running) -> String {
    let mut line = String::new();
    while !line.ends_with('\n') {
        match running.next().await.unwrap() {
            Some(Event::Stdout(bytes)) => line.push_str(std::str::from_utf8(&bytes).unwrap()),
            other => panic!("after {line:?}: {other:?}"),
        }
    }
    line.trim_end().to_owned()
}

async fn input_is_written_while_it_runs(world: &World) {
    let mut running = world.session.command(["cat"]).start().await.unwrap();
    assert!(running.pid() > 1);
    let mut stdin = running.take_stdin().unwrap();
    assert!(running.take_stdin().is_none());
    for line in ["one", "two"] {
        stdin.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        assert_eq!(next_line(&mut running).await, line);
    }
    stdin.shutdown().await.unwrap();
    let output = running.wait().await.unwrap();
    assert!(output.is_success() && output.stdout.is_empty());
}

async fn signals_arrive(world: &World) {
    let script = "trap 'echo interrupted' INT; trap 'echo asked; exit 4' TERM; echo ready; while :; do sleep 0.1; done";
    let mut running = world.session.shell(script).start().await.unwrap();
    assert_eq!(next_line(&mut running).await, "ready");
    running.signal(Signal::Int).await;
    assert_eq!(next_line(&mut running).await, "interrupted");
    running.signaller().signal(Signal::Term).await;
    let output = running.wait().await.unwrap();
    assert_eq!((output.exit_code, &*output.stdout_text()), (4, "asked\n"));

    let running = world.session.command(["sleep", "60"]).start().await.unwrap();
    running.kill().await;
    assert_eq!(running.wait().await.unwrap().exit_code, -1);
}

async fn a_dropped_command_ends(world: &World) {
    let mut running = world.session.shell("echo $$; sleep 600").start().await.unwrap();
    let pid = next_line(&mut running).await;
    let signaller = running.signaller();
    drop(running);
    // TERM, and KILL after five seconds; this one ends at TERM.
    let gone = format!("for i in $(seq 100); do kill -0 {pid} 2>/dev/null || exit 0; sleep 0.1; done; exit 1");
    say(&world.session, &gone).await;
    signaller.kill().await;
}

async fn what_cannot_start_is_an_error(world: &World) {
    let missing = world.session.command(["no-such-program"]).output().await.unwrap_err();
    assert!(matches!(missing, Error::Refused { kind: RefusalKind::FileNotFound, .. }), "{missing:?}");
    assert_eq!(missing.code(), Some(Code::CommandNotFound));
    let nowhere = world.session.command(["true"]).cwd("no-such-directory").output().await.unwrap_err();
    assert!(matches!(nowhere, Error::Refused { kind: RefusalKind::FileNotFound, .. }), "{nowhere:?}");
    let empty = world.session.command([""; 0]).output().await.unwrap_err();
    assert!(matches!(empty, Error::InvalidOptions(_)), "{empty:?}");
}

async fn much_output_is_complete(world: &World) {
    let mut running = world.session.shell("head -c 30000000 /dev/zero; echo done >&2").start().await.unwrap();
    let (mut bytes, mut said) = (0, Vec::new());
    while let Some(event) = running.next().await.unwrap() {
        match event {
            Event::Stdout(piece) => bytes += piece.len(),
            Event::Stderr(piece) => said.extend_from_slice(&piece),
        }
    }
    assert_eq!((bytes, said.as_slice()), (30_000_000, &b"done\n"[..]));
}

async fn many_run_at_once(world: &World) {
    let runs = (0..100).map(|number| async move {
        let output = world.session.command(["echo".to_owned(), number.to_string()]).output().await.unwrap();
        assert_eq!(output.stdout_text(), format!("{number}\n"));
    });
    futures::future::join_all(runs).await;
}
