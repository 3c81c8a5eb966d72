//! Images as strangers make them and registries give them. As root: layers have owners and whiteouts.

mod tar;
mod unpack;
