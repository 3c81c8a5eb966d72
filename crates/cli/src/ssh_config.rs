//! The managed block in `~/.ssh/config`. The user's own lines stay as they are, byte for byte.

use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use crate::errors::{Failure, Local};

const BEGIN: &str = "# >>> nagaya sandboxes >>>\n";
const END: &str = "# <<< nagaya sandboxes <<<\n";

/// What the file says about us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Absent,
    Current,
    /// There is a block, but not the one that would be written now.
    Outdated,
}

impl Status {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absent => "not installed",
            Self::Current => "installed",
            Self::Outdated => "installed, but not by this program as it is now",
        }
    }
}

/// The block: connections to `sbx-SESSION` go through `program`, with a certificate that it gets ready in `state`
/// first. It ends with `Match all`, so that what follows in the file keeps its meaning.
pub fn block(program: &Path, state: &Path) -> Result<String, Failure> {
    let (shell, plain) = (quoted_for_shell(program)?, quoted(state)?);
    Ok(format!(
        "{BEGIN}\
         # Written by `nagaya sandbox ssh config install`; changes in here are lost.\n\
         Host sbx-* \"!*'*\"\n\
         \x20   User root\n\
         \x20   ProxyCommand {shell} sandbox ssh-proxy '%n'\n\
         Match originalhost \"sbx-*,!*'*\" exec \"{shell} sandbox ssh-prepare '%n'\"\n\
         \x20   IdentitiesOnly yes\n\
         \x20   IdentityFile \"{plain}/key\"\n\
         \x20   CertificateFile \"{plain}/%n-cert.pub\"\n\
         \x20   UserKnownHostsFile \"{plain}/%n.known_hosts\"\n\
         Match all\n\
         {END}"
    ))
}

/// A path as a word of a shell inside of double quotes of the configuration.
fn quoted_for_shell(path: &Path) -> Result<String, Failure> {
    Ok(format!("'{}'", quoted(path)?))
}

/// A path between quotes, with percent signs that mean themselves.
fn quoted(path: &Path) -> Result<String, Failure> {
    let text = path.to_str().filter(|text| !text.contains(['\'', '"', '\\', '\n', '\r', '$', '`']));
    let text = text.ok_or_else(|| {
        let what = format!("the path {} cannot stand in OpenSSH's configuration", path.display());
        Failure::new(Local::CannotWrite, what, "Put it where the path has no quotes, backslashes or dollar signs.")
    })?;
    Ok(text.replace('%', "%%"))
}

/// Where the block begins and ends in the text.
fn find(text: &str) -> Result<Option<(usize, usize)>, Failure> {
    let damaged = || {
        let what = "the managed block in OpenSSH's configuration has lost one of its marker lines";
        let remedy = format!("Remove the lines from `{}` to `{}` by hand.", BEGIN.trim_end(), END.trim_end());
        Err(Failure::new(Local::CannotWrite, what, remedy))
    };
    let begins: Vec<usize> = lines(text, BEGIN);
    let ends: Vec<usize> = lines(text, END);
    match (begins[..].first(), ends[..].first(), begins.len(), ends.len()) {
        (None, None, ..) => Ok(None),
        (Some(begin), Some(end), 1, 1) if begin < end => Ok(Some((*begin, (end + END.len()).min(text.len())))),
        _ => damaged(),
    }
}

/// Where whole lines equal this one, the last of which may lack its end.
fn lines(text: &str, wanted: &str) -> Vec<usize> {
    let mut start = 0;
    let mut found = Vec::new();
    for line in text.split_inclusive('\n') {
        if line.trim_end_matches(['\r', '\n']) == wanted.trim_end() {
            found.push(start);
        }
        start += line.len();
    }
    found
}

/// The text with this block. It goes first, because OpenSSH takes the first value that it finds.
fn installed(text: &str, block: &str) -> Result<String, Failure> {
    Ok(match find(text)? {
        Some((begin, end)) => format!("{}{block}{}", &text[..begin], &text[end..]),
        None => format!("{block}{text}"),
    })
}

fn uninstalled(text: &str) -> Result<String, Failure> {
    Ok(match find(text)? {
        Some((begin, end)) => format!("{}{}", &text[..begin], &text[end..]),
        None => text.to_owned(),
    })
}

/// Puts the block into the file; whether anything changed.
pub fn install(file: &Path, block: &str) -> Result<bool, Failure> {
    change(file, |text| installed(text, block))
}

/// Takes the block out of the file; whether anything changed.
pub fn uninstall(file: &Path) -> Result<bool, Failure> {
    change(file, uninstalled)
}

pub fn status(file: &Path, block: &str) -> Result<Status, Failure> {
    let Some(text) = read(file)? else { return Ok(Status::Absent) };
    Ok(match find(&text)? {
        None => Status::Absent,
        Some((begin, end)) if &text[begin..end] == block => Status::Current,
        Some(_) => Status::Outdated,
    })
}

