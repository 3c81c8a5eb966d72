use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};

use nagaya_api::error::Code;
use rustix::fs::{Mode, OFlags};

use super::*;

#[tokio::test]
async fn stat_tells_what_is_there_and_does_not_follow_the_last_link() {
    let agent = Agent::start();
    let link = agent.connect().await;
    std::fs::write(agent.home().join("file"), "12345").unwrap();
    symlink("file", agent.home().join("link")).unwrap();
    symlink(agent.home(), agent.home().join("up")).unwrap();

    let file = link.stat("file").await.unwrap().unwrap();
    let expected = std::fs::metadata(agent.home().join("file")).unwrap();
    assert_eq!((file.size, file.mode, file.is_dir, file.is_symlink), (5, expected.mode(), false, false));
    assert_eq!(file.modified_unix_ns, expected.mtime() * 1_000_000_000 + expected.mtime_nsec());
    let through = link.stat("up/file").await.unwrap().unwrap();
    assert_eq!(through, file);
    let itself = link.stat("link").await.unwrap().unwrap();
    assert_eq!((itself.is_symlink, itself.symlink_target.as_str()), (true, "file"));
    assert!(link.stat(".").await.unwrap().unwrap().is_dir);
    assert!(link.stat("/").await.unwrap().unwrap().is_dir);
    for missing in ["missing", "missing/further", "file/below"] {
        assert_eq!(link.stat(missing).await.unwrap(), None);
    }
    assert_eq!(link.stat("").await.unwrap_err().code, Code::InvalidPath);
}

#[tokio::test]
async fn directories_are_made_for_the_user_with_the_mode_asked_for() {
    let agent = Agent::start();
    let link = agent.connect().await;
    link.make_directory("a", 0o2770, false).await.unwrap();
    let status = std::fs::metadata(agent.home().join("a")).unwrap();
    assert_eq!((status.uid(), status.gid(), status.mode() & 0o7777), (1000, 1000, 0o2770));
    let modified = link.make_directory("a/b/./c//d/", 0, true).await.unwrap();
    let status = std::fs::metadata(agent.home().join("a/b/c/d")).unwrap();
    assert_eq!((status.mode() & 0o777, modified), (0o755, status.mtime() * 1_000_000_000 + status.mtime_nsec()));
    link.make_directory("a/b/c/d", 0o700, true).await.unwrap();
    assert_eq!(std::fs::metadata(agent.home().join("a/b/c/d")).unwrap().mode() & 0o777, 0o755, "an existing one stays");

    std::fs::write(agent.home().join("file"), "").unwrap();
    symlink("nowhere", agent.home().join("dangling")).unwrap();
    let cases = [
        ("a", false, Code::FileExists),
        ("x/y", false, Code::FileNotFound),
        ("file", true, Code::FileExists),
        ("file/x", true, Code::NotADirectory),
        ("dangling", true, Code::FileExists),
        ("/", false, Code::FileExists),
    ];
    for (path, recursive, code) in cases {
        assert_eq!(link.make_directory(path, 0o755, recursive).await.unwrap_err().code, code, "{path}");
    }
    link.make_directory("/", 0o755, true).await.unwrap();
}

#[tokio::test]
async fn lists_are_sorted_and_hide_what_begins_with_a_dot() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for name in ["b", "a", ".hidden", "c"] {
        std::fs::write(agent.home().join(name), name).unwrap();
    }
    std::fs::create_dir(agent.home().join("directory")).unwrap();
    symlink("nowhere", agent.home().join("dangling")).unwrap();
    let list = async |hidden: bool| -> Vec<String> {
        link.list_directory(".", hidden, &()).await.unwrap().into_iter().map(|entry| entry.name).collect()
    };
    assert_eq!(list(false).await, ["a", "b", "c", "dangling", "directory"]);
    assert_eq!(list(true).await, [".hidden", "a", "b", "c", "dangling", "directory"]);
    let entries = link.list_directory(".", false, &()).await.unwrap();
    assert_eq!((entries[0].size, entries[0].is_dir, entries[4].is_dir), (1, false, true));
    assert_eq!(link.list_directory("a", false, &()).await.unwrap_err().code, Code::NotADirectory);
    assert_eq!(link.list_directory("missing", false, &()).await.unwrap_err().code, Code::FileNotFound);
}

#[tokio::test]
async fn long_lists_arrive_whole() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for number in 0..5_000 {
        std::fs::write(agent.home().join(format!("{number:05}-{}", "x".repeat(100))), "").unwrap();
    }
    let entries = link.list_directory(".", false, &()).await.unwrap();
    assert_eq!(entries.len(), 5_000);
    assert!(entries.is_sorted_by(|a, b| a.name < b.name));
    assert_eq!(link.remove(&agent.path(""), true).await.unwrap(), 5_001);
}

/// Room for so many bytes, and what was taken of it.
struct Little(std::sync::Mutex<usize>);

#[async_trait::async_trait]
impl nagaya_engine::ports::Room for Little {
    async fn grow(&self, bytes: usize) -> Result<(), nagaya_engine::ports::GuestError> {
        let mut left = self.0.lock().unwrap();
        let refused = || super::super::guest_error(Code::CapacityUnavailable, "too little room");
        *left = left.checked_sub(bytes).ok_or_else(refused)?;
        Ok(())
    }
}

