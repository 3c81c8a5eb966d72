//! What the server prints goes nowhere: its output is full, closed, or read by nobody. It serves and ends all the same.

use std::fs::{File, OpenOptions};
use std::process::Stdio;

use nagaya_api::tenki::v1::SessionState;
use nagaya_testkit::{Client, Outcome, Server, SmallDisk, leftovers, settle};
use rustix::process::{Pid, Signal, kill_process};

use crate::cases;

cases![
    a_log_on_a_full_device_neither_hinders_requests_nor_the_end,
    a_log_file_on_a_full_disk_neither_hinders_requests_nor_the_end,
    output_that_nobody_reads_neither_hinders_requests_nor_the_end,
    output_that_nobody_can_read_neither_hinders_requests_nor_the_end,
];

const CONFIGURATION: &str = "[pools]\nslots_ready = 2\nisolated_slots_ready = 1\n";

/// A whole life with the worst that makes the server talk: a spawner that dies, sandboxes that are killed.
async fn live(mut server: Server) {
    let client = Client::of(&server);
    for _ in 0..3 {
        let sandbox = client.create(&Default::default()).await.unwrap();
        kill_spawners(&server);
        let other = client.create(&Default::default()).await;
        sandbox.shell("echo fine", false).await;
        client.terminate(&sandbox.id).await.unwrap();
        assert_eq!(client.session(&sandbox.id).await.unwrap().state.as_known(), Some(SessionState::Terminated));
        if let Ok(other) = other {
            client.terminate(&other.id).await.unwrap();
        }
    }
    kill_spawners(&server);
    drop(client);
    assert!(server.terminate().success());
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
}

fn kill_spawners(server: &Server) {
    let pid = server.pid().to_string();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((name, rest)) = stat.rsplit_once(") ") else { continue };
        let command = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        if rest.split(' ').nth(1) == Some(pid.as_str()) && command.starts_with("nagaya-spawner") {
            let spawner = name.split(' ').next().and_then(|pid| pid.parse().ok()).and_then(Pid::from_raw).unwrap();
            // It may have been replaced already.
            let _ = kill_process(spawner, Signal::KILL);
        }
    }
}

/// Makes the server talk as much as it can.
fn start(stdout: Stdio, stderr: Stdio) -> Server {
    Server::start_printing(CONFIGURATION, stdout, stderr)
}

async fn a_log_on_a_full_device_neither_hinders_requests_nor_the_end() -> Outcome {
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    live(start(full().into(), full().into())).await;
    Ok(())
}

async fn a_log_file_on_a_full_disk_neither_hinders_requests_nor_the_end() -> Outcome {
    let disk = SmallDisk::mount(8);
    let log = || OpenOptions::new().create(true).append(true).open(disk.path().join("log")).unwrap();
    let (first, second) = (log(), log());
    disk.fill();
    live(start(first.into(), second.into())).await;
    Ok(())
}

async fn output_that_nobody_reads_neither_hinders_requests_nor_the_end() -> Outcome {
    let (reader, writer) = std::io::pipe().unwrap();
    let filled = File::from(std::os::fd::OwnedFd::from(writer.try_clone().unwrap()));
    let flags = rustix::fs::fcntl_getfl(&filled).unwrap();
    rustix::fs::fcntl_setfl(&filled, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&filled, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&filled, flags).unwrap();
    live(start(writer.try_clone().unwrap().into(), writer.into())).await;
    drop(reader);
    Ok(())
}

async fn output_that_nobody_can_read_neither_hinders_requests_nor_the_end() -> Outcome {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    live(start(writer.try_clone().unwrap().into(), writer.into())).await;
    Ok(())
}
