-- Previews: names under which ports of sandboxes are reached from outside.

-- The numbers of kind and state are those of PreviewKind and PreviewState. Nothing refers to the session by key: a named
-- preview outlives it. session_id and port are both there or both not.
CREATE TABLE previews (
    id               TEXT PRIMARY KEY,
    workspace_id     TEXT NOT NULL REFERENCES workspaces (id) DEFERRABLE INITIALLY DEFERRED,
    owner_id         TEXT NOT NULL,
    kind             INTEGER NOT NULL,
    state            INTEGER NOT NULL,
    label            TEXT NOT NULL UNIQUE,
    session_id       TEXT,
    port             INTEGER,
    expires_at       INTEGER,
    edge_port        INTEGER NOT NULL,
    created_at       INTEGER NOT NULL,
    updated_at       INTEGER NOT NULL,
    last_accessed_at INTEGER,
    CHECK ((session_id IS NULL) = (port IS NULL))
) STRICT;

CREATE INDEX previews_by_age ON previews (workspace_id, created_at, id);
