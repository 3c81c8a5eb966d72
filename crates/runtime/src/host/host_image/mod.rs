//! The image that needs no download: the host's own programs under a freshly made rest.
//!
//! Its layers are the host's `/usr` (and whatever of `/bin`, `/sbin`, `/lib*` is no link into it),
//! read-only, and a base layer made here: `/etc` with what is on a list, homes, `/tmp`, `/var`.
//! Nothing else of the host is in it. What the base layer has in the directory of another layer lies over that
//! one: so `poweroff` and its kin are ours, for the host's ask a service manager that is not there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nagaya_engine::model::{ImageDigest, ImageUser, Layer, RootImage};
use nagaya_guest::spawn::PLACES as PROGRAM_DIRECTORIES;

use accounts::{Accounts, Host};

mod accounts;
mod apt;
mod packages;
mod terminals;

/// What is taken from the host's `/etc`: needed by programs of `/usr`, and telling nothing of the
/// host's users, secrets or network.
const FROM_ETC: [&str; 36] = [
    "adduser.conf",
    "alternatives",
    "bash.bashrc",
    "ca-certificates",
    "ca-certificates.conf",
    "debconf.conf",
    "debian_version",
    "deluser.conf",
    "dpkg",
    "environment",
    "fonts",
    "inputrc",
    "java-17-openjdk",
    "java-21-openjdk",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "localtime",
    "login.defs",
    "magic",
    "magic.mime",
    "mime.types",
    "os-release",
    "pam.conf",
    "pam.d",
    "perl",
    "profile",
    "protocols",
    "python3",
    "python3.11",
    "security",
    "services",
    "skel",
    "terminfo",
    "ucf.conf",
];
/// Of `/etc/ssl` only this: the rest may hold private keys.
const FROM_ETC_SSL: [&str; 2] = ["certs", "openssl.cnf"];

/// The user that commands run as in this image. Others name their own.
const USER: &str = "tenki";
const USER_ID: u32 = 1000;
/// Larger files of `/etc` are not configuration.
const FILE_BYTES_MAX: u64 = 8 << 20;

#[derive(Debug, thiserror::Error)]
#[error("make the host image: {path}")]
pub struct ImageError {
    path: String,
    source: io::Error,
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, ImageError> {
    result.map_err(|source| ImageError { path: path.display().to_string(), source })
}

/// Raised whenever this module makes something else of the same host.
const VERSION: u32 = 3;

/// The base layers of one data directory: that of new sandboxes, and those that earlier ones stand on, which were made from
/// another state of the host.
pub(super) struct HostImages {
    directory: PathBuf,
    name_server: Option<Ipv4Addr>,
    current: RootImage,
    /// What every image from elsewhere gets on top.
    fittings: Layer,
}

impl HostImages {
    /// Names what [`HostImages::make`] makes below `directory`. That is not there yet, and takes space.
    pub fn open(directory: &Path, name_server: Option<Ipv4Addr>) -> Result<Self, ImageError> {
        at(directory, fs::create_dir_all(directory))?;
        let name = fingerprint(name_server);
        let current = image(directory.join(format!("{PREFIX}{name}")), &name);
        let fittings = directory.join(format!("{FITTINGS}{VERSION}-{}", name_server.map_or(0, u32::from)));
        let fittings = Layer { source: fittings, place: String::new() };
        Ok(Self { directory: directory.to_owned(), name_server, current, fittings })
    }

    /// Makes the base layer of new sandboxes and the fittings, unless the same ones are there.
    pub fn make(&self) -> Result<(), ImageError> {
        let base = &self.current.layers[0].source;
        self.make_whole(base, |fresh| make_base(fresh, self.name_server))?;
        self.make_whole(&self.fittings.source, |fresh| make_fittings(fresh, self.name_server))
    }

