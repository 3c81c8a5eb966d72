//! Snapshots.

use nagaya_api::ids::{DiskImageId, SessionId, SnapshotId, WorkspaceId};
use nagaya_engine::model::{Durability, Snapshot, SnapshotKind, SnapshotState};
use rusqlite::{Connection, Result, Row, params};

use super::{from_json, id, integer, json, optional_unsigned, unsigned, variant};

pub(crate) const SNAPSHOT_COLUMNS: &str = "id, workspace_id, session_id, name, kind, state, durability, tags, created_at, \
     expires_at, local_ready_at, durable_at, machine, env, image_id, copied, source_stopped_us, manifest, size_bytes, \
     stored_bytes, failure_reason, propagation_error";

const KINDS: [SnapshotKind; 3] = [SnapshotKind::User, SnapshotKind::Pause, SnapshotKind::Template];
const STATES: [SnapshotState; 4] =
    [SnapshotState::Creating, SnapshotState::Ready, SnapshotState::Failed, SnapshotState::Deleting];
const DURABILITIES: [Durability; 4] =
    [Durability::None, Durability::LocalReady, Durability::Durable, Durability::PropagationFailed];

pub(super) fn write_snapshot(database: &Connection, snapshot: &Snapshot) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO snapshots (id, workspace_id, session_id, name, kind, state, durability, tags, created_at,
                 expires_at, local_ready_at, durable_at, machine, env, image_id, copied, source_stopped_us, manifest,
                 size_bytes, stored_bytes, failure_reason, propagation_error)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21,
                 ?22)
             ON CONFLICT (id) DO UPDATE SET
                 workspace_id = excluded.workspace_id, session_id = excluded.session_id, name = excluded.name,
                 kind = excluded.kind, state = excluded.state, durability = excluded.durability, tags = excluded.tags,
                 created_at = excluded.created_at, expires_at = excluded.expires_at,
                 local_ready_at = excluded.local_ready_at, durable_at = excluded.durable_at,
                 machine = excluded.machine, env = excluded.env, image_id = excluded.image_id, copied = excluded.copied,
                 source_stopped_us = excluded.source_stopped_us, manifest = excluded.manifest,
                 size_bytes = excluded.size_bytes, stored_bytes = excluded.stored_bytes,
                 failure_reason = excluded.failure_reason, propagation_error = excluded.propagation_error",
        )?
        .execute(params![
            snapshot.id.to_string(),
            snapshot.workspace_id.to_string(),
            snapshot.session_id.to_string(),
            snapshot.name,
            snapshot.kind as i64,
            snapshot.state as i64,
            snapshot.durability as i64,
            json(&snapshot.tags)?,
            integer(snapshot.created_at)?,
            snapshot.expires_at.map(integer).transpose()?,
            snapshot.local_ready_at.map(integer).transpose()?,
            snapshot.durable_at.map(integer).transpose()?,
            json(&snapshot.machine)?,
            json(&snapshot.env)?,
            snapshot.image_id.to_string(),
            snapshot.copied,
            integer(snapshot.source_stopped_us)?,
            snapshot.manifest,
            integer(snapshot.size_bytes)?,
            integer(snapshot.stored_bytes)?,
            snapshot.failure_reason,
            snapshot.propagation_error,
        ])?;
    Ok(())
}

pub(crate) fn read_snapshot(row: &Row<'_>) -> Result<Snapshot> {
    Ok(Snapshot {
        id: id(row, 0, SnapshotId::from_uuid)?,
        workspace_id: id(row, 1, WorkspaceId::from_uuid)?,
        session_id: id(row, 2, SessionId::from_uuid)?,
        name: row.get(3)?,
        kind: variant(row, 4, &KINDS, |kind| kind as i64)?,
        state: variant(row, 5, &STATES, |state| state as i64)?,
        durability: variant(row, 6, &DURABILITIES, |durability| durability as i64)?,
        tags: from_json(row, 7)?,
        created_at: unsigned(row, 8)?,
        expires_at: optional_unsigned(row, 9)?,
        local_ready_at: optional_unsigned(row, 10)?,
        durable_at: optional_unsigned(row, 11)?,
        machine: from_json(row, 12)?,
        env: from_json(row, 13)?,
        image_id: id(row, 14, DiskImageId::from_uuid)?,
        copied: row.get(15)?,
        source_stopped_us: unsigned(row, 16)?,
        manifest: row.get(17)?,
        size_bytes: unsigned(row, 18)?,
        stored_bytes: unsigned(row, 19)?,
        failure_reason: row.get(20)?,
        propagation_error: row.get(21)?,
    })
}
