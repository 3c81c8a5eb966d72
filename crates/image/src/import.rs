//! From files to this host: OCI layouts, archives of them, and what `docker save` writes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::bufread::MultiGzDecoder;
use serde::Deserialize;

use crate::archive::{Archive, ArchiveError, Kind};
use crate::digest::{Digest, Hasher};
use crate::disk::Incoming;
use crate::error::ImageError;
use crate::manifest::{
    Compression, DOCUMENT_BYTES_MAX, Descriptor, Document, LAYERS_MAX, Manifest, OCI_CONFIG, OCI_MANIFEST, PLAIN_LAYER,
};
use crate::pull::{Described, LayerState, LayerTask, Watcher};
use crate::reference::Reference;
use crate::store::{Image, ImageStore, blocking};

/// Files of one archive, and images of one import.
const FILES_MAX: usize = 10_000;
const IMAGES_MAX: usize = 1000;
const LINKS_MAX: usize = 5;
const INDEX_DEPTH_MAX: usize = 3;

/// Where blobs lie.
struct Files {
    place: Place,
    /// For errors.
    what: String,
}

enum Place {
    /// A layout.
    Directory(PathBuf),
    /// Where in a file each file of an archive is.
    Archive { file: File, index: HashMap<String, Member>, _spooled: Option<Incoming> },
}

enum Member {
    Content {
        offset: u64,
        size: u64,
    },
    /// `docker save` once wrote links for layers that are there already.
    Link(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// An image of an import, and where its layers are.
struct Found {
    described: Described,
    names: Vec<Reference>,
    /// Of each layer, by the digest of its blob.
    layers: HashMap<Digest, String>,
}

impl ImageStore {
    /// Takes over all images for this platform of an OCI layout (a directory), of an archive of one, or of what `docker save` wrote; archives
    /// may be compressed with gzip or zstd. `name` is for an import of one image; without it, images have the names that are written beside them, or none.
    pub async fn import(
        &self,
        path: &Path,
        name: Option<Reference>,
        watcher: Watcher,
    ) -> Result<Vec<Image>, ImageError> {
        let (store, path) = (self.clone(), path.to_owned());
        let files = blocking(move || {
            let what = path.display().to_string();
            let failed = || ImageError::io(format!("open {what}"));
            if std::fs::metadata(&path).map_err(failed())?.is_dir() {
                return Ok(Files { place: Place::Directory(path), what });
            }
            // What is no regular file is never waited for.
            let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
            let file = File::options().read(true).custom_flags(flags).open(&path).map_err(failed())?;
            if !file.metadata().map_err(failed())?.is_file() {
                return Err(ImageError::invalid_image(what, "it is neither a file nor a directory"));
            }
            let mut magic = [0; 4];
            let read = file.read_at(&mut magic, 0).map_err(failed())?;
            match compression(&magic[..read]) {
                Compression::None => Files::index(file, None, what),
                _ => store.spool(file, what),
            }
        })
        .await?;
        self.import_files(files, name, watcher).await
    }

    /// The same for an archive that is not on disk, or that cannot be gone back in; it is written down first.
    pub async fn import_from(
        &self,
        reader: impl Read + Send + 'static,
        name: Option<Reference>,
        watcher: Watcher,
    ) -> Result<Vec<Image>, ImageError> {
        let store = self.clone();
        let files = blocking(move || store.spool(reader, "the archive".into())).await?;
        self.import_files(files, name, watcher).await
    }

    /// Writes an archive down, decompressed.
    fn spool(&self, reader: impl Read, what: String) -> Result<Files, ImageError> {
        let failed = || ImageError::io(format!("copy {what}"));
        let most = self.inner.config.limits().bytes_max;
        let mut reader = BufReader::with_capacity(128 << 10, reader);
        let reader: Box<dyn Read + '_> = match compression(reader.fill_buf().map_err(failed())?) {
            Compression::None => Box::new(reader),
            Compression::Gzip => Box::new(MultiGzDecoder::new(reader)),
            Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(reader).map_err(failed())?),
        };
        let incoming = self.inner.disk.incoming();
        let mut file =
            File::options().read(true).write(true).create_new(true).mode(0o600).open(&incoming.0).map_err(failed())?;
        let copied = io::copy(&mut reader.take(most + 1), &mut file).map_err(|error| match error.raw_os_error() {
            Some(_) => failed()(error),
            None => ImageError::invalid_image(&what, format!("it cannot be decompressed: {error}")),
        })?;
        if copied > most {
            let limit = format!("{} MiB", most >> 20);
            return Err(ImageError::TooLarge { what, limit, setting: "images.layer_mb_max" });
        }
        file.seek(SeekFrom::Start(0)).map_err(failed())?;
        Files::index(file, Some(incoming), what)
    }

