//! Images for the tests, and what is left of a directory of blobs.

// Each test program uses its own part of this.
#![allow(clippy::unwrap_used, dead_code)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nagaya_blobs::{BlobStore, Digest, Manifest};
use nagaya_engine::ports::{BlobError, Blobs};

pub const BLOCK: u64 = 4096;
pub const CHUNK: u64 = 4 << 20;

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Bytes that a seed repeats and that no two places share.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Makes an image of this size with these pieces in it: offset and length.
pub fn image(path: &Path, size: u64, pieces: &[(u64, u64)]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (offset, length) in pieces {
        file.write_all_at(&noise(*offset, *length as usize), *offset).unwrap();
    }
}

/// A small image with everything that matters: several chunks, holes, zeros that are no hole.
pub fn example(path: &Path) {
    image(path, 5 * CHUNK, &[(0, 3 * BLOCK), (9 * BLOCK, 10), (CHUNK + BLOCK, CHUNK), (4 * CHUNK, BLOCK)]);
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0; 4 * BLOCK as usize], 3 * CHUNK).unwrap();
}

pub fn blobs(directory: &Path, kind: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(directory.join(kind)).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

pub fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Bytes that a file takes on its disk.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Every blob is what its name says, and nothing is half done.
pub fn assert_whole(directory: &Path) {
    for kind in ["chunks", "images"] {
        for path in blobs(directory, kind) {
            assert_eq!(Digest::of(&fs::read(&path).unwrap()).to_string(), name(&path), "{path:?}");
        }
    }
    for path in blobs(directory, "images") {
        for chunk in Manifest::parse(&fs::read(&path).unwrap()).unwrap().chunks {
            assert!(directory.join("chunks").join(chunk.digest.to_string()).exists(), "an image has all of its chunks");
        }
    }
    assert!(blobs(directory, "incoming").is_empty(), "nothing unfinished is left");
}

/// The image read through the stream.
pub async fn read_through(store: &BlobStore, manifest: &str) -> Result<Vec<u8>, BlobError> {
    let mut reader = store.open(manifest).await?;
    let mut bytes = Vec::new();
    while let Some(piece) = reader.chunks.recv().await {
        bytes.extend_from_slice(&piece?);
    }
    assert_eq!(bytes.len() as u64, reader.total_size);
    Ok(bytes)
}

/// Starts one of this program's ignored tests as a program of its own.
pub fn start(test: &str, arguments: &[(&str, &Path)]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", test]).stdout(Stdio::piped());
    for (name, value) in arguments {
        command.env(name, value);
    }
    command.spawn().unwrap()
}

pub fn argument(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(name).unwrap())
}
