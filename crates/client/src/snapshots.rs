//! Snapshots: a sandbox's disk at one moment, to start others from.

use std::time::{Duration, SystemTime};

use nagaya_api::tenki::v1;
use serde::Serialize;

use crate::account::Change;
use crate::client::{PAGE_SIZE, all_pages};
use crate::settable::settable;
use crate::wire::{self, wire_enum};
use crate::{Client, Error, RefusalKind, Result, Session, Status, create, wait};

/// Between two looks at whether a snapshot is durable.
const DURABLE_PAUSE: Duration = Duration::from_secs(2);

wire_enum! {
    SnapshotState, v1::SnapshotState {
        Unspecified = "unspecified",
        Creating = "creating",
        /// Usable on this server.
        Ready = "ready",
        Failed = "failed",
        Deleting = "deleting",
        Deleted = "deleted",
    }
}

wire_enum! {
    /// What a snapshot was taken for.
    SnapshotKind, v1::SnapshotType {
        Unspecified = "unspecified",
        User = "user",
        Pause = "pause",
        Template = "template",
    }
}

wire_enum! {
    /// How safe a snapshot is.
    SnapshotDurability, v1::SnapshotDurabilityState {
        Unspecified = "unspecified",
        /// On the machine that made it.
        LocalReady = "local_ready",
        /// Also where snapshots are kept.
        Durable = "durable",
        PropagationFailed = "propagation_failed",
        DurableCeph = "durable_ceph",
    }
}

#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    pub id: String,
    /// The session that it was taken of.
    pub session_id: String,
    pub workspace_id: Option<String>,
    pub name: Option<String>,
    pub state: SnapshotState,
    pub kind: SnapshotKind,
    pub durability: SnapshotDurability,
    pub size_bytes: u64,
    pub compressed_bytes: u64,
    /// What of it is memory; 0 without.
    pub memory_bytes: u64,
    pub cpu_cores: u32,
    /// MiB.
    pub memory_mb: u32,
    /// GiB.
    pub disk_size_gb: u32,
    pub tags: Vec<String>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub created_at: Option<SystemTime>,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub expires_at: Option<SystemTime>,
    /// Why it failed; empty otherwise.
    pub failure_reason: String,
    /// Why it is not durable; empty otherwise.
    pub propagation_error: String,
    /// `MEMORY` or `COLD_BOOT`.
    pub restore_mode: String,
    pub raw_image_available: bool,
}

settable! {
    #[derive(Debug, Clone, Default)]
    pub struct CreateSnapshotOptions {
        pub name: Option<String>,
        /// The server's choice by default.
        pub expires_at: Option<SystemTime>,
        /// Keep a raw image of the disk as well, for [`Client::snapshot_download_url`].
        pub store_raw_image: bool,
    }
}

settable! {
    /// What [`Client::update_snapshot`] changes; the rest stays.
    #[derive(Debug, Clone, Default)]
    pub struct UpdateSnapshotOptions {
        pub name: Option<String>,
        pub expires_at: Change<SystemTime>,
        /// All tags from now on, which may be none.
        pub tags: Option<Vec<String>>,
    }
}

/// Where a snapshot's disk can be fetched for a while, by whoever has the URL.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct DownloadUrl {
    pub url: String,
    #[serde(serialize_with = "wire::serialize_optional_time")]
    pub expires_at: Option<SystemTime>,
}

impl Session {
    /// Takes a snapshot, and returns when the server has it: READY, unless the server answers earlier.
    pub async fn create_snapshot(&self, options: CreateSnapshotOptions) -> Result<Snapshot> {
        self.take_snapshot(options, false).await
    }

    /// Takes a snapshot, and returns when it has begun.
    pub async fn create_snapshot_async(&self, options: CreateSnapshotOptions) -> Result<Snapshot> {
        self.take_snapshot(options, true).await
    }

    /// Takes a snapshot, and returns when it is READY.
    pub async fn create_snapshot_and_wait(
        &self,
        options: CreateSnapshotOptions,
        timeout: Duration,
    ) -> Result<Snapshot> {
        let snapshot = self.take_snapshot(options, true).await?;
        self.client().wait_snapshot_ready(&snapshot.id, timeout).await
    }

