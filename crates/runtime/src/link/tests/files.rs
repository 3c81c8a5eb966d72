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
    for name in ["file", "new"] {
        let writer = link.write_file(name, NEW).await.unwrap();
        for _ in 0..100 {
            writer.chunks.send(Bytes::from(vec![1; 65_536])).await.unwrap();
        }
        assert_eq!(names(&agent), ["file"], "nothing is visible before the end");
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
        ("missing/file", Code::FileNotFound),
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
    assert_eq!(link.read_file("missing", 0, 0, 0).await.map(|_| ()).unwrap_err().code, Code::FileNotFound);
    assert_eq!(link.write_file("new/", NEW).await.map(|_| ()).unwrap_err().code, Code::IsADirectory);
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
