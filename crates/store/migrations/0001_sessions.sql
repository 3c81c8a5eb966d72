-- Times are milliseconds since the Unix epoch, ids are UUIDs in their hyphenated lower-case form.
-- The numbers of sessions.state are those of SessionState; 6 is TERMINATED.
-- Checks of references wait for the end of the transaction, so that the order in which one commit
-- names its rows does not matter.

CREATE TABLE workspaces (
    id           TEXT PRIMARY KEY,
    name         TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    sessions_max INTEGER
) STRICT;

CREATE TABLE api_keys (
    id           TEXT PRIMARY KEY,
    workspace_id TEXT NOT NULL REFERENCES workspaces (id) DEFERRABLE INITIALLY DEFERRED,
    secret_hash  BLOB NOT NULL UNIQUE,
    created_at   INTEGER NOT NULL
) STRICT;

CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT;

CREATE TABLE sessions (
    id                   TEXT PRIMARY KEY,
    workspace_id         TEXT NOT NULL REFERENCES workspaces (id) DEFERRABLE INITIALLY DEFERRED,
    owner_id             TEXT NOT NULL,
    name                 TEXT NOT NULL,
    state                INTEGER NOT NULL,
    cpu_cores            INTEGER NOT NULL,
    memory_mb            INTEGER NOT NULL,
    disk_gb              INTEGER NOT NULL,
    outbound             INTEGER NOT NULL,
    inbound              INTEGER NOT NULL,
    env                  TEXT NOT NULL,
    metadata             TEXT NOT NULL,
    tags                 TEXT NOT NULL,
    ssh_authorized_keys  TEXT NOT NULL,
    sticky               INTEGER NOT NULL,
    idle_timeout_minutes INTEGER,
    pause_retention_ms   INTEGER,
    created_at           INTEGER NOT NULL,
    ready_at             INTEGER,
    terminated_at        INTEGER,
    timeout_at           INTEGER,
    last_activity_at     INTEGER NOT NULL,
    terminal_error       TEXT NOT NULL,
    driver               TEXT NOT NULL
) STRICT;

CREATE INDEX sessions_by_age ON sessions (workspace_id, created_at, id);

-- The common list leaves terminated sessions out, and they are most of the rows after a while.
CREATE INDEX sessions_alive_by_age ON sessions (workspace_id, created_at, id) WHERE state <> 6;

CREATE TABLE executions (
    id          TEXT PRIMARY KEY,
    session_id  TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    command     TEXT NOT NULL,
    args        TEXT NOT NULL,
    status      INTEGER NOT NULL,
    exit_code   INTEGER NOT NULL,
    duration_ms INTEGER NOT NULL,
    started_at  INTEGER NOT NULL,
    ended_at    INTEGER
) STRICT;

CREATE INDEX executions_by_session ON executions (session_id, started_at, id);
