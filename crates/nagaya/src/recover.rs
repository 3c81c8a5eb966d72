//! `nagaya recover`: gives records again to what lies in a data directory.
//!
//! A database that is damaged is set aside. What the second copy of the records has is put back into the database; what
//! has no record there either (sandboxes, volumes, snapshots' manifests) gets one that is as good as can be told from the
//! thing itself. Nothing is removed, and everything can be repeated.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use nagaya_api::ids::{DiskImageId, KeyId, SessionId, SnapshotId, VolumeId, WorkspaceId};
use nagaya_blobs::Manifest;
use nagaya_daemon::host::HostEntropy;
use nagaya_engine::model::{
    Durability, ImageDigest, Machine, Resources, Session, SessionState, Snapshot, SnapshotKind, SnapshotState, UnixMs,
    Volume, VolumeState, Workspace, WorkspaceSettings,
};
use nagaya_engine::ports::{Change, Driver, Entropy, Host, Store, StoreError};
use nagaya_runtime::host::{HostPort, storage_root};
use nagaya_runtime::namespace::NamespaceDriver;
use nagaya_store::SqliteStore;

use crate::config::Config;
use crate::guard;
use crate::server::{BLOBS, DATABASE, NAMESPACE, open_host_at_rest};

const GIB: u64 = 1 << 30;

pub fn run(config: Config) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(config.data_dir.is_dir(), "{} does not exist: nothing to recover", config.data_dir.display());
    let runtime = crate::runtime()?;
    let told = runtime.block_on(recover(&config))?;
    runtime.shutdown_timeout(crate::RUNTIME_END_MAX);
    crate::say(told);
    Ok(ExitCode::SUCCESS)
}

async fn recover(config: &Config) -> anyhow::Result<String> {
    let store = open_or_set_aside(&config.data_dir)?;
    let (records, unreadable) = store.put_back().await.map_err(guard::store_error)?;
    let (host, driver) = open_host_at_rest(config).await?;
    let made = describe(&store, &HostPort(host), &driver, &storage_root(&config.data_dir)).await?;
    let count = |matches: fn(&Change) -> bool| made.iter().filter(|change| matches(change)).count();
    let told = format!(
        "{records} records put back from their copies, {unreadable} copies set aside that could not be read\n\
         made from what was found: {} sandboxes, {} volumes, {} snapshots\n\
         nothing was removed; start the server again",
        count(|change| matches!(change, Change::Session(_))),
        count(|change| matches!(change, Change::Volume(_))),
        count(|change| matches!(change, Change::Snapshot(_))),
    );
    store.commit(made).await.map_err(guard::store_error)?;
    tokio::task::spawn_blocking(move || driver.shut_down()).await?;
    Ok(told)
}

/// The database; a new one where it is damaged or empty.
fn open_or_set_aside(data_dir: &Path) -> anyhow::Result<SqliteStore> {
    match SqliteStore::open(&data_dir.join(DATABASE)) {
        Err(StoreError::Damaged(reason)) => {
            let aside = aside(data_dir);
            crate::say(format_args!("{reason}: it is set aside as {}", aside.display()));
            set_aside(data_dir, &aside).context("set the damaged database aside")?;
            guard::open_store(data_dir)
        }
        opened => opened.map_err(guard::store_error),
    }
}

fn aside(data_dir: &Path) -> PathBuf {
    let name = |number: u32| data_dir.join(format!("{DATABASE}.damaged-{number}"));
    (1..).map(name).find(|path| !path.exists()).expect("no directory has four billion files")
}

/// The database last: whoever finds it gone finds nothing of it that could be taken for a new one's.
fn set_aside(data_dir: &Path, aside: &Path) -> std::io::Result<()> {
    for suffix in ["-wal", "-shm", ""] {
        let from = data_dir.join(format!("{DATABASE}{suffix}"));
        let to = PathBuf::from(format!("{}{suffix}", aside.display()));
        match fs::rename(from, to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::File::open(data_dir)?.sync_all()
}

/// Records for everything that has none.
async fn describe(
    store: &SqliteStore,
    host: &HostPort,
    driver: &NamespaceDriver,
    storage: &Path,
) -> anyhow::Result<Vec<Change>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as UnixMs);
    let mut records = Vec::new();
    let workspace_id = match store.workspaces().await.map_err(guard::store_error)?.first() {
        Some(workspace) => workspace.id,
        None => {
            let id = WorkspaceId::new(now, random());
            let settings = WorkspaceSettings::default();
            records.push(Change::Workspace(Workspace { id, name: "default".into(), created_at: now, settings }));
            id
        }
    };
    for id in driver.list().await? {
        if store.session(id).await.map_err(guard::store_error)?.is_none() {
            let disk = storage.join("sandboxes").join(id.to_string()).join("disk.ext4");
            let bytes = fs::metadata(disk).map_or(0, |disk| disk.len());
            let root = host.root_of(id).await?.unwrap_or_default();
            records.push(Change::Session(session(id, workspace_id, machine(bytes, root), now)));
        }
    }
    for id in host.volumes().await? {
        if store.volume(id).await.map_err(guard::store_error)?.is_none() {
            let size_bytes = host.volume_size(id).await?;
            records.push(Change::Volume(volume(id, workspace_id, size_bytes, now)));
        }
    }
    let snapshots = store.all_snapshots().await.map_err(guard::store_error)?;
    for (digest, manifest) in nagaya_blobs::manifests(&storage.join(BLOBS))? {
        if !snapshots.iter().any(|snapshot| snapshot.manifest == digest) {
            records.push(Change::Snapshot(snapshot(digest, &manifest, workspace_id, now)));
        }
    }
    Ok(records)
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    HostEntropy.fill(&mut bytes);
    bytes
}

