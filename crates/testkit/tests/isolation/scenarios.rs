//! Attempts in which the host, the file calls or another sandbox have a part.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use connectrpc::ErrorCode;
use nagaya_testkit::{NotRun, Outcome, Running, Sandbox, Suite, Wanted};

use super::world::{Verdict, World, clock, inside, program, ready};

const FILES: &str = include_str!("payloads/files.py");
const NETWORK: &str = include_str!("payloads/network.py");
const PROCESSES: &str = include_str!("payloads/processes.py");
const PYTHON: &str = "/usr/bin/python3";

/// Ids of sandboxes on the host start here; everything below belongs to the host's own users.
const FIRST_ID: u32 = 0x7000_0000;

macro_rules! scenarios {
    ($($name:ident),* $(,)?) => {
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        pub async fn run(suite: &mut Suite, world: &World) {
            $(suite.case(stringify!($name), $name(world)).await;)*
        }
    };
}

scenarios!(
    file_calls_reach_no_file_of_the_host_by_any_path,
    file_calls_read_neither_memory_nor_descriptors_of_the_agent,
    file_calls_lose_no_race_against_swapped_links,
    root_of_a_sandbox_owns_nothing_on_the_host,
    writing_to_usr_leaves_the_hosts_programs_alone,
    deleting_usr_leaves_the_hosts_programs_alone,
    a_certificate_opens_no_other_sandbox,
    killing_everybody_kills_only_its_own,
    changes_of_the_hosts_files_are_not_seen,
    events_of_the_hosts_devices_are_not_heard,
    what_the_server_was_started_with_stays_with_it,
    two_sandboxes_have_a_boot_id_each,
    commands_are_killed_before_anything_else,
    a_crash_inside_starts_no_program_of_the_host,
);

/// Ways to say a path that a careless server would resolve outside the sandbox.
fn disguises(path: &str) -> Vec<String> {
    let prefixes = [
        "",
        "/proc/self/root",
        "/proc/1/root",
        "/proc/thread-self/root",
        "/proc/1/cwd",
        "/proc/self/cwd/../../../..",
        "../../../../../../../..",
        "/home/tenki/../../../../../..",
        "/tmp/../..",
        "/proc/1/task/1/root",
        "/proc/self/fd/3",
        "/proc/self/fd/0/../../..",
        "/dev/fd/5",
        "disguised-root",
        "disguised-cwd",
        "disguised-up",
        "/proc/2/root",
    ];
    prefixes.iter().map(|prefix| format!("{prefix}{path}")).collect()
}

async fn file_calls_reach_no_file_of_the_host_by_any_path(world: &World) -> Outcome {
    let sandbox = &world.attacker;
    let links =
        "ln -sfn /proc/1/root disguised-root; ln -sfn /proc/1/cwd disguised-cwd; ln -sfn ../../../../.. disguised-up";
    sandbox.shell(links, false).await;
    let stray = format!("nagaya-stray-{:x}", clock());
    for marker in world.markers.texts() {
        for path in disguises(&marker) {
            if let Ok(content) = sandbox.read(&path).await {
                panic!("{path} was read: {content:?}");
            }
            assert!(!sandbox.stat(&path).await.is_ok_and(|stat| stat.exists), "{path} was seen");
        }
        let directory = Path::new(&marker).parent().unwrap();
        for path in disguises(&directory.display().to_string()) {
            let names = sandbox.list(&path).await.unwrap_or_default();
            assert!(!names.contains(&world.markers.name), "{path} was listed");
            let _ = sandbox.write(&format!("{path}/{stray}"), "stray").await;
        }
        assert!(!directory.join(&stray).exists(), "a file was written to the host's {}", directory.display());
    }
    // The same ways do lead to what the sandbox has itself, where they lead anywhere.
    let read = sandbox.read(&format!("disguised-up/srv/{}", world.own_marker)).await.unwrap();
    assert_eq!(read, "own\n");
    assert_eq!(sandbox.read(&format!("/tmp/../../srv/{}", world.own_marker)).await.unwrap(), "own\n");
    assert_eq!(sandbox.read(&format!("/tmp/{stray}")).await.unwrap(), "stray");
    Ok(())
}