    /// Makes a directory that is whole once it has its name.
    fn make_whole(&self, target: &Path, fill: impl FnOnce(&Path) -> Result<(), ImageError>) -> Result<(), ImageError> {
        if target.exists() {
            return Ok(());
        }
        let fresh = self.directory.join("new");
        if fresh.exists() {
            at(&fresh, fs::remove_dir_all(&fresh))?;
        }
        at(&fresh, fs::create_dir(&fresh))?;
        fill(&fresh)?;
        at(target, fs::rename(&fresh, target))
    }

    /// The layers that a sandbox of this image stands on, the uppermost first. An image from elsewhere gets what every
    /// machine has of its own: where `/proc` and its kin are mounted, its name, and who resolves names.
    pub fn layers_of(&self, image: &RootImage) -> Vec<Layer> {
        let own = image.digest.as_str().starts_with(SCHEME);
        (!own).then(|| self.fittings.clone()).into_iter().chain(image.layers.iter().cloned()).collect()
    }

    pub fn default_image(&self) -> RootImage {
        self.current.clone()
    }

    /// The image of this digest, as long as its base layer is there.
    pub fn find(&self, digest: &ImageDigest) -> Option<RootImage> {
        let name = digest.as_str().strip_prefix(SCHEME).filter(|name| name.bytes().all(|of| of.is_ascii_hexdigit()))?;
        let base = self.directory.join(format!("{PREFIX}{name}"));
        base.is_dir().then(|| image(base, name))
    }

    /// Removes base layers that neither new sandboxes nor these need.
    pub fn retain(&self, used: &BTreeSet<ImageDigest>) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            // Sandboxes that run may stand on fittings of earlier servers, and these are a few small files.
            if entry.file_name().to_string_lossy().starts_with(FITTINGS) {
                continue;
            }
            let digest = digest_of_base(&entry.path());
            if digest.is_none_or(|digest| digest != self.current.digest && !used.contains(&digest)) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Of a base layer's directory, and of a digest.
const PREFIX: &str = "host-";
const SCHEME: &str = "host:";
/// Of the directory of fittings.
const FITTINGS: &str = "fittings-";

/// The digest of the image with this base layer, as records of earlier servers name it.
pub(super) fn digest_of_base(base: &Path) -> Option<ImageDigest> {
    let name = base.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    Some(ImageDigest::new(format!("{SCHEME}{name}")))
}

/// The base layer, and the host's directories of programs under it.
fn image(base: PathBuf, name: &str) -> RootImage {
    let programs = PROGRAM_DIRECTORIES
        .iter()
        .map(|name| Layer { source: Path::new("/").join(name), place: (*name).to_owned() })
        .filter(|layer| fs::symlink_metadata(&layer.source).is_ok_and(|metadata| metadata.is_dir()));
    let base = Layer { source: base, place: String::new() };
    let layers = std::iter::once(base).chain(programs).collect();
    let user = ImageUser { name: USER.into(), uid: USER_ID, gid: USER_ID, home: format!("/home/{USER}") };
    let digest = ImageDigest::new(format!("{SCHEME}{name}"));
    RootImage { digest, layers, user, workdir: None, env: BTreeMap::new() }
}

fn make_base(base: &Path, name_server: Option<Ipv4Addr>) -> Result<(), ImageError> {
    at(base, fs::set_permissions(base, Permissions::from_mode(0o755)))?;
    for name in PROGRAM_DIRECTORIES {
        let host = Path::new("/").join(name);
        let Ok(metadata) = fs::symlink_metadata(&host) else { continue };
        let inside = base.join(name);
        if metadata.is_symlink() {
            at(&inside, fs::read_link(&host).and_then(|target| symlink(target, &inside)))?;
        } else if metadata.is_dir() {
            at(&inside, fs::create_dir(&inside))?;
        }
    }
    let accounts = Accounts::of(Host::read());
    let programs = make_programs_directory(base)?;
    make_power_programs(&programs)?;
    packages::forbid_services(&programs)?;
    make_directories(base)?;
    make_etc(&base.join("etc"), name_server, &accounts)?;
    packages::make_database(base, &accounts)?;
    packages::make_directories(base, &accounts)?;
    apt::make(&base.join("etc"))?;
    terminals::make(&base.join("etc"));
    make_home(&base.join("home").join(USER))
}

/// The directories and files that are a machine's, and not its image's.
fn make_fittings(layer: &Path, name_server: Option<Ipv4Addr>) -> Result<(), ImageError> {
    at(layer, fs::set_permissions(layer, Permissions::from_mode(0o755)))?;
    for (name, mode) in [("dev", 0o755), ("etc", 0o755), ("proc", 0o555), ("sys", 0o555), ("tmp", 0o1777)] {
        let path = layer.join(name);
        at(&path, fs::create_dir(&path))?;
        at(&path, fs::set_permissions(&path, Permissions::from_mode(mode)))?;
    }
    for (name, content) in machine_files(name_server) {
        let path = layer.join("etc").join(name);
        at(&path, fs::write(&path, content))?;
        at(&path, fs::set_permissions(&path, Permissions::from_mode(0o644)))?;
    }
    Ok(())
}

/// What `/etc` says of the machine itself.
fn machine_files(name_server: Option<Ipv4Addr>) -> [(&'static str, String); 3] {
    let resolver = name_server.map_or_else(String::new, |server| format!("nameserver {server}\n"));
    [
        ("hostname", "sandbox\n".to_owned()),
        ("hosts", "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost\n".to_owned()),
        ("resolv.conf", resolver),
    ]
}

/// Programs that power the sandbox off: its first process does so when it gets this signal.
const POWER_OFF: &str = r#"#!/bin/sh
# Powers the sandbox off. Its disk is kept, and it can be resumed.
name=${0##*/}
if [ "$name" = shutdown ]; then
    for argument in "$@"; do
        case $argument in
            -h | -H | -P | --halt | --poweroff | --no-wall | now | +0) ;;
            *) echo "shutdown: only 'shutdown [-h] now' is known in a sandbox" >&2; exit 1 ;;
        esac
    done
    case " $* " in
        *" now "* | *" +0 "*) ;;
        *) echo "shutdown: a sandbox powers off at once or not at all: say 'shutdown now'" >&2; exit 1 ;;
    esac
