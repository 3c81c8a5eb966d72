use std::os::unix::fs::MetadataExt;

use nagaya_api::error::Code;
use nagaya_engine::ports::{GuestError, WriteOptions};

use super::*;

const NEW: WriteOptions = WriteOptions { mode: 0, truncate: true, sync: false };

async fn write(link: &Link, path: &str, options: WriteOptions, content: &[u8]) -> Result<u64, GuestError> {
    let writer = link.write_file(path, options).await?;
    for chunk in content.chunks(50_000) {
        if writer.chunks.send(Bytes::copy_from_slice(chunk)).await.is_err() {
            break;
        }
    }
    writer.finish().await
}

async fn read(link: &Link, path: &str, offset: u64, length: u64) -> Result<Vec<u8>, GuestError> {
    let mut reader = link.read_file(path, offset, length, 0).await?;
    let mut content = Vec::new();
    while let Some(chunk) = reader.chunks.recv().await {
        content.extend_from_slice(&chunk?);
    }
    Ok(content)
}

fn names(agent: &Agent) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(agent.home())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_was_written_is_read_again() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let content: Vec<u8> = (0..5_000_000u32).map(|number| (number % 251) as u8).collect();
    assert_eq!(write(&link, "file", NEW, &content).await.unwrap(), 5_000_000);
    let status = std::fs::metadata(agent.home().join("file")).unwrap();
    assert_eq!((status.uid(), status.gid(), status.mode() & 0o7777), (1000, 1000, 0o644));
    assert_eq!(names(&agent), ["file"]);
    assert!(read(&link, &agent.path("file"), 0, 0).await.unwrap() == content);
    assert_eq!(read(&link, "file", 4_999_990, 0).await.unwrap(), content[4_999_990..]);
    assert_eq!(read(&link, "file", 100_000, 70_000).await.unwrap(), content[100_000..170_000]);
    assert!(read(&link, "file", 6_000_000, 0).await.unwrap().is_empty());
    assert!(read(&link, "file", u64::MAX, u64::MAX).await.unwrap().is_empty());
    let reader = link.read_file("file", 0, 10, 3).await.unwrap();
    assert_eq!(reader.total_size, 5_000_000);
}

#[tokio::test]
async fn chunks_are_as_small_as_wished() {
    let agent = Agent::start();
    let link = agent.connect().await;
    write(&link, "file", NEW, b"0123456789").await.unwrap();
    let mut reader = link.read_file("file", 0, 0, 4).await.unwrap();
    let mut lengths = Vec::new();
    while let Some(chunk) = reader.chunks.recv().await {
        lengths.push(chunk.unwrap().len());
    }
    assert_eq!(lengths, [4, 4, 2]);
}

#[tokio::test]
async fn generated_files_are_read_to_their_end() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let content = read(&link, "/proc/filesystems", 0, 0).await.unwrap();
    assert!(String::from_utf8_lossy(&content).contains("nodev"), "{}", String::from_utf8_lossy(&content));
}

#[tokio::test]
async fn what_proc_tells_of_the_agent_is_closed() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for name in ["status", "maps", "environ", "task/../maps"] {
        let error = read(&link, &format!("/proc/self/{name}"), 0, 0).await.unwrap_err();
        assert_eq!(error.code, Code::PermissionDenied, "{name}");
    }
}

#[tokio::test]
async fn writing_over_a_file_keeps_its_owner_and_mode_and_links_to_it() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let file = agent.home().join("file");
    std::fs::write(&file, "old content").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o4750)).unwrap();
    std::os::unix::fs::chown(&file, Some(1234), Some(1235)).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o4750)).unwrap();
    std::os::unix::fs::symlink("file", agent.home().join("relative")).unwrap();
    std::os::unix::fs::symlink(&file, agent.home().join("absolute")).unwrap();
    std::os::unix::fs::symlink("new", agent.home().join("dangling")).unwrap();
    for name in ["relative", "absolute", "file"] {
        write(&link, name, WriteOptions { mode: 0o600, truncate: true, sync: true }, name.as_bytes()).await.unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), name.as_bytes());
        let status = std::fs::metadata(&file).unwrap();
        assert_eq!((status.uid(), status.gid(), status.mode() & 0o7777), (1234, 1235, 0o4750));
    }
    write(&link, "dangling", WriteOptions { mode: 0o600, truncate: true, sync: false }, b"x").await.unwrap();
    let status = std::fs::metadata(agent.home().join("new")).unwrap();
    assert_eq!((status.uid(), status.mode() & 0o7777), (1000, 0o600));
    assert!(std::fs::symlink_metadata(agent.home().join("relative")).unwrap().is_symlink());
    assert_eq!(names(&agent), ["absolute", "dangling", "file", "new", "relative"]);
}

