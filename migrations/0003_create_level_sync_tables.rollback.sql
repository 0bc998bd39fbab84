-- A run that was killed before this step was marked as undone does it again.
do $$
begin
  if to_regprocedure('level_sync._restore_rows_or_stop()') is not null
     and to_regclass('level_sync.quarantined_rows') is not null
  then
    perform level_sync._restore_rows_or_stop();
  end if;
end
$$;
drop table if exists level_sync.installed_functions cascade;
drop table if exists level_sync.installed_triggers cascade;
drop table if exists level_sync.quarantined_rows cascade;
drop table if exists level_sync.sync_plan cascade;
drop table if exists level_sync.pending_commits cascade;
drop table if exists level_sync.pending_pairs cascade;
drop table if exists level_sync.sync_queue cascade;
drop table if exists level_sync.sync_events cascade;
drop table if exists level_sync.sync_log cascade;
drop table if exists level_sync.settings cascade;
drop type if exists level_sync.pair cascade;
drop type if exists level_sync.check_result cascade;
