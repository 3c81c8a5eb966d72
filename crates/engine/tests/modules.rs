//! The modules of this crate depend on each other in one direction.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// From the top down: each uses only those that come after it. A directory counts as one module.
const ORDER: [&str; 32] = [
    "fake",
    "engine",
    "recovery",
    "creation",
    "ssh",
    "preview_access",
    "explain",
    "settings",
    "actor",
    "executions",
    "egress",
    "waking",
    "previews",
    "volumes",
    "snapshots",
    "open",
    "event_log",
    "engine_core",
    "validate",
    "query",
    "snapshot_locks",
    "volume_table",
    "preview_table",
    "handle",
    "requests",
    "access",
    "session",
    "deadlines",
    "tasks",
    "errors",
    "backoff",
    "config",
];
/// Below all of them.
const GROUND: [&str; 2] = ["ports", "model"];

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// Names that follow `crate::` in code, imports of several in braces included.
fn used(text: &str) -> BTreeSet<String> {
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let name = |text: &str| -> String {
        text.chars().take_while(|character| character.is_alphanumeric() || *character == '_').collect()
    };
    let mut found = BTreeSet::new();
    for (at, found_text) in code.match_indices("crate::") {
        let rest = &code[at + found_text.len()..];
        match rest.strip_prefix('{') {
            None => drop(found.insert(name(rest))),
            Some(list) => {
                let mut depth = 0;
                let mut item = String::new();
                for character in list.chars() {
                    match character {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => drop(found.insert(name(std::mem::take(&mut item).trim()))),
                        _ => {}
                    }
                    if depth == 0 && character != ',' {
                        item.push(character);
                    }
                }
                found.insert(name(item.trim()));
            }
        }
    }
    found.remove("");
    found
}

#[test]
fn no_module_uses_one_above_it() {
    let order: Vec<&str> = ORDER.into_iter().chain(GROUND).collect();
    let rank = |name: &str| order.iter().position(|module| *module == name);
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = BTreeSet::new();
    let mut against = Vec::new();
    for path in rust_files(&sources) {
        let relative = path.strip_prefix(&sources).unwrap();
        let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = first.trim_end_matches(".rs").trim_end_matches("_tests").to_owned();
        if module == "lib" {
            continue;
        }
        let own = rank(&module).unwrap_or_else(|| panic!("{module} has no place in the order of modules"));
        for used in used(&fs::read_to_string(&path).unwrap()) {
            match rank(&used) {
                Some(other) if other < own => against.push(format!("{} uses {used}", relative.display())),
                Some(_) => {}
                None => against.push(format!("{} uses crate::{used}, which is no module", relative.display())),
            }
        }
        seen.insert(module);
    }
    assert!(against.is_empty(), "against the order: {against:#?}");
    assert_eq!(seen.len(), order.len(), "a module of the order is gone");
}

#[test]
fn imports_are_found_in_all_their_forms() {
    let text = "use crate::{a, b::{c, d}, e::F};\nuse crate::g::H;\n// crate::comment\nlet x = crate::i::j();\n";
    assert_eq!(used(text), ["a", "b", "e", "g", "i"].map(str::to_owned).into());
}
