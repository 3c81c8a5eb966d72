-- Why a session ended, and what was used up where that kept it from being created: JSON texts, `"failed"` or `"slots_max"`.
ALTER TABLE sessions ADD COLUMN end_reason TEXT;
ALTER TABLE sessions ADD COLUMN exhausted TEXT;

-- Until now only the words told. 5 and 6 are TERMINATING and TERMINATED.
UPDATE sessions SET
    end_reason = CASE terminal_error
        WHEN '' THEN '"requested"'
        WHEN 'maximum duration reached' THEN '"max_duration"'
        WHEN 'pause retention expired' THEN '"pause_retention"'
        ELSE '"failed"'
    END,
    exhausted = CASE
        WHEN ready_at IS NULL AND terminal_error LIKE 'no capacity left on this server: %'
        THEN json_quote(substr(terminal_error, length('no capacity left on this server: ') + 1))
    END
WHERE state IN (5, 6);
