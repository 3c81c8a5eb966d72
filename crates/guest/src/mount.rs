//! Mounts as descriptors: made detached, passed between processes, attached where they are wanted.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_reconfigure,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// Makes a file system instance and returns it as a detached mount. Options without a value are flags.
pub fn new_filesystem(
    kind: &str,
    options: &[(&str, Option<&str>)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Errno> {
    let context = create(kind, options, None)?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// As [`new_filesystem`], with one more option while the file system is set up, and another one in its place from then on.
pub fn new_filesystem_set_up_with(
    kind: &str,
    options: &[(&str, Option<&str>)],
    during: &str,
    after: &str,
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Errno> {
    let context = create(kind, options, Some(during))?;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    fsconfig_set_flag(context.as_fd(), after)?;
    fsconfig_reconfigure(context.as_fd())?;
    Ok(mount)
}

/// As [`new_filesystem`], with the context through which [`adjust`] changes its options later.
pub fn new_adjustable_filesystem(
    kind: &str,
    options: &[(&str, Option<&str>)],
    attributes: MountAttrFlags,
) -> Result<(OwnedFd, OwnedFd), Errno> {
    let context = create(kind, options, None)?;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    Ok((mount, context))
}

/// Changes options of a file system that has been made.
pub fn adjust(context: BorrowedFd<'_>, options: &[(&str, &str)]) -> Result<(), Errno> {
    for (name, value) in options {
        fsconfig_set_string(context, *name, *value)?;
    }
    fsconfig_reconfigure(context)
}

fn create(kind: &str, options: &[(&str, Option<&str>)], flag: Option<&str>) -> Result<OwnedFd, Errno> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in options {
        match value {
            Some(value) => fsconfig_set_string(context.as_fd(), *name, *value)?,
            None => fsconfig_set_flag(context.as_fd(), *name)?,
        }
    }
    if let Some(flag) = flag {
        fsconfig_set_flag(context.as_fd(), flag)?;
    }
    fsconfig_create(context.as_fd())?;
    Ok(context)
}

/// A detached copy of the mount (or directory, or file) at `path` below `directory`. What is copied must be
/// attached in the caller's mount namespace: Linux before 6.15 refuses to copy from detached mounts (EINVAL).
pub fn clone_tree(directory: BorrowedFd<'_>, path: &str, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(directory, path, flags)
}

/// Attaches a detached mount at `path`, relative to the working directory.
pub fn attach(mount: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
    move_mount(mount, "", rustix::fs::CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Moves what is attached at one path to another one.
pub fn move_attached(from: &str, to: &str) -> Result<(), Errno> {
    move_mount(rustix::fs::CWD, from, rustix::fs::CWD, to, MoveMountFlags::empty())
}

pub const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
pub const NO_SUID: u64 = libc::MOUNT_ATTR_NOSUID;
pub const NO_DEVICES: u64 = libc::MOUNT_ATTR_NODEV;
pub const NO_EXEC: u64 = libc::MOUNT_ATTR_NOEXEC;

/// Sets attributes on a detached mount; with `user_namespace`, also shows every file's owner
/// through that namespace's id map.
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: u64,
    user_namespace: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut request = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    if let Some(namespace) = user_namespace {
        request.attr_set |= libc::MOUNT_ATTR_IDMAP;
        request.userns_fd = namespace.as_raw_fd() as u64;
    }
    let empty = CString::default();
    // SAFETY: the path is a valid C string and the structure outlives the call, which reads it only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const request,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// The calling thread's last error.
pub fn last_errno() -> Errno {
    Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}