fi
if ! kill -s PWR 1 2> /dev/null; then
    echo "$name: only root can do that" >&2
    exit 1
fi
"#;

/// The directory of root's programs, in which ours lie over those of the host.
fn make_programs_directory(base: &Path) -> Result<PathBuf, ImageError> {
    let directory = fs::canonicalize("/sbin").unwrap_or_else(|_| "/usr/sbin".into());
    let mut inside = base.to_owned();
    for part in directory.strip_prefix("/").unwrap_or(&directory) {
        inside.push(part);
        if !inside.exists() {
            at(&inside, fs::create_dir(&inside))?;
        }
        // Of two directories over each other, the upper one's mode is seen.
        at(&inside, fs::set_permissions(&inside, Permissions::from_mode(0o755)))?;
    }
    Ok(inside)
}

fn make_power_programs(programs: &Path) -> Result<(), ImageError> {
    for name in ["poweroff", "halt", "shutdown"] {
        let path = programs.join(name);
        at(&path, fs::write(&path, POWER_OFF))?;
        at(&path, fs::set_permissions(&path, Permissions::from_mode(0o755)))?;
    }
    Ok(())
}

/// Names what the base layer is made from, without reading it: sizes and times tell of changes.
fn fingerprint(name_server: Option<Ipv4Addr>) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(format!("{VERSION} {name_server:?}").as_bytes());
    let listed = FROM_ETC.iter().map(|name| Path::new("/etc").join(name));
    let certificates = FROM_ETC_SSL.iter().map(|name| Path::new("/etc/ssl").join(name));
    let directories = PROGRAM_DIRECTORIES.iter().map(|name| Path::new("/").join(name));
    for path in listed.chain(certificates) {
        describe(&path, &mut hash);
    }
    for path in directories {
        if let Ok(metadata) = fs::symlink_metadata(&path) {
            hash.update(format!("{} {}", path.display(), metadata.is_symlink()).as_bytes());
        }
    }
    for path in ["/etc/apt", "/etc/timezone", "/var/lib/dpkg/status", accounts::OVERRIDES] {
        describe(Path::new(path), &mut hash);
    }
    for path in [accounts::PASSWD_MASTER, accounts::GROUP_MASTER] {
        describe(Path::new(path), &mut hash);
    }
    hash.finalize().to_hex()[..16].to_owned()
}

