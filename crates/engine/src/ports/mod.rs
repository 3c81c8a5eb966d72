//! The engine's view of the world: a store, a driver, blobs, an ingress, a clock and a source of randomness.
//!
//! These modules depend on [`crate::model`] only. [`crate::fake`] implements all of them, for tests.

mod blobs;
mod clock;
mod driver;
mod guest;
mod ingress;
mod store;

pub use blobs::*;
pub use clock::*;
pub use driver::*;
pub use guest::*;
pub use ingress::*;
pub use store::*;
