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
        let write = || match directory.shares_blocks && share(&blob, &unnamed.file, chunk, manifest.image_size) {
            true => Ok(()),
            false => spread(bytes, &unnamed.file, chunk, manifest.image_size),
        };
        write().map_err(|error| broken(&error))
    })?;
    unnamed.name(image).map_err(|error| broken(&error))
}

/// Writes the blocks of a blob to their places.
fn spread(bytes: &[u8], image: &File, chunk: &Chunk, image_size: u64) -> io::Result<()> {
    let mut rest = bytes;
    for run in chunk.blocks.runs() {
        let (blocks, after) = rest.split_at(run.len() * BLOCK_BYTES as usize);
        let offset = chunk.offset() + run.start as u64 * BLOCK_BYTES;
        let in_image = ((image_size - offset) as usize).min(blocks.len());
        image.write_all_at(&blocks[..in_image], offset)?;
        rest = after;
    }
    Ok(())
}

/// Lets the image have the blob's own blocks. False leaves the rest for copying.
fn share(blob: &File, image: &File, chunk: &Chunk, image_size: u64) -> bool {
    let mut from = 0;
    for run in chunk.blocks.runs() {
        let mut to = chunk.offset() + run.start as u64 * BLOCK_BYTES;
        let end = (to + run.len() as u64 * BLOCK_BYTES).min(image_size);
        while to < end {
            let length = (end - to) as usize;
            match copy_file_range(blob, Some(&mut from), image, Some(&mut to), length) {
                Ok(0) | Err(_) => return false,
                Ok(_) => {}
            }
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
