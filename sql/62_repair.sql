-- The repair of a plan, batch by batch: only pairs that nobody else has locked, and only those that are still as the plan
-- saw them. A pair that waits in the queue is left to the drain, or to a person if it is dead, because its entry knows
-- which side was written last; unless the run was told its direction by a person.

create or replace function level_sync._planned_pairs(plan_id bigint, first_user bigint, batch_size integer)
  returns level_sync.pair[] language plpgsql stable
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan
as $$
declare
  actor  constant text := level_sync._session_actor();
  reason constant text := level_sync._session_reason();
begin
  return array(
    select level_sync._pair(batch.user_id, batch.specialization, repair.side, repair.change, actor, reason,
                            progress_level => batch.progress_level, license_level => batch.license_level)
      from (
        select plan.*
          from level_sync.sync_plan as plan
         where plan.run_id = plan_id
           and plan.user_id >= first_user
           and plan.outcome = 'planned'
           and plan.action <> 'report_only'
         order by plan.user_id, plan.specialization
         limit batch_size
      ) as batch
      join level_sync._repairs() as repair on repair.action = batch.action);
end
$$;
comment on function level_sync._planned_pairs(bigint, bigint, integer) is 'The next pairs of a plan that are still to be repaired, from first_user on, with the levels the plan saw.';

create or replace function level_sync._record_repairs(
    run_id bigint, plan_id bigint, repaired level_sync.pair[], ignored_entries bigint[])
  returns void language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  user_range record;
begin
  if repaired = '{}' then
    return;
  end if;
  select * into user_range from level_sync._user_range(repaired);
  -- The log of the run shows the first pairs of the plan; the others are taken out of it.
  if user_range.first_user <= (select max(shown.user_id) from level_sync._sample_of_plan(plan_id) as shown) then
    update level_sync.sync_plan as plan
       set outcome = 'repaired'
      from level_sync._sample_of_plan(plan_id) as shown
      join unnest(repaired) as pair on pair.user_id = shown.user_id and pair.specialization = shown.specialization
     where plan.run_id = plan_id
       and plan.user_id between user_range.first_user and user_range.last_user
       and plan.user_id = shown.user_id
       and plan.specialization = shown.specialization;
  end if;

  with pair as materialized (
    select repair.user_id, repair.specialization from unnest(repaired) as repair
  ), dequeued as (
    -- A pair that is equal now has nothing left to wait for, dead or not.
    delete from level_sync.sync_queue as queued
     using pair
     where queued.queue_id = any (ignored_entries)
       and queued.user_id between user_range.first_user and user_range.last_user
       and queued.user_id = pair.user_id
       and queued.specialization = pair.specialization
  ), taken_out as (
    delete from level_sync.sync_plan as plan
     using pair
     where plan.run_id = plan_id
       and plan.user_id between user_range.first_user and user_range.last_user
       and plan.outcome = 'planned'
       and plan.user_id = pair.user_id
       and plan.specialization = pair.specialization
    returning plan.action
  ), counted as (
    select every.action, sum(every.pairs) as pairs
      from (
        select taken_out.action, count(*) as pairs from taken_out group by taken_out.action
         union all
        select before.action, before.pairs from level_sync._repaired_by_action(run_id) as before
      ) as every
     group by every.action
  )
  update level_sync.sync_log as log
     set synced_count = coalesce(log.synced_count, 0) + cardinality(repaired),
         results = jsonb_build_object('repaired', (
           select coalesce(jsonb_object_agg(counted.action, counted.pairs), '{}') from counted))
   where log.run_id = _record_repairs.run_id;
end
$$;
comment on function level_sync._record_repairs(bigint, bigint, level_sync.pair[], bigint[]) is 'Takes what is repaired out of the plan, and out of the queue where somebody told the direction, and counts it in the log.';

create or replace function level_sync._record_outcome(plan_id bigint, pairs level_sync.pair[], outcome text)
  returns void language sql set search_path = pg_catalog, pg_temp
as $$
  update level_sync.sync_plan as plan
     set outcome = _record_outcome.outcome
    from unnest(pairs) as pair
   where plan.run_id = plan_id
     and plan.user_id = pair.user_id
     and plan.specialization = pair.specialization
$$;
comment on function level_sync._record_outcome(bigint, level_sync.pair[], text) is 'Gives pairs of a plan their outcome.';

create or replace function level_sync._confirm_planned(plan_id bigint, planned level_sync.pair[], respects_queue boolean)
  returns level_sync.pair[] language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  locked    level_sync.pair[];
  waiting   bigint[] := '{}'::bigint[];
  confirmed level_sync.pair[];
