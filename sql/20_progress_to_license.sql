-- What is written to specialization_progress is carried to user_licenses, in the same transaction.
-- 30_license_to_progress.sql is rendered from this file by `make mirror`: the sides change places, and a line that ends in a
-- mirror comment becomes what that comment says.

create or replace function level_sync.carry_progress()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  change             constant text := case tg_op when 'INSERT' then 'created' else 'level_changed' end;
  pending            constant text := current_setting('level_sync.pending', true);
  outer_depth        text;
  outer_lock_timeout text;
  carried_at         timestamptz;
  written_at         public.user_licenses.last_advanced_at%type;  -- mirror: written_at         public.specialization_progress.last_activity%type;
  limits             text;
  is_refused         boolean := false;
  is_busy            boolean;
  subtransactions    text;
  discarded          text;
  config             record;
  on_error           text := 'queue';
  old_level          bigint;
  new_level          bigint;
begin
  if tg_op = 'UPDATE' and (old.student_id = new.student_id and old.specialization_id = new.specialization_id) is not true then
    perform level_sync._defer_move(level_sync._pair(old.student_id, old.specialization_id, 'progress', 'deleted'),
                                   level_sync._pair(new.student_id, new.specialization_id, 'progress', 'created'));
    return null;
  end if;

  -- Bulk: the transaction carries a set when it commits, and this pair joins it. Where a transaction has no
  -- subtransaction left to arm that set, the pair is orphaned for the drain.
  if pending in ('on', 'abandoned') or length(current_setting('level_sync.subtransactions', true)) > level_sync._write_budget() then
    limits := current_setting('level_sync.limits', true);
    if (new.current_level between 1 and substr(limits, nullif(strpos(limits, e'\x01' || new.specialization_id || e'\x02'), 0)
                                                       + length(new.specialization_id) + 2, 10)::integer) is true
       or level_sync._is_level_allowed(new.specialization_id, new.current_level)
    then
      if pending is distinct from 'abandoned' then
        insert into level_sync.pending_pairs (user_id, specialization, side, change)
        values (new.student_id, new.specialization_id, 'progress', change);
      end if;
      return null;
    end if;
  end if;

  -- An assignment of an expression is evaluated at once; PERFORM would run a query. Two in one cost less than two.
  subtransactions := set_config('level_sync.subtransactions', coalesce(current_setting('level_sync.subtransactions', true), '') || '.', true);
  begin
    -- From here on nothing waits longer, not even for the whole table.
    outer_lock_timeout := current_setting('lock_timeout');
    discarded := set_config('lock_timeout', '100', true);

    select settings.on_error,
           settings.lock_wait = interval '0' as never_waits,
           length(subtransactions) > settings.inline_limit as is_bulk,
           level_sync._lock_timeout(settings.lock_wait, 'progress') as lock_timeout,
           settings.trigger_search_path || ', pg_temp' as trigger_path,
           specialization.max_levels
      into config
      from level_sync.settings
      left join public.specializations as specialization on specialization.id = new.specialization_id;
    on_error := coalesce(config.on_error, 'queue');

    if new.current_level is null or new.current_level < 1 or new.current_level > config.max_levels then
      is_refused := true;
      perform level_sync._raise_level_violation('progress', new.student_id, new.specialization_id, new.current_level, config.max_levels);
    end if;

    if config.is_bulk then
      perform level_sync._defer_pair(level_sync._pair(new.student_id, new.specialization_id, 'progress', change));
      discarded := set_config('lock_timeout', outer_lock_timeout, true);
      return null;
    end if;

    outer_depth := current_setting('level_sync.own_depth', true);
    discarded := set_config('level_sync.own_depth', pg_trigger_depth()::text, true)
              || set_config('lock_timeout', config.lock_timeout, true);

    if tg_op = 'UPDATE' then
      select license.level
        into old_level
        from level_sync.license_side as license
       where license.user_id = new.student_id
         and license.specialization = new.specialization_id
         for no key update skip locked;
      is_busy := not found;
      if is_busy then
        perform from level_sync.license_side as license
          where license.user_id = new.student_id
            and license.specialization = new.specialization_id;
        if not found then
          -- A missing row is checked at commit: whoever moves both rows may be half way.
          discarded := set_config('level_sync.own_depth', outer_depth, true) || set_config('lock_timeout', outer_lock_timeout, true);
          perform level_sync._defer_pair(level_sync._pair(new.student_id, new.specialization_id, 'progress', change));
          return null;
        end if;
      end if;
    end if;
    carried_at := clock_timestamp();
    written_at := level_sync._as_utc(carried_at);

    -- Levels are read from the live rows, never from NEW: another trigger may have written the row once more. The
    -- search_path is set within the statement, when ours is resolved and before the application's own triggers run.
    if tg_op = 'INSERT' then
      with created as (
        insert into public.user_licenses
               (user_id, specialization_type, current_level, max_achieved_level, started_at, last_advanced_at)  -- mirror: (student_id, specialization_id, current_level, total_xp, completed_sessions, completed_projects, last_activity)
        select progress.user_id, progress.specialization, progress.level, progress.level, written_at, written_at  -- mirror: select license.user_id, license.specialization, license.level, 0, 0, 0, written_at
          from level_sync.progress_side as progress
         where (select set_config('search_path', config.trigger_path, true)) is not null
           and progress.user_id = new.student_id
           and progress.specialization = new.specialization_id
        on conflict do nothing
        returning user_licenses.current_level
      )
      insert into level_sync.sync_events as event
             (occurred_at, user_id, specialization, direction, action, new_level, source)
      select carried_at, new.student_id, new.specialization_id, 'progress_to_license', 'created',
             created.current_level, 'trigger'
        from created
      returning event.new_level into new_level;
      discarded := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

      if new_level is null then
        perform level_sync._carry_pairs(array[level_sync._pair(new.student_id, new.specialization_id, 'progress', change)], 'trigger');
      end if;
    else
      if is_busy and config.never_waits then
        raise lock_not_available using message = 'the license is locked by another transaction';
      elsif is_busy then
        select license.level
          into old_level
          from level_sync.license_side as license
         where license.user_id = new.student_id
           and license.specialization = new.specialization_id
           for no key update;
      end if;

      with carried as (
        update public.user_licenses as license
           set current_level = progress.level,
               max_achieved_level = greatest(license.max_achieved_level, progress.level),  -- mirror: last_activity = written_at
               last_advanced_at = written_at  -- mirror:
          from level_sync.progress_side as progress
         where (select set_config('search_path', config.trigger_path, true)) is not null
           and license.user_id = new.student_id  -- mirror: and progress.student_id = new.user_id
           and license.specialization_type = new.specialization_id  -- mirror: and progress.specialization_id = new.specialization_type
           and progress.user_id = new.student_id
           and progress.specialization = new.specialization_id
           and license.current_level is distinct from progress.level
        returning license.current_level
      )
      insert into level_sync.sync_events as event
             (occurred_at, user_id, specialization, direction, action, old_level, new_level, source)
      select carried_at, new.student_id, new.specialization_id, 'progress_to_license', 'updated',
             old_level, carried.current_level, 'trigger'
        from carried
       where carried.current_level is distinct from old_level
      returning event.new_level into new_level;
      discarded := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    end if;

    -- Somebody else's trigger may have written another level, or none.
    if new_level is distinct from new.current_level then
      perform level_sync._raise_unless_synced(level_sync._pair(new.student_id, new.specialization_id, 'progress', change));
    end if;

    discarded := set_config('level_sync.own_depth', outer_depth, true) || set_config('lock_timeout', outer_lock_timeout, true);
  exception when others or assert_failure then
    if is_refused or on_error = 'raise' or sqlstate = '40001' then
      raise;
    end if;
    if sqlstate in ('55P03', '40P01') then
      perform level_sync._defer_pair(level_sync._pair(new.student_id, new.specialization_id, 'progress', change));
    else
      perform level_sync._enqueue(array[level_sync._pair(new.student_id, new.specialization_id, 'progress', change,
                                                         sqlstate => sqlstate, message => sqlerrm)]);
    end if;
  end;
  return null;
