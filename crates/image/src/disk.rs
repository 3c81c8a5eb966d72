//! How images lie on disk. What has a name is whole: it is written below `incoming`, flushed, renamed, and then the directory is flushed.
//!
//! ```text
//! lock               held while a store is open
//! blobs/HEX          manifests and configurations, by the digest of their bytes
//! layers/HEX/root    a layer, by the digest of its uncompressed archive: what overlayfs stacks
//! layers/HEX/layer.json
//! images/HEX.json    which layers an image has, by the digest of its manifest
//! names.json         which image has which name
//! incoming/          what has no name yet, or no more; swept at the start
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::decompress::LayerReader;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{Compression, DOCUMENT_BYTES_MAX};
use crate::unpack::{Limits, unpack};

/// Of a record, and of the file of names.
const RECORD_BYTES_MAX: u64 = 64 << 20;
const VERSION: u32 = 1;

/// What a layer is, beside its directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub version: u32,
    pub entries: u64,
    pub bytes: u64,
    /// Device nodes that were left out.
    pub devices: u64,
}

/// A layer that is about to be unpacked: what it must turn out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WantedLayer {
    pub diff_id: Digest,
    pub blob: Digest,
    pub blob_bytes: u64,
    pub compression: Compression,
}

#[derive(Debug)]
pub(crate) struct Disk {
    root: PathBuf,
    counter: AtomicU64,
    _lock: File,
}

/// Something below `incoming`, removed when dropped; what was renamed is not there any more.
#[derive(Debug)]
pub(crate) struct Incoming(pub PathBuf);

impl Drop for Incoming {
    fn drop(&mut self) {
        // What stays in spite of this is swept at the next start.
        let _ = match fs::symlink_metadata(&self.0) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&self.0),
            Ok(_) => fs::remove_file(&self.0),
            Err(error) => Err(error),
        };
    }
}

