alter table if exists level_sync.sync_plan set (fillfactor = 50);
