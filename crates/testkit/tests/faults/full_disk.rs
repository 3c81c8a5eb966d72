//! The host's disk is full, by whoever's doing: what filled it can be ended, nobody is broken for good, and one sandbox alone
//! cannot get so far.

use std::time::{Duration, Instant};

use nagaya_api::nagaya::v1 as own;
use nagaya_api::tenki::v1::{self, SessionState};
use nagaya_testkit::{Client, Outcome, Server, SmallDisk, leftovers, settle};

use crate::cases;

cases![
    the_sandbox_that_filled_the_host_and_any_other_can_be_ended,
    a_disk_that_broke_on_a_full_host_is_repaired_when_there_is_space,
    one_sandbox_cannot_fill_the_host,
    what_is_on_a_full_host_can_be_purged,
];

/// Without the limit that keeps a host from being full.
const UNLIMITED: &str = "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n[namespace]\ndisk_free_mb_min = 0\n";
const LIMITED: &str = "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n[namespace]\ndisk_free_mb_min = 128\n";
const LIMIT: Duration = Duration::from_secs(60);

async fn end(mut server: Server) {
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
}

async fn codes(client: &Client, id: &str) -> Vec<String> {
    let request = own::ExplainSessionRequest { session_id: id.into() };
    let answer = client.own.explain_session(request).await.unwrap();
    answer.findings.iter().map(|finding| finding.code.to_string()).collect()
}

async fn wait_for_code(client: &Client, id: &str, code: &str) {
    let begin = Instant::now();
    let mut found = codes(client, id).await;
    while !found.iter().any(|of| of == code) {
        assert!(begin.elapsed() < LIMIT, "{code} is never told, but {found:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
        found = codes(client, id).await;
    }
}

async fn the_sandbox_that_filled_the_host_and_any_other_can_be_ended() -> Outcome {
    let disk = SmallDisk::mount(1_024);
    let server = Server::start_in(&disk.path(), UNLIMITED);
    let client = Client::of(&server);
    let greedy = client.create(&Default::default()).await.unwrap();
    let other = client.create(&Default::default()).await.unwrap();
    // Fails, sooner or later, inside or when it is written back.
    greedy.run(&["sh", "-c", "head -c 2G /dev/zero >big; sync; head -c 2G /dev/zero >bigger; sync"]).await.unwrap();
    let filler = disk.fill();
    for sandbox in [&other, &greedy] {
        tokio::time::timeout(LIMIT, client.terminate(&sandbox.id)).await.expect("an end on a full disk ends").unwrap();
        assert_eq!(client.session(&sandbox.id).await.unwrap().state.as_known(), Some(SessionState::Terminated));
    }
    std::fs::remove_file(filler).unwrap();
    drop((client, greedy, other));
    end(server).await;
    Ok(())
}

async fn a_disk_that_broke_on_a_full_host_is_repaired_when_there_is_space() -> Outcome {
    let disk = SmallDisk::mount(1_024);
    let server = Server::start_in(&disk.path(), UNLIMITED);
    let client = Client::of(&server);
    let sandbox = client.create(&Default::default()).await.unwrap();
    sandbox.shell("echo before >kept && sync", false).await;
    let filler = disk.fill();
    // Names take blocks that the host has not got.
    let names = "for i in $(seq 400); do mkdir -p d$i; for j in $(seq 30); do echo x >d$i/$j; done; sync; done; true";
    sandbox.run(&["sh", "-c", names]).await.unwrap();
    wait_for_code(&client, &sandbox.id, "disk_failed").await;
    std::fs::remove_file(filler).unwrap();

    let id = || sandbox.id.clone();
    client.control.pause_session(v1::PauseSessionRequest { session_id: id() }).await.unwrap();
    client.control.resume_session(v1::ResumeSessionRequest { session_id: id() }).await.unwrap();
    let again = client.attach(&sandbox.id).await.unwrap();
    assert_eq!(again.shell("cat kept", false).await, "before");
    assert_eq!(again.shell("echo after >kept && sync && cat kept", false).await, "after");
    assert!(!codes(&client, &sandbox.id).await.iter().any(|code| code == "disk_failed"));
    drop((client, sandbox, again));
    end(server).await;
    Ok(())
}

/// The harness purges with a network of its own, for which the host's image would be made anew: that takes more space than
/// there is.
async fn what_is_on_a_full_host_can_be_purged() -> Outcome {
    let disk = SmallDisk::mount(512);
    let mut server = Server::start_in(&disk.path(), UNLIMITED);
    Client::of(&server).create(&Default::default()).await.unwrap();
    assert!(server.terminate().success(), "{}", server.log());
    let filler = std::fs::OpenOptions::new().write(true).open(disk.fill()).unwrap();
    // A record of a few bytes still fits.
    filler.set_len(filler.metadata().unwrap().len() - (256 << 10)).unwrap();
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
    Ok(())
}

async fn one_sandbox_cannot_fill_the_host() -> Outcome {
    let disk = SmallDisk::mount(2_048);
    let server = Server::start_in(&disk.path(), LIMITED);
    let client = Client::of(&server);
    let greedy = client.create(&Default::default()).await.unwrap();
    let other = client.create(&Default::default()).await.unwrap();
    let write = "head -c 4G /dev/zero >big";
    let written = greedy.run(&["sh", "-c", write]).await.unwrap();
    assert!(written.describe().contains("No space left on device"), "{}", written.describe());
    wait_for_code(&client, &greedy.id, "host_disk_full").await;
    // Neither the host nor a neighbour is broken.
    assert_eq!(other.shell("head -c 1M /dev/zero >small && sync && stat -c %s small", false).await, "1048576");
    for sandbox in [&greedy, &other] {
        assert!(!codes(&client, &sandbox.id).await.iter().any(|code| code == "disk_failed"));
    }
    // It helps itself, and goes on by itself.
    greedy.shell("rm big && sync", false).await;
    let begin = Instant::now();
    while codes(&client, &greedy.id).await.iter().any(|code| code == "host_disk_full") {
        assert!(begin.elapsed() < LIMIT, "a disk is held though there is space");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(greedy.shell("echo fine >kept && sync && cat kept", false).await, "fine");
    drop((client, greedy, other));
    end(server).await;
    Ok(())
}
