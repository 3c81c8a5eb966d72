//! `docs/configuration.md`, made of the descriptions that settings have where they are declared.

use std::fmt::Write;
use std::path::Path;

use clap::Args;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::{Config, Flags, host, namespace};

const WRITE: &str = "NAGAYA_WRITE_DOCS";
const COMMAND: &str = "NAGAYA_WRITE_DOCS=1 cargo test --workspace --bin nagaya configuration_md";

const INTRODUCTION: &str = "\
`nagaya serve --config FILE`, or `NAGAYA_CONFIG=FILE`, reads TOML. Everything has a default but what its table says must be
given, and an unknown key is an error. Some settings have a flag and an environment variable too; a flag wins over the
environment, and that over the file.

`NAGAYA_LOG` says what the server tells on standard error: `error`, `warn`, `info` (the default), `debug` or `trace`, also for
single modules, e.g. `info,nagaya_runtime=debug`.
";

struct Section {
    /// Empty for what stands before the first section.
    name: String,
    text: String,
    settings: Vec<Setting>,
}

struct Setting {
    /// Without its section.
    key: String,
    schema: Value,
    is_required: bool,
}

fn schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<T>().to_value()
}

/// All sections, in the order of [`Config::keys`].
fn sections() -> Vec<Section> {
    let mut found = Vec::new();
    for part in [
        schema::<nagaya_daemon::config::Config>(),
        schema::<Config>(),
        schema::<host::Config>(),
        schema::<namespace::Config>(),
    ] {
        read("", &part, &mut found);
    }
    let keys = Config::keys();
    let rank = |section: &Section| {
        let first = section.name.split('.').next().unwrap_or_default();
        (keys.iter().position(|key| *key == first), section.name.clone())
    };
    found.sort_by_key(rank);
    // What belongs to several parts stands at the top.
    found.iter_mut().for_each(|section| section.settings.sort_by(|one, other| one.key.cmp(&other.key)));
    // One that only holds others.
    found.retain(|section| !section.settings.is_empty());
    found
}

fn read(name: &str, schema: &Value, found: &mut Vec<Section>) {
    let at = found.iter().position(|section| section.name == name).unwrap_or_else(|| {
        let text = if name.is_empty() { String::new() } else { description(name, schema) };
        found.push(Section { name: name.to_owned(), text, settings: Vec::new() });
        found.len() - 1
    });
    for (key, property) in schema["properties"].as_object().into_iter().flatten() {
        if property["properties"].is_object() {
            read(&join(name, key), property, found);
        } else {
            let is_required = schema["required"].as_array().is_some_and(|names| names.iter().any(|name| name == key));
            found[at].settings.push(Setting { key: key.clone(), schema: property.clone(), is_required });
        }
    }
}

fn join(section: &str, key: &str) -> String {
    if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") }
}

fn description(name: &str, schema: &Value) -> String {
    let text =
        schema["description"].as_str().unwrap_or_else(|| panic!("{name} has no description where it is declared"));
    text.replace('\n', " ").replace('|', "\\|")
}

/// What the description says of a default that is no value, and what it says before.
fn split_default(text: &str) -> (&str, Option<&str>) {
    match text.split_once(" Default: ") {
        Some((text, default)) => (text, Some(default.trim_end_matches('.'))),
        None => (text, None),
    }
}

fn kind(schema: &Value) -> String {
    if let Some(choices) = schema["oneOf"].as_array() {
        let choices: Vec<String> = choices.iter().map(|choice| format!("`{}`", choice["const"])).collect();
        return choices.join(" or ");
    }
    let named = schema["type"].as_str().or_else(|| schema["type"][0].as_str());
    match named.expect("every setting has a type") {
        "boolean" => "true or false".to_owned(),
        "integer" => "number".to_owned(),
        "array" => format!("list of {}s", kind_of_items(schema)),
        "string" => "text".to_owned(),
        "object" => format!("table of {}s", kind(&schema["additionalProperties"])),
        other => panic!("no word for the type {other}"),
    }
}

fn kind_of_items(schema: &Value) -> String {
    kind(&schema["items"])
}

