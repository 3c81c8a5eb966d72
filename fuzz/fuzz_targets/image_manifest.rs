//! The parser of manifests, on any bytes: what it accepts has exactly one form and stays inside its image.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nagaya_blobs::Manifest;

fuzz_target!(|input: &[u8]| {
    let Ok(manifest) = Manifest::parse(input) else { return };
    assert_eq!(manifest.encode(), input);
    for chunk in &manifest.chunks {
        let last = chunk.blocks.last().expect("no chunk is empty") as u64;
        assert!(chunk.offset() + last * 4096 < manifest.image_size);
        assert_eq!(chunk.blocks.runs().map(|run| run.len() as u64 * 4096).sum::<u64>(), chunk.stored_bytes());
    }
});
