alter table if exists level_sync.settings drop column if exists uses_pg_cron;
