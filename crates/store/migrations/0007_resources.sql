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
