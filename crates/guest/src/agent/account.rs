//! Who a command runs as: what a login would find out about the account when the command starts.
//!
//! What was found out holds as long as the files that it came from are the same, which a look at each tells.
//!
//! The files are the sandbox's own and anybody's who is root there. What they say is believed about this sandbox only:
//! the uid is never theirs to choose, and a file that is missing, no file at all, too large or garbled says nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags, Timespec};
use rustix::time::{ClockId, clock_gettime};

use super::limits::{self, Limit};
use crate::spawn::User;

/// The rest of a larger file is not looked at, bytes.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Ids from here on mean nobody in a sandbox, and no process can have them.
const IDS_END: u32 = 65_536;
/// What the kernel takes.
const GROUPS_MAX: usize = 65_536;
const UMASK: u32 = 0o022;
const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
const LOGIN_DEFS: &str = "/etc/login.defs";
/// A file that changed more recently may change again without a later time to tell it by: kernels count file times in
/// ticks, of 10 ms at most.
const SETTLED: Duration = Duration::from_millis(100);

/// An account as a process of it needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// All groups, with the first one.
    pub groups: Vec<u32>,
    pub home: String,
    pub shell: String,
    pub umask: u32,
    pub limits: Vec<Limit>,
}

/// What was found out last about root and about the image's user.
#[derive(Debug, Default)]
pub struct Accounts([Mutex<Option<Known>>; 2]);

#[derive(Debug)]
struct Known {
    account: Arc<Account>,
    sources: Vec<Source>,
}

/// A file or directory that an account was read from, as it was then.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    path: String,
    /// `None` where nothing was there.
    version: Option<Version>,
}

/// Equal for two looks at a file that has not changed in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    changed: Timespec,
}

impl Accounts {
    /// The account of root or of the image's user, as the files of this machine describe it now.
    pub fn look_up(&self, privileged: bool, user: &User) -> Arc<Account> {
        let mut known = self.0[usize::from(privileged)].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*known
            && known.sources.iter().all(Source::is_as_it_was)
        {
            return known.account.clone();
        }
        // Looked at before they are read: a change in between is seen by the next look.
        let (files, sources) = sources();
        let account = Arc::new(Account::read(privileged, user, &files));
        let settled = sources.iter().all(Source::is_settled);
        *known = settled.then(|| Known { account: account.clone(), sources });
        account
    }
}

/// The files with limits, and all that an account is read from.
fn sources() -> (Vec<String>, Vec<Source>) {
    // The directory first: a file that comes to it later is seen by its time.
    let mut sources: Vec<_> = [limits::DIRECTORY, PASSWD, GROUP, LOGIN_DEFS].map(Source::look).into();
    let files = limits::files();
    sources.extend(files.iter().map(|path| Source::look(path)));
    (files, sources)
}

impl Source {
    fn look(path: &str) -> Self {
        Self { path: path.to_owned(), version: Version::of(path) }
    }

    fn is_as_it_was(&self) -> bool {
        Version::of(&self.path) == self.version
    }

    fn is_settled(&self) -> bool {
        self.version.is_none_or(|version| {
            let (now, then) = (clock_gettime(ClockId::Realtime), version.changed);
            let since = i128::from(now.tv_sec - then.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec - then.tv_nsec);
            since > SETTLED.as_nanos() as i128
        })
    }
}

impl Version {
    fn of(path: &str) -> Option<Self> {
        let status = rustix::fs::stat(path).ok()?;
        let changed = Timespec { tv_sec: status.st_ctime, tv_nsec: status.st_ctime_nsec as _ };
        Some(Self { device: status.st_dev, inode: status.st_ino, changed })
    }
}

impl Account {
    fn read(privileged: bool, user: &User, files_of_limits: &[String]) -> Self {
        let (name, uid, gid, home) = match privileged {
            true => ("root", 0, 0, "/root"),
            false => (user.name.as_str(), user.uid, user.gid, user.home.as_str()),
        };
        let mut account = Self {
            name: name.into(),
            uid,
            gid,
            groups: Vec::new(),
            home: home.into(),
            shell: "/bin/bash".into(),
            umask: UMASK,
            limits: Vec::new(),
        };
        let comment = account.take_entry(&read(PASSWD, FILE_BYTES_MAX));
        let groups = read(GROUP, FILE_BYTES_MAX);
        account.groups = groups_of(&groups, name, account.gid);
        account.umask = umask(&comment, &read(LOGIN_DEFS, FILE_BYTES_MAX));
        let files = files_of_limits.iter().map(|path| read(path, limits::FILE_BYTES_MAX));
        account.limits = limits::of(&account, &groups, files);
        account
    }

    /// What `/etc/passwd` says of the account; returns its comment field. An entry with another uid is another account's.
    fn take_entry(&mut self, passwd: &str) -> String {
        for line in passwd.lines() {
            let fields: Vec<&str> = line.splitn(8, ':').collect();
            let [name, _, uid, gid, comment, home, shell] = fields[..] else { continue };
            if name != self.name || uid.parse() != Ok(self.uid) {
                continue;
            }
            if let Some(gid) = id(gid) {
                self.gid = gid;
            }
            if home.starts_with('/') {
                self.home = home.into();
            }
            // Nothing stands for the default.
            if shell.starts_with('/') {
                self.shell = shell.into();
            }
            return comment.into();
        }
        String::new()
    }
}

/// A uid or gid that a process here can have.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id < IDS_END)
}

fn groups_of(group: &str, user: &str, first: u32) -> Vec<u32> {
    let mut groups = vec![first];
    for line in group.lines() {
        let fields: Vec<&str> = line.splitn(5, ':').collect();
        let [_, _, gid, members] = fields[..] else { continue };
        if let Some(gid) = id(gid).filter(|_| members.split(',').any(|member| member == user)) {
            groups.push(gid);
        }
    }
    groups.sort_unstable();
    groups.dedup();
    groups.truncate(GROUPS_MAX);
    groups
}

