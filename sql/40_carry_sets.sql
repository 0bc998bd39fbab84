-- Many pairs at once, in both directions; for commits, drains, repairs and people. Each of the first functions is one
-- statement that locks without waiting, compares and writes. Its SET clauses take back what it sets.

-- Where the pairs are a good part of a table, or of the users from the first to the last of them, one look at each row
-- there is quicker than one at each pair. The planner, which takes the two columns of a pair for independent, cannot know.
create or replace function level_sync._prepare_set(pairs level_sync.pair[], out first_user bigint, out last_user bigint)
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  select * into first_user, last_user from level_sync._user_range(pairs);
  perform set_config('level_sync.own_depth', pg_trigger_depth()::text, true);
  if cardinality(pairs) > 1000
     and (cardinality(pairs) > 0.25 * (last_user::numeric - first_user)
          or cardinality(pairs) > (
            select 0.05 * max(pg_class.reltuples) from pg_class
             where pg_class.oid in ('public.specialization_progress'::regclass, 'public.user_licenses'::regclass)))
  then
    perform set_config('enable_nestloop', 'off', true);
  end if;
end
$$;
comment on function level_sync._prepare_set(level_sync.pair[]) is 'For the statement of the function that calls it: how it is planned, that its echo needs no second look, and its lowest and highest user.';

create or replace function level_sync._carry_levels(
    pairs level_sync.pair[], source text, run_id bigint, as_planned boolean)
  returns bigint[] language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off set enable_nestloop = on
  set work_mem = '64MB'
as $$
declare
  outer_depth  constant text := current_setting('level_sync.own_depth', true);
  carried_at   constant timestamptz := clock_timestamp();
  advanced_at  constant public.user_licenses.last_advanced_at%type := level_sync._as_utc(carried_at);
  active_at    constant public.specialization_progress.last_activity%type := level_sync._as_utc(carried_at);
  user_range   record;
  synced       bigint[];
  locked_count bigint;
begin
  select * into user_range from level_sync._prepare_set(pairs);
  with locked as materialized (
    select found.ordinal, found.user_id, found.specialization, found.actor, found.reason, found.target,
           case found.target when 'license' then found.license_level else found.progress_level end as old_level,
           case found.target when 'license' then found.progress_level else found.license_level end as new_level
      from (
        select pair.ordinality as ordinal, pair.user_id, pair.specialization, pair.actor, pair.reason,
               progress.level as progress_level, license.level as license_level,
               case when pair.change = 'created'  -- an insert never demotes
                    then case when coalesce(license.level, 0) < progress.level then 'license' else 'progress' end
                    else case pair.side when 'progress' then 'license' else 'progress' end end as target
          from unnest(pairs) with ordinality as pair
          join level_sync.progress_side as progress
            on progress.user_id = pair.user_id and progress.specialization = pair.specialization
           and progress.user_id between user_range.first_user and user_range.last_user
          join level_sync.license_side as license
            on license.user_id = pair.user_id and license.specialization = pair.specialization
           and license.user_id between user_range.first_user and user_range.last_user
         where pair.change <> 'deleted'
           and (not as_planned or progress.level is not distinct from pair.progress_level
                                  and license.level is not distinct from pair.license_level)
           for no key update of progress, license skip locked
      ) as found
      join public.specializations as known on known.id = found.specialization
     where level_sync._is_level_in_range(
             case found.target when 'license' then found.progress_level else found.license_level end, known.max_levels)
  ), licenses as (
    update public.user_licenses as license
       set current_level      = locked.new_level,
           max_achieved_level = greatest(license.max_achieved_level, locked.new_level),
           last_advanced_at   = advanced_at
      from locked
     where (select level_sync._enter_trigger_context_of_set())
       and locked.target = 'license' and locked.old_level is distinct from locked.new_level
       and license.user_id = locked.user_id and license.specialization_type = locked.specialization
       and license.user_id between user_range.first_user and user_range.last_user
    returning locked.*, license.current_level as level_now
  ), progress as (
    update public.specialization_progress as progress
       set current_level = locked.new_level,
           last_activity = active_at
      from locked
     where (select level_sync._enter_trigger_context_of_set())
       and locked.target = 'progress' and locked.old_level is distinct from locked.new_level
       and progress.student_id = locked.user_id and progress.specialization_id = locked.specialization
       and progress.student_id between user_range.first_user and user_range.last_user
    returning locked.*, progress.current_level as level_now
  ), carried as (
    select * from licenses union all select * from progress
  ), logged as (
    insert into level_sync.sync_events
           (occurred_at, user_id, specialization, direction, action, old_level, new_level, source, run_id, actor, reason)
    select carried_at, carried.user_id, carried.specialization,
           case carried.target when 'license' then 'progress_to_license' else 'license_to_progress' end, 'updated',
           carried.old_level, carried.level_now, source, run_id, carried.actor, carried.reason
      from carried
     where carried.level_now is distinct from carried.old_level
  )
  select array(select carried.ordinal from carried where carried.level_now = carried.new_level
                union all
               select locked.ordinal from locked where locked.old_level = locked.new_level),
         case when as_planned then (select count(*) from locked) end
    into synced, locked_count;
  perform pg_catalog.set_config('level_sync.own_depth', outer_depth, true);
  if as_planned and cardinality(synced) < locked_count then
    raise object_not_in_prerequisite_state using message = 'a trigger of the other table changed or dropped a write';
  end if;
  return synced;
