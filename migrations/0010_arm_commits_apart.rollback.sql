drop table if exists level_sync.pending_commits cascade;
