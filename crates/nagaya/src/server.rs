//! The parts of a server, put together: store, driver, engine, daemon.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nagaya_blobs::BlobStore;
use nagaya_daemon::host::{HostClock, HostEntropy};
use nagaya_daemon::{Daemon, GiveBack, Hooks, Level, Levels, Listeners};
use nagaya_engine::ports::{Blobs, Driver, Drivers, Entropy, Images, Ports, Store};
use nagaya_engine::{Engine, check_secret};
use nagaya_image::ImageStore;
use nagaya_runtime::host::{self, DiskPool, Host, HostPort};
use nagaya_runtime::namespace::{NamespaceDriver, Pools};

use crate::config::Config;
use crate::guard;
use crate::images::ImagePort;

/// Names in the data directory that are not the driver's.
pub const DATABASE: &str = "nagaya.db";
pub const KEY_FILE: &str = "api-key";
pub const ADDRESS_FILE: &str = "address";
pub const BLOBS: &str = "blobs";
/// Images from elsewhere.
pub const IMAGES: &str = "oci";

/// How long a step of the server's end may take.
const STEP_MAX: Duration = Duration::from_secs(8);

pub struct Server {
    daemon: Daemon,
    driver: Arc<NamespaceDriver>,
    tls: bool,
    data_dir: PathBuf,
    drain_timeout: Duration,
    pub key_file: PathBuf,
    /// The key made at the first start of this data directory.
    pub new_key: Option<String>,
}

impl Server {
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        make_data_directory(&config.data_dir)?;
        let discard = config.engine.discard_unrecorded;
        if !discard {
            guard::before_opening(&config.data_dir)?;
        }
        let key_file = config.data_dir.join(KEY_FILE);
        let (key, new_key) = first_key(&key_file, config.data_dir.join(DATABASE).exists(), config.api_key.as_deref())?;
        let store = guard::open_store(&config.data_dir)?;
        match discard {
            true => guard::discard(&store)?,
            false => guard::after_opening(&store, &config.data_dir).await?,
        }
        let store: Arc<dyn Store> = Arc::new(store);
        let host = open_host(&config).await?;
        make_image(host.clone()).await?;
        let driver = Arc::new(NamespaceDriver::start(host.clone(), NAMESPACE, &config.namespace));
        let drivers = drivers(&config.drivers.default, [(NAMESPACE, driver.clone() as Arc<dyn Driver>)])?;
        let blobs = open_blobs(&config)?;
        let images = open_images(&config).await?;
        let (clock, entropy) = (Arc::new(HostClock), Arc::new(HostEntropy));
        let listeners = Listeners::open(&config.daemon).await?;
        host.keep_reachable(listeners.local_addr().port());
        let ingress = listeners.ingress();
        let ports = Ports { store, drivers, host: Arc::new(HostPort(host)), images, blobs, ingress, clock, entropy };
        let engine = Engine::start(config.engine.clone(), ports).await?;
        for key in [key.as_deref(), config.api_key.as_deref()].into_iter().flatten() {
            engine.first_start(Some(key)).await?;
        }
        let (tls, data_dir) = (config.daemon.tls.is_some(), config.data_dir.clone());
        let drain_timeout = Duration::from_millis(config.daemon.limits.drain_timeout_ms);
        let level = driver.clone();
        let pools: Levels =
            Arc::new(move || level.pool_levels().map(|(name, value)| Level { name: name.into(), value }).to_vec());
        let give_back: GiveBack = Arc::new(nagaya_runtime::give_memory_back);
        let daemon = Daemon::start(
            &config.daemon,
            engine,
            Hooks { pools: Some(pools), listeners: Some(listeners), give_back: Some(give_back) },
        )
        .await?;
        let server = Self { daemon, driver, tls, data_dir, drain_timeout, key_file, new_key };
        write_private(&server.data_dir.join(ADDRESS_FILE), &server.url())?;
        Ok(server)
    }

    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.daemon.local_addr())
    }

    /// Ends the server and leaves the sandboxes running.
    /// Each step is given up after a while: what it was to give back goes with the process, or is swept by the next start.
    pub async fn stop(self) {
        let _ = fs::remove_file(self.data_dir.join(ADDRESS_FILE));
        within("finish what is under way", self.drain_timeout + STEP_MAX, self.daemon.shut_down()).await;
        within("let go of ended sandboxes", STEP_MAX, self.driver.settled()).await;
        let driver = self.driver;
        // Gives back what the pools hold; takes as long as unmounting it.
        let giving_back = tokio::task::spawn_blocking(move || driver.shut_down());
        within("give back what was pre-created", STEP_MAX, giving_back).await;
    }
}

async fn within<T>(what: &str, limit: Duration, step: impl Future<Output = T>) {
    if tokio::time::timeout(limit, step).await.is_err() {
        tracing::warn!(?limit, "stopping: it takes too long to {what}; going on without");
    }
}

