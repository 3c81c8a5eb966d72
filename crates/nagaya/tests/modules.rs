//! The modules of a crate depend on each other in one direction, as crates do; see ARCHITECTURE.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Directories of modules. In each, a module uses only those that stand after it; what lies in a directory of its own counts
/// as one module. Nothing uses what holds the directory, which is the top.
const ORDERS: [(&str, &[&str]); 9] = [
    (
        "engine/src",
        &[
            "fake",
            "engine",
            "dispatch",
            "recovery",
            "engine_core",
            "sessions",
            "explain",
            "actor",
            "executions",
            "egress",
            "previews",
            "open",
            "snapshots",
            "volumes",
            "images",
            "event_log",
            "registry",
            "workspaces",
            "validate",
            "query",
            "shared",
            "handle",
            "requests",
            "access",
            "session",
            "deadlines",
            "tasks",
            "errors",
            "backoff",
            "config",
            "ports",
            "model",
        ],
    ),
    (
        "daemon/src",
        &[
            "server", "config", "tenki", "nagaya", "facade", "download", "rpc", "waiting", "wire", "metrics", "budget",
            "host",
        ],
    ),
    ("daemon/src/wire", &["connection", "instrument", "body", "outcome", "rechunk", "measured", "lifecycle", "limits"]),
    (
        "daemon/src/tenki",
        &[
            "facade",
            "zero_copy",
            "services",
            "tunnel",
            "dial",
            "run",
            "wait",
            "data",
            "files",
            "git",
            "control",
            "snapshots",
            "volumes",
            "ports",
            "previews",
            "settings",
            "ssh",
            "service",
            "answers",
            "messages",
            "certificate",
            "ranges",
            "resources",
            "limits",
        ],
    ),
    ("daemon/src/nagaya", &["facade", "services", "forks", "facts", "egress", "images", "service"]),
    ("daemon/src/rpc", &["service", "parse", "convert", "auth"]),
    ("runtime/src", &["doctor", "namespace", "host", "agent_client", "spawner", "programs", "cgroup", "sys"]),
    ("runtime/src/namespace", &["start", "stop", "usage", "pause", "events", "core", "slots", "running"]),
    (
        "runtime/src/host",
        &[
            "config",
            "locks",
            "volumes",
            "disk_images",
            "record",
            "disk",
            "ext4_image",
            "storage",
            "host_image",
            "network",
            "numbers",
            "brake",
            "capacity",
            "ceilings",
            "errors",
        ],
    ),
];

/// The engine's subsystems from the bottom up, each with those that it is given. The base of all, `shared`, is not named.
const SUBSYSTEMS: [(&str, &[&str]); 9] = [
    ("workspaces", &[]),
    ("registry", &[]),
    ("event_log", &["registry"]),
    ("images", &["registry"]),
    ("volumes", &["registry", "workspaces"]),
    ("snapshots", &["event_log", "registry", "volumes", "workspaces"]),
    ("previews", &["registry"]),
    ("actor", &["event_log", "images", "previews", "registry", "snapshots", "volumes"]),
    ("sessions", &["actor", "event_log", "images", "registry", "snapshots", "volumes", "workspaces"]),
];

/// Directories of the daemon, each a façade. None uses another.
const FACADES: [&str; 2] = ["nagaya", "tenki"];

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// Paths in code that begin with this word, imports of several in braces included, as the names that follow it.
fn paths(text: &str, word: &str) -> BTreeSet<Vec<String>> {
    let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices(word) {
        let before = code[..at].chars().next_back();
        if before.is_none_or(|before| !before.is_alphanumeric() && before != '_' && before != ':') {
            follow(&code[at + word.len()..], Vec::new(), &mut found);
        }
    }
    found
}

/// Reads what may follow a name in a path, and returns what comes after it.
fn follow<'a>(text: &'a str, path: Vec<String>, found: &mut BTreeSet<Vec<String>>) -> &'a str {
    let Some(rest) = text.strip_prefix("::") else {
        found.insert(path);
        return text;
    };
    if let Some(mut rest) = rest.strip_prefix('{') {
        loop {
            rest = rest.trim_start_matches([',', ' ', '\n']);
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            rest = name_and_more(rest, path.clone(), found);
            // What is left of an item is another name for it.
            let Some(end) = rest.find([',', '}']) else { return "" };
            rest = &rest[end..];
        }
    }
    name_and_more(rest, path, found)
}

fn name_and_more<'a>(text: &'a str, mut path: Vec<String>, found: &mut BTreeSet<Vec<String>>) -> &'a str {
    let length = text.find(|character: char| !character.is_alphanumeric() && character != '_').unwrap_or(text.len());
    if length == 0 {
        // All that is in there.
        found.insert(path);
        return text;
    }
    path.push(text[..length].to_owned());
    follow(&text[length..], path, found)
}