/// What it has beyond its disk is not known any more: it gets what sandboxes get, and no way out.
fn machine(disk_bytes: u64, root: ImageDigest) -> Machine {
    let least = Resources::default();
    let disk_bytes = disk_bytes.next_multiple_of(GIB).max(least.disk_bytes);
    Machine { resources: Resources { disk_bytes, ..least }, root, image: String::new(), outbound: false, egress: None }
}

fn session(id: SessionId, workspace_id: WorkspaceId, machine: Machine, now: UnixMs) -> Session {
    Session {
        id,
        workspace_id,
        owner_id: KeyId::from_uuid(*workspace_id.as_uuid()),
        name: format!("recovered-{}", short(&id)),
        name_is_unique: false,
        // The next start finds out whether it runs.
        state: SessionState::Running,
        machine,
        inbound: false,
        env: Default::default(),
        metadata: Default::default(),
        tags: Vec::new(),
        ssh_authorized_keys: Vec::new(),
        sticky: false,
        idle_timeout_minutes: Some(0),
        pause_retention_ms: None,
        wake_on_visit: None,
        created_at: now,
        ready_at: Some(now),
        terminated_at: None,
        timeout_at: None,
        last_activity_at: now,
        end_reason: None,
        terminal_error: String::new(),
        exhausted: None,
        isolation: None,
        driver: NAMESPACE.into(),
        source_snapshot_id: None,
        source_image_id: None,
        pause: None,
        last_resume_error: String::new(),
        last_resume: None,
        attachments: Vec::new(),
    }
}

fn volume(id: VolumeId, workspace_id: WorkspaceId, size_bytes: u64, now: UnixMs) -> Volume {
    Volume {
        id,
        workspace_id,
        name: format!("recovered-{}", short(&id)),
        size_bytes,
        growing_to_bytes: None,
        state: VolumeState::Available,
        tags: Vec::new(),
        created_at: now,
        updated_at: now,
    }
}

fn snapshot(digest: String, manifest: &Manifest, workspace_id: WorkspaceId, now: UnixMs) -> Snapshot {
    let id = SnapshotId::new(now, random());
    Snapshot {
        id,
        workspace_id,
        session_id: SessionId::new(now, random()),
        name: format!("recovered-{}", short(&id)),
        kind: SnapshotKind::User,
        state: SnapshotState::Ready,
        durability: Durability::LocalReady,
        tags: Vec::new(),
        created_at: now,
        expires_at: None,
        local_ready_at: Some(now),
        durable_at: None,
        // The next start takes it for a copy of a disk over the host's own image.
        machine: machine(manifest.image_size, ImageDigest::default()),
        env: Default::default(),
        image_id: DiskImageId::new(now, random()),
        copied: false,
        source_stopped_us: 0,
        manifest: digest,
        size_bytes: manifest.data_bytes(),
        stored_bytes: manifest.data_bytes(),
        failure_reason: String::new(),
        propagation_error: String::new(),
    }
}

/// The end of an id: what comes first in it is the time.
fn short(id: &dyn std::fmt::Display) -> String {
    let text = id.to_string();
    text[text.len() - 8..].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_large_enough_for_the_disk_that_was_found() {
        let of = |bytes| machine(bytes, ImageDigest::default());
        let gigabytes = |bytes| of(bytes).resources.disk_bytes / GIB;
        assert_eq!((gigabytes(0), gigabytes(7 * GIB), gigabytes(7 * GIB + 1)), (5, 7, 8));
        assert!(!of(GIB).outbound);
    }

    #[test]
    fn a_damaged_database_is_set_aside_whole_and_never_over_another() {
        let directory = tempfile::tempdir().expect("a directory");
        for round in 1..=2 {
            for suffix in ["", "-wal"] {
                fs::write(directory.path().join(format!("{DATABASE}{suffix}")), [round]).expect("write");
            }
            set_aside(directory.path(), &aside(directory.path())).expect("set aside");
            assert!(!directory.path().join(DATABASE).exists());
        }
        for round in 1..=2 {
            for suffix in ["", "-wal"] {
                let kept = directory.path().join(format!("{DATABASE}.damaged-{round}{suffix}"));
                assert_eq!(fs::read(kept).expect("read"), [round]);
            }
        }
    }
}
