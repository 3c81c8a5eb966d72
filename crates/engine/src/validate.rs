//! What callers may write into records. Violations change nothing and name the field.
//!
//! These are the server's own bounds: they keep records small and safe to show, whoever asks. A family of clients may promise
//! less; that is for its façade to check before it asks.

use std::collections::BTreeMap;

use nagaya_api::error::{Code, Error};

use crate::config::EngineConfig;
use crate::model::{Resources, UnixMs};
use crate::ports::Command;

/// In which disks and memory are given out.
const BLOCK_BYTES: u64 = 4096;
/// Of the memory or the disk of a sandbox, or of a volume. What there really is, is for the host to say; this keeps sums of them in
/// their numbers.
const BYTES_MAX: u64 = 64 << 40;
/// Thousandths of a processor.
const CPU_MILLIS_MAX: u32 = 1_024_000;
/// Bytes in the name of a session, snapshot or volume.
pub(crate) const NAME_BYTES_MAX: usize = 256;
/// Tags of one of them, and bytes in each.
const TAGS_MAX: usize = 64;
const TAG_BYTES_MAX: usize = 128;
/// Bytes in the path of a mount, as the kernel has it.
const MOUNT_PATH_BYTES_MAX: usize = 4_096;
/// Characters in the slug of a preview, as in any DNS label.
const SLUG_CHARS: std::ops::RangeInclusive<usize> = 1..=63;

fn invalid(detail: impl Into<String>) -> Error {
    Error::new(Code::InvalidArgument, detail)
}

/// The name of a session, snapshot or volume: at most 256 bytes, none of them a control character. May be empty.
pub fn name(name: &str) -> Result<(), Error> {
    if name.len() > NAME_BYTES_MAX {
        return Err(invalid(format!("name has more than {NAME_BYTES_MAX} bytes")));
    }
    if name.chars().any(char::is_control) {
        return Err(invalid("name holds a control character"));
    }
    Ok(())
}

/// The name of a session, which it may have to be found by.
pub fn session_name(text: &str, is_unique: bool) -> Result<(), Error> {
    if is_unique && text.is_empty() {
        return Err(invalid("a name that is unique must not be empty"));
    }
    name(text)
}

/// Tags without their duplicates, in the order given: at most 64 of 1 to 128 bytes, none of them a control character.
pub fn tags(tags: Vec<String>) -> Result<Vec<String>, Error> {
    if tags.len() > TAGS_MAX {
        return Err(invalid(format!("more than {TAGS_MAX} tags")));
    }
    let mut kept: Vec<String> = Vec::with_capacity(tags.len());
    for tag in tags {
        if !(1..=TAG_BYTES_MAX).contains(&tag.len()) || tag.chars().any(char::is_control) {
            return Err(invalid(format!(
                "tags must have 1 to {TAG_BYTES_MAX} bytes, none of them a control character"
            )));
        }
        if !kept.contains(&tag) {
            kept.push(tag);
        }
    }
    Ok(kept)
}

/// Resources of a sandbox.
pub fn resources(resources: &Resources) -> Result<(), Error> {
    let refuse = |detail: &str| Err(Error::new(Code::InvalidResources, detail));
    if resources.cpu_millis == 0 || resources.memory_bytes == 0 || resources.disk_bytes == 0 {
        return refuse("a sandbox needs processor time, memory and a disk");
    }
    if !resources.disk_bytes.is_multiple_of(BLOCK_BYTES) || !resources.memory_bytes.is_multiple_of(BLOCK_BYTES) {
        return refuse("memory and disk are multiples of 4096 bytes");
    }
    if resources.cpu_millis > CPU_MILLIS_MAX || resources.memory_bytes.max(resources.disk_bytes) > BYTES_MAX {
        return refuse("a sandbox has at most 1024 processors, 64 TiB of memory and 64 TiB of disk");
    }
    Ok(())
}

