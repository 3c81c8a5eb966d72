//! The pool of disks: found again, grown, never out of the host's space, and gone after a purge.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use nagaya_testkit::{Client, Kind, Sandbox, Server, SmallDisk, Wanted, binary, leftovers, settle};

const SMALL_POOLS: &str = "[pools]\nslots_ready = 1\nisolated_slots_ready = 1\n";

fn can_run() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("pool suite: not run: only root can start the namespace driver");
    }
    root
}

/// Where the disks are, if that is a pool.
fn pool_of(server: &Server) -> Option<std::path::PathBuf> {
    Some(server.storage()).filter(|storage| storage != server.data_dir())
}

fn file_of(server: &Server) -> std::path::PathBuf {
    server.data_dir().join("storage.xfs")
}

fn loop_devices(server: &Server) -> Vec<String> {
    let over_the_pool = |device: &fs::DirEntry| {
        let backing = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        Path::new(backing.trim()) == file_of(server)
    };
    let devices = fs::read_dir("/sys/block").unwrap().flatten().filter(over_the_pool);
    devices.map(|device| device.file_name().into_string().unwrap()).collect()
}

fn megabytes(server: &Server) -> u64 {
    fs::metadata(file_of(server)).unwrap().len() >> 20
}

/// Every byte of the pool's file has a block of its own.
fn assert_allocated(server: &Server) {
    let file = fs::metadata(file_of(server)).unwrap();
    assert!(file.blocks() * 512 >= file.len(), "the pool has holes: {} of {}", file.blocks() * 512, file.len());
}

async fn write_and_sum(sandbox: &Sandbox, name: &str, megabytes: u64) {
    let script =
        format!("head -c {megabytes}M /dev/urandom >{name} && sync {name} && sha256sum {name} >{name}.sum && sync");
    sandbox.shell(&script, false).await;
}

/// Also what the kernel has in memory of it must be as it is on the disk.
async fn check(sandbox: &Sandbox, name: &str) {
    assert_eq!(sandbox.shell(&format!("sha256sum -c {name}.sum"), false).await, format!("{name}: OK"));
}

