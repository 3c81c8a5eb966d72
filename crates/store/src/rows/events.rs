//! Events of sessions.

use nagaya_api::ids::{ExecutionId, SessionId};
use nagaya_engine::model::Event;
use rusqlite::{Connection, Result, Row, params};

use super::{from_json, id, integer, json, optional_id, unsigned};

pub(crate) const EVENT_COLUMNS: &str = "session_id, sequence, at, fact, execution_id";

/// Appends an event to its session's, and removes those that are too many.
pub(super) fn write_event(database: &Connection, event: &Event, events_max: u32) -> Result<()> {
    let session_id = event.session_id.to_string();
    let sequence: i64 = database
        .prepare_cached(
            "INSERT INTO events (session_id, sequence, at, fact, execution_id)
             SELECT ?1, coalesce(max(sequence), 0) + 1, ?2, ?3, ?4 FROM events WHERE session_id = ?1
             RETURNING sequence",
        )?
        .query_row(
            params![session_id, integer(event.at)?, json(&event.fact)?, event.execution_id.map(|id| id.to_string())],
            |row| row.get(0),
        )?;
    if sequence > events_max.into() {
        database
            .prepare_cached("DELETE FROM events WHERE session_id = ?1 AND sequence <= ?2")?
            .execute(params![session_id, sequence - i64::from(events_max)])?;
    }
    Ok(())
}

pub(crate) fn read_event(row: &Row<'_>) -> Result<Event> {
    Ok(Event {
        session_id: id(row, 0, SessionId::from_uuid)?,
        sequence: unsigned(row, 1)?,
        at: unsigned(row, 2)?,
        fact: from_json(row, 3)?,
        execution_id: optional_id(row, 4, ExecutionId::from_uuid)?,
    })
}
