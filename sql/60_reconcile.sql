-- The reconcile finds every desync, repairs it and logs to sync_log. cron, people and tests make the same call.
--
-- One run: take the lock, drain the queue, walk the users range by range and write what differs into sync_plan, then
-- lock, look again and repair batch by batch. Every step is a transaction of its own. Each desync is confirmed under
-- lock before it is repaired, so a pair that somebody is writing is never touched.

create or replace function level_sync._run_lock()
  returns bigint language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select hashtextextended('level_sync reconcile', 0)
$$;
comment on function level_sync._run_lock() is 'Key of the advisory lock that the one run holds in each of its transactions.';

create or replace function level_sync._is_run_active()
  returns boolean language sql stable set search_path = pg_catalog, pg_temp
as $$
  select exists (
    select from pg_locks
     where pg_locks.locktype = 'advisory'
       and pg_locks.granted
       and pg_locks.database = (select oid from pg_database where datname = current_database())
       and pg_locks.objsubid = 1
       and (pg_locks.classid::bigint << 32 | pg_locks.objid::bigint) = level_sync._run_lock())
$$;
comment on function level_sync._is_run_active() is 'Whether a run is at work right now.';

-- A lock of the transaction and not of the session, because a cancel that strikes at a COMMIT, where nothing can catch it,
-- would leave the session's to whoever keeps the session open. Between two transactions the run is without it for a moment.
create or replace function level_sync._try_run_lock()
  returns boolean language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from level_sync.sync_log where sync_log.status = 'running') then
    for look in 1 .. 5 loop
      if level_sync._is_run_active() then
        return false;
      end if;
      perform pg_sleep(0.01);
    end loop;
  end if;
  return pg_try_advisory_xact_lock(level_sync._run_lock());
end
$$;
comment on function level_sync._try_run_lock() is 'Takes the lock of the one run for this transaction; false where another run is at work.';

create or replace function level_sync._validate_run_arguments(
    dry_run boolean, direction text, plan bigint, approve boolean, started_by text)
  returns void language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if dry_run is null or approve is null or started_by is null then
    raise null_value_not_allowed using message = 'dry_run, approve and started_by must not be NULL';
  end if;
  if started_by not in ('cron', 'manual', 'catch_up') then
    raise invalid_parameter_value using
      message = format('unknown started_by %L', started_by), hint = 'Use cron, manual or catch_up.';
  end if;
  if direction not in ('progress_to_license', 'license_to_progress') then
    raise invalid_parameter_value using
      message = format('unknown direction %L', direction),
      hint    = 'Use progress_to_license, license_to_progress, or NULL for settings.conflict_policy.';
  end if;
  if plan is not null and (dry_run or direction is not null) then
    raise invalid_parameter_value using
      message = 'a plan is applied as it was recorded: give it without dry_run and direction';
  end if;
  if plan is not null and level_sync._count_planned(plan) = 0 then
    raise no_data_found using
      message = format('run %s has no plan that could be applied', plan),
      hint    = 'Plans are recorded by dry runs and by runs with status needs_approval; level_sync.sync_plan shows them.';
  end if;
end
$$;
comment on function level_sync._validate_run_arguments(boolean, text, bigint, boolean, text) is 'Raises null_value_not_allowed, invalid_parameter_value or no_data_found for arguments of reconcile that make no sense.';

create or replace function level_sync._start_run(dry_run boolean, direction text, started_by text, plan bigint)
  returns bigint language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  new_run bigint;
begin
  -- Whoever holds the lock is the only run: others that say running have died.
  update level_sync.sync_log
     set status = 'aborted', job_end = clock_timestamp(), error = 'its session ended before the run did'
   where sync_log.status = 'running';

  insert into level_sync.sync_log (dry_run, direction, started_by)
  values (_start_run.dry_run, _start_run.direction, _start_run.started_by)
  returning sync_log.run_id into new_run;

  -- What a run before this one has done of the same plan is told by its own row of the log.
  if plan is not null then
    delete from level_sync.sync_plan
     where sync_plan.run_id = _start_run.plan and sync_plan.outcome <> 'planned';
  end if;
  return new_run;