async fn file_calls_read_neither_memory_nor_descriptors_of_the_agent(world: &World) -> Outcome {
    let sandbox = &world.attacker;
    let own = [
        "environ",
        "auxv",
        "mem",
        "maps",
        "smaps",
        "pagemap",
        "stack",
        "syscall",
        "map_files",
        "exe",
        "root/etc/passwd",
        "cwd",
    ];
    let descriptors: Vec<String> =
        (0..48).flat_map(|number| [format!("fd/{number}"), format!("fdinfo/{number}")]).collect();
    for process in ["self", "1", "thread-self"] {
        for name in own.iter().map(|name| (*name).to_owned()).chain(descriptors.clone()) {
            let path = format!("/proc/{process}/{name}");
            if let Ok(content) = sandbox.read(&path).await {
                assert!(content.is_empty(), "{path} was read: {} bytes", content.len());
            }
            let _ = sandbox.write(&path, "0").await;
        }
    }
    assert_eq!(sandbox.shell("echo alive", false).await, "alive");
    for process in ["self", "1", "thread-self", "self/task/1", "1/task/1"] {
        for descriptor in 0..48 {
            let path = format!("/proc/{process}/fd/{descriptor}");
            assert!(!sandbox.stat(&path).await.is_ok_and(|stat| stat.exists), "{path} was looked at");
        }
        for directory in ["fd", "fdinfo", "map_files", "ns", "task"] {
            let path = format!("/proc/{process}/{directory}");
            assert!(sandbox.list(&path).await.is_err(), "{path} was listed");
        }
    }
    // The call itself can look at files of /proc.
    assert!(sandbox.stat("/proc/1").await.unwrap().is_dir);
    assert!(!sandbox.read("/proc/uptime").await.unwrap().is_empty());
    Ok(())
}

const SWAPPER: &str = "
import ctypes, os, sys, threading
libc = ctypes.CDLL(None)
os.makedirs('race/real', exist_ok=True)
open('race/real/inside', 'w').write('inside')
targets = ['/srv', '/proc/1/root/root', '/proc/self/root', '/', '/root', '/etc', '/proc/1/cwd']
for number, target in enumerate(targets):
    if not os.path.islink(f'race/link{number}'):
        os.symlink(target, f'race/link{number}')
os.rename('race/real', 'race/d')
done = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
print('READY', flush=True)
turn = 0
while not done.is_set():
    turn += 1
    link = f'race/link{turn % len(targets)}'.encode()
    # RENAME_EXCHANGE there and back: at no time is the name free.
    for _ in range(2):
        libc.renameat2(-100, b'race/d', -100, link, 2)
";

async fn file_calls_lose_no_race_against_swapped_links(world: &World) -> Outcome {
    let sandbox = &world.attacker;
    let mut swapper = ready(sandbox, &[PYTHON, "-c", SWAPPER]).await;
    let stray = format!("nagaya-stray-{:x}", clock());
    let (mut through_link, mut through_directory) = (0, 0);
    for round in 0..6_000 {
        if round >= 300 && through_link > 0 && through_directory > 0 {
            break;
        }
        if let Ok(content) = sandbox.read(&format!("race/d/{}", world.markers.name)).await {
            panic!("a file of the host was read: {content:?}");
        }
        let _ = sandbox.write(&format!("race/d/{stray}"), "stray").await;
        through_link += u32::from(sandbox.read(&format!("race/d/{}", world.own_marker)).await.is_ok());
        through_directory += u32::from(sandbox.read("race/d/inside").await.is_ok());
        let _ = sandbox.remove(&format!("race/d/{stray}")).await;
    }
    swapper.close_stdin().await.unwrap();
    swapper.finish().await.unwrap();
    assert!(through_link > 0 && through_directory > 0, "there was no race: {through_link}, {through_directory}");
    for marker in &world.markers.paths {
        let stray = marker.parent().unwrap().join(&stray);
        assert!(!stray.exists(), "{} was written on the host", stray.display());
        assert_eq!(fs::read_to_string(marker).unwrap(), world.markers.secret);
    }
    Ok(())
}

/// A waiting process of the sandbox and its number on the host.
async fn seen_from_the_host(sandbox: &Sandbox, privileged: bool) -> (Running, u32) {
    let mark = format!("nagaya-seen-{:x}", clock());
    let argv = ["/bin/sh", "-c", "echo READY; read -r _", mark.as_str()];
    let mut running = sandbox.start(&argv, privileged).await.unwrap();
    running.wait_for("READY").await;
    let found = fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        String::from_utf8_lossy(&command).split('\0').any(|argument| argument == mark).then_some(pid)
    });
    (running, found.expect("the host sees processes of sandboxes"))
}

