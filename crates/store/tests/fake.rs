//! The engine's fake store keeps the same promises, so that what the simulator shows holds here too.

#![allow(clippy::unwrap_used)]

mod suite;

use std::sync::Arc;

use nagaya_engine::fake::{FakeStore, Faults};
use nagaya_engine::ports::Store;

#[test]
fn the_fake_store_keeps_every_promise_of_a_store() {
    suite::every_promise(|| (Box::new(FakeStore::new(Arc::new(Faults::new(1)))) as Box<dyn Store>, ()));
}
