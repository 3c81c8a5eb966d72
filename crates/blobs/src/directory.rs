//! Blobs as files: `chunks/<digest>`, `images/<digest>` for manifests, and `incoming/` for what has no name yet.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nagaya_engine::model::Limit;
use nagaya_engine::ports::BlobError;
use rustix::fs::Advice;
use rustix::io::Errno;

use crate::digest::Digest;
use crate::manifest::MANIFEST_BYTES_MAX;
use crate::{CHUNK_BYTES, Manifest};

/// Bytes that [`Directory::read_chunk`] reads at once.
pub(crate) const PIECE_BYTES: usize = 128 << 10;

/// What a blob is; the names are those of directories, in a bucket too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Chunk,
    Manifest,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chunk => "chunks",
            Self::Manifest => "images",
        }
    }

    pub const fn bytes_max(self) -> u64 {
        match self {
            Self::Chunk => CHUNK_BYTES,
            Self::Manifest => MANIFEST_BYTES_MAX,
        }
    }
}

/// The directory of one server's blobs.
#[derive(Debug)]
pub(crate) struct Directory {
    root: PathBuf,
    /// Files of this directory can share their blocks with others on the same file system.
    pub shares_blocks: bool,
    incoming: AtomicU64,
}

/// A blob that is written but has no name yet. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub file: File,
    path: PathBuf,
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // It is gone already when it got its name; what stays in spite of this is swept at the next start.
        let _ = fs::remove_file(&self.path);
    }
}