/// The modules of a directory that its file at `relative` uses, and whether it uses their holder itself.
fn used(text: &str, directory: &[&str], relative: &Path, modules: &BTreeSet<&str>) -> (BTreeSet<String>, bool) {
    // A test may use anything.
    let text = text.split("\n#[cfg(test)]\nmod ").next().unwrap_or_default();
    let mut found = BTreeSet::new();
    let mut holder = false;
    for path in paths(text, "crate") {
        let Some(rest) = path.strip_prefix(&directory.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()[..])
        else {
            continue;
        };
        match rest.first() {
            Some(name) if modules.contains(name.as_str()) => drop(found.insert(name.clone())),
            Some(_) => holder = true,
            None => {}
        }
    }
    // As many `super` as lead from the file to the directory; with fewer, a file further below stays in its own module.
    let further = relative.components().count() - usize::from(relative.ends_with("mod.rs")) - 1;
    for path in paths(text, "super") {
        let Some((up, rest)) = path.split_at_checked(further) else { continue };
        match rest.first() {
            _ if up.iter().any(|name| name != "super") => {}
            Some(name) if modules.contains(name.as_str()) => drop(found.insert(name.clone())),
            Some(name) if name == "super" => {}
            Some(_) => holder = true,
            None => {}
        }
    }
    (found, holder)
}

#[test]
fn no_module_uses_one_above_it() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut against = Vec::new();
    for (place, order) in ORDERS {
        let rank: BTreeMap<&str, usize> = order.iter().copied().zip(0..).collect();
        let modules: BTreeSet<&str> = order.iter().copied().collect();
        assert_eq!(modules.len(), order.len(), "{place} names a module twice");
        let directory: Vec<&str> = place.split('/').skip(2).collect();
        let mut seen = BTreeSet::new();
        for path in rust_files(&crates.join(place)) {
            let relative = path.strip_prefix(crates.join(place)).unwrap().to_owned();
            let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
            let module = first.trim_end_matches(".rs").trim_end_matches("_tests");
            if matches!(module, "lib" | "mod") {
                continue;
            }
            let Some(own) = rank.get(module) else { panic!("{module} has no place in the order of {place}") };
            let (used, holder) = used(&fs::read_to_string(&path).unwrap(), &directory, &relative, &modules);
            for used in used {
                if rank[used.as_str()] < *own {
                    against.push(format!("{place}/{} uses {used}", relative.display()));
                }
            }
            if holder {
                against.push(format!("{place}/{} uses what holds it", relative.display()));
            }
            seen.insert(module.to_owned());
        }
        assert_eq!(seen.len(), order.len(), "a module of {place} is gone: {seen:?}");
    }
    assert!(against.is_empty(), "against the order: {against:#?}");
}

#[test]
fn a_subsystem_uses_those_that_it_is_given_and_no_other() {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("engine/src");
    let modules: BTreeSet<&str> = SUBSYSTEMS.iter().map(|(name, _)| *name).collect();
    for (name, given) in SUBSYSTEMS {
        let mut all = BTreeSet::new();
        for path in rust_files(&engine) {
            let relative = path.strip_prefix(&engine).unwrap();
            let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
            if first.trim_end_matches(".rs") == name {
                all.extend(used(&fs::read_to_string(&path).unwrap(), &[], relative, &modules).0);
            }
        }
        all.remove(name);
        let given: BTreeSet<String> = given.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(all, given, "what {name} uses, and what it is given");
    }
}

#[test]
fn no_facade_uses_another() {
    let daemon = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("daemon/src");
    for facade in FACADES {
        let others: BTreeSet<&str> = FACADES.into_iter().filter(|other| *other != facade).collect();
        let files = rust_files(&daemon.join(facade));
        assert!(!files.is_empty(), "{facade} has no files");
        for path in files {
            let text = fs::read_to_string(&path).unwrap();
            let (used, _) = used(&text, &[], Path::new("far/below.rs"), &others);
            assert!(used.is_empty(), "{} uses {used:?}", path.display());
        }
    }
}

#[test]
fn paths_are_found_in_all_their_forms() {
    let text = "use crate::{a, b::{c, d as x}, e::F};\nuse crate::g::*;\n// crate::comment\nlet x = crate::i::j();\nother::crate::k;\n";
    let found: BTreeSet<String> = paths(text, "crate").into_iter().map(|path| path.join("/")).collect();
    assert_eq!(found, ["a", "b/c", "b/d", "e/F", "g", "i/j"].map(str::to_owned).into());
    let modules = ["facade", "wire"].into();
    let seen = |text: &str, file: &str| used(text, &["tenki"], Path::new(file), &modules);
    assert_eq!(seen("use crate::tenki::wire::A; use crate::other;", "x.rs"), (["wire".to_owned()].into(), false));
    assert_eq!(seen("use super::facade;", "x.rs"), (["facade".to_owned()].into(), false));
    assert_eq!(seen("use super::{Thing, wire};", "x.rs"), (["wire".to_owned()].into(), true));
    assert_eq!(seen("use super::Thing;", "x/y.rs"), (BTreeSet::new(), false));
    assert_eq!(seen("use super::wire;", "x/mod.rs"), (["wire".to_owned()].into(), false));
    assert_eq!(seen("use super::super::{Thing, wire};", "x/y.rs"), (["wire".to_owned()].into(), true));
    assert_eq!(seen("#[cfg(test)]\nmod tests { use super::Thing; }", "x.rs").0, BTreeSet::new());
}