begin
  locked := level_sync._lock_pairs(planned);
  -- A new statement sees what was queued before the locks were granted.
  if respects_queue then
    waiting := level_sync._waiting_ordinals(planned, '{}');
  end if;

  with seen as materialized (
    select level_sync._pair(pair.user_id, pair.specialization, free.side, free.change) as pair,
           case when free.user_id is null then 'busy'
                when pair.ordinality = any (waiting) then 'queued'
                when free.progress_level is distinct from pair.progress_level
                  or free.license_level is distinct from pair.license_level then 'changed'
           end as outcome
      from unnest(planned) with ordinality as pair
      left join unnest(locked) as free on free.user_id = pair.user_id and free.specialization = pair.specialization
  ), skipped as (
    update level_sync.sync_plan as plan
       set outcome = seen.outcome
      from seen
     where seen.outcome is not null
       and plan.run_id = plan_id
       and plan.user_id = (seen.pair).user_id
       and plan.specialization = (seen.pair).specialization
  )
  select coalesce(array_agg(seen.pair) filter (where seen.outcome is null), '{}') into confirmed from seen;
  return confirmed;
end
$$;
comment on function level_sync._confirm_planned(bigint, level_sync.pair[], boolean) is 'Locks the planned pairs that nobody else has locked and returns those that may be repaired. The others get their outcome in the plan: busy, queued, or changed (no longer has the levels seen).';

create or replace function level_sync._queue_failures(pairs level_sync.pair[])
  returns void language sql set search_path = pg_catalog, pg_temp
as $$
  insert into level_sync.sync_queue
         (user_id, specialization, side, change, sqlstate, message, attempts, next_attempt_at, dead_at)
  select pair.user_id, pair.specialization, pair.side, 'level_changed', pair.sqlstate, pair.message, 1,
         clock_timestamp() + settings.retry_backoff,
         case when settings.max_attempts = 1 then clock_timestamp() end
    from level_sync.settings, unnest(pairs) as pair
   where not exists (
           select from level_sync.sync_queue as waiting
            where waiting.user_id = pair.user_id and waiting.specialization = pair.specialization)
$$;
comment on function level_sync._queue_failures(level_sync.pair[]) is 'Queues pairs whose repair failed, where nothing waits for them yet; the repair counts as the first attempt.';

create or replace function level_sync._repair_contended(
    run_id bigint, plan_id bigint, planned level_sync.pair[], respects_queue boolean, ignored_entries bigint[])
  returns level_sync.pair[] language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan
as $$
declare
  due            level_sync.pair[];
  failed         level_sync.pair[];
  queued         level_sync.pair[];
  waiting_before bigint[];
begin
  due := level_sync._confirm_planned(plan_id, planned, respects_queue);
  if due = '{}' then
    return due;
  end if;

  waiting_before := level_sync._waiting_ordinals(due, ignored_entries);
  failed := level_sync._carry_or_isolate(due, 'reconcile', run_id);
  -- What a trigger wrote to another pair while this one was repaired may have been queued by now.
  queued := level_sync._pairs_at(due, array(
    select unnest(level_sync._waiting_ordinals(due, ignored_entries)) except select unnest(waiting_before)));
  queued := level_sync._pairs_without(queued, failed);

  perform level_sync._queue_failures(failed);
  perform level_sync._record_outcome(plan_id, failed, 'failed');
  perform level_sync._record_outcome(plan_id, queued, 'queued');
  return level_sync._pairs_without(due, failed || queued);
end
$$;
comment on function level_sync._repair_contended(bigint, bigint, level_sync.pair[], boolean, bigint[]) is 'Repairs those of the planned pairs that may be repaired, gives the others their outcome in the plan, and queues those that fail. Returns the pairs it has repaired.';

create or replace function level_sync._repair_batch(run_id bigint, plan_id bigint, first_user bigint, batch_size integer)
  returns bigint language plpgsql
  set search_path = pg_catalog, pg_temp set lock_timeout = 0 set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  respects_queue constant boolean := (select sync_log.direction is null from level_sync.sync_log where sync_log.run_id = plan_id);
  pairs           level_sync.pair[];
  repaired        level_sync.pair[];
  synced          bigint[];
  ignored_entries bigint[];
  last_user       bigint;
begin
  pairs := level_sync._planned_pairs(plan_id, first_user, batch_size);
  if pairs = '{}' then
    return null;
  end if;
  last_user := (level_sync._user_range(pairs)).last_user;

  -- Counted at the end of the batch. Whoever has locked this row is waited for now, while no pair is locked.
  perform from level_sync.sync_log as log where log.run_id = _repair_batch.run_id for no key update;
  perform set_config('lock_timeout', '100ms', true);

  -- Whoever told the direction need not wait for the queue. But what is queued from now on is newer than that.
  ignored_entries := array(
    select queued.queue_id
      from level_sync.sync_queue as queued
     where not respects_queue
       and queued.user_id between first_user and last_user);

  synced   := level_sync._carry_uncontended(pairs, 'reconcile', run_id, true, ignored_entries);
  repaired := level_sync._pairs_at(pairs, synced);
  pairs    := level_sync._pairs_except(pairs, synced);
  if pairs <> '{}' then
    repaired := repaired || level_sync._repair_contended(run_id, plan_id, pairs, respects_queue, ignored_entries);
  end if;
  perform level_sync._record_repairs(run_id, plan_id, repaired, ignored_entries);
  return last_user;
end
$$;
comment on function level_sync._repair_batch(bigint, bigint, bigint, integer) is 'Repairs the next pairs of a plan, from first_user on, in one transaction. Returns the last user it looked at, NULL when nothing is left.';