#[tokio::test]
async fn without_truncation_the_rest_stays() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let keep = WriteOptions { mode: 0, truncate: false, sync: false };
    write(&link, "file", NEW, b"0123456789").await.unwrap();
    assert_eq!(write(&link, "file", keep.clone(), b"abc").await.unwrap(), 3);
    assert_eq!(std::fs::read(agent.home().join("file")).unwrap(), b"abc3456789");
    write(&link, "new", keep, b"abc").await.unwrap();
    assert_eq!(std::fs::read(agent.home().join("new")).unwrap(), b"abc");
}

#[tokio::test]
async fn a_write_that_is_given_up_leaves_everything_as_it_was() {
    let agent = Agent::start();
    let link = agent.connect().await;
    write(&link, "file", NEW, b"old").await.unwrap();
    for name in ["file", "new", "missing/new"] {
        let writer = link.write_file(name, NEW).await.unwrap();
        for _ in 0..100 {
            writer.chunks.send(Bytes::from(vec![1; 65_536])).await.unwrap();
        }
        assert_eq!(names(&agent), ["file"], "nothing is visible before the end");
        assert_eq!(std::fs::read(agent.home().join("file")).unwrap(), b"old");
        drop(writer);
    }
    let writer = link.write_file("new", NEW).await.unwrap();
    writer.chunks.send(bytes("x")).await.unwrap();
    drop(link);
    let link = agent.connect().await;
    assert_eq!(read(&link, "file", 0, 0).await.unwrap(), b"old");
    assert_eq!(names(&agent), ["file"]);
    assert_eq!(writer.finish().await.unwrap_err().code, Code::GuestUnreachable);
}

#[tokio::test]
async fn a_large_piece_is_split_and_an_empty_file_is_made() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let writer = link.write_file("large", NEW).await.unwrap();
    writer.chunks.send(Bytes::from(vec![7; 1_000_000])).await.unwrap();
    writer.chunks.send(Bytes::new()).await.unwrap();
    assert_eq!(writer.finish().await.unwrap(), 1_000_000);
    assert_eq!(write(&link, "empty", NEW, b"").await.unwrap(), 0);
    assert!(read(&link, "empty", 0, 0).await.unwrap().is_empty());
    assert_eq!(read(&link, "large", 0, 0).await.unwrap(), vec![7; 1_000_000]);
}

#[tokio::test]
async fn what_is_no_regular_file_is_refused_at_once() {
    let agent = Agent::start();
    let link = agent.connect().await;
    assert!(
        run(&link, shell(&format!("cd {}; mkfifo fifo; mkdir directory; ln -s loop loop", agent.home().display())))
            .await
            .1
            .code
            == 0
    );
    let _socket = UnixListener::bind(agent.home().join("socket")).unwrap();
    let cases = [
        ("fifo", Code::NotARegularFile),
        ("socket", Code::NotARegularFile),
        ("/dev/null", Code::NotARegularFile),
        ("/dev/tty", Code::NotARegularFile),
        ("directory", Code::IsADirectory),
        ("/", Code::IsADirectory),
        (".", Code::IsADirectory),
        ("directory/..", Code::IsADirectory),
        ("loop", Code::FileSystem),
        ("fifo/file", Code::NotADirectory),
        ("", Code::InvalidPath),
        ("a\0b", Code::InvalidPath),
        (&"x/".repeat(3000), Code::InvalidPath),
        (&"x".repeat(300), Code::InvalidPath),
    ];
    for (path, code) in cases {
        let reading = link.read_file(path, 0, 0, 0).await.map(|_| ()).unwrap_err();
        let writing = link.write_file(path, NEW).await.map(|_| ()).unwrap_err();
        assert_eq!((reading.code, writing.code), (code, code), "{path:.20}: {reading} {writing}");
        for error in [reading, writing] {
            assert!(!["fifo", "missing", "loop"].iter().any(|name| error.detail.contains(name)), "{error}");
        }
    }
    for path in ["missing", "missing/file"] {
        assert_eq!(link.read_file(path, 0, 0, 0).await.map(|_| ()).unwrap_err().code, Code::FileNotFound);
    }
    for path in ["new/", "new/new/", "new/.", "new/.."] {
        assert_eq!(link.write_file(path, NEW).await.map(|_| ()).unwrap_err().code, Code::IsADirectory, "{path}");
    }
    assert_eq!(write(&link, "/proc/new", NEW, b"x").await.map(|_| ()).unwrap_err().code, Code::FileNotFound);
}

