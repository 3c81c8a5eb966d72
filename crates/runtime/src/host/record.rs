//! What the driver writes down about a sandbox, so that a later server can take it over.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use nagaya_engine::model::{Egress, ImageDigest, RootImage};
use serde::{Deserialize, Deserializer, Serialize};

use super::disk;
use super::host_image::digest_of_base;

const FILE: &str = "record.json";

/// New fields must have defaults: sandboxes outlive servers. See decision 0005.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// `None` while only the disk is there.
    pub slot: Option<u32>,
    /// The driver that runs it.
    #[serde(default = "first_driver")]
    pub driver: String,
    /// The image that its disk was written over; `None` where that was lost with the record.
    #[serde(default, alias = "base", deserialize_with = "digest")]
    pub root: Option<ImageDigest>,
    /// The uid of the image's user, as the sandbox counts it.
    #[serde(default = "first_user")]
    pub user_id: u32,
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

/// Servers that knew one image wrote the directory of its base layer instead.
fn digest<'de, D: Deserializer<'de>>(from: D) -> Result<Option<ImageDigest>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    Ok(text.and_then(|text| match text.starts_with('/') {
        true => digest_of_base(Path::new(&text)),
        false => Some(ImageDigest::new(text)).filter(|digest| !digest.is_unknown()),
    }))
}

/// The user of the one image there was.
fn first_user() -> u32 {
    1000
}

impl Default for Record {
    fn default() -> Self {
        Self {
            slot: None,
            driver: first_driver(),
            root: None,
            boot_id: None,
            powered_off: false,
            egress: None,
            user_id: first_user(),
        }
    }
}

/// Records of servers that had one driver do not name it.
fn first_driver() -> String {
    "namespace".to_owned()
}

impl Record {
    /// Of a sandbox that starts now, with the number that it has got.
    pub fn new(driver: &str, root: &RootImage, number: u32, boot_id: String) -> Self {
        Self {
            slot: Some(number),
            driver: driver.to_owned(),
            root: Some(root.digest.clone()),
            user_id: root.user.uid,
            boot_id: Some(boot_id),
            ..Self::default()
        }
    }

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
pub(crate) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory.join(FILE))?.sync_all()?;
    sync_directory(directory)?;
    directory.parent().map_or(Ok(()), sync_directory)
}

/// Makes durable what a directory's entries are called.
pub(crate) fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Names this run of the host.
pub(crate) fn boot_id() -> io::Result<String> {
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
        let record = Record::read(directory.path()).expect("a record");
        assert_eq!((record.slot, record.driver.as_str()), (Some(7), "namespace"));
        assert_eq!(record.root, Some(ImageDigest::new("host:1")));
        record.write(directory.path()).expect("write");
        assert_eq!(Record::read(directory.path()), Some(record));
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
        let image = RootImage {
            digest: ImageDigest::new("host:1"),
            layers: Vec::new(),
            user: Default::default(),
            workdir: None,
            env: Default::default(),
        };
        let mut record = Record::new("some", &image, 1, "x".into());
        record.write(directory.path()).expect("write");
        assert_eq!(Record::read(directory.path()), Some(record.clone()));
        (record.slot, record.powered_off) = (None, true);
        record.write_synced(directory.path()).expect("write");
        assert_eq!(Record::read(directory.path()), Some(record));
    }
}
