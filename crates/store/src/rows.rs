//! Records to rows and back.

use nagaya_api::ids::{ExecutionId, KeyId, SessionId, WorkspaceId};
use nagaya_engine::model::{ApiKey, Execution, ExecutionStatus, Machine, Session, SessionState, UnixMs, Workspace};
use nagaya_engine::ports::Change;
use rusqlite::types::Type;
use rusqlite::{Connection, Result, Row, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) const WORKSPACE_COLUMNS: &str = "id, name, created_at, sessions_max";
pub(crate) const API_KEY_COLUMNS: &str = "id, workspace_id, secret_hash, created_at";
pub(crate) const SESSION_COLUMNS: &str = "id, workspace_id, owner_id, name, state, cpu_cores, memory_mb, disk_gb, outbound, \
     inbound, env, metadata, tags, ssh_authorized_keys, sticky, idle_timeout_minutes, pause_retention_ms, created_at, \
     ready_at, terminated_at, timeout_at, last_activity_at, terminal_error, driver";
pub(crate) const EXECUTION_COLUMNS: &str =
    "id, session_id, command, args, status, exit_code, duration_ms, started_at, ended_at";

/// Applies one change inside the caller's transaction.
pub(crate) fn apply(database: &Connection, change: &Change) -> Result<()> {
    match change {
        Change::Workspace(workspace) => write_workspace(database, workspace),
        Change::ApiKey(key) => write_api_key(database, key),
        Change::Session(session) => write_session(database, session),
        Change::Execution(execution) => write_execution(database, execution),
        Change::ForgetExecution(id) => {
            database.prepare_cached("DELETE FROM executions WHERE id = ?1")?.execute([id.to_string()])?;
            Ok(())
        }
        Change::Setting { name, value } => {
            database
                .prepare_cached(
                    "INSERT INTO settings (name, value) VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                )?
                .execute(params![name, value])?;
            Ok(())
        }
    }
}

fn write_workspace(database: &Connection, workspace: &Workspace) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO workspaces (id, name, created_at, sessions_max) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (id) DO UPDATE SET
                 name = excluded.name, created_at = excluded.created_at, sessions_max = excluded.sessions_max",
        )?
        .execute(params![
            workspace.id.to_string(),
            workspace.name,
            integer(workspace.created_at)?,
            workspace.sessions_max,
        ])?;
    Ok(())
}

fn write_api_key(database: &Connection, key: &ApiKey) -> Result<()> {
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

fn write_session(database: &Connection, session: &Session) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO sessions (id, workspace_id, owner_id, name, state, cpu_cores, memory_mb, disk_gb, outbound,
                 inbound, env, metadata, tags, ssh_authorized_keys, sticky, idle_timeout_minutes, pause_retention_ms,
                 created_at, ready_at, terminated_at, timeout_at, last_activity_at, terminal_error, driver)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21,
                 ?22, ?23, ?24)
             ON CONFLICT (id) DO UPDATE SET
                 workspace_id = excluded.workspace_id, owner_id = excluded.owner_id, name = excluded.name,
                 state = excluded.state, cpu_cores = excluded.cpu_cores, memory_mb = excluded.memory_mb,
                 disk_gb = excluded.disk_gb, outbound = excluded.outbound, inbound = excluded.inbound,
                 env = excluded.env, metadata = excluded.metadata, tags = excluded.tags,
                 ssh_authorized_keys = excluded.ssh_authorized_keys, sticky = excluded.sticky,
                 idle_timeout_minutes = excluded.idle_timeout_minutes, pause_retention_ms = excluded.pause_retention_ms,
                 created_at = excluded.created_at, ready_at = excluded.ready_at, terminated_at = excluded.terminated_at,
                 timeout_at = excluded.timeout_at, last_activity_at = excluded.last_activity_at,
                 terminal_error = excluded.terminal_error, driver = excluded.driver",
        )?
        .execute(params![
            session.id.to_string(),
            session.workspace_id.to_string(),
            session.owner_id.to_string(),
            session.name,
            session.state as i64,
            session.machine.cpu_cores,
            session.machine.memory_mb,
            session.machine.disk_gb,
            session.machine.outbound,
            session.inbound,
            json(&session.env)?,
            json(&session.metadata)?,
            json(&session.tags)?,
            json(&session.ssh_authorized_keys)?,
            session.sticky,
            session.idle_timeout_minutes,
            session.pause_retention_ms.map(integer).transpose()?,
            integer(session.created_at)?,
            session.ready_at.map(integer).transpose()?,
            session.terminated_at.map(integer).transpose()?,
            session.timeout_at.map(integer).transpose()?,
            integer(session.last_activity_at)?,
            session.terminal_error,
            session.driver,
        ])?;
    Ok(())
}

