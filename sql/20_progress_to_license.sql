-- What is written to specialization_progress arrives in user_licenses, in the same transaction.
-- The mirror image of 30_license_to_progress.sql: a diff of the two shows names only.

create or replace function level_sync.carry_progress()
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
  written_at         public.user_licenses.last_advanced_at%type;
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
  if tg_op = 'UPDATE' and (old.student_id = new.student_id and old.specialization_id = new.specialization_id) is not true then
    perform level_sync._defer_move('progress', old.student_id, old.specialization_id, new.student_id, new.specialization_id);
    return null;
  end if;

  -- Bulk: the transaction carries a set when it commits, and this pair joins it. Where a transaction has no
  -- subtransaction left to arm that set, the pair stays behind for the drain.
  if pending in ('on', 'lost') or length(current_setting('level_sync.subtransactions', true)) > 56 then
    limits := current_setting('level_sync.limits', true);
    if (new.current_level between 1 and substr(limits, nullif(strpos(limits, e'\x01' || new.specialization_id || e'\x02'), 0)
                                                       + length(new.specialization_id) + 2, 10)::integer) is true
       or level_sync._is_level_allowed(new.specialization_id, new.current_level)
    then
      if pending is distinct from 'lost' then
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
    never_read := set_config('lock_timeout', '100', true);

    select settings.on_error,
           settings.lock_wait = interval '0' as never_waits,
           length(subtransactions) > settings.inline_limit as is_bulk,
           level_sync._lock_timeout(settings.lock_wait, 'progress') as lock_timeout,
           settings.trigger_search_path || ', pg_temp' as trigger_path,
           specialization.max_levels
      into rule
      from level_sync.settings
      left join public.specializations as specialization on specialization.id = new.specialization_id;
    on_error := coalesce(rule.on_error, 'queue');

    if new.current_level is null or new.current_level < 1 or new.current_level > rule.max_levels then
      is_refused := true;
      perform level_sync._refuse_level('progress', new.student_id, new.specialization_id, new.current_level, rule.max_levels);
    end if;

    if rule.is_bulk then
      perform level_sync._defer_pair(new.student_id, new.specialization_id, 'progress', change);
      never_read := set_config('lock_timeout', outer_lock_timeout, true);
      return null;
    end if;

    outer_depth := current_setting('level_sync.own_depth', true);
    never_read := set_config('level_sync.own_depth', pg_trigger_depth()::text, true)
               || set_config('lock_timeout', rule.lock_timeout, true);

    if tg_op = 'UPDATE' then
      select license.current_level
        into old_level
        from public.user_licenses as license
       where license.user_id = new.student_id
         and license.specialization_type = new.specialization_id
         for no key update skip locked;
      is_held := not found;
      if is_held then
        perform from public.user_licenses as license
          where license.user_id = new.student_id
            and license.specialization_type = new.specialization_id;
        if not found then
          -- A missing row is judged at commit: whoever moves both rows may be half way.
          never_read := set_config('level_sync.own_depth', outer_depth, true) || set_config('lock_timeout', outer_lock_timeout, true);
          perform level_sync._defer_pair(new.student_id, new.specialization_id, 'progress', change);
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
               (user_id, specialization_type, current_level, max_achieved_level, started_at, last_advanced_at)
        select progress.student_id, progress.specialization_id, progress.current_level, progress.current_level,
               written_at, written_at
          from public.specialization_progress as progress
         where (select set_config('search_path', rule.trigger_path, true)) is not null
           and progress.student_id = new.student_id
           and progress.specialization_id = new.specialization_id
        on conflict do nothing
        returning user_licenses.current_level
      )
      insert into level_sync.sync_events as event
             (occurred_at, user_id, specialization, direction, action, new_level, source)
      select carried_at, new.student_id, new.specialization_id, 'progress_to_license', 'created',
             created.current_level, 'trigger'
        from created
      returning event.new_level into new_level;
      never_read := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);

      if new_level is null then
        perform level_sync._carry_pair(new.student_id, new.specialization_id, 'progress', change, 'trigger');
      end if;
    else
      if is_held and rule.never_waits then
        raise lock_not_available using message = 'the license is held by another transaction';
      elsif is_held then
        select license.current_level
          into old_level
          from public.user_licenses as license
         where license.user_id = new.student_id
           and license.specialization_type = new.specialization_id
           for no key update;
      end if;

      with carried as (
        update public.user_licenses as license
           set current_level      = progress.current_level,
               max_achieved_level = greatest(license.max_achieved_level, progress.current_level),
               last_advanced_at   = written_at
          from public.specialization_progress as progress
         where (select set_config('search_path', rule.trigger_path, true)) is not null
           and license.user_id = new.student_id
           and license.specialization_type = new.specialization_id
           and progress.student_id = new.student_id
           and progress.specialization_id = new.specialization_id
           and license.current_level is distinct from progress.current_level
        returning license.current_level
      )
      insert into level_sync.sync_events as event
             (occurred_at, user_id, specialization, direction, action, old_level, new_level, source)
      select carried_at, new.student_id, new.specialization_id, 'progress_to_license', 'updated',
             old_level, carried.current_level, 'trigger'
        from carried
       where carried.current_level is distinct from old_level
      returning event.new_level into new_level;
      never_read := pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    end if;

    -- Somebody else's trigger may have written another level, or none.
    if new_level is distinct from new.current_level then
      perform level_sync._refuse_difference(new.student_id, new.specialization_id);
    end if;

    never_read := set_config('level_sync.own_depth', outer_depth, true) || set_config('lock_timeout', outer_lock_timeout, true);
  exception when others or assert_failure then
    if is_refused or on_error = 'raise' or sqlstate = '40001' then
      raise;
    end if;
    if sqlstate in ('55P03', '40P01') then
      perform level_sync._defer_pair(new.student_id, new.specialization_id, 'progress', change);
    else
      perform level_sync._enqueue(array[new.student_id], array[new.specialization_id], array['progress'],
                                  array[change], array[sqlstate], array[sqlerrm]);
    end if;
  end;
  return null;
