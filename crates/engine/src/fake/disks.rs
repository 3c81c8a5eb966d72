//! The fake driver's images and volumes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use nagaya_api::ids::{DiskImageId, SessionId, VolumeId};

use super::FakeDriver;
use super::files::Files;
use crate::model::Limit;
use crate::ports::{DriverError, Mount};

/// A volume in memory.
pub(super) struct Volume {
    size_bytes: u64,
    files: Arc<Mutex<Files>>,
    pub(super) mounts: Vec<Mounted>,
    /// A process has a file of it open, whatever sandbox it is in.
    in_use: bool,
}

pub(super) struct Mounted {
    pub(super) session_id: SessionId,
    path: String,
    readonly: bool,
    /// Its sandbox is dead, but the mount has not gone yet.
    pub(super) lingers: bool,
}

/// What tests see of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeVolume {
    pub size_bytes: u64,
    /// Every mount, also of sandboxes that have just died: where, and whether it is read-only.
    pub mounts: Vec<(SessionId, String, bool)>,
}

impl FakeDriver {
    /// Images at rest.
    pub fn images_now(&self) -> Vec<DiskImageId> {
        self.images.with(|images| images.keys().copied().collect())
    }

    pub fn volumes_now(&self) -> BTreeMap<VolumeId, FakeVolume> {
        let show = |volume: &Volume| FakeVolume {
            size_bytes: volume.size_bytes,
            mounts: volume.mounts.iter().map(|of| (of.session_id, of.path.clone(), of.readonly)).collect(),
        };
        self.with(|world| world.volumes.iter().map(|(id, volume)| (*id, show(volume))).collect())
    }

    /// While in use, a volume can be unmounted by force only.
    pub fn set_volume_in_use(&self, id: VolumeId, in_use: bool) {
        self.with(|world| world.volumes.get_mut(&id).map(|volume| volume.in_use = in_use));
    }

    /// A file of a volume, wherever that is mounted.
    pub fn volume_file(&self, id: VolumeId, path: &str) -> Option<Vec<u8>> {
        self.with(|world| {
            let files = world.volumes.get(&id)?.files.lock().expect("no holder of this lock panics");
            files.read(path).ok().map(|content| content.to_vec())
        })
    }

    /// A file on a sandbox's own disk, whether or not it runs.
    pub fn disk_file(&self, id: SessionId, path: &str) -> Option<Vec<u8>> {
        self.with(|world| {
            let disk = world.sandbox(id).ok()?.disk.clone()?;
            let files = disk.lock().expect("no holder of this lock panics");
            files.read(path).ok().map(|content| content.to_vec())
        })
    }

    fn space(&self) -> Result<(), DriverError> {
        match self.with(|world| world.full) {
            true => Err(DriverError::Exhausted(Limit::HostDisk)),
            false => Ok(()),
        }
    }

    pub(super) async fn copy_to_images(&self, id: SessionId, images: &[DiskImageId]) -> Result<u64, DriverError> {
        self.step().await?;
        self.space()?;
        let disk = self.with(|world| world.sandbox(id)?.disk.clone().ok_or(DriverError::Gone))?;
        let files = disk.lock().expect("no holder of this lock panics").clone();
        for image in images {
            self.images.with(|all| all.insert(*image, files.clone()));
            if let Err(error) = self.step().await {
                self.images.with(|all| images.iter().for_each(|image| drop(all.remove(image))));
                return Err(error);
            }
        }
        Ok(100)
    }

    pub(super) async fn make_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        self.step().await?;
        self.space()?;
        self.with(|world| {
            world.volumes.entry(id).or_insert_with(|| Volume {
                size_bytes,
                files: Arc::new(Mutex::new(Files::empty())),
                mounts: Vec::new(),
                in_use: false,
            });
        });
        self.step().await
    }

    pub(super) async fn enlarge_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), DriverError> {
        self.step().await?;
        self.space()?;
        self.with(|world| {
            let volume = world.volumes.get_mut(&id).ok_or(DriverError::Gone)?;
            if volume.mounts.iter().any(|mount| mount.readonly) {
                return Err(DriverError::Busy);
            }
            let shrinks = size_bytes < volume.size_bytes;
            volume.size_bytes = volume.size_bytes.max(size_bytes);
            if shrinks {
                world.violations.push(format!("volume {id} was to be shrunk"));
            }
            Ok(())
        })
    }

    pub(super) fn measure_volume(&self, id: VolumeId) -> Result<u64, DriverError> {
        self.with(|world| world.volumes.get(&id).map(|volume| volume.size_bytes).ok_or(DriverError::Gone))
    }

    pub(super) async fn drop_volume(&self, id: VolumeId) -> Result<(), DriverError> {
        self.step().await?;
        self.with(|world| {
            if world.volumes.remove(&id).is_some_and(|volume| !volume.mounts.is_empty()) {
                world.violations.push(format!("volume {id} was removed while mounted"));
            }
        });
        self.step().await
    }

    pub(super) async fn mount_volume(&self, id: SessionId, mount: &Mount) -> Result<(), DriverError> {
        self.step().await?;
        self.with(|world| {
            let guest = world.sandbox(id)?.guest().cloned().ok_or(DriverError::Gone)?;
            let of_others = world.volumes.iter().filter(|(of, _)| **of != mount.volume_id);
            let mut taken = of_others.flat_map(|(_, volume)| &volume.mounts);
            if taken.any(|of| of.session_id == id && of.path == mount.path && !of.lingers) {
                return Err(DriverError::Refused("something is mounted there already".to_owned()));
            }
            let volume = world.volumes.get_mut(&mount.volume_id).ok_or(DriverError::Gone)?;
            if volume.mounts.iter().any(|of| of.session_id == id && !of.lingers) {
                return Ok(());
            }
            if volume.mounts.iter().any(|of| !of.readonly || !mount.readonly) {
                world.violations.push(format!("volume {} was mounted twice for writing", mount.volume_id));
                return Err(DriverError::Busy);
            }
            let (path, readonly) = (mount.path.clone(), mount.readonly);
            volume.mounts.push(Mounted { session_id: id, path: path.clone(), readonly, lingers: false });
            guest.mount(path, volume.files.clone(), readonly);
            Ok(())
        })?;
        self.step().await
    }

    pub(super) async fn unmount_volume(&self, id: SessionId, mount: &Mount, force: bool) -> Result<(), DriverError> {
        self.step().await?;
        self.with(|world| {
            let guest = world.sandbox(id).ok().and_then(|sandbox| sandbox.guest().cloned());
            let Some(volume) = world.volumes.get_mut(&mount.volume_id) else { return Ok(()) };
            if volume.in_use && !force && volume.mounts.iter().any(|of| of.session_id == id) {
                return Err(DriverError::Busy);
            }
            volume.mounts.retain(|of| of.session_id != id);
            if let Some(guest) = guest {
                guest.unmount(&mount.path);
            }
            Ok(())
        })?;
        self.step().await
    }

    pub(super) async fn let_volume_settle(&self, id: VolumeId) -> Result<(), DriverError> {
        self.step().await?;
        self.with(|world| {
            let volume = world.volumes.get_mut(&id).ok_or(DriverError::Gone)?;
            volume.mounts.retain(|of| !of.lingers);
            Ok(())
        })
    }
}
