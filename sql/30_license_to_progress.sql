-- What is written to user_licenses arrives in specialization_progress, in the same transaction.
-- The mirror image of 20_progress_to_license.sql: a diff of the two shows names only.

create or replace function level_sync.carry_license()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
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
  is_held            boolean;
  subtransactions    text;
  never_read         text;
  rule               record;
  on_error           text := 'queue';
  old_level          integer;
  new_level          integer;
begin
  if tg_op = 'UPDATE' and (old.user_id = new.user_id and old.specialization_type = new.specialization_type) is not true then
    perform level_sync._defer_move('license', old.user_id, old.specialization_type, new.user_id, new.specialization_type);
    return null;
  end if;

  -- Bulk: the transaction carries a set when it commits, and this pair joins it. Where a transaction has no
  -- subtransaction left to arm that set, the pair stays behind for the drain.
  if pending in ('on', 'lost') or length(current_setting('level_sync.subtransactions', true)) > 56 then
    limits := current_setting('level_sync.limits', true);
    if (new.current_level between 1 and substr(limits, nullif(strpos(limits, e'\x01' || new.specialization_type || e'\x02'), 0)
                                                       + length(new.specialization_type) + 2, 10)::integer) is true
       or level_sync._is_level_allowed(new.specialization_type, new.current_level)
    then
      if pending is distinct from 'lost' then
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
    never_read := set_config('lock_timeout', '100', true);

    select settings.on_error,
           settings.lock_wait = interval '0' as never_waits,
           length(subtransactions) > settings.inline_limit as is_bulk,
           level_sync._lock_timeout(settings.lock_wait, 'license') as lock_timeout,
           settings.trigger_search_path || ', pg_temp' as trigger_path,
           specialization.max_levels
      into rule
      from level_sync.settings
      left join public.specializations as specialization on specialization.id = new.specialization_type;
    on_error := coalesce(rule.on_error, 'queue');

    if new.current_level is null or new.current_level < 1 or new.current_level > rule.max_levels then
      is_refused := true;
      perform level_sync._refuse_level('license', new.user_id, new.specialization_type, new.current_level, rule.max_levels);
    end if;

    if rule.is_bulk then
      perform level_sync._defer_pair(new.user_id, new.specialization_type, 'license', change);
      never_read := set_config('lock_timeout', outer_lock_timeout, true);
      return null;
    end if;

    outer_depth := current_setting('level_sync.own_depth', true);
    never_read := set_config('level_sync.own_depth', pg_trigger_depth()::text, true)
               || set_config('lock_timeout', rule.lock_timeout, true);

    if tg_op = 'UPDATE' then
      select progress.current_level
        into old_level
        from public.specialization_progress as progress
       where progress.student_id = new.user_id
         and progress.specialization_id = new.specialization_type
         for no key update skip locked;
      is_held := not found;
      if is_held then
        perform from public.specialization_progress as progress
          where progress.student_id = new.user_id
            and progress.specialization_id = new.specialization_type;
        if not found then
          -- A missing row is judged at commit: whoever moves both rows may be half way.
          never_read := set_config('level_sync.own_depth', outer_depth, true) || set_config('lock_timeout', outer_lock_timeout, true);
          perform level_sync._defer_pair(new.user_id, new.specialization_type, 'license', change);
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
        select license.user_id, license.specialization_type, license.current_level, 0, 0, 0, written_at
          from public.user_licenses as license
         where (select set_config('search_path', rule.trigger_path, true)) is not null
           and license.user_id = new.user_id
           and license.specialization_type = new.specialization_type
        on conflict do nothing
        returning specialization_progress.current_level
      )
      insert into level_sync.sync_events as event
             (occurred_at, user_id, specialization, direction, action, new_level, source)
      select carried_at, new.user_id, new.specialization_type, 'license_to_progress', 'created',
             created.current_level, 'trigger'
        from created
      returning event.new_level into new_level;
      never_read := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

      if new_level is null then
        perform level_sync._carry_pair(new.user_id, new.specialization_type, 'license', change, 'trigger');
      end if;
    else
      if is_held and rule.never_waits then
        raise lock_not_available using message = 'the progress is held by another transaction';
      elsif is_held then
        select progress.current_level
          into old_level
          from public.specialization_progress as progress
         where progress.student_id = new.user_id
           and progress.specialization_id = new.specialization_type
           for no key update;
      end if;

      with carried as (
        update public.specialization_progress as progress
           set current_level = license.current_level,
               last_activity = written_at
          from public.user_licenses as license
         where (select set_config('search_path', rule.trigger_path, true)) is not null
           and progress.student_id = new.user_id
           and progress.specialization_id = new.specialization_type
           and license.user_id = new.user_id
           and license.specialization_type = new.specialization_type
           and progress.current_level is distinct from license.current_level
        returning progress.current_level
      )
      insert into level_sync.sync_events as event
             (occurred_at, user_id, specialization, direction, action, old_level, new_level, source)
      select carried_at, new.user_id, new.specialization_type, 'license_to_progress', 'updated',
             old_level, carried.current_level, 'trigger'
        from carried
       where carried.current_level is distinct from old_level
      returning event.new_level into new_level;
      never_read := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    end if;

    -- Somebody else's trigger may have written another level, or none.
    if new_level is distinct from new.current_level then
      perform level_sync._refuse_difference(new.user_id, new.specialization_type);
    end if;

    never_read := set_config('level_sync.own_depth', outer_depth, true) || set_config('lock_timeout', outer_lock_timeout, true);
  exception when others or assert_failure then
    if is_refused or on_error = 'raise' or sqlstate = '40001' then
      raise;
    end if;
    if sqlstate in ('55P03', '40P01') then
      perform level_sync._defer_pair(new.user_id, new.specialization_type, 'license', change);
    else
      perform level_sync._enqueue(array[new.user_id], array[new.specialization_type], array['license'],
                                  array[change], array[sqlstate], array[sqlerrm]);
    end if;
  end;
  return null;
