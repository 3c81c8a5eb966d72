//! Unpacks an archive that a sandbox sends. Every byte of it is hostile: nothing outside of the target is touched,
//! whatever names and links it holds or are there already, because no link is ever followed below the target.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path};

use rustix::fs::{self, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType};

use crate::errors::{Failure, Local};

/// Puts everything of an archive into the directory, which is made where it is missing. Files appear under their
/// names when they are whole. The length of what was unpacked. Devices and pipes are left out, with a warning.
pub fn unpack(archive: impl Read, directory: &Path) -> Result<u64, Failure> {
    std::fs::create_dir_all(directory).map_err(|error| Failure::writing(directory, &error))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root =
        fs::openat(CWD, directory, flags, Mode::empty()).map_err(|errno| Failure::writing(directory, &errno.into()))?;
    let mut archive = Archive::new(archive);
    let mut total = 0;
    for entry in archive.entries().map_err(|error| damaged(&error))? {
        let mut entry = entry.map_err(|error| damaged(&error))?;
        total += one(&root, &mut entry, directory)?;
    }
    Ok(total)
}

fn one(root: &OwnedFd, entry: &mut Entry<'_, impl Read>, directory: &Path) -> Result<u64, Failure> {
    let names = inside(&entry.path_bytes())?;
    let shown = names.iter().fold(directory.to_owned(), |path, name| path.join(name));
    let problem = |error: io::Error| Failure::writing(&shown, &error);
    let mode = Mode::from_raw_mode(entry.header().mode().unwrap_or(0o644) & 0o777);
    let Some((name, parents)) = names.split_last() else { return Ok(0) };
    let parent = walk(root, parents).map_err(problem)?;
    match entry.header().entry_type() {
        EntryType::Directory => walk(&parent, std::slice::from_ref(name)).map(|_| 0).map_err(problem),
        EntryType::Regular | EntryType::Continuous => file(&parent, name, mode, entry, &shown),
        EntryType::Symlink => {
            let target = entry.link_name_bytes().unwrap_or_default().into_owned();
            in_place(&parent, name, |draft| fs::symlinkat(OsStr::from_bytes(&target), &parent, draft))
                .map_err(problem)?;
            Ok(0)
        }
        EntryType::Link => {
            let source = inside(&entry.link_name_bytes().unwrap_or_default())?;
            let Some((source, parents)) = source.split_last() else { return Ok(0) };
            let from = walk(root, parents).map_err(problem)?;
            in_place(&parent, name, |draft| fs::linkat(&from, source, &parent, draft, AtFlags::empty()))
                .map_err(problem)?;
            Ok(0)
        }
        _ => {
            eprintln!("warning: {} is neither file, directory nor link, and is left out", shown.display());
            Ok(0)
        }
    }
}

/// The parts of a path that stays inside.
fn inside(path: &[u8]) -> Result<Vec<OsString>, Failure> {
    let outside = || {
        let what =
            format!("the sandbox's archive holds a path that leads outside: {:?}", String::from_utf8_lossy(path));
        Failure::new(Local::Broken, what, "What came before it was copied. Trust nothing of this sandbox.")
    };
    let path = Path::new(OsStr::from_bytes(path));
    let parts = path.components().filter(|part| !matches!(part, Component::CurDir));
    parts
        .map(|part| match part {
            Component::Normal(name) => Ok(OsString::from_vec(name.as_bytes().to_vec())),
            _ => Err(outside()),
        })
        .collect()
}

