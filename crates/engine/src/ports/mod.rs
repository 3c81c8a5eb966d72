//! The engine's view of the world: a store, drivers and their host, images, blobs, an ingress, a clock and a source of randomness.
//!
//! These modules depend on [`crate::model`] only. [`crate::fake`] implements all of them, for tests.

use std::sync::Arc;

mod blobs;
mod clock;
mod driver;
mod guest;
mod host;
mod images;
mod ingress;
mod store;

pub use blobs::*;
pub use clock::*;
pub use driver::*;
pub use guest::*;
pub use host::*;
pub use images::*;
pub use ingress::*;
pub use store::*;

/// The world that an engine works on.
pub struct Ports {
    pub store: Arc<dyn Store>,
    pub drivers: Drivers,
    pub host: Arc<dyn Host>,
    pub images: Arc<dyn Images>,
    pub blobs: Arc<dyn Blobs>,
    pub ingress: Arc<dyn Ingress>,
    pub clock: Arc<dyn Clock>,
    pub entropy: Arc<dyn Entropy>,
}
