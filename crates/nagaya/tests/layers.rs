//! The crates depend on each other in one direction; see ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// What each crate may see of the others in what it ships.
const ALLOWED: [(&str, &[&str]); 14] = [
    ("nagaya-api", &[]),
    ("nagaya-engine", &["nagaya-api"]),
    ("nagaya-store", &["nagaya-api", "nagaya-engine"]),
    ("nagaya-blobs", &["nagaya-api", "nagaya-engine"]),
    ("nagaya-image", &["nagaya-api"]),
    ("nagaya-guest", &["nagaya-api"]),
    ("nagaya-runtime", &["nagaya-api", "nagaya-engine", "nagaya-guest"]),
    ("nagaya-gateway", &["nagaya-api", "nagaya-engine"]),
    ("nagaya-daemon", &["nagaya-api", "nagaya-engine", "nagaya-gateway"]),
    ("nagaya-client", &["nagaya-api"]),
    ("nagaya-cli", &["nagaya-api", "nagaya-client"]),
    (
        "nagaya",
        &[
            "nagaya-api",
            "nagaya-engine",
            "nagaya-store",
            "nagaya-blobs",
            "nagaya-image",
            "nagaya-runtime",
            "nagaya-gateway",
            "nagaya-daemon",
            "nagaya-cli",
        ],
    ),
    ("nagaya-codegen", &[]),
    ("nagaya-testkit", &["nagaya-api", "nagaya-engine", "nagaya-store", "nagaya-blobs", "nagaya-runtime"]),
];

fn own_dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let table = manifest.get("dependencies").and_then(toml::Value::as_table);
    table.into_iter().flat_map(toml::Table::keys).filter(|name| name.starts_with("nagaya")).cloned().collect()
}

#[test]
fn no_crate_depends_against_the_arrows() {
    let allowed: BTreeMap<&str, BTreeSet<String>> =
        ALLOWED.iter().map(|(name, seen)| (*name, seen.iter().map(|name| (*name).to_owned()).collect())).collect();
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("crates/ is above");
    let mut found = 0;
    for entry in fs::read_dir(crates).expect("crates/ can be read") {
        let path = entry.expect("an entry").path().join("Cargo.toml");
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let manifest: toml::Table = text.parse().expect("a manifest");
        let name = manifest["package"]["name"].as_str().expect("a name").to_owned();
        let allowed =
            allowed.get(name.as_str()).unwrap_or_else(|| panic!("{name} has no place in the order of crates"));
        let against: Vec<_> = own_dependencies(&manifest).difference(allowed).cloned().collect();
        assert!(against.is_empty(), "{name} must not depend on {against:?}");
        found += 1;
    }
    assert_eq!(found, ALLOWED.len(), "a crate of the table is gone");
}
