//! What tells programs of the machine they run on tells them of the sandbox's own.

use nagaya_engine::model::{Resources, SandboxSpec};
use nagaya_testkit::Outcome;

use super::place::*;

const MEMORY_MB: u32 = 512;

/// Calls `sysinfo` as C programs do, and prints its fields.
const SYSINFO: &str = r#"
import ctypes, struct
buffer = ctypes.create_string_buffer(128)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.sysinfo(buffer) == 0
uptime, *rest = struct.unpack_from("=q3Q6QH", buffer)
loads, (total, free, shared, buffers, swap, free_swap), processes = rest[:3], rest[3:9], rest[9]
print(uptime, total // 1024, free // 1024, swap, processes)
"#;

pub async fn every_source_tells_of_the_sandboxs_own_memory(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest =
        driver.start(id, &SandboxSpec { resources: Resources::of(1, MEMORY_MB, 5), ..place.fresh() }).await.unwrap();
    let total = (MEMORY_MB << 10).to_string();
    write(&*guest, "sysinfo.py", SYSINFO.as_bytes()).await.unwrap();
    for (what, script) in [
        ("/proc/meminfo", "sed -n 's/^MemTotal: *\\([0-9]*\\) kB$/\\1/p' /proc/meminfo"),
        ("sysconf", "echo $(($(getconf _PHYS_PAGES) * $(getconf PAGESIZE) / 1024))"),
        ("sysinfo", "python3 sysinfo.py | cut -d' ' -f2"),
        ("control groups", "echo $(($(cat /sys/fs/cgroup/memory.max) / 1024))"),
    ] {
        for privileged in [false, true] {
            assert_eq!(shell_as(&*guest, &format!("cd /home/tenki && {script}"), privileged).await, total, "{what}");
        }
    }
    assert_eq!(shell(&*guest, "python3 sysinfo.py | cut -d' ' -f4").await, "0", "there is no swap");
    for (program, script, expected) in [
        ("/usr/bin/free", "free -k | awk '/^Mem/ { print $2 }'", total.clone()),
        ("/usr/bin/node", "node -p 'require(\"os\").totalmem() / 1024'", total.clone()),
        // A quarter of it, as its documentation says.
        (
            "/usr/bin/java",
            "java -XX:+PrintFlagsFinal -version 2>/dev/null | awk '$2 == \"MaxHeapSize\" { print $4 / 1048576 }'",
            (MEMORY_MB / 4).to_string(),
        ),
    ] {
        if shell(&*guest, &format!("test -x {program} && echo there || true")).await == "there" {
            assert_eq!(shell(&*guest, script).await, expected, "{program}");
        }
    }
    // What is only cached of files can be had.
    shell(&*guest, "head -c 200M /dev/zero > cached && sync && cat cached > /dev/null").await;
    let available = "sed -n 's/^MemAvailable: *\\([0-9]*\\) kB$/\\1/p' /proc/meminfo";
    let fresh = format!("sleep 1.5; {available}");
    let available: u64 = shell(&*guest, &fresh).await.parse().unwrap();
    assert!(available > 430 << 10, "{available} KiB of 512 MiB are told to be available");
    // What the kernel does with a place that cannot be written to.
    let bad = "import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.sysinfo(ctypes.c_void_p(8)), ctypes.get_errno())";
    let errno = rustix::io::Errno::FAULT.raw_os_error();
    assert_eq!(shell(&*guest, &format!("python3 -c '{bad}'")).await, format!("-1 {errno}"));
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn every_source_tells_of_the_sandboxs_own_processors(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest =
        driver.start(id, &SandboxSpec { resources: Resources::of(1, MEMORY_MB, 5), ..place.fresh() }).await.unwrap();
    for (what, script) in [
        ("affinity", "nproc"),
        ("all there are", "nproc --all"),
        ("configured", "getconf _NPROCESSORS_CONF"),
        ("online", "getconf _NPROCESSORS_ONLN"),
        ("/proc/cpuinfo", "grep -c ^processor /proc/cpuinfo"),
        ("/proc/stat", "grep -c '^cpu[0-9]' /proc/stat"),
        ("/sys", "ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l"),
        ("lists in /sys", "cd /sys/devices/system/cpu && cat possible present online | sort -u | tr , '\\n' | wc -l"),
        ("control groups", "awk '{ print $1 / $2 }' /sys/fs/cgroup/cpu.max"),
        ("python3", "python3 -c 'import os; print(os.cpu_count())'"),
    ] {
        assert_eq!(shell(&*guest, script).await, "1", "{what}");
    }
    // Everybody means the same one.
    let numbers = "sed -n 's/^processor.*: //p' /proc/cpuinfo; cat /sys/devices/system/cpu/online; \
                   sed -n 's/^cpu\\([0-9][0-9]*\\) .*/\\1/p' /proc/stat; python3 -c 'import os; print(*os.sched_getaffinity(0))'";
    let same: std::collections::BTreeSet<String> = shell(&*guest, numbers).await.lines().map(str::to_owned).collect();
    assert_eq!(same.len(), 1, "{same:?}");
    for (program, script) in [
        ("/usr/bin/lscpu", "lscpu | sed -n 's/^CPU(s): *//p'"),
        ("/usr/bin/node", "node -p 'require(\"os\").cpus().length'"),
    ] {
        if shell(&*guest, &format!("test -x {program} && echo there || true")).await == "there" {
            assert_eq!(shell(&*guest, script).await, "1", "{program}");
        }
    }
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

pub async fn every_source_tells_of_the_sandboxs_own_time_and_load(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest =
        driver.start(id, &SandboxSpec { resources: Resources::of(1, MEMORY_MB, 5), ..place.fresh() }).await.unwrap();
    write(&*guest, "sysinfo.py", SYSINFO.as_bytes()).await.unwrap();
    let host: f64 = std::fs::read_to_string("/proc/uptime").unwrap().split(' ').next().unwrap().parse().unwrap();
    // Slots are pre-created; this suite is not older than its host.
    let ages = "cut -d. -f1 /proc/uptime; python3 sysinfo.py | cut -d' ' -f1; \
                python3 -c 'import time; print(int(time.clock_gettime(time.CLOCK_BOOTTIME)))'; \
                echo $(($(date +%s) - $(sed -n 's/^btime //p' /proc/stat)))";
    let ages: Vec<f64> = shell(&*guest, ages).await.lines().map(|age| age.parse().unwrap()).collect();
    assert_eq!(ages.len(), 4);
    assert!(ages.iter().all(|age| (age - ages[0]).abs() <= 2.0 && *age < host - 5.0), "{ages:?}, the host's is {host}");
    // A process is as old as it is.
    if shell(&*guest, "test -x /usr/bin/ps && echo there || true").await == "there" {
        let age: u32 = shell(&*guest, "ps -o etimes= -p $$").await.trim().parse().unwrap();
        assert!(age <= 2, "a new shell is {age} s old");
    }
    let used = async || -> u64 { shell(&*guest, "awk '/^cpu / { print $2 + $4 }' /proc/stat").await.parse().unwrap() };
    let before = used().await;
    shell(&*guest, "timeout 2 sh -c 'while :; do :; done' || true; sleep 1.2").await;
    let after = used().await;
    assert!((50..600).contains(&(after - before)), "2 s of one processor are told as {} ticks", after - before);
    let load = shell(&*guest, "cat /proc/loadavg").await;
    let first: f64 = load.split(' ').next().unwrap().parse().unwrap();
    assert!(first < 1.0 && load.split(' ').count() == 5, "{load}");
    assert_eq!(shell(&*guest, "wc -l < /proc/swaps").await, "1");
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}

/// Whoever answers `sysinfo` must be able to write into any process; nobody else in the sandbox may.
pub async fn commands_cannot_look_into_each_other(place: &mut Place) -> Outcome {
    let (driver, id) = (place.driver(), fresh_id());
    let guest = driver.start(id, &place.fresh()).await.unwrap();
    const PTRACE: u64 = 1 << 19;
    for privileged in [false, true] {
        let sets =
            shell_as(&*guest, "sed -n 's/^Cap\\(Prm\\|Eff\\|Bnd\\|Inh\\|Amb\\):\\t//p' /proc/self/status", privileged)
                .await;
        assert_eq!(sets.lines().count(), 5);
        for set in sets.lines() {
            assert_eq!(u64::from_str_radix(set, 16).unwrap() & PTRACE, 0, "{sets}");
        }
    }
    driver.destroy(id).await.unwrap();
    place.settled().await;
    Ok(())
}
