//! The subsystems that the engine is made of, from the bottom up. Each has a state and methods of its own, is given those
//! below that it works with, and reaches no other. Only what starts the engine, and what callers see of it, knows them all.

use std::sync::Arc;

use crate::actor::Actors;
use crate::event_log::Events;
use crate::images::RootImages;
use crate::model::{Preview, Session, Snapshot, Volume};
use crate::ports::{Blobs, Images, Ingress};
use crate::previews::Previews;
use crate::registry::Registry;
use crate::sessions::Sessions;
use crate::shared::Shared;
use crate::snapshots::Snapshots;
use crate::volumes::Volumes;
use crate::workspaces::Workspaces;

/// What was recorded before the start.
pub(crate) struct Records {
    pub(crate) sessions: Vec<Session>,
    pub(crate) snapshots: Vec<Snapshot>,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) previews: Vec<Preview>,
}

pub(crate) struct EngineCore {
    pub(crate) shared: Arc<Shared>,
    pub(crate) workspaces: Arc<Workspaces>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) events: Arc<Events>,
    pub(crate) images: Arc<RootImages>,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) previews: Arc<Previews>,
    pub(crate) actors: Arc<Actors>,
    pub(crate) sessions: Arc<Sessions>,
}

impl EngineCore {
    /// With what was recorded before the start.
    pub(crate) fn new(
        shared: Arc<Shared>,
        images: Arc<dyn Images>,
        blobs: Arc<dyn Blobs>,
        ingress: Arc<dyn Ingress>,
        records: &Records,
    ) -> Self {
        let workspaces = Arc::new(Workspaces::new(shared.clone()));
        let registry = Arc::new(Registry::new(shared.clone()));
        let events = Arc::new(Events::new(shared.clone(), registry.clone()));
        let images = Arc::new(RootImages::new(shared.clone(), registry.clone(), images));
        let volumes =
            Volumes::new(shared.clone(), workspaces.clone(), registry.clone(), &records.volumes, &records.sessions);
        let volumes = Arc::new(volumes);
        let snapshots = Arc::new(Snapshots::new(
            shared.clone(),
            workspaces.clone(),
            registry.clone(),
            events.clone(),
            volumes.clone(),
            blobs,
        ));
        let previews = Arc::new(Previews::new(shared.clone(), registry.clone(), ingress, &records.previews));
        let actors = Arc::new(Actors::new(
            shared.clone(),
            registry.clone(),
            events.clone(),
            images.clone(),
            volumes.clone(),
            snapshots.clone(),
            previews.clone(),
        ));
        let sessions = Sessions::new(
            shared.clone(),
            workspaces.clone(),
            registry.clone(),
            events.clone(),
            images.clone(),
            volumes.clone(),
            snapshots.clone(),
            actors.clone(),
        );
        let sessions = Arc::new(sessions);
        Self { shared, workspaces, registry, events, images, volumes, snapshots, previews, actors, sessions }
    }
}
