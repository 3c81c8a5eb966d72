//! What the kernel has a finite number of: taken to the last from inside, looked at from a neighbour and from the host.

use std::fs;

use nagaya_testkit::{NotRun, Outcome, Running, Sandbox, Suite, Wanted};

use super::world::{Verdict, World, inside, on_host, program};

const RESOURCES: &str = include_str!("payloads/resources.py");
const PYTHON: &str = "/usr/bin/python3";
/// Memory of the sandboxes here, MiB; the testkit's usual one.
const MEMORY_MB: u64 = 512;

/// How many a sandbox may get.
enum Bound {
    /// None: the call is refused.
    None,
    AtMost(u64),
    /// As the host says for each of its users.
    Of(&'static str),
}

struct Resource {
    kind: &'static str,
    bound: Bound,
}

const fn refused(kind: &'static str) -> Resource {
    Resource { kind, bound: Bound::None }
}

const fn at_most(kind: &'static str, most: u64) -> Resource {
    Resource { kind, bound: Bound::AtMost(most) }
}

static RESOURCES_BOUNDED: &[Resource] = &[
    Resource { kind: "inotify_instances", bound: Bound::Of("/proc/sys/user/max_inotify_instances") },
    at_most("queued_signals", 16_384),
    at_most("timers", 16_384),
    at_most("message_queues_of_posix", 256),
    at_most("message_queues_of_system_v", 32),
    at_most("semaphores", 655),
    at_most("segments_of_16_mib", MEMORY_MB / 4 / 16),
    at_most("terminals", 256),
    at_most("threads", 1_024),
    at_most("pipes_of_full_size", 1_024),
    at_most("open_files", 1 << 17),
    at_most("netlink_sockets", 64),
    at_most("datagram_sockets", 2 * MEMORY_MB),
    at_most("filters_of_system_calls", 256),
    refused("contexts_of_asynchronous_io"),
    refused("huge_pages_by_mmap"),
    refused("huge_pages_by_memory_file"),
    refused("huge_pages_by_segment"),
    refused("programs_on_sockets"),
];

const PREFIX: &str = "share__";
const MORE: [&str; 6] = [
    "a_full_dev_shm_leaves_room_for_commands",
    "full_system_v_segments_leave_room_for_commands",
    "a_full_terminal_table_is_told_as_such",
    "file_locks_without_end_end_whoever_takes_them",
    "buffers_that_nobody_counts_stay_small",
    "programs_do_as_usual_what_is_counted_for_them",
];

pub fn names() -> impl Iterator<Item = &'static str> {
    let names = RESOURCES_BOUNDED.iter().map(|resource| &*format!("{PREFIX}{}", resource.kind).leak());
    names.chain(MORE)
}

pub async fn run(suite: &mut Suite, world: &World) {
    for resource in RESOURCES_BOUNDED {
        suite.case(&format!("{PREFIX}{}", resource.kind), exhaust(resource, world)).await;
    }
    suite.case(MORE[0], full_dev_shm(world)).await;
    suite.case(MORE[1], full_segments(world)).await;
    suite.case(MORE[2], full_terminals(world)).await;
    suite.case(MORE[3], locks_without_end(world)).await;
    suite.case(MORE[4], uncounted_buffers(world)).await;
    suite.case(MORE[5], ordinary_use(world)).await;
}

/// A payload that holds all it got, and how many that is.
async fn take(sandbox: &Sandbox, kind: &str, privileged: bool) -> (Running, u64, String) {
    let program = program(RESOURCES, "take");
    let mut running = sandbox.start(&[PYTHON, "-c", &program, kind], privileged).await.unwrap();
    let line = running.wait_for_line("HELD ").await;
    let mut words = line.split_whitespace().skip(1);
    let held = words.next().unwrap().parse().unwrap();
    (running, held, words.next().unwrap().to_owned())
}

