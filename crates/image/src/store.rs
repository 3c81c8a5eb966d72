//! The images of this host: what they are called, what they are made of, and what keeps them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::digest::Digest;
use crate::disk::Disk;
use crate::error::ImageError;
use crate::image_config::ImageConfig;
use crate::manifest::Platform;
use crate::reference::Reference;
use crate::registry::Client;
use crate::user::{self, User, resolve_user};

const VERSION: u32 = 1;
/// Digits of a digest that stand for all of it.
const SHORT_DIGITS_MIN: usize = 12;

/// An image that is wholly on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Of its manifest.
    pub digest: Digest,
    /// Sorted; none when its names have moved on to other images.
    pub names: Vec<Reference>,
    pub config: ImageConfig,
    /// Of its configuration, which Docker calls the id of the image.
    pub config_digest: Digest,
    /// The lowest first.
    pub layers: Vec<ImageLayer>,
    /// When it came here, in seconds since 1970.
    pub added_unix_s: u64,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// Of its uncompressed archive, by which it is kept.
    pub diff_id: Digest,
    /// Of what its registry has.
    pub blob: Digest,
    /// As its registry has it.
    pub blob_bytes: u64,
    /// Of its files, unpacked.
    pub bytes: u64,
    pub entries: u64,
    /// Device nodes that were left out.
    pub devices: u64,
}

/// What [`ImageStore::gc`] removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Freed {
    pub images: usize,
    pub layers: usize,
    /// Of files in those layers.
    pub bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    config: Digest,
    layers: Vec<ImageLayer>,
    added_unix_s: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Without names.
    images: BTreeMap<Digest, Image>,
    names: BTreeMap<Reference, Digest>,
    /// How many hold an image.
    leases: HashMap<Digest, usize>,
    /// How many pulls need a layer that no image has yet.
    pins: HashMap<Digest, usize>,
}

pub(crate) struct Inner {
    pub disk: Disk,
    pub config: Config,
    pub platform: Platform,
    pub client: Client,
    state: Mutex<State>,
    /// Held by whoever changes what has a name on disk.
    changes: Mutex<()>,
    /// Layers that are unpacked now: one does it, and others wait.
    unpacking: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

/// The images of one directory. Clones are the same store.
#[derive(Clone)]
pub struct ImageStore {
    pub(crate) inner: Arc<Inner>,
}

/// Keeps an image from being removed while it lives.
pub struct Lease {
    inner: Arc<Inner>,
    digest: Digest,
}

impl Lease {
    pub fn digest(&self) -> &Digest {
        &self.digest
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        release(&mut self.inner.state().leases, &self.digest);
    }
}

/// Keeps layers from being removed that are about to become part of an image.
pub(crate) struct Pins {
    inner: Arc<Inner>,
    layers: HashSet<Digest>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        for layer in &self.layers {
            release(&mut state.pins, layer);
        }
    }
}

