use proptest::prelude::*;
use rustix::io::Errno;

use super::attributes::Attributes;
use super::wire::{self, Failure, Request};
use super::*;

/// One request with its length left out; numbers and strings are laid one behind the other.
fn packet(kind: u8, id: u32, parts: &[&[u8]]) -> Vec<u8> {
    let mut packet = vec![kind];
    packet.extend(id.to_be_bytes());
    parts.iter().for_each(|part| packet.extend_from_slice(part));
    packet
}

fn string(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// The kind of the only answer and what follows its id.
fn ask(server: &mut Server, packet: &[u8]) -> (u8, Vec<u8>) {
    let mut answers = Vec::new();
    server.answer(packet, &mut answers);
    let length = u32::from_be_bytes(answers[..4].try_into().unwrap()) as usize;
    assert_eq!(answers.len(), length + 4);
    assert_eq!(answers[5..9], packet[1..5], "the id");
    (answers[4], answers[9..].to_vec())
}

fn status(server: &mut Server, packet: &[u8]) -> u32 {
    let (kind, rest) = ask(server, packet);
    assert_eq!(kind, wire::STATUS);
    u32::from_be_bytes(rest[..4].try_into().unwrap())
}

const NO_ATTRIBUTES: [u8; 4] = [0; 4];

#[test]
fn a_file_is_written_read_and_renamed_over() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| string(place.path().join(name).to_str().unwrap());
    let server = &mut Server::default();
    // Read, write, create, truncate.
    let open = packet(wire::OPEN, 1, &[&path("a"), &27u32.to_be_bytes(), &NO_ATTRIBUTES]);
    let (kind, handle) = ask(server, &open);
    assert_eq!(kind, wire::HANDLE);
    assert_eq!(status(server, &packet(wire::WRITE, 2, &[&handle, &3u64.to_be_bytes(), &string("def")])), 0);
    assert_eq!(status(server, &packet(wire::WRITE, 3, &[&handle, &0u64.to_be_bytes(), &string("abc")])), 0);
    let read = |offset: u64| packet(wire::READ, 4, &[&handle, &offset.to_be_bytes(), &100u32.to_be_bytes()]);
    assert_eq!(ask(server, &read(1)), (wire::DATA, string("bcdef")));
    assert_eq!(status(server, &read(6)), 1, "end of file");
    assert_eq!(status(server, &packet(wire::CLOSE, 5, &[&handle])), 0);
    assert_eq!(status(server, &read(0)), 4, "the handle is closed");

    std::fs::write(place.path().join("b"), "old").unwrap();
    assert_eq!(status(server, &packet(wire::RENAME, 6, &[&path("a"), &path("b")])), 4, "nothing is replaced");
    let over = packet(wire::EXTENDED, 7, &[&string("posix-rename@openssh.com"), &path("a"), &path("b")]);
    assert_eq!(status(server, &over), 0);
    assert_eq!(std::fs::read(place.path().join("b")).unwrap(), b"abcdef");
    assert_eq!(status(server, &packet(wire::REMOVE, 8, &[&path("b")])), 0);
    assert_eq!(status(server, &packet(wire::REMOVE, 9, &[&path("b")])), 2, "no such file");
}

#[test]
fn a_directory_is_listed_in_parts_until_its_end() {
    let place = tempfile::tempdir().unwrap();
    for number in 0..450 {
        std::fs::write(place.path().join(format!("{number:03}")), "").unwrap();
    }
    let server = &mut Server::default();
    let (_, handle) = ask(server, &packet(wire::OPENDIR, 1, &[&string(place.path().to_str().unwrap())]));
    let mut found = 0;
    loop {
        let (kind, rest) = ask(server, &packet(wire::READDIR, 2, &[&handle]));
        if kind == wire::STATUS {
            break;
        }
        found += u32::from_be_bytes(rest[..4].try_into().unwrap());
    }
    // With `.` and `..`.
    assert_eq!(found, 452);
}

#[test]
fn what_is_not_a_request_is_answered_all_the_same() {
    let server = &mut Server::default();
    assert_eq!(status(server, &packet(99, 1, &[])), 8, "an unknown kind");
    assert_eq!(status(server, &packet(wire::READ, 2, &[])), 5, "too short");
    assert_eq!(status(server, &packet(wire::STAT, 3, &[&string("a\0b")])), 5, "NUL in a path");
    assert_eq!(status(server, &packet(wire::STAT, 4, &[&[0xff, 0xff, 0xff, 0xff]])), 5, "a string without end");
    assert_eq!(status(server, &packet(wire::CLOSE, 5, &[&string("12345")])), 4, "not a handle of ours");
    let mut answers = Vec::new();
    server.answer(&[wire::STAT, 0, 0], &mut answers);
    assert!(answers.is_empty(), "without an id there is nobody to answer");
}

#[test]
fn there_is_a_limit_to_open_files() {
    let server = &mut Server::default();
    let open = packet(wire::OPENDIR, 1, &[&string("/")]);
    for _ in 0..handles::HANDLES_MAX {
        assert_eq!(ask(server, &open).0, wire::HANDLE);
    }
    assert_eq!(status(server, &open), 4);
}

#[test]
fn failures_have_the_numbers_that_clients_know() {
    let number = |errno| {
        let mut answers = Vec::new();
        wire::Reply::begin(&mut answers).status(Failure::System(errno));
        u32::from_be_bytes(answers[9..13].try_into().unwrap())
    };
    assert_eq!([Errno::NOENT, Errno::ACCESS, Errno::NOSPC, Errno::INVAL].map(number), [2, 3, 4, 5]);
}

proptest! {
    #[test]
    fn hostile_bytes_are_only_ever_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Some((_, mut request)) = Request::parse(&bytes) {
            let _ = Attributes::read(&mut request);
            let _ = request.path();
            let _ = request.long_number();
        }
        let mut input = Input { start: 0, end: bytes.len(), bytes };
        while let Ok(Some(packet)) = input.packet() {
            prop_assert!(!packet.is_empty());
        }
    }
}
