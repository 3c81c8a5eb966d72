//! From blobs back to an image.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nagaya_engine::ports::BlobError;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, copy_file_range, linkat, open};
use rustix::io::Errno;

use crate::directory::{Directory, PIECE_BYTES, failed};
use crate::workers::on_each;
use crate::{BLOCK_BYTES, Chunk, Manifest};

/// Shorter runs of blocks are copied, and stay in memory.
const SHARED_BLOCKS_MIN: usize = 16;

/// Makes an image: in the empty file that is there, or in one that gets its name when every part of it has been verified and written. It is
/// not flushed. `fetch` may bring a chunk that is missing or corrupt from elsewhere; it is verified again.
pub(crate) fn restore(
    directory: &Directory,
    manifest: &Manifest,
    image: &Path,
    fetch: &(impl Fn(&Chunk) -> Result<(), BlobError> + Sync),
) -> Result<(), BlobError> {
    if let Some(file) = open_empty(image).map_err(|error| broken(&error))? {
        return fill(directory, manifest, &file, fetch).inspect_err(|_| {
            // Nobody takes what the error leaves for an image; emptied, it takes no space until it is removed.
            let _ = file.set_len(0);
        });
    }
    let unnamed = Unnamed::beside(image).map_err(|error| broken(&error))?;
    fill(directory, manifest, &unnamed.file, fetch)?;
    unnamed.name(image).map_err(|error| broken(&error))
}

/// The file at this path, if there is one and nothing is in it.
fn open_empty(path: &Path) -> io::Result<Option<File>> {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => Ok((file.metadata()?.len() == 0).then_some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn fill(
    directory: &Directory,
    manifest: &Manifest,
    image: &File,
    fetch: &(impl Fn(&Chunk) -> Result<(), BlobError> + Sync),
) -> Result<(), BlobError> {
    image.set_len(manifest.image_size).map_err(|error| broken(&error))?;
    let piece = || vec![0; PIECE_BYTES];
    on_each(manifest.chunks.len(), piece, |piece, number| {
        let chunk = &manifest.chunks[number];
        match place(directory, chunk, piece, image, manifest.image_size) {
            Err(BlobError::Missing(_) | BlobError::Corrupt(_)) => {
                fetch(chunk)?;
                place(directory, chunk, piece, image, manifest.image_size)
            }
            outcome => outcome,
        }
    })
    .map(drop)
}

fn broken(error: &io::Error) -> BlobError {
    failed("write the image", error)
}

/// Puts the blocks of a chunk to their places: long runs as the blob's own blocks, where it can share them, and others by writing
/// them. Those are mostly the file system's own, which whoever mounts it wants at once, from memory and not from the disk.
/// What was put there is to be thrown away, or put there again, after an error.
fn place(
    directory: &Directory,
    chunk: &Chunk,
    piece: &mut [u8],
    image: &File,
    image_size: u64,
) -> Result<(), BlobError> {
    let mut runs = chunk.blocks.runs();
    // Of the run that bytes are put to: where the next one goes, how many there are still, and whether they are there already.
    let (mut offset, mut left, mut shared) = (0, 0, false);
    let mut position = 0;
    directory.read_chunk(chunk.digest, chunk.stored_bytes(), piece, |blob, mut bytes| {
        while !bytes.is_empty() {
            if left == 0 {
                let run = runs.next().expect("a blob has a block for each in its chunk's map");
                offset = chunk.offset() + run.start as u64 * BLOCK_BYTES;
                left = run.len() * BLOCK_BYTES as usize;
                let in_image = ((image_size - offset) as usize).min(left);
                let long = directory.shares_blocks && run.len() >= SHARED_BLOCKS_MIN;
                shared = long && share(blob, position, image, offset, in_image);
            }
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            if !shared {
                let in_image = ((image_size - offset) as usize).min(now.len());
                image.write_all_at(&now[..in_image], offset).map_err(|error| broken(&error))?;
            }
            offset += now.len() as u64;
            left -= now.len();
            position += now.len() as u64;
            bytes = later;
        }
        Ok(())
    })
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