async fn exhaust(resource: &Resource, world: &World) -> Outcome {
    let kind = resource.kind;
    let arguments = [kind.to_owned()];
    let one = program(RESOURCES, "one");
    let most = match resource.bound {
        Bound::None => 0,
        Bound::AtMost(most) => most,
        Bound::Of(file) => fs::read_to_string(file).unwrap().trim().parse().unwrap(),
    };
    for privileged in [false, true] {
        let signals_before = queued_signals_of_the_hosts_root();
        let (mut holding, held, end) = take(&world.attacker, kind, privileged).await;
        assert!(end != "nothing", "{held} of {kind}, and no end");
        assert!(held <= most, "{held} of {kind}, of {most} at most, then {end}");
        assert_eq!(held == 0, matches!(resource.bound, Bound::None), "{held} of {kind}, then {end}");
        // While it holds them, others have theirs.
        if !matches!(resource.bound, Bound::None) {
            let neighbour = inside(&world.victim, &one, &arguments, false).await;
            assert!(matches!(neighbour, Verdict::Reached(_)), "a neighbour gets no {kind}: {neighbour:?}");
        }
        let host = on_host(&["env"], &one, &arguments).await;
        let charged = queued_signals_of_the_hosts_root().saturating_sub(signals_before);
        assert!(charged < 1_000, "the host's root is charged with {charged} signals");
        holding.close_stdin().await.unwrap();
        let finished = holding.finish().await.unwrap();
        assert_eq!(finished.exit.exit_code, 0, "{}", finished.describe());
        match host {
            Verdict::Reached(_) => {}
            other if matches!(resource.bound, Bound::None) => {
                return Err(NotRun(format!("this host itself has none of {kind} ({other:?})")));
            }
            other => panic!("the host gets no {kind}: {other:?}"),
        }
    }
    assert_eq!(world.attacker.shell("echo alive", false).await, "alive");
    Ok(())
}

