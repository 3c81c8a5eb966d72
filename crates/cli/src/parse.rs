//! Words of the command line that are more than words: durations, sizes, pairs, mounts, copies.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use nagaya_api::names;
use nagaya_client::constants::{GB, GIB, KB, KIB, MB, MIB, TB, TIB};
use nagaya_client::{VolumeMount, WakeOnVisit};

/// A time span such as `30s`, `2m` or `1h30m`; `0` is none at all.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "write a time span with units, such as 30s, 2m or 1h30m".to_owned())
}

/// A time span of at least one minute and whole minutes, or `0` for never.
pub fn minutes(text: &str) -> Result<Duration, String> {
    let span = duration(text)?;
    match span.subsec_nanos() == 0 && span.as_secs().is_multiple_of(60) {
        true => Ok(span),
        false => Err("the server counts whole minutes here: write 15m or 1h30m, or 0 for never".to_owned()),
    }
}

/// A moment such as `2027-03-20T12:00:00Z`.
pub fn moment(text: &str) -> Result<SystemTime, String> {
    humantime::parse_rfc3339(text).map_err(|_| "write a moment in UTC, such as 2027-03-20T12:00:00Z".to_owned())
}

/// A size with its unit, in bytes: decimal (`20GB`) or binary (`20GiB`).
pub fn size(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("kib", KIB),
        ("mib", MIB),
        ("gib", GIB),
        ("tib", TIB),
        ("kb", KB),
        ("mb", MB),
        ("gb", GB),
        ("tb", TB),
        ("b", 1),
    ];
    let lower = text.trim().to_lowercase();
    let unit = UNITS.iter().find_map(|(name, factor)| Some((lower.strip_suffix(name)?.trim_end(), *factor)));
    let Some((number, factor)) = unit else {
        return Err("a size needs a unit: write 20GB or 20GiB".to_owned());
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| "write a whole number and a unit, such as 512MiB or 20GB".to_owned())
}

/// Which visits resume a session that is stopped.
pub fn visits(text: &str) -> Result<WakeOnVisit, String> {
    let known = [WakeOnVisit::Never, WakeOnVisit::Idle, WakeOnVisit::Always];
    known.into_iter().find(|of| of.to_string() == text).ok_or_else(|| "write never, idle or always".to_owned())
}

/// `KEY=VALUE`; the value may be empty and may hold further equals signs.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// `VOLUME:PATH`, `VOLUME:PATH:ro` or `VOLUME:PATH:rw`.
pub fn mount(text: &str) -> Result<VolumeMount, String> {
    let wrong = || "write VOLUME:PATH or VOLUME:PATH:ro, with an absolute path".to_owned();
    let (volume_id, place) = text.split_once(':').ok_or_else(wrong)?;
    let (mount_path, read_only) = match place.rsplit_once(':') {
        Some((path, "ro")) => (path, true),
        Some((path, "rw")) => (path, false),
        _ => (place, false),
    };
    if volume_id.is_empty() || !mount_path.starts_with('/') {
        return Err(wrong());
    }
    Ok(VolumeMount { volume_id: volume_id.to_owned(), mount_path: mount_path.to_owned(), read_only })
}

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Local(PathBuf),
    /// In a sandbox: its session, where the text names one, and a path.
    Sandbox {
        session: Option<String>,
        path: String,
    },
}

/// `SESSION:PATH`, `:PATH` in the default session, or a path on this machine. What has a slash before its first
/// colon is a path, as with scp.
///
/// Names are any bytes; those in a sandbox are written as the API has them.
pub fn place(text: OsString) -> Result<Place, String> {
    let local = || Ok(Place::Local(PathBuf::from(&text)));
    match names::to_text(text.as_bytes()).split_once(':') {
        Some((session, _)) if session.contains('/') => local(),
        Some((_, "")) => Err("a path must follow the colon; `SESSION:.` is the home directory".to_owned()),
        Some((session, path)) => {
            let session = (!session.is_empty()).then(|| session.to_owned());
            Ok(Place::Sandbox { session, path: path.to_owned() })
        }
        None if text.is_empty() => Err("a path must not be empty".to_owned()),
        None => local(),
    }
}

