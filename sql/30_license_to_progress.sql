-- What is written to user_licenses is carried to specialization_progress, in the same transaction.
-- Rendered from 20_progress_to_license.sql by `make mirror`: change that file.

create or replace function level_sync.carry_license()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  change             constant text := case tg_op when 'INSERT' then 'created' else 'level_changed' end;
  pending            constant text := current_setting('level_sync.pending', true);
  outer_depth        text;
  outer_lock_timeout text;
  carried_at         timestamptz;
  written_at         public.specialization_progress.last_activity%type;
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
  if tg_op = 'UPDATE' and (old.user_id = new.user_id and old.specialization_type = new.specialization_type) is not true then
    perform level_sync._defer_move(level_sync._pair(old.user_id, old.specialization_type, 'license', 'deleted'),
                                   level_sync._pair(new.user_id, new.specialization_type, 'license', 'created'));
    return null;
  end if;

  -- Bulk: the transaction carries a set when it commits, and this pair joins it. Where a transaction has no
  -- subtransaction left to arm that set, the pair is orphaned for the drain.
  if pending in ('on', 'abandoned') or length(current_setting('level_sync.subtransactions', true)) > level_sync._write_budget() then
    limits := current_setting('level_sync.limits', true);
    if (new.current_level between 1 and substr(limits, nullif(strpos(limits, e'\x01' || new.specialization_type || e'\x02'), 0)
                                                       + length(new.specialization_type) + 2, 10)::integer) is true
       or level_sync._is_level_allowed(new.specialization_type, new.current_level)
    then
      if pending is distinct from 'abandoned' then
        insert into level_sync.pending_pairs (user_id, specialization, side, change)
        values (new.user_id, new.specialization_type, 'license', change);
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
           level_sync._lock_timeout(settings.lock_wait, 'license') as lock_timeout,
           settings.trigger_search_path || ', pg_temp' as trigger_path,
           specialization.max_levels
      into config
      from level_sync.settings
      left join public.specializations as specialization on specialization.id = new.specialization_type;
    on_error := coalesce(config.on_error, 'queue');

    if new.current_level is null or new.current_level < 1 or new.current_level > config.max_levels then
      is_refused := true;
      perform level_sync._raise_level_violation('license', new.user_id, new.specialization_type, new.current_level, config.max_levels);
    end if;

    if config.is_bulk then
      perform level_sync._defer_pair(level_sync._pair(new.user_id, new.specialization_type, 'license', change));
      discarded := set_config('lock_timeout', outer_lock_timeout, true);
      return null;
    end if;

    outer_depth := current_setting('level_sync.own_depth', true);
    discarded := set_config('level_sync.own_depth', pg_trigger_depth()::text, true)
              || set_config('lock_timeout', config.lock_timeout, true);

    if tg_op = 'UPDATE' then
      select progress.level
        into old_level
        from level_sync.progress_side as progress
       where progress.user_id = new.user_id
         and progress.specialization = new.specialization_type
         for no key update skip locked;
      is_busy := not found;
      if is_busy then
        perform from level_sync.progress_side as progress
          where progress.user_id = new.user_id
            and progress.specialization = new.specialization_type;
        if not found then
          -- A missing row is checked at commit: whoever moves both rows may be half way.
          discarded := set_config('level_sync.own_depth', outer_depth, true) || set_config('lock_timeout', outer_lock_timeout, true);
          perform level_sync._defer_pair(level_sync._pair(new.user_id, new.specialization_type, 'license', change));
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
        insert into public.specialization_progress
               (student_id, specialization_id, current_level, total_xp, completed_sessions, completed_projects, last_activity)
        select license.user_id, license.specialization, license.level, 0, 0, 0, written_at
          from level_sync.license_side as license
         where (select set_config('search_path', config.trigger_path, true)) is not null
           and license.user_id = new.user_id
           and license.specialization = new.specialization_type
        on conflict do nothing
        returning specialization_progress.current_level
      )
      insert into level_sync.sync_events as event
             (occurred_at, user_id, specialization, direction, action, new_level, source)
      select carried_at, new.user_id, new.specialization_type, 'license_to_progress', 'created',
             created.current_level, 'trigger'
        from created
      returning event.new_level into new_level;
      discarded := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

      if new_level is null then
        perform level_sync._carry_pairs(array[level_sync._pair(new.user_id, new.specialization_type, 'license', change)], 'trigger');
      end if;
    else
      if is_busy and config.never_waits then
        raise lock_not_available using message = 'the progress is locked by another transaction';
      elsif is_busy then
        select progress.level
          into old_level
          from level_sync.progress_side as progress
         where progress.user_id = new.user_id
           and progress.specialization = new.specialization_type
           for no key update;
      end if;

      with carried as (
        update public.specialization_progress as progress
           set current_level = license.level,
               last_activity = written_at
          from level_sync.license_side as license
         where (select set_config('search_path', config.trigger_path, true)) is not null
           and progress.student_id = new.user_id
           and progress.specialization_id = new.specialization_type
           and license.user_id = new.user_id
           and license.specialization = new.specialization_type
           and progress.current_level is distinct from license.level
        returning progress.current_level
      )
      insert into level_sync.sync_events as event
             (occurred_at, user_id, specialization, direction, action, old_level, new_level, source)
      select carried_at, new.user_id, new.specialization_type, 'license_to_progress', 'updated',
             old_level, carried.current_level, 'trigger'
        from carried
       where carried.current_level is distinct from old_level
      returning event.new_level into new_level;
      discarded := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    end if;

    -- Somebody else's trigger may have written another level, or none.
    if new_level is distinct from new.current_level then
      perform level_sync._raise_unless_synced(level_sync._pair(new.user_id, new.specialization_type, 'license', change));
    end if;

    discarded := set_config('level_sync.own_depth', outer_depth, true) || set_config('lock_timeout', outer_lock_timeout, true);
  exception when others or assert_failure then
    if is_refused or on_error = 'raise' or sqlstate = '40001' then
      raise;
    end if;
    if sqlstate in ('55P03', '40P01') then
      perform level_sync._defer_pair(level_sync._pair(new.user_id, new.specialization_type, 'license', change));
    else
      perform level_sync._enqueue(array[level_sync._pair(new.user_id, new.specialization_type, 'license', change,
                                                         sqlstate => sqlstate, message => sqlerrm)]);
    end if;
  end;
  return null;
