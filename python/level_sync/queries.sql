-- All SQL that the Python package sends. aiosql reads it; `^` returns one row, `$` one value, `!` nothing.

-- name: try_migrate_lock()$
-- One migrate at a time in a database; the lock is the session's, so a killed run leaves nothing behind.
select pg_try_advisory_lock(hashtext('level_sync migrate'))

-- name: release_migrate_lock()$
select pg_advisory_unlock(hashtext('level_sync migrate'))

-- name: has_schema()$
select to_regnamespace('level_sync') is not null

-- name: why_schema_is_not_ours()$
select case when not has_schema_privilege(namespace.oid, 'create') then
         'schema level_sync belongs to ' || pg_get_userbyid(namespace.nspowner) || ', and ' || current_user
           || ' may not change it: run this as ' || pg_get_userbyid(namespace.nspowner)
       end
  from pg_catalog.pg_namespace as namespace
 where namespace.nspname = 'level_sync'

-- name: create_schema()!
create schema level_sync

-- name: drop_schema()!
-- After a rollback only yoyo's bookkeeping is left in it.
drop schema level_sync cascade

-- name: use_level_sync_schema()!
set search_path to level_sync

-- name: pin_search_path()!
set local search_path to pg_catalog

-- name: set_lock_timeout(lock_timeout)$
-- How long a step may make writers queue behind it.
select set_config('lock_timeout', :lock_timeout, false)

-- name: drop_progress_pair_index()!
drop index concurrently if exists public.specialization_progress_pair

-- name: build_progress_pair_index_concurrently()!
create unique index concurrently specialization_progress_pair
    on public.specialization_progress (student_id, specialization_id) include (current_level)

-- name: build_progress_pair_index()!
-- A partitioned table takes no index concurrently.
create unique index specialization_progress_pair
    on public.specialization_progress (student_id, specialization_id) include (current_level)

-- name: drop_license_pair_index()!
drop index concurrently if exists public.user_licenses_pair

-- name: build_license_pair_index_concurrently()!
create unique index concurrently user_licenses_pair
    on public.user_licenses (user_id, specialization_type) include (current_level)

-- name: build_license_pair_index()!
create unique index user_licenses_pair
    on public.user_licenses (user_id, specialization_type) include (current_level)

-- name: raise_orphans_and_duplicates(on_table, kind)!
-- Raises where the table holds rows of that kind, orphan or duplicate.
select level_sync._raise_orphans_and_duplicates(:on_table, :kind)

-- name: quarantine_rows(on_table, kind)$
select level_sync._quarantine_rows(:on_table, :kind)

-- name: restore_rows()^
select restored, quarantined, reason from level_sync._restore_rows()

-- name: has_remove_triggers()$
select to_regprocedure('level_sync._remove_triggers()') is not null
   and to_regclass('level_sync.installed_triggers') is not null

-- name: remove_triggers()!
select level_sync._remove_triggers()

-- name: count_relations()$
-- Anything at all that is not the server's own.
select count(*)
  from pg_class as relation
  join pg_namespace as namespace on namespace.oid = relation.relnamespace
 where namespace.nspname <> 'information_schema'
   and namespace.nspname !~ '^pg_'

-- name: grant_to(role, kind)!
select level_sync._grant_to(:role, :kind)

-- name: revoke_from(role)!
select level_sync._revoke_from(:role)

-- name: status()^
select current_database() as database,
       current_setting('server_version') as server_version,
       counts.progress_rows,
       counts.license_rows,
       (select count(*) from level_sync.sync_queue where dead_at is null) as queued,
       (select count(*) from level_sync.sync_queue where dead_at is not null) as dead,
       (select extract(epoch from clock_timestamp() - min(queued_at))::bigint
          from level_sync.sync_queue where dead_at is null) as oldest_queued_seconds,
       (select max(occurred_at) from level_sync.sync_events) as last_event_at
  from level_sync._row_counts() as counts

-- name: count_desyncs()
select issue_type, specialization, pairs
  from level_sync._count_desyncs()
 order by issue_type, specialization

-- name: settings()^
select conflict_policy, on_error, on_delete, lock_wait, inline_limit, trigger_search_path, batch_size, repair_limit, max_attempts,
       retry_backoff, schedule, misfire_grace, log_retention, event_retention, uses_pg_cron
  from level_sync.settings