/// The key of the key file, and whether it was made now. It is on disk before the store hears of
/// it, so that no crash can leave a server whose only key nobody knows. The operator's own key, where one is configured,
/// is the first and only one of a new directory.
fn first_key(
    file: &Path,
    known_directory: bool,
    configured: Option<&str>,
) -> anyhow::Result<(Option<String>, Option<String>)> {
    if let Ok(text) = fs::read_to_string(file) {
        return Ok((Some(text.trim().to_owned()), None));
    }
    // The operator of a directory that was in use has put the key elsewhere.
    if known_directory {
        return Ok((None, None));
    }
    if let Some(key) = configured {
        check_secret(key)?;
        write_private(file, key)?;
        return Ok((Some(key.to_owned()), None));
    }
    let mut random = [0; 32];
    HostEntropy.fill(&mut random);
    let key = random.iter().fold(String::from("tk_"), |text, byte| format!("{text}{byte:02x}"));
    write_private(file, &key)?;
    Ok((Some(key.clone()), Some(key)))
}

pub fn make_data_directory(path: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("make the data directory {}", path.display()))
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}

/// The place of the snapshots' bytes, after the driver has opened the storage that it is in. A bucket need not be
/// reachable yet.
pub fn open_blobs(config: &Config) -> anyhow::Result<Arc<dyn Blobs>> {
    let directory = host::storage_root(&config.data_dir).join(BLOBS);
    let Some(s3) = &config.blobs.s3 else {
        return Ok(Arc::new(BlobStore::open(&directory)?));
    };
    Ok(Arc::new(BlobStore::open_with_s3(&directory, s3, &s3.credentials()?)?))
}

/// The images that came from elsewhere, after the driver has opened the storage that they are in.
async fn open_images(config: &Config) -> anyhow::Result<Arc<dyn Images>> {
    let (directory, config) = (host::storage_root(&config.data_dir).join(IMAGES), config.images.clone());
    let opened = tokio::task::spawn_blocking(move || ImageStore::open(&directory, config)).await?;
    Ok(Arc::new(ImagePort::new(opened.context("open the images")?)))
}

/// What the namespace driver is called.
pub const NAMESPACE: &str = "namespace";

/// The drivers of this server.
fn drivers<const N: usize>(default: &str, drivers: [(&str, Arc<dyn Driver>); N]) -> anyhow::Result<Drivers> {
    let by_name: BTreeMap<String, _> = drivers.into_iter().map(|(name, driver)| (name.to_owned(), driver)).collect();
    let known = || by_name.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    anyhow::ensure!(by_name.contains_key(default), "drivers.default {default:?} is none of this server's: {}", known());
    Ok(Drivers::new(default, by_name))
}

/// Prepares the host.
pub async fn open_host(config: &Config) -> anyhow::Result<Arc<Host>> {
    let (data, config) = (config.data_dir.clone(), config.host.clone());
    let opened = tokio::task::spawn_blocking(move || Host::open(&data, config)).await?;
    opened.context("`nagaya doctor` tells what this host lacks")
}

async fn make_image(host: Arc<Host>) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || host.make_image()).await?.context("make what new sandboxes stand on")
}

/// As [`open_host`], for looking after what is there: without a pool of disks of its own, and with a driver that pre-creates
/// nothing.
pub async fn open_host_at_rest(config: &Config) -> anyhow::Result<(Arc<Host>, NamespaceDriver)> {
    let mut config = config.clone();
    config.host.disks.pool = DiskPool::Off;
    config.namespace.pools = Pools { slots_ready: 0, isolated_slots_ready: 0 };
    let host = open_host(&config).await?;
    Ok((host.clone(), NamespaceDriver::start(host, NAMESPACE, &config.namespace)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a start finds and leaves: the key that opens the server, the one that is told, and the file.
    fn started(
        known: bool,
        file: Option<&str>,
        configured: Option<&str>,
    ) -> (Option<String>, Option<String>, Option<String>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(KEY_FILE);
        if let Some(text) = file {
            fs::write(&path, text).unwrap();
        }
        let (key, told) = first_key(&path, known, configured).unwrap();
        (key, told, fs::read_to_string(&path).ok().map(|text| text.trim().to_owned()))
    }

    #[test]
    fn a_new_directory_has_one_key_and_it_is_the_configured_one() {
        let own = "tk_of_the_operators_choice";
        let (key, told, file) = started(false, None, Some(own));
        assert_eq!((key.as_deref(), told, file.as_deref()), (Some(own), None, Some(own)));
        let (key, told, file) = started(false, None, None);
        assert!(key.is_some() && key == told && key == file);
        assert_eq!(started(true, None, Some(own)), (None, None, None), "the operator keeps it elsewhere");
        let kept = Some("tk_kept".to_owned());
        assert_eq!(started(true, Some("tk_kept\n"), Some(own)), (kept.clone(), None, kept));
    }

    #[test]
    fn a_key_that_is_refused_is_written_nowhere() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(KEY_FILE);
        assert!(first_key(&path, false, Some("short")).is_err());
        assert!(!path.exists());
    }
}
