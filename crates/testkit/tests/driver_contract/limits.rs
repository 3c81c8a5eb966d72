//! Limits that the kernel enforces; they need a real driver.

use std::fs;
use std::path::PathBuf;

use nagaya_api::error::Code;
use nagaya_api::ids::SessionId;
use nagaya_engine::model::{Resources, SandboxSpec};
use nagaya_engine::ports::{Command, Driver, ProcessEvent, ProcessInput, Signal};
use nagaya_testkit::{NotRun, Outcome};

use super::place::*;

pub async fn a_process_above_the_memory_limit_dies_with_that_reason_and_the_agent_answers(
    place: &mut Place,
) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &SandboxSpec { resources: Resources::of(1, 128, 5), ..place.fresh() }).await.unwrap();
    let within = run(&*guest, command(&["python3", "-c", "print(len(b'x' * (40 << 20)))"])).await;
    assert_eq!(within.exit.code, 0, "{within:?}");
    for privileged in [false, true] {
        let greedy = ["python3", "-c", "x = [b'x' * (1 << 20) for _ in range(400)]; print('fits')"];
        let exit = run(&*guest, Command { user: user(privileged), ..command(&greedy) }).await.exit;
        assert_eq!((exit.code, exit.signal.as_str(), exit.reason.name()), (-1, "SIGKILL", "out_of_memory"));
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

pub async fn what_the_file_calls_keep_in_memory_counts_as_the_sandboxs(place: &mut Place) -> Outcome {
    const MIB: usize = 1 << 20;
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &SandboxSpec { resources: Resources::of(1, 256, 5), ..place.fresh() }).await.unwrap();
    let before = driver.usage(id).await.unwrap().memory_bytes;
    write(&*guest, "/dev/shm/some", &vec![7; 60 * MIB]).await.unwrap();
    assert_eq!(read(&*guest, "/dev/shm/some").await.unwrap(), vec![7; 60 * MIB]);
    let after = driver.usage(id).await.unwrap().memory_bytes;
    // But for a page or two of what was there before, which may have gone meanwhile.
    assert!(after.saturating_sub(before) >= 59 * MIB as u64, "{before} bytes before, {after} after");
    // More than there is: refused, and neither the agent nor the sandbox is harmed.
    let error = write(&*guest, "/dev/shm/more", &vec![7; 300 * MIB]).await.unwrap_err();
    assert!([Code::DiskFull, Code::CapacityUnavailable, Code::FileSystem].contains(&error.code), "{error}");
    guest.remove("/dev/shm/more", false).await.unwrap();
    assert_eq!(shell(&*guest, "wc -c < /dev/shm/some").await, (60 * MIB).to_string());
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
";

pub async fn a_fork_bomb_is_contained_and_the_sandbox_stays_usable(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let bomb = FORK_BOMB.replace("LIMIT", &PROCESSES_MAX.to_string());
    let mut process = guest.run(Command { stdin: true, ..command(&["python3", "-c", &bomb]) }).await.unwrap();
    wait_for_line(&mut process, "11 True").await;
    wait_for_line_or_seen(&mut process).await;
    // While it holds every process it may have, files still work, and so do commands that start more.
    write(&*guest, "during", b"during").await.unwrap();
    assert_eq!(read(&*guest, "during").await.unwrap(), b"during");
    assert_eq!(shell(&*guest, "cat during | cat | tr d D").await, "During");
    let held = driver.usage(id).await.unwrap().processes;
    process.input.send(ProcessInput::Signal(Signal::Kill)).await.unwrap();
    assert_eq!(finish(&mut process.events).await.exit.signal, "SIGKILL");
    assert!(held > PROCESSES_MAX / 2, "only {held} processes");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

/// Every process of it starts another in a process group of its own and ends.
const HYDRA: &str = "
import os
for _ in range(20):
    if os.fork() == 0:
        break
print('begun', flush=True)
while True:
    if os.fork():
        os._exit(0)
    os.setpgid(0, 0)
";

pub async fn a_command_that_forks_without_end_ends_when_it_is_killed(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let mut process = guest.run(command(&["python3", "-c", HYDRA])).await.unwrap();
    wait_for_line(&mut process, "begun").await;
    // The agent has all those ends to collect, and answers nevertheless.
    write(&*guest, "during", b"during").await.unwrap();
    process.input.send(ProcessInput::Signal(Signal::Kill)).await.unwrap();
    let finished = finish(&mut process.events).await;
    assert!(finished.stderr.is_empty(), "its output was held by what was left: {finished:?}");
    eventually_empty(&*driver, id).await;
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

/// Waits until no process but the agent is left.
async fn eventually_empty(driver: &dyn Driver, id: SessionId) {
    let mut left = u64::MAX;
    for _ in 0..50 {
        left = driver.usage(id).await.unwrap().processes;
        if left == 0 {
            return;
        }
    }
    panic!("{left} processes are left");
}

pub async fn commands_share_processor_time_as_equals_however_many_processes_they_have(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let crowd = "
import os
for _ in range(40):
    if os.fork() == 0:
        break
else:
    print(open('/proc/self/cgroup').read(), end='')
    print('end', flush=True)
while True:
    pass
";
    let mut first = guest.run(command(&["python3", "-c", crowd])).await.unwrap();
    let mut text = String::new();
    while !text.contains("end\n") {
        match first.events.recv().await {
            Some(ProcessEvent::Stdout(bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} after {text}"),
        }
    }
    let processor_group = |text: &str| {
        let line =
            text.lines().find(|line| line.contains(":cpu:") || line.contains(":cpu,") || line.starts_with("0::/"));
        line.unwrap_or_else(|| panic!("no group in {text}")).to_owned()
    };
    let crowded = processor_group(&text);
    for _ in 0..8 {
        let other = processor_group(&shell(&*guest, "cat /proc/self/cgroup").await);
        assert_ne!(other, crowded, "a new command waits behind forty others");
    }
    drop(first);
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
    let guest = driver.start(id, &SandboxSpec { resources: Resources::of(1, 256, 1), ..place.fresh() }).await.unwrap();
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
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    let (_process, host_pid) = marked_process(&*guest).await;
    // The one that all commands share.
    let group = cgroup_of(host_pid, "cpu").parent().unwrap().to_owned();
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
pub fn cgroup_of(pid: i32, controller: &str) -> PathBuf {
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
    let guest = driver.start(id, &SandboxSpec { resources: Resources::of(1, 384, 5), ..place.fresh() }).await.unwrap();
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
    let guest = driver.start(id, &SandboxSpec { resources: Resources::of(1, 256, 5), ..place.fresh() }).await.unwrap();
    // What is only cached of files is not used up.
    shell(&*guest, "head -c 100M /dev/zero > cached && cat cached > /dev/null").await;
    let hold = "x = b'x' * (64 << 20); print('holding', flush=True); input()";
    let mut holding = guest.run(Command { stdin: true, ..command(&["python3", "-c", hold]) }).await.unwrap();
    wait_for_line(&mut holding, "holding").await;
    let load = driver.usage(id).await.unwrap();
    assert!((60 * MIB..120 * MIB).contains(&load.memory_bytes), "{load:?}");
    assert_eq!((load.memory_limit_bytes, load.memory_kills), (256 * MIB, 0));
    assert!((1..10).contains(&load.processes) && load.processes_max == PROCESSES_MAX, "{load:?}");
    assert!(load.disk_used_bytes >= 100 * MIB && load.disk_size_bytes > 4_096 * MIB, "{load:?}");
    assert!(load.disk_used_bytes < 1_024 * MIB && load.cpu_window_us > 0, "{load:?}");
    drop(holding);
    let endless = guest.run(command(&["/bin/sh", "-c", "while :; do :; done"])).await.unwrap();
    let busy = driver.usage(id).await.unwrap();
    // On a busy host it waits for what it does not get.
    assert!(busy.cpu_used_us + busy.cpu_waited_us >= busy.cpu_window_us / 2, "{busy:?}");
    drop(endless);
    assert_eq!(run(&*guest, command(&["tail", "/dev/zero"])).await.exit.memory_kills, 1);
    assert_eq!(driver.usage(id).await.unwrap().memory_kills, 1);
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}
