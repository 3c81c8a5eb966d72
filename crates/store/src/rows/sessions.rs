//! Sessions and their executions.

use nagaya_api::ids::{DiskImageId, ExecutionId, KeyId, SessionId, SnapshotId, WorkspaceId};
use nagaya_engine::model::{
    Execution, ExecutionStatus, ImageDigest, Machine, Resources, Session, SessionState, UnixMs,
};
use rusqlite::{Connection, Result, Row, params};

use super::{from_json, id, integer, json, optional_from_json, optional_id, optional_unsigned, unsigned, variant};

pub(crate) const SESSION_COLUMNS: &str = "id, workspace_id, owner_id, name, state, cpu_millis, memory_bytes, disk_bytes, outbound, \
     inbound, env, metadata, tags, ssh_authorized_keys, sticky, idle_timeout_minutes, pause_retention_ms, created_at, \
     ready_at, terminated_at, timeout_at, last_activity_at, terminal_error, driver, source_snapshot_id, source_image_id, \
     pause, last_resume_error, attachments, egress, end_reason, exhausted, root, last_resume, isolation, wake_on_visit, \
     name_is_unique, image";
pub(crate) const EXECUTION_COLUMNS: &str =
    "id, session_id, command, args, status, exit_code, duration_ms, started_at, ended_at";

pub(super) fn write_session(database: &Connection, session: &Session) -> Result<()> {
    database
        .prepare_cached(
            "INSERT INTO sessions (id, workspace_id, owner_id, name, state, cpu_millis, memory_bytes, disk_bytes, outbound,
                 inbound, env, metadata, tags, ssh_authorized_keys, sticky, idle_timeout_minutes, pause_retention_ms,
                 created_at, ready_at, terminated_at, timeout_at, last_activity_at, terminal_error, driver,
                 source_snapshot_id, source_image_id, pause, last_resume_error, attachments, egress, end_reason,
                 exhausted, root, last_resume,
                 isolation, wake_on_visit, name_is_unique, image)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21,
                 ?22, ?23, ?24, ?25, ?26, ?27, ?28, ?29, ?30, ?31, ?32, ?33, ?34, ?35, ?36, ?37, ?38)
             ON CONFLICT (id) DO UPDATE SET
                 workspace_id = excluded.workspace_id, owner_id = excluded.owner_id, name = excluded.name,
                 state = excluded.state, cpu_millis = excluded.cpu_millis, memory_bytes = excluded.memory_bytes,
                 disk_bytes = excluded.disk_bytes, outbound = excluded.outbound, inbound = excluded.inbound,
                 env = excluded.env, metadata = excluded.metadata, tags = excluded.tags,
                 ssh_authorized_keys = excluded.ssh_authorized_keys, sticky = excluded.sticky,
                 idle_timeout_minutes = excluded.idle_timeout_minutes, pause_retention_ms = excluded.pause_retention_ms,
                 created_at = excluded.created_at, ready_at = excluded.ready_at, terminated_at = excluded.terminated_at,
                 timeout_at = excluded.timeout_at, last_activity_at = excluded.last_activity_at,
                 terminal_error = excluded.terminal_error, driver = excluded.driver,
                 source_snapshot_id = excluded.source_snapshot_id, source_image_id = excluded.source_image_id,
                 pause = excluded.pause, last_resume_error = excluded.last_resume_error,
                 attachments = excluded.attachments, egress = excluded.egress,
                 end_reason = excluded.end_reason, exhausted = excluded.exhausted, root = excluded.root,
                 last_resume = excluded.last_resume, isolation = excluded.isolation,
                 wake_on_visit = excluded.wake_on_visit, name_is_unique = excluded.name_is_unique, image = excluded.image",
        )?
        .execute(params![
            session.id.to_string(),
            session.workspace_id.to_string(),
            session.owner_id.to_string(),
            session.name,
            session.state as i64,
            session.machine.resources.cpu_millis,
            integer(session.machine.resources.memory_bytes)?,
            integer(session.machine.resources.disk_bytes)?,
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
            session.source_snapshot_id.map(|id| id.to_string()),
            session.source_image_id.map(|id| id.to_string()),
            session.pause.as_ref().map(json).transpose()?,
            session.last_resume_error,
            json(&session.attachments)?,
            session.machine.egress.as_ref().map(json).transpose()?,
            session.end_reason.as_ref().map(json).transpose()?,
            session.exhausted.as_ref().map(json).transpose()?,
            session.machine.root.as_str(),
            session.last_resume.as_ref().map(json).transpose()?,
            session.isolation.as_ref().map(json).transpose()?,
            session.wake_on_visit.as_ref().map(json).transpose()?,
            session.name_is_unique,
            session.machine.image,
        ])?;
    Ok(())
}

