//! Volumes.

use nagaya_api::ids::{VolumeId, WorkspaceId};
use nagaya_engine::model::{Volume, VolumeState};
use rusqlite::{Connection, Result, Row, params};

use super::{from_json, id, integer, json, optional_unsigned, unsigned, variant};

pub(crate) const VOLUME_COLUMNS: &str =
    "id, workspace_id, name, size_bytes, growing_to_bytes, state, tags, created_at, updated_at";

const STATES: [VolumeState; 3] = [VolumeState::Creating, VolumeState::Available, VolumeState::Deleting];

pub(super) fn write_volume(database: &Connection, volume: &Volume) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO volumes (id, workspace_id, name, size_bytes, growing_to_bytes, state, tags, created_at,
                 updated_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
             ON CONFLICT (id) DO UPDATE SET
                 workspace_id = excluded.workspace_id, name = excluded.name, size_bytes = excluded.size_bytes,
                 growing_to_bytes = excluded.growing_to_bytes, state = excluded.state, tags = excluded.tags,
                 created_at = excluded.created_at, updated_at = excluded.updated_at",
        )?
        .execute(params![
            volume.id.to_string(),
            volume.workspace_id.to_string(),
            volume.name,
            integer(volume.size_bytes)?,
            volume.growing_to_bytes.map(integer).transpose()?,
            volume.state as i64,
            json(&volume.tags)?,
            integer(volume.created_at)?,
            integer(volume.updated_at)?,
        ])?;
    Ok(())
}

pub(crate) fn read_volume(row: &Row<'_>) -> Result<Volume> {
    Ok(Volume {
        id: id(row, 0, VolumeId::from_uuid)?,
        workspace_id: id(row, 1, WorkspaceId::from_uuid)?,
        name: row.get(2)?,
        size_bytes: unsigned(row, 3)?,
        growing_to_bytes: optional_unsigned(row, 4)?,
        state: variant(row, 5, &STATES, |state| state as i64)?,
        tags: from_json(row, 6)?,
        created_at: unsigned(row, 7)?,
        updated_at: unsigned(row, 8)?,
    })
}
