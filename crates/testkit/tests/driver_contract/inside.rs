//! What programs find in a sandbox; they need a real driver to run.

use nagaya_api::ids::ExecutionId;
use nagaya_engine::model::SandboxSpec;
use nagaya_engine::ports::{Builtin, Command, ProcessEvent, ProcessInput, TerminalSize};
use nagaya_testkit::{NotRun, Outcome};

use super::place::*;

pub async fn commands_run_as_tenki_and_privileged_ones_as_root(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let facts = "id -un; id -u; id -g; echo $HOME $USER $LOGNAME $SHELL; pwd; hostname";
    let expected = "tenki\n1000\n1000\n/home/tenki tenki tenki /bin/bash\n/home/tenki\nsandbox";
    assert_eq!(shell(&*guest, facts).await, expected);
    assert_eq!(shell_as(&*guest, "id -un; id -u; echo $HOME", true).await, "root\n0\n/root");
    for directory in ["/home/tenki", "/workspace", "/tmp", "/var/tmp", "/dev/shm"] {
        assert_eq!(
            shell(&*guest, &format!("echo x > {directory}/x && cat {directory}/x && rm {directory}/x")).await,
            "x"
        );
    }
    assert_ne!(run(&*guest, command(&["touch", "/etc/x"])).await.exit.code, 0);
    shell_as(&*guest, "echo x > /etc/x && echo x > /usr/x && rm /etc/x /usr/x", true).await;
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn sudo_works_where_the_host_has_it(place: &mut Place) -> Outcome {
    if !std::path::Path::new("/usr/bin/sudo").exists() {
        return Err(NotRun("the host, whose programs the image has, has no sudo".into()));
    }
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    assert_eq!(shell(&*guest, "sudo id -u").await, "0");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_terminal_is_one_and_changes_its_size(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let script =
        "tty; test -t 0 && echo terminal; trap 'stty size; exit 0' WINCH; echo ready; while :; do read -r _; done";
    let shell = Command { pty: true, stdin: true, ..command(&["/bin/bash", "-c", script]) };
    let mut process = guest.run(shell).await.unwrap();
    let mut text = String::new();
    let mut resized = false;
    while let Some(event) = process.events.recv().await {
        match event {
            ProcessEvent::Stdout(bytes) => text.push_str(&String::from_utf8_lossy(&bytes)),
            ProcessEvent::Stderr(_) => panic!("a terminal has one output"),
            ProcessEvent::Exit(_) => break,
        }
        if text.contains("ready") && !resized {
            process
                .input
                .send(ProcessInput::Resize(TerminalSize { columns: 111, rows: 22, ..TerminalSize::default() }))
                .await
                .unwrap();
            // Bash runs a trap when `read` returns.
            process.input.send(ProcessInput::Stdin("\n".into())).await.unwrap();
            resized = true;
        }
    }
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    assert!(lines.iter().any(|line| line.starts_with("/dev/pts/")), "{text}");
    assert!(lines.contains(&"terminal") && lines.contains(&"22 111"), "{text}");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

/// What `/root` is to the file server of a user: the number of its answer to OPENDIR.
async fn opens_roots_home(guest: &dyn nagaya_engine::ports::Guest, privileged: bool) -> u8 {
    let server =
        Command { builtin: Some(Builtin::Sftp), stdin: true, user: user(privileged), ..command(&["/nothing"]) };
    let mut process = guest.run(server).await.unwrap();
    let hello: &[u8] = &[0, 0, 0, 5, 1, 0, 0, 0, 3];
    let open: &[u8] = &[0, 0, 0, 14, 11, 0, 0, 0, 7, 0, 0, 0, 5, b'/', b'r', b'o', b'o', b't'];
    process.input.send(ProcessInput::Stdin([hello, open].concat().into())).await.unwrap();
    process.input.send(ProcessInput::StdinClose).await.unwrap();
    let finished = finish(&mut process.events).await;
    assert_eq!(finished.exit.code, 0, "{finished:?}");
    let version = 4 + u32::from_be_bytes(finished.stdout[..4].try_into().unwrap()) as usize;
    assert_eq!(finished.stdout[4..9], [2, 0, 0, 0, 3], "version 3 is spoken");
    finished.stdout[version + 4]
}

pub async fn the_file_server_is_there_and_is_only_its_user(place: &mut Place) -> Outcome {
    const STATUS: u8 = 101;
    const HANDLE: u8 = 102;
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    shell_as(&*guest, "chmod 700 /root", true).await;
    assert_eq!(opens_roots_home(&*guest, false).await, STATUS);
    assert_eq!(opens_roots_home(&*guest, true).await, HANDLE);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn background_processes_live_on_and_orphans_are_reaped(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let background = "setsid sleep 1000 < /dev/null > /dev/null 2>&1 & echo $!";
    let pid = shell(&*guest, background).await;
    // The shell answers as soon as it has started it, and its program may still be loading.
    shell(&*guest, &format!("until grep -qx sleep /proc/{pid}/comm; do :; done")).await;
    // A hundred orphans end at once; process 1 must collect them all.
    shell(&*guest, "for i in $(seq 100); do (true &) ; done").await;
    let zombies = "for stat in /proc/[0-9]*/stat; do read -r line < $stat && echo \"${line##*)}\"; done 2>/dev/null | grep -c '^ Z' || true";
    let mut left = String::new();
    for _ in 0..200 {
        left = shell(&*guest, zombies).await;
        if left == "0" {
            break;
        }
    }
    assert_eq!(left, "0", "zombies stay");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn letting_go_of_a_command_ends_it_with_its_group(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let script = "trap 'echo told > told; exit 0' TERM; sleep 1000 & echo ready; wait";
    let mut process = guest.run(command(&["/bin/sh", "-c", script])).await.unwrap();
    wait_for_line(&mut process, "ready").await;
    let (_mark, host_pid) = marked_process(&*guest).await;
    let namespace = std::fs::read_link(format!("/proc/{host_pid}/ns/pid")).unwrap();
    drop(process);
    eventually("the command's child has ended too", || {
        !host_processes().into_iter().any(|pid| {
            std::fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|each| each == namespace)
                && std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep")
        })
    })
    .await;
    assert_eq!(read(&*guest, "told").await.unwrap(), b"told\n");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_command_nobody_reads_stalls_no_other(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let flood = guest.run(command(&["yes"])).await.unwrap();
    for round in 0..20 {
        assert_eq!(run(&*guest, command(&["echo", &round.to_string()])).await.text(), round.to_string());
    }
    write(&*guest, "beside", &vec![9; 4 << 20]).await.unwrap();
    drop(flood);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn what_ignores_term_is_killed_and_says_so(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let stubborn = ["/bin/sh", "-c", "trap '' TERM; while :; do read -r _ || :; done"];
    // Long enough for the shell to have begun to ignore the signal, on a slow machine as well.
    let mut process = guest.run(Command { stdin: true, timeout_ms: 2_000, ..command(&stubborn) }).await.unwrap();
    let exit = finish(&mut process.events).await.exit;
    assert_eq!((exit.code, exit.signal.as_str(), exit.reason.name()), (-1, "SIGKILL", "grace_timeout"));
    assert!(exit.timed_out);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn a_running_command_goes_on_under_the_next_driver(place: &mut Place) -> Outcome {
    let (id, execution) = (fresh_id(), ExecutionId::new(3, [9; 10]));
    let guest = place.driver().start(id, &place.fresh()).await.unwrap();
    let script = "echo begun; while [ ! -e /tmp/go ]; do sleep 0.01; done; echo ended; exit 7";
    guest.run_detached(execution, command(&["/bin/sh", "-c", script])).await.unwrap();
    let mut events = guest.follow(execution).await.unwrap();
    assert_eq!(events.recv().await, Some(ProcessEvent::Stdout("begun\n".into())));
    drop((guest, events));
    place.restart().await;
    let guest = adopt_running(&*place.driver(), id).await;
    let mut events = guest.follow(execution).await.unwrap();
    assert_eq!(events.recv().await, Some(ProcessEvent::Stdout("begun\n".into())), "its output begins anew");
    write(&*guest, "/tmp/go", b"").await.unwrap();
    let finished = finish(&mut events).await;
    assert_eq!((finished.text().as_str(), finished.exit.code), ("ended", 7));
    place.driver().destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn only_sandboxes_with_outbound_access_have_a_link(place: &mut Place) -> Outcome {
    let driver = place.driver();
    for outbound in [false, true] {
        let id = fresh_id();
        let guest = driver.start(id, &SandboxSpec { outbound, ..place.fresh() }).await.unwrap();
        let links = shell(&*guest, "sed -n 's/^ *\\(.*\\):.*/\\1/p' /proc/net/dev | sort | tr '\\n' ' '").await;
        assert_eq!(links.split_whitespace().any(|link| link == "eth0"), outbound, "{links}");
        driver.destroy(id).await.unwrap();
    }
    place.settled().await;
    Ok(())
}

pub async fn many_sandboxes_at_once_come_and_go(place: &mut Place) -> Outcome {
    let driver = place.driver();
    // The pools hold two slots ready, which count.
    let ids: Vec<_> = (0..SLOTS_MAX - 2).map(|_| fresh_id()).collect();
    let work = ids.iter().map(|id| {
        let (driver, spec) = (driver.clone(), place.fresh());
        async move {
            let guest = driver.start(*id, &spec).await.unwrap();
            let text = id.to_string();
            assert_eq!(run(&*guest, command(&["echo", &text])).await.text(), text);
            driver.destroy(*id).await.unwrap();
        }
    });
    futures::future::join_all(work).await;
    place.settled().await;
    assert!(driver.list().await.unwrap().is_empty());
    Ok(())
}
