-- Sessions that are paused and kept, snapshots, volumes, and settings of workspaces.
-- Documents that are only read as a whole are JSON: workspaces.settings, sessions.pause,
-- sessions.attachments, snapshots.machine, and what 0001 has of the kind.

ALTER TABLE workspaces ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
UPDATE workspaces SET settings = json_object('sessions_max', sessions_max) WHERE sessions_max IS NOT NULL;
ALTER TABLE workspaces DROP COLUMN sessions_max;

-- Nothing refers to the snapshot by key: it may be gone while the session that was made from it lives on as a record.
ALTER TABLE sessions ADD COLUMN source_snapshot_id TEXT;
ALTER TABLE sessions ADD COLUMN source_image_id TEXT;
ALTER TABLE sessions ADD COLUMN pause TEXT;
ALTER TABLE sessions ADD COLUMN last_resume_error TEXT NOT NULL DEFAULT '';
ALTER TABLE sessions ADD COLUMN attachments TEXT NOT NULL DEFAULT '[]';

-- The numbers of kind, state and durability are those of SnapshotKind, SnapshotState and Durability.
CREATE TABLE snapshots (
    id                TEXT PRIMARY KEY,
    workspace_id      TEXT NOT NULL REFERENCES workspaces (id) DEFERRABLE INITIALLY DEFERRED,
    session_id        TEXT NOT NULL,
    name              TEXT NOT NULL,
    kind              INTEGER NOT NULL,
    state             INTEGER NOT NULL,
    durability        INTEGER NOT NULL,
    tags              TEXT NOT NULL,
    created_at        INTEGER NOT NULL,
    expires_at        INTEGER,
    local_ready_at    INTEGER,
    durable_at        INTEGER,
    machine           TEXT NOT NULL,
    env               TEXT NOT NULL,
    image_id          TEXT NOT NULL,
    copied            INTEGER NOT NULL,
    source_stopped_us INTEGER NOT NULL,
    manifest          TEXT NOT NULL,
    size_bytes        INTEGER NOT NULL,
    stored_bytes      INTEGER NOT NULL,
    failure_reason    TEXT NOT NULL,
    propagation_error TEXT NOT NULL
) STRICT;

CREATE INDEX snapshots_by_age ON snapshots (workspace_id, created_at, id);
CREATE INDEX snapshots_by_session ON snapshots (session_id, created_at, id);

-- The numbers of state are those of VolumeState.
CREATE TABLE volumes (
    id               TEXT PRIMARY KEY,
    workspace_id     TEXT NOT NULL REFERENCES workspaces (id) DEFERRABLE INITIALLY DEFERRED,
    name             TEXT NOT NULL,
    size_bytes       INTEGER NOT NULL,
    growing_to_bytes INTEGER,
    state            INTEGER NOT NULL,
    tags             TEXT NOT NULL,
    created_at       INTEGER NOT NULL,
    updated_at       INTEGER NOT NULL
) STRICT;

CREATE INDEX volumes_by_age ON volumes (workspace_id, created_at, id);
