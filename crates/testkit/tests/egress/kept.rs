//! What becomes of lists when sessions are paused, copied and stopped, and when servers end.

use nagaya_api::nagaya::v1::ForkSessionRequest;
use nagaya_api::tenki::v1;
use nagaya_testkit::{Client, Outcome, Running, Sandbox};

use super::world::{World, list, reaches, reaches_none_of};

crate::cases!(
    a_list_holds_from_the_first_instruction,
    a_list_outlives_a_killed_server,
    a_change_made_before_a_kill_holds_after_it,
    a_list_is_kept_over_pause_and_cold_boot,
    a_list_can_be_changed_while_the_session_is_paused,
    forks_and_sessions_from_snapshots_inherit_the_list,
    the_next_sandbox_inherits_nothing,
);

/// Starts a program that talks to a target, and waits until it is connected.
pub async fn talk(sandbox: &Sandbox, talker: &str, target: &str) -> Running {
    super::world::ready(sandbox, &["/usr/bin/python3", "-c", talker, target]).await
}

async fn only_one(sandbox: &Sandbox) {
    reaches(sandbox, "one.example").await;
    reaches_none_of(sandbox, &["two.example", "11.22.33.2"]).await;
}

async fn a_list_holds_from_the_first_instruction(world: &mut World) -> Outcome {
    let rounds = (0..12).map(|_| async {
        let sandbox = world.sandbox(list(&[], &["11.22.33.10"])).await;
        let script = "exec 3<>/dev/tcp/11.22.33.2/80 && echo OUT";
        let finished = sandbox.run(&["/usr/bin/timeout", "1", "/bin/bash", "-c", script]).await.unwrap();
        assert_eq!(finished.text(), "");
        sandbox.terminate().await.unwrap();
    });
    futures::future::join_all(rounds).await;
    Ok(())
}

async fn a_list_outlives_a_killed_server(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example"], &["11.22.33.10"])).await;
    only_one(&sandbox).await;
    // While nobody is there it goes on trying, and says at the end what it reached.
    let script = "for n in $(seq 6); do for a in 1 2 10; do timeout 1 bash -c \"exec 3<>/dev/tcp/11.22.33.$a/80\" \
                  2>/dev/null && echo $a >> reached; done; sleep 0.1; done; touch done";
    let detached = v1::ExecuteCommandRequest {
        session_id: sandbox.id.clone(),
        command: "/bin/bash".into(),
        args: vec!["-c".into(), script.into()],
        ..Default::default()
    };
    world.client.control.execute_command(detached).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    world.server.kill();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    world.server.restart();
    world.client = Client::of(&world.server);
    let sandbox = world.again(&sandbox).await;
    // The address of the name is still known.
    reaches(&sandbox, "11.22.33.1").await;
    only_one(&sandbox).await;
    reaches(&sandbox, "11.22.33.10").await;
    while !sandbox.stat("/home/tenki/done").await.unwrap().exists {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let reached = sandbox.shell("sort -u reached | tr '\\n' ' '", false).await;
    assert_eq!(reached.trim(), "1 10");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn a_change_made_before_a_kill_holds_after_it(world: &mut World) -> Outcome {
    let narrowed = world.sandbox(None).await;
    let lifted = world.sandbox(list(&["one.example"], &[])).await;
    world.set(&narrowed, list(&["one.example"], &[])).await.unwrap();
    world.set(&lifted, None).await.unwrap();
    world.server.kill();
    world.server.restart();
    world.client = Client::of(&world.server);
    let (narrowed, lifted) = (world.again(&narrowed).await, world.again(&lifted).await);
    only_one(&narrowed).await;
    reaches(&lifted, "two.example").await;
    for sandbox in [narrowed, lifted] {
        sandbox.terminate().await.unwrap();
    }
    Ok(())
}

async fn a_list_is_kept_over_pause_and_cold_boot(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example"], &[])).await;
    pause(world, &sandbox).await;
    resume(world, &sandbox).await;
    only_one(&sandbox).await;
    let _ = sandbox.run_as(&["/sbin/poweroff"], true).await;
    loop {
        let session = world.client.session(&sandbox.id).await.unwrap();
        if session.state.as_known() == Some(v1::SessionState::UserShutdown) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    resume(world, &sandbox).await;
    only_one(&world.again(&sandbox).await).await;
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn a_list_can_be_changed_while_the_session_is_paused(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["two.example"], &[])).await;
    reaches(&sandbox, "two.example").await;
    pause(world, &sandbox).await;
    world.set(&sandbox, list(&["one.example"], &[])).await.unwrap();
    resume(world, &sandbox).await;
    only_one(&sandbox).await;
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn forks_and_sessions_from_snapshots_inherit_the_list(world: &mut World) -> Outcome {
    let sandbox = world.sandbox(list(&["one.example"], &[])).await;
    let request = ForkSessionRequest { session_id: sandbox.id.clone(), count: 1, ..Default::default() };
    let forks = world.client.own.fork_session(request).await.unwrap().sessions.clone();
    world.client.wait_running(&forks[0].id).await.unwrap();
    let fork = world.client.attach(&forks[0].id).await.unwrap();
    only_one(&fork).await;
    pause(world, &sandbox).await;
    let paused = world.client.session(&sandbox.id).await.unwrap();
    let from = v1::CreateSessionRequest {
        owner_id: "self".into(),
        owner_type: "SERVICE".into(),
        allow_outbound: Some(true),
        snapshot_id: paused.pause_snapshot_id.clone(),
        wait_ready: true,
        ..Default::default()
    };
    let copy = world.create_from(from.clone()).await.unwrap();
    only_one(&copy).await;
    let other = world
        .create_from(v1::CreateSessionRequest { egress: list(&["two.example"], &[]).into(), ..from })
        .await
        .unwrap();
    reaches(&other, "two.example").await;
    reaches_none_of(&other, &["one.example"]).await;
    for sandbox in [sandbox, fork, copy, other] {
        sandbox.terminate().await.unwrap();
    }
    Ok(())
}

async fn the_next_sandbox_inherits_nothing(world: &mut World) -> Outcome {
    for _ in 0..3 {
        let sandbox = world.sandbox(list(&["one.example"], &["11.22.33.10"])).await;
        reaches(&sandbox, "one.example").await;
        sandbox.terminate().await.unwrap();
    }
    // What was terminated is taken apart in the background; its sets go with it.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    loop {
        let text = rules();
        // What is measured is no right.
        let is_measure = |line: &str| line.contains("limit") || line.contains("ct count");
        let names_sandbox = |line: &str| line.contains("elements") && line.contains("10.200.");
        let left: Vec<&str> = text.lines().filter(|line| names_sandbox(line) && !is_measure(line)).collect();
        if left.is_empty() {
            return Ok(());
        }
        assert!(std::time::Instant::now() < deadline, "{text}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn rules() -> String {
    let output = std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn pause(world: &World, sandbox: &Sandbox) {
    let request = v1::PauseSessionRequest { session_id: sandbox.id.clone() };
    world.client.control.pause_session(request).await.unwrap();
}

async fn resume(world: &World, sandbox: &Sandbox) {
    let request = v1::ResumeSessionRequest { session_id: sandbox.id.clone() };
    world.client.control.resume_session(request).await.unwrap();
    world.client.wait_running(&sandbox.id).await.unwrap();
}
