alter table if exists level_sync.sync_plan reset (fillfactor);
