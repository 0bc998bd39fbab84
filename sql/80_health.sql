-- One row per thing that can go wrong. ok is NULL where a check cannot be made: that is not good news, only no news.

create or replace function level_sync._check_triggers()
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select 'triggers',
         count(*) filter (where not is_good) = 0 and count(*) > 0,
         coalesce(string_agg(state, '; ' order by state) filter (where not is_good), format('%s triggers as installed', count(*))),
         'Run level-sync migrate: it puts the triggers back.'
    from (
      select format('%s on %s is %s', installed.trigger_name, installed.relation,
                    case when present.oid is null then 'missing'
                         when present.tgenabled <> 'O' then 'disabled'
                         else 'changed' end) as state,
             present.oid is not null and present.tgenabled = 'O'
               and md5(pg_get_triggerdef(present.oid)) = md5(installed.definition) as is_good
        from level_sync.installed_triggers as installed
        left join pg_trigger as present
          on present.tgrelid = installed.relation and present.tgname = installed.trigger_name
    ) as seen
$$;
comment on function level_sync._check_triggers() is 'Every trigger of ours is there, enabled, and as it was made.';

create or replace function level_sync._check_functions()
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select 'functions',
         count(*) filter (where not is_good) = 0 and count(*) > 0,
         coalesce(string_agg(state, '; ' order by state) filter (where not is_good), format('%s functions as shipped', count(*))),
         'Run level-sync migrate: it loads the functions that were shipped.'
    from (
      select format('%s is %s', installed.signature, case when present.oid is null then 'missing' else 'changed' end) as state,
             present.oid is not null and level_sync._function_hash(present.oid) = installed.hash as is_good
        from level_sync.installed_functions as installed
        left join pg_proc as present on present.oid = to_regprocedure(installed.signature)
    ) as seen
$$;
comment on function level_sync._check_functions() is 'Every function of ours has the body and the settings that were shipped.';

create or replace function level_sync._wanted_foreign_keys()
  returns table (child regclass, on_column text, parent regclass, name text) language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  values (to_regclass('public.specialization_progress'), 'student_id', to_regclass('public.users'), 'fk_specialization_progress_user'),
         (to_regclass('public.specialization_progress'), 'specialization_id', to_regclass('public.specializations'), 'fk_specialization_progress_spec'),
         (to_regclass('public.user_licenses'), 'user_id', to_regclass('public.users'), 'fk_user_licenses_user'),
         (to_regclass('public.user_licenses'), 'specialization_type', to_regclass('public.specializations'), 'fk_user_licenses_spec')
$$;
comment on function level_sync._wanted_foreign_keys() is 'The four foreign keys that forbid orphans.';

create or replace function level_sync._check_foreign_keys()
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select 'foreign_keys',
         count(*) filter (where problem is not null) = 0,
         coalesce(string_agg(problem, '; ' order by problem), '4 foreign keys, RESTRICT and validated'),
         'Run level-sync migrate, or: alter table ... validate constraint ...'
    from (
      select case when present.oid is null then wanted.name || ' is missing'
                  when present.confrelid <> wanted.parent or present.conkey <> array[part.attnum]
                    then format('%s refers to %s', wanted.name, present.confrelid::regclass)
                  when present.confdeltype <> 'r' then wanted.name || ' is not ON DELETE RESTRICT'
                  when not present.convalidated then wanted.name || ' is not validated'
             end as problem
        from level_sync._wanted_foreign_keys() as wanted
        left join pg_constraint as present
          on present.conrelid = wanted.child and present.conname = wanted.name and present.contype = 'f'
        left join pg_attribute as part on part.attrelid = wanted.child and part.attname = wanted.on_column
       union all
      select format('%s of %s doubles ours', present.conname, present.conrelid::regclass)
        from level_sync._wanted_foreign_keys() as wanted
        join pg_attribute as part on part.attrelid = wanted.child and part.attname = wanted.on_column
        join pg_constraint as present
          on present.conrelid = wanted.child and present.confrelid = wanted.parent and present.conkey = array[part.attnum]
       where present.contype = 'f'
         and present.conparentid = 0
         and present.conname <> wanted.name
    ) as seen
$$;
comment on function level_sync._check_foreign_keys() is 'The four foreign keys are there, RESTRICT and validated.';

