-- depends: 0012_let_others_schedule
-- With a run each minute the log has a hundred thousand rows, and every scrape counts them by status and looks for those
-- that say running.
create index if not exists sync_log_status on level_sync.sync_log (status);
