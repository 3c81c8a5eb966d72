//! The outside of the server, where people reach previews. `nagaya-gateway` implements it.

use async_trait::async_trait;

/// Where a preview can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// What a browser opens, without a slash at its end.
    pub url: String,
    /// The loopback port that is the preview's own; 0 where previews are told apart by their host names.
    pub port: u16,
}

/// The outside of the server, where previews are reached under their labels (one DNS label each).
#[async_trait]
pub trait Ingress: Send + Sync + 'static {
    /// Makes a preview reachable. `port` is the one it had before, kept while it is free; 0 for none. It is idempotent.
    /// The error says what is missing, in words for the user.
    async fn publish(&self, label: &str, port: u16) -> Result<Published, String>;
    /// Ends that; connections under way may go on to their end. Withdrawing an unknown one has no effect.
    async fn withdraw(&self, label: &str);
}
