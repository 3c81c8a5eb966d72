//! Limits that the kernel enforces; they need a real driver.

use std::fs;
use std::path::PathBuf;

use nagaya_api::error::Code;
use nagaya_engine::model::Machine;
use nagaya_engine::ports::Command;
use nagaya_testkit::{NotRun, Outcome};

use super::place::*;

pub async fn a_process_above_the_memory_limit_dies_with_that_reason_and_the_agent_answers(
    place: &mut Place,
) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.create(id, &Machine { memory_mb: 128, ..machine() }, None).await.unwrap();
    let within = run(&*guest, command(&["python3", "-c", "print(len(b'x' * (40 << 20)))"])).await;
    assert_eq!(within.exit.code, 0, "{within:?}");
    for privileged in [false, true] {
        let greedy = ["python3", "-c", "x = [b'x' * (1 << 20) for _ in range(400)]; print('fits')"];
        let exit = run(&*guest, Command { privileged, ..command(&greedy) }).await.exit;
        assert_eq!((exit.code, exit.signal.as_str(), exit.reason.as_str()), (-1, "SIGKILL", "out_of_memory"));
    }
    // Memory of files that live in memory counts as well.
    let shared = run(&*guest, command(&["/bin/sh", "-c", "head -c 300M /dev/zero > /dev/shm/x"])).await;
    assert_ne!(shared.exit.code, 0, "{shared:?}");
    let _ = guest.remove("/dev/shm/x", false).await.unwrap();
    assert_eq!(shell(&*guest, "echo alive").await, "alive");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

const FORK_BOMB: &str = "
import os, signal
children = []
try:
    while len(children) < 5000:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        children.append(pid)
    print('unlimited')
except OSError as error:
    print(error.errno, len(children) < LIMIT)
print('full', flush=True)
input()
"; // The children end with the group that the agent kills.

pub async fn a_fork_bomb_is_contained_and_the_sandbox_stays_usable(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.create(id, &machine(), None).await.unwrap();
    let bomb = FORK_BOMB.replace("LIMIT", &PROCESSES_MAX.to_string());
    let mut process = guest.run(Command { stdin: true, ..command(&["python3", "-c", &bomb]) }).await.unwrap();
    wait_for_line(&mut process, "11 True").await;
    wait_for_line_or_seen(&mut process).await;
    // While it holds every process it may have, files still work.
    write(&*guest, "during", b"during").await.unwrap();
    assert_eq!(read(&*guest, "during").await.unwrap(), b"during");
    drop(process);
    let mut usable = false;
    for _ in 0..200 {
        let Ok(mut process) = guest.run(command(&["true"])).await else { continue };
        usable = finish(&mut process.events).await.exit.code == 0;
        if usable {
            break;
        }
    }
    assert!(usable, "no command runs after a fork bomb");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

/// The line `full` may have come together with the one before.
async fn wait_for_line_or_seen(process: &mut nagaya_engine::ports::Process) {
    let next = tokio::time::timeout(std::time::Duration::from_millis(500), process.events.recv()).await;
    assert!(!matches!(next, Ok(None)), "the bomb ended");
}

pub async fn a_full_disk_is_told_to_commands_and_to_the_file_calls_and_the_sandbox_stays_usable(
    place: &mut Place,
) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.create(id, &Machine { disk_gb: 1, ..machine() }, None).await.unwrap();
    let size_kib: u64 = shell(&*guest, "df -k --output=size /home/tenki | tail -1").await.trim().parse().unwrap();
    assert!((900_000..=1 << 20).contains(&size_kib), "df shows {size_kib} KiB for a disk of 1 GiB");
    let fill = "fallocate -l 800M most; head -c 1G /dev/zero > rest; echo $?";
    let finished = run(&*guest, command(&["/bin/sh", "-c", fill])).await;
    assert_eq!(finished.text(), "1", "{finished:?}");
    assert!(String::from_utf8_lossy(&finished.stderr).contains("No space left"), "{finished:?}");
    let error = write(&*guest, "more", &vec![1; 8 << 20]).await.unwrap_err();
    assert_eq!(error.code, Code::DiskFull, "{error}");
    assert!(guest.stat("more").await.unwrap().is_none(), "half a file was left");
    assert_eq!(shell(&*guest, "echo alive").await, "alive");
    guest.remove("most", false).await.unwrap();
    write(&*guest, "more", &vec![1; 8 << 20]).await.unwrap();
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn processor_time_is_limited_to_the_cores_asked_for(place: &mut Place) -> Outcome {
    if std::thread::available_parallelism().unwrap().get() < 2 {
        return Err(NotRun("one processor cannot tell one core from two".into()));
    }
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.create(id, &machine(), None).await.unwrap();
    let (_process, host_pid) = marked_process(&*guest).await;
    let group = cgroup_of(host_pid, "cpu");
    let quota = fs::read_to_string(group.join("cpu.max"))
        .or_else(|_| fs::read_to_string(group.join("cpu.cfs_quota_us")))
        .unwrap();
    assert_eq!(quota.split_whitespace().next(), Some("100000"), "the quota of one core in 100 ms");
    // Two spinners on all processors want twice the quota: periods must be cut short.
    let spin = "
import os
os.sched_setaffinity(0, range(256))
os.fork()
while True:
    pass
";
    let before = throttled(&group);
    let spinners = guest.run(Command { stdin: true, ..command(&["python3", "-c", spin]) }).await.unwrap();
    eventually("two busy processes are held back to one core", || throttled(&group) > before).await;
    drop(spinners);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

fn throttled(group: &std::path::Path) -> u64 {
    let statistics = fs::read_to_string(group.join("cpu.stat")).unwrap();
    let line = statistics.lines().find_map(|line| line.strip_prefix("nr_throttled "));
    line.expect("the kernel counts held-back periods").parse().unwrap()
}

/// The directory of a process's control group for one controller.
fn cgroup_of(pid: i32, controller: &str) -> PathBuf {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let find = |wanted: &dyn Fn(&str) -> bool, kind: &str, option: &str| {
        let path = groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            fields.next().filter(|names| wanted(names)).and(fields.next())
        })?;
        let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| {
            fields[2] == kind && (option.is_empty() || fields[3].split(',').any(|each| each == option))
        })?;
        Some(PathBuf::from(format!("{}{path}", mount[1])))
    };
    find(&|names| names.split(',').any(|name| name == controller), "cgroup", controller)
        .or_else(|| find(&str::is_empty, "cgroup2", ""))
        .expect("the process is in a control group")
}