fn describe(path: &Path, hash: &mut blake3::Hasher) {
    let Ok(metadata) = fs::symlink_metadata(path) else { return };
    hash.update(
        format!("{}\0{}\0{}\0{}", path.display(), metadata.mode(), metadata.len(), metadata.mtime()).as_bytes(),
    );
    if metadata.is_dir() {
        let mut entries: Vec<_> =
            fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        entries.sort();
        entries.iter().for_each(|entry| describe(entry, hash));
    }
}

fn make_directories(base: &Path) -> Result<(), ImageError> {
    let directories = [
        ("dev", 0o755, 0),
        ("etc", 0o755, 0),
        ("home", 0o755, 0),
        ("media", 0o755, 0),
        ("mnt", 0o755, 0),
        ("opt", 0o755, 0),
        ("proc", 0o555, 0),
        ("root", 0o700, 0),
        ("run", 0o755, 0),
        ("run/lock", 0o1777, 0),
        ("srv", 0o755, 0),
        ("sys", 0o555, 0),
        ("tmp", 0o1777, 0),
        ("var", 0o755, 0),
        ("var/cache", 0o755, 0),
        ("var/lib", 0o755, 0),
        ("var/local", 0o755, 0),
        ("var/log", 0o755, 0),
        ("var/mail", 0o755, 0),
        ("var/opt", 0o755, 0),
        ("var/spool", 0o755, 0),
        ("var/tmp", 0o1777, 0),
        ("workspace", 0o755, USER_ID),
    ];
    let home = format!("home/{USER}");
    for (name, mode, owner) in directories.into_iter().chain([(home.as_str(), 0o755, USER_ID)]) {
        let path = base.join(name);
        at(&path, fs::create_dir(&path))?;
        at(&path, fs::set_permissions(&path, Permissions::from_mode(mode)))?;
        at(&path, chown(&path, Some(owner), Some(owner)))?;
    }
    at(base, symlink("/run", base.join("var/run")))?;
    at(base, symlink("/run/lock", base.join("var/lock")))?;
    at(base, symlink("/proc/self/mounts", base.join("etc/mtab")))?;
    Ok(())
}

/// What the user's own installs of Python's and Node's packages need: a place that is the user's, and leave.
const PIP: &str = "[global]\n# A sandbox is nobody's only machine: pip may install beside the system's packages.\nbreak-system-packages = true\n";
const NPM: &str = "prefix=${HOME}/.local\n";

/// The last line is for what packages and users add.
fn sudoers() -> String {
    format!(
        "Defaults env_reset, !use_pty\nroot ALL=(ALL:ALL) ALL\n{USER} ALL=(ALL:ALL) NOPASSWD: ALL\n\
         @includedir /etc/sudoers.d\n"
    )
}

