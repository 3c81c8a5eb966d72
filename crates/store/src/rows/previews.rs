//! Previews.

use nagaya_api::ids::{KeyId, PreviewId, SessionId, WorkspaceId};
use nagaya_engine::model::{Binding, Preview, PreviewKind, PreviewState};
use rusqlite::{Connection, Result, Row, params};

use super::{id, integer, optional_id, optional_unsigned, unsigned, variant};

pub(crate) const PREVIEW_COLUMNS: &str = "id, workspace_id, owner_id, kind, state, label, session_id, port, expires_at, \
     edge_port, created_at, updated_at, last_accessed_at";

const KINDS: [PreviewKind; 3] = [PreviewKind::Exposed, PreviewKind::Named, PreviewKind::Private];
const STATES: [PreviewState; 2] = [PreviewState::Making, PreviewState::Live];

pub(super) fn write_preview(database: &Connection, preview: &Preview) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO previews (id, workspace_id, owner_id, kind, state, label, session_id, port, expires_at,
                 edge_port, created_at, updated_at, last_accessed_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
             ON CONFLICT (id) DO UPDATE SET
                 workspace_id = excluded.workspace_id, owner_id = excluded.owner_id, kind = excluded.kind,
                 state = excluded.state, label = excluded.label, session_id = excluded.session_id,
                 port = excluded.port, expires_at = excluded.expires_at, edge_port = excluded.edge_port,
                 created_at = excluded.created_at, updated_at = excluded.updated_at,
                 last_accessed_at = excluded.last_accessed_at",
        )?
        .execute(params![
            preview.id.to_string(),
            preview.workspace_id.to_string(),
            preview.owner_id.to_string(),
            preview.kind as i64,
            preview.state as i64,
            preview.label,
            preview.binding.map(|binding| binding.session_id.to_string()),
            preview.binding.map(|binding| binding.port),
            preview.expires_at.map(integer).transpose()?,
            preview.ingress_port,
            integer(preview.created_at)?,
            integer(preview.updated_at)?,
            preview.last_accessed_at.map(integer).transpose()?,
        ])?;
    Ok(())
}

pub(crate) fn read_preview(row: &Row<'_>) -> Result<Preview> {
    let session_id = optional_id(row, 6, SessionId::from_uuid)?;
    let port: Option<u16> = row.get(7)?;
    Ok(Preview {
        id: id(row, 0, PreviewId::from_uuid)?,
        workspace_id: id(row, 1, WorkspaceId::from_uuid)?,
        owner_id: id(row, 2, KeyId::from_uuid)?,
        kind: variant(row, 3, &KINDS, |kind| kind as i64)?,
        state: variant(row, 4, &STATES, |state| state as i64)?,
        label: row.get(5)?,
        binding: session_id.zip(port).map(|(session_id, port)| Binding { session_id, port }),
        expires_at: optional_unsigned(row, 8)?,
        ingress_port: row.get(9)?,
        created_at: unsigned(row, 10)?,
        updated_at: unsigned(row, 11)?,
        last_accessed_at: optional_unsigned(row, 12)?,
    })
}