end
$$;

comment on function level_sync.carry_progress() is
  'Carries a written progress level to the license. Refuses a level outside 1..max_levels; any other failure queues the pair and lets the write stand, unless settings.on_error is raise.';

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

-- The same for many pairs in a handful of statements; for bulk, drains and people.
-- Planned anew each time: only then does the planner know how many pairs there are. The checks of foreign keys and the
-- application's triggers, which run within each statement, are planned as usual.
create or replace function level_sync._carry_progress_to_licenses(
    user_ids bigint[], specializations text[], sides text[], changes text[], source text, run_id bigint,
    actors text[], reasons text[], locks_both boolean, progress_levels integer[], license_levels integer[])
  returns bigint[]
  language plpgsql
  set search_path = pg_catalog, pg_temp
  set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  outer_depth   text := current_setting('level_sync.own_depth', true);
  carried_at    constant timestamptz := clock_timestamp();
  written_at    constant public.user_licenses.last_advanced_at%type := level_sync._as_utc(carried_at);
  rule          record;
  held_count    bigint;
  created_count bigint := 0;
  arrived       bigint[];
  arrived_new   bigint[];
  ends          record;
  nestloop      constant text := current_setting('enable_nestloop');
begin
  if not ('progress' = any (sides) or 'created' = any (changes) or 'deleted' = any (changes)) then
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
        select pair.pair_number, pair.user_id, pair.specialization, license.current_level as old_level,
               progress.current_level as new_level, pair.actor, pair.reason
          from unnest(user_ids, specializations, sides, changes, actors, reasons) with ordinality
                 as pair (user_id, specialization, side, change, actor, reason, pair_number)
          join public.specialization_progress as progress
            on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
           and progress.student_id between ends.first_user and ends.last_user
          join public.user_licenses as license
            on license.user_id = pair.user_id and license.specialization_type = pair.specialization
           and license.user_id between ends.first_user and ends.last_user
          join public.specializations as specialization
            on specialization.id = pair.specialization
           and progress.current_level between 1 and coalesce(specialization.max_levels, progress.current_level)
         where not locks_both
           and (pair.side = 'progress' and pair.change = 'level_changed'
                and license.current_level is distinct from progress.current_level
                or pair.change = 'created' and coalesce(license.current_level, 0) < progress.current_level)
           for no key update of license skip locked
      ) as locked
     union all
    select locked.*
      from (
        select pair.pair_number, pair.user_id, pair.specialization, license.current_level, progress.current_level,
               pair.actor, pair.reason
          from unnest(user_ids, specializations, progress_levels, license_levels, actors, reasons) with ordinality
                 as pair (user_id, specialization, progress_level, license_level, actor, reason, pair_number)
          join public.specialization_progress as progress
            on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
           and progress.student_id between ends.first_user and ends.last_user
          join public.user_licenses as license
            on license.user_id = pair.user_id and license.specialization_type = pair.specialization
           and license.user_id between ends.first_user and ends.last_user
          join public.specializations as specialization
            on specialization.id = pair.specialization
           and progress.current_level between 1 and coalesce(specialization.max_levels, progress.current_level)
         where locks_both
           and (progress_levels is null
                or progress.current_level is not distinct from pair.progress_level
                   and license.current_level is not distinct from pair.license_level)
           for no key update of progress, license skip locked
      ) as locked
  ), carried as (
    update public.user_licenses as license
       set current_level      = held.new_level,
           max_achieved_level = greatest(license.max_achieved_level, held.new_level),
           last_advanced_at   = written_at
      from held
     where (select level_sync._as_the_application(rule.trigger_path))
       and held.old_level is distinct from held.new_level
       and license.user_id = held.user_id
       and license.user_id between ends.first_user and ends.last_user
       and license.specialization_type = held.specialization
    returning license.user_id, license.specialization_type, held.old_level, held.new_level, license.current_level,
              held.actor, held.reason, held.pair_number
  ), logged as (
    insert into level_sync.sync_events
           (occurred_at, user_id, specialization, direction, action, old_level, new_level, source, run_id, actor, reason)
    select carried_at, carried.user_id, carried.specialization_type, 'progress_to_license', 'updated',
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

  if not locks_both and ('deleted' = any (changes) or 'progress' = any (sides) and cardinality(user_ids) > held_count) then
    with missing as materialized (
      select pair.user_id, pair.specialization, progress.current_level as new_level, pair.actor, pair.reason, pair.pair_number
        from unnest(user_ids, specializations, sides, changes, actors, reasons) with ordinality
               as pair (user_id, specialization, side, change, actor, reason, pair_number)
        join public.specialization_progress as progress
          on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
          and progress.student_id between ends.first_user and ends.last_user
        join public.specializations as specialization
          on specialization.id = pair.specialization
         and progress.current_level between 1 and coalesce(specialization.max_levels, progress.current_level)
       where (pair.side = 'progress' and pair.change in ('created', 'level_changed')
              or pair.side = 'license' and pair.change = 'deleted' and rule.on_delete <> 'propagate')
         and not exists (
           select from public.user_licenses as license
            where license.user_id = pair.user_id and license.specialization_type = pair.specialization
              and license.user_id between ends.first_user and ends.last_user)
    ), inserted as (
      insert into public.user_licenses
             (user_id, specialization_type, current_level, max_achieved_level, started_at, last_advanced_at)
      select missing.user_id, missing.specialization, missing.new_level, missing.new_level,
             written_at, written_at
        from missing
       where (select level_sync._as_the_application(rule.trigger_path))
      on conflict do nothing
      returning user_licenses.user_id, user_licenses.specialization_type, user_licenses.current_level
    ), created as (
      select inserted.user_id, inserted.specialization_type, inserted.current_level, missing.new_level,
             missing.actor, missing.reason, missing.pair_number
        from inserted
        join missing on missing.user_id = inserted.user_id and missing.specialization = inserted.specialization_type
    ), logged as (
      insert into level_sync.sync_events
             (occurred_at, user_id, specialization, direction, action, new_level, source, run_id, actor, reason)
      select carried_at, created.user_id, created.specialization_type, 'progress_to_license', 'created',
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
        join public.user_licenses as license
          on license.user_id = pair.user_id and license.specialization_type = pair.specialization
         and license.user_id between ends.first_user and ends.last_user
       where pair.side = 'progress' and pair.change = 'created'
         and license.last_advanced_at is distinct from written_at  -- but not those that were made just now
         for key share of license nowait;
    end if;
  end if;

  if rule.on_delete = 'propagate' and 'deleted' = any (changes) then
    with doomed as (
      select license.user_id, license.specialization_type
        from unnest(user_ids, specializations, sides, changes) as pair (user_id, specialization, side, change)
        join public.user_licenses as license
          on license.user_id = pair.user_id and license.specialization_type = pair.specialization
          and license.user_id between ends.first_user and ends.last_user
       where pair.side = 'progress' and pair.change = 'deleted'
         and not exists (
           select from public.specialization_progress as progress
            where progress.student_id = pair.user_id and progress.specialization_id = pair.specialization)
         for update of license skip locked
    ), deleted as (
      delete from public.user_licenses as license
       using doomed
       where (select level_sync._as_the_application(rule.trigger_path))
         and license.user_id = doomed.user_id and license.specialization_type = doomed.specialization_type
      returning license.user_id, license.specialization_type, license.current_level
    )
    insert into level_sync.sync_events
           (occurred_at, user_id, specialization, direction, action, old_level, source, run_id, actor, reason)
    select carried_at, deleted.user_id, deleted.specialization_type, 'progress_to_license', 'deleted',
           deleted.current_level, source, run_id, pair.actor, pair.reason
      from deleted
      join unnest(user_ids, specializations, actors, reasons) as pair (user_id, specialization, actor, reason)
        on pair.user_id = deleted.user_id and pair.specialization = deleted.specialization_type;
    perform level_sync._as_ourselves(nestloop);
  end if;

  perform set_config('level_sync.own_depth', outer_depth, true);
  return arrived || arrived_new;
end
$$;

comment on function level_sync._carry_progress_to_licenses(bigint[], text[], text[], text[], text, bigint, text[], text[], boolean, integer[], integer[]) is
  'Brings licenses to the level of their progress, for those of the pairs whose change asks for it. Leaves alone rows that others hold and levels that are out of range. Actors and reasons go into the events; NULL means those of this session. locks_both: only pairs of which it can lock both rows, whatever their change, and if levels are given only those that have them; all of these arrive, or it raises object_not_in_prerequisite_state. Returns the numbers of the pairs, counted from 1, that are certainly equal now.';

-- At commit: progress may only go together with its license.
create or replace function level_sync._judge_lone_license(user_id bigint, specialization text)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  license_level integer;
begin
  select license.current_level
    into license_level
    from public.user_licenses as license
   where license.user_id = _judge_lone_license.user_id
     and license.specialization_type = _judge_lone_license.specialization
     and not exists (
       select from public.specialization_progress as progress
        where progress.student_id = _judge_lone_license.user_id
          and progress.specialization_id = _judge_lone_license.specialization);
  if not found then
    return;
  end if;

  if coalesce((select settings.on_delete from level_sync.settings), 'restrict') = 'restrict' then
    raise restrict_violation using
      message = format('the progress of user %s in %s cannot go alone: their license (level %s) is still there',
                       user_id, specialization, license_level),
      hint    = 'Delete or move both rows in one transaction, or set level_sync.settings.on_delete to propagate or recreate.';
  end if;
  perform level_sync._defer_pair(user_id, specialization, 'progress', 'deleted');
end
$$;

comment on function level_sync._judge_lone_license(bigint, text) is
  'Raises restrict_violation where a license stands alone, or leaves the pair to settings.on_delete.';

create or replace function level_sync.judge_deleted_progress()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
as $$
begin
  perform level_sync._judge_lone_license(old.student_id, old.specialization_id);
  return null;
end
$$;

comment on function level_sync.judge_deleted_progress() is
  'Refuses at commit a deleted progress whose license is still there, or does what settings.on_delete says.';

create or replace function level_sync.note_deleted_progress()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
as $$
begin
  insert into level_sync.pending_pairs (user_id, specialization, side, change)
  select old.student_id, old.specialization_id, 'progress', 'left'
   where old.student_id is not null and old.specialization_id is not null;
  return null;
end
$$;

comment on function level_sync.note_deleted_progress() is
  'Keeps the set that this transaction carries at its commit from taking a deleted progress for a missing one.';

-- At commit: the place a progress row has moved to is carried as an insert is.
create or replace function level_sync._judge_moved_progress(user_id bigint, specialization text)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  place record;
begin
  select progress.current_level, limits.max_levels
    into place
    from public.specialization_progress as progress
    left join public.specializations as limits on limits.id = progress.specialization_id
   where progress.student_id = _judge_moved_progress.user_id
     and progress.specialization_id = _judge_moved_progress.specialization;
  if not found then
    return;
  end if;
  if place.current_level is null or place.current_level < 1 or place.current_level > place.max_levels then
    perform level_sync._refuse_level('progress', user_id, specialization, place.current_level, place.max_levels);
  end if;
  perform level_sync._defer_pair(user_id, specialization, 'progress', 'created');
end
$$;

comment on function level_sync._judge_moved_progress(bigint, text) is
  'Refuses a level that the new specialization does not have, or carries it without demoting the row that is there.';

select level_sync._ensure_trigger('public.specialization_progress', 'progress_deleted_before_a_set', $trigger$
  create trigger progress_deleted_before_a_set
    after delete on public.specialization_progress
    for each row
    when (current_setting('level_sync.pending', true) = 'on')
    execute function level_sync.note_deleted_progress()
$trigger$, 'The set of this transaction leaves the pair to what judges deletions at commit.');

select level_sync._ensure_trigger('public.specialization_progress', 'progress_deleted', $trigger$
  create constraint trigger progress_deleted
    after delete on public.specialization_progress
    deferrable initially deferred
    for each row
    when (current_setting('level_sync.own_depth', true) is distinct from pg_trigger_depth()::text)
    execute function level_sync.judge_deleted_progress()
$trigger$, 'At commit: progress goes only together with its license, or as settings.on_delete says.');

create or replace function level_sync.judge_truncated_progress()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (
    select from public.user_licenses as license
     where not exists (
       select from public.specialization_progress as progress
        where progress.student_id = license.user_id
          and progress.specialization_id = license.specialization_type))
  then
    raise restrict_violation using
      message = 'specialization_progress cannot be truncated alone: user_licenses still has rows',
      hint    = 'Truncate both tables in one statement.';
  end if;
  return null;
end
$$;

comment on function level_sync.judge_truncated_progress() is
  'Raises restrict_violation where a TRUNCATE leaves licenses without progress.';

select level_sync._ensure_trigger(part.relation, 'progress_truncated', format($trigger$
  create trigger progress_truncated
    after truncate on %s
    for each statement
    execute function level_sync.judge_truncated_progress()
$trigger$, part.qualified_name), 'TRUNCATE is refused unless no license stands alone afterwards.')
  from level_sync._table_and_partitions('public.specialization_progress') as part;