end
$$;
comment on function level_sync._carry_levels(level_sync.pair[], text, bigint, boolean) is 'Of the pairs that have both rows, locked by nobody else: brings them to one level. as_planned: only those that still have the levels given, and all of these or an error. Returns the numbers, counted from 1, of the pairs that are locked and equal now.';

create or replace function level_sync._create_missing(pairs level_sync.pair[], source text, run_id bigint)
  returns bigint[] language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off set enable_nestloop = on
  set work_mem = '64MB'
as $$
declare
  outer_depth constant text := current_setting('level_sync.own_depth', true);
  carried_at  constant timestamptz := clock_timestamp();
  advanced_at constant public.user_licenses.last_advanced_at%type := level_sync._as_utc(carried_at);
  active_at   constant public.specialization_progress.last_activity%type := level_sync._as_utc(carried_at);
  propagates  constant boolean := (select settings.on_delete = 'propagate' from level_sync.settings);
  user_range  record;
  synced      bigint[];
begin
  select * into user_range from level_sync._prepare_set(pairs);
  with missing as materialized (
    select pair.ordinality as ordinal, pair.user_id, pair.specialization, pair.actor, pair.reason,
           lone.target, lone.level as new_level
      from unnest(pairs) with ordinality as pair
      left join level_sync.progress_side as progress
        on progress.user_id = pair.user_id and progress.specialization = pair.specialization
       and progress.user_id between user_range.first_user and user_range.last_user
      left join level_sync.license_side as license
        on license.user_id = pair.user_id and license.specialization = pair.specialization
       and license.user_id between user_range.first_user and user_range.last_user
      join public.specializations as known on known.id = pair.specialization
     cross join lateral (
       select case when license.user_id is null then 'license' else 'progress' end,
              case when license.user_id is null then progress.level else license.level end
     ) as lone (target, level)
     where (progress.user_id is null) <> (license.user_id is null)
       and level_sync._is_level_in_range(lone.level, known.max_levels)
       and case pair.change when 'deleted' then lone.target = pair.side and not propagates
                            else lone.target <> pair.side end
  ), licenses as (
    insert into public.user_licenses
           (user_id, specialization_type, current_level, max_achieved_level, started_at, last_advanced_at)
    select missing.user_id, missing.specialization, missing.new_level, missing.new_level, advanced_at, advanced_at
      from missing
     where (select level_sync._enter_trigger_context_of_set())
       and missing.target = 'license'
    on conflict do nothing
    returning user_licenses.user_id, user_licenses.specialization_type, 'license', user_licenses.current_level
  ), progress as (
    insert into public.specialization_progress
           (student_id, specialization_id, current_level, total_xp, completed_sessions, completed_projects, last_activity)
    select missing.user_id, missing.specialization, missing.new_level, 0, 0, 0, active_at
      from missing
     where (select level_sync._enter_trigger_context_of_set())
       and missing.target = 'progress'
    on conflict do nothing
    returning specialization_progress.student_id, specialization_progress.specialization_id, 'progress',
              specialization_progress.current_level
  ), created as (
    select missing.*, inserted.level_now
      from (select * from licenses union all select * from progress) as inserted (user_id, specialization, target, level_now)
      join missing
        on missing.user_id = inserted.user_id and missing.specialization = inserted.specialization
       and missing.target = inserted.target
  ), logged as (
    insert into level_sync.sync_events
           (occurred_at, user_id, specialization, direction, action, new_level, source, run_id, actor, reason)
    select carried_at, created.user_id, created.specialization,
           case created.target when 'license' then 'progress_to_license' else 'license_to_progress' end, 'created',
           created.level_now, source, run_id, created.actor, created.reason
      from created
  )
  select array(select created.ordinal from created where created.level_now = created.new_level) into synced;
  perform pg_catalog.set_config('level_sync.own_depth', outer_depth, true);
  return synced;
