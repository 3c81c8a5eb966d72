//! Workspaces, keys and the server's own settings.

use nagaya_api::ids::{KeyId, WorkspaceId};
use nagaya_engine::model::{ApiKey, Workspace};
use rusqlite::{Connection, Result, Row, params};

use super::{from_json, id, integer, json, unsigned};

pub(crate) const WORKSPACE_COLUMNS: &str = "id, name, created_at, settings";
pub(crate) const API_KEY_COLUMNS: &str = "id, workspace_id, secret_hash, created_at";

pub(super) fn write_workspace(database: &Connection, workspace: &Workspace) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO workspaces (id, name, created_at, settings) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (id) DO UPDATE SET
                 name = excluded.name, created_at = excluded.created_at, settings = excluded.settings",
        )?
        .execute(params![
            workspace.id.to_string(),
            workspace.name,
            integer(workspace.created_at)?,
            json(&workspace.settings)?,
        ])?;
    Ok(())
}

pub(super) fn write_api_key(database: &Connection, key: &ApiKey) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO api_keys (id, workspace_id, secret_hash, created_at) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (id) DO UPDATE SET
                 workspace_id = excluded.workspace_id, secret_hash = excluded.secret_hash, created_at = excluded.created_at",
        )?
        .execute(params![
            key.id.to_string(),
            key.workspace_id.to_string(),
            key.secret_hash.as_slice(),
            integer(key.created_at)?,
        ])?;
    Ok(())
}

pub(super) fn write_setting(database: &Connection, name: &str, value: &[u8]) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO settings (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        )?
        .execute(params![name, value])?;
    Ok(())
}

pub(crate) fn read_workspace(row: &Row<'_>) -> Result<Workspace> {
    Ok(Workspace {
        id: id(row, 0, WorkspaceId::from_uuid)?,
        name: row.get(1)?,
        created_at: unsigned(row, 2)?,
        settings: from_json(row, 3)?,
    })
}

pub(crate) fn read_api_key(row: &Row<'_>) -> Result<ApiKey> {
    Ok(ApiKey {
        id: id(row, 0, KeyId::from_uuid)?,
        workspace_id: id(row, 1, WorkspaceId::from_uuid)?,
        secret_hash: row.get(2)?,
        created_at: unsigned(row, 3)?,
    })
}
