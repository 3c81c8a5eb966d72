//! From a registry to this host: the manifest for this platform, its configuration, and the layers that are not here yet.

use std::io::{self, BufRead, Read};
use std::sync::Arc;

use bytes::{Buf, Bytes};
use tokio::sync::{Semaphore, mpsc};

use crate::config::PullPolicy;
use crate::digest::Digest;
use crate::disk::{LayerRecord, WantedLayer};
use crate::error::ImageError;
use crate::image_config::ImageConfig;
use crate::manifest::{Document, Manifest, Platform};
use crate::reference::Reference;
use crate::registry::Session;
use crate::store::{Image, ImageLayer, ImageStore, NewImage, blocking};

/// Indexes within indexes.
const INDEX_DEPTH_MAX: u32 = 3;
/// Pieces of a layer that wait to be unpacked.
const PIECES_MAX: usize = 32;
/// How much arrives between two events.
const EVENT_BYTES: u64 = 256 << 10;

/// What becomes of a layer, for people who wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The layer, as its registry names it.
    pub layer: Digest,
    /// Which one it is, from 0, the lowest; and of how many.
    pub position: usize,
    pub layers: usize,
    /// What has arrived and was unpacked, and what there is, compressed.
    pub bytes: u64,
    pub total: u64,
    pub state: LayerState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerState {
    /// Others are worked on before it.
    Waiting,
    Fetching,
    /// It was here already.
    Present,
    /// It arrived and is whole.
    Done,
}

/// Is told what happens. Called from several threads; it must not block.
pub type Watcher = Arc<dyn Fn(Progress) + Send + Sync>;

/// An image that was described, but of which the layers are not looked at yet.
pub(crate) struct Described {
    pub manifest_bytes: Vec<u8>,
    pub manifest: Manifest,
    pub config_bytes: Vec<u8>,
    pub config: ImageConfig,
}

impl Described {
    /// Brings a manifest and its configuration together; both are verified already.
    pub fn new(
        manifest_bytes: Vec<u8>,
        manifest: Manifest,
        config_bytes: Vec<u8>,
        what: &str,
    ) -> Result<Self, ImageError> {
        let found = Digest::of(&config_bytes);
        if found != manifest.config.digest {
            let what = format!("the configuration of {what}");
            return Err(ImageError::DigestMismatch { what, expected: manifest.config.digest, found });
        }
        let config = ImageConfig::parse(&config_bytes, manifest.layers.len(), what)?;
        Ok(Self { manifest_bytes, manifest, config_bytes, config })
    }

    /// Refuses an image that says itself that it is for other machines.
    pub fn runs_on(&self, host: &Platform, what: &str) -> Result<(), ImageError> {
        match self.config.platform.as_ref().filter(|platform| !host.runs(platform)) {
            None => Ok(()),
            Some(platform) => {
                let available = platform.to_string();
                Err(ImageError::NoPlatform { image: what.into(), wanted: host.to_string(), available })
            }
        }
    }

    fn wanted(&self) -> Vec<WantedLayer> {
        let layers = self.manifest.layers.iter().zip(&self.config.diff_ids);
        layers
            .map(|((descriptor, compression), diff_id)| WantedLayer {
                diff_id: *diff_id,
                blob: descriptor.digest,
                blob_bytes: descriptor.size,
                compression: *compression,
            })
            .collect()
    }
}

/// A layer on its way, and whom to tell of it.
#[derive(Clone)]
pub(crate) struct LayerTask {
    pub wanted: WantedLayer,
    progress: Progress,
    watcher: Watcher,
    /// Held by whoever works on it, on any thread.
    _working: mpsc::Sender<()>,
}

impl LayerTask {
    pub fn tell(&self, bytes: u64, state: LayerState) {
        (self.watcher)(Progress { bytes, state, ..self.progress.clone() });
    }
}

impl ImageStore {
    /// The digest of the image of a reference: as it is here, or as its registry says, where the settings let uses of an image fetch it.
    pub async fn meaning(&self, reference: &Reference) -> Result<Digest, ImageError> {
        let here = self.find(&reference.to_string()).map(|image| image.digest);
        match (self.inner.config.pull, here) {
            (PullPolicy::Never | PullPolicy::Missing, Ok(digest)) => Ok(digest),
            (PullPolicy::Never, Err(_)) => Err(ImageError::PullForbidden { reference: reference.clone() }),
            // What is pinned means the same for ever.
            (PullPolicy::Always, Ok(digest)) if reference.digest().is_some() => Ok(digest),
            _ => self.locate(reference).await,
        }
    }