end
$$;
comment on function level_sync._create_missing(level_sync.pair[], text, bigint) is 'Of the pairs of which one row is missing: creates it at the level of the other. Returns the numbers, counted from 1, of those that it has made equal.';

create or replace function level_sync._propagate_deletes(pairs level_sync.pair[], source text, run_id bigint)
  returns void language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off set enable_nestloop = on
  set work_mem = '64MB'
as $$
declare
  outer_depth constant text := current_setting('level_sync.own_depth', true);
  carried_at  constant timestamptz := clock_timestamp();
begin
  perform level_sync._prepare_set(pairs);
  with deleted as materialized (
    select pair.* from unnest(pairs) as pair where pair.change = 'deleted'
  ), lone_licenses as (
    select deleted.*
      from deleted
      join level_sync.license_side as license
        on license.user_id = deleted.user_id and license.specialization = deleted.specialization
     where deleted.side = 'progress'
       and not exists (
         select from level_sync.progress_side as progress
          where progress.user_id = deleted.user_id and progress.specialization = deleted.specialization)
       for update of license skip locked
  ), lone_progress as (
    select deleted.*
      from deleted
      join level_sync.progress_side as progress
        on progress.user_id = deleted.user_id and progress.specialization = deleted.specialization
     where deleted.side = 'license'
       and not exists (
         select from level_sync.license_side as license
          where license.user_id = deleted.user_id and license.specialization = deleted.specialization)
       for update of progress skip locked
  ), licenses as (
    delete from public.user_licenses as license
     using lone_licenses as lone
     where (select level_sync._enter_trigger_context_of_set())
       and license.user_id = lone.user_id and license.specialization_type = lone.specialization
    returning lone.*, 'progress_to_license' as direction, license.current_level
  ), progress as (
    delete from public.specialization_progress as progress
     using lone_progress as lone
     where (select level_sync._enter_trigger_context_of_set())
       and progress.student_id = lone.user_id and progress.specialization_id = lone.specialization
    returning lone.*, 'license_to_progress' as direction, progress.current_level
  )
  insert into level_sync.sync_events
         (occurred_at, user_id, specialization, direction, action, old_level, source, run_id, actor, reason)
  select carried_at, propagated.user_id, propagated.specialization, propagated.direction, 'deleted', propagated.current_level,
         source, run_id, propagated.actor, propagated.reason
    from (select * from licenses union all select * from progress) as propagated;
  perform pg_catalog.set_config('level_sync.own_depth', outer_depth, true);
end
$$;
comment on function level_sync._propagate_deletes(level_sync.pair[], text, bigint) is 'Deletes the remaining row of each pair whose other row was deleted: settings.on_delete is propagate.';

-- As a foreign key does it: beside a row that was inserted, the one that was there must not be deleted before this
-- transaction has ended, because whoever deletes it cannot see the new one yet.
create or replace function level_sync._lock_other_rows(pairs level_sync.pair[])
  returns void language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
