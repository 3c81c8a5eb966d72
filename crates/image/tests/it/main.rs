//! Images as strangers make them and registries give them. As root: layers have owners and whiteouts.

mod fake;
mod images;
mod registry;
mod store;
mod tar;
mod unpack;