#[tokio::test]
async fn magic_links_are_not_followed() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for path in ["/proc/self/exe", "/proc/self/fd/3", "/proc/self/root/etc/passwd", "/proc/self/cwd/x"] {
        let error = link.read_file(path, 0, 0, 0).await.map(|_| ()).unwrap_err();
        assert_eq!(error.code, Code::FileSystem, "{path}: {error}");
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_nothing_is_left() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let small = agent.home().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m,mode=777", "none"])
        .arg(&small)
        .status()
        .unwrap();
    assert!(mounted.success(), "these tests run as root");
    let error = write(&link, "small/file", NEW, &vec![1; 3_000_000]).await.unwrap_err();
    let left = std::fs::read_dir(&small).unwrap().count();
    let fits = write(&link, "small/file", NEW, &vec![1; 500_000]).await;
    assert!(std::process::Command::new("umount").arg(&small).status().unwrap().success());
    assert_eq!((error.code, error.errno, left), (Code::DiskFull, libc::ENOSPC, 0));
    assert_eq!(fits.unwrap(), 500_000);
}

#[tokio::test]
async fn a_reader_that_stops_stalls_nobody_and_leaves_nothing() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let content = vec![3; 8_000_000];
    write(&link, "file", NEW, &content).await.unwrap();
    let mut stalled = Vec::new();
    for _ in 0..16 {
        let mut reader = link.read_file("file", 0, 0, 0).await.unwrap();
        assert!(reader.chunks.recv().await.is_some());
        stalled.push(reader);
    }
    assert!(read(&link, "file", 0, 0).await.unwrap() == content);
    drop(stalled);
    let descriptors = format!("/proc/{}/fd", agent.process.id());
    until("the files are closed", || {
        let open = std::fs::read_dir(&descriptors).unwrap().flatten();
        open.filter_map(|entry| std::fs::read_link(entry.path()).ok()).all(|target| !target.ends_with("home/file"))
    })
    .await;
}

/// Lengths that are collected in memory, and beyond.
const LENGTHS: [usize; 6] = [10, 3, 0, 300_000, 5_000_000, 700_000];

