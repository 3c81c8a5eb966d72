//! The store of images, as the engine sees it.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;

use async_trait::async_trait;
use nagaya_api::error::{Code, Error};
use nagaya_engine::model::{ImageDigest, ImageUser, Layer, RootImage};
use nagaya_engine::ports::{FreedImages, Image, ImageLayer, Images, PullProgress, PullState, PullWatcher, Resolved};
use nagaya_image::{Digest, ImageConfig, ImageError, ImageStore, LayerState, Progress, Reference, Watcher};

/// What the image of the host's own programs is called.
const HOST: &str = nagaya_image::HOST_IMAGE;

pub struct ImagePort {
    store: ImageStore,
}

impl ImagePort {
    pub fn new(store: ImageStore) -> Self {
        Self { store }
    }
}

#[async_trait]
impl Images for ImagePort {
    async fn resolve(&self, name: &str) -> Result<Resolved, Error> {
        let name = self.store.meant_by(name);
        if name == HOST {
            return Ok(Resolved::Host);
        }
        let found = match is_digest(&name) {
            true => self.store.find(&name).map(|image| image.digest),
            false => self.store.meaning(&reference(&name)?).await,
        };
        let found = found.map_err(told)?;
        let digest = ImageDigest::new(found.to_string());
        Ok(match self.store.hold(&found) {
            Ok(lease) => Resolved::Image { digest, hold: Box::new(lease) },
            Err(_) => Resolved::Elsewhere { digest },
        })
    }

    async fn fetch(&self, name: &str, digest: &ImageDigest) -> Result<(), Error> {
        let parsed = digest.as_str().parse::<Digest>();
        let parsed = parsed.map_err(|_| Error::new(Code::RootUnavailable, digest.to_string()))?;
        let (store, reference) = (self.store.clone(), reference(&self.store.meant_by(name))?);
        // A creation that is given up does not take back what arrived: the next one finds it.
        let pulled = tokio::spawn(async move { store.pull_located(&reference, parsed, Arc::new(|_| ())).await });
        match pulled.await {
            Ok(pulled) => pulled.map(drop).map_err(told),
            Err(error) => Err(Error::new(Code::Internal, error.to_string())),
        }
    }

    async fn root(&self, digest: &ImageDigest) -> Result<Option<RootImage>, Error> {
        let Ok(parsed) = digest.as_str().parse::<Digest>() else { return Ok(None) };
        let Ok(lease) = self.store.hold(&parsed) else { return Ok(None) };
        let image = self.store.find(digest.as_str()).map_err(told)?;
        let layers = self.store.layers(&parsed).map_err(told)?;
        let user = self.store.user(&parsed).await.map_err(told)?;
        drop(lease);
        Ok(Some(RootImage {
            digest: digest.clone(),
            layers: layers.into_iter().map(|source| Layer { source, place: String::new() }).collect(),
            user: ImageUser { name: user.name, uid: user.uid, gid: user.gid, home: user.home },
            workdir: Some(image.config.working_directory).filter(|path| path.starts_with('/')),
            env: image.config.env.into_iter().collect(),
        }))
    }

    async fn list(&self) -> Result<Vec<Image>, Error> {
        Ok(self.store.list().into_iter().map(shown).collect())
    }

    async fn find(&self, name: &str) -> Result<Image, Error> {
        self.store.find(&self.store.meant_by(name)).map(shown).map_err(told)
    }

    async fn pull(&self, name: &str, watcher: PullWatcher) -> Result<Image, Error> {
        let name = self.store.meant_by(name);
        if name == HOST {
            return Err(Error::new(Code::ImageInvalid, format!("{HOST:?} is the image of this host's own programs")));
        }
        self.store.pull(&reference(&name)?, watched(watcher)).await.map(shown).map_err(told)
    }

    async fn import(&self, archive: Box<dyn Read + Send>, name: Option<&str>) -> Result<Vec<Image>, Error> {
        let name = name.map(reference).transpose()?;
        let imported = self.store.import_from(archive, name, Arc::new(|_| ())).await.map_err(told)?;
        Ok(imported.into_iter().map(shown).collect())
    }

