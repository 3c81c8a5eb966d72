-- Which visits resume a stopped session, as JSON; NULL is what the server does by default.
ALTER TABLE sessions ADD COLUMN wake_on_visit TEXT;

-- Whether a session is found by its name, which no other such session of its workspace that has not ended has.
ALTER TABLE sessions ADD COLUMN name_is_unique INTEGER NOT NULL DEFAULT 0;

-- What the image under the disk was called when it was asked for; empty where nobody asked for one.
ALTER TABLE sessions ADD COLUMN image TEXT NOT NULL DEFAULT '';
