//! Images that sandboxes stand on: which one a session gets, and what keeps an image on the host.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;

use nagaya_api::error::{Code, Error};
use tokio::sync::{RwLock, RwLockReadGuard};

use crate::errors::store_error;
use crate::model::{ImageDigest, Machine, RootImage};
use crate::ports::{DriverError, FreedImages, Image, Images, PullWatcher, Resolved};
use crate::registry::Registry;
use crate::shared::Shared;

/// What an image may be called at most, bytes: more than any name or digest has.
const NAME_BYTES_MAX: usize = 512;

pub(crate) struct RootImages {
    shared: Arc<Shared>,
    registry: Arc<Registry>,
    images: Arc<dyn Images>,
    /// Held for reading by whoever puts a session on an image, until its record tells of it; held for writing while it is
    /// found out which images nobody needs.
    choosing: RwLock<()>,
}

/// The image of a session that is about to be made. It stays on the host until this is dropped, which is after the session
/// is known.
pub(crate) struct Chosen<'a> {
    pub(crate) digest: ImageDigest,
    _hold: Option<Box<dyn Send + Sync>>,
    _choosing: RwLockReadGuard<'a, ()>,
}

impl RootImages {
    pub(crate) fn new(shared: Arc<Shared>, registry: Arc<Registry>, images: Arc<dyn Images>) -> Self {
        Self { shared, registry, images, choosing: RwLock::default() }
    }

    /// The image that a name stands for, or the server's default.
    pub(crate) async fn choose(&self, name: Option<&str>) -> Result<Chosen<'_>, Error> {
        let resolved = match name {
            Some(name) => self.images.resolve(checked(name)?).await?,
            None => Resolved::Host,
        };
        let (digest, hold) = match resolved {
            Resolved::Host => (self.shared.host.default_root(), None),
            Resolved::Image { digest, hold } => (digest, Some(hold)),
            // The session's own task fetches it: see `provide`.
            Resolved::Elsewhere { digest } => (digest, None),
        };
        Ok(Chosen { digest, _hold: hold, _choosing: self.choosing.read().await })
    }

    /// The root file system of a digest; `Gone` where the host has it no more.
    pub(crate) async fn root(&self, digest: &ImageDigest) -> Result<RootImage, DriverError> {
        match self.shared.host.root(digest).await {
            Err(DriverError::Gone) => {}
            found => return found,
        }
        let found = self.images.root(digest).await;
        found.map_err(|error| DriverError::Failed(error.to_string()))?.ok_or(DriverError::Gone)
    }

    /// Brings the image of a session here that is about to be created, if it is elsewhere.
    pub(crate) async fn provide(&self, machine: &Machine) -> Result<(), Error> {
        match machine.image.is_empty() || self.root(&machine.root).await.is_ok() {
            true => Ok(()),
            false => self.images.fetch(&machine.image, &machine.root).await,
        }
    }

    pub(crate) async fn list(&self) -> Result<Vec<Image>, Error> {
        self.images.list().await
    }

    pub(crate) async fn find(&self, name: &str) -> Result<Image, Error> {
        self.images.find(checked(name)?).await
    }

    pub(crate) async fn pull(&self, name: &str, watcher: PullWatcher) -> Result<Image, Error> {
        let _running = self.shared.tasks.enter()?;
        tokio::select! {
            biased;
            () = self.shared.tasks.stopping() => Err(Code::Draining.into()),
            pulled = self.images.pull(checked(name)?, watcher) => pulled,
        }
    }

    pub(crate) async fn import(&self, archive: Box<dyn Read + Send>, name: Option<&str>) -> Result<Vec<Image>, Error> {
        let _running = self.shared.tasks.enter()?;
        tokio::select! {
            biased;
            () = self.shared.tasks.stopping() => Err(Code::Draining.into()),
            imported = self.images.import(archive, name.map(checked).transpose()?) => imported,
        }
    }

    /// Takes a name away, and removes what nobody needs any more.
    pub(crate) async fn remove(&self, name: &str) -> Result<FreedImages, Error> {
        self.images.remove(checked(name)?).await?;
        self.prune().await
    }

    pub(crate) async fn prune(&self) -> Result<FreedImages, Error> {
        let _running = self.shared.tasks.enter()?;
        // From here on sessions and snapshots can only come to stand on images that others stand on already.
        let _quiet = self.choosing.write().await;
        let of_sessions = self.registry.live.all();
        let of_sessions = of_sessions.iter().map(|live| live.published.borrow().machine.root.clone());
        let mut needed: BTreeSet<ImageDigest> = of_sessions.collect();
        let snapshots = self.shared.store.all_snapshots().await.map_err(store_error)?;
        needed.extend(snapshots.into_iter().map(|snapshot| snapshot.machine.root));
        self.images.prune(needed).await
    }
}

fn checked(name: &str) -> Result<&str, Error> {
    if name.len() > NAME_BYTES_MAX || name.is_empty() || name.chars().any(|of| of.is_control() || of.is_whitespace()) {
        let detail = format!("an image's name has 1 to {NAME_BYTES_MAX} bytes without blanks");
        return Err(Error::new(Code::InvalidArgument, detail));
    }
    Ok(name)
}
