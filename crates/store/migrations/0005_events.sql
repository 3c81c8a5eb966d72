-- What happened to sessions. Nothing refers to the session by key: an event is written with whatever it belongs to, in any order.

-- sequence counts a session's events from 1; the oldest are removed beyond a limit. fact is JSON: what happened, under `kind`,
-- and its particulars.
CREATE TABLE events (
    session_id   TEXT NOT NULL,
    sequence     INTEGER NOT NULL,
    at           INTEGER NOT NULL,
    fact         TEXT NOT NULL,
    execution_id TEXT,
    PRIMARY KEY (session_id, sequence)
) STRICT, WITHOUT ROWID;

-- Whom to forget first. The number is TERMINATED's.
CREATE INDEX sessions_ended_by_end ON sessions (terminated_at, id) WHERE state = 6;
