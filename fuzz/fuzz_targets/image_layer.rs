//! A layer of any bytes, unpacked for real: nothing is made or changed outside of its directory, and no whiteout is left as a name.
#![no_main]

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nagaya_image::{Digest, Limits, unpack};
use tempfile::TempDir;

static PLACE: LazyLock<TempDir> = LazyLock::new(|| {
    let place = TempDir::new().expect("a directory can be made");
    fs::write(place.path().join("secret"), "outside").expect("a file can be written");
    place
});

const LIMITS: Limits = Limits { bytes_max: 1 << 20, entries_max: 1000, ratio_max: 200 };

fn no_whiteout_is_a_name(directory: &Path) {
    for entry in fs::read_dir(directory).expect("it can be listed") {
        let entry = entry.expect("an entry");
        assert!(!entry.file_name().to_string_lossy().starts_with(".wh."));
        if entry.file_type().expect("a kind").is_dir() {
            no_whiteout_is_a_name(&entry.path());
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let layer = PLACE.path().join("layer");
    fs::create_dir(&layer).expect("a directory can be made");
    let root = File::open(&layer).expect("it is there");
    let unpacked = unpack(input, root.as_fd(), &LIMITS, &Digest::of(b"layer"));
    if let Err(error) = unpacked {
        assert!(matches!(error.kind(), "invalid_layer" | "too_large"), "{error}");
    }
    no_whiteout_is_a_name(&layer);
    let secret = PLACE.path().join("secret");
    assert_eq!(fs::read_to_string(&secret).expect("it is there"), "outside");
    assert_eq!(fs::metadata(&secret).expect("it is there").nlink(), 1);
    assert_eq!(fs::read_dir(PLACE.path()).expect("it is there").count(), 2);
    fs::remove_dir_all(&layer).expect("whatever was made can be removed");
});
