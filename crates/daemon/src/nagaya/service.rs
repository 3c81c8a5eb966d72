//! What the rpcs share.

use std::time::Duration;

use nagaya_engine::Engine;

pub(super) struct Nagaya {
    pub(super) engine: Engine,
    /// How long an answer waits for sandboxes to run.
    pub(super) create_hold: Duration,
}