pub(super) fn write_execution(database: &Connection, execution: &Execution) -> Result<()> {
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

/// Removes the sessions that ended first, before that time; executions go with them.
pub(super) fn forget_ended(database: &Connection, before: UnixMs, sessions_max: u32) -> Result<()> {
    // The literal lets SQLite use the index of those that have ended.
    const ENDED: &str =
        "SELECT id FROM sessions WHERE state = 6 AND terminated_at < ?1 ORDER BY terminated_at, id LIMIT ?2";
    let which = (integer(before)?, sessions_max);
    database.prepare_cached(&format!("DELETE FROM events WHERE session_id IN ({ENDED})"))?.execute(which)?;
    database.prepare_cached(&format!("DELETE FROM sessions WHERE id IN ({ENDED})"))?.execute(which)?;
    Ok(())
}

pub(crate) fn read_session(row: &Row<'_>) -> Result<Session> {
    Ok(Session {
        id: id(row, 0, SessionId::from_uuid)?,
        workspace_id: id(row, 1, WorkspaceId::from_uuid)?,
        owner_id: id(row, 2, KeyId::from_uuid)?,
        name: row.get(3)?,
        name_is_unique: row.get(36)?,
        state: variant(row, 4, &SessionState::ALL, |state| state as i64)?,
        machine: Machine {
            resources: Resources {
                cpu_millis: row.get(5)?,
                memory_bytes: unsigned(row, 6)?,
                disk_bytes: unsigned(row, 7)?,
            },
            root: ImageDigest::new(row.get::<_, String>(32)?),
            image: row.get(37)?,
            outbound: row.get(8)?,
            egress: optional_from_json(row, 29)?,
        },
        inbound: row.get(9)?,
        env: from_json(row, 10)?,
        metadata: from_json(row, 11)?,
        tags: from_json(row, 12)?,
        ssh_authorized_keys: from_json(row, 13)?,
        sticky: row.get(14)?,
        idle_timeout_minutes: row.get(15)?,
        pause_retention_ms: optional_unsigned(row, 16)?,
        wake_on_visit: optional_from_json(row, 35)?,
        created_at: unsigned(row, 17)?,
        ready_at: optional_unsigned(row, 18)?,
        terminated_at: optional_unsigned(row, 19)?,
        timeout_at: optional_unsigned(row, 20)?,
        last_activity_at: unsigned(row, 21)?,
        end_reason: optional_from_json(row, 30)?,
        terminal_error: row.get(22)?,
        exhausted: optional_from_json(row, 31)?,
        isolation: optional_from_json(row, 34)?,
        driver: row.get(23)?,
        source_snapshot_id: optional_id(row, 24, SnapshotId::from_uuid)?,
        source_image_id: optional_id(row, 25, DiskImageId::from_uuid)?,
        pause: optional_from_json(row, 26)?,
        last_resume_error: row.get(27)?,
        last_resume: optional_from_json(row, 33)?,
        attachments: from_json(row, 28)?,
    })
}

pub(crate) fn read_execution(row: &Row<'_>) -> Result<Execution> {
    use ExecutionStatus::{Failed, Running, Succeeded, TimedOut};
    Ok(Execution {
        id: id(row, 0, ExecutionId::from_uuid)?,
        session_id: id(row, 1, SessionId::from_uuid)?,
        command: row.get(2)?,
        args: from_json(row, 3)?,
        status: variant(row, 4, &[Running, Succeeded, Failed, TimedOut], |status| status as i64)?,
        exit_code: row.get(5)?,
        duration_ms: unsigned(row, 6)?,
        started_at: unsigned(row, 7)?,
        ended_at: optional_unsigned(row, 8)?,
    })
}
