//! Records to rows and back.

mod accounts;
mod events;
mod previews;
mod sessions;
mod snapshots;
mod volumes;

use nagaya_engine::model::UnixMs;
use nagaya_engine::ports::Change;
use rusqlite::types::Type;
use rusqlite::{Connection, Result, Row};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use accounts::{API_KEY_COLUMNS, WORKSPACE_COLUMNS, read_api_key, read_workspace};
pub(crate) use events::{EVENT_COLUMNS, read_event};
pub(crate) use previews::{PREVIEW_COLUMNS, read_preview};
pub(crate) use sessions::{EXECUTION_COLUMNS, SESSION_COLUMNS, read_execution, read_session};
pub(crate) use snapshots::{SNAPSHOT_COLUMNS, read_snapshot};
pub(crate) use volumes::{VOLUME_COLUMNS, read_volume};

/// Applies one change inside the caller's transaction.
pub(crate) fn apply(database: &Connection, change: &Change) -> Result<()> {
    match change {
        Change::Workspace(workspace) => accounts::write_workspace(database, workspace),
        Change::ApiKey(key) => accounts::write_api_key(database, key),
        Change::Session(session) => sessions::write_session(database, session),
        Change::Execution(execution) => sessions::write_execution(database, execution),
        Change::ForgetExecution(id) => forget(database, "DELETE FROM executions WHERE id = ?1", id),
        Change::Snapshot(snapshot) => snapshots::write_snapshot(database, snapshot),
        Change::ForgetSnapshot(id) => forget(database, "DELETE FROM snapshots WHERE id = ?1", id),
        Change::Volume(volume) => volumes::write_volume(database, volume),
        Change::ForgetVolume(id) => forget(database, "DELETE FROM volumes WHERE id = ?1", id),
        Change::Preview(preview) => previews::write_preview(database, preview),
        Change::ForgetPreview(id) => forget(database, "DELETE FROM previews WHERE id = ?1", id),
        Change::Event { event, events_max } => events::write_event(database, event, *events_max),
        Change::ForgetEnded { ended_before, sessions_max } => {
            sessions::forget_ended(database, *ended_before, *sessions_max)
        }
        Change::Setting { name, value } => accounts::write_setting(database, name, value),
    }
}

fn forget(database: &Connection, sql: &str, id: &impl ToString) -> Result<()> {
    database.prepare_cached(sql)?.execute([id.to_string()])?;
    Ok(())
}

/// SQLite's integers have a sign; a number that does not fit is refused rather than wrapped.
pub(crate) fn integer(number: u64) -> Result<i64> {
    i64::try_from(number).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}

pub(crate) fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}

fn from_json<T: DeserializeOwned>(row: &Row<'_>, column: usize) -> Result<T> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| conversion(column, error))
}

fn optional_from_json<T: DeserializeOwned>(row: &Row<'_>, column: usize) -> Result<Option<T>> {
    if is_null(row, column)? { Ok(None) } else { from_json(row, column).map(Some) }
}

fn id<T>(row: &Row<'_>, column: usize, make: fn(uuid::Uuid) -> T) -> Result<T> {
    let text: String = row.get(column)?;
    uuid::Uuid::try_parse(&text).map(make).map_err(|error| conversion(column, error))
}

fn optional_id<T>(row: &Row<'_>, column: usize, make: fn(uuid::Uuid) -> T) -> Result<Option<T>> {
    if is_null(row, column)? { Ok(None) } else { id(row, column, make).map(Some) }
}

/// A number that has no sign: a time, a length, a size.
fn unsigned(row: &Row<'_>, column: usize) -> Result<UnixMs> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, number))
}

fn optional_unsigned(row: &Row<'_>, column: usize) -> Result<Option<UnixMs>> {
    if is_null(row, column)? { Ok(None) } else { unsigned(row, column).map(Some) }
}

/// One of an enumeration's values by its stored number.
fn variant<T: Copy>(row: &Row<'_>, column: usize, all: &[T], number_of: fn(T) -> i64) -> Result<T> {
    let number: i64 = row.get(column)?;
    let found = all.iter().copied().find(|value| number_of(*value) == number);
    found.ok_or(rusqlite::Error::IntegralValueOutOfRange(column, number))
}

fn is_null(row: &Row<'_>, column: usize) -> Result<bool> {
    Ok(row.get_ref(column)?.data_type() == Type::Null)
}

fn conversion(column: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
}