/// The directory at the end of the names, made where it is missing. A link on the way is an error.
fn walk(root: &OwnedFd, names: &[OsString]) -> io::Result<OwnedFd> {
    let mut directory = root.try_clone()?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for name in names {
        match fs::mkdirat(&directory, name.as_os_str(), Mode::from_raw_mode(0o777)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        directory = fs::openat(&directory, name.as_os_str(), flags, Mode::empty())?;
    }
    Ok(directory)
}

fn file(
    parent: &OwnedFd,
    name: &OsStr,
    mode: Mode,
    from: &mut Entry<'_, impl Read>,
    shown: &Path,
) -> Result<u64, Failure> {
    let (draft, size) = (draft_name(name), from.size());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let _ = fs::unlinkat(parent, draft.as_os_str(), AtFlags::empty());
    let opened = fs::openat(parent, draft.as_os_str(), flags, mode);
    let mut to = std::fs::File::from(opened.map_err(|errno| Failure::writing(shown, &errno.into()))?);
    let copied = io::copy(from, &mut to).map_err(|error| Failure::writing(shown, &error)).and_then(|length| {
        if length != size {
            return Err(damaged(&io::ErrorKind::UnexpectedEof.into()));
        }
        let renamed = fs::renameat(parent, draft.as_os_str(), parent, name);
        renamed.map(|()| length).map_err(|errno| Failure::writing(shown, &errno.into()))
    });
    if copied.is_err() {
        let _ = fs::unlinkat(parent, draft.as_os_str(), AtFlags::empty());
    }
    copied
}

/// Makes something under another name first, so that it replaces what is there in one step.
fn in_place(parent: &OwnedFd, name: &OsStr, make: impl FnOnce(&OsStr) -> Result<(), Errno>) -> io::Result<()> {
    let draft = draft_name(name);
    let _ = fs::unlinkat(parent, draft.as_os_str(), AtFlags::empty());
    make(&draft)?;
    fs::renameat(parent.as_fd(), draft.as_os_str(), parent, name)?;
    // Two names of one file are left alone by a rename.
    let _ = fs::unlinkat(parent, draft.as_os_str(), AtFlags::empty());
    Ok(())
}

/// Short, because the name may be as long as names can be.
fn draft_name(name: &OsStr) -> OsString {
    let kept = &name.as_bytes()[..name.len().min(64)];
    OsString::from_vec([b".nagaya-", kept, b"-", std::process::id().to_string().as_bytes()].concat())
}

fn damaged(error: &io::Error) -> Failure {
    let what = format!("the sandbox's archive is damaged: {error}");
    Failure::new(Local::Broken, what, "Look whether `tar` works in the sandbox.")
}

#[cfg(test)]
mod tests {
    use std::fs as std_fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    type Made = (EntryType, &'static str, &'static str, u32);

    /// An archive of entries whose names are not checked, as a hostile sandbox would send it.
    fn archive(entries: &[Made]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (kind, name, content, mode) in entries {
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(*mode);
            let is_file = *kind == EntryType::Regular;
            header.set_size(if is_file { content.len() as u64 } else { 0 });
            if !is_file {
                header.as_old_mut().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, if is_file { content.as_bytes() } else { b"" }).unwrap();
        }
        builder.into_inner().unwrap()
    }

    const FILE: EntryType = EntryType::Regular;

    #[test]
    fn files_directories_and_links_arrive() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("new/target");
        let entries = [
            (EntryType::Directory, "./", "", 0o755),
            (FILE, "./run", "#!", 0o755),
            (FILE, "./deep/er/note", "hello", 0o600),
            (EntryType::Symlink, "./link", "../anywhere", 0o777),
            (EntryType::Link, "./same", "./run", 0o755),
            (EntryType::Fifo, "./pipe", "", 0o644),
        ];
        assert_eq!(unpack(&archive(&entries)[..], &target).unwrap(), 7);
        assert_eq!(std_fs::read(target.join("deep/er/note")).unwrap(), b"hello");
        assert_eq!(std_fs::metadata(target.join("run")).unwrap().permissions().mode() & 0o700, 0o700);
        assert_eq!(std_fs::metadata(target.join("deep/er/note")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std_fs::read_link(target.join("link")).unwrap(), Path::new("../anywhere"));
        assert_eq!(std_fs::read(target.join("same")).unwrap(), b"#!");
        let names = std_fs::read_dir(&target).unwrap().count();
        assert_eq!(names, 4, "run, deep, link and same");
        // Again, over what is there now.
        assert_eq!(unpack(&archive(&entries)[..], &target).unwrap(), 7);
        assert_eq!(std_fs::read_dir(&target).unwrap().count(), 4);
    }

    #[test]
    fn nothing_leaves_the_target() {
        let directory = tempfile::tempdir().unwrap();
        let (target, outside) = (directory.path().join("target"), directory.path().join("outside"));
        std_fs::create_dir_all(&target).unwrap();
        std_fs::create_dir_all(&outside).unwrap();
        std_fs::write(outside.join("precious"), "mine").unwrap();
        symlink(&outside, target.join("old-link")).unwrap();
        symlink(outside.join("precious"), target.join("to-file")).unwrap();
        let attacks: [&[Made]; 6] = [
            &[(FILE, "../outside/new", "x", 0o644)],
            &[(FILE, "/tmp/nagaya-unpack-test", "x", 0o644)],
            &[(FILE, "a/../../outside/new", "x", 0o644)],
            &[(EntryType::Symlink, "way", "../outside", 0o777), (FILE, "way/new", "x", 0o644)],
            &[(FILE, "old-link/new", "x", 0o644)],
            &[(EntryType::Link, "stolen", "../outside/precious", 0o644)],
        ];
        for attack in attacks {
            assert!(unpack(&archive(attack)[..], &target).is_err(), "{attack:?}");
        }
        // A link in the place of a file is replaced, not followed.
        unpack(&archive(&[(FILE, "to-file", "theirs", 0o644)])[..], &target).unwrap();
        assert_eq!(std_fs::read(target.join("to-file")).unwrap(), b"theirs");
        assert_eq!(std_fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(std_fs::read(outside.join("precious")).unwrap(), b"mine");
    }

    #[test]
    fn half_a_file_has_no_name() {
        let directory = tempfile::tempdir().unwrap();
        let whole = archive(&[(FILE, "file", &"x".repeat(2000).leak()[..], 0o644)]);
        assert!(unpack(&whole[..1500], directory.path()).is_err());
        assert_eq!(std_fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