end
$$;
comment on function level_sync._start_run(boolean, text, text, bigint) is 'Opens the row of a run, closes those of runs that died, and leaves of the plan that is to be applied what is still to do. Only for whoever holds the run lock.';

create or replace function level_sync._log_skipped_run(dry_run boolean, direction text, started_by text)
  returns void language sql security definer set search_path = pg_catalog, pg_temp
as $$
  insert into level_sync.sync_log (status, dry_run, direction, started_by, job_end, error)
  values ('skipped', _log_skipped_run.dry_run, _log_skipped_run.direction, _log_skipped_run.started_by,
          clock_timestamp(), 'another run holds the lock')
$$;
comment on function level_sync._log_skipped_run(boolean, text, text) is 'Logs a run that found another one at work.';

-- How many pairs to expect between two users, by the planner's own estimate.
create or replace function level_sync._expected_pairs(first_user bigint, last_user numeric)
  returns numeric language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  plan json;
begin
  execute format('explain (format json)
                  select from public.specialization_progress where student_id between %1$s and %2$s
                  union all select from public.user_licenses where user_id between %1$s and %2$s', first_user, last_user)
     into plan;
  return (plan #>> '{0,Plan,Plan Rows}')::numeric / 2;
end
$$;
comment on function level_sync._expected_pairs(bigint, numeric) is 'Estimate of the pairs of a range of users, from the statistics of both tables.';

-- To count the pairs of a range would cost as much as to compare them, so its end is estimated. A wrong estimate makes a
-- range longer or shorter and loses nothing. Where ANALYZE has never been, they are counted.
create or replace function level_sync._end_of_range(first_user bigint, pair_count integer)
  returns bigint language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  newest   constant numeric := (
    select greatest((select max(progress.student_id) from public.specialization_progress as progress),
                    (select max(license.user_id) from public.user_licenses as license)));
  oldest   constant bigint := (
    select least((select min(progress.student_id) from public.specialization_progress as progress where progress.student_id >= first_user),
                 (select min(license.user_id) from public.user_licenses as license where license.user_id >= first_user)));
  width    numeric := newest - oldest + 1;
  expected numeric;
begin
  if oldest is null then
    return null;
  end if;
  if (select count(distinct stats.attname) from pg_stats as stats
       where stats.schemaname = 'public' and stats.histogram_bounds is not null
         and (stats.tablename, stats.attname) in (('specialization_progress', 'student_id'), ('user_licenses', 'user_id'))) < 2
  then
    -- The side that reaches pair_count first ends the range, so neither side's part of it grows.
    return least(
      (select progress.student_id from public.specialization_progress as progress
        where progress.student_id >= first_user order by progress.student_id offset pair_count limit 1),
      (select license.user_id from public.user_licenses as license
        where license.user_id >= first_user order by license.user_id offset pair_count limit 1));
  end if;

  for attempt in 1 .. 20 loop
    expected := level_sync._expected_pairs(oldest, oldest + width - 1);
    exit when expected <= 2 * pair_count and (2 * expected >= pair_count or oldest + width - 1 >= newest)
           or expected > 2 * pair_count and width = 1;
    width := greatest(1, least(newest - oldest + 1, floor(width * pair_count / greatest(expected, 1))));
  end loop;
  return case when oldest + width - 1 < newest then oldest + width - 1 end;
end
$$;
comment on function level_sync._end_of_range(bigint, integer) is 'Last user of the range that begins with first_user and has about pair_count pairs; NULL where no user is beyond it.';

-- Plans one range of users and returns where the next one begins; NULL when there is no user beyond.
create or replace function level_sync._plan_range(run_id bigint, direction text, first_user bigint, user_count integer)
  returns bigint language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  hidden    constant text := level_sync._hidden_tables();
  last_user constant bigint := level_sync._end_of_range(first_user, user_count);
begin
  if hidden is not null then
    raise insufficient_privilege using
      message = format('row level security may hide rows of %s from %s: what is hidden would be taken for missing', hidden, current_user),
      hint    = 'alter table ... no force row level security, or give the owner of level_sync the attribute BYPASSRLS.';
  end if;

  insert into level_sync.sync_plan (run_id, user_id, specialization, issue_type, progress_level, license_level, action)
  select _plan_range.run_id, issues.user_id, issues.specialization, issues.issue_type, issues.progress_level,
         issues.license_level,
         case when issues.issue_type = 'level_mismatch' and _plan_range.direction is not null
              then case _plan_range.direction when 'progress_to_license' then 'update_license' else 'update_progress' end
              else issues.recommended_action end
    from level_sync._desync_issues_between(first_user, coalesce(last_user, 9223372036854775807)) as issues;

  -- A long plan that nobody has looked at yet would be sorted again for each batch of it.
  if last_user is null and exists (
    select from level_sync.sync_plan as plan where plan.run_id = _plan_range.run_id offset 5000)
  then
    analyze (skip_locked) level_sync.sync_plan;
  end if;
  return case when last_user < 9223372036854775807 then last_user + 1 end;
end
$$;
comment on function level_sync._plan_range(bigint, text, bigint, integer) is 'Writes the desyncs of a range of users into sync_plan and returns the first user of the next range, NULL at the end.';

create or replace function level_sync._sample_of_plan(plan_id bigint)
  returns setof level_sync.sync_plan language sql stable set search_path = pg_catalog, pg_temp
as $$
  select * from level_sync.sync_plan as plan where plan.run_id = plan_id order by plan.user_id, plan.specialization limit 20
$$;
comment on function level_sync._sample_of_plan(bigint) is 'The first pairs of a plan, which the log of its run shows. They are in sync_plan until the run ends.';

create or replace function level_sync._repaired_by_action(run_id bigint)
  returns table (action text, pairs bigint) language sql stable set search_path = pg_catalog, pg_temp
as $$
  select repaired.action, repaired.pairs::bigint
    from level_sync.sync_log, jsonb_each_text(sync_log.results -> 'repaired') as repaired (action, pairs)
   where sync_log.run_id = _repaired_by_action.run_id
$$;
comment on function level_sync._repaired_by_action(bigint) is 'How many pairs a run at work has repaired and taken out of its plan, by action.';

create or replace function level_sync._finish_run(run_id bigint, plan_id bigint, status text, error text)
  returns void language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  counts   record;
  finished level_sync.sync_log;
begin
  -- Once through the plan, which may be long; the rest is counted from these few rows.
  with counted as materialized (
    select plan.issue_type, plan.action, plan.outcome, count(*) as pairs
      from level_sync.sync_plan as plan
     where plan.run_id = plan_id
     group by plan.issue_type, plan.action, plan.outcome
     union all
    select repair.issue_type, repaired.action, 'repaired', repaired.pairs
      from level_sync._repaired_by_action(run_id) as repaired
      join level_sync._repairs() as repair on repair.action = repaired.action
  ), totals as (
    select total.name, total.key, sum(counted.pairs) as pairs
      from (values ('issues'), ('actions'), ('repairs'), ('outcomes')) as every (name)
      left join counted on true
     cross join lateral (
       select every.name, case every.name when 'issues' then counted.issue_type when 'actions' then counted.action
                                          when 'outcomes' then counted.outcome
                                          when 'repairs' then case counted.outcome when 'repaired' then counted.action end end
     ) as total (name, key)
     group by total.name, total.key
  ), results as (
    select totals.name, coalesce(jsonb_object_agg(totals.key, totals.pairs) filter (where totals.key is not null), '{}') as counts
      from totals
     group by totals.name
  )
  select coalesce(sum(counted.pairs), 0) as found,
         coalesce(sum(counted.pairs) filter (where counted.outcome = 'repaired'), 0) as repaired,
         coalesce(sum(counted.pairs) filter (where counted.outcome = 'failed'), 0) as failed,
         (select jsonb_object_agg(results.name, results.counts) from results)
           || jsonb_build_object('plan', plan_id, 'sample', (
                select coalesce(jsonb_agg(to_jsonb(sample) - 'run_id'), '[]') from level_sync._sample_of_plan(plan_id) as sample)) as results
    into counts
    from counted;

  update level_sync.sync_log
     set status = coalesce(_finish_run.status, case when counts.failed > 0 then 'partial' else 'success' end),
         job_end = clock_timestamp(),
         issues_found = counts.found,
         synced_count = counts.repaired,
         failed_count = counts.failed,
         error = _finish_run.error,
         results = counts.results
   where sync_log.run_id = _finish_run.run_id
  returning sync_log.* into finished;

  -- What a run that went through has done is in sync_events; a plan that can still be applied is kept.
  if finished.status in ('success', 'partial') and not finished.dry_run then
    delete from level_sync.sync_plan as plan where plan.run_id = plan_id;
  end if;

  -- A payload may have 8,000 bytes.
  finished.error := left(finished.error, 1000);
  perform pg_notify('level_sync', (to_jsonb(finished) #- '{results,sample}')::text);
end
$$;
comment on function level_sync._finish_run(bigint, bigint, text, text) is 'Closes the row of a run with its counts and sends it as NOTIFY level_sync.';

create or replace function level_sync._report_progress(phase text, at_user bigint, plan_id bigint)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  progress jsonb;
begin
  if current_setting('level_sync.report_progress', true) is distinct from 'on' or at_user is null then
    return;
  end if;
  select case phase
           when 'looking' then (
             select jsonb_build_object('done', at_user - ends.first, 'total', greatest(ends.last - ends.first, 1))
               from (select least(min(progress.student_id), (select min(license.user_id) from public.user_licenses as license))::numeric as first,
                            greatest(max(progress.student_id), (select max(license.user_id) from public.user_licenses as license))::numeric as last
                       from public.specialization_progress as progress) as ends)
           else (
             select jsonb_build_object('done', repaired.pairs + kept.decided, 'total', repaired.pairs + kept.pairs)
               from (select coalesce(sum(counted.pairs), 0) as pairs
                       from level_sync.sync_log, level_sync._repaired_by_action(sync_log.run_id) as counted
                      where sync_log.status = 'running') as repaired,
                    (select count(*) as pairs, count(*) filter (where plan.outcome <> 'planned') as decided
                       from level_sync.sync_plan as plan where plan.run_id = plan_id) as kept)
         end
    into progress;
  raise notice using message = 'level_sync progress', detail = (progress || jsonb_build_object('phase', phase))::text;
end
$$;
comment on function level_sync._report_progress(text, bigint, bigint) is 'For a client that has set level_sync.report_progress to on: how far a run is, as jsonb in the detail of a NOTICE.';

create or replace function level_sync._count_planned(plan_id bigint)
  returns bigint language sql stable set search_path = pg_catalog, pg_temp
as $$
  select count(*)
    from level_sync.sync_plan as plan
   where plan.run_id = plan_id
     and plan.outcome = 'planned'
     and plan.action <> 'report_only'
$$;
comment on function level_sync._count_planned(bigint) is 'How many pairs of a plan are still to be repaired.';

-- One step is one transaction of a run: a batch of the drain, a range of users looked at, or a batch repaired.
create or replace function level_sync._run_step(
    run_id bigint, plan_id bigint, dry_run boolean, direction text, approve boolean, due_before timestamptz,
    inout phase text, inout next_user bigint, out status text)
  language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  first_user constant bigint := coalesce(next_user, -9223372036854775808);
  config     record;
begin
  if not pg_try_advisory_xact_lock(level_sync._run_lock()) then
    raise lock_not_available using message = 'another run has begun';
  end if;
  select settings.batch_size, settings.repair_limit into config from level_sync.settings;
  perform level_sync._report_progress(phase, next_user, plan_id);
  case phase
    when 'draining' then  -- Queued pairs know which side was written last.
      if level_sync._drain_batch(due_before) = 0 then
        phase := 'looking';
      end if;
    when 'looking' then
      next_user := level_sync._plan_range(run_id, direction, first_user, config.batch_size * 10);
      if next_user is null then
        phase := case when not dry_run then 'deciding' end;
      end if;
    when 'deciding' then  -- More than anybody expects is not repaired unasked.
      if not approve and level_sync._count_planned(plan_id) > config.repair_limit then
        status := 'needs_approval';
        phase  := null;
      else
        phase := 'repairing';
      end if;
    when 'repairing' then
      next_user := level_sync._repair_batch(run_id, plan_id, first_user, config.batch_size);
      if next_user is null then
        phase := null;
      end if;
  end case;
end
$$;
comment on function level_sync._run_step(bigint, bigint, boolean, text, boolean, timestamptz, text, bigint) is 'Takes the next step of a run and returns the phase and the user to go on with; phase NULL: it has come to its end, with needs_approval in status where somebody has to approve. Raises lock_not_available where another run has begun.';

create or replace procedure level_sync.reconcile(
    dry_run boolean default false, direction text default null, plan bigint default null,
    approve boolean default false, started_by text default 'manual')
  language plpgsql
as $$
declare
  outer_path            constant text        := pg_catalog.current_setting('search_path');
  started_at            constant timestamptz := pg_catalog.clock_timestamp();
  is_inside_transaction boolean;
  run_id     bigint;
  plan_id    bigint;
  step       record;
  phase      text;
  next_user  bigint;
  tries      integer := 0;
  status     text;
  error      text;
  error_code text;
begin
  call level_sync._detect_outer_transaction(is_inside_transaction);
  call level_sync._begin_batch(is_inside_transaction);
  perform level_sync._validate_run_arguments(dry_run, direction, plan, approve, started_by);
  if not level_sync._try_run_lock() then
    perform level_sync._log_skipped_run(dry_run, direction, started_by),
            set_config('search_path', outer_path, true);
    return;
  end if;

  begin
    run_id  := level_sync._start_run(dry_run, direction, started_by, plan);
    plan_id := coalesce(plan, run_id);
    phase   := case when plan is not null then 'deciding' when dry_run then 'looking' else 'draining' end;
  exception when query_canceled or others then
    error := sqlerrm; error_code := sqlstate;
  end;
  call level_sync._begin_batch(is_inside_transaction);

  -- COMMIT is outside the block that catches errors, because inside it is not allowed.
  while phase is not null and error is null loop
    begin
      begin
        -- Nobody has to wait for the disk: what a crash takes back is found again, and the last COMMIT makes all durable.
        if not is_inside_transaction then
          set local synchronous_commit = off;
        end if;
        if tries > 0 then
          perform pg_sleep(0.1 * tries);
        end if;
        step := level_sync._run_step(run_id, plan_id, dry_run, direction, approve, started_at, phase, next_user);
        phase := step.phase; next_user := step.next_user; status := step.status; tries := 0;
      exception
        when serialization_failure or deadlock_detected or lock_not_available then
          tries := tries + 1;
          if tries = 3 then
            error := sqlerrm; error_code := sqlstate;
          end if;
        when query_canceled then
          perform pg_sleep(0.1);  -- A client's cancel comes as two signals before PostgreSQL 17, the second a moment later.
          error := sqlerrm; error_code := sqlstate;
        when others then
          error := sqlerrm; error_code := sqlstate;
      end;
    exception when query_canceled then
      error := sqlerrm; error_code := sqlstate;
    end;
    call level_sync._begin_batch(is_inside_transaction);
  end loop;

  -- What was repaired stays. The row of the run says how it ended; should even that fail, the next run marks it.
  if run_id is not null then
    begin
      perform pg_try_advisory_xact_lock(level_sync._run_lock());  -- Not to be taken for dead while it counts.
      perform level_sync._finish_run(run_id, plan_id,
        case when error_code = '57014' then 'aborted' when error is not null then 'failed' else status end,
        error || ' (SQLSTATE ' || error_code || ')');
    exception when query_canceled or others then
      error := sqlerrm; error_code := sqlstate; run_id := null;
    end;
  end if;
  call level_sync._begin_batch(is_inside_transaction);
  if error_code = '57014' or error is not null and run_id is null then
    raise exception using errcode = error_code, message = error;
  end if;
  perform set_config('search_path', outer_path, true);
end
$$;
comment on procedure level_sync.reconcile(boolean, text, bigint, boolean, text) is 'Finds every desync, repairs it and logs one row to sync_log. dry_run: change nothing, record the plan. direction: progress_to_license or license_to_progress instead of settings.conflict_policy. plan: apply exactly the plan of that run, skipping pairs that changed since. approve: repair more than settings.repair_limit. started_by: cron, manual or catch_up. Inside a transaction block it works as one transaction.';