fn read(file: &Path) -> Result<Option<String>, Failure> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::reading(file, &error)),
    }
}

fn change(file: &Path, with: impl FnOnce(&str) -> Result<String, Failure>) -> Result<bool, Failure> {
    let before = read(file)?;
    let after = with(before.as_deref().unwrap_or_default())?;
    if before.as_deref().unwrap_or_default() == after {
        return Ok(false);
    }
    // A link stays a link, as those who keep such files elsewhere want it.
    let real = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    replace(&real, after.as_bytes()).map_err(|error| Failure::writing(&real, &error))?;
    Ok(true)
}

/// Replaces a file in one step. Mode and owner stay; a new file is for its owner alone.
pub fn replace(file: &Path, content: &[u8]) -> io::Result<()> {
    let directory = file.parent().map(PathBuf::from).unwrap_or_default();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
    let existing = fs::metadata(file).ok();
    let mode = existing.as_ref().map_or(0o600, |metadata| metadata.permissions().mode() & 0o777);
    let mut draft = tempfile::Builder::new().prefix(".nagaya-").tempfile_in(&directory)?;
    draft.write_all(content)?;
    if let Some(metadata) = existing {
        // Only root can, and only for root does it matter.
        let _ = fchown(draft.as_file(), Some(metadata.uid()), Some(metadata.gid()));
    }
    draft.as_file().set_permissions(Permissions::from_mode(mode))?;
    draft.as_file().sync_all()?;
    draft.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn some_block() -> String {
        block(Path::new("/usr/bin/nagaya"), Path::new("/home/me/100%/ssh")).unwrap()
    }

    #[test]
    fn the_block_reads_as_meant() {
        let expected = "\
# >>> nagaya sandboxes >>>
# Written by `nagaya sandbox ssh config install`; changes in here are lost.
Host sbx-* \"!*'*\"
    User root
    ProxyCommand '/usr/bin/nagaya' sandbox ssh-proxy '%n'
Match originalhost \"sbx-*,!*'*\" exec \"'/usr/bin/nagaya' sandbox ssh-prepare '%n'\"
    IdentitiesOnly yes
    IdentityFile \"/home/me/100%%/ssh/key\"
    CertificateFile \"/home/me/100%%/ssh/%n-cert.pub\"
    UserKnownHostsFile \"/home/me/100%%/ssh/%n.known_hosts\"
Match all
# <<< nagaya sandboxes <<<
";
        assert_eq!(some_block(), expected);
        assert!(block(Path::new("/it's"), Path::new("/x")).is_err());
        assert!(block(Path::new("/x"), Path::new("/a\"b")).is_err());
    }

    #[test]
    fn it_goes_first_and_is_replaced_in_place() {
        let users = "Host *\n  User me\n";
        let once = installed(users, &some_block()).unwrap();
        assert_eq!(once, format!("{}{users}", some_block()));
        assert_eq!(installed(&once, &some_block()).unwrap(), once);
        let other = block(Path::new("/other"), Path::new("/x")).unwrap();
        let moved = format!("{users}{}# after\n", some_block());
        assert_eq!(installed(&moved, &other).unwrap(), format!("{users}{other}# after\n"));
    }

    #[test]
    fn a_damaged_block_is_left_alone() {
        for text in [BEGIN.to_owned(), END.to_owned(), format!("{END}{BEGIN}"), format!("{BEGIN}{BEGIN}{END}")] {
            assert!(installed(&text, &some_block()).is_err(), "{text}");
            assert!(uninstalled(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn files_keep_mode_and_link() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("real"), directory.path().join("config"));
        fs::write(&file, "Host a\n").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        assert_eq!(status(&link, &some_block()).unwrap(), Status::Absent);
        assert!(install(&link, &some_block()).unwrap());
        assert!(!install(&link, &some_block()).unwrap());
        assert_eq!(status(&link, &some_block()).unwrap(), Status::Current);
        assert_eq!(status(&link, "other").unwrap(), Status::Outdated);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(uninstall(&link).unwrap());
        assert_eq!(fs::read_to_string(&file).unwrap(), "Host a\n");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn a_new_file_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ssh/config");
        assert!(install(&file, &some_block()).unwrap());
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(directory.path().join("ssh")).unwrap().permissions().mode() & 0o777, 0o700);
    }

    proptest! {
        #[test]
        fn the_users_lines_survive(users in "([ -~]{0,12}\r?\n){0,6}[ -~]{0,12}") {
            prop_assume!(find(&users).is_ok_and(|found| found.is_none()));
            let block = some_block();
            let with = installed(&users, &block).unwrap();
            prop_assert_eq!(installed(&with, &block).unwrap(), with.clone());
            prop_assert_eq!(uninstalled(&with).unwrap(), users);
        }
    }
}
