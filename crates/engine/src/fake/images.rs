//! Images in memory: a registry that has whatever tests put into it, and a host that has what was pulled.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nagaya_api::error::{Code, Error};

use crate::model::{ImageDigest, ImageUser, RootImage};
use crate::ports::{FreedImages, Image, Images, PullProgress, PullState, PullWatcher, Resolved};

/// What the image of the host is called.
const HOST: [&str; 2] = ["host", "sandbox"];

#[derive(Default)]
struct World {
    registry: BTreeMap<String, ImageDigest>,
    here: BTreeMap<ImageDigest, BTreeSet<String>>,
    held: Arc<Mutex<Vec<ImageDigest>>>,
    refusal: Option<Error>,
}

#[derive(Default)]
pub struct FakeImages(Mutex<World>);

struct Hold(Arc<Mutex<Vec<ImageDigest>>>, ImageDigest);

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.0.lock().expect("no holder of this lock panics");
        if let Some(at) = held.iter().position(|digest| *digest == self.1) {
            held.remove(at);
        }
    }
}

impl FakeImages {
    fn with<T>(&self, action: impl FnOnce(&mut World) -> T) -> T {
        action(&mut self.0.lock().expect("no holder of this lock panics"))
    }

    /// From now on the registry has this.
    pub fn publish(&self, name: &str, digest: &str) {
        self.with(|world| world.registry.insert(name.to_owned(), ImageDigest::new(digest)));
    }

    /// The host has this image no more.
    pub fn lose(&self, digest: &str) {
        self.with(|world| world.here.remove(&ImageDigest::new(digest)));
    }

    /// The next image that a creation fetches is not given.
    pub fn refuse_next(&self, error: Error) {
        self.with(|world| world.refusal = Some(error));
    }

    fn take(&self, name: &str) -> Result<ImageDigest, Error> {
        self.with(|world| {
            let digest =
                world.registry.get(name).cloned().ok_or_else(|| Error::new(Code::RegistryImageNotFound, name))?;
            for names in world.here.values_mut() {
                names.remove(name);
            }
            world.here.entry(digest.clone()).or_default().insert(name.to_owned());
            Ok(digest)
        })
    }

    fn digest(&self, name: &str) -> Option<ImageDigest> {
        self.with(|world| {
            let is_it =
                |(digest, names): &(&ImageDigest, &BTreeSet<String>)| digest.as_str() == name || names.contains(name);
            world.here.iter().find(is_it).map(|(digest, _)| digest.clone())
        })
    }

    fn image(&self, digest: ImageDigest) -> Image {
        Image {
            names: self.with(|world| world.here.get(&digest).into_iter().flatten().cloned().collect()),
            digest,
            layers: Vec::new(),
            added_at: 0,
            user: String::new(),
            workdir: String::new(),
            env: BTreeMap::new(),
            entrypoint: Vec::new(),
            command: Vec::new(),
            labels: BTreeMap::new(),
            exposed_ports: Vec::new(),
        }
    }
}

#[async_trait]
impl Images for FakeImages {
    async fn resolve(&self, name: &str) -> Result<Resolved, Error> {
        if HOST.contains(&name) {
            return Ok(Resolved::Host);
        }
        let Some(digest) = self.digest(name) else {
            let known = self.with(|world| world.registry.get(name).cloned());
            let digest = known.ok_or_else(|| Error::new(Code::RegistryImageNotFound, name))?;
            return Ok(Resolved::Elsewhere { digest });
        };
        let held = self.with(|world| world.held.clone());
        held.lock().expect("no holder of this lock panics").push(digest.clone());
        Ok(Resolved::Image { hold: Box::new(Hold(held, digest.clone())), digest })
    }

    async fn fetch(&self, name: &str, digest: &ImageDigest) -> Result<(), Error> {
        if let Some(error) = self.with(|world| world.refusal.take()) {
            return Err(error);
        }
        self.with(|world| world.here.entry(digest.clone()).or_default().insert(name.to_owned()));
        Ok(())
    }

    async fn root(&self, digest: &ImageDigest) -> Result<Option<RootImage>, Error> {
        Ok(self.with(|world| {
            world.here.contains_key(digest).then(|| RootImage {
                digest: digest.clone(),
                layers: Vec::new(),
                user: ImageUser::default(),
                workdir: None,
                env: BTreeMap::new(),
            })
        }))
    }

    async fn list(&self) -> Result<Vec<Image>, Error> {
        let digests: Vec<_> = self.with(|world| world.here.keys().cloned().collect());
        Ok(digests.into_iter().map(|digest| self.image(digest)).collect())
    }

    async fn find(&self, name: &str) -> Result<Image, Error> {
        let digest = self.digest(name).ok_or_else(|| Error::new(Code::RegistryImageNotFound, name))?;
        Ok(self.image(digest))
    }

    async fn pull(&self, name: &str, watcher: PullWatcher) -> Result<Image, Error> {
        let digest = self.take(name)?;
        for state in [PullState::Waiting, PullState::Done] {
            watcher(PullProgress { layer: "sha256:layer".into(), position: 0, layers: 1, bytes: 0, total: 0, state });
        }
        Ok(self.image(digest))
    }

    async fn import(&self, mut archive: Box<dyn Read + Send>, name: Option<&str>) -> Result<Vec<Image>, Error> {
        let mut text = String::new();
        archive.read_to_string(&mut text).map_err(|error| Error::new(Code::ImageInvalid, error.to_string()))?;
        let digest = ImageDigest::new(text);
        self.with(|world| world.here.entry(digest.clone()).or_default().extend(name.map(str::to_owned)));
        Ok(vec![self.image(digest)])
    }

    async fn remove(&self, name: &str) -> Result<(), Error> {
        let digest = self.digest(name).ok_or_else(|| Error::new(Code::RegistryImageNotFound, name))?;
        self.with(|world| {
            world.here.entry(digest.clone()).or_default().retain(|of| name != of && name != digest.as_str());
        });
        Ok(())
    }

    async fn prune(&self, needed: BTreeSet<ImageDigest>) -> Result<FreedImages, Error> {
        let held = self.with(|world| world.held.clone());
        let held = held.lock().expect("no holder of this lock panics").clone();
        Ok(self.with(|world| {
            let before = world.here.len();
            world.here.retain(|digest, names| !names.is_empty() || needed.contains(digest) || held.contains(digest));
            FreedImages { images: before - world.here.len(), ..FreedImages::default() }
        }))
    }
}
