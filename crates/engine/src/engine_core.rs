//! What the parts of the engine share, and how they find a caller's sessions.

use std::sync::Arc;

use crate::actor::Actors;
use crate::event_log::Events;
use crate::previews::Previews;
use crate::registry::Registry;
use crate::shared::Shared;
use crate::snapshots::Snapshots;
use crate::volumes::Volumes;
use crate::workspaces::Workspaces;

pub(crate) struct EngineCore {
    pub(crate) shared: Arc<Shared>,
    pub(crate) workspaces: Arc<Workspaces>,
    pub(crate) events: Arc<Events>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) previews: Arc<Previews>,
    pub(crate) actors: Arc<Actors>,
}

/// The engine. Clones share it.
#[derive(Clone)]
pub struct Engine(pub(crate) Arc<EngineCore>);
