use std::process::Command;

use super::*;

fn tool(program: &str, arguments: &[&str], path: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(path).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output();
    let output = output.expect("e2fsprogs is there");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

fn assert_sound(path: &Path) {
    let said = tool("e2fsck", &["-fn"], path);
    assert!(said.contains(" files (") && !said.contains("WARNING") && !said.contains("? no"), "{said}");
}

fn free_bytes(path: &Path) -> u64 {
    let said = tool("dumpe2fs", &["-h"], path);
    let line = said.lines().find_map(|line| line.strip_prefix("Free blocks:")).expect("dumpe2fs says it");
    line.trim().parse::<u64>().expect("a number") * BLOCK
}

#[test]
fn every_size_has_a_journal_an_owner_and_most_of_its_room() {
    let directory = tempfile::tempdir().expect("a directory");
    for size in [MIB, 2 * MIB, 8 * MIB, 12 * MIB, 100 * MIB + 8 * BLOCK, GIB, 100 * GIB] {
        let path = directory.path().join(size.to_string());
        format(&path, size).expect("format");
        let found = Superblock::read(&File::open(&path).expect("open")).expect("read");
        let journal_bytes = if size < GIB { 4 * MIB } else { 16 * MIB };
        assert_eq!(
            found,
            Superblock { bytes: size + journal_bytes, journal_bytes, needs_check: false, has_errors: false }
        );
        assert_eq!(fs::metadata(&path).expect("metadata").len(), found.bytes);
        assert_sound(&path);
        let free = free_bytes(&path);
        assert!(free <= size && free >= size / 100 * 80, "{free} of {size} bytes are free");
        let root = tool("debugfs", &["-R", "stat <2>"], &path);
        assert!(root.contains("User:  1000   Group:  1000"), "{root}");
    }
}

#[test]
fn the_smallest_grows_to_the_largest_step_by_step() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("volume");
    format(&path, MIB).expect("format");
    let content = directory.path().join("content");
    fs::write(&content, vec![7; 500_000]).expect("write");
    let copy = format!("write {} kept", content.display());
    tool("debugfs", &["-w", "-R", &copy], &path);
    for size in [2 * MIB, 16 * MIB, 128 * MIB, 129 * MIB, GIB, 10 * GIB, 100 * GIB] {
        let before = recover(&path).expect("recover");
        let file = OpenOptions::new().write(true).open(&path).expect("open");
        file.set_len(size + before.journal_bytes).expect("size");
        grow(&path, size + before.journal_bytes).expect("grow");
        let after = Superblock::read(&File::open(&path).expect("open")).expect("read");
        assert_eq!(after.bytes, size + 4 * MIB);
        assert_sound(&path);
        assert!(free_bytes(&path) >= size / 100 * 40, "{size}");
    }
    assert_eq!(tool("debugfs", &["-R", "cat kept"], &path).matches('\u{7}').count(), 500_000);
    let said = tool("dumpe2fs", &["-h"], &path);
    let inodes = said.lines().find_map(|line| line.strip_prefix("Inode count:")).expect("dumpe2fs says it");
    assert!(inodes.trim().parse::<u64>().expect("a number") > 200_000, "{inodes}");
}

#[test]
fn what_is_no_file_system_is_said_to_be_none() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("volume");
    fs::write(&path, vec![0; 8192]).expect("write");
    assert!(matches!(recover(&path), Err(ImageError::Foreign)));
}

#[test]
fn an_image_that_was_in_use_is_put_in_order() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("volume");
    format(&path, MIB).expect("format");
    tool("debugfs", &["-w", "-R", "set_super_value state 0"], &path);
    assert!(Superblock::read(&File::open(&path).expect("open")).expect("read").needs_check);
    assert!(!recover(&path).expect("recover").needs_check);
    assert_sound(&path);
}
