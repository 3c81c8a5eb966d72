//! How results are shown: columns for people, JSON or YAML for programs.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, SystemTime};

use clap::{Args, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::errors::Failure;
use crate::terminal;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns; on a terminal as wide as it is.
    #[value(alias = "text")]
    Table,
    Json,
    Yaml,
}

#[derive(Debug, Clone, Copy, Args)]
pub struct OutputOptions {
    /// How to show results [default: table].
    #[arg(short = 'o', long, global = true, value_name = "FORMAT", help_heading = "Output")]
    output: Option<Format>,
    /// The same as `--output json`.
    #[arg(long, global = true, conflicts_with = "output", help_heading = "Output")]
    json: bool,
}

impl OutputOptions {
    pub fn screen(self) -> Screen {
        let format = match self.json {
            true => Format::Json,
            false => self.output.unwrap_or(Format::Table),
        };
        Screen { format, terminal: io::stdout().is_terminal() }
    }
}

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    pub format: Format,
    terminal: bool,
}

/// Named values of one thing, in the order in which they are shown.
pub type Fields = Vec<(&'static str, String)>;

impl Screen {
    /// Several things: a table with a line each, or an array.
    pub fn list<T: Serialize>(
        self,
        items: &[T],
        headings: &[&str],
        cells: impl Fn(&T) -> Vec<String>,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => print(&table(headings, items.iter().map(cells), self.terminal)),
            _ => self.value(&items),
        }
    }

    /// One thing: a line for each of its fields that has something to say, or an object.
    pub fn item<T: Serialize>(self, item: &T, fields: impl FnOnce(&T) -> Fields) -> Result<(), Failure> {
        match self.format {
            Format::Table => print(&lines(&fields(item))),
            _ => self.value(item),
        }
    }

    /// What was done: a sentence, or the object that it was done to.
    pub fn done<T: Serialize>(self, item: &T, sentence: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        match self.format {
            Format::Table => print(&format!("{}\n", printable(&sentence(item)))),
            _ => self.value(item),
        }
    }

    fn value<T: Serialize>(self, value: &T) -> Result<(), Failure> {
        let text = match self.format {
            Format::Yaml => serde_saphyr::to_string(value).map_err(|error| error.to_string()),
            _ => serde_json::to_string_pretty(value).map_err(|error| error.to_string()),
        };
        let text = text.expect("what servers answer is made of strings, numbers, lists and maps with string keys");
        print(&format!("{}\n", text.trim_end()))
    }

    /// One line of a stream of things, at once.
    pub fn line<T: Serialize>(self, item: &T, text: impl FnOnce(&T) -> String) -> Result<(), Failure> {
        match self.format {
            Format::Table => print(&format!("{}\n", printable(&text(item)))),
            Format::Json => {
                let json = serde_json::to_string(item).expect("strings, numbers, and maps with string keys");
                print(&format!("{json}\n"))
            }
            Format::Yaml => {
                let yaml = serde_saphyr::to_string(item).expect("strings, numbers, and maps with string keys");
                print(&format!("---\n{}\n", yaml.trim_end()))
            }
        }
    }
}

/// Writes all of it to stdout now.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| Failure::printing(&error))
}

fn table(headings: &[&str], rows: impl Iterator<Item = Vec<String>>, on_terminal: bool) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    // Programs that read columns want them whole; people want lines that do not wrap in the middle.
    match terminal::size().filter(|_| on_terminal) {
        Some((_, columns)) => table.set_content_arrangement(ContentArrangement::Dynamic).set_width(columns),
        None => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    table.set_header(headings);
    for row in rows {
        table.add_row(row.iter().map(|cell| printable(if cell.is_empty() { "-" } else { cell })));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

fn lines(fields: &Fields) -> String {
    let told = || fields.iter().filter(|(_, value)| !value.is_empty());
    let width = told().map(|(name, _)| name.len() + 1).max().unwrap_or_default();
    told().map(|(name, value)| format!("{:width$} {}\n", format!("{name}:"), printable(value))).collect()
}

/// Names and messages come from others: what would steer a terminal is shown, not obeyed.
pub fn printable(text: &str) -> String {
    let steers = |character: char| character.is_control() && character != '\t';
    match text.chars().any(steers) {
        false => text.to_owned(),
        true => text
            .chars()
            .map(|character| if steers(character) { character.escape_default().to_string() } else { character.into() })
            .collect(),
    }
}

/// Whether stderr may be coloured: it is a terminal and `NO_COLOR` is not set.
pub fn stderr_colour() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !unwanted && io::stderr().is_terminal()
}

/// A moment in UTC, to the second.
pub fn moment(time: Option<SystemTime>) -> String {
    time.map(|time| humantime::format_rfc3339_seconds(time).to_string()).unwrap_or_default()
}

/// How long ago, in its largest unit.
pub fn age(time: Option<SystemTime>) -> String {
    let Some(time) = time else { return String::new() };
    let seconds = SystemTime::now().duration_since(time).unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// A time span as a person would say it.
pub fn span(time: Duration) -> String {
    match time.as_secs() {
        0 => format!("{} ms", time.as_millis()),
        1..60 => format!("{:.1} s", time.as_secs_f64()),
        seconds => humantime::format_duration(Duration::from_secs(seconds)).to_string(),
    }
}

/// Bytes in the largest binary unit that leaves a number of at least one.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match value.fract() < 0.05 || unit == 0 {
        true => format!("{value:.0} {}", UNITS[unit]),
        false => format!("{value:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_columns_without_borders() {
        let rows = vec![vec!["1".to_owned(), "a name".to_owned()], vec!["22".to_owned(), String::new()]];
        assert_eq!(table(&["ID", "NAME"], rows.into_iter(), false), "ID  NAME\n1   a name\n22  -\n");
        assert_eq!(table(&["ID"], std::iter::empty(), false), "ID\n");
    }

    #[test]
    fn fields_without_a_value_are_left_out() {
        let fields = vec![("id", "1".to_owned()), ("name", String::new()), ("state", "running".to_owned())];
        assert_eq!(lines(&fields), "id:    1\nstate: running\n");
    }

    #[test]
    fn what_steers_a_terminal_is_shown() {
        assert_eq!(printable("plain é"), "plain é");
        assert_eq!(printable("a\x1b[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
    }

    #[test]
    fn numbers_are_short() {
        let cases =
            [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1 MiB"), (1_500_000, "1.4 MiB"), (20_000_000_000, "18.6 GiB")];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(span(Duration::from_millis(12)), "12 ms");
        assert_eq!(span(Duration::from_millis(1260)), "1.3 s");
        assert_eq!(span(Duration::from_secs(5400)), "1h 30m");
        assert_eq!(moment(Some(SystemTime::UNIX_EPOCH)), "1970-01-01T00:00:00Z");
        assert_eq!(moment(None), "");
    }
}