-- Looked for, not inferred: a write with session_replication_role = replica skips foreign keys.
create or replace function level_sync._check_orphans()
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select 'orphans',
         case when level_sync._hidden_tables() is null then sum(pairs) = 0 end,
         case when sum(pairs) = 0 then 'none'
              else string_agg(format('%s rows of %s without %s', pairs, child, parent), '; ' order by child, parent)
                     filter (where pairs > 0) end,
         'Restore the missing user or specialization, or delete both rows of the pair in one transaction.'
    from (
      select 'specialization_progress' as child, 'user' as parent, count(*) as pairs
        from public.specialization_progress as progress
       where not exists (select from public.users where users.id = progress.student_id)
       union all
      select 'specialization_progress', 'specialization', count(*)
        from public.specialization_progress as progress
       where not exists (select from public.specializations as known where known.id = progress.specialization_id)
       union all
      select 'user_licenses', 'user', count(*)
        from public.user_licenses as license
       where not exists (select from public.users where users.id = license.user_id)
       union all
      select 'user_licenses', 'specialization', count(*)
        from public.user_licenses as license
       where not exists (select from public.specializations as known where known.id = license.specialization_type)
    ) as seen
$$;
comment on function level_sync._check_orphans() is 'No row of either table without its user and specialization.';

create or replace function level_sync._check_hidden_rows()
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select 'hidden_rows',
         case when hidden.tables is null then true end,
         coalesce('row level security may hide rows of ' || hidden.tables || ' from ' || current_user, 'the owner sees every row'),
         'alter table ... no force row level security, or give the owner of level_sync the attribute BYPASSRLS.'
    from (select level_sync._hidden_tables() as tables) as hidden
$$;
comment on function level_sync._check_hidden_rows() is 'The owner of level_sync sees every row; where row level security hides some, desyncs and orphans cannot be told.';

create or replace function level_sync._last_finished_run()
  returns setof level_sync.sync_log language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select *
    from level_sync.sync_log
   where not sync_log.dry_run and sync_log.status not in ('running', 'skipped')
   order by sync_log.run_id desc
   limit 1
$$;
comment on function level_sync._last_finished_run() is 'The newest run that has ended: neither a dry one, nor one that found another run at work and was skipped.';

create or replace function level_sync._check_pairs()
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select 'desync',
         case when level_sync._hidden_tables() is null then count(*) = 0 end,
         case when count(*) = 0 then 'every pair has one level'
              else format('%s pairs differ, first user %s in %s (%s)', count(*), min(issues.user_id),
                          (array_agg(issues.specialization order by issues.user_id))[1],
                          (array_agg(issues.issue_type order by issues.user_id))[1]) end,
         case when (select settings.conflict_policy from level_sync.settings) = 'report_only'
              then 'conflict_policy is report_only: no run repairs a difference. Say which side is right with call level_sync.reconcile(direction => ...). See level_sync.desync_issues.'
              when (select latest.status from level_sync._last_finished_run() as latest) = 'needs_approval'
              then 'No run repairs this before somebody approves: see the check last_run.'
              else 'call level_sync.reconcile(); or wait for the next run. See level_sync.desync_issues.' end
    from level_sync.desync_issues as issues
$$;
comment on function level_sync._check_pairs() is 'No desync.';

create or replace function level_sync._check_queue()
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select 'queue_dead',
         count(*) = 0,
         case when count(*) = 0 then 'no dead pair'
              else format('%s dead, first user %s in %s: %s', count(*), min(queued.user_id),
                          (array_agg(queued.specialization order by queued.user_id))[1],
                          left((array_agg(queued.message order by queued.user_id))[1], 500)) end,
         'Remove the cause (see sqlstate and message in level_sync.sync_queue), then select level_sync.requeue().'
    from level_sync.sync_queue as queued
   where queued.dead_at is not null
   union all
  select 'queue_draining',
         count(*) = 0,
         case when count(*) = 0 then 'nothing is overdue'
              else format('%s pairs overdue, the oldest since %s', count(*), min(queued.next_attempt_at)) end,
         'The job level_sync_maintain drains every minute; see the schedule check, or call level_sync.drain_queue().'
    from level_sync.sync_queue as queued
   where queued.dead_at is null
     and queued.next_attempt_at < clock_timestamp() - interval '5 minutes'