    async fn take_snapshot(&self, options: CreateSnapshotOptions, without_waiting: bool) -> Result<Snapshot> {
        let request = v1::CreateSnapshotRequest {
            session_id: self.id().to_owned(),
            name: options.name,
            expires_at: wire::timestamp(options.expires_at),
            store_raw_image: options.store_raw_image.then_some(true),
            r#async: without_waiting,
        };
        described(self.client().control().create_snapshot(request).await.map_err(Error::of_rpc)?.snapshot)
    }

    /// All snapshots of this session.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let snapshots = all_pages(|page_token| {
            let request =
                v1::ListSessionSnapshotsRequest { session_id: self.id().to_owned(), page_size: PAGE_SIZE, page_token };
            async move {
                let answer = self.client().control().list_session_snapshots(request).await.map_err(Error::of_rpc)?;
                Ok((answer.snapshots, answer.next_page_token))
            }
        });
        Ok(snapshots.await?.into_iter().map(Snapshot::of_wire).collect())
    }
}

impl Client {
    /// Fails with [`RefusalKind::SnapshotNotFound`](crate::RefusalKind::SnapshotNotFound).
    pub async fn get_snapshot(&self, id: &str) -> Result<Snapshot> {
        let request = v1::GetSnapshotRequest { snapshot_id: id.to_owned() };
        described(self.control().get_snapshot(request).await.map_err(Error::of_rpc)?.snapshot)
    }

    /// Waits until a snapshot is READY. Fails with [`Error::SnapshotFailed`].
    pub async fn wait_snapshot_ready(&self, id: &str, timeout: Duration) -> Result<Snapshot> {
        let asking = async {
            for attempt in 0.. {
                let snapshot = self.get_snapshot(id).await?;
                match snapshot.state {
                    SnapshotState::Ready => return Ok(snapshot),
                    SnapshotState::Failed => return Err(Error::SnapshotFailed(snapshot.failure_reason)),
                    SnapshotState::Deleting | SnapshotState::Deleted => return Err(deleted()),
                    _ => wait::pause(attempt).await,
                }
            }
            unreachable!("there is no last attempt")
        };
        let timed_out = |_| Error::TimedOut { what: "taking the snapshot".into(), after: timeout };
        tokio::time::timeout(timeout, asking).await.map_err(timed_out)?
    }

    /// Waits until a snapshot is safe where the server keeps snapshots. Fails with [`RefusalKind::SnapshotNotDurable`](crate::RefusalKind::SnapshotNotDurable) when
    /// it never will be.
    pub async fn wait_snapshot_durable(&self, id: &str, timeout: Duration) -> Result<Snapshot> {
        let asking = async {
            loop {
                let snapshot = self.get_snapshot(id).await?;
                match durable(&snapshot) {
                    Some(Ok(())) => return Ok(snapshot),
                    Some(Err(error)) => return Err(error),
                    None => tokio::time::sleep(DURABLE_PAUSE).await,
                }
            }
        };
        let timed_out = |_| Error::TimedOut { what: "making the snapshot durable".into(), after: timeout };
        tokio::time::timeout(timeout, asking).await.map_err(timed_out)?
    }

    /// All snapshots of a workspace; of the caller's own one when the id is empty.
    pub async fn list_snapshots(&self, workspace_id: &str) -> Result<Vec<Snapshot>> {
        let snapshots = all_pages(|page_token| {
            let request = v1::ListWorkspaceSnapshotsRequest {
                workspace_id: workspace_id.to_owned(),
                page_size: PAGE_SIZE,
                page_token,
            };
            async move {
                let answer = self.control().list_workspace_snapshots(request).await.map_err(Error::of_rpc)?;
                Ok((answer.snapshots, answer.next_page_token))
            }
        });
        Ok(snapshots.await?.into_iter().map(Snapshot::of_wire).collect())
    }

    /// Snapshots whose session has ended.
    pub async fn list_dangling_snapshots(&self) -> Result<Vec<Snapshot>> {
        let snapshots = all_pages(|page_token| {
            let request = v1::ListDanglingSnapshotsRequest { page_size: PAGE_SIZE, page_token };
            async move {
                let answer = self.control().list_dangling_snapshots(request).await.map_err(Error::of_rpc)?;
                Ok((answer.snapshots, answer.next_page_token))
            }
        });
        Ok(snapshots.await?.into_iter().map(Snapshot::of_wire).collect())
    }

