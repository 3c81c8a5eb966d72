//! Images as strangers make them and registries give them. As root: layers have owners and whiteouts.

#![allow(clippy::unwrap_used)]

mod fake;
mod images;
mod import;
mod others;
mod registry;
mod store;
mod tar;
mod unpack;