fn write_execution(database: &Connection, execution: &Execution) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO executions (id, session_id, command, args, status, exit_code, duration_ms, started_at, ended_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
             ON CONFLICT (id) DO UPDATE SET
                 session_id = excluded.session_id, command = excluded.command, args = excluded.args,
                 status = excluded.status, exit_code = excluded.exit_code, duration_ms = excluded.duration_ms,
                 started_at = excluded.started_at, ended_at = excluded.ended_at",
        )?
        .execute(params![
            execution.id.to_string(),
            execution.session_id.to_string(),
            execution.command,
            json(&execution.args)?,
            execution.status as i64,
            execution.exit_code,
            integer(execution.duration_ms)?,
            integer(execution.started_at)?,
            execution.ended_at.map(integer).transpose()?,
        ])?;
    Ok(())
}

pub(crate) fn read_workspace(row: &Row<'_>) -> Result<Workspace> {
    Ok(Workspace {
        id: id(row, 0, WorkspaceId::from_uuid)?,
        name: row.get(1)?,
        created_at: time(row, 2)?,
        sessions_max: row.get(3)?,
    })
}

pub(crate) fn read_api_key(row: &Row<'_>) -> Result<ApiKey> {
    Ok(ApiKey {
        id: id(row, 0, KeyId::from_uuid)?,
        workspace_id: id(row, 1, WorkspaceId::from_uuid)?,
        secret_hash: row.get(2)?,
        created_at: time(row, 3)?,
    })
}

pub(crate) fn read_session(row: &Row<'_>) -> Result<Session> {
    let state: i64 = row.get(4)?;
    Ok(Session {
        id: id(row, 0, SessionId::from_uuid)?,
        workspace_id: id(row, 1, WorkspaceId::from_uuid)?,
        owner_id: id(row, 2, KeyId::from_uuid)?,
        name: row.get(3)?,
        state: SessionState::from_number(state).ok_or(rusqlite::Error::IntegralValueOutOfRange(4, state))?,
        machine: Machine {
            cpu_cores: row.get(5)?,
            memory_mb: row.get(6)?,
            disk_gb: row.get(7)?,
            outbound: row.get(8)?,
        },
        inbound: row.get(9)?,
        env: from_json(row, 10)?,
        metadata: from_json(row, 11)?,
        tags: from_json(row, 12)?,
        ssh_authorized_keys: from_json(row, 13)?,
        sticky: row.get(14)?,
        idle_timeout_minutes: row.get(15)?,
        pause_retention_ms: optional_time(row, 16)?,
        created_at: time(row, 17)?,
        ready_at: optional_time(row, 18)?,
        terminated_at: optional_time(row, 19)?,
        timeout_at: optional_time(row, 20)?,
        last_activity_at: time(row, 21)?,
        terminal_error: row.get(22)?,
        driver: row.get(23)?,
    })
}

pub(crate) fn read_execution(row: &Row<'_>) -> Result<Execution> {
    let status: i64 = row.get(4)?;
    Ok(Execution {
        id: id(row, 0, ExecutionId::from_uuid)?,
        session_id: id(row, 1, SessionId::from_uuid)?,
        command: row.get(2)?,
        args: from_json(row, 3)?,
        status: execution_status(status).ok_or(rusqlite::Error::IntegralValueOutOfRange(4, status))?,
        exit_code: row.get(5)?,
        duration_ms: time(row, 6)?,
        started_at: time(row, 7)?,
        ended_at: optional_time(row, 8)?,
    })
}

fn execution_status(number: i64) -> Option<ExecutionStatus> {
    use ExecutionStatus::{Failed, Running, Succeeded, TimedOut};
    [Running, Succeeded, Failed, TimedOut].into_iter().find(|status| *status as i64 == number)
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

fn id<T>(row: &Row<'_>, column: usize, make: fn(uuid::Uuid) -> T) -> Result<T> {
    let text: String = row.get(column)?;
    uuid::Uuid::try_parse(&text).map(make).map_err(|error| conversion(column, error))
}

fn time(row: &Row<'_>, column: usize) -> Result<UnixMs> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, number))
}

fn optional_time(row: &Row<'_>, column: usize) -> Result<Option<UnixMs>> {
    match row.get_ref(column)?.data_type() {
        Type::Null => Ok(None),
        _ => time(row, column).map(Some),
    }
}

fn conversion(column: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
}