async fn root_of_a_sandbox_owns_nothing_on_the_host(world: &World) -> Outcome {
    let sandbox = &world.attacker;
    let make = "cp /usr/bin/id /home/tenki/root-id && chown 0:0 /home/tenki/root-id && chmod 4755 /home/tenki/root-id";
    sandbox.shell(make, true).await;
    // Inside it does what it should: for everybody there it is root.
    let inside = sandbox.shell("/home/tenki/root-id -u", false).await;
    assert_eq!(inside, "0");
    let (_running, pid) = seen_from_the_host(sandbox, true).await;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for field in ["Uid:", "Gid:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        for id in line.split_whitespace() {
            assert!(id.parse::<u32>().unwrap() >= FIRST_ID, "root of the sandbox is {field} {id} on the host");
        }
    }
    let file = fs::metadata(format!("/proc/{pid}/root/home/tenki/root-id")).unwrap();
    assert!(file.mode() & 0o4000 != 0, "the host sees the same file");
    assert!(file.uid() >= FIRST_ID && file.gid() >= FIRST_ID, "its owner is {} on the host", file.uid());
    let own = fs::metadata(&world.markers.paths[0]).unwrap();
    assert_eq!(own.uid(), 0, "the host's own files are seen with their owners");
    // Two sandboxes share no id.
    let (_other, other) = seen_from_the_host(&world.victim, true).await;
    assert_ne!(
        fs::metadata(format!("/proc/{other}")).unwrap().uid(),
        fs::metadata(format!("/proc/{pid}")).unwrap().uid()
    );
    Ok(())
}

async fn writing_to_usr_leaves_the_hosts_programs_alone(world: &World) -> Outcome {
    let sandbox = &world.attacker;
    let (path, stray) = ("/usr/lib/os-release", format!("/usr/bin/nagaya-stray-{:x}", clock()));
    let before = fs::read(path).unwrap();
    let script = format!(
        "echo changed >> {path}; cp /bin/true {stray}; ln -f {stray} {stray}-link; chmod 777 /usr/bin; touch -d @1 /usr/bin/env"
    );
    sandbox.shell(&script, true).await;
    assert!(sandbox.read(path).await.unwrap().ends_with(b"changed\n"), "the sandbox sees its own change");
    assert_eq!(fs::read(path).unwrap(), before);
    assert!(!Path::new(&stray).exists());
    assert_eq!(fs::metadata("/usr/bin").unwrap().mode() & 0o777, 0o755);
    assert!(fs::metadata("/usr/bin/env").unwrap().mtime() > 1);
    assert_eq!(world.victim.read(path).await.unwrap(), before, "another sandbox sees the change");
    Ok(())
}

async fn deleting_usr_leaves_the_hosts_programs_alone(world: &World) -> Outcome {
    let count = || fs::read_dir("/usr/bin").unwrap().count();
    let before = count();
    let sandbox = world.client.create(&Wanted { name: "suicide".into(), ..Wanted::default() }).await.unwrap();
    let _ = sandbox.run_as(&["/bin/rm", "-rf", "--no-preserve-root", "/"], true).await;
    let left = sandbox.list("/usr/bin").await.unwrap_or_default();
    assert!(left.is_empty(), "the sandbox deleted nothing: {} programs left", left.len());
    assert_eq!(count(), before);
    assert_eq!(world.victim.shell("echo alive", false).await, "alive");
    sandbox.terminate().await.unwrap();
    Ok(())
}

async fn a_certificate_opens_no_other_sandbox(world: &World) -> Outcome {
    let request = nagaya_api::tenki::v1::CreateSessionCredentialRequest { session_id: world.attacker.id.clone() };
    let answer = world.client.control.create_session_credential(request).await.unwrap();
    let certificate = &answer.credential.credential;
    let foreign = world.client.open(&world.victim.id, certificate);
    let secret = format!("/home/tenki/{}", world.victim_secret);
    let refused = foreign.read(&secret).await.unwrap_err();
    assert!(matches!(refused.code, ErrorCode::Unauthenticated | ErrorCode::PermissionDenied), "{refused:?}");
    assert!(foreign.run(&["/bin/true"]).await.is_err());
    for broken in ["", "x", &certificate[..certificate.len() - 2], &format!("{certificate}A")] {
        assert!(world.client.open(&world.attacker.id, broken).stat("/").await.is_err(), "{broken:?} was accepted");
    }
    assert!(world.client.open(&world.attacker.id, certificate).stat("/").await.unwrap().exists);
    assert_eq!(world.victim.read(&secret).await.unwrap(), "secret");
    Ok(())
}