#[tokio::test]
async fn a_list_takes_its_room_before_it_is_kept() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for number in 0..2_000 {
        std::fs::write(agent.home().join(format!("{number:05}")), "").unwrap();
    }
    let room = Little(std::sync::Mutex::new(300_000));
    assert_eq!(link.list_directory(".", false, &room).await.unwrap_err().code, Code::CapacityUnavailable);
    let room = Little(std::sync::Mutex::new(1_000_000));
    assert_eq!(link.list_directory(".", false, &room).await.unwrap().len(), 2_000);
    assert!(*room.0.lock().unwrap() < 500_000, "{}", room.0.lock().unwrap());
}

#[tokio::test]
async fn directories_of_any_size_are_listed() {
    const ENTRIES: usize = 120_000;
    let agent = Agent::start();
    let link = agent.connect().await;
    let directory = std::fs::File::open(agent.home()).unwrap();
    for number in 0..ENTRIES {
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(&directory, format!("{number:06}"), flags, Mode::RUSR).unwrap();
    }
    let entries = link.list_directory(".", false, &()).await.unwrap();
    assert_eq!(entries.len(), ENTRIES);
    assert!(entries.is_sorted_by(|a, b| a.name < b.name));
}

#[tokio::test]
async fn names_of_any_bytes_lead_to_their_files() {
    let agent = Agent::start();
    let link = agent.connect().await;
    // Two that are no UTF-8, two that read like the text of another, and a directory of such a name.
    let names: [&[u8]; 4] = [b"caf\xe9", b"caf\xe8", "caf\u{efe9}".as_bytes(), "日\u{ef80}".as_bytes()];
    let path = |name: &[u8]| agent.home().join(OsStr::from_bytes(name));
    for name in names {
        std::fs::write(path(name), name).unwrap();
    }
    symlink(path(b"caf\xe9"), path(b"to\xff")).unwrap();
    std::fs::create_dir(path(b"dir\x80")).unwrap();
    let listed: Vec<String> =
        link.list_directory(".", true, &()).await.unwrap().into_iter().map(|entry| entry.name).collect();
    assert_eq!(listed.len(), 6);
    for name in &listed {
        let bytes = nagaya_api::names::to_bytes(name).into_owned();
        let stat = link.stat(name).await.unwrap().unwrap();
        if stat.is_symlink {
            let target = nagaya_api::names::to_bytes(&stat.symlink_target).into_owned();
            assert_eq!(target, path(b"caf\xe9").as_os_str().as_bytes());
        } else if stat.is_dir {
            let (ended, exit) = run(&link, Command { cwd: name.clone(), ..command(&["pwd", "-P"]) }).await;
            assert_eq!((ended.stdout, exit.code), ([path(&bytes).as_os_str().as_bytes(), b"\n"].concat(), 0));
            link.make_directory(&format!("{name}/{name}"), 0, false).await.unwrap();
            assert!(path(&bytes).join(OsStr::from_bytes(&bytes)).is_dir());
        } else {
            let mut reader = link.read_file(name, 0, 0, 0).await.unwrap();
            assert_eq!(reader.chunks.recv().await.unwrap().unwrap(), bytes);
            let options = nagaya_engine::ports::WriteOptions { mode: 0, truncate: true, sync: false };
            let writer = link.write_file(name, options).await.unwrap();
            writer.chunks.send(Bytes::from_static(b"written")).await.unwrap();
            writer.finish().await.unwrap();
            assert_eq!(std::fs::read(path(&bytes)).unwrap(), b"written");
        }
        assert!(link.remove(name, true).await.unwrap() > 0);
        assert!(link.stat(name).await.unwrap().is_none());
    }
    assert_eq!(std::fs::read_dir(agent.home()).unwrap().count(), 0);
}

#[tokio::test]
async fn removal_counts_and_never_goes_through_links() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let outside = TempDir::new().unwrap();
    std::fs::write(outside.path().join("kept"), "").unwrap();
    std::fs::create_dir_all(agent.home().join("tree/deep/deeper")).unwrap();
    std::fs::write(agent.home().join("tree/deep/file"), "").unwrap();
    symlink(outside.path(), agent.home().join("tree/deep/link")).unwrap();
    symlink(outside.path(), agent.home().join("link")).unwrap();

    assert_eq!(link.remove("tree", false).await.unwrap_err().code, Code::DirectoryNotEmpty);
    assert_eq!(link.remove("tree", true).await.unwrap(), 5);
    assert_eq!(link.remove("link", true).await.unwrap(), 1);
    assert_eq!(link.remove("link", true).await.unwrap(), 0);
    assert_eq!(link.remove("missing/further", true).await.unwrap(), 0);
    assert!(outside.path().join("kept").exists());
    for path in ["/", "//", ".", "..", "/proc/..", "a/.."] {
        let error = link.remove(path, true).await.unwrap_err();
        assert_eq!(error.code, Code::InvalidPath, "{path}");
    }
    std::fs::write(agent.home().join("file"), "").unwrap();
    assert_eq!(link.remove("file/", true).await.unwrap_err().code, Code::NotADirectory);
    assert_eq!(link.remove("file", false).await.unwrap(), 1);
}

#[tokio::test]
async fn trees_deeper_than_any_path_are_removed_with_few_descriptors() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut directory = rustix::fs::open(agent.home(), flags, Mode::empty()).unwrap();
    for _ in 0..3_000 {
        rustix::fs::mkdirat(&directory, "d", Mode::RWXU).unwrap();
        directory = rustix::fs::openat(&directory, "d", flags, Mode::empty()).unwrap();
    }
    assert_eq!(link.remove("d", true).await.unwrap(), 3_000);
}