/// An environment the kernel can hand to a program.
pub fn env(env: &BTreeMap<String, String>, config: &EngineConfig) -> Result<(), Error> {
    let refuse = |detail: &str| Err(Error::new(Code::InvalidCommand, detail));
    if env.keys().any(|key| key.is_empty() || key.contains(['=', '\0'])) {
        return refuse("env names must not be empty or hold '=' or NUL");
    }
    if env.values().any(|value| value.contains('\0')) {
        return refuse("env values must not hold NUL");
    }
    if pairs_bytes(env) > config.env_bytes_max {
        return refuse("env is larger than env_bytes_max");
    }
    Ok(())
}

/// Metadata is free text up to a size.
pub fn metadata(metadata: &BTreeMap<String, String>, config: &EngineConfig) -> Result<(), Error> {
    if pairs_bytes(metadata) > config.metadata_bytes_max {
        return Err(invalid("metadata is larger than metadata_bytes_max"));
    }
    Ok(())
}

fn pairs_bytes(pairs: &BTreeMap<String, String>) -> usize {
    pairs.iter().map(|(key, value)| key.len() + value.len() + 2).sum()
}

/// Lines of an `authorized_keys` file, without what the text of a `.pub` file has around its one line.
pub fn ssh_authorized_keys(keys: Vec<String>, config: &EngineConfig) -> Result<Vec<String>, Error> {
    if keys.len() > config.ssh_authorized_keys_max {
        return Err(invalid("more keys than ssh_authorized_keys_max"));
    }
    let keys: Vec<String> = keys.iter().map(|key| ssh_key_line(key).to_owned()).collect();
    if keys.iter().any(String::is_empty) {
        return Err(invalid("ssh_authorized_keys must not hold empty lines"));
    }
    if keys.iter().any(|key| key.len() > 8_192 || key.contains(['\n', '\r', '\0'])) {
        return Err(invalid("ssh_authorized_keys must be single lines of at most 8192 bytes"));
    }
    Ok(keys)
}

/// The line in the text of a `.pub` file: editors leave line ends and blanks around it, some a byte order mark before it.
pub fn ssh_key_line(text: &str) -> &str {
    text.trim_matches(|character: char| character.is_whitespace() || character == '\u{feff}')
}

/// A duration that ends a session; it must be positive and within the server's limit.
pub fn max_duration_ms(duration_ms: u64, config: &EngineConfig) -> Result<(), Error> {
    if duration_ms == 0 {
        return Err(invalid("max_duration must be longer than zero"));
    }
    if duration_ms > config.max_duration_max_ms {
        return Err(invalid("max_duration is longer than max_duration_max_ms"));
    }
    Ok(())
}

/// A command that can be started: at least one argument, and no NUL anywhere.
pub fn command(command: &Command, config: &EngineConfig) -> Result<(), Error> {
    let refuse = |detail: &str| Err(Error::new(Code::InvalidCommand, detail));
    if command.argv.first().is_none_or(String::is_empty) {
        return refuse("argv must name a program");
    }
    if command.argv.iter().any(|argument| argument.contains('\0')) {
        return refuse("argv must not hold NUL");
    }
    if command.argv.iter().map(|argument| argument.len() + 1).sum::<usize>() > config.argv_bytes_max {
        return refuse("argv is larger than argv_bytes_max");
    }
    if command.cwd.contains('\0') {
        return refuse("cwd must not hold NUL");
    }
    env(&command.env, config)
}

/// Where a volume may be mounted: absolute and normal, and nothing that the sandbox's own mounts lie on.
pub fn mount_path(path: &str) -> Result<(), Error> {
    let refuse = |detail: &str| Err(Error::new(Code::PathRefused, detail));
    if path.len() > MOUNT_PATH_BYTES_MAX {
        return refuse("mount_path is longer than 4096 bytes");
    }
    let Some(rest) = path.strip_prefix('/') else { return refuse("mount_path must be absolute") };
    if rest.is_empty() {
        return refuse("mount_path must not be the root directory");
    }
    if path.contains('\0') || rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return refuse("mount_path must not hold NUL, empty parts, `.` or `..`");
    }
    match RESERVED.iter().find(|reserved| overlap(path, reserved)) {
        Some(reserved) => refuse(&format!("mount_path must not be in {reserved}")),
        None => Ok(()),
    }
}