pub async fn the_tools_inside_show_the_sandboxs_own_limits(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.create(id, &Machine { cpu_cores: 1, memory_mb: 384, ..machine() }, None).await.unwrap();
    assert_eq!(shell(&*guest, "nproc").await, "1");
    assert_eq!(
        shell(&*guest, "getconf _NPROCESSORS_ONLN; python3 -c 'import os; print(os.cpu_count())'").await,
        "1\n1"
    );
    let total = shell(&*guest, "sed -n 's/^MemTotal: *//p' /proc/meminfo").await;
    assert_eq!(total, format!("{} kB", 384 << 10));
    if guest.stat("/usr/bin/free").await.unwrap().is_some() {
        assert_eq!(shell(&*guest, "free -m | awk '/^Mem/ { print $2 }'").await, "384");
    }
    let size_kib: u64 = shell(&*guest, "df -k --output=size / | tail -1").await.trim().parse().unwrap();
    assert!((4_500_000..=5 << 20).contains(&size_kib), "df shows {size_kib} KiB for a disk of 5 GiB");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn what_is_used_is_told_in_figures(place: &mut Place) -> Outcome {
    const MIB: u64 = 1 << 20;
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.create(id, &Machine { memory_mb: 256, ..machine() }, None).await.unwrap();
    // What is only cached of files is not used up.
    shell(&*guest, "head -c 100M /dev/zero > cached && cat cached > /dev/null").await;
    let hold = "x = b'x' * (64 << 20); print('holding', flush=True); input()";
    let mut holding = guest.run(Command { stdin: true, ..command(&["python3", "-c", hold]) }).await.unwrap();
    wait_for_line(&mut holding, "holding").await;
    let load = driver.load(id).await.unwrap();
    assert!((60 * MIB..120 * MIB).contains(&load.memory_bytes), "{load:?}");
    assert_eq!((load.memory_limit_bytes, load.memory_kills), (256 * MIB, 0));
    assert!((1..10).contains(&load.processes) && load.processes_max == PROCESSES_MAX, "{load:?}");
    assert!(load.disk_used_bytes >= 100 * MIB && load.disk_size_bytes > 4_096 * MIB, "{load:?}");
    assert!(load.disk_used_bytes < 1_024 * MIB && load.cpu_window_us > 0, "{load:?}");
    drop(holding);
    let endless = guest.run(command(&["/bin/sh", "-c", "while :; do :; done"])).await.unwrap();
    let busy = driver.load(id).await.unwrap();
    // On a busy host it waits for what it does not get.
    assert!(busy.cpu_used_us + busy.cpu_waited_us >= busy.cpu_window_us / 2, "{busy:?}");
    drop(endless);
    assert_eq!(run(&*guest, command(&["tail", "/dev/zero"])).await.exit.memory_kills, 1);
    assert_eq!(driver.load(id).await.unwrap().memory_kills, 1);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}
