-- What a run changed can be put back, pair by pair, where nobody has changed the pair since.

create or replace function level_sync._put_back(changes level_sync.sync_events[])
  returns bigint language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  undone_at   constant timestamptz := clock_timestamp();
  advanced_at constant public.user_licenses.last_advanced_at%type := level_sync._as_utc(undone_at);
  active_at   constant public.specialization_progress.last_activity%type := level_sync._as_utc(undone_at);
  undone      bigint;
begin
  with change as materialized (
    select change.* from unnest(changes) as change
     where (select level_sync._enter_trigger_context())
  ), restored_licenses as (
    update public.user_licenses as license
       set current_level = change.old_level, last_advanced_at = advanced_at
      from change
     where change.direction = 'progress_to_license' and change.action = 'updated'
       and license.user_id = change.user_id and license.specialization_type = change.specialization
    returning change.*, license.current_level::bigint as level_now
  ), restored_progress as (
    update public.specialization_progress as progress
       set current_level = change.old_level, last_activity = active_at
      from change
     where change.direction = 'license_to_progress' and change.action = 'updated'
       and progress.student_id = change.user_id and progress.specialization_id = change.specialization
    returning change.*, progress.current_level::bigint as level_now
  ), removed_licenses as (
    delete from public.user_licenses as license
     using change
     where change.direction = 'progress_to_license' and change.action = 'created'
       and license.user_id = change.user_id and license.specialization_type = change.specialization
    returning change.*, null::bigint as level_now
  ), removed_progress as (
    delete from public.specialization_progress as progress
     using change
     where change.direction = 'license_to_progress' and change.action = 'created'
       and progress.student_id = change.user_id and progress.specialization_id = change.specialization
    returning change.*, null::bigint as level_now
  )
  insert into level_sync.sync_events
         (occurred_at, user_id, specialization, direction, action, old_level, new_level, source, run_id)
  select undone_at, reversed.user_id, reversed.specialization, reversed.direction,
         case reversed.action when 'created' then 'deleted' else 'updated' end,
         reversed.new_level, reversed.level_now, 'undo', reversed.run_id
    from (
      select * from restored_licenses
       union all select * from restored_progress
       union all select * from removed_licenses
       union all select * from removed_progress
    ) as reversed
   where reversed.new_level is distinct from reversed.level_now;
  get diagnostics undone = row_count;
  return undone;
end
$$;
comment on function level_sync._put_back(level_sync.sync_events[]) is 'Reverses changes of a run on pairs that are locked, and returns how many.';

create or replace function level_sync._try_to_put_back(
    changes level_sync.sync_events[], out undone bigint, out error_message text)
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  undone := level_sync._put_back(changes);
exception
  when serialization_failure then
    raise;
  when others or assert_failure then
    undone        := 0;
    error_message := sqlerrm;
end
$$;
comment on function level_sync._try_to_put_back(level_sync.sync_events[]) is 'Reverses changes in one subtransaction: all of them, or none and the error.';

-- A pair is as the run left it when it has no later event, both sides still have the run's level, and a progress row
-- that the run created has earned nothing. Not LANGUAGE SQL: PostgreSQL takes the locks of such a body while it creates
-- the function, and migrate would wait for writers.
create or replace function level_sync._lock_reversible_changes(run_id bigint)
  returns level_sync.sync_events[] language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    with changed as materialized (
      select event as change,
             not exists (
               select from level_sync.sync_events as later
                where later.user_id = event.user_id
                  and later.specialization = event.specialization
                  and later.event_id > event.event_id) as is_last
        from level_sync.sync_events as event
       where event.run_id = _lock_reversible_changes.run_id
         and event.source = 'reconcile'
    ), locked as (
      select changed.change
        from changed
        join public.specialization_progress as progress
          on progress.student_id = (changed.change).user_id and progress.specialization_id = (changed.change).specialization
        join public.user_licenses as license
          on license.user_id = (changed.change).user_id and license.specialization_type = (changed.change).specialization
       where changed.is_last
         and progress.current_level = (changed.change).new_level
         and license.current_level = (changed.change).new_level
         and not ((changed.change).action = 'created' and (changed.change).direction = 'license_to_progress'
                  and (progress.total_xp > 0 or progress.completed_sessions > 0 or progress.completed_projects > 0))
         for update of progress, license skip locked
    )
    select array(select locked.change from locked));
end
$$;
comment on function level_sync._lock_reversible_changes(bigint) is 'The changes of a run that nobody has touched since, with both rows of their pairs locked.';

create or replace function level_sync.undo(run_id bigint)
  returns jsonb language plpgsql security definer
  set search_path = pg_catalog, pg_temp set lock_timeout = '2s' set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  outer_depth text := current_setting('level_sync.own_depth', true);
  changes     level_sync.sync_events[];
  change      level_sync.sync_events;
  attempt     record;
  refusal     text;
  undone      bigint;
  total       bigint;
begin
  if not exists (select from level_sync.sync_log where sync_log.run_id = undo.run_id) then
    raise no_data_found using
      message = format('there is no run %s in level_sync.sync_log', coalesce(run_id::text, 'NULL')),
      hint    = 'A run past settings.log_retention is gone with its log.';
  end if;
  select count(*) into total
    from level_sync.sync_events as event
   where event.run_id = undo.run_id and event.source = 'reconcile';
  changes := level_sync._lock_reversible_changes(run_id);

  perform set_config('level_sync.own_depth', pg_trigger_depth()::text, true);
  attempt := level_sync._try_to_put_back(changes);
  undone  := attempt.undone;
  if attempt.error_message is not null then
    -- One by one, so that a row another table refers to, say, is the only one that stays.
    foreach change in array changes loop
      attempt := level_sync._try_to_put_back(array[change]);
      undone  := undone + attempt.undone;
      refusal := coalesce(refusal, format('user %s in %s: ', change.user_id, change.specialization) || attempt.error_message);
    end loop;
  end if;
  perform set_config('level_sync.own_depth', outer_depth, true);

  return jsonb_build_object(
    'run_id', run_id, 'undone', undone, 'skipped', total - undone,
    'message', format('%s of %s changes of run %s put back', undone, total, run_id)
                 || case when undone < total then '; the others were changed since, are locked, or were put back before' else '' end
                 || coalesce('; refused: ' || refusal, ''));
end
$$;
comment on function level_sync.undo(bigint) is 'Puts back what a run changed, where the pair has not changed since; max_achieved_level stays. Returns jsonb: run_id, undone, skipped, message. A second call does nothing. Raises no_data_found for an unknown run.';