$$;
comment on function level_sync._check_queue() is 'No dead pair, and none that has been due for more than five minutes.';

create or replace function level_sync._check_runs()
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select 'last_success',
         coalesce(latest.job_start >= level_sync._last_slot(settings.schedule, clock_timestamp() - settings.misfire_grace), false),
         coalesce('last successful run ' || latest.job_start, 'no run has succeeded yet'),
         'Look at level_sync.sync_log and at the schedule check; call level_sync.reconcile() runs it now.'
    from level_sync.settings
    left join lateral (
      select sync_log.job_start
        from level_sync.sync_log
       where sync_log.status in ('success', 'partial') and not sync_log.dry_run
       order by sync_log.run_id desc
       limit 1
    ) as latest on true
   union all
  -- A run at work, and one that found another at work, say nothing of how it ended last.
  select 'last_run',
         coalesce(latest.status = 'success', true),
         case when latest.run_id is null then 'no run yet'
              else format('run %s: %s%s', latest.run_id, latest.status, ', ' || left(latest.error, 500)) end,
         case latest.status
           when 'needs_approval' then format('Look at level_sync.sync_plan, then call level_sync.reconcile(plan => %s, approve => true).', latest.run_id)
           else 'See error and results of that row in level_sync.sync_log.' end
    from (values (1)) as one
    left join level_sync._last_finished_run() as latest on true
   union all
  select 'running',
         count(*) = 0 or pg_is_in_recovery() or level_sync._is_run_active(),
         case when count(*) = 0 then 'no run is at work'
              when pg_is_in_recovery() then 'a run says running: whether it is at work is seen on the primary'
              when level_sync._is_run_active() then 'a run is at work'
              else format('run %s says running, but its session is gone', min(sync_log.run_id)) end,
         'The next run marks it aborted and finishes the work.'
    from level_sync.sync_log
   where sync_log.status = 'running'
$$;
comment on function level_sync._check_runs() is 'The last slot of the schedule has seen a successful run, the last run that ended went well, and none says running that is not.';

-- The same query here, and by level-sync verify in the database of pg_cron where that is another one.
create or replace function level_sync._cron_jobs_query()
  returns text language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select $sql$
    select coalesce(pg_catalog.jsonb_agg(pg_catalog.to_jsonb(job) || pg_catalog.jsonb_build_object('last_run', (
             select pg_catalog.to_jsonb(details)
               from cron.job_run_details as details
              where details.jobid = job.jobid
                and details.status in ('succeeded', 'failed')
              order by details.runid desc
              limit 1))), '[]')
      from cron.job
     where pg_catalog.starts_with(job.jobname, 'level_sync_')
  $sql$
$$;
comment on function level_sync._cron_jobs_query() is 'Query that gives our jobs of cron.job with the last run of each, as jsonb.';

create or replace function level_sync._check_cron_jobs(jobs jsonb)
  returns setof level_sync.check_result language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  with checked as (
    select wanted.jobname, job.*,
           case
             when job.jobid is null then 'the job is missing'
             when job.database <> current_database() then format('the job runs in database %s, not in %s', job.database, current_database())
             when not job.active then 'the job is not active'
             when btrim(job.command, ' ;') <> wanted.command then format('the job runs another command: %s', job.command)
             when job.schedule <> wanted.schedule then format('the job runs at %s instead of %s', job.schedule, wanted.schedule)
             when role.oid is null then format('the job runs as role %s, which does not exist', job.username)
             when not (has_schema_privilege(role.oid, 'level_sync', 'usage')
                       and has_function_privilege(role.oid, wanted.signature, 'execute'))
               then format('the job runs as role %s, which may not call it', job.username)
           end as problem
      from level_sync._wanted_cron_jobs() as wanted
      left join lateral (
        select candidate.*
          from jsonb_to_recordset(jobs) as candidate (
            jobid bigint, jobname text, schedule text, command text, database text, username text, active boolean, last_run jsonb)
         -- Where two databases share one pg_cron, the second one's name is added to its jobs.
         where candidate.jobname in (wanted.jobname, wanted.jobname || '_' || current_database())
         order by candidate.database = current_database() desc, candidate.active desc
         limit 1
      ) as job (jobid, name, schedule, command, database, username, active, last_run) on true
      left join pg_roles as role on role.rolname = job.username
  )
  select 'schedule: ' || checked.jobname, checked.problem is null,
         coalesce(checked.problem, format('job %s at %s as %s', checked.jobid, checked.schedule, checked.username)),
         'Run level-sync schedule.'
    from checked
   union all
  select 'cron run: ' || checked.jobname,
         checked.last_run ->> 'status' is null
           or checked.last_run ->> 'status' = 'succeeded' and checked.last_run ->> 'start_time' is not null,
         case when checked.last_run ->> 'status' is null then 'no run yet'
              else format('last run %s at %s: %s', checked.last_run ->> 'status',
                          coalesce(checked.last_run ->> 'start_time', 'no time'), left(checked.last_run ->> 'return_message', 500))
         end,
         case when checked.last_run ->> 'start_time' is null
              then 'pg_cron could not connect: set cron.use_background_workers = on, or allow it in pg_hba.conf.'
              else 'See return_message in cron.job_run_details.' end
    from checked
   where checked.jobid is not null