/// The unit is part of a number's name.
fn unit(key: &str) -> &'static str {
    let has = |word: &str| key.split('_').any(|part| part == word);
    let units = [("ms", "ms"), ("mb", "MiB"), ("minutes", "minutes"), ("per", "bytes/s"), ("bytes", "bytes")];
    // Of `message_bytes_per_s_min` it is the rate; `streams_per_connection_max` has none.
    let is_unit = |(word, _): &&(&str, &str)| has(word) && (*word != "per" || has("bytes"));
    units.iter().find(is_unit).map_or("", |(_, unit)| unit)
}

/// A large number in larger units, where it is a whole number of them.
fn in_larger_units(number: u64, unit: &str) -> Option<String> {
    let units: &[(u64, &str)] = match unit {
        "bytes" | "bytes/s" => &[(1 << 20, "MiB"), (1 << 10, "KiB")],
        "ms" => &[(86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")],
        _ => &[],
    };
    let (size, name) = units.iter().find(|(size, _)| number >= *size && number.is_multiple_of(*size))?;
    Some(format!("{} {name}", number / size))
}

fn default(setting: &Setting, name: &str, said: Option<&str>) -> String {
    if setting.is_required {
        return "must be given".to_owned();
    }
    if let Some(said) = said {
        return said.to_owned();
    }
    let value = &setting.schema["default"];
    assert!(
        !value.is_null(),
        "{name} has no default; say what it means to leave it out: `Default: …` in its description"
    );
    let larger = value.as_u64().and_then(|number| in_larger_units(number, unit(&setting.key)));
    format!("`{value}`{}", larger.map(|larger| format!(" ({larger})")).unwrap_or_default())
}

/// The flag and the variable that set it too, by the flag's name: the setting's, with `_` for the dot.
fn other_ways(name: &str, flags: &clap::Command) -> Option<String> {
    let flag = flags.get_arguments().find(|flag| flag.get_id().as_str() == name.replace('.', "_"))?;
    let variable = flag.get_env().and_then(|variable| variable.to_str()).expect("every flag has its variable");
    Some(format!("Also `--{}`, `{variable}`.", flag.get_long().expect("every flag has a name")))
}

fn document() -> String {
    let flags = Flags::augment_args(clap::Command::new("nagaya"));
    let mut text = format!(
        "<!-- Made of the settings' descriptions in the sources. To change it, change those and run\n{COMMAND} -->\n\n"
    );
    write!(text, "# Configuration\n\n{INTRODUCTION}").unwrap();
    let mut with_flag = 0;
    for section in sections() {
        if section.name.is_empty() {
            text += "\n## At the top\n\nBefore the first section.\n";
        } else {
            write!(text, "\n## `[{}]`\n\n{}\n", section.name, section.text).unwrap();
        }
        text += "\n| key | type | unit | default | what |\n|---|---|---|---|---|\n";
        for setting in &section.settings {
            let name = join(&section.name, &setting.key);
            let described = description(&name, &setting.schema);
            let (what, said) = split_default(&described);
            let mut what = vec![what.to_owned()];
            for choice in setting.schema["oneOf"].as_array().into_iter().flatten() {
                what.push(format!("`{}`: {}", choice["const"], description(&name, choice)));
            }
            let other_ways = other_ways(&name, &flags);
            with_flag += usize::from(other_ways.is_some());
            what.extend(other_ways);
            let (kind, unit) = (kind(&setting.schema), unit(&setting.key));
            let default = default(setting, &name, said);
            writeln!(text, "| `{}` | {kind} | {unit} | {default} | {} |", setting.key, what.join(" ")).unwrap();
        }
    }
    assert_eq!(with_flag + 1, flags.get_arguments().count(), "a flag other than --config is no setting's");
    text
}

#[test]
fn docs_configuration_md_says_what_the_sources_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let document = document();
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, &document).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == document,
        "docs/configuration.md is not what the settings' descriptions say; write it with\n{COMMAND}"
    );
}

#[test]
fn every_key_of_the_file_is_documented() {
    let sections = sections();
    for key in Config::keys() {
        let is_section = |section: &Section| section.name.split('.').next() == Some(key);
        let is_setting = |section: &Section| section.name.is_empty() && section.settings.iter().any(|at| at.key == key);
        assert!(sections.iter().any(|section| is_section(section) || is_setting(section)), "{key}");
    }
}
