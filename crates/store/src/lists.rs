//! The statements of the lists: newest first, in pages by key.

use nagaya_engine::model::UnixMs;
use nagaya_engine::ports::{PreviewQuery, SessionQuery, SnapshotQuery, VolumeQuery};
use rusqlite::types::Value;

use crate::rows;

/// A statement and the values of its parameters, in order.
pub(crate) struct List {
    pub sql: String,
    pub values: Vec<Value>,
}

pub(crate) fn sessions(query: &SessionQuery) -> rusqlite::Result<List> {
    let mut list = List::new("sessions", rows::SESSION_COLUMNS);
    if let Some(workspace_id) = query.workspace_id {
        list.filter("workspace_id = ?", Value::Text(workspace_id.to_string()));
    }
    if let Some(owner_id) = &query.owner_id {
        list.filter("owner_id = ?", Value::Text(owner_id.clone()));
    }
    if let Some(state) = query.state {
        list.filter("state = ?", Value::Integer(state as i64));
    }
    if let Some(sticky) = query.sticky {
        list.filter("sticky = ?", Value::Integer(sticky.into()));
    }
    if !query.tags.is_empty() {
        list.filter(
            "NOT EXISTS (SELECT 1 FROM json_each(?) AS wanted
                 WHERE wanted.value NOT IN (SELECT present.value FROM json_each(sessions.tags) AS present))",
            Value::Text(rows::json(&query.tags)?),
        );
    }
    if !query.include_terminated {
        list.sql.push_str(" AND state <> 6");
    }
    list.page(query.before, query.limit)
}

pub(crate) fn snapshots(query: &SnapshotQuery) -> rusqlite::Result<List> {
    let mut list = List::new("snapshots", rows::SNAPSHOT_COLUMNS);
    if let Some(workspace_id) = query.workspace_id {
        list.filter("workspace_id = ?", Value::Text(workspace_id.to_string()));
    }
    if let Some(session_id) = query.session_id {
        list.filter("session_id = ?", Value::Text(session_id.to_string()));
    }
    if query.dangling {
        list.sql.push_str(
            " AND NOT EXISTS (SELECT 1 FROM sessions WHERE sessions.id = snapshots.session_id AND sessions.state <> 6)",
        );
    }
    list.page(query.before, query.limit)
}

pub(crate) fn volumes(query: &VolumeQuery) -> rusqlite::Result<List> {
    let mut list = List::new("volumes", rows::VOLUME_COLUMNS);
    if let Some(workspace_id) = query.workspace_id {
        list.filter("workspace_id = ?", Value::Text(workspace_id.to_string()));
    }
    list.page(query.before, query.limit)
}

pub(crate) fn previews(query: &PreviewQuery) -> rusqlite::Result<List> {
    let mut list = List::new("previews", rows::PREVIEW_COLUMNS);
    if let Some(workspace_id) = query.workspace_id {
        list.filter("workspace_id = ?", Value::Text(workspace_id.to_string()));
    }
    if let Some(kind) = query.kind {
        list.filter("kind = ?", Value::Integer(kind as i64));
    }
    if let Some(session_id) = query.session_id {
        list.filter("session_id = ?", Value::Text(session_id.to_string()));
    }
    list.page(query.before, query.limit)
}

impl List {
    fn new(table: &str, columns: &str) -> Self {
        Self { sql: format!("SELECT {columns} FROM {table} WHERE true"), values: Vec::new() }
    }

    fn filter(&mut self, condition: &str, value: Value) {
        self.values.push(value);
        self.sql.push_str(" AND ");
        self.sql.push_str(condition);
    }

    fn page(mut self, before: Option<(UnixMs, impl ToString)>, limit: u32) -> rusqlite::Result<Self> {
        if let Some((created_at, id)) = before {
            self.filter("(created_at, id) < (?, ?)", Value::Integer(rows::integer(created_at)?));
            self.values.push(Value::Text(id.to_string()));
        }
        self.sql.push_str(" ORDER BY created_at DESC, id DESC LIMIT ?");
        self.values.push(Value::Integer(limit.into()));
        Ok(self)
    }
}