async fn killing_everybody_kills_only_its_own(world: &World) -> Outcome {
    let program = program(PROCESSES, "kill_everybody");
    for privileged in [false, true] {
        let verdict = inside(&world.attacker, &program, &[], privileged).await;
        // Its own child did die of it.
        assert_eq!(verdict, Verdict::Refused("sent".into()));
        assert_eq!(world.attacker.shell("echo alive", false).await, "alive");
    }
    let pid = world.victim_process.as_ref().expect("it runs until the end").pid;
    let command = world.victim.read(&format!("/proc/{pid}/cmdline")).await.unwrap();
    assert!(String::from_utf8_lossy(&command).contains(&world.victim_secret), "the victim's process is gone");
    Ok(())
}

const WATCHED: [&str; 8] = ["/tmp", "/root", "/etc", "/var/tmp", "/dev/shm", "/usr", "/usr/bin", "/home"];

async fn changes_of_the_hosts_files_are_not_seen(world: &World) -> Outcome {
    let program = program(FILES, "events_on_files");
    let mut argv = vec![PYTHON, "-c", program.as_str()];
    argv.extend(WATCHED);
    for (privileged, control) in [(false, false), (true, false), (false, true)] {
        let mut watching = world.attacker.start(&argv, privileged).await.unwrap();
        watching.wait_for("WATCHING").await;
        if control {
            world.attacker.write("/tmp/event", "event").await.unwrap();
        } else {
            for directory in ["/tmp", "/root", "/etc", "/var/tmp", "/dev/shm", "/home"] {
                let path = Path::new(directory).join(format!("{}-event", world.markers.name));
                fs::write(&path, "event").unwrap();
                fs::remove_file(&path).unwrap();
            }
            fs::read_dir("/usr/bin").unwrap().count();
        }
        watching.write("go\n").await.unwrap();
        let finished = watching.finish().await.unwrap();
        let verdict = Verdict::parse(&finished.text(), || finished.describe());
        assert_eq!(matches!(verdict, Verdict::Reached(_)), control, "{verdict:?}");
        assert!(!matches!(verdict, Verdict::Broken(_)), "{verdict:?}");
    }
    Ok(())
}

/// A device of every host, which can be asked to announce itself again.
const ANNOUNCER: &str = "/sys/devices/virtual/mem/null/uevent";

async fn events_of_the_hosts_devices_are_not_heard(world: &World) -> Outcome {
    let program = program(NETWORK, "events_of_the_kernel");
    for privileged in [false, true] {
        let mut listening = world.attacker.start(&[PYTHON, "-c", &program], privileged).await.unwrap();
        listening.wait_for("LISTENING").await;
        fs::write(ANNOUNCER, "change").unwrap();
        listening.write("go\n").await.unwrap();
        let finished = listening.finish().await.unwrap();
        let verdict = Verdict::parse(&finished.text(), || finished.describe());
        assert!(matches!(verdict, Verdict::Refused(_)), "{verdict:?}");
    }
    let mut control =
        Command::new(PYTHON).args(["-c", &program]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(control.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "LISTENING");
    fs::write(ANNOUNCER, "change").unwrap();
    control.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let verdict = Verdict::parse(&lines.next().unwrap().unwrap(), String::new);
    control.wait().unwrap();
    match verdict {
        Verdict::Reached(_) => Ok(()),
        other => Err(NotRun(format!("the host does not hear its own devices here ({other:?})"))),
    }
}

async fn what_the_server_was_started_with_stays_with_it(world: &World) -> Outcome {
    let _running = world.attacker.start(&["/bin/sleep", "60"], false).await.unwrap();
    let file = world.left_open.path();
    let mut holders = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        // Processes come and go.
        let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let holds = descriptors.filter_map(|of| fs::read_link(of.path()).ok()).any(|link| link == file);
        if let (true, Some(pid)) = (holds, process.file_name().to_str().and_then(|name| name.parse::<u32>().ok())) {
            holders.push(pid);
        }
    }
    holders.sort_unstable();
    let mut expected = vec![std::process::id(), world.server.pid()];
    expected.sort_unstable();
    assert_eq!(holders, expected, "this test and the server hold it, and nobody else");
    Ok(())
}

