-- What a run changed can be put back, pair by pair, where nobody has changed the pair since.

create or replace function level_sync._put_back(
    run_id bigint, user_ids bigint[], specializations text[], directions text[], actions text[], old_levels integer[],
    new_levels integer[])
  returns bigint
  language plpgsql
  set search_path = pg_catalog, pg_temp
  set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  undone_at   constant timestamptz := clock_timestamp();
  advanced_at constant public.user_licenses.last_advanced_at%type := level_sync._as_utc(undone_at);
  active_at   constant public.specialization_progress.last_activity%type := level_sync._as_utc(undone_at);
  undone      bigint;
begin
  with change as materialized (
    select * from unnest(user_ids, specializations, directions, actions, old_levels, new_levels)
                    as change (user_id, specialization, direction, action, old_level, new_level)
     where (select set_config('search_path', level_sync._trigger_path(), true)) is not null
  ), restored_licenses as (
    update public.user_licenses as license
       set current_level = change.old_level, last_advanced_at = advanced_at
      from change
     where change.direction = 'progress_to_license' and change.action = 'updated'
       and license.user_id = change.user_id and license.specialization_type = change.specialization
    returning change.*, license.current_level as level_now
  ), restored_progress as (
    update public.specialization_progress as progress
       set current_level = change.old_level, last_activity = active_at
      from change
     where change.direction = 'license_to_progress' and change.action = 'updated'
       and progress.student_id = change.user_id and progress.specialization_id = change.specialization
    returning change.*, progress.current_level as level_now
  ), removed_licenses as (
    delete from public.user_licenses as license
     using change
     where change.direction = 'progress_to_license' and change.action = 'created'
       and license.user_id = change.user_id and license.specialization_type = change.specialization
    returning change.*, null::integer as level_now
  ), removed_progress as (
    delete from public.specialization_progress as progress
     using change
     where change.direction = 'license_to_progress' and change.action = 'created'
       and progress.student_id = change.user_id and progress.specialization_id = change.specialization
    returning change.*, null::integer as level_now
  )
  insert into level_sync.sync_events
         (occurred_at, user_id, specialization, direction, action, old_level, new_level, source, run_id)
  select undone_at, reversed.user_id, reversed.specialization, reversed.direction,
         case reversed.action when 'created' then 'deleted' else 'updated' end,
         reversed.new_level, reversed.level_now, 'undo', _put_back.run_id
    from (
      select * from restored_licenses
       union all select * from restored_progress
       union all select * from removed_licenses
       union all select * from removed_progress
    ) as reversed
   where reversed.new_level is distinct from reversed.level_now;
  get diagnostics undone = row_count;
  perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  return undone;
end
$$;

comment on function level_sync._put_back(bigint, bigint[], text[], text[], text[], integer[], integer[]) is
  'Reverses changes of a run on pairs that are locked, and returns how many.';

create or replace function level_sync.undo(run_id bigint)
  returns jsonb
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
  set lock_timeout = '2s'
  set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  outer_depth text := current_setting('level_sync.own_depth', true);
  changes     record;
  refusal     text;
  undone      bigint;
  total       bigint;
begin
  if not exists (select from level_sync.sync_log where sync_log.run_id = undo.run_id) then
    raise no_data_found using
      message = format('there is no run %s in level_sync.sync_log', coalesce(run_id::text, 'NULL')),
      hint    = 'A run past settings.log_retention is gone with its log.';
  end if;

  -- A pair is as the run left it when it has no later event, both sides still have the run's level, and a progress
  -- row the run created has earned nothing.
  with changed as materialized (
    select event.event_id, event.user_id, event.specialization, event.direction, event.action, event.old_level, event.new_level,
           not exists (
             select from level_sync.sync_events as later
              where later.user_id = event.user_id
                and later.specialization = event.specialization
                and later.event_id > event.event_id) as is_last
      from level_sync.sync_events as event
     where event.run_id = undo.run_id
       and event.source = 'reconcile'
  ), free as (
    select changed.*
      from changed
      join public.specialization_progress as progress
        on progress.student_id = changed.user_id and progress.specialization_id = changed.specialization
      join public.user_licenses as license
        on license.user_id = changed.user_id and license.specialization_type = changed.specialization
     where changed.is_last
       and progress.current_level = changed.new_level
       and license.current_level = changed.new_level
       and not (changed.action = 'created' and changed.direction = 'license_to_progress'
                and (progress.total_xp > 0 or progress.completed_sessions > 0 or progress.completed_projects > 0))
       for update of progress, license skip locked
  )
  select array_agg(free.user_id) as user_ids, array_agg(free.specialization) as specializations,
         array_agg(free.direction) as directions, array_agg(free.action) as actions,
         array_agg(free.old_level) as old_levels, array_agg(free.new_level) as new_levels
    into changes
    from free;
  select count(*) into total
    from level_sync.sync_events as event
   where event.run_id = undo.run_id and event.source = 'reconcile';

  perform set_config('level_sync.own_depth', pg_trigger_depth()::text, true);
  begin
    undone := level_sync._put_back(run_id, changes.user_ids, changes.specializations, changes.directions, changes.actions,
                                   changes.old_levels, changes.new_levels);
  exception when others or assert_failure then
    if sqlstate = '40001' then
      raise;
    end if;
    -- One by one, so that a row another table refers to, say, is the only one left alone.
    undone := 0;
    for pair in 1 .. coalesce(cardinality(changes.user_ids), 0) loop
      begin
        undone := undone + level_sync._put_back(run_id, changes.user_ids[pair:pair], changes.specializations[pair:pair],
                                                changes.directions[pair:pair], changes.actions[pair:pair],
                                                changes.old_levels[pair:pair], changes.new_levels[pair:pair]);
      exception when others or assert_failure then
        if sqlstate = '40001' then
          raise;
        end if;
        refusal := coalesce(refusal, format('user %s in %s: %s', changes.user_ids[pair], changes.specializations[pair], sqlerrm));
      end;
    end loop;
  end;
  perform set_config('level_sync.own_depth', outer_depth, true);

  return jsonb_build_object(
    'run_id', run_id, 'undone', undone, 'left_alone', total - undone,
    'message', format('%s of %s changes of run %s put back', undone, total, run_id)
                 || case when undone < total then '; the others were changed since, are held, or were put back before' else '' end
                 || coalesce('; refused: ' || refusal, ''));
end
$$;

comment on function level_sync.undo(bigint) is
  'Puts back what a run changed, where the pair has not changed since; max_achieved_level stays. Returns jsonb: run_id, undone, left_alone, message. A second call does nothing. Raises no_data_found for an unknown run.';