/// Directories that are the sandbox's own.
const RESERVED: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

/// Whether two normal paths are the same, or one lies below the other.
pub fn overlap(a: &str, b: &str) -> bool {
    let below = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    below(a, b) || below(b, a)
}

/// The size of a volume. What the host cannot make, it refuses itself.
pub fn volume_bytes(size_bytes: u64) -> Result<(), Error> {
    if !(1..=BYTES_MAX).contains(&size_bytes) {
        return Err(invalid("size_bytes must be 1 byte to 64 TiB"));
    }
    Ok(())
}

/// A port that something can listen on.
pub fn port(port: u16) -> Result<(), Error> {
    if port == 0 { Err(invalid("port must be 1 to 65535")) } else { Ok(()) }
}

/// The name of a preview: a DNS label.
pub fn slug(slug: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if !SLUG_CHARS.contains(&slug.len()) {
        return Err(invalid("slug must have 1 to 63 characters"));
    }
    let ends = [slug.bytes().next(), slug.bytes().last()];
    if !slug.bytes().all(|byte| plain(byte) || byte == b'-') || !ends.into_iter().flatten().all(plain) {
        return Err(invalid("slug must be lower-case letters, digits and hyphens, with no hyphen at its ends"));
    }
    // Two hyphens mark names in other alphabets, which could look like somebody else's.
    if slug.contains("--") {
        return Err(invalid("slug must not have two hyphens in a row"));
    }
    if RESERVED_SLUGS.split(' ').any(|reserved| reserved == slug) {
        return Err(invalid("slug is reserved"));
    }
    Ok(())
}

/// Names that visitors take for the server itself, and that its operator may want below the same domain.
const RESERVED_SLUGS: &str = "admin api app auth autoconfig autodiscover console dashboard docs ftp gateway help imap \
    internal localhost login mail metrics nagaya pop3 preview previews root sandbox smtp ssh status support wpad www";