#[tokio::test]
async fn saving_keeps_the_file_and_all_that_leads_to_it() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let (file, other) = (agent.home().join("file"), agent.home().join("other"));
    std::fs::write(&file, "old content").unwrap();
    std::fs::hard_link(&file, &other).unwrap();
    let reader = std::fs::File::open(&file).unwrap();
    // An entry of a user, which the mode does not tell: version 2, owner, user 1234, group, mask, others.
    let entry =
        |tag: u16, rights: u16, id: u32| [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat();
    let none = u32::MAX;
    let list = [
        2u32.to_le_bytes().to_vec(),
        entry(1, 6, none),
        entry(2, 6, 1234),
        entry(4, 4, none),
        entry(16, 6, none),
        entry(32, 0, none),
    ]
    .concat();
    let attributes = [("user.note", b"kept".to_vec()), ("system.posix_acl_access", list)];
    for (name, value) in &attributes {
        rustix::fs::setxattr(&file, *name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
    let before = std::fs::metadata(&file).unwrap();
    for (round, length) in LENGTHS.into_iter().enumerate() {
        let content = vec![round as u8; length];
        assert_eq!(write(&link, "file", NEW, &content).await.unwrap(), length as u64);
        let after = std::fs::metadata(&file).unwrap();
        assert_eq!((after.ino(), after.nlink(), after.mode()), (before.ino(), 2, before.mode()), "{length}");
        assert!(std::fs::read(&other).unwrap() == content, "{length}");
        let mut seen = vec![0; length + 1];
        let seen_length = std::os::unix::fs::FileExt::read_at(&reader, &mut seen, 0).unwrap();
        assert_eq!(seen_length, length.min(seen_length.max(1)), "whoever has it open sees the new content");
        for (name, value) in &attributes {
            let mut kept = [0; 256];
            let length = rustix::fs::getxattr(&file, *name, &mut kept[..]).unwrap();
            assert_eq!(kept[..length], value[..], "{name}");
        }
    }
    assert_eq!(names(&agent), ["file", "other"]);
}

#[tokio::test]
async fn whoever_watches_a_directory_sees_saves_of_files_and_no_other_names() {
    use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
    let agent = Agent::start();
    let link = agent.connect().await;
    let watch = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
    add_watch(&watch, agent.home(), WatchFlags::ALL_EVENTS).unwrap();
    let mut buffer = [const { std::mem::MaybeUninit::uninit() }; 65_536];
    let mut reader = Reader::new(&watch, &mut buffer);
    let mut events = || {
        let (mut names, mut kinds) = (Vec::new(), ReadFlags::empty());
        while let Ok(event) = reader.next() {
            names.push(event.file_name().map(|name| name.to_str().unwrap().to_owned()));
            kinds |= event.events();
        }
        (names, kinds)
    };
    for length in LENGTHS {
        for (name, expected) in
            [("new", ReadFlags::CREATE | ReadFlags::CLOSE_WRITE), ("new", ReadFlags::MODIFY | ReadFlags::CLOSE_WRITE)]
        {
            write(&link, name, NEW, &vec![1; length]).await.unwrap();
            let (names, kinds) = events();
            assert!(names.iter().all(|seen| seen.as_deref() == Some(name)), "{length}: {names:?}");
            assert!(kinds.contains(expected), "{length}: {kinds:?}");
            assert!(!kinds.intersects(ReadFlags::MOVED_TO | ReadFlags::MOVED_FROM | ReadFlags::DELETE), "{kinds:?}");
        }
        std::fs::remove_file(agent.home().join("new")).unwrap();
        events();
    }
}

#[tokio::test]
async fn a_program_that_runs_is_replaced_and_runs_on() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let program = agent.home().join("program");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let old = std::fs::metadata(&program).unwrap();
    let mut running = std::process::Command::new(&program).arg("1000").spawn().unwrap();
    for length in [10, 5_000_000] {
        write(&link, "program", NEW, &vec![7; length]).await.unwrap();
        assert!(std::fs::read(&program).unwrap() == vec![7; length]);
        assert_eq!(std::fs::metadata(&program).unwrap().mode(), old.mode());
    }
    assert!(running.try_wait().unwrap().is_none());
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(names(&agent), ["program"]);
}

#[tokio::test]
async fn a_disk_that_is_full_leaves_the_old_content() {
    let agent = Agent::start();
    let link = agent.connect().await;
    let small = agent.home().join("small");
    std::fs::create_dir(&small).unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=1m,mode=777", "none"];
    assert!(std::process::Command::new("mount").args(mount).arg(&small).status().unwrap().success());
    std::fs::write(small.join("file"), vec![1; 300_000]).unwrap();
    std::fs::write(small.join("filling"), vec![2; 600_000]).unwrap();
    let mut errors = Vec::new();
    for length in [500_000, 700_000, 3_000_000] {
        errors.push(write(&link, "small/file", NEW, &vec![3; length]).await.map_err(|error| error.code));
    }
    let content = std::fs::read(small.join("file")).unwrap();
    let left = std::fs::read_dir(&small).unwrap().count();
    assert!(std::process::Command::new("umount").arg(&small).status().unwrap().success());
    assert_eq!((errors, left), (vec![Err(Code::DiskFull); 3], 2));
    assert!(content == vec![1; 300_000]);
}

#[tokio::test]
async fn of_many_who_save_one_file_at_once_one_is_there_whole() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for length in [100_000, 2_000_000] {
        write(&link, "file", NEW, b"old").await.unwrap();
        let content: Vec<Vec<u8>> = (0..8).map(|writer| vec![writer; length]).collect();
        let mut saves = tokio::task::JoinSet::new();
        for content in content.clone() {
            let link = link.clone();
            saves.spawn(async move { write(&link, "file", NEW, &content).await });
        }
        for saved in saves.join_all().await {
            assert_eq!(saved.unwrap(), length as u64);
        }
        let left = std::fs::read(agent.home().join("file")).unwrap();
        assert!(content.contains(&left), "the content is mixed");
    }
}

#[tokio::test]
async fn missing_directories_are_made_when_the_content_is_there() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for (path, length) in [("a/b/./c//file", 10), ("a/b/d/file", 2_000_000)] {
        let writer = link.write_file(path, NEW).await.unwrap();
        writer.chunks.send(vec![1; length].into()).await.unwrap();
        drop(writer);
        assert!(link.stat("a/b/d").await.unwrap().is_none());
        write(&link, path, NEW, &vec![1; length]).await.unwrap();
        assert_eq!(read(&link, path, 0, 0).await.unwrap().len(), length);
    }
    let status = std::fs::metadata(agent.home().join("a/b")).unwrap();
    assert_eq!((status.uid(), status.gid(), status.mode() & 0o7777), (1000, 1000, 0o755));
    std::fs::write(agent.home().join("file"), "").unwrap();
    std::os::unix::fs::symlink("nowhere", agent.home().join("dangling")).unwrap();
    for (path, code) in [("file/x/y", Code::NotADirectory), ("dangling/x/y", Code::FileExists)] {
        assert_eq!(write(&link, path, NEW, b"x").await.unwrap_err().code, code, "{path}");
    }
}

#[tokio::test]
async fn what_is_in_proc_is_not_written() {
    let agent = Agent::start();
    let link = agent.connect().await;
    for path in ["/proc/self/oom_score_adj", "/proc/self/comm", "/proc/thread-self/comm", "/proc/self/mem"] {
        assert_eq!(write(&link, path, NEW, b"0").await.unwrap_err().code, Code::PermissionDenied, "{path}");
    }
}