fn release(counts: &mut HashMap<Digest, usize>, digest: &Digest) {
    if let Some(count) = counts.get_mut(digest) {
        *count -= 1;
        if *count == 0 {
            counts.remove(digest);
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl ImageStore {
    /// Opens a directory, which is made where it is missing; blocks. What an earlier process left half done is removed, and images that are
    /// not whole any more are forgotten.
    pub fn open(directory: &Path, config: Config) -> Result<Self, ImageError> {
        let disk = Disk::open(directory)?;
        let client = Client::new(&config)?;
        let mut state = State { names: disk.read_names()?, ..State::default() };
        let mut broken = Vec::new();
        for (digest, record) in disk.read_images::<Record>()? {
            match record.map_or(Ok(None), |record| load(&disk, digest, record))? {
                Some(image) => drop(state.images.insert(digest, image)),
                None => {
                    tracing::warn!(image = %digest, "an image is damaged and was forgotten; pull or import it again");
                    broken.push(digest);
                }
            }
        }
        disk.forget(&broken, |_| true, |_| true)?;
        state.names.retain(|_, digest| state.images.contains_key(digest));
        let inner = Inner {
            disk,
            config,
            platform: Platform::host(),
            client,
            state: Mutex::new(state),
            changes: Mutex::new(()),
            unpacking: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// All images, by digest.
    pub fn list(&self) -> Vec<Image> {
        let state = self.inner.state();
        state.images.values().map(|image| state.named(image)).collect()
    }

    /// The image of a name, of a digest, or of the first 12 or more digits of one.
    pub fn find(&self, text: &str) -> Result<Image, ImageError> {
        let state = self.inner.state();
        let unknown = || ImageError::UnknownImage { name: text.chars().take(255).collect() };
        let image = state.find(text).and_then(|digest| state.images.get(&digest)).ok_or_else(unknown)?;
        Ok(state.named(image))
    }

    /// Takes a name away, or, where a digest is given, all names of its image. The image itself stays until [`ImageStore::gc`] finds that
    /// nobody needs it. Gives the image as it is then.
    pub async fn remove(&self, text: &str) -> Result<Image, ImageError> {
        let text = text.to_owned();
        self.change(move |inner| {
            let unknown = || ImageError::UnknownImage { name: text.chars().take(255).collect() };
            let mut state = inner.state();
            let digest = state.find(&text).ok_or_else(unknown)?;
            let mut names = state.names.clone();
            let one = text.parse::<Reference>().ok().filter(|name| names.contains_key(name));
            match &one {
                Some(name) => drop(names.remove(name)),
                None => names.retain(|_, named| *named != digest),
            }
            inner.disk.write_names(&names)?;
            state.names = names;
            let image = state.images.get(&digest).ok_or_else(unknown)?;
            Ok(state.named(image))
        })
        .await
    }

    /// Removes images that have no name, that `needed` does not name and that nobody holds; and layers that are of no image and that no pull
    /// needs.
    pub async fn gc(&self, needed: impl Fn(&Digest) -> bool + Send + 'static) -> Result<Freed, ImageError> {
        let (freed, dropped) = self
            .change(move |inner| {
                let mut state = inner.state();
                let named: HashSet<_> = state.names.values().copied().collect();
                let unneeded =
                    |digest: &&Digest| !named.contains(digest) && !state.leases.contains_key(digest) && !needed(digest);
                let images: Vec<_> = state.images.keys().filter(unneeded).copied().collect();
                for digest in &images {
                    state.images.remove(digest);
                }
                let blobs: HashSet<_> =
                    state.images.values().flat_map(|image| [image.digest, image.config_digest]).collect();
                let layers = state.images.values().flat_map(|image| &image.layers).map(|layer| layer.diff_id);
                let layers: HashSet<_> = layers.chain(state.pins.keys().copied()).collect();
                // The state stays locked, so that no pull finds a layer that is gone a moment later.
                let (dropped, count, bytes) =
                    inner.disk.forget(&images, |blob| blobs.contains(blob), |layer| layers.contains(layer))?;
                Ok((Freed { images: images.len(), layers: count, bytes }, dropped))
            })
            .await?;
        blocking(move || {
            drop(dropped);
            Ok(freed)
        })
        .await
    }

    /// What a name stands for, if it is an alias; else the name itself.
    pub fn meant_by(&self, name: &str) -> String {
        self.inner.config.aliases.get(name).map_or(name, String::as_str).to_owned()
    }

    /// Keeps an image until the lease is dropped.
    pub fn hold(&self, digest: &Digest) -> Result<Lease, ImageError> {
        let mut state = self.inner.state();
        if !state.images.contains_key(digest) {
            return Err(ImageError::UnknownImage { name: digest.to_string() });
        }
        *state.leases.entry(*digest).or_default() += 1;
        Ok(Lease { inner: self.inner.clone(), digest: *digest })
    }

    /// What overlayfs has to stack for an image, the uppermost first. Hold the image meanwhile.
    pub fn layers(&self, digest: &Digest) -> Result<Vec<PathBuf>, ImageError> {
        let diff_ids = {
            let state = self.inner.state();
            let image = state.images.get(digest);
            let image = image.ok_or_else(|| ImageError::UnknownImage { name: digest.to_string() })?;
            image.config.diff_ids.clone()
        };
        let mut seen = HashSet::new();
        let mut layers = Vec::new();
        for diff_id in diff_ids.iter().rev() {
            // Overlayfs refuses a directory twice. What a lower one shows of the same layer, the upper one shows as well.
            if !seen.insert(diff_id) {
                continue;
            }
            let path = self.inner.disk.layer(diff_id);
            let failed = || ImageError::io(format!("open the layer {}", path.display()));
            let directory = std::fs::File::open(&path).map_err(failed())?.into();
            let hides_all = user::is_opaque(&directory).map_err(std::io::Error::from).map_err(failed())?;
            layers.push(path);
            // Overlayfs takes no notice of this attribute at the root.
            if hides_all {
                break;
            }
        }
        Ok(layers)
    }

    /// Who commands of an image run as. Hold the image meanwhile.
    pub async fn user(&self, digest: &Digest) -> Result<User, ImageError> {
        let (store, digest) = (self.clone(), *digest);
        blocking(move || {
            let user = store.find(&digest.to_string())?.config.user;
            resolve_user(&store.layers(&digest)?, &user, &format!("the image {digest}"))
        })
        .await
    }

    /// Lets one at a time work on a layer.
    pub(crate) async fn turn(&self, diff_id: &Digest) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut unpacking = self.inner.unpacking.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            unpacking.retain(|_, turn| turn.strong_count() > 0);
            match unpacking.get(diff_id).and_then(Weak::upgrade) {
                Some(turn) => turn,
                None => {
                    let turn = Arc::new(tokio::sync::Mutex::new(()));
                    unpacking.insert(*diff_id, Arc::downgrade(&turn));
                    turn
                }
            }
        };
        turn.lock_owned().await
    }

    pub(crate) fn pin(&self, layers: impl IntoIterator<Item = Digest>) -> Pins {
        let layers: HashSet<_> = layers.into_iter().collect();
        let mut state = self.inner.state();
        for layer in &layers {
            *state.pins.entry(*layer).or_default() += 1;
        }
        Pins { inner: self.inner.clone(), layers }
    }

    /// Makes an image of what is there, under these names. Its layers must be pinned.
    pub(crate) async fn commit(&self, new: NewImage, names: Vec<Reference>) -> Result<Image, ImageError> {
        self.change(move |inner| {
            let digest = Digest::of(&new.manifest);
            let known = inner.state().images.contains_key(&digest);
            if !known {
                let config_digest = Digest::of(&new.config);
                inner.disk.write_blob(&digest, &new.manifest)?;
                inner.disk.write_blob(&config_digest, &new.config)?;
                let added = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
                let record =
                    Record { version: VERSION, config: config_digest, layers: new.layers, added_unix_s: added };
                inner.disk.write_image(&digest, &record)?;
                let problem = "a layer of it went away while it was pulled";
                let image = load(&inner.disk, digest, record)?;
                let image = image.ok_or_else(|| ImageError::invalid_image(digest.to_string(), problem))?;
                inner.state().images.insert(digest, image);
            }
            let mut state = inner.state();
            let mut all = state.names.clone();
            all.extend(names.into_iter().map(|name| (name, digest)));
            if all != state.names {
                inner.disk.write_names(&all)?;
                state.names = all;
            }
            let image = state.images.get(&digest);
            let image = image.ok_or_else(|| ImageError::UnknownImage { name: digest.to_string() })?;
            Ok(state.named(image))
        })
        .await
    }

    async fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&Inner) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let inner = self.inner.clone();
        blocking(move || {
            let _one = inner.changes.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            change(&inner)
        })
        .await
    }
}

/// What an image is made of, before it has a name.
pub(crate) struct NewImage {
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    pub layers: Vec<ImageLayer>,
}

impl State {
    fn named(&self, image: &Image) -> Image {
        let names = self.names.iter().filter(|(_, digest)| **digest == image.digest).map(|(name, _)| name.clone());
        Image { names: names.collect(), ..image.clone() }
    }

    fn find(&self, text: &str) -> Option<Digest> {
        if let Ok(digest) = text.parse::<Digest>() {
            return self.images.contains_key(&digest).then_some(digest);
        }
        if let Ok(name) = text.parse::<Reference>() {
            let pinned = || name.digest().filter(|digest| self.images.contains_key(digest));
            if let Some(digest) = self.names.get(&name).copied().or_else(pinned) {
                return Some(digest);
            }
        }
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let mut found = self.images.keys().filter(|digest| digest.hex().starts_with(digits));
        match (digits.len() >= SHORT_DIGITS_MIN, found.next(), found.next()) {
            (true, Some(digest), None) => Some(*digest),
            _ => None,
        }
    }
}

/// `None` where something of the image is not there or damaged.
fn load(disk: &Disk, digest: Digest, record: Record) -> Result<Option<Image>, ImageError> {
    if record.version != VERSION {
        let problem = format!("its record has the version {}; a newer server wrote it", record.version);
        return Err(ImageError::invalid_image(format!("the image {digest}"), problem));
    }
    for layer in &record.layers {
        if disk.layer_record(&layer.diff_id)?.is_none() || !disk.layer(&layer.diff_id).is_dir() {
            return Ok(None);
        }
    }
    if disk.read_blob(&digest)?.is_none() {
        return Ok(None);
    }
    let Some(config) = disk.read_blob(&record.config)? else { return Ok(None) };
    let Ok(config) = ImageConfig::parse(&config, record.layers.len(), "an image") else { return Ok(None) };
    Ok(Some(Image {
        digest,
        names: Vec::new(),
        config,
        config_digest: record.config,
        layers: record.layers,
        added_unix_s: record.added_unix_s,
    }))
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(ImageError::Io { doing: "work on an image".into(), source: error.into() }),
    }
}