-- name: events(user_id, specialization, row_limit)
select event_id, occurred_at, user_id, specialization, direction, action, old_level, new_level,
       source, run_id, session_role, actor, reason, transaction_id::text as transaction_id
  from level_sync.sync_events
 where (:user_id::bigint is null or user_id = :user_id)
   and (:specialization::text is null or specialization = :specialization)
 order by event_id desc
 limit :row_limit

-- name: queue(row_limit)
select queue_id, queued_at, user_id, specialization, side, change, sqlstate, message, attempts, next_attempt_at, dead_at,
       actor, reason
  from level_sync.sync_queue
 order by queue_id
 limit :row_limit

-- name: report_progress()$
select set_config('level_sync.report_progress', 'on', false)

-- name: reconcile(dry_run, direction, plan, approve)!
call level_sync.reconcile(dry_run => :dry_run, direction => :direction, plan => :plan, approve => :approve)

-- name: own_last_run()^
select run_id, status, dry_run, direction, started_by, job_start, job_end, duration_seconds, issues_found, synced_count,
       failed_count, results, error
  from level_sync.sync_log
 where backend_pid = pg_backend_pid()
 order by run_id desc
 limit 1

-- name: log(row_limit)
select run_id, status, dry_run, direction, started_by, job_start, duration_seconds, issues_found, synced_count,
       failed_count, error
  from level_sync.sync_log
 order by run_id desc
 limit :row_limit

-- name: last_run_ended_at()$
-- When a run that may have changed a pair has last ended.
select job_end
  from level_sync.sync_log
 where not dry_run
   and status <> 'skipped'
   and job_end is not null
 order by run_id desc
 limit 1

-- name: runs_since(since, row_limit)
-- The newest of them, oldest first.
select run_id, status, job_start, duration_seconds, issues_found, synced_count, failed_count
  from (
    select *
      from level_sync.sync_log
     where job_start >= :since
       and not dry_run
     order by run_id desc
     limit :row_limit) as newest
 order by run_id

-- name: runs_before(before, row_limit, text_limit)
select run_id, status, dry_run, direction, started_by, job_start, duration_seconds, issues_found, synced_count,
       failed_count, left(error, :text_limit) as error
  from level_sync.sync_log
 where (:before::bigint is null or run_id < :before)
 order by run_id desc
 limit :row_limit

-- name: run(run_id, text_limit)^
select run_id, status, dry_run, direction, started_by, job_start, job_end, duration_seconds, issues_found, synced_count,
       failed_count, left(error, :text_limit) as error, (results ->> 'plan')::bigint as plan
  from level_sync.sync_log
 where run_id = :run_id

-- name: plan_after(run_id, after_user, after_specialization, row_limit)
select user_id, specialization, issue_type, action, progress_level, license_level, outcome
  from level_sync.sync_plan
 where run_id = :run_id
   and (:after_user::bigint is null or (user_id, specialization) > (:after_user, :after_specialization))
 order by user_id, specialization
 limit :row_limit

-- name: repairs_after(run_id, after_event, row_limit)
-- The BRIN index on occurred_at finds the time of the run, however long the table is.
select event.event_id, event.user_id, event.specialization, event.action, event.direction, event.old_level, event.new_level,
       event.occurred_at
  from level_sync.sync_log as log
  join level_sync.sync_events as event
    on event.occurred_at between log.job_start and coalesce(log.job_end, clock_timestamp())
   and event.run_id = log.run_id
 where log.run_id = :run_id
   and (:after_event::bigint is null or event.event_id > :after_event)
 order by event.event_id
 limit :row_limit

-- name: queue_after(after, row_limit, text_limit)
select queue_id, queued_at, user_id, specialization, side, sqlstate, left(message, :text_limit) as message, attempts,
       next_attempt_at, dead_at, next_attempt_at <= clock_timestamp() as is_due, actor, reason
  from level_sync.sync_queue
 where :after::bigint is null or queue_id > :after
 order by queue_id
 limit :row_limit

-- name: events_before(user_id, before, row_limit)
select event_id, occurred_at, specialization, direction, action, old_level, new_level, source, run_id, session_role, actor,
       reason
  from level_sync.sync_events
 where user_id = :user_id
   and (:before::bigint is null or event_id < :before)
 order by event_id desc
 limit :row_limit

-- name: undo(run_id)$
select level_sync.undo(:run_id)