async fn two_sandboxes_have_a_boot_id_each(world: &World) -> Outcome {
    const FILE: &str = "/proc/sys/kernel/random/boot_id";
    let ids = [
        world.attacker.shell(&format!("cat {FILE}"), false).await,
        world.victim.shell(&format!("cat {FILE}"), true).await,
    ];
    for id in &ids {
        assert!(id.len() == 36 && id.bytes().filter(|byte| *byte == b'-').count() == 4, "{id}");
    }
    assert_ne!(ids[0], ids[1]);
    assert_eq!(world.attacker.shell(&format!("cat {FILE}"), true).await, ids[0], "it stays");
    Ok(())
}

/// What the host kills when it has no memory left: commands, and not agents, whatever starts at the same time.
async fn commands_are_killed_before_anything_else(world: &World) -> Outcome {
    let sandbox = &world.attacker;
    let score = || async { sandbox.shell("cat /proc/self/oom_score_adj", false).await };
    let scores = tokio::join!(score(), score(), score(), score(), score(), score(), score(), score());
    let scores: [String; 8] = scores.into();
    assert_eq!(scores, ["500"; 8]);
    let own = sandbox.shell("cat /proc/1/oom_score_adj", false).await;
    assert_eq!(own, "0", "the agent's own");
    Ok(())
}

/// Sets a file of the host, and puts back what was in it.
struct Replaced {
    path: &'static str,
    before: Vec<u8>,
}

impl Replaced {
    fn set(path: &'static str, value: &str) -> Self {
        let before = fs::read(path).unwrap();
        fs::write(path, value).unwrap();
        Self { path, before }
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        let _ = fs::write(self.path, &self.before);
    }
}

const CRASHES: &str = "
import os, resource, signal
for limits in (None, (0, 0), (1, 1), (4096, 4096), (-1, -1)):
    pid = os.fork()
    if pid == 0:
        try:
            if limits: resource.setrlimit(resource.RLIMIT_CORE, limits)
        except ValueError:
            pass
        os.kill(os.getpid(), signal.SIGSEGV)
    os.waitpid(pid, 0)
print('crashed')
";

/// A program of this host that takes core files, and writes down the host ids of whose they are.
struct Collector {
    mark: std::path::PathBuf,
    _pattern: Replaced,
    _directory: tempfile::TempDir,
}

impl Collector {
    fn install() -> Self {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (program, mark) = (directory.path().join("collect"), directory.path().join("collected"));
        fs::write(&program, format!("#!/bin/sh\necho $1 $2 >> {}\n", mark.display())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let pattern = Replaced::set("/proc/sys/kernel/core_pattern", &format!("|{} %P %u", program.display()));
        Self { mark, _pattern: pattern, _directory: directory }
    }

    fn collected(&self) -> String {
        fs::read_to_string(&self.mark).unwrap_or_default()
    }

    /// Crashes on the host; true when that was collected, and so all that crashed before was.
    async fn collects(&self) -> bool {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let line = format!("{} 0\n", child.id());
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::SEGV).unwrap();
        child.wait().unwrap();
        for _ in 0..500 {
            if self.collected().contains(&line) {
                return true;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        false
    }
}

async fn a_crash_inside_starts_no_program_of_the_host(_world: &World) -> Outcome {
    let collector = Collector::install();
    if !collector.collects().await {
        return Err(NotRun("this host starts no program for core files here".into()));
    }
    // What is pre-created goes by the pattern of its making, so this takes a server of its own.
    let mut server = nagaya_testkit::Server::start_with("[network]\noutbound = false\n");
    let client = nagaya_testkit::Client::of(&server);
    let sandbox = client.create(&Wanted { name: "crasher".into(), ..Wanted::default() }).await.unwrap();
    for privileged in [false, true] {
        let finished = sandbox.run_as(&[PYTHON, "-c", CRASHES], privileged).await.unwrap();
        assert_eq!(finished.text(), "crashed", "{}", finished.describe());
        // Programs that take precautions, such as sudo, must not complain.
        assert_eq!(sandbox.shell("ulimit -c 0 && echo set", privileged).await, "set");
    }
    assert!(collector.collects().await, "it is there no more");
    sandbox.terminate().await.unwrap();
    assert!(server.terminate().success());
    let collected = collector.collected();
    let of_sandboxes = collected
        .lines()
        .filter(|line| line.split(' ').nth(1).and_then(|id| id.parse::<u32>().ok()).is_some_and(|id| id >= FIRST_ID));
    assert_eq!(of_sandboxes.count(), 0, "{collected}");
    Ok(())
}