impl Directory {
    /// Makes what is missing and sweeps what an earlier process left half done.
    pub fn open(root: &Path) -> Result<Self, BlobError> {
        let make = |path: &Path| fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        let incoming = root.join("incoming");
        for path in [root, &root.join("chunks"), &root.join("images"), &incoming] {
            make(path).map_err(|error| failed("make the directory of blobs", &error))?;
        }
        let sync = |path: &Path| File::open(path).and_then(|directory| directory.sync_all());
        sync(root)
            .and_then(|()| root.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync))
            .map_err(|error| failed("make the directory of blobs", &error))?;
        let sweep = || {
            for entry in fs::read_dir(&incoming)? {
                fs::remove_file(entry?.path())?;
            }
            Ok(())
        };
        sweep().map_err(|error: io::Error| failed("remove unfinished blobs", &error))?;
        let mut directory = Self { root: root.to_path_buf(), shares_blocks: false, incoming: AtomicU64::new(0) };
        directory.shares_blocks = directory.try_to_share().map_err(|error| failed("write a blob", &error))?;
        Ok(directory)
    }

    /// Who this server is, for places that several could write to: made once, kept here.
    pub fn owner(&self) -> Result<String, BlobError> {
        let path = self.root.join("owner");
        let read_or_make = || match fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let mut random = [0; 32];
                rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
                let owner = Digest::from_bytes(random).to_string();
                let mut incoming = self.incoming()?;
                incoming.file.write_all(owner.as_bytes())?;
                incoming.file.sync_all()?;
                fs::rename(&incoming.path, &path)?;
                File::open(&self.root)?.sync_all()?;
                Ok(owner)
            }
            outcome => outcome,
        };
        read_or_make().map_err(|error| failed("read the name of the blobs' owner", &error))
    }

    fn try_to_share(&self) -> io::Result<bool> {
        let (mut one, other) = (self.incoming()?, self.incoming()?);
        one.file.write_all(&[1; 4096])?;
        Ok(rustix::fs::ioctl_ficlone(&other.file, &one.file).is_ok())
    }

    pub fn path(&self, kind: Kind, digest: Digest) -> PathBuf {
        self.root.join(kind.name()).join(digest.to_string())
    }

    /// A new file that becomes a blob by [`Directory::name`].
    pub fn incoming(&self) -> io::Result<Incoming> {
        let number = self.incoming.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join("incoming").join(number.to_string());
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Incoming { file, path })
    }

    /// Gives a blob its name, replacing what had it, when its content is on the disk; the name is there too when
    /// [`Directory::sync_names`] returns.
    pub fn name(&self, incoming: &Incoming, kind: Kind, digest: Digest) -> io::Result<()> {
        incoming.file.sync_all()?;
        fs::rename(&incoming.path, self.path(kind, digest))
    }

    pub fn sync_names(&self, kind: Kind) -> io::Result<()> {
        File::open(self.root.join(kind.name()))?.sync_all()
    }

    /// Writes a blob and its name to the disk.
    pub fn put(&self, kind: Kind, digest: Digest, bytes: &[u8]) -> Result<(), BlobError> {
        let write = || {
            let mut incoming = self.incoming()?;
            incoming.file.write_all(bytes)?;
            self.name(&incoming, kind, digest)?;
            self.sync_names(kind)
        };
        write().map_err(|error| failed("write a blob", &error))
    }

    /// Whether exactly these bytes lie under this name.
    pub fn holds(&self, kind: Kind, digest: Digest, bytes: &[u8], scratch: &mut Vec<u8>) -> io::Result<bool> {
        let file = match File::open(self.path(kind, digest)) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        scratch.clear();
        match file.take(bytes.len() as u64 + 1).read_to_end(scratch) {
            Ok(_) => Ok(scratch == bytes),
            // A blob on bad sectors is written again like one that is not there.
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads and verifies a blob.
    pub fn read(&self, kind: Kind, digest: Digest, bytes: &mut Vec<u8>) -> Result<File, BlobError> {
        let name = || digest.to_string();
        let mut file = File::open(self.path(kind, digest)).map_err(|error| match error.kind() {
            ErrorKind::NotFound => BlobError::Missing(name()),
            _ => failed("read a blob", &error),
        })?;
        bytes.clear();
        // All of it in one piece, not in ever larger ones.
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        bytes.reserve(length.min(kind.bytes_max()) as usize + 1);
        let read = (&mut file).take(kind.bytes_max() + 1).read_to_end(bytes);
        match read {
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Err(BlobError::Corrupt(name())),
            Err(error) => Err(failed("read a blob", &error)),
            Ok(length) if length as u64 > kind.bytes_max() => Err(BlobError::Corrupt(name())),
            Ok(_) if Digest::of(bytes) != digest => Err(BlobError::Corrupt(name())),
            Ok(_) => Ok(file),
        }
    }

    /// Reads a chunk's blob of this length and verifies it; `take` gets its bytes in order, in pieces that stay in the processor's
    /// cache until they are used. They are to be believed only when all of them were the blob's.
    pub fn read_chunk(
        &self,
        digest: Digest,
        length: u64,
        piece: &mut [u8],
        mut take: impl FnMut(&File, &[u8]) -> Result<(), BlobError>,
    ) -> Result<(), BlobError> {
        let corrupt = || BlobError::Corrupt(digest.to_string());
        let mut file = File::open(self.path(Kind::Chunk, digest)).map_err(|error| match error.kind() {
            ErrorKind::NotFound => BlobError::Missing(digest.to_string()),
            _ => failed("read a blob", &error),
        })?;
        let metadata = file.metadata().map_err(|error| failed("read a blob", &error))?;
        if metadata.len() != length {
            return Err(corrupt());
        }
        let mut hasher = blake3::Hasher::new();
        let mut left = length;
        while left > 0 {
            let part = &mut piece[..left.min(PIECE_BYTES as u64) as usize];
            file.read_exact(part).map_err(|error| match error.raw_os_error() {
                Some(number) if number != Errno::IO.raw_os_error() => failed("read a blob", &error),
                _ => corrupt(),
            })?;
            hasher.update(part);
            take(&file, part)?;
            left -= part.len() as u64;
        }
        match Digest::from_bytes(*hasher.finalize().as_bytes()) == digest {
            true => Ok(()),
            false => Err(corrupt()),
        }
    }

    /// Removes all blobs of a kind but these; returns the bytes freed.
    pub fn remove_others(&self, kind: Kind, kept: &HashSet<Digest>) -> Result<u64, BlobError> {
        let remove = || {
            let mut freed = 0;
            for entry in fs::read_dir(self.root.join(kind.name()))? {
                let entry = entry?;
                // What is not named like a blob is none of ours.
                let Some(Ok(digest)) = entry.file_name().to_str().map(str::parse::<Digest>) else { continue };
                if !kept.contains(&digest) {
                    let length = entry.metadata()?.len();
                    fs::remove_file(entry.path())?;
                    freed += length;
                }
            }
            Ok(freed)
        };
        remove().map_err(|error| failed("remove a blob", &error))
    }
}

/// The manifests of every image in a directory of blobs, with their digests. One that is damaged is left out, and told of in
/// the log.
pub fn manifests(root: &Path) -> Result<Vec<(String, Manifest)>, BlobError> {
    let directory = Directory { root: root.to_path_buf(), shares_blocks: false, incoming: AtomicU64::new(0) };
    let entries = match fs::read_dir(root.join(Kind::Manifest.name())) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| failed("list the images", &error))?,
    };
    let (mut found, mut bytes) = (Vec::new(), Vec::new());
    for entry in entries.flatten() {
        let Some(Ok(digest)) = entry.file_name().to_str().map(str::parse::<Digest>) else { continue };
        let read = directory.read(Kind::Manifest, digest, &mut bytes);
        match read.and_then(|_| parse_manifest(digest, &bytes)) {
            Ok(manifest) => found.push((digest.to_string(), manifest)),
            Err(error) => tracing::warn!(%error, "an image cannot be used"),
        }
    }
    Ok(found)
}

/// Lets the disk begin to write what was written to a file, so that waiting for it later is short.
pub(crate) fn begin_to_flush(file: &File, offset: u64, length: u64) {
    // Advice that is not taken costs time only.
    let _ = rustix::fs::fadvise(file, offset, NonZeroU64::new(length), Advice::DontNeed);
}

/// A manifest whose bytes are what their name says can still be of a version that is not known here.
pub(crate) fn parse_manifest(digest: Digest, bytes: &[u8]) -> Result<Manifest, BlobError> {
    Manifest::parse(bytes).map_err(|error| BlobError::Failed(format!("blob {digest}: {error}")))
}

pub(crate) fn failed(action: &str, error: &io::Error) -> BlobError {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSPC | Errno::DQUOT) => BlobError::Exhausted(Limit::HostDisk),
        Some(Errno::MFILE | Errno::NFILE) => BlobError::Exhausted(Limit::ServerOpenFiles),
        _ => BlobError::Failed(format!("{action}: {error}")),
    }
}