$$;
comment on function level_sync._check_cron_jobs(jsonb) is 'Both jobs are scheduled for this database, active, with the right command, time and role, and their last runs went well.';

create or replace function level_sync._check_schedule()
  returns setof level_sync.check_result language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
  cron record;
  jobs jsonb;
begin
  if not (select settings.uses_pg_cron from level_sync.settings) then
    return query select 'schedule', true, 'another scheduler runs level_sync (settings.uses_pg_cron is false)'::text,
      'The checks last_success and queue_draining show whether it does.'::text;
    return;
  end if;
  select * into cron from level_sync._cron_access();
  if cron.is_preloaded is null then
    return query select 'schedule', null::boolean,
      format('not checked: %s may not see whether pg_cron is preloaded', current_user),
      format('Grant pg_read_all_settings to %s.', current_user);
    return;
  elsif not cron.is_preloaded then
    return query select 'schedule', false, 'pg_cron is not preloaded'::text,
      'Install postgresql-NN-cron, set shared_preload_libraries = ''pg_cron'' and restart; or let another scheduler run "level-sync reconcile" and "call level_sync.maintain()", and set level_sync.settings.uses_pg_cron to false.';
    return;
  end if;

  -- Who may not see the processes of others cannot tell whether the launcher runs; on a standby it does not, and need not.
  return query
    select 'cron_launcher',
           case when launcher.is_seen then true
                when pg_has_role(current_user, 'pg_read_all_stats', 'usage') then false end,
           case when launcher.is_seen then 'the pg_cron launcher runs' else 'the pg_cron launcher is not seen' end,
           'Restart the server; look into its log for "pg_cron".'
      from (select exists (select from pg_stat_activity where pg_stat_activity.backend_type like 'pg_cron%')) as launcher (is_seen)
     where not pg_is_in_recovery();

  if not cron.may_read then
    return query
      select 'schedule', situation.ok, situation.detail, situation.hint
        from (values
          (cron.is_here, null::boolean, 'not checked: no right to read cron.job',
           'Grant usage on schema cron and select on its tables to the owner of level_sync.'),
          (cron.cron_database = current_database(), false, 'pg_cron is preloaded, but its extension is not in this database',
           'As a superuser: create extension pg_cron; then run level-sync schedule.'),
          (true, null, format('not checked from here: the jobs stand in database %s', cron.cron_database),
           'level-sync verify looks there.')
        ) as situation (is_given, ok, detail, hint)
       where situation.is_given
       limit 1;
    return;
  end if;
  execute level_sync._cron_jobs_query() into jobs;
  return query select * from level_sync._check_cron_jobs(jobs);
exception when insufficient_privilege or undefined_table then
  return query select 'schedule', null::boolean, format('not checked: %s', sqlerrm),
    'Grant usage on schema cron and select on its tables to the owner of level_sync.'::text;
end
$$;
comment on function level_sync._check_schedule() is 'pg_cron is preloaded and its launcher runs, and what _check_cron_jobs says of the jobs; NULL where they cannot be read. Good without a look where another scheduler does it.';

-- Writes a pair both ways and takes it back. Not part of health: reading a view should not write.
create or replace function level_sync._check_live()
  returns table (name text, ok boolean, detail text, hint text) language plpgsql security definer
  set search_path = pg_catalog, pg_temp set lock_timeout = '1s'