fn purge_and_find_nothing(mut server: Server) {
    assert!(server.terminate().success(), "{}", server.log());
    server.purge();
    settle("nothing is left on the host", || leftovers(server.data_dir()).is_empty());
    assert!(!file_of(&server).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_grows_and_is_found_again_by_every_later_server() {
    if !can_run() {
        return;
    }
    let disk = SmallDisk::mount(6_000);
    let mut server =
        Server::start_in(&disk.path(), &format!("{SMALL_POOLS}[disks]\npool = \"auto\"\npool_first_mb = 1024\n"));
    let pool = pool_of(&server).expect("an ext4 host with XFS gets a pool");
    assert_eq!(megabytes(&server), 1_024);
    let sandbox = Client::of(&server).create(&Wanted::default()).await.unwrap();
    // Less than half of it is free then, and it grows; what comes before that has to fit.
    write_and_sum(&sandbox, "first", 550).await;
    settle("the pool grows", || megabytes(&server) >= 2_048);
    write_and_sum(&sandbox, "large", 700).await;
    assert_allocated(&server);

    let first = loop_devices(&server);
    assert_eq!(first.len(), 1);
    server.kill();
    assert!(pool.join("sandboxes").exists(), "the pool stays mounted");
    server.restart();
    assert_eq!(loop_devices(&server), first);
    check(&Client::of(&server).attach(&sandbox.id).await.unwrap(), "large").await;

    // As when the server's own mount namespace ended: the sandboxes hold the pool, and nothing shows it.
    assert!(server.terminate().success());
    rustix::mount::unmount(&pool, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(!pool.join("sandboxes").exists());
    server.restart();
    assert_eq!(loop_devices(&server), first, "another device over the same file would destroy it");
    let client = Client::of(&server);
    let sandbox = client.attach(&sandbox.id).await.unwrap();
    check(&sandbox, "large").await;
    sandbox.terminate().await.unwrap();
    drop((sandbox, client));
    purge_and_find_nothing(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_host_is_no_concern_of_sandboxes_with_a_pool() {
    if !can_run() {
        return;
    }
    let disk = SmallDisk::mount(2_000);
    let configuration =
        format!("{SMALL_POOLS}[namespace]\ndisk_free_mb_min = 0\n[disks]\npool = \"auto\"\npool_first_mb = 800\n");
    let server = Server::start_in(&disk.path(), &configuration);
    let pool = pool_of(&server).expect("an ext4 host with XFS gets a pool");
    let client = Client::of(&server);
    let (one, other) =
        (client.create(&Wanted::default()).await.unwrap(), client.create(&Wanted::default()).await.unwrap());
    write_and_sum(&one, "before", 20).await;

    let filler = disk.fill();
    let host = rustix::fs::statvfs(disk.path()).unwrap();
    assert!(host.f_bavail * host.f_frsize < 1 << 20, "the host is full");
    let size = megabytes(&server);
    write_and_sum(&one, "one", 250).await;
    write_and_sum(&other, "other", 250).await;
    check(&one, "before").await;
    // What was written reached the pool: it is there when nobody has it in memory.
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    check(&one, "one").await;
    check(&other, "other").await;
    assert_eq!(megabytes(&server), size, "a full host gives the pool nothing");

    // The pool's own end. Whoever runs into it is told, and nobody else loses anything.
    let full = one.run(&["/bin/sh", "-c", "head -c 1500M /dev/urandom >too-much && sync too-much"]).await.unwrap();
    assert_ne!(full.exit.exit_code, 0, "{}", full.describe());
    println!("a sandbox at the pool's end was told: {}", String::from_utf8_lossy(&full.stderr).trim());
    check(&other, "other").await;
    fs::write(pool.join("alive"), "").unwrap_or_else(|error| {
        assert_eq!(
            error.raw_os_error(),
            Some(rustix::io::Errno::NOSPC.raw_os_error()),
            "the pool's file system lives on: {error}"
        );
    });
    let _ = fs::remove_file(pool.join("alive"));
    let refused = client.create(&Wanted::default()).await.err().map(|error| error.to_string());
    println!("a new sandbox at the pool's end: {refused:?}");

    fs::remove_file(&filler).unwrap();
    one.terminate().await.unwrap();
    // Its own writes may have met the end too, and then it only reads.
    check(&other, "other").await;
    let another = client.create(&Wanted::default()).await.unwrap();
    write_and_sum(&another, "another", 50).await;
    check(&another, "another").await;
    for sandbox in [other, another] {
        sandbox.terminate().await.unwrap();
    }
    drop((one, client));
    purge_and_find_nothing(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_pool_disks_are_plain_files_and_stay_so() {
    if !can_run() {
        return;
    }
    let mut server = Server::start_with(&format!("{SMALL_POOLS}[disks]\npool = \"off\"\n"));
    assert_eq!(pool_of(&server), None);
    let sandbox = Client::of(&server).create(&Wanted::default()).await.unwrap();
    write_and_sum(&sandbox, "kept", 5).await;
    assert!(server.terminate().success());
    // What a data directory has, it keeps, whatever the configuration says later.
    let configuration = fs::read_to_string(server.data_dir().join("test.toml")).unwrap();
    fs::write(server.data_dir().join("test.toml"), configuration.replace("\"off\"", "\"auto\"")).unwrap();
    server.restart();
    assert_eq!(pool_of(&server), None);
    let sandbox = Client::of(&server).attach(&sandbox.id).await.unwrap();
    check(&sandbox, "kept").await;
    sandbox.terminate().await.unwrap();
    drop(sandbox);
    purge_and_find_nothing(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_in_use_by_something_else_is_told_of_and_purged_later() {
    if !can_run() {
        return;
    }
    let mut server = Server::start_with(&format!("{SMALL_POOLS}[disks]\npool = \"auto\"\n"));
    let Some(pool) = pool_of(&server) else {
        println!("pool suite: not run: this host's temporary directory shares blocks, or it has no XFS");
        return;
    };
    assert!(server.terminate().success());
    assert_eq!(leftovers(server.data_dir()).count(Kind::Mount), 1);
    assert_eq!(loop_devices(&server).len(), 1);
    let held = fs::File::open(pool.join("templates")).unwrap();
    let purge = Command::new(binary()).args(["purge", "--data-dir"]).arg(server.data_dir()).output().unwrap();
    let said = String::from_utf8_lossy(&purge.stderr).into_owned();
    assert!(!purge.status.success() && said.contains("still in use"), "{said}");
    assert_eq!(leftovers(server.data_dir()).count(Kind::Mount), 1);
    drop(held);
    server.restart();
    purge_and_find_nothing(server);
}