end
$$;
comment on function level_sync.carry_license() is 'Carries a written license level to the progress. Refuses a level outside 1..max_levels; any other failure queues the pair and lets the write stand, unless settings.on_error is raise.';

select level_sync._ensure_trigger('public.user_licenses', 'license_created', $trigger$
  create trigger license_created
    after insert on public.user_licenses
    for each row
    when (current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.carry_license()
$trigger$, 'A new license row gets a progress at its level, or both get the higher of the two levels.');

select level_sync._ensure_trigger('public.user_licenses', 'license_level_changed', $trigger$
  create trigger license_level_changed
    after update on public.user_licenses
    for each row
    when ((new.current_level is distinct from old.current_level
           or new.user_id is distinct from old.user_id
           or new.specialization_type is distinct from old.specialization_type)
          and current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.carry_license()
$trigger$, 'The progress gets the level that was written here.');

-- At commit: license may only go together with its progress.
create or replace function level_sync._check_lone_progress(user_id bigint, specialization text)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  progress_level bigint;
begin
  select progress.level
    into progress_level
    from level_sync.progress_side as progress
   where progress.user_id = _check_lone_progress.user_id
     and progress.specialization = _check_lone_progress.specialization
     and not exists (
       select from level_sync.license_side as license
        where license.user_id = _check_lone_progress.user_id
          and license.specialization = _check_lone_progress.specialization);
  if not found then
    return;
  end if;

  if coalesce((select settings.on_delete from level_sync.settings), 'restrict') = 'restrict' then
    raise restrict_violation using
      message = format('the license of user %s in %s cannot go alone: their progress (level %s) is still there',
                       user_id, specialization, progress_level),
      hint    = 'Delete or move both rows in one transaction, or set level_sync.settings.on_delete to propagate or recreate.';
  end if;
  perform level_sync._defer_pair(level_sync._pair(user_id, specialization, 'license', 'deleted'));
end
$$;
comment on function level_sync._check_lone_progress(bigint, text) is 'Raises restrict_violation where a progress is there without license, or leaves the pair to settings.on_delete.';

create or replace function level_sync.check_deleted_license()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform level_sync._check_lone_progress(old.user_id, old.specialization_type);
  return null;
end
$$;
comment on function level_sync.check_deleted_license() is 'Refuses at commit a deleted license whose progress is still there, or does what settings.on_delete says.';

create or replace function level_sync.note_deleted_license()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  insert into level_sync.pending_pairs (user_id, specialization, side, change)
  select old.user_id, old.specialization_type, 'license', 'departed'
   where old.user_id is not null and old.specialization_type is not null;
  return null;
end
$$;
comment on function level_sync.note_deleted_license() is 'Keeps the set that this transaction carries at its commit from taking a deleted license for a missing one.';

-- At commit: the pair that a license row has moved to is carried as an insert is.
create or replace function level_sync._check_moved_license(user_id bigint, specialization text)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  moved record;
begin
  select license.level, known.max_levels
    into moved
    from level_sync.license_side as license
    left join public.specializations as known on known.id = license.specialization
   where license.user_id = _check_moved_license.user_id
     and license.specialization = _check_moved_license.specialization;
  if not found then
    return;
  end if;
  if not level_sync._is_level_in_range(moved.level, moved.max_levels) then
    perform level_sync._raise_level_violation('license', user_id, specialization, moved.level, moved.max_levels);
  end if;
  perform level_sync._defer_pair(level_sync._pair(user_id, specialization, 'license', 'created'));
end
$$;
comment on function level_sync._check_moved_license(bigint, text) is 'Refuses a level that the new specialization does not have, or carries it without demoting the row that is there.';

select level_sync._ensure_trigger('public.user_licenses', 'license_deleted_before_a_set', $trigger$
  create trigger license_deleted_before_a_set
    after delete on public.user_licenses
    for each row
    when (current_setting('level_sync.pending', true) = 'on')
    execute function level_sync.note_deleted_license()
$trigger$, 'The set of this transaction leaves the pair to the check of deletions at commit.');

select level_sync._ensure_trigger('public.user_licenses', 'license_deleted', $trigger$
  create constraint trigger license_deleted
    after delete on public.user_licenses
    deferrable initially deferred for each row
    when (current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.check_deleted_license()
$trigger$, 'At commit: license goes only together with its progress, or as settings.on_delete says.');

create or replace function level_sync.check_truncated_license()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from level_sync.progress_side as progress
     where not exists (
       select from level_sync.license_side as license
        where license.user_id = progress.user_id
          and license.specialization = progress.specialization))
  then
    raise restrict_violation using
      message = 'user_licenses cannot be truncated alone: specialization_progress still has rows',
      hint    = 'Truncate both tables in one statement.';
  end if;
  return null;
end
$$;
comment on function level_sync.check_truncated_license() is 'Raises restrict_violation where a TRUNCATE leaves progress without license.';

select level_sync._ensure_trigger(part.relation, 'license_truncated', format($trigger$
  create trigger license_truncated
    after truncate on %s
    for each statement execute function level_sync.check_truncated_license()
$trigger$, part.qualified_name), 'TRUNCATE is refused unless no progress is left without license.')
  from level_sync._table_and_partitions('public.user_licenses') as part;
