//! What lets a package manager go on in the image from where it stands on the host.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::accounts::Accounts;
use super::{ImageError, at, copy};

const DATABASE: &str = "/var/lib/dpkg";
/// Files below directories that packages own, and that scripts of packages read.
const OF_PACKAGES: [&str; 2] = ["etc/default/useradd", "etc/default/locale"];
/// The base layer writes some files of packages itself. Nobody is there to be asked whether those are good.
const NO_QUESTIONS: &str = "force-confdef\nforce-confold\n";
/// There is no service manager, and what packages would start as they are installed, nothing would stop again.
const NO_SERVICES: &str =
    "#!/bin/sh\n# Services of packages are not started in a sandbox: nothing manages them here.\nexit 101\n";

/// What package managers know of the programs in `/usr`; without it they would install over them.
pub(super) fn make_database(base: &Path, accounts: &Accounts) -> Result<(), ImageError> {
    let inside = base.join("var/lib/dpkg");
    copy(Path::new(DATABASE), &inside)?;
    if !inside.exists() {
        return Ok(());
    }
    let overrides = inside.join("statoverride");
    at(&overrides, fs::write(&overrides, &accounts.overrides))?;
    let settings = base.join("etc/dpkg/dpkg.cfg.d");
    at(&settings, fs::create_dir_all(&settings))?;
    let settings = settings.join("sandbox");
    at(&settings, fs::write(&settings, NO_QUESTIONS))
}

/// Directories of packages whose content is not taken over: their scripts write there.
pub(super) fn make_directories(base: &Path, accounts: &Accounts) -> Result<(), ImageError> {
    let base = &at(base, fs::canonicalize(base))?;
    // Never through a link: the image's absolute ones lead into the host here.
    let is_within = |path: &Path| {
        path.parent().is_some_and(|parent| {
            fs::canonicalize(parent).is_ok_and(|found| found == parent && found.starts_with(base))
        })
    };
    for directory in directories(Path::new(DATABASE)) {
        let inside = base.join(directory.strip_prefix("/").unwrap_or(&directory));
        let Ok(metadata) = fs::symlink_metadata(&directory) else { continue };
        if !metadata.is_dir() || !is_within(&inside) || fs::symlink_metadata(&inside).is_ok() {
            continue;
        }
        at(&inside, fs::create_dir(&inside))?;
        let (uid, gid) = accounts.inside(metadata.uid(), metadata.gid());
        at(&inside, chown(&inside, Some(uid), Some(gid)))?;
        at(&inside, fs::set_permissions(&inside, Permissions::from_mode(metadata.mode() & 0o7777)))?;
    }
    for name in OF_PACKAGES {
        if is_within(&base.join(name)) {
            copy(&Path::new("/").join(name), &base.join(name))?;
        }
    }
    Ok(())
}

/// What the database lists below `/etc` and `/var`, parents first.
fn directories(database: &Path) -> BTreeSet<PathBuf> {
    let lists = fs::read_dir(database.join("info")).into_iter().flatten().flatten().map(|entry| entry.path());
    let lists = lists.filter(|path| path.extension().is_some_and(|extension| extension == "list"));
    let mut found = BTreeSet::new();
    for text in lists.filter_map(|path| fs::read_to_string(path).ok()) {
        let below = |line: &&str| line.starts_with("/etc/") || line.starts_with("/var/");
        found.extend(text.lines().filter(below).filter(|line| !line.contains("/..")).map(PathBuf::from));
    }
    found
}

/// Lays it over the host's, in the directory of its programs for root.
pub(super) fn forbid_services(programs: &Path) -> Result<(), ImageError> {
    let path = programs.join("policy-rc.d");
    at(&path, fs::write(&path, NO_SERVICES))?;
    at(&path, fs::set_permissions(&path, Permissions::from_mode(0o755)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_packages_are_those_below_etc_and_var_parents_first() {
        let database = tempfile::tempdir().unwrap();
        fs::create_dir(database.path().join("info")).unwrap();
        let list = "/.\n/usr\n/usr/share/x\n/var/lib/x/y\n/var/lib/x\n/var/lib\n/etc/x\n/etc/../root\n/varx/a\n";
        fs::write(database.path().join("info/x.list"), list).unwrap();
        fs::write(database.path().join("info/x.md5sums"), "/var/other\n").unwrap();
        let found: Vec<_> = directories(database.path()).into_iter().collect();
        assert_eq!(found, ["/etc/x", "/var/lib", "/var/lib/x", "/var/lib/x/y"].map(PathBuf::from));
    }

    #[test]
    fn nothing_is_made_through_a_link_of_the_image() {
        let base = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        // Wherever packages of this machine have a directory, the image has a link that leads out of it.
        std::os::unix::fs::symlink(elsewhere.path(), base.path().join("etc")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), base.path().join("var")).unwrap();
        make_directories(base.path(), &Accounts::of(super::super::accounts::Host::read())).unwrap();
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
}
