drop index if exists level_sync.sync_log_status;
