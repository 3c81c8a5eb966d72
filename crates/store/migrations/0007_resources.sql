-- Thousandths of a processor and bytes, for machines that are no whole units; and the image under the disk, which the first
-- start fills in where it is empty. snapshots.machine is JSON and tells both forms apart.
ALTER TABLE sessions RENAME COLUMN cpu_cores TO cpu_millis;
ALTER TABLE sessions RENAME COLUMN memory_mb TO memory_bytes;
ALTER TABLE sessions RENAME COLUMN disk_gb TO disk_bytes;
ALTER TABLE sessions ADD COLUMN root TEXT NOT NULL DEFAULT '';

UPDATE sessions SET
    cpu_millis = cpu_millis * 1000,
    memory_bytes = memory_bytes * 1048576,
    disk_bytes = disk_bytes * 1073741824;

-- What a session was resumed from last, as JSON. Until now its metadata told it under three keys.
ALTER TABLE sessions ADD COLUMN last_resume TEXT;

UPDATE sessions SET
    last_resume = json_object(
        'mode', json_extract(metadata, '$.restore_mode'),
        'disk_reason', json_extract(metadata, '$.restore_reason')
    ),
    metadata = json_remove(metadata, '$.restore_mode', '$.restore_degraded', '$.restore_reason')
WHERE json_extract(metadata, '$.restore_mode') IN ('memory', 'cold_boot');

-- What stands between the sandbox and the host's kernel, as JSON.
ALTER TABLE sessions ADD COLUMN isolation TEXT;
