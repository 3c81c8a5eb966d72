//! From blobs back to an image.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nagaya_engine::ports::BlobError;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, copy_file_range, linkat, open};
use rustix::io::Errno;

use crate::directory::{Directory, Kind, failed};
use crate::workers::on_each;
use crate::{BLOCK_BYTES, Chunk, Manifest};

/// Shorter runs of blocks are copied, and stay in memory.
const SHARED_BLOCKS_MIN: usize = 16;

/// Makes an image. It gets its name when every part of it has been verified and written; it is not flushed. `fetch` may bring a chunk that is
/// missing or corrupt from elsewhere; it is verified again.
pub(crate) fn restore(
    directory: &Directory,
    manifest: &Manifest,
    image: &Path,
    fetch: &(impl Fn(&Chunk) -> Result<(), BlobError> + Sync),
) -> Result<(), BlobError> {
    let broken = |error: &io::Error| failed("write the image", error);
    let unnamed = Unnamed::beside(image).map_err(|error| broken(&error))?;
    unnamed.file.set_len(manifest.image_size).map_err(|error| broken(&error))?;
    on_each(manifest.chunks.len(), Vec::new, |bytes, number| {
        let chunk = &manifest.chunks[number];
        let blob = match directory.read(Kind::Chunk, chunk.digest, bytes) {
            Err(BlobError::Missing(_) | BlobError::Corrupt(_)) => {
                fetch(chunk)?;
                directory.read(Kind::Chunk, chunk.digest, bytes)?
            }
            outcome => outcome?,
        };
        if bytes.len() as u64 != chunk.stored_bytes() {
            return Err(BlobError::Corrupt(chunk.digest.to_string()));
        }
        let shared = directory.shares_blocks.then_some(&blob);
        spread(bytes, shared, &unnamed.file, chunk, manifest.image_size).map_err(|error| broken(&error))
    })?;
    unnamed.name(image).map_err(|error| broken(&error))
}

/// Puts the blocks of a blob to their places: long runs as the blob's own blocks, where it can share them, and others by writing
/// them. Those are mostly the file system's own, which whoever mounts it wants at once, from memory and not from the disk.
fn spread(bytes: &[u8], blob: Option<&File>, image: &File, chunk: &Chunk, image_size: u64) -> io::Result<()> {
    let mut position = 0;
    for run in chunk.blocks.runs() {
        let blocks = &bytes[position..position + run.len() * BLOCK_BYTES as usize];
        let offset = chunk.offset() + run.start as u64 * BLOCK_BYTES;
        let in_image = ((image_size - offset) as usize).min(blocks.len());
        let blob = blob.filter(|_| run.len() >= SHARED_BLOCKS_MIN);
        if !blob.is_some_and(|blob| share(blob, position as u64, image, offset, in_image)) {
            image.write_all_at(&blocks[..in_image], offset)?;
        }
        position += blocks.len();
    }
    Ok(())
}

/// Lets the image have the blob's own blocks. False leaves them for copying.
fn share(blob: &File, mut from: u64, image: &File, mut to: u64, length: usize) -> bool {
    let end = to + length as u64;
    while to < end {
        let rest = (end - to) as usize;
        match copy_file_range(blob, Some(&mut from), image, Some(&mut to), rest) {
            Ok(0) | Err(_) => return false,
            Ok(_) => {}
        }
    }
    true
}

/// A file that goes with the process unless it is given a name.
struct Unnamed {
    file: File,
    /// Where the file system cannot do that: the name it has meanwhile.
    provisional: Option<PathBuf>,
}

impl Unnamed {
    fn beside(path: &Path) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match open(directory, flags, Mode::from_raw_mode(0o600)) {
            Ok(file) => Ok(Self { file: file.into(), provisional: None }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT) => {
                let provisional = path.with_added_extension("part");
                let mut options = OpenOptions::new();
                options.read(true).write(true).create(true).truncate(true).mode(0o600);
                Ok(Self { file: options.open(&provisional)?, provisional: Some(provisional) })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The name is not flushed to the disk: whoever takes the image over gives it another.
    fn name(mut self, path: &Path) -> io::Result<()> {
        if let Some(provisional) = &self.provisional {
            fs::rename(provisional, path)?;
            self.provisional = None;
            return Ok(());
        }
        let open_file = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let link = || linkat(CWD, &open_file, CWD, path, AtFlags::SYMLINK_FOLLOW);
        match link() {
            // An earlier try of the same restoration came this far.
            Err(Errno::EXIST) => {
                fs::remove_file(path)?;
                Ok(link()?)
            }
            outcome => Ok(outcome?),
        }
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if let Some(provisional) = &self.provisional {
            let _ = fs::remove_file(provisional);
        }
    }
}
