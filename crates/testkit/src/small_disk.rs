//! A file system of its own on a file, for a host that runs out of space.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// An ext4 file system of a chosen size, mounted in a directory of its own until it is dropped.
pub struct SmallDisk(TempDir);

impl SmallDisk {
    pub fn mount(megabytes: u64) -> Self {
        let place = tempfile::Builder::new().prefix("nagaya-small-").tempdir().unwrap();
        let disk = Self(place);
        let image = disk.0.path().join("image");
        File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        must(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image));
        fs::create_dir(disk.path()).unwrap();
        must(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(disk.path()));
        disk
    }

    pub fn path(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    /// Takes all space that is left, until the file that this returns is removed.
    pub fn fill(&self) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = File::create(&path).unwrap();
        for size in [1 << 20, 4 << 10] {
            while file.write_all(&vec![0x55; size]).and_then(|()| file.sync_data()).is_ok() {}
        }
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the kernel closes the files behind a sandbox's loop devices on a thread of its own, some time
        // after the last process that used them has ended.
        let _ = system(Command::new("umount").arg("-l").arg(self.path())).status();
    }
}

fn system(command: &mut Command) -> &mut Command {
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
}

fn must(command: &mut Command) {
    let status = system(command).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}
