//! Users and groups of the image: those that the distribution gives every machine, and the one that commands run as. None of the host's
//! own, but for the names that its package database uses.

use std::collections::BTreeSet;
use std::fs;

use super::{USER, USER_ID};

/// The distribution's own lists; part of its base system, and the same on all its machines.
pub(super) const PASSWD_MASTER: &str = "/usr/share/base-passwd/passwd.master";
pub(super) const GROUP_MASTER: &str = "/usr/share/base-passwd/group.master";
pub(super) const OVERRIDES: &str = "/var/lib/dpkg/statoverride";
/// Ids from here on are people.
const SYSTEM_IDS_END: u32 = 1000;

/// For hosts without those lists.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
    daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n\
    man:x:6:12:man:/var/cache/man:/usr/sbin/nologin\n\
    mail:x:8:8:mail:/var/mail:/usr/sbin/nologin\n\
    www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n\
    nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nadm:x:4:\ntty:x:5:\ndisk:x:6:\nmail:x:8:\nman:x:12:\nsudo:x:27:\nwww-data:x:33:\n\
    shadow:x:42:\nutmp:x:43:\nstaff:x:50:\nusers:x:100:\nnogroup:x:65534:\n";
/// Whom package managers download as.
const APT: &str = "_apt:x:42:65534::/nonexistent:/usr/sbin/nologin\n";

/// The files of the image.
pub(super) struct Accounts {
    pub passwd: String,
    pub group: String,
    pub shadow: String,
    /// What the package database says of owners, without whom the image does not have.
    pub overrides: String,
    host: Host,
}

/// What is read of the host.
pub(super) struct Host {
    pub passwd: String,
    pub group: String,
    pub passwd_master: String,
    pub group_master: String,
    pub overrides: String,
}

impl Host {
    pub fn read() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            passwd: read("/etc/passwd"),
            group: read("/etc/group"),
            passwd_master: read(PASSWD_MASTER),
            group_master: read(GROUP_MASTER),
            overrides: read(OVERRIDES),
        }
    }
}

impl Accounts {
    pub fn of(host: Host) -> Self {
        let or = |text: &str, other: &'static str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
        let mut passwd = without_passwords(&or(&host.passwd_master, PASSWD));
        let mut group = without_passwords(&or(&host.group_master, GROUP));
        if id_of(&passwd, "_apt").is_none() {
            passwd.push_str(APT);
        }
        let mut overrides = String::new();
        for line in host.overrides.lines() {
            let [user, its_group, ..] = line.split_whitespace().collect::<Vec<_>>()[..] else { continue };
            if adopt(&mut passwd, &host.passwd, user) && adopt(&mut group, &host.group, its_group) {
                overrides.push_str(line);
                overrides.push('\n');
            }
        }
        passwd.push_str(&format!("{USER}:x:{USER_ID}:{USER_ID}:{USER}:/home/{USER}:/bin/bash\n"));
        group = group
            .lines()
            .map(|line| if line.starts_with("sudo:") { format!("{line}{USER}\n") } else { format!("{line}\n") })
            .collect();
        group.push_str(&format!("{USER}:x:{USER_ID}:\n"));
        // No password fits `*`; `sudo` asks for none.
        let names: BTreeSet<&str> = passwd.lines().filter_map(|line| line.split(':').next()).collect();
        let shadow = names.into_iter().map(|name| format!("{name}:*:19000:0:99999:7:::\n")).collect();
        Self { passwd, group, shadow, overrides, host }
    }

    /// Owner and group inside of what has these on the host: the same by name, else root.
    pub fn inside(&self, uid: u32, gid: u32) -> (u32, u32) {
        let same = |host: &str, ours: &str, id| name_of(host, id).and_then(|name| id_of(ours, name)).unwrap_or(0);
        (same(&self.host.passwd, &self.passwd, uid), same(&self.host.group, &self.group, gid))
    }
}