impl Disk {
    /// Makes what is missing and sweeps what an earlier process left half done.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let failed = || ImageError::io(format!("open the images in {}", root.display()));
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(root).map_err(failed())?;
        // Below lie files with the set-user-id bit and owners that mean somebody else on this host.
        rustix::fs::chmod(root, Mode::RWXU).map_err(io::Error::from).map_err(failed())?;
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(root.join("lock"));
        let lock = lock.map_err(failed())?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(ImageError::Locked { directory: root.to_owned() }),
            outcome => outcome.map_err(io::Error::from).map_err(failed())?,
        }
        for name in ["blobs", "layers", "images", "incoming"] {
            make(&root.join(name)).map_err(failed())?;
        }
        let disk = Self { root: root.to_owned(), counter: AtomicU64::new(0), _lock: lock };
        for entry in fs::read_dir(disk.at("incoming")).map_err(failed())? {
            let leftover = Incoming(entry.map_err(failed())?.path());
            drop(leftover);
        }
        sync_directory(root).map_err(failed())?;
        Ok(disk)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn incoming(&self) -> Incoming {
        Incoming(self.at("incoming").join(self.counter.fetch_add(1, Ordering::Relaxed).to_string()))
    }

    /// Writes a file and its name; whoever had the name before is replaced.
    fn write(&self, directory: &str, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        let write = || {
            let incoming = self.incoming();
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&incoming.0)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            let directory = self.root.join(directory);
            fs::rename(&incoming.0, directory.join(name))?;
            sync_directory(&directory)
        };
        write().map_err(ImageError::io(format!("write {name} of the images")))
    }

    fn read(&self, path: &Path, most: u64) -> Result<Option<Vec<u8>>, ImageError> {
        let read = || {
            let file = match File::open(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
                outcome => outcome?,
            };
            let mut bytes = Vec::new();
            file.take(most).read_to_end(&mut bytes)?;
            Ok(Some(bytes))
        };
        read().map_err(|error: io::Error| ImageError::io(format!("read {}", path.display()))(error))
    }

    pub fn write_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        self.write("blobs", &digest.hex(), bytes)
    }

    /// A manifest or configuration; `None` where it is not there or damaged.
    pub fn read_blob(&self, digest: &Digest) -> Result<Option<Vec<u8>>, ImageError> {
        let bytes = self.read(&self.at("blobs").join(digest.hex()), DOCUMENT_BYTES_MAX + 1)?;
        Ok(bytes.filter(|bytes| Digest::of(bytes) == *digest))
    }

    pub fn write_image(&self, digest: &Digest, record: &impl Serialize) -> Result<(), ImageError> {
        self.write("images", &format!("{}.json", digest.hex()), &json(record))
    }

    /// The records of images with their digests. `None` stands for one that cannot be read.
    pub fn read_images<T: for<'a> Deserialize<'a>>(&self) -> Result<Vec<(Digest, Option<T>)>, ImageError> {
        let mut records = Vec::new();
        for name in self.names_in("images")? {
            // What is not named like a record is none of ours.
            let Some(Ok(digest)) = name.strip_suffix(".json").map(Digest::from_hex) else { continue };
            let bytes = self.read(&self.at("images").join(&name), RECORD_BYTES_MAX)?;
            records.push((digest, bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok())));
        }
        Ok(records)
    }

    pub fn write_names(&self, names: &impl Serialize) -> Result<(), ImageError> {
        self.write("", "names.json", &json(names))
    }

    pub fn read_names<T: for<'a> Deserialize<'a> + Default>(&self) -> Result<T, ImageError> {
        let path = self.at("names.json");
        let Some(bytes) = self.read(&path, RECORD_BYTES_MAX)? else { return Ok(T::default()) };
        serde_json::from_slice(&bytes).map_err(|error| {
            let problem = format!("it is damaged ({error}); move it away to start without names of images");
            ImageError::Io { doing: format!("read {}", path.display()), source: io::Error::other(problem) }
        })
    }

    /// The directory that overlayfs stacks.
    pub fn layer(&self, diff_id: &Digest) -> PathBuf {
        self.at("layers").join(diff_id.hex()).join("root")
    }

    /// `None` where the layer is not here.
    pub fn layer_record(&self, diff_id: &Digest) -> Result<Option<LayerRecord>, ImageError> {
        let path = self.at("layers").join(diff_id.hex()).join("layer.json");
        let bytes = self.read(&path, RECORD_BYTES_MAX)?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Unpacks a layer, verifies both of its digests, and gives it its name.
    pub fn unpack(
        &self,
        wanted: &WantedLayer,
        reader: impl BufRead,
        limits: Limits,
    ) -> Result<LayerRecord, ImageError> {
        let layer = wanted.blob;
        let failed = || ImageError::io(format!("unpack the layer {layer}"));
        let incoming = self.incoming();
        let root = incoming.0.join("root");
        DirBuilder::new().mode(0o700).create(&incoming.0).map_err(failed())?;
        DirBuilder::new().mode(0o700).create(&root).map_err(failed())?;
        let root = File::open(&root).map_err(failed())?;
        // What limits and sources say is in errors of I/O; the rest is damage.
        let broken = |error: io::Error| match error.downcast::<ImageError>() {
            Ok(error) => error,
            Err(error) => ImageError::InvalidLayer {
                layer,
                entry: "its end".into(),
                problem: format!("it cannot be decompressed: {error}"),
            },
        };
        let reader = LayerReader::new(reader, wanted.compression, limits, layer).map_err(broken)?;
        let reader = BufReader::with_capacity(64 << 10, reader);
        let (unpacked, reader) = unpack(reader, root.as_fd(), &limits, &layer)?;
        let whole = reader.into_inner().finish().map_err(broken)?;
        let what = format!("the layer {layer}");
        let differs = |what, expected, found| Err(ImageError::DigestMismatch { what, expected, found });
        if whole.blob != wanted.blob {
            return differs(what, wanted.blob, whole.blob);
        }
        if whole.blob_bytes != wanted.blob_bytes {
            let problem = format!("its size is {} bytes, not {} as announced", whole.blob_bytes, wanted.blob_bytes);
            return Err(ImageError::InvalidLayer { layer, entry: "its end".into(), problem });
        }
        if whole.diff_id != wanted.diff_id {
            return differs(format!("the content of {what}"), wanted.diff_id, whole.diff_id);
        }
        let record = LayerRecord {
            version: VERSION,
            entries: unpacked.entries,
            bytes: unpacked.bytes,
            devices: unpacked.devices,
        };
        fs::write(incoming.0.join("layer.json"), json(&record)).map_err(failed())?;
        // One flush for all of its files.
        rustix::fs::syncfs(&root).map_err(io::Error::from).map_err(failed())?;
        let layers = self.at("layers");
        let name = layers.join(wanted.diff_id.hex());
        if let Some(same) = self.layer_record(&wanted.diff_id)? {
            // Another pull that was about to end was faster.
            return Ok(same);
        }
        // What has the name without being whole is damaged.
        let damaged = self.incoming();
        match fs::rename(&name, &damaged.0) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            outcome => outcome.map_err(failed())?,
        }
        fs::rename(&incoming.0, name).map_err(failed())?;
        sync_directory(&layers).map_err(failed())?;
        Ok(record)
    }

    /// Takes the names of blobs and layers away that are not kept, and of the records of these images; gives what is then to be dropped,
    /// which takes its time, and how many layers and bytes of files go with it.
    pub fn forget(
        &self,
        images: &[Digest],
        keeps_blob: impl Fn(&Digest) -> bool,
        keeps_layer: impl Fn(&Digest) -> bool,
    ) -> Result<(Vec<Incoming>, usize, u64), ImageError> {
        let failed = || ImageError::io("remove images");
        for digest in images {
            match fs::remove_file(self.at("images").join(format!("{}.json", digest.hex()))) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                outcome => outcome.map_err(failed())?,
            }
        }
        // No record may be on disk that names a layer which is gone.
        sync_directory(&self.at("images")).map_err(failed())?;
        for name in self.names_in("blobs")? {
            if Digest::from_hex(&name).is_ok_and(|digest| !keeps_blob(&digest)) {
                fs::remove_file(self.at("blobs").join(name)).map_err(failed())?;
            }
        }
        let (mut dropped, mut bytes) = (Vec::new(), 0);
        for name in self.names_in("layers")? {
            let Ok(digest) = Digest::from_hex(&name) else { continue };
            if !keeps_layer(&digest) {
                bytes += self.layer_record(&digest)?.map_or(0, |record| record.bytes);
                let incoming = self.incoming();
                fs::rename(self.at("layers").join(name), &incoming.0).map_err(failed())?;
                dropped.push(incoming);
            }
        }
        sync_directory(&self.at("layers")).map_err(failed())?;
        let layers = dropped.len();
        Ok((dropped, layers, bytes))
    }

    fn names_in(&self, directory: &str) -> Result<Vec<String>, ImageError> {
        let list = || -> io::Result<Vec<String>> {
            let entries = fs::read_dir(self.at(directory))?;
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        };
        list().map_err(ImageError::io(format!("list {directory} of the images")))
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(value).expect("records are maps of strings and numbers")
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