/// What groups are called, given by their ascending ids.
pub fn names_of<'a>(group: &'a str, ids: &[u32]) -> BTreeSet<&'a str> {
    let name = |line: &'a str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        id(fields.nth(1)?).filter(|id| ids.binary_search(id).is_ok()).map(|_| name)
    };
    group.lines().filter_map(name).collect()
}

/// The account's own is in its comment, else the machine's holds.
fn umask(comment: &str, login_defs: &str) -> u32 {
    let octal = |text: &str| u32::from_str_radix(text, 8).ok().map(|mask| mask & 0o777);
    let own = || comment.split(',').find_map(|part| octal(part.strip_prefix("umask=")?));
    let general = || {
        login_defs.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("UMASK")).then(|| octal(words.next()?)).flatten()
        })
    };
    own().or_else(general).unwrap_or(UMASK)
}

/// A file's content, or nothing. Never waits: what stands there may be a pipe.
fn read(path: &str, bytes_max: u64) -> String {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(path, flags, Mode::empty()) else { return String::new() };
    match rustix::fs::fstat(&file) {
        Ok(status) if FileType::from_raw_mode(status.st_mode) == FileType::RegularFile => {}
        _ => return String::new(),
    }
    let mut bytes = Vec::new();
    let _ = File::from(file).take(bytes_max).read_to_end(&mut bytes);
    // What follows goes to system calls as C strings.
    bytes.retain(|byte| *byte != 0);
    String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> Account {
        Account {
            name: "user".into(),
            uid: 1000,
            gid: 1000,
            groups: Vec::new(),
            home: "/home/user".into(),
            shell: "/bin/bash".into(),
            umask: UMASK,
            limits: Vec::new(),
        }
    }

    fn entry(passwd: &str) -> (Account, String) {
        let mut account = user();
        let comment = account.take_entry(passwd);
        (account, comment)
    }

    #[test]
    fn the_accounts_entry_says_group_home_and_shell() {
        let passwd =
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:100:T,,umask=077:/srv/t:/bin/zsh\nuser:x:1000:5::/no:/no\n";
        let expected = Account { gid: 100, home: "/srv/t".into(), shell: "/bin/zsh".into(), ..user() };
        assert_eq!(entry(passwd), (expected, "T,,umask=077".to_owned()));
        assert_eq!(entry("user:x:1000:1000:::\n"), (user(), String::new()));
    }

    #[test]
    fn an_entry_cannot_choose_the_uid_and_garbage_says_nothing() {
        for passwd in [
            "",
            "user:x:0:0::/root:/bin/sh",
            "user:x:1001:7::/x:/x",
            "user:x:1000:7::/x",
            "user:x:1000:7::/x:/x:more",
            "other:x:1000:7::/x:/x",
            ":::::::",
        ] {
            assert_eq!(entry(passwd), (user(), String::new()), "{passwd}");
        }
        let (account, _) = entry("user:x:1000:65536::relative:also");
        assert_eq!(account, user(), "an id that is not mapped, and paths that are none");
    }

    #[test]
    fn groups_are_those_that_name_the_user_and_the_first() {
        let group = "a:x:7:user\nb:x:8:x,user,y\nc:x:9:users\nd:x:65536:user\ne:x:8:user\nf:x:1000:\ng:x:6:user:more\n";
        assert_eq!(groups_of(group, "user", 1000), [7, 8, 1000]);
        assert_eq!(groups_of("", "user", 1000), [1000]);
        assert_eq!(names_of(group, &[6, 8, 99]), BTreeSet::from(["b", "e", "g"]));
    }

    #[test]
    fn the_umask_is_the_accounts_or_the_machines() {
        let defs = "# UMASK 000\nUMASK\t\t027\nUMASK 077\n";
        assert_eq!(umask("", defs), 0o027);
        assert_eq!(umask("Name,room,umask=002", defs), 0o002);
        assert_eq!(umask("umask=9", "UMASK x\n"), UMASK);
        assert_eq!(umask("umask=7777", ""), 0o777);
    }

    #[test]
    fn a_file_is_the_same_until_it_changes_and_settled_after_a_while() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let path = file.to_str().unwrap();
        let absent = Source::look(path);
        assert!(absent.version.is_none() && absent.is_as_it_was() && absent.is_settled());
        std::fs::write(&file, "a").unwrap();
        assert!(!absent.is_as_it_was());
        let written = Source::look(path);
        assert!(written.is_as_it_was() && !written.is_settled());
        // Another file of the same size in its place, with the same time of modification.
        let modified = std::fs::metadata(&file).unwrap().modified().unwrap();
        let other = directory.path().join("other");
        std::fs::write(&other, "b").unwrap();
        File::options().write(true).open(&other).unwrap().set_modified(modified).unwrap();
        std::fs::rename(&other, &file).unwrap();
        assert!(!written.is_as_it_was());
        assert!(Source::look("/usr").is_settled());
    }

    #[test]
    fn what_is_no_file_says_nothing_and_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(read(pipe.to_str().unwrap(), 9), "");
        assert_eq!(read(directory.path().to_str().unwrap(), 9), "");
        assert_eq!(read("/nonexistent", 9), "");
        let file = directory.path().join("file");
        std::fs::write(&file, b"a\0b\xff").unwrap();
        assert_eq!(read(file.to_str().unwrap(), 9), "ab\u{fffd}");
        std::fs::write(&file, "0123456789").unwrap();
        assert_eq!(read(file.to_str().unwrap(), 9), "012345678");
    }
}