end
$$;
comment on function level_sync.carry_progress() is 'Carries a written progress level to the license. Refuses a level outside 1..max_levels; any other failure queues the pair and lets the write stand, unless settings.on_error is raise.';

select level_sync._ensure_trigger('public.specialization_progress', 'progress_created', $trigger$
  create trigger progress_created
    after insert on public.specialization_progress
    for each row
    when (current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.carry_progress()
$trigger$, 'A new progress row gets a license at its level, or both get the higher of the two levels.');

select level_sync._ensure_trigger('public.specialization_progress', 'progress_level_changed', $trigger$
  create trigger progress_level_changed
    after update on public.specialization_progress
    for each row
    when ((new.current_level is distinct from old.current_level
           or new.student_id is distinct from old.student_id
           or new.specialization_id is distinct from old.specialization_id)
          and current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.carry_progress()
$trigger$, 'The license gets the level that was written here.');

-- At commit: progress may only go together with its license.
create or replace function level_sync._check_lone_license(user_id bigint, specialization text)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  license_level bigint;
begin
  select license.level
    into license_level
    from level_sync.license_side as license
   where license.user_id = _check_lone_license.user_id
     and license.specialization = _check_lone_license.specialization
     and not exists (
       select from level_sync.progress_side as progress
        where progress.user_id = _check_lone_license.user_id
          and progress.specialization = _check_lone_license.specialization);
  if not found then
    return;
  end if;

  if coalesce((select settings.on_delete from level_sync.settings), 'restrict') = 'restrict' then
    raise restrict_violation using
      message = format('the progress of user %s in %s cannot go alone: their license (level %s) is still there',
                       user_id, specialization, license_level),
      hint    = 'Delete or move both rows in one transaction, or set level_sync.settings.on_delete to propagate or recreate.';
  end if;
  perform level_sync._defer_pair(level_sync._pair(user_id, specialization, 'progress', 'deleted'));
end
$$;
comment on function level_sync._check_lone_license(bigint, text) is 'Raises restrict_violation where a license is there without progress, or leaves the pair to settings.on_delete.';

create or replace function level_sync.check_deleted_progress()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform level_sync._check_lone_license(old.student_id, old.specialization_id);
  return null;
end
$$;
comment on function level_sync.check_deleted_progress() is 'Refuses at commit a deleted progress whose license is still there, or does what settings.on_delete says.';

create or replace function level_sync.note_deleted_progress()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  insert into level_sync.pending_pairs (user_id, specialization, side, change)
  select old.student_id, old.specialization_id, 'progress', 'departed'
   where old.student_id is not null and old.specialization_id is not null;
  return null;
end
$$;
comment on function level_sync.note_deleted_progress() is 'Keeps the set that this transaction carries at its commit from taking a deleted progress for a missing one.';

-- At commit: the pair that a progress row has moved to is carried as an insert is.
create or replace function level_sync._check_moved_progress(user_id bigint, specialization text)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  moved record;
begin
  select progress.level, known.max_levels
    into moved
    from level_sync.progress_side as progress
    left join public.specializations as known on known.id = progress.specialization
   where progress.user_id = _check_moved_progress.user_id
     and progress.specialization = _check_moved_progress.specialization;
  if not found then
    return;
  end if;
  if not level_sync._is_level_in_range(moved.level, moved.max_levels) then
    perform level_sync._raise_level_violation('progress', user_id, specialization, moved.level, moved.max_levels);
  end if;
  perform level_sync._defer_pair(level_sync._pair(user_id, specialization, 'progress', 'created'));
end
$$;
comment on function level_sync._check_moved_progress(bigint, text) is 'Refuses a level that the new specialization does not have, or carries it without demoting the row that is there.';

select level_sync._ensure_trigger('public.specialization_progress', 'progress_deleted_before_a_set', $trigger$
  create trigger progress_deleted_before_a_set
    after delete on public.specialization_progress
    for each row
    when (current_setting('level_sync.pending', true) = 'on')
    execute function level_sync.note_deleted_progress()
$trigger$, 'The set of this transaction leaves the pair to the check of deletions at commit.');

select level_sync._ensure_trigger('public.specialization_progress', 'progress_deleted', $trigger$
  create constraint trigger progress_deleted
    after delete on public.specialization_progress
    deferrable initially deferred for each row
    when (current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.check_deleted_progress()
$trigger$, 'At commit: progress goes only together with its license, or as settings.on_delete says.');

create or replace function level_sync.check_truncated_progress()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from level_sync.license_side as license
     where not exists (
       select from level_sync.progress_side as progress
        where progress.user_id = license.user_id
          and progress.specialization = license.specialization))
  then
    raise restrict_violation using
      message = 'specialization_progress cannot be truncated alone: user_licenses still has rows',
      hint    = 'Truncate both tables in one statement.';
  end if;
  return null;
end
$$;
comment on function level_sync.check_truncated_progress() is 'Raises restrict_violation where a TRUNCATE leaves licenses without progress.';

select level_sync._ensure_trigger(part.relation, 'progress_truncated', format($trigger$
  create trigger progress_truncated
    after truncate on %s
    for each statement execute function level_sync.check_truncated_progress()
$trigger$, part.qualified_name), 'TRUNCATE is refused unless no license is left without progress.')
  from level_sync._table_and_partitions('public.specialization_progress') as part;
