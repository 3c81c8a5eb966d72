//! `nagaya purge`.

use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use nagaya_engine::ports::{Driver, Host};
use nagaya_runtime::host::{HostPort, NETWORK_FILE, storage_root};
use nagaya_store::DirectoryLock;

use crate::config::Config;
use crate::server::{ADDRESS_FILE, BLOBS, DATABASE, IMAGES, KEY_FILE, open_blobs, open_host_at_rest};

/// Everything that a server may have put into its data directory.
const DIRECTORIES: [&str; 9] =
    ["sandboxes", "pool", "images", "templates", "disks", "volumes", "records", BLOBS, IMAGES];
const FILES: [&str; 7] =
    [DATABASE, "nagaya.db-wal", "nagaya.db-shm", "nagaya.db.lock", NETWORK_FILE, KEY_FILE, ADDRESS_FILE];

pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    if !config.data_dir.is_dir() {
        crate::say(format_args!("{} does not exist: nothing to remove", config.data_dir.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let removed = crate::runtime()?.block_on(purge(&config))?;
    crate::say(format_args!("removed {removed} sandboxes and the content of {}", config.data_dir.display()));
    Ok(ExitCode::SUCCESS)
}

/// Removes everything; the number of sandboxes that were still there.
pub async fn purge(config: &Config) -> anyhow::Result<usize> {
    // The store's lock keeps a running server's sandboxes safe from us.
    let lock = DirectoryLock::acquire(&config.data_dir).context("is a server still running here?")?;
    let (host, driver) = open_host_at_rest(config).await?;
    let port = HostPort(host.clone());
    let ids = driver.list().await?;
    for id in &ids {
        driver.destroy(*id).await?;
    }
    driver.settled().await;
    for id in port.volumes().await? {
        // The last sandbox that had it lets go of it a moment after its own end.
        port.settle_volume(id).await?;
        port.remove_volume(id).await?;
    }
    if config.blobs.s3.is_some() {
        open_blobs(config)?.retain(&[]).await.context("remove what is in the bucket")?;
    }
    tokio::task::spawn_blocking(move || {
        driver.shut_down();
        host.remove();
    })
    .await?;
    let storage = storage_root(&config.data_dir);
    anyhow::ensure!(
        storage == config.data_dir,
        "{} is still in use: end what uses it, and repeat this",
        storage.display()
    );
    drop(lock);
    for name in DIRECTORIES {
        remove(fs::remove_dir_all(config.data_dir.join(name)), &config.data_dir.join(name))?;
    }
    for name in FILES {
        remove(fs::remove_file(config.data_dir.join(name)), &config.data_dir.join(name))?;
    }
    for entry in fs::read_dir(&config.data_dir)?.flatten() {
        // Damaged databases that were set aside.
        if entry.file_name().to_string_lossy().starts_with(&format!("{DATABASE}.damaged-")) {
            remove(fs::remove_file(entry.path()), &entry.path())?;
        }
    }
    // Stays when the operator keeps something of their own in it.
    let _ = fs::remove_dir(&config.data_dir);
    Ok(ids.len())
}

fn remove(result: io::Result<()>, path: &Path) -> anyhow::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
