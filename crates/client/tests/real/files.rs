use std::pin::Pin;
use std::task::{Context, Poll};

use nagaya_client::{Code, Error, RefusalKind, WriteOptions};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

use crate::world::{World, say};

crate::cases!(
    files_are_written_and_read,
    pieces_of_a_file_can_be_read,
    directories_are_listed_and_removed,
    large_files_go_through_in_constant_memory,
    an_unfinished_file_does_not_exist,
    refusals_are_typed,
);

async fn files_are_written_and_read(world: &World) {
    let files = world.session.files();
    files.write("note", "first").await.unwrap();
    assert_eq!(&files.read("/home/tenki/note").await.unwrap()[..], b"first");
    files.write("note", "").await.unwrap();
    assert!(files.read("note").await.unwrap().is_empty());
    let large = vec![7; 5 << 20];
    files.write("note", large.clone()).await.unwrap();
    assert!(files.read("note").await.unwrap() == large);

    let script = WriteOptions::default().mode(0o755).sync(true);
    files.write_with("run.sh", "#!/bin/sh\necho runs\n", script).await.unwrap();
    assert_eq!(say(&world.session, "./run.sh").await, "runs");
    files.write("over", "abcdef").await.unwrap();
    let over = WriteOptions::default().truncate(false);
    files.write_with("over", "XY", over).await.unwrap();
    assert_eq!(&files.read("over").await.unwrap()[..], b"XYcdef");

    let stat = files.stat("run.sh").await.unwrap();
    assert_eq!((stat.size, stat.mode & 0o777, stat.is_dir), (20, 0o755, false));
    assert!(files.exists("note").await.unwrap() && !files.exists("nothing").await.unwrap());
}

async fn pieces_of_a_file_can_be_read(world: &World) {
    let files = world.session.files();
    files.write("letters", "abcdefghij").await.unwrap();
    let read = async |offset, length| {
        let mut text = String::new();
        files.reader_at("letters", offset, length).await.unwrap().read_to_string(&mut text).await.unwrap();
        text
    };
    assert_eq!(read(0, None).await, "abcdefghij");
    assert_eq!(read(3, Some(4)).await, "defg");
    assert_eq!(read(8, Some(100)).await, "ij");
    assert_eq!(read(100, None).await, "");
    assert_eq!(read(3, Some(0)).await, "");
    assert_eq!(files.reader("letters").await.unwrap().total_size(), Some(10));
}

async fn directories_are_listed_and_removed(world: &World) {
    let files = world.session.files();
    files.mkdir("tree/inner").await.unwrap();
    files.mkdir("tree/inner").await.unwrap();
    files.write("tree/.hidden", "1").await.unwrap();
    files.write("tree/seen", "22").await.unwrap();
    let names = async |hidden| {
        let mut names: Vec<_> =
            files.list("tree", hidden).await.unwrap().into_iter().map(|entry| (entry.name, entry.is_dir)).collect();
        names.sort();
        names
    };
    assert_eq!(names(false).await, [("inner".to_owned(), true), ("seen".to_owned(), false)]);
    assert_eq!(names(true).await.len(), 3);
    say(&world.session, "ln -s seen tree/link").await;
    let link = files.stat("tree/link").await.unwrap();
    assert_eq!((link.is_symlink, link.symlink_target.as_deref()), (true, Some("seen")));
    assert!(files.remove("tree").await.unwrap().removed);
    assert!(!files.exists("tree").await.unwrap());
}

/// Bytes that follow from their position.
struct Sequence {
    position: u64,
    end: u64,
}

fn byte_at(position: u64) -> u8 {
    (position.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8
}

impl AsyncRead for Sequence {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let count = (self.end - self.position).min(buffer.remaining() as u64).min(64 << 10);
        let bytes: Vec<u8> = (self.position..self.position + count).map(byte_at).collect();
        buffer.put_slice(&bytes);
        self.position += count;
        Poll::Ready(Ok(()))
    }
}

/// The most memory that this process has had since the last call of [`forget_peak`], bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

async fn large_files_go_through_in_constant_memory(world: &World) {
    const SIZE: u64 = 100 << 20;
    let files = world.session.files();
    forget_peak();
    let before = peak();
    let mut writer = files.writer("large", WriteOptions::default()).await.unwrap();
    tokio::io::copy(&mut Sequence { position: 0, end: SIZE }, &mut writer).await.unwrap();
    assert_eq!(writer.finish().await.unwrap(), SIZE);
    assert_eq!(files.stat("large").await.unwrap().size, SIZE);

    let mut reader = files.reader("large").await.unwrap();
    let mut buffer = vec![0; 256 << 10];
    let mut position = 0;
    loop {
        let count = reader.read(&mut buffer).await.unwrap();
        if count == 0 {
            break;
        }
        let wrong = buffer[..count].iter().zip(position..).find(|(byte, at)| **byte != byte_at(*at));
        assert!(wrong.is_none(), "at {wrong:?}");
        position += count as u64;
    }
    assert_eq!(position, SIZE);
    let grown = peak().saturating_sub(before);
    assert!(grown < 48 << 20, "{grown} bytes more for a file of {SIZE}");
    files.remove("large").await.unwrap();
}

async fn an_unfinished_file_does_not_exist(world: &World) {
    let files = world.session.files();
    files.write("old", "kept").await.unwrap();
    for name in ["new", "old"] {
        let mut writer = files.writer(name, WriteOptions::default()).await.unwrap();
        writer.write_all(&vec![1; 2 << 20]).await.unwrap();
        drop(writer);
    }
    // The server learns of it by the reset of the stream, on the same connection as what follows.
    assert!(!files.exists("new").await.unwrap());
    assert_eq!(&files.read("old").await.unwrap()[..], b"kept");
    let left = say(&world.session, "ls -A | grep -v -e old -e letters | grep -i -e new -e tmp -e draft || true").await;
    assert_eq!(left, "");
    let mut writer = files.writer("new", WriteOptions::default()).await.unwrap();
    writer.write_all(b"whole").await.unwrap();
    writer.shutdown().await.unwrap();
    assert_eq!(&files.read("new").await.unwrap()[..], b"whole");
    assert!(writer.write_all(b"more").await.is_err(), "after its end");
}

async fn refusals_are_typed(world: &World) {
    let files = world.session.files();
    for error in [
        files.read("nothing").await.err(),
        files.reader("nothing").await.err(),
        files.stat("nothing").await.err(),
        files.list("nothing", true).await.err(),
    ] {
        let error = error.expect("there is no such file");
        assert!(matches!(error, Error::Refused { kind: RefusalKind::FileNotFound, .. }), "{error:?}");
        assert_eq!(error.code(), Some(Code::FileNotFound));
    }
    let directory = files.write("/home/tenki", "x").await.unwrap_err();
    assert_eq!(directory.code(), Some(Code::IsADirectory), "{directory:?}");
    let mut writer = files.writer("/home/tenki", WriteOptions::default()).await.unwrap();
    let refused = loop {
        if let Err(error) = writer.write_all(&[0; 1 << 16]).await {
            break Error::from(error);
        }
    };
    assert_eq!(refused.code(), Some(Code::IsADirectory), "{refused:?}");
    let again = writer.finish().await.unwrap_err();
    assert_eq!(again.code(), Some(Code::IsADirectory), "it stays refused: {again:?}");
}
