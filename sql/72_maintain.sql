-- What runs every minute: a missed run is caught up, the queue is drained, and what is past its retention is deleted.

create or replace function level_sync._purge_batch()
  returns integer language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  config  record;
  deleted integer;
  total   integer := 0;
begin
  select * into config from level_sync.settings;

  delete from level_sync.sync_plan as plan
   where ctid = any (array(
     select old.ctid from level_sync.sync_plan as old
      where not exists (select from level_sync.sync_log where sync_log.run_id = old.run_id
                           and sync_log.job_start >= clock_timestamp() - config.log_retention)
      limit config.batch_size));
  get diagnostics deleted = row_count;
  total := total + deleted;

  delete from level_sync.sync_log
   where sync_log.run_id in (
     select old.run_id from level_sync.sync_log as old
      where old.status <> 'running' and old.job_start < clock_timestamp() - config.log_retention
      limit config.batch_size);
  get diagnostics deleted = row_count;
  total := total + deleted;

  delete from level_sync.sync_queue as queued
   where ctid = any (array(
     select old.ctid from level_sync.sync_queue as old
      where old.dead_at < clock_timestamp() - config.log_retention
      limit config.batch_size));
  get diagnostics deleted = row_count;
  total := total + deleted;

  delete from level_sync.sync_events
   where ctid = any (array(
     select old.ctid from level_sync.sync_events as old
      where old.occurred_at < clock_timestamp() - config.event_retention
      limit config.batch_size));
  get diagnostics deleted = row_count;
  total := total + deleted;

  if (case when (select access.may_read from level_sync._cron_access() as access)
           then has_table_privilege(to_regclass('cron.job_run_details'), 'delete') end)
  then
    execute $sql$
      delete from cron.job_run_details as details
       where details.runid in (
         select old.runid
           from cron.job_run_details as old
           join cron.job on job.jobid = old.jobid
          where starts_with(job.jobname, 'level_sync_')
            and job.database = current_database()
            and old.start_time < clock_timestamp() - $1
          limit $2)
    $sql$ using config.log_retention, config.batch_size;
    get diagnostics deleted = row_count;
    total := total + deleted;
  end if;
  return total;
end
$$;
comment on function level_sync._purge_batch() is 'Deletes up to batch_size rows past their retention from each table and returns how many rows went.';

create or replace procedure level_sync.purge()
  language plpgsql
as $$
declare
  outer_path            constant text := pg_catalog.current_setting('search_path');
  is_inside_transaction boolean;
begin
  call level_sync._detect_outer_transaction(is_inside_transaction);
  call level_sync._begin_batch(is_inside_transaction);
  while level_sync._purge_batch() > 0 loop
    call level_sync._begin_batch(is_inside_transaction);
  end loop;
  perform set_config('search_path', outer_path, true);
end
$$;
comment on procedure level_sync.purge() is 'Deletes what is past its retention: sync_log, plans, dead queue rows (log_retention), sync_events (event_retention), and our own rows of cron.job_run_details.';

create or replace function level_sync._is_run_missed(at timestamptz)
  returns boolean language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select not exists (
    select from level_sync.sync_log
     where sync_log.job_start >= level_sync._last_slot(settings.schedule, _is_run_missed.at - settings.misfire_grace)
       and (sync_log.status in ('success', 'partial', 'needs_approval') and not sync_log.dry_run
            or sync_log.status = 'running' and level_sync._is_run_active()
            -- One that failed is tried again, but not every minute.
            or sync_log.status = 'failed' and sync_log.job_start >= _is_run_missed.at - settings.misfire_grace))
    from level_sync.settings
$$;
comment on function level_sync._is_run_missed(timestamptz) is 'Whether the schedule''s last slot, misfire_grace ago or earlier, has seen no run that went through.';

create or replace procedure level_sync.maintain()
  language plpgsql
as $$
begin
  if level_sync._is_run_missed(pg_catalog.clock_timestamp()) then
    call level_sync.reconcile(started_by => 'catch_up');
  end if;
  call level_sync.drain_queue();
  call level_sync.purge();
end
$$;
comment on procedure level_sync.maintain() is 'What the job level_sync_maintain calls every minute: catches up a missed run, drains the queue, purges.';

create or replace function level_sync.requeue(user_id bigint default null, specialization text default null)
  returns bigint language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  revived bigint;
begin
  update level_sync.sync_queue as queued
     set attempts = 0, dead_at = null, next_attempt_at = clock_timestamp()
   where (requeue.user_id is null or queued.user_id = requeue.user_id)
     and (requeue.specialization is null or queued.specialization = requeue.specialization);
  get diagnostics revived = row_count;
  return revived;
end
$$;
comment on function level_sync.requeue(bigint, text) is 'Makes queued pairs, dead ones too, due at once with a fresh count of attempts: all, one user''s, or one pair. Returns how many.';
