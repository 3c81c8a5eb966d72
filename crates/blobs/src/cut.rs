//! From an image to blobs.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nagaya_engine::model::Limit;
use nagaya_engine::ports::{BlobError, StoredImage};
use rustix::fs::{SeekFrom, copy_file_range, seek};
use rustix::io::Errno;

use crate::digest::Digest;
use crate::directory::{Directory, Incoming, Kind, begin_to_flush, failed};
use crate::workers::on_each;
use crate::{BLOCK_BYTES, BlockMap, CHUNK_BLOCKS, CHUNK_BYTES, Chunk, IMAGE_BYTES_MAX, Manifest};

/// Blobs of each worker that are written but have no name yet: open files, and what a crash makes it do again.
const UNNAMED_MAX: usize = 32;
const ZERO_BLOCK: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];

/// Keeps an image: its chunks, then, when all of them are on the disk, its manifest.
pub(crate) fn cut(directory: &Directory, image: &Path) -> Result<StoredImage, BlobError> {
    let image = File::open(image).map_err(|error| failed("open the image", &error))?;
    let image_size = image.metadata().map_err(|error| failed("read the image", &error))?.len();
    if image_size > IMAGE_BYTES_MAX {
        return Err(BlobError::Exhausted(Limit::ImageBytes));
    }
    let candidates = find_data(&image, image_size).map_err(|error| failed("read the image", &error.into()))?;
    let worker = || Worker::new(directory, &image, image_size);
    let mut workers = on_each(candidates.len(), worker, |worker, number| {
        let (index, candidates) = &candidates[number];
        worker.cut(*index, candidates)
    })?;
    let mut chunks: Vec<Chunk> = workers.iter_mut().flat_map(|worker| std::mem::take(&mut worker.chunks)).collect();
    chunks.sort_by_key(|chunk| chunk.index);
    let manifest = Manifest { image_size, chunks };
    let bytes = manifest.encode();
    let digest = Digest::of(&bytes);
    for worker in &mut workers {
        worker.name_blobs()?;
    }
    // Also for blobs that were there before: whoever wrote them may not have come this far.
    directory.sync_names(Kind::Chunk).map_err(|error| failed("write a blob", &error))?;
    directory.put(Kind::Manifest, digest, &bytes)?;

    let mut seen = HashSet::new();
    let unique = manifest.chunks.iter().filter(|chunk| seen.insert(chunk.digest));
    let stored_bytes = bytes.len() as u64 + unique.map(Chunk::stored_bytes).sum::<u64>();
    Ok(StoredImage { manifest: digest.to_string(), size_bytes: manifest.data_bytes(), stored_bytes })
}

/// The chunks that have data according to the file system, with the blocks that may.
fn find_data(image: &File, image_size: u64) -> Result<Vec<(u32, BlockMap)>, Errno> {
    let mut found: Vec<(u32, BlockMap)> = Vec::new();
    let mut from = 0;
    loop {
        let start = match seek(image, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(found),
            Err(error) => return Err(error),
        };
        // The image is at rest; should it grow all the same, what is new is not part of it.
        let end = seek(image, SeekFrom::Hole(start))?.min(image_size);
        for block in start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            let index = (block / CHUNK_BLOCKS as u64) as u32;
            if found.last().is_none_or(|(last, _)| *last != index) {
                found.push((index, BlockMap::default()));
            }
            let (_, blocks) = found.last_mut().expect("it was just pushed");
            blocks.insert(block as usize % CHUNK_BLOCKS);
        }
        if end >= image_size {
            return Ok(found);
        }
        from = end;
    }
}

/// One of those who cut an image; what it holds does not grow with the image but for the list of chunks.
struct Worker<'a> {
    directory: &'a Directory,
    image: &'a File,
    image_size: u64,
    /// The blocks of a chunk that are not holes.
    packed: Vec<u8>,
    /// The blob that has their name already.
    existing: Vec<u8>,
    /// Blobs that are being flushed. Waiting for many at once costs hardly more than waiting for one.
    unnamed: Vec<(Incoming, Digest)>,
    chunks: Vec<Chunk>,
}