as $$
declare
  pair    record;
  reached integer;
begin
  name := 'live';
  hint := 'Look at the triggers and functions checks, and at level_sync.sync_queue.';
  begin
    select progress.student_id as user_id, progress.specialization_id as specialization,
           case progress.current_level when 1 then 2 else progress.current_level - 1 end as other_level,
           progress.current_level as level
      into pair
      from public.specialization_progress as progress
      join public.user_licenses as license
        on license.user_id = progress.student_id and license.specialization_type = progress.specialization_id
      join public.specializations as specialization
        on specialization.id = progress.specialization_id and coalesce(specialization.max_levels, 2) > 1
     where license.current_level = progress.current_level
     limit 1
       for update of progress, license skip locked;
    if not found then
      detail := 'not checked: there is no pair that could be written';
      return next;
      return;
    end if;

    update public.specialization_progress as progress set current_level = pair.other_level
     where (select level_sync._enter_trigger_context())
       and progress.student_id = pair.user_id and progress.specialization_id = pair.specialization;
    perform level_sync._leave_trigger_context();
    set constraints level_sync.pending_pairs_committed immediate;
    select license.current_level into reached from public.user_licenses as license
     where license.user_id = pair.user_id and license.specialization_type = pair.specialization;
    if reached is distinct from pair.other_level then
      raise exception using errcode = 'LVS01', message = 'a progress level did not arrive at the license';
    end if;

    update public.user_licenses as license set current_level = pair.level
     where (select level_sync._enter_trigger_context())
       and license.user_id = pair.user_id and license.specialization_type = pair.specialization;
    perform level_sync._leave_trigger_context();
    set constraints level_sync.pending_pairs_committed immediate;
    select progress.current_level into reached from public.specialization_progress as progress
     where progress.student_id = pair.user_id and progress.specialization_id = pair.specialization;
    if reached is distinct from pair.level then
      raise exception using errcode = 'LVS01', message = 'a license level did not arrive at the progress';
    end if;
    raise exception using errcode = 'LVS00', message = 'a level went both ways and was taken back';
  exception when others then
    ok := sqlstate = 'LVS00';
    detail := sqlerrm;
  end;
  return next;
end
$$;
comment on function level_sync._check_live() is 'Writes the level of a pair on each side, sees it arrive on the other, and takes everything back.';

create or replace function level_sync._row_counts(out progress_rows bigint, out license_rows bigint)
  language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select (select count(*) from public.specialization_progress), (select count(*) from public.user_licenses)
$$;
comment on function level_sync._row_counts() is 'How many rows each side has, for roles that may not read the tables.';

create or replace function level_sync._schema_version()
  returns integer language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select max(substring(migration_id, '^[0-9]+')::integer) from level_sync._yoyo_migration
$$;
comment on function level_sync._schema_version() is 'Number of the newest migration applied, as in the names of its files.';

create or replace view level_sync.quick_health as
select * from level_sync._check_triggers()
 union all select * from level_sync._check_functions()
 union all select * from level_sync._check_foreign_keys()
 union all select * from level_sync._check_queue()
 union all select * from level_sync._check_runs()
 union all select * from level_sync._check_schedule();

comment on view level_sync.quick_health is 'The checks of level_sync.health that take milliseconds however many pairs there are.';
comment on column level_sync.quick_health.name is 'What is checked.';
comment on column level_sync.quick_health.ok is 'true: good. false: not. NULL: could not be checked, which is not good either.';
comment on column level_sync.quick_health.detail is 'What was found.';
comment on column level_sync.quick_health.hint is 'What to do where ok is not true.';

create or replace view level_sync.health as
select * from level_sync.quick_health
 union all select * from level_sync._check_orphans()
 union all select * from level_sync._check_hidden_rows()
 union all select * from level_sync._check_pairs();

comment on view level_sync.health is 'One row per check: name, ok (NULL where it could not be made), detail, hint (what to do).';
comment on column level_sync.health.name is 'What is checked.';
comment on column level_sync.health.ok is 'true: good. false: not. NULL: could not be checked, which is not good either.';
comment on column level_sync.health.detail is 'What was found.';
comment on column level_sync.health.hint is 'What to do where ok is not true.';
