//! Limits of an account, as `/etc/security/limits.conf` and its directory give them at a login.
//!
//! Commands have no power to raise a hard limit: what asks for more than there is gets what there is.

use std::collections::BTreeSet;

use libc::c_int;

use super::account::{self, Account};

const FILE: &str = "/etc/security/limits.conf";
pub const DIRECTORY: &str = "/etc/security/limits.d";
/// Files of the directory that are read, of so many that are looked at. All this is done outside of the sandbox's limits, for
/// every command where the files keep changing.
const FILES_MAX: usize = 16;
const ENTRIES_MAX: usize = 256;
/// The rest of a larger file is not looked at, bytes.
pub const FILE_BYTES_MAX: u64 = 64 * 1024;

/// A resource, and its limits where they are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub resource: c_int,
    pub soft: Option<u64>,
    pub hard: Option<u64>,
}

/// What may be limited: its name, its number, and how many of the kernel's units one is.
const ITEMS: [(&str, c_int, u64); 13] = [
    ("as", libc::RLIMIT_AS as c_int, 1024),
    ("core", libc::RLIMIT_CORE as c_int, 1024),
    ("cpu", libc::RLIMIT_CPU as c_int, 60),
    ("data", libc::RLIMIT_DATA as c_int, 1024),
    ("fsize", libc::RLIMIT_FSIZE as c_int, 1024),
    ("locks", libc::RLIMIT_LOCKS as c_int, 1),
    ("memlock", libc::RLIMIT_MEMLOCK as c_int, 1024),
    ("msgqueue", libc::RLIMIT_MSGQUEUE as c_int, 1),
    ("nofile", libc::RLIMIT_NOFILE as c_int, 1),
    ("nproc", libc::RLIMIT_NPROC as c_int, 1),
    ("rss", libc::RLIMIT_RSS as c_int, 1024),
    ("sigpending", libc::RLIMIT_SIGPENDING as c_int, 1),
    ("stack", libc::RLIMIT_STACK as c_int, 1024),
];

/// The files to read, in their order: where two say something of equal rank, the later one holds.
pub fn files() -> Vec<String> {
    let mut more: Vec<String> = std::fs::read_dir(DIRECTORY)
        .into_iter()
        .flatten()
        .take(ENTRIES_MAX)
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(".conf"))
        .take(FILES_MAX)
        .collect();
    more.sort_unstable();
    std::iter::once(FILE.to_owned()).chain(more.into_iter().map(|name| format!("{DIRECTORY}/{name}"))).collect()
}

/// How well a line's domain fits. Better ones hold against worse ones, wherever they stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Everybody,
    Group,
    User,
}

/// What the files say of an account.
pub fn of(account: &Account, groups: &str, files: impl Iterator<Item = String>) -> Vec<Limit> {
    let groups = account::names_of(groups, &account.groups);
    let mut found = [(None::<(Rank, u64)>, None::<(Rank, u64)>); ITEMS.len()];
    for file in files {
        for line in file.lines() {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().take(5).collect();
            let [domain, kind, rest @ ..] = &words[..] else { continue };
            let Some(rank) = rank(account, &groups, domain) else { continue };
            let [item, value] = rest else {
                // A line that ends here exempts whom it names.
                if *kind == "-" && rest.is_empty() && rank > Rank::Everybody {
                    return Vec::new();
                }
                continue;
            };
            let Some(index) = ITEMS.iter().position(|(name, ..)| name == item) else { continue };
            let Some(value) = number(value, ITEMS[index].2) else { continue };
            let put = |place: &mut Option<(Rank, u64)>| {
                if place.is_none_or(|(before, _)| before <= rank) {
                    *place = Some((rank, value));
                }
            };
            let (soft, hard) = &mut found[index];
            match *kind {
                "soft" => put(soft),
                "hard" => put(hard),
                "-" => [soft, hard].into_iter().for_each(put),
                _ => {}
            }
        }
    }
    let value = |place: Option<(Rank, u64)>| place.map(|(_, value)| value);
    std::iter::zip(ITEMS, found)
        .map(|((_, resource, _), (soft, hard))| Limit { resource, soft: value(soft), hard: value(hard) })
        .filter(|limit| limit.soft.is_some() || limit.hard.is_some())
        .collect()
}

fn rank(account: &Account, groups: &BTreeSet<&str>, domain: &str) -> Option<Rank> {
    if let Some(name) = domain.strip_prefix('@') {
        return groups.contains(name).then_some(Rank::Group);
    }
    match domain {
        // Only what names root is about root.
        "*" => (account.uid != 0).then_some(Rank::Everybody),
        name => (name == account.name).then_some(Rank::User),
    }
}

fn number(text: &str, unit: u64) -> Option<u64> {
    match text {
        "unlimited" | "infinity" | "-1" | "-" => Some(libc::RLIM_INFINITY),
        digits => digits.parse::<u64>().ok().map(|number| number.saturating_mul(unit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str, uid: u32) -> Account {
        Account {
            name: name.into(),
            uid,
            gid: uid,
            groups: vec![uid, 7],
            home: "/".into(),
            shell: "/bin/sh".into(),
            umask: 0,
            limits: Vec::new(),
        }
    }

    fn limits(account: &Account, files: &[&str]) -> Vec<(&'static str, Option<u64>, Option<u64>)> {
        let name = |resource| ITEMS.iter().find(|(_, number, _)| *number == resource).map_or("", |(name, ..)| name);
        of(account, "devs:x:7:user\nops:x:8:\n", files.iter().map(|file| (*file).to_owned()))
            .into_iter()
            .map(|limit| (name(limit.resource), limit.soft, limit.hard))
            .collect()
    }

    #[test]
    fn limits_are_those_of_the_best_fitting_line() {
        let user = account("user", 1000);
        let first = "# user - core 5\nuser soft nofile 100 # a comment\n* hard nofile 50\n@devs - nproc 20\n@ops - nproc 1\n* - nproc 9\n";
        let second = "user soft nofile 200\n* - stack 8\n";
        assert_eq!(
            limits(&user, &[first, second]),
            [("nofile", Some(200), Some(50)), ("nproc", Some(20), Some(20)), ("stack", Some(8192), Some(8192))]
        );
        let infinite = Some(libc::RLIM_INFINITY);
        assert_eq!(limits(&user, &["* - core unlimited\nuser soft core 0\n"]), [("core", Some(0), infinite)]);
    }

    #[test]
    fn only_lines_that_name_root_are_about_root() {
        let root = account("root", 0);
        assert_eq!(limits(&root, &["* - nproc 9\n"]), []);
        assert_eq!(limits(&root, &["root hard nproc 9\n"]), [("nproc", None, Some(9))]);
    }

    #[test]
    fn who_is_exempted_has_no_limits_and_garbage_says_nothing() {
        let user = account("user", 1000);
        assert_eq!(limits(&user, &["* - nproc 9\n@devs -\n"]), []);
        for garbage in ["user", "user soft", "user soft nproc", "user soft nproc x", "user so nproc 1", "user - y 1"] {
            assert_eq!(limits(&user, &[garbage]), [], "{garbage}");
        }
        assert_eq!(limits(&user, &["* - cpu 18446744073709551615"]), [("cpu", Some(u64::MAX), Some(u64::MAX))]);
    }
}