impl<'a> Worker<'a> {
    fn new(directory: &'a Directory, image: &'a File, image_size: u64) -> Self {
        let (packed, existing, unnamed, chunks) = Default::default();
        Self { directory, image, image_size, packed, existing, unnamed, chunks }
    }

    fn cut(&mut self, index: u32, candidates: &BlockMap) -> Result<(), BlobError> {
        let blocks = self.read(index, candidates).map_err(|error| failed("read the image", &error))?;
        if !blocks.is_empty() {
            let chunk = Chunk { index, digest: Digest::of(&self.packed), blocks };
            self.keep(&chunk).map_err(|error| failed("write a blob", &error))?;
            self.chunks.push(chunk);
        }
        if self.unnamed.len() >= UNNAMED_MAX {
            self.name_blobs()?;
        }
        Ok(())
    }

    /// Reads a chunk of the image; returns which blocks are not all zeros.
    fn read(&mut self, index: u32, candidates: &BlockMap) -> io::Result<BlockMap> {
        let mut blocks = BlockMap::default();
        self.packed.clear();
        for run in candidates.runs() {
            let start = self.packed.len();
            let offset = u64::from(index) * CHUNK_BYTES + run.start as u64 * BLOCK_BYTES;
            // The rest of an image's last block counts as zeros.
            self.packed.resize(start + run.len() * ZERO_BLOCK.len(), 0);
            let in_image = ((self.image_size - offset) as usize).min(run.len() * ZERO_BLOCK.len());
            self.image.read_exact_at(&mut self.packed[start..start + in_image], offset)?;
            let mut end = start;
            for (number, block) in run.enumerate() {
                let at = start + number * ZERO_BLOCK.len();
                if self.packed[at..at + ZERO_BLOCK.len()] != ZERO_BLOCK {
                    blocks.insert(block);
                    if at != end {
                        self.packed.copy_within(at..at + ZERO_BLOCK.len(), end);
                    }
                    end += ZERO_BLOCK.len();
                }
            }
            self.packed.truncate(end);
        }
        Ok(blocks)
    }

    /// Writes the chunk's blob unless it is there and is what its name says.
    fn keep(&mut self, chunk: &Chunk) -> io::Result<()> {
        // Relying on a blob that rotted would lose this image too; writing it again heals the others.
        if self.directory.holds(Kind::Chunk, chunk.digest, &self.packed, &mut self.existing)? {
            return Ok(());
        }
        let mut incoming = self.directory.incoming()?;
        if !(self.directory.shares_blocks && share(self.image, &incoming, chunk)) {
            incoming.file.write_all(&self.packed)?;
        }
        begin_to_flush(&incoming.file, 0, chunk.stored_bytes());
        self.unnamed.push((incoming, chunk.digest));
        Ok(())
    }

    fn name_blobs(&mut self) -> Result<(), BlobError> {
        for (incoming, digest) in self.unnamed.drain(..) {
            self.directory.name(&incoming, Kind::Chunk, digest).map_err(|error| failed("write a blob", &error))?;
        }
        Ok(())
    }
}

/// Lets the blob have the image's own blocks instead of copies. False leaves the file for copying.
fn share(image: &File, incoming: &Incoming, chunk: &Chunk) -> bool {
    let mut to = 0;
    for run in chunk.blocks.runs() {
        let mut from = chunk.offset() + run.start as u64 * BLOCK_BYTES;
        let end = from + run.len() as u64 * BLOCK_BYTES;
        while from < end {
            let length = (end - from) as usize;
            match copy_file_range(image, Some(&mut from), &incoming.file, Some(&mut to), length) {
                Ok(0) | Err(_) => return false,
                Ok(_) => {}
            }
        }
    }
    true
}