/// The number that shells add 128 to, for the signal names that servers report; 0 for unknown ones.
pub fn signal_number(name: &str) -> u8 {
    const NUMBERS: [(&str, u8); 18] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("XCPU", 24),
        ("XFSZ", 25),
        ("SYS", 31),
    ];
    let bare = name.strip_prefix("SIG").unwrap_or(name);
    NUMBERS.iter().find(|(known, _)| *known == bare).map_or(0, |(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn durations_have_units() {
        let seconds = |text| duration(text).map(|span| span.as_secs()).ok();
        let cases =
            [("30s", Some(30)), ("2m", Some(120)), ("1h30m", Some(5400)), ("0", Some(0)), ("1h 5s", Some(3605))];
        for (text, expected) in cases {
            assert_eq!(seconds(text), expected, "{text}");
        }
        for text in ["", "30", "m", "-5s", "5 parsecs", "1e9h", "99999999999999999999s"] {
            assert_eq!(seconds(text), None, "{text}");
        }
        assert!(minutes("90s").is_err());
        assert_eq!(minutes("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(minutes("0"), Ok(Duration::ZERO));
    }

    #[test]
    fn sizes_need_units() {
        let cases = [
            ("20GB", Some(20_000_000_000)),
            ("1gib", Some(1 << 30)),
            ("512 MiB", Some(512 << 20)),
            ("7b", Some(7)),
            ("20", None),
            ("GB", None),
            ("0GB", None),
            ("-1GB", None),
            ("1.5GB", None),
            ("99999999999TB", None),
            ("20XB", None),
        ];
        for (text, expected) in cases {
            assert_eq!(size(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn pairs_split_at_the_first_equals_sign() {
        assert_eq!(pair("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(pair("A="), Ok(("A".into(), String::new())));
        assert!(pair("A").is_err() && pair("=b").is_err() && pair("").is_err());
    }

    #[test]
    fn mounts_name_a_volume_and_an_absolute_path() {
        let read = |text| mount(text).map(|m| (m.volume_id, m.mount_path, m.read_only)).ok();
        assert_eq!(read("v:/data"), Some(("v".into(), "/data".into(), false)));
        assert_eq!(read("v:/data:ro"), Some(("v".into(), "/data".into(), true)));
        assert_eq!(read("v:/data:rw"), Some(("v".into(), "/data".into(), false)));
        assert_eq!(read("v:/odd:name"), Some(("v".into(), "/odd:name".into(), false)));
        for text in ["v", "v:", "v:data", ":/data", ""] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn places_are_told_apart_as_scp_does() {
        let place = |text: &str| place(text.into());
        let sandbox = |session: Option<&str>, path: &str| {
            Ok(Place::Sandbox { session: session.map(str::to_owned), path: path.to_owned() })
        };
        assert_eq!(place("box:/etc/hosts"), sandbox(Some("box"), "/etc/hosts"));
        assert_eq!(place(":notes.txt"), sandbox(None, "notes.txt"));
        assert_eq!(place("box:a:b"), sandbox(Some("box"), "a:b"));
        assert_eq!(place("./a:b"), Ok(Place::Local("./a:b".into())));
        assert_eq!(place("/tmp/x"), Ok(Place::Local("/tmp/x".into())));
        assert!(place("box:").is_err() && place("").is_err());
    }

    #[test]
    fn places_have_any_bytes_in_their_names() {
        let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        let inside = Place::Sandbox { session: Some("box".into()), path: "caf\u{efe9}".into() };
        assert_eq!(place(text(b"box:caf\xe9")), Ok(inside));
        assert_eq!(place(text(b"caf\xe9")), Ok(Place::Local(text(b"caf\xe9").into())));
    }

    #[test]
    fn signals_have_their_numbers() {
        assert_eq!((signal_number("SIGKILL"), signal_number("TERM"), signal_number("SIGWHAT")), (9, 15, 0));
    }
}