/// The first number of `SigQ` of process 1, which is root's.
fn queued_signals_of_the_hosts_root() -> u64 {
    let status = fs::read_to_string("/proc/1/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("SigQ:")).unwrap();
    line.trim().split('/').next().unwrap().parse().unwrap()
}

async fn fresh(world: &World, name: &str) -> Sandbox {
    let wanted = Wanted { name: name.into(), memory_mb: MEMORY_MB as i32, ..Wanted::default() };
    world.client.create(&wanted).await.unwrap()
}

async fn full_dev_shm(world: &World) -> Outcome {
    let sandbox = fresh(world, "full-shm").await;
    let said = sandbox
        .shell("head -c 600M /dev/zero > /dev/shm/x; stat -c %s /dev/shm/x; df -m --output=size /dev/shm", false)
        .await;
    assert!(said.lines().any(|line| line.trim() == (MEMORY_MB / 2).to_string()), "{said}");
    assert!(said.contains(&(MEMORY_MB << 19).to_string()), "as much as its half was written: {said}");
    assert_eq!(sandbox.shell("echo alive", false).await, "alive");
    // The file calls meet the same end.
    assert!(sandbox.write("/dev/shm/y", vec![0; 1 << 20]).await.is_err());
    // Names without content hold memory, too.
    let names = "import os
os.unlink('/dev/shm/x')
count = 0
try:
    while True:
        os.close(os.open(f'/dev/shm/{count}', os.O_CREAT | os.O_WRONLY))
        count += 1
except OSError as error:
    print(count, error.errno)";
    let said = sandbox.run(&[PYTHON, "-c", names]).await.unwrap();
    let (count, errno) =
        said.text().split_once(' ').map(|(count, errno)| (count.parse::<u64>(), errno.to_owned())).unwrap();
    let count = count.unwrap();
    assert_eq!(errno, rustix::io::Errno::NOSPC.raw_os_error().to_string());
    assert!(count > 1_000 && count <= MEMORY_MB << 6, "{count} names in /dev/shm");
    assert_eq!(sandbox.shell("echo alive", false).await, "alive");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn full_segments(world: &World) -> Outcome {
    let sandbox = fresh(world, "full-segments").await;
    let fill = "import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
count = 0
while (made := libc.shmget(0, 8 << 20, 0o1600)) >= 0:
    place = libc.shmat(made, None, 0)
    ctypes.memset(place, 1, 8 << 20)
    libc.shmdt(ctypes.c_void_p(place))
    count += 1
print(count)";
    let said = sandbox.run(&[PYTHON, "-c", fill]).await.unwrap();
    assert_eq!(said.text(), (MEMORY_MB / 4 / 8).to_string(), "{}", said.describe());
    assert_eq!(sandbox.shell("echo alive", false).await, "alive");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn full_terminals(world: &World) -> Outcome {
    let (mut holding, held, end) = take(&world.attacker, "terminals", false).await;
    assert!(held > 0 && end == "ENOSPC", "{held}, then {end}");
    let refused = world.attacker.start_in_terminal(&["/bin/true"]).await.map(|_| ()).unwrap_err();
    assert_eq!(refused.code, connectrpc::ErrorCode::ResourceExhausted, "{refused:?}");
    assert!(refused.to_string().contains("terminals"), "{refused:?}");
    let mut elsewhere = world.victim.start_in_terminal(&["/bin/true"]).await.unwrap();
    elsewhere.close_stdin().await.unwrap();
    assert_eq!(elsewhere.finish().await.unwrap().exit.exit_code, 0);
    holding.close_stdin().await.unwrap();
    holding.finish().await.unwrap();
    Ok(())
}

async fn locks_without_end(world: &World) -> Outcome {
    let few = "import fcntl, os
file = os.open('few', os.O_RDWR | os.O_CREAT)
for place in range(500):
    fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * place)
os.write(1, b'READY\\n')
os.read(0, 1)
os.write(1, b'KEPT\\n')";
    let mut neighbour = world.victim.start(&[PYTHON, "-c", few], false).await.unwrap();
    neighbour.wait_for("READY").await;
    let program = program(RESOURCES, "locks_without_end");
    for privileged in [false, true] {
        let finished = world.attacker.run_as(&[PYTHON, "-c", &program], privileged).await.unwrap();
        assert_eq!(
            (finished.text().as_str(), finished.exit.signal.as_str()),
            ("LOCKING", "SIGKILL"),
            "{}",
            finished.describe()
        );
    }
    assert_eq!(world.attacker.shell("echo alive", false).await, "alive");
    neighbour.close_stdin().await.unwrap();
    assert!(neighbour.finish().await.unwrap().text().ends_with("KEPT"));
    Ok(())
}

/// Twice what may be asked for, as the kernel makes it, and one datagram beyond.
const BUFFER_BYTES_MAX: u64 = 2 * 212_992 + (1 << 16);

async fn uncounted_buffers(world: &World) -> Outcome {
    let program = program(RESOURCES, "uncounted_buffers");
    for privileged in [false, true] {
        let finished = world.attacker.run_as(&[PYTHON, "-c", &program], privileged).await.unwrap();
        let text = finished.text();
        let held = |name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|line| line.split(' ').next()?.parse().ok())
                .unwrap_or_else(|| panic!("{}", finished.describe()))
        };
        for name in ["netlink", "echoes", "errors"] {
            assert!(held(name) > 100_000, "these cannot be filled, so nothing is shown: {text}");
            assert!(held(name) <= BUFFER_BYTES_MAX, "one socket holds more than programs need: {text}");
        }
        for name in ["copies", "copies-tcp", "timestamps"] {
            assert_eq!(held(name), 0, "copies of what was sent are kept: {text}");
        }
    }
    Ok(())
}

async fn ordinary_use(world: &World) -> Outcome {
    let program = program(RESOURCES, "ordinary_use");
    for privileged in [false, true] {
        let verdict = inside(&world.attacker, &program, &[], privileged).await;
        assert_eq!(verdict, Verdict::Reached("all".into()));
    }
    for (tool, script) in [
        ("getent", "getent hosts localhost && getent ahosts 127.0.0.1"),
        ("ip", "ip address show lo && ip route"),
        ("ss", "ss -tuna && ss -x"),
        ("ping", "ping -c 1 127.0.0.1"),
        ("node", "node -e 'require(\"os\").networkInterfaces()'"),
    ] {
        let there = world.attacker.shell(&format!("command -v {tool} || true"), false).await;
        if !there.is_empty() {
            world.attacker.shell(&format!("({script}) > /dev/null"), false).await;
        }
    }
    Ok(())
}
