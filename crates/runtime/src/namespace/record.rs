//! What the driver writes down about a sandbox, so that a later server can take it over.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nagaya_engine::model::Egress;
use serde::{Deserialize, Serialize};

use super::disk;

const FILE: &str = "record.json";

/// New fields must have defaults: sandboxes outlive servers. See decision 0005.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// `None` while only the disk is there.
    pub slot: Option<u32>,
    /// The base layer, which must stay while the sandbox may run on it.
    pub base: PathBuf,
    /// Names the run of the host on which its processes were started.
    #[serde(default)]
    pub boot_id: Option<String>,
    /// It powered itself off, and was not started since.
    #[serde(default)]
    pub powered_off: bool,
    /// The only destinations that it reaches.
    #[serde(default)]
    pub egress: Option<Egress>,
}

impl Record {
    /// Replaces what was written before, whole. Not synced.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        self.replace(directory, |_| Ok(()))
    }

    /// As [`Record::write`], and survives a power cut.
    pub fn write_synced(&self, directory: &Path) -> io::Result<()> {
        self.replace(directory, File::sync_all)?;
        sync_directory(directory)
    }

    fn replace(&self, directory: &Path, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let fresh = directory.join(format!("{FILE}.new"));
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        sync(&file)?;
        fs::rename(&fresh, directory.join(FILE))
    }

    /// `None` when there is no sandbox in the directory. A record that a power cut took is no loss: nothing runs
    /// that it could describe, and the disk is what counts.
    pub fn read(directory: &Path) -> Option<Self> {
        let record = fs::read(directory.join(FILE)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        record.or_else(|| disk::path(directory).exists().then(Self::default))
    }
}

/// Makes a new record durable, and with it the sandbox's name.
pub(super) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory.join(FILE))?.sync_all()?;
    sync_directory(directory)?;
    directory.parent().map_or(Ok(()), sync_directory)
}

/// Makes durable what a directory's entries are called.
pub(super) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Names this run of the host.
pub(super) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_first_version_can_be_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let old = r#"{"slot":7,"machine":{"cpu_cores":1},"base":"/images/host-1"}"#;
        fs::write(directory.path().join(FILE), old).expect("write");
        let expected = Record { slot: Some(7), base: "/images/host-1".into(), ..Record::default() };
        assert_eq!(Record::read(directory.path()), Some(expected));
    }

    #[test]
    fn a_disk_without_a_readable_record_is_a_stopped_sandbox_and_nothing_is_none() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(Record::read(directory.path()), None);
        fs::write(directory.path().join(FILE), "").expect("write");
        assert_eq!(Record::read(directory.path()), None);
        fs::write(disk::path(directory.path()), "").expect("write");
        assert_eq!(Record::read(directory.path()), Some(Record::default()));
    }

    #[test]
    fn what_is_written_is_read_and_replaced_whole() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut record = Record { slot: Some(1), boot_id: Some("x".into()), ..Record::default() };
        record.write(directory.path()).expect("write");
        assert_eq!(Record::read(directory.path()), Some(record.clone()));
        (record.slot, record.powered_off) = (None, true);
        record.write_synced(directory.path()).expect("write");
        assert_eq!(Record::read(directory.path()), Some(record));
    }
}