fn make_home(home: &Path) -> Result<(), ImageError> {
    let ours = |path: &Path| at(path, chown(path, Some(USER_ID), Some(USER_ID)));
    let skeleton = Path::new("/etc/skel");
    if let Ok(entries) = fs::read_dir(skeleton) {
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())) {
            let target = home.join(entry.file_name());
            copy(&entry.path(), &target)?;
            // An unreadable one was not copied.
            if target.exists() {
                ours(&target)?;
            }
        }
    }
    // There before the first login, whose shell looks for it once.
    for name in [".local", ".local/bin"] {
        let directory = home.join(name);
        at(&directory, fs::create_dir(&directory))?;
        ours(&directory)?;
    }
    let settings = home.join(".npmrc");
    at(&settings, fs::write(&settings, NPM))?;
    ours(&settings)
}

fn make_etc(etc: &Path, name_server: Option<Ipv4Addr>, accounts: &Accounts) -> Result<(), ImageError> {
    for name in FROM_ETC {
        copy(&Path::new("/etc").join(name), &etc.join(name))?;
    }
    at(etc, fs::create_dir(etc.join("ssl")))?;
    for name in FROM_ETC_SSL {
        copy(&Path::new("/etc/ssl").join(name), &etc.join("ssl").join(name))?;
    }
    let more_sudoers = etc.join("sudoers.d");
    at(&more_sudoers, fs::create_dir(&more_sudoers))?;
    at(&more_sudoers, fs::set_permissions(&more_sudoers, Permissions::from_mode(0o750)))?;
    let (time_zone, sudoers) = (time_zone() + "\n", sudoers());
    let [hostname, hosts, resolver] = machine_files(name_server);
    let files = [
        ("passwd", 0o644, accounts.passwd.as_str()),
        ("group", 0o644, accounts.group.as_str()),
        ("shadow", 0o640, accounts.shadow.as_str()),
        ("timezone", 0o644, time_zone.as_str()),
        ("pip.conf", 0o644, PIP),
        ("sudoers", 0o440, sudoers.as_str()),
        (hostname.0, 0o644, hostname.1.as_str()),
        (hosts.0, 0o644, hosts.1.as_str()),
        (
            "nsswitch.conf",
            0o644,
            "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n",
        ),
        ("host.conf", 0o644, "multi on\n"),
        ("shells", 0o644, "/bin/sh\n/bin/bash\n"),
        (resolver.0, 0o644, resolver.1.as_str()),
        ("fstab", 0o644, ""),
    ];
    for (name, mode, content) in files {
        let path = etc.join(name);
        at(&path, fs::write(&path, content))?;
        at(&path, fs::set_permissions(&path, Permissions::from_mode(mode)))?;
    }
    Ok(())
}

/// The name of the host's time zone, from its file of that name, or from where its table lies.
fn time_zone() -> String {
    let named = fs::read_to_string("/etc/timezone").ok().map(|name| name.trim().to_owned());
    let linked = || {
        let table = fs::canonicalize("/etc/localtime").ok()?;
        Some(table.strip_prefix("/usr/share/zoneinfo").ok()?.display().to_string())
    };
    named.filter(|name| !name.is_empty()).or_else(linked).unwrap_or_else(|| "Etc/UTC".to_owned())
}

/// Copies a file, link or directory with its permissions; what is absent is left out. Owners become
/// root: everything on the list is root's on a sane host.
fn copy(from: &Path, to: &Path) -> Result<(), ImageError> {
    let Ok(metadata) = fs::symlink_metadata(from) else { return Ok(()) };
    if metadata.is_symlink() {
        return at(to, fs::read_link(from).and_then(|target| symlink(target, to)));
    }
    if metadata.is_file() {
        if metadata.len() > FILE_BYTES_MAX && !from.starts_with("/var/lib/dpkg") {
            return Ok(());
        }
        // Unreadable by others means secret.
        if metadata.permissions().mode() & 0o004 == 0 {
            return Ok(());
        }
        return at(to, fs::copy(from, to).map(drop));
    }
    if metadata.is_dir() {
        at(to, fs::create_dir_all(to))?;
        at(to, fs::set_permissions(to, metadata.permissions()))?;
        for entry in at(from, fs::read_dir(from))? {
            let entry = at(from, entry)?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