/// Makes sure that a system's name is in the list, with the id that the host has for it. False when it must not be.
fn adopt(list: &mut String, host: &str, name: &str) -> bool {
    // `#5` is the id 5, which needs no name.
    if name.starts_with('#') || id_of(list, name).is_some() {
        return true;
    }
    let Some(id) = id_of(host, name).filter(|id| *id < SYSTEM_IDS_END && name_of(list, *id).is_none()) else {
        return false;
    };
    let fields =
        host.lines().find(|line| line.starts_with(&format!("{name}:"))).map_or(0, |line| line.split(':').count());
    match fields {
        // Its first group may be one that is not there.
        7 => list.push_str(&format!("{name}:x:{id}:65534::/nonexistent:/usr/sbin/nologin\n")),
        _ => list.push_str(&format!("{name}:x:{id}:\n")),
    }
    true
}

fn without_passwords(list: &str) -> String {
    let line = |line: &str| {
        let mut fields: Vec<&str> = line.split(':').collect();
        *fields.get_mut(1)? = "x";
        Some(fields.join(":") + "\n")
    };
    list.lines().filter_map(line).collect()
}

fn id_of(list: &str, name: &str) -> Option<u32> {
    list.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

fn name_of(list: &str, id: u32) -> Option<&str> {
    list.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(overrides: &str) -> Accounts {
        Accounts::of(Host {
            passwd: "root:x:0:0:root:/root:/bin/zsh\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n\
                     messagebus:x:101:102:its comment:/nonexistent:/usr/sbin/nologin\n_apt:x:100:65534::/:/\n"
                .into(),
            group: "root:x:0:alice\nmessagebus:x:102:\nssl-cert:x:103:alice\nalice:x:1000:\nmine:x:41:\n".into(),
            passwd_master: "root:*:0:0:root:/root:/bin/bash\n_apt:*:42:65534::/nonexistent:/usr/sbin/nologin\n".into(),
            group_master: "root:*:0:\nsudo:*:27:\nsrc:*:40:\nirc:*:41:\n".into(),
            overrides: overrides.into(),
        })
    }

    #[test]
    fn names_that_the_package_database_uses_are_there_with_nobody_in_them() {
        let overrides = "root ssl-cert 710 /etc/ssl/private\nmessagebus #4754 4754 /x\nroot root 755 /y\n";
        let made = accounts(overrides);
        assert_eq!(made.overrides, overrides);
        assert!(made.group.contains("\nssl-cert:x:103:\n"), "{}", made.group);
        assert!(made.passwd.contains("\nmessagebus:x:101:65534::/nonexistent:/usr/sbin/nologin\n"), "{}", made.passwd);
        assert!(made.shadow.contains("messagebus:*:"));
    }

    #[test]
    fn lines_about_people_and_unknown_names_are_left_out() {
        let made = accounts("alice root 755 /a\nroot alice 755 /b\nroot nobody-knows 755 /c\nroot mine 755 /d\nroot\n");
        assert_eq!(made.overrides, "", "`mine` has the id of another group of the image");
        for list in [&made.passwd, &made.group, &made.shadow] {
            assert!(!list.contains("alice") && !list.contains("zsh") && !list.contains("comment"), "{list}");
        }
        assert!(made.group.contains("\nsudo:x:27:tenki\n"), "{}", made.group);
        assert!(made.passwd.ends_with("tenki:x:1000:1000:tenki:/home/tenki:/bin/bash\n"));
    }

    #[test]
    fn hosts_without_the_lists_have_the_shorter_ones() {
        let empty = || String::new();
        let host =
            Host { passwd: empty(), group: empty(), passwd_master: empty(), group_master: empty(), overrides: empty() };
        let made = Accounts::of(host);
        assert!(made.passwd.starts_with("root:x:0:0:") && made.passwd.contains("\n_apt:x:42:"));
        assert!(made.group.contains("\nsudo:x:27:tenki\n"));
        assert_eq!(made.inside(0, 0), (0, 0));
    }

    #[test]
    fn owners_are_the_same_by_name() {
        let made = accounts("root ssl-cert 710 /etc/ssl/private\n");
        assert_eq!(made.inside(100, 103), (42, 103));
        assert_eq!(made.inside(1000, 1000), (0, 0));
    }
}