    /// Asks the registry what a reference means now, and fetches what is not here. Dropping the future ends it; what it has finished stays until
    /// the next [`ImageStore::gc`].
    pub async fn pull(&self, reference: &Reference, watcher: Watcher) -> Result<Image, ImageError> {
        let session = self.inner.client.session(reference).await?;
        let described = self.describe(&session, reference, reference.digest(), &reference.version()).await?;
        let session = &session;
        self.install(described, vec![reference.clone()], watcher, |task| self.fetch(session, task)).await
    }

    /// The digest of the image for this host that a reference means now, as its registry says; nothing is kept.
    pub async fn locate(&self, reference: &Reference) -> Result<Digest, ImageError> {
        let session = self.inner.client.session(reference).await?;
        let described = self.describe(&session, reference, reference.digest(), &reference.version()).await?;
        Ok(Digest::of(&described.manifest_bytes))
    }

    /// Fetches what [`ImageStore::locate`] found, whatever the reference means by now.
    pub async fn pull_located(
        &self,
        reference: &Reference,
        digest: Digest,
        watcher: Watcher,
    ) -> Result<Image, ImageError> {
        let session = self.inner.client.session(reference).await?;
        let described = self.describe(&session, reference, Some(digest), &digest.to_string()).await?;
        let session = &session;
        self.install(described, vec![reference.clone()], watcher, |task| self.fetch(session, task)).await
    }

    /// Asks the registry for the manifest of a version and for its configuration.
    async fn describe(
        &self,
        session: &Session<'_>,
        reference: &Reference,
        pinned: Option<Digest>,
        version: &str,
    ) -> Result<Described, ImageError> {
        let what = reference.to_string();
        let fetched = session.manifest(version).await?;
        let verify = |expected: Digest, bytes: &[u8]| match Digest::of(bytes) {
            found if found == expected => Ok(()),
            found => Err(ImageError::DigestMismatch { what: what.clone(), expected, found }),
        };
        if let Some(pinned) = pinned {
            verify(pinned, &fetched.bytes)?;
        }
        let mut document = Document::parse(&fetched.bytes, &fetched.media_type, &what)?;
        let mut bytes = fetched.bytes;
        for _ in 0..INDEX_DEPTH_MAX {
            let Document::Index(index) = &document else { break };
            let chosen = index.choose(&self.inner.platform, &what)?.clone();
            let fetched = session.manifest(&chosen.digest.to_string()).await?;
            verify(chosen.digest, &fetched.bytes)?;
            document = Document::parse(&fetched.bytes, &fetched.media_type, &what)?;
            bytes = fetched.bytes;
        }
        let Document::Manifest(manifest) = document else {
            return Err(ImageError::invalid_image(
                what,
                format!("it has more than {INDEX_DEPTH_MAX} indexes within each other"),
            ));
        };
        let config = session.document_blob(&manifest.config.digest).await?;
        let described = Described::new(bytes, manifest, config, &what)?;
        described.runs_on(&self.inner.platform, &what)?;
        Ok(described)
    }

    /// Fetches and unpacks one layer.
    async fn fetch(&self, session: &Session<'_>, task: LayerTask) -> Result<LayerRecord, ImageError> {
        let (pieces, receiver) = mpsc::channel(PIECES_MAX);
        let (store, working) = (self.clone(), task.clone());
        let unpacking = blocking(move || {
            // All of it moves here: it tells that somebody works.
            let task = working;
            let reader = PieceReader { pieces: receiver, piece: Bytes::new(), ended: false };
            store.inner.disk.unpack(&task.wanted, reader, store.inner.config.limits())
        });
        // Whatever ends it closes the channel, and with that the unpacking.
        let fetching = async move {
            let mut stream = session.blob(task.wanted.blob, task.wanted.blob_bytes);
            let (mut bytes, mut told) = (0, 0);
            task.tell(0, LayerState::Fetching);
            while let Some(piece) = stream.next().await? {
                bytes += piece.len() as u64;
                if pieces.send(Some(piece)).await.is_err() {
                    // Whoever unpacks has given up, and says why.
                    return Ok(());
                }
                if bytes - told >= EVENT_BYTES {
                    told = bytes;
                    task.tell(bytes, LayerState::Fetching);
                }
            }
            // An end that is not announced is a break.
            let _ = pieces.send(None).await;
            Ok::<_, ImageError>(())
        };
        let (fetched, unpacked) = tokio::join!(fetching, unpacking);
        // What went wrong with the connection is said, rather than that the layer ended early because of it.
        fetched.and(unpacked)
    }

