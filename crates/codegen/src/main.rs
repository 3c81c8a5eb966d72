//! Writes the Rust code for the `.proto` files of this project.
//!
//! `cargo run -p nagaya-codegen` rewrites the committed files; with `--check` it writes nothing,
//! names the files that are stale and exits with 1. No protoc is needed.

mod generate;
mod services;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

fn main() -> Result<ExitCode> {
    let check = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [flag] if flag == "--check" => true,
        other => bail!("unknown arguments {other:?}; the only one there is is --check"),
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .context("this crate is not two directories below the workspace")?;
    let generated = generate::all(root)?;
    let stale = generate::stale(root, &generated)?;
    if check {
        for path in &stale {
            eprintln!("stale: {}", path.display());
        }
        if !stale.is_empty() {
            eprintln!("run `cargo run -p nagaya-codegen` and commit the result");
        }
        return Ok(ExitCode::from(u8::from(!stale.is_empty())));
    }
    for path in &stale {
        generate::update(root, path, &generated)?;
        println!("updated {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}