    async fn import_files(
        &self,
        files: Files,
        name: Option<Reference>,
        watcher: Watcher,
    ) -> Result<Vec<Image>, ImageError> {
        let (store, files) = (self.clone(), Arc::new(files));
        let described = {
            let files = files.clone();
            blocking(move || files.images(&store)).await?
        };
        if let (Some(_), true) = (&name, described.len() > 1) {
            let problem = format!("it has {} images for this platform, and one name was given", described.len());
            return Err(ImageError::invalid_image(&files.what, problem));
        }
        let mut images = Vec::new();
        for found in described {
            let names = name.clone().map_or(found.names, |name| vec![name]);
            let layers = Arc::new(found.layers);
            let fetch = |task: LayerTask| {
                let (store, files, layers) = (self.clone(), files.clone(), layers.clone());
                blocking(move || {
                    task.tell(0, LayerState::Fetching);
                    let path = layers.get(&task.wanted.blob).map(String::as_str).unwrap_or_default();
                    let reader = BufReader::with_capacity(128 << 10, files.open(path)?);
                    store.inner.disk.unpack(&task.wanted, reader, store.inner.config.limits())
                })
            };
            images.push(self.install(found.described, names, watcher.clone(), fetch).await?);
        }
        Ok(images)
    }
}

/// By the first bytes.
fn compression(magic: &[u8]) -> Compression {
    match magic {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

impl Files {
    /// Notes where everything in an archive is.
    fn index(file: File, spooled: Option<Incoming>, what: String) -> Result<Self, ImageError> {
        let mut index = HashMap::new();
        let mut archive = Archive::new(Counting { reader: BufReader::with_capacity(128 << 10, &file), bytes: 0 });
        loop {
            let entry = match archive.next() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(ArchiveError::Invalid(problem)) => return Err(ImageError::invalid_image(what, problem)),
                Err(ArchiveError::Read(error)) => return Err(ImageError::io(format!("read {what}"))(error)),
            };
            if index.len() == FILES_MAX {
                return Err(ImageError::invalid_image(what, format!("it has more than {FILES_MAX} files")));
            }
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let path = text(&entry.path).trim_start_matches("./").to_owned();
            match entry.kind {
                Kind::File => {
                    let offset = archive.reader().bytes;
                    index.insert(path, Member::Content { offset, size: entry.size });
                }
                Kind::SymbolicLink | Kind::HardLink => {
                    let target = text(&entry.link);
                    let from = if entry.kind == Kind::SymbolicLink { path.as_str() } else { "" };
                    if let Some(target) = relative(from, &target) {
                        index.insert(path, Member::Link(target));
                    }
                }
                _ => {}
            }
        }
        Ok(Self { place: Place::Archive { file, index, _spooled: spooled }, what })
    }

    fn find(&self, path: &str) -> Result<Option<Box<dyn Read + '_>>, ImageError> {
        let failed = || ImageError::io(format!("read {path} of {}", self.what));
        match &self.place {
            Place::Directory(directory) => {
                let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
                match File::options().read(true).custom_flags(flags).open(directory.join(path)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(error) => Err(failed()(error)),
                    Ok(file) => match file.metadata().map_err(failed())?.is_file() {
                        true => Ok(Some(Box::new(file))),
                        false => Err(ImageError::invalid_image(&self.what, format!("{path} is no file"))),
                    },
                }
            }
            Place::Archive { file, index, .. } => {
                let mut path = path;
                for _ in 0..LINKS_MAX {
                    match index.get(path) {
                        None => return Ok(None),
                        Some(Member::Link(target)) => path = target,
                        Some(Member::Content { offset, size }) => {
                            return Ok(Some(Box::new(Section { file, at: *offset, end: offset + size })));
                        }
                    }
                }
                Ok(None)
            }
        }
    }

    fn open(&self, path: &str) -> Result<Box<dyn Read + '_>, ImageError> {
        self.find(path)?.ok_or_else(|| ImageError::invalid_image(&self.what, format!("it has no {path}")))
    }

    /// A manifest or such.
    fn document(&self, path: &str) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let read = self.open(path)?.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes);
        let read = read.map_err(ImageError::io(format!("read {path} of {}", self.what)))?;
        match read as u64 > DOCUMENT_BYTES_MAX {
            true => {
                Err(ImageError::invalid_image(&self.what, format!("{path} has more than {DOCUMENT_BYTES_MAX} bytes")))
            }
            false => Ok(bytes),
        }
    }

    fn blob(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let bytes = self.document(&blob_path(digest))?;
        match Digest::of(&bytes) {
            found if found == *digest => Ok(bytes),
            found => {
                let what = format!("{} of {}", blob_path(digest), self.what);
                Err(ImageError::DigestMismatch { what, expected: *digest, found })
            }
        }
    }

    fn images(&self, store: &ImageStore) -> Result<Vec<Found>, ImageError> {
        let found = match self.find("index.json")? {
            Some(_) => self.layout_images(store)?,
            None if self.find("manifest.json")?.is_some() => self.saved_images(store)?,
            None => {
                let problem = "it has neither the index.json of an OCI layout nor the manifest.json of docker save";
                return Err(ImageError::invalid_image(&self.what, problem));
            }
        };
        match found.is_empty() {
            true => Err(ImageError::invalid_image(&self.what, "it has no image")),
            false => Ok(found),
        }
    }

    fn layout_images(&self, store: &ImageStore) -> Result<Vec<Found>, ImageError> {
        let bytes = self.document("index.json")?;
        let Document::Index(index) = Document::parse(&bytes, "", &self.what)? else {
            return Err(ImageError::invalid_image(&self.what, "its index.json is no index"));
        };
        let platform = &store.inner.platform;
        // Each entry of the outermost index is an image of its own, unless it is for another platform.
        let ours: Vec<_> = index
            .manifests
            .iter()
            .filter(|descriptor| descriptor.platform.as_ref().is_none_or(|offered| platform.runs(offered)))
            .take(IMAGES_MAX)
            .collect();
        if ours.is_empty() {
            return Err(index
                .choose(platform, &self.what)
                .err()
                .unwrap_or_else(|| ImageError::invalid_image(&self.what, "it has no image")));
        }
        let mut images: Vec<Found> = Vec::new();
        for outer in ours {
            let mut name = name_of(outer);
            let (mut chosen, mut depth) = (outer.clone(), 0);
            let (bytes, manifest) = loop {
                let bytes = self.blob(&chosen.digest)?;
                match Document::parse(&bytes, &chosen.media_type, &self.what)? {
                    Document::Manifest(manifest) => break (bytes, manifest),
                    Document::Index(_) if depth == INDEX_DEPTH_MAX => {
                        let problem = format!("it has more than {INDEX_DEPTH_MAX} indexes within each other");
                        return Err(ImageError::invalid_image(&self.what, problem));
                    }
                    Document::Index(inner) => {
                        chosen = inner.choose(platform, &self.what)?.clone();
                        name = name.or_else(|| name_of(&chosen));
                        depth += 1;
                    }
                }
            };
            let config = self.blob(&manifest.config.digest)?;
            let layers = manifest.layers.iter().map(|(layer, _)| (layer.digest, blob_path(&layer.digest))).collect();
            let digest = Digest::of(&bytes);
            let described = Described::new(bytes, manifest, config, &self.what)?;
            described.runs_on(platform, &self.what)?;
            // One image under several names has several entries.
            match images.iter_mut().find(|found| Digest::of(&found.described.manifest_bytes) == digest) {
                Some(found) => found.names.extend(name),
                None => images.push(Found { described, names: name.into_iter().collect(), layers }),
            }
        }
        Ok(images)
    }

    /// What older Dockers wrote has no manifest in the sense of registries: one is made of it, always the same of the same.
    fn saved_images(&self, store: &ImageStore) -> Result<Vec<Found>, ImageError> {
        let bytes = self.document("manifest.json")?;
        let saved: Vec<Saved> = serde_json::from_slice(&bytes)
            .map_err(|error| ImageError::invalid_image(&self.what, format!("manifest.json: {error}")))?;
        let mut images = Vec::new();
        for image in saved.into_iter().take(IMAGES_MAX) {
            let config_bytes = self.document(&image.config)?;
            if image.layers.len() > LAYERS_MAX {
                let problem = format!("it has {} layers, and {LAYERS_MAX} are allowed", image.layers.len());
                return Err(ImageError::invalid_image(&self.what, problem));
            }
            let mut layers = Vec::new();
            let mut paths = HashMap::new();
            for path in image.layers {
                let (digest, size) =
                    measure(self.open(&path)?).map_err(ImageError::io(format!("read {path} of {}", self.what)))?;
                let media_type = PLAIN_LAYER.to_owned();
                layers.push(Descriptor { media_type, digest, size, platform: None, annotations: None });
                paths.insert(digest, path);
            }
            let size = config_bytes.len() as u64;
            let (media_type, digest) = (OCI_CONFIG.to_owned(), Digest::of(&config_bytes));
            let config = Descriptor { media_type, digest, size, platform: None, annotations: None };
            let manifest_bytes = Manifest::to_bytes(&config, &layers);
            let Document::Manifest(manifest) = Document::parse(&manifest_bytes, OCI_MANIFEST, &self.what)? else {
                return Err(ImageError::invalid_image(&self.what, "its manifest.json has no layers"));
            };
            let described = Described::new(manifest_bytes, manifest, config_bytes, &self.what)?;
            described.runs_on(&store.inner.platform, &self.what)?;
            let names = image.repo_tags.unwrap_or_default().iter().filter_map(|name| name.parse().ok()).collect();
            images.push(Found { described, names, layers: paths });
        }
        Ok(images)
    }
}

/// What an entry of a layout says that it is called. A tag alone, as the specification has it, names no repository.
fn name_of(descriptor: &Descriptor) -> Option<Reference> {
    let annotation = |name: &str| descriptor.annotations.as_ref()?.get(name);
    let full = annotation("io.containerd.image.name").and_then(|name| name.parse().ok());
    let short = || annotation("org.opencontainers.image.ref.name").filter(|name| name.contains([':', '/']));
    full.or_else(|| short()?.parse().ok())
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Where a link leads within an archive; `None` where it leaves that.
fn relative(from: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn measure(mut reader: impl Read) -> io::Result<(Digest, u64)> {
    let (mut hasher, mut size, mut buffer) = (Hasher::default(), 0, vec![0; 128 << 10]);
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok((hasher.finish(), size)),
            read => {
                hasher.update(&buffer[..read]);
                size += read as u64;
            }
        }
    }
}

struct Counting<R> {
    reader: R,
    bytes: u64,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.bytes += read as u64;
        Ok(read)
    }
}

/// A part of a file, whoever else reads others of it.
struct Section<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
