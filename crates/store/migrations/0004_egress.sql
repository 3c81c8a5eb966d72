-- The only destinations that a session's sandbox reaches, as {"allow_domains": [...], "allow_cidrs": [...]};
-- NULL is no restriction beyond the server's own.
ALTER TABLE sessions ADD COLUMN egress TEXT;
