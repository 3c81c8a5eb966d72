//! From `.proto` files to the text of Rust files, and how these compare with what is on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use buffa_codegen::generated::descriptor::FileDescriptorSet;
use buffa_codegen::{BytesRepr, CodeGenConfig, MapRepr};

use crate::services::{self, Facade};

/// One protobuf package and where its Rust code goes.
struct Package {
    /// Below `proto/`.
    sources: &'static [&'static str],
    /// From the root of the workspace.
    out_dir: &'static str,
    /// Also services and JSON, or only messages in binary form.
    services: bool,
    /// Other packages that its messages use, and the Rust modules that have them.
    uses: &'static [(&'static str, &'static str)],
    /// Who answers its services.
    facade: Option<Facade>,
}

/// Of the Tenki contract: not built yet. Artifacts, templates and the registry of images.
/// The last four carry contents of files, which do not go through generated code.
const TENKI_LEAVES_OUT: &[&str] = &[
    "GetArtifactUploadUrl",
    "GetArtifactDownloadUrl",
    "CreateTemplate",
    "GetTemplate",
    "ListTemplates",
    "ListProjectTemplates",
    "UpdateTemplate",
    "DeleteTemplate",
    "BuildTemplate",
    "CancelTemplateBuild",
    "GetTemplateBuild",
    "ListActiveTemplateBuilds",
    "PublishRegistryImage",
    "SetRegistryImageVisibility",
    "DeleteRegistryImage",
    "DeleteRegistryImageVersion",
    "ListRegistryImages",
    "GetRegistryImage",
    "ResolveRegistryRef",
    "ShareImage",
    "RevokeRegistryShareGrant",
    "ListRegistryShareGrants",
    "UnshareRegistryImage",
    "ReadFile",
    "WriteFile",
    "ReadFileStream",
    "WriteFileStream",
];

const PACKAGES: &[Package] = &[
    Package {
        sources: &[
            "tenki/sandbox/v1/registry.proto",
            "tenki/sandbox/v1/template.proto",
            "tenki/sandbox/v1/sandbox.proto",
            "tenki/sandbox/v1/ssh_gateway_client.proto",
        ],
        out_dir: "crates/api/src/gen",
        services: true,
        uses: &[],
        facade: Some(Facade {
            out_dir: "crates/daemon/src/tenki/services",
            module: "crate::tenki",
            answers: "TenkiService",
            messages: "nagaya_api::tenki::v1",
            leaves_out: TENKI_LEAVES_OUT,
        }),
    },
    Package {
        sources: &["nagaya/v1/nagaya.proto"],
        out_dir: "crates/api/src/nagaya/gen",
        services: true,
        uses: &[(".tenki.sandbox.v1", "crate::tenki::v1")],
        facade: Some(Facade {
            out_dir: "crates/daemon/src/nagaya/services",
            module: "crate::nagaya",
            answers: "Nagaya",
            messages: "nagaya_api::nagaya::v1",
            leaves_out: &[],
        }),
    },
    Package {
        sources: &["nagaya/agent/v1/agent.proto"],
        out_dir: "crates/guest/src/gen",
        services: false,
        uses: &[],
        facade: None,
    },
];

/// The text of every generated file by its path from the root of the workspace.
pub fn all(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let mut files = BTreeMap::new();
    for package in PACKAGES {
        if !package.sources.iter().all(|source| root.join("proto").join(source).exists()) {
            continue;
        }
        files.extend(generate(root, package)?);
    }
    Ok(files)
}

/// The text of one package's files by their paths.
fn generate(root: &Path, package: &Package) -> Result<Vec<(PathBuf, String)>> {
    let include = root.join("proto");
    let sources: Vec<PathBuf> = package.sources.iter().map(|source| include.join(source)).collect();
    let mut compiler = protox::Compiler::new([&include])?;
    compiler.include_imports(true).include_source_info(true).open_files(&sources)?;
    let descriptors = buffa_codegen::tooling_decode_options()
        .map_err(|error| anyhow!(error))?
        .decode_from_slice::<FileDescriptorSet>(&compiler.encode_file_descriptor_set())
        .context("read back the compiled descriptors")?;

    let names: Vec<String> = package.sources.iter().map(|source| source.to_string()).collect();
    let out_dir = Path::new(package.out_dir);
    let mut files: Vec<(PathBuf, String)> =
        buffa_codegen::generate(&descriptors.file, &names, &message_options(package))?
            .into_iter()
            .map(|file| (out_dir.join(file.name), objects(&file.content)))
            .collect();
    if package.services {
        files.push((out_dir.join("services.rs"), services::table(&descriptors.file, &names)));
    }
    if let Some(facade) = &package.facade {
        let path = Path::new(facade.out_dir).join("mod.rs");
        files.push((path, services::router(&descriptors.file, &names, facade)));
    }
    Ok(files)
}