begin
  perform from unnest(pairs) as pair
    join level_sync.license_side as license
      on license.user_id = pair.user_id and license.specialization = pair.specialization
   where pair.side = 'progress' and pair.change = 'created'
     for key share of license nowait;
  perform from unnest(pairs) as pair
    join level_sync.progress_side as progress
      on progress.user_id = pair.user_id and progress.specialization = pair.specialization
   where pair.side = 'license' and pair.change = 'created'
     for key share of progress nowait;
end
$$;
comment on function level_sync._lock_other_rows(level_sync.pair[]) is 'Locks the row beside each one that was created; raises lock_not_available where somebody deletes it.';

create or replace function level_sync._carry_pairs(pairs level_sync.pair[], source text, run_id bigint default null)
  returns level_sync.pair[] language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform set_config('level_sync.outer_nestloop', current_setting('enable_nestloop'), true);
  pairs := level_sync._pairs_except(pairs, level_sync._carry_levels(pairs, source, run_id, false));
  if pairs <> '{}' then
    pairs := level_sync._pairs_except(pairs, level_sync._create_missing(pairs, source, run_id));
  end if;
  if pairs <> '{}' then
    if 'propagate' = (select settings.on_delete from level_sync.settings) then
      perform level_sync._propagate_deletes(pairs, source, run_id);
    end if;
    perform level_sync._lock_other_rows(pairs);
  end if;
  return pairs;
end
$$;
comment on function level_sync._carry_pairs(level_sync.pair[], text, bigint) is 'Brings pairs into step: the other side follows the side that was written; what was created never demotes. Returns the pairs of which it is not certain that they are equal now.';

-- The row that was written may be gone, by a way that triggers do not see: then the one that is left is the truth. And one
-- whose deletion is on its way may have come back. A missing row cannot be locked: should it come just now, the higher of
-- the two levels stands, as for any insert.
create or replace function level_sync._lock_pairs(pairs level_sync.pair[])
  returns level_sync.pair[] language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  user_range record;
begin
  select * into user_range from level_sync._user_range(pairs);
  return array(
    with locked_progress as materialized (
      select pair.ordinality as ordinal, progress.level
        from unnest(pairs) with ordinality as pair
        join level_sync.progress_side as progress
          on progress.user_id = pair.user_id and progress.specialization = pair.specialization
         and progress.user_id between user_range.first_user and user_range.last_user
         for no key update of progress skip locked
    ), locked_licenses as materialized (
      select pair.ordinality as ordinal, license.level
        from unnest(pairs) with ordinality as pair
        join level_sync.license_side as license
          on license.user_id = pair.user_id and license.specialization = pair.specialization
         and license.user_id between user_range.first_user and user_range.last_user
         for no key update of license skip locked
    )
    select level_sync._pair(pair.user_id, pair.specialization,
             case when pair.change <> 'deleted' and has.progress <> has.license
                  then case when has.progress then 'progress' else 'license' end
                  else pair.side end,
             case when pair.change = 'level_changed' and not (has.progress and has.license)
                    or pair.change = 'deleted' and case pair.side when 'progress' then has.progress else has.license end
                  then 'created' else pair.change end,
             pair.actor, pair.reason, locked_progress.level, locked_licenses.level, pair.queue_id, pair.attempts,
             pair.sqlstate, pair.message)
      from unnest(pairs) with ordinality as pair
      left join locked_progress on locked_progress.ordinal = pair.ordinality
      left join locked_licenses on locked_licenses.ordinal = pair.ordinality
     cross join lateral (select locked_progress.ordinal is not null, locked_licenses.ordinal is not null) as has (progress, license)
     where (has.progress
            or not exists (
              select from level_sync.progress_side as progress
               where progress.user_id = pair.user_id and progress.specialization = pair.specialization
                 and progress.user_id between user_range.first_user and user_range.last_user))
       and (has.license
            or not exists (
              select from level_sync.license_side as license
               where license.user_id = pair.user_id and license.specialization = pair.specialization
                 and license.user_id between user_range.first_user and user_range.last_user))
     order by pair.ordinality);
end
$$;
comment on function level_sync._lock_pairs(level_sync.pair[]) is 'Locks the rows of the pairs that nobody else has locked, without waiting. Returns those pairs, each with its levels as locked and with the side and the change that its rows ask for now.';