/// A time at which something ends must lie ahead.
pub fn expires_at(expires_at: Option<UnixMs>, now: UnixMs) -> Result<(), Error> {
    if expires_at.is_some_and(|at| at <= now) {
        return Err(invalid("expires_at must be in the future"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_that_are_nothing_no_whole_blocks_or_beyond_counting_are_refused() {
        assert!(resources(&Resources::default()).is_ok());
        let least = Resources { cpu_millis: 1, memory_bytes: 4096, disk_bytes: 4096 };
        assert!(resources(&least).is_ok());
        for bad in [
            Resources { cpu_millis: 0, ..least },
            Resources { memory_bytes: 0, ..least },
            Resources { memory_bytes: 5000, ..least },
            Resources { disk_bytes: 0, ..least },
            Resources { disk_bytes: 4095, ..least },
            Resources { cpu_millis: 1_024_001, ..least },
            Resources { memory_bytes: (64 << 40) + 4096, ..least },
            Resources { disk_bytes: u64::MAX - 4095, ..least },
        ] {
            assert_eq!(resources(&bad).map_err(|error| error.code), Err(Code::InvalidResources), "{bad:?}");
        }
    }

    #[test]
    fn names_are_short_and_can_be_shown() {
        assert_eq!((name(""), name(&"a".repeat(256))), (Ok(()), Ok(())));
        assert!(name(&"長".repeat(86)).is_err(), "258 bytes");
        assert!(name("a\0").is_err() && name("a\u{85}").is_err());
    }

    #[test]
    fn only_names_that_need_not_be_unique_may_be_empty() {
        assert_eq!((session_name("", false), session_name("a", true)), (Ok(()), Ok(())));
        assert!(session_name("", true).is_err() && session_name("a\0", false).is_err());
    }

    #[test]
    fn tags_keep_their_order_and_lose_duplicates() {
        let given = ["b", "Some Team", "b", "長=屋"].map(String::from).to_vec();
        assert_eq!(tags(given).unwrap(), ["b", "Some Team", "長=屋"]);
        assert!(tags((0..64).map(|n| n.to_string()).collect()).is_ok());
        assert!(tags((0..65).map(|n| n.to_string()).collect()).is_err());
        assert!(tags(vec!["a".repeat(128)]).is_ok());
        for bad in ["", "a\n", &"a".repeat(129)] {
            assert!(tags(vec![bad.into()]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn commands_without_program_or_with_nul_are_refused() {
        let config = EngineConfig::default();
        let check = |argv: &[&str], env: &[(&str, &str)], cwd: &str| {
            let command_ = Command {
                argv: argv.iter().map(|text| text.to_string()).collect(),
                env: env.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
                cwd: cwd.into(),
                ..Command::default()
            };
            command(&command_, &config)
        };
        assert_eq!(check(&["true", ""], &[("A", "")], "/"), Ok(()));
        assert!(check(&[], &[], "").is_err());
        assert!(check(&[""], &[], "").is_err());
        assert!(check(&["a\0"], &[], "").is_err());
        assert!(check(&["a"], &[("", "x")], "").is_err());
        assert!(check(&["a"], &[("A=B", "x")], "").is_err());
        assert!(check(&["a"], &[("A", "x\0")], "").is_err());
        assert!(check(&["a"], &[], "\0").is_err());
        assert!(check(&["a", &"x".repeat(1024 * 1024)], &[], "").is_err());
    }

    #[test]
    fn mounts_keep_off_the_sandboxs_own_directories_and_each_other() {
        for good in ["/data", "/home/user/data", "/a b", "/process", "/devices/x", "/...", "/runner"] {
            assert_eq!(mount_path(good), Ok(()), "{good}");
        }
        let long = format!("/{}", "a".repeat(4_096));
        for bad in ["", "/", "data", "./data", "//", "/a//b", "/a/", "/a/../b", "/..", "/a/.", "/a\0", &long] {
            assert_eq!(mount_path(bad).unwrap_err().code, Code::PathRefused, "{bad}");
        }
        for reserved in ["/proc", "/proc/1", "/sys/fs", "/dev", "/dev/shm", "/run/lock"] {
            assert_eq!(mount_path(reserved).unwrap_err().code, Code::PathRefused, "{reserved}");
        }
        assert!(overlap("/a", "/a") && overlap("/a/b", "/a") && overlap("/a", "/a/b/c"));
        assert!(!overlap("/a", "/ab") && !overlap("/a/b", "/a/c"));
    }

    #[test]
    fn slugs_are_dns_labels_that_mislead_nobody() {
        for good in ["a", "ab", "my-app", "0-0", "a1-b2-c3", "www1", &"a".repeat(63)] {
            assert_eq!(slug(good), Ok(()), "{good}");
        }
        let long = "a".repeat(64);
        let bad = [
            "", &long, "-", "-abc", "abc-", "a--b", "xn--abc", "Abc", "a_b", "a.b", "a b", "äbc", "abc\n", "www", "api",
        ];
        for bad in bad {
            assert_eq!(slug(bad).unwrap_err().code, Code::InvalidArgument, "{bad}");
        }
        assert_eq!(RESERVED_SLUGS.split(' ').count(), 30);
        for reserved in RESERVED_SLUGS.split(' ') {
            assert!(slug(reserved).is_err(), "{reserved}");
        }
    }

    #[test]
    fn volumes_are_something_that_can_be_counted() {
        assert_eq!((volume_bytes(1), volume_bytes(64 << 40)), (Ok(()), Ok(())));
        assert!(volume_bytes(0).is_err() && volume_bytes((64 << 40) + 1).is_err());
    }
}