    async fn remove(&self, name: &str) -> Result<(), Error> {
        self.store.remove(&self.store.meant_by(name)).await.map(drop).map_err(told)
    }

    async fn prune(&self, needed: BTreeSet<ImageDigest>) -> Result<FreedImages, Error> {
        let is_needed = move |digest: &Digest| needed.contains(&ImageDigest::new(digest.to_string()));
        let freed = self.store.gc(is_needed).await.map_err(told)?;
        Ok(FreedImages { images: freed.images, layers: freed.layers, bytes: freed.bytes })
    }
}

/// Whether a text is a digest or the beginning of one, and so no name to ask a registry for.
fn is_digest(text: &str) -> bool {
    let digits = text.strip_prefix("sha256:").unwrap_or(text);
    text.starts_with("sha256:") || digits.len() >= 12 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
}

fn reference(name: &str) -> Result<Reference, Error> {
    name.parse::<Reference>().map_err(told)
}

fn shown(image: nagaya_image::Image) -> Image {
    let ImageConfig { entrypoint, cmd, env, user, working_directory, labels, exposed_ports, .. } = image.config;
    Image {
        digest: ImageDigest::new(image.digest.to_string()),
        names: image.names.iter().map(Reference::to_string).collect(),
        layers: image
            .layers
            .into_iter()
            .map(|layer| ImageLayer {
                diff_id: layer.diff_id.to_string(),
                compressed_bytes: layer.blob_bytes,
                bytes: layer.bytes,
            })
            .collect(),
        added_at: image.added_unix_s.saturating_mul(1_000),
        user,
        workdir: working_directory,
        env: env.into_iter().collect(),
        entrypoint,
        command: cmd,
        labels,
        exposed_ports,
    }
}

fn watched(watcher: PullWatcher) -> Watcher {
    Arc::new(move |of: Progress| {
        let state = match of.state {
            LayerState::Waiting => PullState::Waiting,
            LayerState::Fetching => PullState::Fetching,
            LayerState::Present => PullState::Present,
            LayerState::Done => PullState::Done,
        };
        let layer = of.layer.to_string();
        let Progress { position, layers, bytes, total, .. } = of;
        watcher(PullProgress { layer, position, layers, bytes, total, state });
    })
}

/// What a caller is told.
fn told(error: ImageError) -> Error {
    let code = match &error {
        ImageError::InvalidReference { .. } => Code::InvalidArgument,
        ImageError::UnknownImage { .. } | ImageError::NotAtRegistry { .. } | ImageError::Unauthorized { .. } => {
            Code::RegistryImageNotFound
        }
        ImageError::RegistryNotAllowed { .. }
        | ImageError::PullForbidden { .. }
        | ImageError::RefusedAddress { .. }
        | ImageError::RefusedRedirect { .. }
        | ImageError::TooLarge { .. } => Code::ImageRefused,
        ImageError::Unreachable { .. }
        | ImageError::RateLimited { .. }
        | ImageError::InvalidAnswer { .. }
        | ImageError::Credentials { .. } => Code::ImageUnavailable,
        ImageError::Unsupported { .. }
        | ImageError::NoPlatform { .. }
        | ImageError::InvalidImage { .. }
        | ImageError::InvalidLayer { .. }
        | ImageError::DigestMismatch { .. } => Code::ImageInvalid,
        ImageError::NoSpace => Code::CapacityUnavailable,
        ImageError::Locked { .. } | ImageError::Io { .. } => Code::Internal,
    };
    match &error {
        // What this host's system said belongs into its log, not into an answer.
        ImageError::Io { source, .. } => {
            tracing::error!(%error, %source, "an image could not be worked on");
            Error::new(code, "an image could not be worked on; the server's log has the reason")
        }
        _ => Error::new(code, error.to_string()),
    }
}