-- name: health()
select name, ok, detail, hint from level_sync.health

-- name: quick_health()
select name, ok, detail, hint from level_sync.quick_health

-- name: set_timeouts(statement_timeout, lock_timeout)^
select set_config('statement_timeout', :statement_timeout, false), set_config('lock_timeout', :lock_timeout, false)

-- name: listen()!
-- Each run of the reconcile notifies this channel when it ends.
listen level_sync

-- name: schema_version()$
select level_sync._schema_version()

-- name: queue_summary()^
select count(*) filter (where dead_at is null and next_attempt_at > clock_timestamp()) as waiting,
       count(*) filter (where dead_at is null and next_attempt_at <= clock_timestamp()) as due,
       count(*) filter (where dead_at is not null) as dead,
       coalesce(extract(epoch from clock_timestamp() - min(queued_at) filter (where dead_at is null)), 0) as oldest_seconds
  from level_sync.sync_queue

-- name: runs_by_status()
-- Each by itself, so that the index is enough.
select known.status, (select count(*) from level_sync.sync_log where sync_log.status = known.status) as runs
  from unnest(array['running', 'success', 'partial', 'failed', 'skipped', 'aborted', 'needs_approval']) as known (status)

-- name: last_runs()^
-- Leaves out a run that is still at work, and one that was skipped because another was.
select (select extract(epoch from job_start)
          from level_sync.sync_log
         where status in ('success', 'partial') and not dry_run
         order by run_id desc
         limit 1) as success_at,
       latest.status,
       latest.duration_seconds,
       coalesce(latest.results -> 'repairs', '{}') as repairs
  from (values (1)) as one
  left join lateral (
    select status, duration_seconds, results
      from level_sync.sync_log
     where not dry_run and status not in ('running', 'skipped')
     order by run_id desc
     limit 1) as latest on true

-- name: recent_events()
-- The BRIN index on occurred_at finds them however long the table is; after a bulk write they may be many.
select action, source, coalesce(recent.events, 0) as events
  from unnest(array['created', 'updated', 'deleted']) as known_action (action)
 cross join unnest(array['trigger', 'reconcile', 'manual', 'undo']) as known_source (source)
  left join (select action, source, count(*) as events
               from level_sync.sync_events
              where occurred_at > clock_timestamp() - interval '5 minutes'
              group by action, source) as recent using (action, source)

-- name: check_live()
select name, ok, detail, hint from level_sync._check_live()

-- name: loaded_functions()
select proname as name, prosrc as body
  from pg_proc
 where pronamespace = 'level_sync'::regnamespace

-- name: cron_access()^
select cron_database, coalesce(is_preloaded and not is_here and cron_database <> current_database(), false) as is_elsewhere
  from level_sync._cron_access()

-- name: has_schedule()$
select to_regprocedure('level_sync._cron_access()') is not null
   and to_regprocedure('level_sync.unschedule()') is not null

-- name: schedule(cron_expression)$
select level_sync.schedule(:cron_expression)

-- name: unschedule()$
select level_sync.unschedule()

-- name: check_cron_expression(cron_expression)$
select level_sync._last_slot(:cron_expression, clock_timestamp())

-- name: save_schedule(cron_expression)!
update level_sync.settings set schedule = :cron_expression, uses_pg_cron = true

-- name: cron_jobs_query()$
select level_sync._cron_jobs_query()

-- name: wanted_cron_jobs(cron_expression)
select jobname, schedule, command from level_sync._wanted_cron_jobs(:cron_expression)

-- name: are_other_roles_jobs_hidden()$
-- pg_cron's own policy shows each role its own jobs.
select row_security_active('cron.job')

-- name: check_cron_jobs(jobs)
select name, ok, detail, hint from level_sync._check_cron_jobs(:jobs)

-- name: schedule_elsewhere(jobname, schedule, command, database)$
-- In the database of pg_cron, for a job in another one. A name that serves one database already gets this one's added.
select cron.schedule_in_database(
         case when exists (select from cron.job where jobname = :jobname and database <> :database)
              then :jobname || '_' || :database else :jobname end,
         :schedule, :command, :database)

-- name: unschedule_elsewhere(database)$
select count(cron.unschedule(jobid))
  from cron.job
 where (starts_with(jobname, 'level_sync_reconcile') or starts_with(jobname, 'level_sync_maintain'))
   and database = :database
