//! Builds the static guest programs and puts them where `programs.rs` includes them from.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let target = env::var("TARGET").expect("cargo sets it");
    let workspace = manifest.join("../..");
    for path in ["crates/guest/src", "crates/guest/Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }

    // A build directory of their own: the outer cargo holds the lock of its own one.
    let directory = out.join("guest");
    let status = Command::new(env::var_os("CARGO").expect("cargo sets it"))
        .args([
            "build",
            "--quiet",
            "--locked",
            "--package",
            "nagaya-guest",
            "--bins",
            "--profile",
            "guest",
            "--target",
            &target,
        ])
        .arg("--target-dir")
        .arg(&directory)
        .current_dir(&workspace)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "building the guest programs failed; `cargo build -p nagaya-guest` shows why");
    for program in ["nagaya-agent", "nagaya-spawner"] {
        let built = directory.join(&target).join("guest").join(program);
        copy(&built, &out.join(program));
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::copy(from, to).unwrap_or_else(|error| panic!("copy {}: {error}", from.display()));
}
