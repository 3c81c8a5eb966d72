//! What an image consists of. docs/decisions/0007-blobs.md has the format.

use std::ops::Range;

use crate::digest::Digest;
use crate::{BLOCK_BYTES, CHUNK_BLOCKS, CHUNK_BYTES, IMAGE_BYTES_MAX};

const MAGIC: [u8; 8] = *b"NAGAYAIM";
const VERSION: u32 = 1;
/// Magic, version, number of chunks, size of the image.
const HEADER_BYTES: usize = 8 + 4 + 4 + 8;
const MAP_WORDS: usize = CHUNK_BLOCKS / 64;
/// Index, digest, map of blocks.
const ENTRY_BYTES: usize = 4 + 32 + MAP_WORDS * 8;

/// No manifest is larger, so no more is ever read.
pub(crate) const MANIFEST_BYTES_MAX: u64 = HEADER_BYTES as u64 + (IMAGE_BYTES_MAX / CHUNK_BYTES) * ENTRY_BYTES as u64;

/// The bytes are not a manifest that this version can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("parse manifest: it has version {0}, and this version of nagaya reads version {VERSION}")]
    Version(u32),
    #[error("parse manifest: {0}")]
    Malformed(&'static str),
}

/// An image: its size, and every part of it that is not a hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Bytes, holes included.
    pub image_size: u64,
    /// By index, without gaps in meaning: what is not named is a hole.
    pub chunks: Vec<Chunk>,
}

/// One aligned piece of an image that is not all hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Its place in the image, in chunks.
    pub index: u32,
    /// Name of the blob with its blocks, one after another, holes left out.
    pub digest: Digest,
    /// Which of its blocks are in the blob.
    pub blocks: BlockMap,
}

impl Chunk {
    /// Bytes of its blob.
    pub fn stored_bytes(&self) -> u64 {
        self.blocks.count() * BLOCK_BYTES
    }

    /// Its first byte in the image.
    pub fn offset(&self) -> u64 {
        u64::from(self.index) * CHUNK_BYTES
    }
}

impl Manifest {
    /// Bytes of the image that are not holes.
    pub fn data_bytes(&self) -> u64 {
        self.chunks.iter().map(Chunk::stored_bytes).sum()
    }

    pub fn encode(&self) -> Vec<u8> {
        let count = u32::try_from(self.chunks.len()).expect("an image of the largest size has fewer chunks");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.chunks.len() * ENTRY_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&self.image_size.to_le_bytes());
        for chunk in &self.chunks {
            bytes.extend_from_slice(&chunk.index.to_le_bytes());
            bytes.extend_from_slice(chunk.digest.as_bytes());
            for word in chunk.blocks.0 {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        }
        bytes
    }

    /// Accepts exactly what [`Manifest::encode`] makes: every manifest has one form, and so one name.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        use ManifestError::Malformed;
        let (header, entries) = bytes.split_at_checked(HEADER_BYTES).ok_or(Malformed("it is too short"))?;
        if header[..8] != MAGIC {
            return Err(Malformed("it does not begin as one"));
        }
        let version = u32_at(header, 8);
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        let image_size = u64_at(header, 16);
        if image_size > IMAGE_BYTES_MAX {
            return Err(Malformed("the image is too large"));
        }
        // The length is compared before anything is allocated for the number that the header claims.
        if entries.len() as u64 != u64::from(u32_at(header, 12)) * ENTRY_BYTES as u64 {
            return Err(Malformed("its length does not fit the number of chunks"));
        }
        let chunks = entries.chunks_exact(ENTRY_BYTES).map(parse_chunk).collect::<Vec<_>>();
        if !chunks.is_sorted_by(|one, next| one.index < next.index) {
            return Err(Malformed("its chunks are not in order"));
        }
        for chunk in &chunks {
            let blocks_in_image = image_size.saturating_sub(chunk.offset()).div_ceil(BLOCK_BYTES);
            match chunk.blocks.last() {
                None => return Err(Malformed("a chunk is empty")),
                Some(last) if last as u64 >= blocks_in_image => return Err(Malformed("a chunk is outside the image")),
                Some(_) => {}
            }
        }
        Ok(Self { image_size, chunks })
    }
}

fn parse_chunk(entry: &[u8]) -> Chunk {
    let mut digest = [0; 32];
    digest.copy_from_slice(&entry[4..36]);
    let mut blocks = BlockMap::default();
    for (number, word) in blocks.0.iter_mut().enumerate() {
        *word = u64_at(entry, 36 + number * 8);
    }
    Chunk { index: u32_at(entry, 0), digest: Digest::from_bytes(digest), blocks }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// A set of blocks of one chunk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockMap([u64; MAP_WORDS]);

impl BlockMap {
    pub fn insert(&mut self, block: usize) {
        self.0[block / 64] |= 1 << (block % 64);
    }

    pub fn contains(&self, block: usize) -> bool {
        self.0[block / 64] & (1 << (block % 64)) != 0
    }

    pub fn is_empty(&self) -> bool {
        self.0 == [0; MAP_WORDS]
    }

    pub fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub fn last(&self) -> Option<usize> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some(word * 64 + 63 - self.0[word].leading_zeros() as usize)
    }

    /// The longest stretches of blocks that are in it, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = (next..CHUNK_BLOCKS).find(|block| self.contains(*block))?;
            let end = (start..CHUNK_BLOCKS).find(|block| !self.contains(*block)).unwrap_or(CHUNK_BLOCKS);
            next = end;
            Some(start..end)
        })
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