/// Messages with derived JSON, made to be objects only; see `crates/api/src/json.rs`.
fn objects(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    // Of the derived message that is being read: its indentation, and its name once that was seen.
    let mut message: Option<(String, Option<String>)> = None;
    for line in text.lines() {
        lines.push(line.to_owned());
        let body = line.trim_start_matches(' ');
        let indent = &line[..line.len() - body.len()];
        if body == "#[derive(::serde::Serialize, ::serde::Deserialize)]" {
            lines.push(format!("{indent}#[serde(remote = \"Self\")]"));
            message = Some((indent.to_owned(), None));
        } else if let (Some((_, name @ None)), Some(rest)) = (&mut message, body.strip_prefix("pub struct ")) {
            *name = rest.split(' ').next().map(|name| name.trim_end_matches([';', '{']).to_owned());
        }
        if let Some((indent, Some(name))) = &message
            && (line.strip_prefix(indent.as_str()) == Some("}")
                || (body.starts_with("pub struct ") && body.ends_with(['}', ';'])))
        {
            lines.push(format!("{indent}crate::json::object!({name});"));
            message = None;
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

fn message_options(package: &Package) -> CodeGenConfig {
    let mut options = CodeGenConfig::default();
    // Views are twice as much code as the messages themselves, and what they save is lost in the
    // noise here: requests are translated to the engine's own types at once.
    options.generate_views = false;
    options.generate_json = package.services;
    // Nothing forwards messages, so what we do not know is not kept.
    options.preserve_unknown_fields = false;
    options.generate_with_setters = false;
    options.emit_register_fn = false;
    options.file_per_package = true;
    // File and stream chunks go into messages without a copy.
    options.bytes_fields = vec![(".".into(), BytesRepr::Bytes)];
    options.map_fields = vec![(".".into(), MapRepr::BTreeMap)];
    options.extern_paths = package.uses.iter().map(|(name, module)| (name.to_string(), module.to_string())).collect();
    options
}

/// Paths whose file on disk differs from the generated one, is missing, or is not generated any more.
pub fn stale(root: &Path, generated: &BTreeMap<PathBuf, String>) -> Result<BTreeSet<PathBuf>> {
    let mut stale = BTreeSet::new();
    for (path, text) in generated {
        match fs::read_to_string(root.join(path)) {
            Ok(on_disk) if on_disk == *text => {}
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("read {}", path.display()));
            }
            _ => {
                stale.insert(path.clone());
            }
        }
    }
    let directories = PACKAGES.iter().flat_map(|package| {
        let facade = package.facade.as_ref().map(|facade| facade.out_dir);
        std::iter::once(package.out_dir).chain(facade)
    });
    for directory in directories {
        let entries = match fs::read_dir(root.join(directory)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("list {directory}")),
        };
        for entry in entries {
            let path = Path::new(directory).join(entry?.file_name());
            if !generated.contains_key(&path) {
                stale.insert(path);
            }
        }
    }
    Ok(stale)
}

/// Makes one path on disk what it should be: its generated text, or absent.
pub fn update(root: &Path, path: &Path, generated: &BTreeMap<PathBuf, String>) -> Result<()> {
    let target = root.join(path);
    let Some(text) = generated.get(path) else {
        return fs::remove_file(&target).with_context(|| format!("remove {}", path.display()));
    };
    let directory = target.parent().context("a generated file is in a directory")?;
    fs::create_dir_all(directory)?;
    fs::write(&target, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two directories below the workspace")
    }

    #[test]
    fn the_committed_code_is_what_the_proto_files_say() {
        let generated = all(workspace()).expect("generate");
        assert!(generated.len() >= PACKAGES.len());
        let stale = stale(workspace(), &generated).expect("compare");
        assert!(stale.is_empty(), "stale: {stale:?}; run `cargo run -p nagaya-codegen` and commit the result");
    }

    #[test]
    fn changed_missing_and_left_over_files_are_stale_and_update_repairs_them() {
        let root = tempfile::tempdir().expect("a temporary directory");
        let directory = Path::new(PACKAGES[0].out_dir);
        let generated: BTreeMap<PathBuf, String> =
            ["same.rs", "changed.rs", "missing.rs"].map(|name| (directory.join(name), name.to_owned())).into();
        for path in generated.keys() {
            update(root.path(), path, &generated).expect("write");
        }
        assert_eq!(stale(root.path(), &generated).expect("compare"), BTreeSet::new());

        fs::write(root.path().join(directory).join("changed.rs"), "else").expect("write");
        fs::remove_file(root.path().join(directory).join("missing.rs")).expect("remove");
        fs::write(root.path().join(directory).join("left_over.rs"), "").expect("write");
        let found = stale(root.path(), &generated).expect("compare");
        assert_eq!(found, ["changed.rs", "left_over.rs", "missing.rs"].map(|name| directory.join(name)).into());

        for path in &found {
            update(root.path(), path, &generated).expect("repair");
        }
        assert_eq!(stale(root.path(), &generated).expect("compare"), BTreeSet::new());
    }
}