    pub async fn update_snapshot(&self, id: &str, options: UpdateSnapshotOptions) -> Result<Snapshot> {
        let request = v1::UpdateSnapshotRequest {
            snapshot_id: id.to_owned(),
            name: options.name,
            clear_expires_at: options.expires_at == Change::Clear,
            expires_at: wire::timestamp(options.expires_at.set()),
            clear_tags: options.tags.as_ref().is_some_and(Vec::is_empty),
            tags: create::tags(&options.tags.unwrap_or_default())?,
        };
        described(self.control().update_snapshot(request).await.map_err(Error::of_rpc)?.snapshot)
    }

    /// Deletes a snapshot and answers what it was.
    pub async fn delete_snapshot(&self, id: &str) -> Result<Snapshot> {
        let request = v1::DeleteSnapshotRequest { snapshot_id: id.to_owned() };
        described(self.control().delete_snapshot(request).await.map_err(Error::of_rpc)?.snapshot)
    }

    pub async fn snapshot_download_url(&self, id: &str) -> Result<DownloadUrl> {
        let request = v1::GetSnapshotDownloadURLRequest { snapshot_id: id.to_owned() };
        let answer = self.control().get_snapshot_download_url(request).await.map_err(Error::of_rpc)?;
        Ok(DownloadUrl { url: answer.url, expires_at: wire::time(answer.expires_at) })
    }
}

/// Whether a snapshot is durable; `None` while that is not decided.
fn durable(snapshot: &Snapshot) -> Option<Result<()>> {
    let never = |why: &str| {
        let message = format!("snapshot not yet durable: {why} [snapshot_not_durable]");
        Some(Err(Error::refused(RefusalKind::SnapshotNotDurable, Status::FailedPrecondition, message)))
    };
    match (snapshot.state, snapshot.durability) {
        (SnapshotState::Deleting | SnapshotState::Deleted, _) => Some(Err(deleted())),
        (SnapshotState::Failed, _) => Some(Err(Error::SnapshotFailed(snapshot.failure_reason.clone()))),
        (_, SnapshotDurability::Durable) => Some(Ok(())),
        (_, SnapshotDurability::PropagationFailed) => never(&snapshot.propagation_error),
        (_, SnapshotDurability::DurableCeph) if !snapshot.propagation_error.is_empty() => {
            never(&snapshot.propagation_error)
        }
        (SnapshotState::Ready, SnapshotDurability::Unspecified) => never("the server does not say where it is kept"),
        _ => None,
    }
}

fn deleted() -> Error {
    let message = "snapshot not found: it was deleted [snapshot_not_found]".to_owned();
    Error::refused(RefusalKind::SnapshotNotFound, Status::NotFound, message)
}

fn described(snapshot: impl Into<Option<v1::Snapshot>>) -> Result<Snapshot> {
    snapshot.into().map(Snapshot::of_wire).ok_or_else(|| Error::bad_answer("it names no snapshot"))
}

impl Snapshot {
    pub(crate) fn of_wire(snapshot: v1::Snapshot) -> Self {
        Self {
            id: snapshot.id,
            session_id: snapshot.session_id,
            workspace_id: snapshot.workspace_id,
            name: snapshot.name,
            state: SnapshotState::of_wire(snapshot.state),
            kind: SnapshotKind::of_wire(snapshot.r#type),
            durability: SnapshotDurability::of_wire(snapshot.durability_state),
            size_bytes: wire::unsigned(snapshot.size_bytes),
            compressed_bytes: wire::unsigned(snapshot.compressed_bytes),
            memory_bytes: wire::unsigned(snapshot.memory_bytes),
            cpu_cores: wire::unsigned(snapshot.cpu_cores),
            memory_mb: wire::unsigned(snapshot.memory_mb),
            disk_size_gb: wire::unsigned(snapshot.disk_size_gb),
            tags: snapshot.tags,
            created_at: wire::time(snapshot.created_at),
            expires_at: wire::time(snapshot.expires_at),
            failure_reason: snapshot.failure_reason,
            propagation_error: snapshot.propagation_error,
            restore_mode: snapshot.restore_mode,
            raw_image_available: snapshot.raw_image_available,
        }
    }
}
