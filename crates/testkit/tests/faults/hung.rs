//! Processes that stand still: every step against a sandbox has a limit and a way on.

use std::time::{Duration, Instant};

use nagaya_api::tenki::v1::{self, SessionState};
use nagaya_testkit::{Client, Outcome, Server, leftovers, settle};
use rustix::process::{Pid, Signal, kill_process};

use crate::cases;

cases![
    a_hung_first_process_is_paused_resumed_and_terminated_like_any_other,
    a_start_does_not_wait_for_a_hung_first_process,
    a_hung_spawner_is_replaced,
];

const CONFIGURATION: &str = "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n";
/// Far more than any step takes, far less than for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// Processes whose control group or name ends like this.
fn processes(server: &Server, wanted: impl Fn(&str, &str) -> bool) -> Vec<Pid> {
    let instance = nagaya_testkit::instance_name(server.data_dir());
    let own = format!("/nagaya/{instance}/");
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let cgroup = std::fs::read_to_string(entry.path().join("cgroup")).ok()?;
            let command = std::fs::read_to_string(entry.path().join("cmdline")).ok()?;
            let group = cgroup.lines().find_map(|line| line.split_once(&own)).map_or("", |(_, group)| group);
            wanted(group, &command).then(|| Pid::from_raw(pid)).flatten()
        })
        .collect()
}

/// The first process of a sandbox.
fn first_process(server: &Server, id: &str) -> Pid {
    let record = std::fs::read_to_string(server.storage().join("sandboxes").join(id).join("record.json")).unwrap();
    let slot = record.split_once("\"slot\":").unwrap().1;
    let slot = slot.split(|letter: char| !letter.is_ascii_digit()).next().unwrap();
    let group = format!("slot-{slot}/agent");
    *processes(server, |of, _| of == group).first().expect("the sandbox has a first process")
}

fn halt(pid: Pid) {
    kill_process(pid, Signal::STOP).unwrap();
}

async fn within<T>(what: &str, step: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, step).await.unwrap_or_else(|_| panic!("{what} never ends"))
}

async fn end(mut server: Server) {
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
}

async fn a_hung_first_process_is_paused_resumed_and_terminated_like_any_other() -> Outcome {
    let server = Server::start_with(CONFIGURATION);
    let client = Client::of(&server);
    let sandbox = client.create(&Default::default()).await.unwrap();
    sandbox.shell("echo before >kept", false).await;
    let first = first_process(&server, &sandbox.id);
    halt(first);
    let pause = || client.control.pause_session(v1::PauseSessionRequest { session_id: sandbox.id.clone() });
    let resume = || client.control.resume_session(v1::ResumeSessionRequest { session_id: sandbox.id.clone() });
    within("a pause", pause()).await.unwrap();
    within("a resume", resume()).await.unwrap();
    // What goes on again works as before.
    kill_process(first, Signal::CONT).unwrap();
    let again = client.attach(&sandbox.id).await.unwrap();
    assert_eq!(within("a command", again.shell("cat kept", false)).await, "before");
    halt(first);
    within("a pause", pause()).await.unwrap();
    within("an end", client.terminate(&sandbox.id)).await.unwrap();
    assert_eq!(client.session(&sandbox.id).await.unwrap().state.as_known(), Some(SessionState::Terminated));
    drop(client);
    end(server).await;
    Ok(())
}

async fn a_start_does_not_wait_for_a_hung_first_process() -> Outcome {
    let mut server = Server::start_with(CONFIGURATION);
    let client = Client::of(&server);
    let hung = client.create(&Default::default()).await.unwrap();
    let other = client.create(&Default::default()).await.unwrap();
    other.shell("echo fine >kept", false).await;
    let first = first_process(&server, &hung.id);
    halt(first);
    server.kill();
    server.restart();
    // It was looked at, and not waited for until it should have answered.
    let log = server.log();
    assert!(log.contains("first process is stopped") && !log.contains("the agent does not answer"), "{log}");
    let client = Client::of(&server);
    assert_eq!(client.attach(&other.id).await.unwrap().shell("cat kept", false).await, "fine");
    // Whoever asks for what cannot be done now is told, and not kept waiting.
    let pause = client.control.pause_session(v1::PauseSessionRequest { session_id: hung.id.clone() });
    let refused = within("a pause", pause).await.unwrap_err();
    assert!(refused.to_string().contains("guest_unreachable"), "{refused}");
    // It is taken over as soon as it goes on.
    kill_process(first, Signal::CONT).unwrap();
    let again = client.attach(&hung.id).await.unwrap();
    let mut answered = again.run(&["true"]).await.is_ok();
    let begin = Instant::now();
    while !answered && begin.elapsed() < LIMIT {
        tokio::time::sleep(Duration::from_millis(100)).await;
        answered = again.run(&["true"]).await.is_ok();
    }
    assert!(answered, "a sandbox that goes on again is never taken over");
    halt(first);
    server.kill();
    server.restart();
    let client = Client::of(&server);
    within("an end", client.terminate(&hung.id)).await.unwrap();
    drop(client);
    end(server).await;
    Ok(())
}

async fn a_hung_spawner_is_replaced() -> Outcome {
    let mut server = Server::start_with(CONFIGURATION);
    let client = Client::of(&server);
    let pid = i32::try_from(server.pid()).unwrap();
    let spawners = || {
        processes(&server, |_, command| command.starts_with("nagaya-spawner"))
            .into_iter()
            .filter(|of| parent(*of) == Some(pid))
            .collect::<Vec<_>>()
    };
    let spawner = *spawners().first().expect("the server has a spawner");
    halt(spawner);
    // More than are ready.
    let created = within("a creation", async {
        let mut created = Vec::new();
        for _ in 0..3 {
            if let Ok(sandbox) = client.create(&Default::default()).await {
                created.push(sandbox);
            }
        }
        created.push(client.create(&Default::default()).await.unwrap());
        created
    })
    .await;
    assert_eq!(created.last().unwrap().shell("echo made", false).await, "made");
    assert!(!spawners().contains(&spawner), "the spawner that hung is still there");
    halt(*spawners().first().unwrap());
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
    Ok(())
}

fn parent(pid: Pid) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}