    /// Brings layers here that are not, some at a time, and makes an image of all of them.
    pub(crate) async fn install<F>(
        &self,
        described: Described,
        names: Vec<Reference>,
        watcher: Watcher,
        fetch: impl Fn(LayerTask) -> F,
    ) -> Result<Image, ImageError>
    where
        F: Future<Output = Result<LayerRecord, ImageError>>,
    {
        let wanted = described.wanted();
        let most = self.inner.config.image_mb_max;
        let sum = wanted.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.blob_bytes));
        if sum > most.saturating_mul(1 << 20) {
            let what =
                format!("the image {}, with {} MiB of layers,", Digest::of(&described.manifest_bytes), sum >> 20);
            return Err(ImageError::TooLarge { what, limit: format!("{most} MiB"), setting: "images.image_mb_max" });
        }
        let _pins = self.pin(wanted.iter().map(|layer| layer.diff_id));
        let places = Semaphore::new(self.inner.config.layers_at_once.max(1));
        let layers = wanted.len();
        let (working, mut worked) = mpsc::channel(1);
        let work = wanted.into_iter().enumerate().map(|(position, wanted)| {
            let progress = Progress {
                layer: wanted.blob,
                position,
                layers,
                bytes: 0,
                total: wanted.blob_bytes,
                state: LayerState::Waiting,
            };
            let task = LayerTask { wanted, progress, watcher: watcher.clone(), _working: working.clone() };
            self.provide(task, &places, &fetch)
        });
        let records = all(work.collect()).await;
        // After a failure, too, nobody works on a layer any more when this returns.
        drop(working);
        while worked.recv().await.is_some() {}
        let records = records?;
        let layers = described.wanted().into_iter().zip(records).map(|(wanted, record)| ImageLayer {
            diff_id: wanted.diff_id,
            blob: wanted.blob,
            blob_bytes: wanted.blob_bytes,
            bytes: record.bytes,
            entries: record.entries,
            devices: record.devices,
        });
        let new =
            NewImage { layers: layers.collect(), manifest: described.manifest_bytes, config: described.config_bytes };
        self.commit(new, names).await
    }

    async fn provide<F>(
        &self,
        task: LayerTask,
        places: &Semaphore,
        fetch: &impl Fn(LayerTask) -> F,
    ) -> Result<LayerRecord, ImageError>
    where
        F: Future<Output = Result<LayerRecord, ImageError>>,
    {
        task.tell(0, LayerState::Waiting);
        let diff_id = task.wanted.diff_id;
        // Whoever waits for a layer that another pull works on takes no place from those that could work.
        let _turn = self.turn(&diff_id).await;
        let store = self.clone();
        if let Some(record) = blocking(move || store.inner.disk.layer_record(&diff_id)).await? {
            task.tell(task.wanted.blob_bytes, LayerState::Present);
            return Ok(record);
        }
        let _place = places.acquire().await;
        let record = fetch(task.clone()).await?;
        task.tell(task.wanted.blob_bytes, LayerState::Done);
        Ok(record)
    }
}

/// Drives all of them; the first failure ends the others.
async fn all<T, F: Future<Output = Result<T, ImageError>>>(work: Vec<F>) -> Result<Vec<T>, ImageError> {
    let mut work: Vec<_> = work.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        let mut pending = false;
        for (future, outcome) in work.iter_mut().filter(|(_, outcome)| outcome.is_none()) {
            match future.as_mut().poll(context) {
                std::task::Poll::Ready(Ok(value)) => *outcome = Some(value),
                std::task::Poll::Ready(Err(error)) => return std::task::Poll::Ready(Err(error)),
                std::task::Poll::Pending => pending = true,
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(Ok(())) }
    })
    .await?;
    Ok(work.into_iter().filter_map(|(_, outcome)| outcome).collect())
}

/// Reads what arrives in pieces, on a thread that may block. `None` among the pieces is the end.
struct PieceReader {
    pieces: mpsc::Receiver<Option<Bytes>>,
    piece: Bytes,
    ended: bool,
}

impl BufRead for PieceReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.piece.is_empty() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => self.piece = piece,
                Some(None) => self.ended = true,
                None => {
                    let doing = "fetch the layer".into();
                    let source = io::Error::other("the pull was ended");
                    return Err(io::Error::other(ImageError::Io { doing, source }));
                }
            }
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, amount: usize) {
        self.piece.advance(amount);
    }
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}
