//! Who commands of an image run as: its word, looked up in the account files of the image itself.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::ImageError;
use crate::tree::{self, OPAQUE};

/// Of an account file; a longer one is not read.
const FILE_BYTES_MAX: u64 = 1 << 20;
const LINKS_MAX: usize = 10;
const IDS: u32 = 1 << 16;

/// An account, as the sandbox counts ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// The number where the image has no name for it.
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// Absolute; `/` where the image knows none.
    pub home: String,
}

/// Finds the account that an image names: `""` is root; else `USER` or `USER:GROUP`, each a name or a number. `layers` are those of the
/// image, the uppermost first. Numbers need not be known to the image; names must.
pub fn resolve_user(layers: &[PathBuf], user: &str, what: &str) -> Result<User, ImageError> {
    let invalid = |problem: String| ImageError::invalid_image(what, problem);
    let merged = Merged::open(layers)?;
    let (wanted, group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    let wanted = if wanted.is_empty() { "0" } else { wanted };
    let known = merged.read("etc/passwd")?.unwrap_or_default();
    let accounts = || known.lines().filter_map(Account::parse);
    let number = wanted.parse::<u32>().ok();
    let found = accounts().find(|account| account.name == wanted);
    let found = found.or_else(|| accounts().find(|account| Some(account.uid) == number));
    let mut account = match (found, number) {
        (Some(account), _) => {
            let home = if account.home.starts_with('/') { account.home } else { "/" };
            User { name: account.name.into(), uid: account.uid, gid: account.gid, home: home.into() }
        }
        (None, Some(uid)) => {
            let name = if uid == 0 { "root".to_owned() } else { uid.to_string() };
            User { name, uid, gid: 0, home: "/".into() }
        }
        (None, None) => {
            return Err(invalid(format!(
                "its user {wanted:?} is not in its /etc/passwd; name another one, or a number"
            )));
        }
    };
    if let Some(group) = group.filter(|group| !group.is_empty()) {
        let known = merged.read("etc/group")?.unwrap_or_default();
        let groups = known.lines().filter_map(|line| {
            let mut fields = line.split(':');
            Some((fields.next()?, fields.nth(1)?.trim().parse::<u32>().ok()?))
        });
        let found = groups.into_iter().find(|(name, _)| *name == group).map(|(_, gid)| gid);
        account.gid = found.or_else(|| group.parse().ok()).ok_or_else(|| {
            invalid(format!("its group {group:?} is not in its /etc/group; name another one, or a number"))
        })?;
    }
    match account.uid < IDS && account.gid < IDS {
        true => Ok(account),
        false => Err(invalid(format!(
            "its user {user:?} is {}:{}, and sandboxes have the ids 0 to {} only",
            account.uid,
            account.gid,
            IDS - 1
        ))),
    }
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, uid, gid, _, home, ..] = fields[..] else { return None };
        (!name.is_empty()).then_some(Self { name, uid: uid.trim().parse().ok()?, gid: gid.trim().parse().ok()?, home })
    }
}

/// Layers as overlayfs would show them, without a mount.
struct Merged {
    /// The uppermost first.
    layers: Vec<OwnedFd>,
}

/// What a path is in the stack.
enum Found {
    Nothing,
    /// Of the layer of this number.
    Something(usize, Stat),
}

const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

impl Merged {
    fn open(layers: &[PathBuf]) -> Result<Self, ImageError> {
        let open = |path: &PathBuf| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).map_err(ImageError::io("open a layer"))
        };
        Ok(Self { layers: layers.iter().map(open).collect::<Result<_, _>>()? })
    }

    /// The text of a file, if there is a regular one of that name. Links are followed as the image would.
    fn read(&self, path: &str) -> Result<Option<String>, ImageError> {
        let failed = |error: Errno| ImageError::io(format!("read /{path} of an image"))(error);
        let Some((layer, path)) = self.resolve(path).map_err(failed)? else { return Ok(None) };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(&self.layers[layer], &path, flags, Mode::empty(), BENEATH).map_err(failed)?;
        let mut bytes = Vec::new();
        let read = File::from(file).take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
        let read = read.map_err(ImageError::io(format!("read /{path} of an image")))?;
        if read as u64 > FILE_BYTES_MAX {
            return Err(ImageError::invalid_image(
                format!("/{path}"),
                format!("it has more than {FILE_BYTES_MAX} bytes"),
            ));
        }
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The layer and the path in it of the regular file that a path leads to.
    fn resolve(&self, path: &str) -> Result<Option<(usize, String)>, Errno> {
        let mut todo: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut here: Vec<String> = Vec::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    here.pop();
                    continue;
                }
                _ => here.push(part),
            }
            let Found::Something(layer, stat) = self.look(&here)? else { return Ok(None) };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {}
                FileType::RegularFile if todo.is_empty() => return Ok(Some((layer, here.join("/")))),
                FileType::Symlink if links < LINKS_MAX => {
                    links += 1;
                    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let link = rustix::fs::openat2(&self.layers[layer], here.join("/"), flags, Mode::empty(), BENEATH)?;
                    let target = rustix::fs::readlinkat(&link, "", Vec::new())?;
                    let Ok(target) = target.to_str() else { return Ok(None) };
                    match target.starts_with('/') {
                        true => here.clear(),
                        false => drop(here.pop()),
                    }
                    todo.extend(target.split('/').rev().map(str::to_owned));
                }
                _ => return Ok(None),
            }
        }
        Ok(None)
    }

    /// What the stack shows under a path, all parents of which it shows as directories.
    fn look(&self, path: &[String]) -> Result<Found, Errno> {
        let at = |layer: &OwnedFd, length: usize| match status(layer, &path[..length].join("/")) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        };
        for (number, layer) in self.layers.iter().enumerate() {
            match at(layer, path.len()) {
                Ok(Some((_, stat))) if tree::is_whiteout(&stat) => return Ok(Found::Nothing),
                Ok(Some((_, stat))) => return Ok(Found::Something(number, stat)),
                Ok(None) => {}
                // Something above it is no directory here, and hides what lower layers have in it.
                Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Found::Nothing),
                Err(error) => return Err(error),
            }
            for length in 0..path.len() {
                let Some((directory, stat)) = at(layer, length)? else { break };
                if !tree::is_directory(&stat) || is_opaque(&directory)? {
                    return Ok(Found::Nothing);
                }
            }
        }
        Ok(Found::Nothing)
    }
}

fn status(layer: &OwnedFd, path: &str) -> Result<(OwnedFd, Stat), Errno> {
    let path = if path.is_empty() { "." } else { path };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(layer, path, flags, Mode::empty(), BENEATH)?;
    let stat = rustix::fs::fstat(&found)?;
    Ok((found, stat))
}

/// Whether a directory hides what lower layers have in it.
pub(crate) fn is_opaque(directory: &OwnedFd) -> Result<bool, Errno> {
    // A descriptor that is only a path has no attributes; its name in /proc has.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(directory));
    let mut value = [0; 2];
    match rustix::fs::getxattr(&path, OPAQUE, &mut value) {
        Ok(length) => Ok(value[..length] == *b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error),
    }
}
