drop table if exists level_sync.installed_functions cascade;
drop table if exists level_sync.sync_plan cascade;