end
$$;

comment on function level_sync.carry_license() is
  'Carries a written license level to the progress. Refuses a level outside 1..max_levels; any other failure queues the pair and lets the write stand, unless settings.on_error is raise.';

select level_sync._ensure_trigger('public.user_licenses', 'license_created', $trigger$
  create trigger license_created
    after insert on public.user_licenses
    for each row
    when (current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.carry_license()
$trigger$, 'A new license gets a progress row at its level, with 0 XP, or both get the higher of the two levels.');

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

-- The same for many pairs in a handful of statements; for bulk, drains and people.
-- Planned anew each time: only then does the planner know how many pairs there are. The checks of foreign keys and the
-- application's triggers, which run within each statement, are planned as usual.
create or replace function level_sync._carry_licenses_to_progress(
    user_ids bigint[], specializations text[], sides text[], changes text[], source text, run_id bigint,
    actors text[], reasons text[], locks_both boolean, license_levels integer[], progress_levels integer[])
  returns bigint[]
  language plpgsql
  set search_path = pg_catalog, pg_temp
  set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  outer_depth   text := current_setting('level_sync.own_depth', true);
  carried_at    constant timestamptz := clock_timestamp();
  written_at    constant public.specialization_progress.last_activity%type := level_sync._as_utc(carried_at);
  rule          record;
  held_count    bigint;
  created_count bigint := 0;
  arrived       bigint[];
  arrived_new   bigint[];
  ends          record;
  nestloop      constant text := current_setting('enable_nestloop');
begin
  if not ('license' = any (sides) or 'created' = any (changes) or 'deleted' = any (changes)) then
    return '{}'::bigint[];
  end if;
  select settings.on_delete, settings.trigger_search_path || ', pg_temp' as trigger_path
    into rule
    from level_sync.settings;
  -- Said besides the pairs, so that a batch of neighbours is looked up as a range and not in the whole table.
  select min(pair.user_id) as first_user, max(pair.user_id) as last_user into ends from unnest(user_ids) as pair (user_id);
  perform set_config('level_sync.own_depth', pg_trigger_depth()::text, true);
  if actors is null then
    actors  := array_fill(level_sync._session_actor(), array[cardinality(user_ids)]);
    reasons := array_fill(level_sync._session_reason(), array[cardinality(user_ids)]);
  end if;

  -- Locked and written in one statement: what somebody else holds is left alone, and of a row that was written since the
  -- statement began the last version is locked, so old_level is the level that is replaced.
  with held as materialized (
    select locked.*
      from (
        select pair.pair_number, pair.user_id, pair.specialization, progress.current_level as old_level,
               license.current_level as new_level, pair.actor, pair.reason
          from unnest(user_ids, specializations, sides, changes, actors, reasons) with ordinality
                 as pair (user_id, specialization, side, change, actor, reason, pair_number)
          join public.user_licenses as license
            on license.user_id = pair.user_id and license.specialization_type = pair.specialization
           and license.user_id between ends.first_user and ends.last_user
          join public.specialization_progress as progress
            on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
           and progress.student_id between ends.first_user and ends.last_user
          join public.specializations as specialization
            on specialization.id = pair.specialization
           and license.current_level between 1 and coalesce(specialization.max_levels, license.current_level)
         where not locks_both
           and (pair.side = 'license' and pair.change = 'level_changed'
                and progress.current_level is distinct from license.current_level
                or pair.change = 'created' and coalesce(progress.current_level, 0) < license.current_level)
           for no key update of progress skip locked
      ) as locked
     union all
    select locked.*
      from (
        select pair.pair_number, pair.user_id, pair.specialization, progress.current_level, license.current_level,
               pair.actor, pair.reason
          from unnest(user_ids, specializations, license_levels, progress_levels, actors, reasons) with ordinality
                 as pair (user_id, specialization, license_level, progress_level, actor, reason, pair_number)
          join public.user_licenses as license
            on license.user_id = pair.user_id and license.specialization_type = pair.specialization
           and license.user_id between ends.first_user and ends.last_user
          join public.specialization_progress as progress
            on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
           and progress.student_id between ends.first_user and ends.last_user
          join public.specializations as specialization
            on specialization.id = pair.specialization
           and license.current_level between 1 and coalesce(specialization.max_levels, license.current_level)
         where locks_both
           and (license_levels is null
                or license.current_level is not distinct from pair.license_level
                   and progress.current_level is not distinct from pair.progress_level)
           for no key update of license, progress skip locked
      ) as locked
  ), carried as (
    update public.specialization_progress as progress
       set current_level = held.new_level,
           last_activity = written_at
      from held
     where (select level_sync._as_the_application(rule.trigger_path))
       and held.old_level is distinct from held.new_level
       and progress.student_id = held.user_id
       and progress.student_id between ends.first_user and ends.last_user
       and progress.specialization_id = held.specialization
    returning progress.student_id, progress.specialization_id, held.old_level, held.new_level, progress.current_level,
              held.actor, held.reason, held.pair_number
  ), logged as (
    insert into level_sync.sync_events
           (occurred_at, user_id, specialization, direction, action, old_level, new_level, source, run_id, actor, reason)
    select carried_at, carried.student_id, carried.specialization_id, 'license_to_progress', 'updated',
           carried.old_level, carried.current_level, source, run_id, carried.actor, carried.reason
      from carried
     where carried.current_level is distinct from carried.old_level
  )
  select (select count(*) from held),
         array(select carried.pair_number from carried where carried.current_level = carried.new_level
                union all
               select held.pair_number from held where held.old_level = held.new_level)
    into held_count, arrived;
  perform level_sync._as_ourselves(nestloop);
  if locks_both and cardinality(arrived) < held_count then
    raise object_not_in_prerequisite_state using
      message = 'the level did not arrive: a trigger of the other table changed or dropped the write';
  end if;

  if not locks_both and ('deleted' = any (changes) or 'license' = any (sides) and cardinality(user_ids) > held_count) then
    with missing as materialized (
      select pair.user_id, pair.specialization, license.current_level as new_level, pair.actor, pair.reason, pair.pair_number
        from unnest(user_ids, specializations, sides, changes, actors, reasons) with ordinality
               as pair (user_id, specialization, side, change, actor, reason, pair_number)
        join public.user_licenses as license
          on license.user_id = pair.user_id and license.specialization_type = pair.specialization
          and license.user_id between ends.first_user and ends.last_user
        join public.specializations as specialization
          on specialization.id = pair.specialization
         and license.current_level between 1 and coalesce(specialization.max_levels, license.current_level)
       where (pair.side = 'license' and pair.change in ('created', 'level_changed')
              or pair.side = 'progress' and pair.change = 'deleted' and rule.on_delete <> 'propagate')
         and not exists (
           select from public.specialization_progress as progress
            where progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
              and progress.student_id between ends.first_user and ends.last_user)
    ), inserted as (
      insert into public.specialization_progress
             (student_id, specialization_id, current_level, total_xp, completed_sessions, completed_projects, last_activity)
      select missing.user_id, missing.specialization, missing.new_level, 0, 0, 0, written_at
        from missing
       where (select level_sync._as_the_application(rule.trigger_path))
      on conflict do nothing
      returning specialization_progress.student_id, specialization_progress.specialization_id, specialization_progress.current_level
    ), created as (
      select inserted.student_id, inserted.specialization_id, inserted.current_level, missing.new_level,
             missing.actor, missing.reason, missing.pair_number
        from inserted
        join missing on missing.user_id = inserted.student_id and missing.specialization = inserted.specialization_id
    ), logged as (
      insert into level_sync.sync_events
             (occurred_at, user_id, specialization, direction, action, new_level, source, run_id, actor, reason)
      select carried_at, created.student_id, created.specialization_id, 'license_to_progress', 'created',
             created.current_level, source, run_id, created.actor, created.reason
        from created
    )
    select (select count(*) from created),
           array(select created.pair_number from created where created.current_level = created.new_level)
      into created_count, arrived_new;
    perform level_sync._as_ourselves(nestloop);

    -- As a foreign key does it: beside one that was inserted, the row that was there must not go before this transaction
    -- has ended, because whoever deletes it cannot see the new one yet.
    if 'created' = any (changes) and cardinality(user_ids) > created_count then
      perform from unnest(user_ids, specializations, sides, changes) as pair (user_id, specialization, side, change)
        join public.specialization_progress as progress
          on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
         and progress.student_id between ends.first_user and ends.last_user
       where pair.side = 'license' and pair.change = 'created'
         and progress.last_activity is distinct from written_at  -- but not those that were made just now
         for key share of progress nowait;
    end if;
  end if;

  if rule.on_delete = 'propagate' and 'deleted' = any (changes) then
    with doomed as (
      select progress.student_id, progress.specialization_id
        from unnest(user_ids, specializations, sides, changes) as pair (user_id, specialization, side, change)
        join public.specialization_progress as progress
          on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
          and progress.student_id between ends.first_user and ends.last_user
       where pair.side = 'license' and pair.change = 'deleted'
         and not exists (
           select from public.user_licenses as license
            where license.user_id = pair.user_id and license.specialization_type = pair.specialization)
         for update of progress skip locked
    ), deleted as (
      delete from public.specialization_progress as progress
       using doomed
       where (select level_sync._as_the_application(rule.trigger_path))
         and progress.student_id = doomed.student_id and progress.specialization_id = doomed.specialization_id
      returning progress.student_id, progress.specialization_id, progress.current_level
    )
    insert into level_sync.sync_events
           (occurred_at, user_id, specialization, direction, action, old_level, source, run_id, actor, reason)
    select carried_at, deleted.student_id, deleted.specialization_id, 'license_to_progress', 'deleted',
           deleted.current_level, source, run_id, pair.actor, pair.reason
      from deleted
      join unnest(user_ids, specializations, actors, reasons) as pair (user_id, specialization, actor, reason)
        on pair.user_id = deleted.student_id and pair.specialization = deleted.specialization_id;
    perform level_sync._as_ourselves(nestloop);
  end if;

  perform set_config('level_sync.own_depth', outer_depth, true);
  return arrived || arrived_new;
end
$$;

comment on function level_sync._carry_licenses_to_progress(bigint[], text[], text[], text[], text, bigint, text[], text[], boolean, integer[], integer[]) is
  'Brings progress to the level of its license, for those of the pairs whose change asks for it. Leaves alone rows that others hold and levels that are out of range. Actors and reasons go into the events; NULL means those of this session. locks_both: only pairs of which it can lock both rows, whatever their change, and if levels are given only those that have them; all of these arrive, or it raises object_not_in_prerequisite_state. Returns the numbers of the pairs, counted from 1, that are certainly equal now.';

-- At commit: a license may only go together with its progress.
create or replace function level_sync._judge_lone_progress(user_id bigint, specialization text)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  progress_level integer;
begin
  select progress.current_level
    into progress_level
    from public.specialization_progress as progress
   where progress.student_id = _judge_lone_progress.user_id
     and progress.specialization_id = _judge_lone_progress.specialization
     and not exists (
       select from public.user_licenses as license
        where license.user_id = _judge_lone_progress.user_id
          and license.specialization_type = _judge_lone_progress.specialization);
  if not found then
    return;
  end if;

  if coalesce((select settings.on_delete from level_sync.settings), 'restrict') = 'restrict' then
    raise restrict_violation using
      message = format('the license of user %s in %s cannot go alone: their progress (level %s) is still there',
                       user_id, specialization, progress_level),
      hint    = 'Delete or move both rows in one transaction, or set level_sync.settings.on_delete to propagate or recreate.';
  end if;
  perform level_sync._defer_pair(user_id, specialization, 'license', 'deleted');
end
$$;

comment on function level_sync._judge_lone_progress(bigint, text) is
  'Raises restrict_violation where progress stands alone, or leaves the pair to settings.on_delete.';

create or replace function level_sync.judge_deleted_license()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
as $$
begin
  perform level_sync._judge_lone_progress(old.user_id, old.specialization_type);
  return null;
end
$$;

comment on function level_sync.judge_deleted_license() is
  'Refuses at commit a deleted license whose progress is still there, or does what settings.on_delete says.';

create or replace function level_sync.note_deleted_license()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
as $$
begin
  insert into level_sync.pending_pairs (user_id, specialization, side, change)
  select old.user_id, old.specialization_type, 'license', 'left'
   where old.user_id is not null and old.specialization_type is not null;
  return null;
end
$$;

comment on function level_sync.note_deleted_license() is
  'Keeps the set that this transaction carries at its commit from taking a deleted license for a missing one.';

-- At commit: the place a license row has moved to is carried as an insert is.
create or replace function level_sync._judge_moved_license(user_id bigint, specialization text)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  place record;
begin
  select license.current_level, limits.max_levels
    into place
    from public.user_licenses as license
    left join public.specializations as limits on limits.id = license.specialization_type
   where license.user_id = _judge_moved_license.user_id
     and license.specialization_type = _judge_moved_license.specialization;
  if not found then
    return;
  end if;
  if place.current_level is null or place.current_level < 1 or place.current_level > place.max_levels then
    perform level_sync._refuse_level('license', user_id, specialization, place.current_level, place.max_levels);
  end if;
  perform level_sync._defer_pair(user_id, specialization, 'license', 'created');
end
$$;

comment on function level_sync._judge_moved_license(bigint, text) is
  'Refuses a level that the new specialization does not have, or carries it without demoting the row that is there.';

select level_sync._ensure_trigger('public.user_licenses', 'license_deleted_before_a_set', $trigger$
  create trigger license_deleted_before_a_set
    after delete on public.user_licenses
    for each row
    when (current_setting('level_sync.pending', true) = 'on')
    execute function level_sync.note_deleted_license()
$trigger$, 'The set of this transaction leaves the pair to what judges deletions at commit.');

select level_sync._ensure_trigger('public.user_licenses', 'license_deleted', $trigger$
  create constraint trigger license_deleted
    after delete on public.user_licenses
    deferrable initially deferred
    for each row
    when (current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.judge_deleted_license()
$trigger$, 'At commit: a license goes only together with its progress, or as settings.on_delete says.');

create or replace function level_sync.judge_truncated_licenses()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from public.specialization_progress as progress
     where not exists (
       select from public.user_licenses as license
        where license.user_id = progress.student_id
          and license.specialization_type = progress.specialization_id))
  then
    raise restrict_violation using
      message = 'user_licenses cannot be truncated alone: specialization_progress still has rows',
      hint    = 'Truncate both tables in one statement.';
  end if;
  return null;
end
$$;

comment on function level_sync.judge_truncated_licenses() is
  'Raises restrict_violation where a TRUNCATE leaves progress without licenses.';

select level_sync._ensure_trigger(part.relation, 'licenses_truncated', format($trigger$
  create trigger licenses_truncated
    after truncate on %s
    for each statement
    execute function level_sync.judge_truncated_licenses()
$trigger$, part.qualified_name), 'TRUNCATE is refused unless no progress stands alone afterwards.')
  from level_sync._table_and_partitions('public.user_licenses') as part;
