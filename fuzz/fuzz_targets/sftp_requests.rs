//! The file server on any bytes, with real files. It runs with the rights of this process, so no slash reaches it: all
//! that it can name lies in one directory, which is made anew for every input.
#![no_main]

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nagaya_guest::sftp;
use tempfile::TempDir;

/// The inner directory is the server's; what it does to `..` stays in the outer one.
static PLACE: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a directory can be made"));

fn furnish(directory: &Path) -> std::io::Result<()> {
    fs::create_dir_all(directory.join("d/e"))?;
    fs::write(directory.join("f"), "content")?;
    symlink("f", directory.join("l"))
}

/// Kinds of answers: VERSION, STATUS to ATTRS, EXTENDED_REPLY. Each is whole.
fn check(mut answers: &[u8]) {
    while let Some((length, rest)) = answers.split_first_chunk::<4>() {
        let (packet, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize).expect("a whole packet");
        assert!(matches!(packet.first(), Some(2 | 101..=105 | 201)), "an answer of another kind");
        answers = rest;
    }
    assert!(answers.is_empty());
}

fuzz_target!(|input: &[u8]| {
    let here = File::open(".").expect("the process is somewhere");
    let inner = PLACE.path().join("inner");
    furnish(&inner).expect("files can be made");
    std::env::set_current_dir(&inner).expect("the directory is there");
    let input: Vec<u8> = input.iter().map(|byte| if *byte == b'/' { b'_' } else { *byte }).collect();
    let mut answers = Vec::new();
    // Bytes that are no packets end the connection.
    let _ = sftp::serve(input.as_slice(), &mut answers);
    check(&answers);
    rustix::process::fchdir(&here).expect("the process was there before");
    // Whatever rights the input gave to what is in it: this is for root.
    fs::remove_dir_all(&inner).expect("it can be removed");
});
