-- The set that a transaction carries at its commit, and the drain of what was queued. Both bring pairs into step
-- by the rules of the two files before this one, find the few that fail, and queue those.

-- The planner takes the two columns of a pair for independent and expects a handful of matches however many pairs
-- there are. Where they are a good part of the table, or of the users from the first to the last of them, one look
-- at each row there is quicker than one at each pair.
create or replace function level_sync._plan_for_set(user_ids bigint[])
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
begin
  perform set_config('level_sync.outer_nestloop', current_setting('enable_nestloop'), true);
  if cardinality(user_ids) > 1000 and (
    cardinality(user_ids) > (
      select 0.05 * max(pg_class.reltuples) from pg_class
       where pg_class.oid in ('public.specialization_progress'::regclass, 'public.user_licenses'::regclass))
    or cardinality(user_ids) > 0.25 * (select max(pair.user_id)::numeric - min(pair.user_id) from unnest(user_ids) as pair (user_id)))
  then
    perform set_config('enable_nestloop', 'off', true);
    if pg_size_bytes(current_setting('work_mem')) < pg_size_bytes('64MB') then
      perform set_config('work_mem', '64MB', true);
    end if;
  end if;
end
$$;

comment on function level_sync._plan_for_set(bigint[]) is
  'Sets, for the rest of the transaction, how statements about these pairs are planned. Whoever calls it takes that back.';

create or replace function level_sync._carry_pairs(
    user_ids bigint[], specializations text[], sides text[], changes text[], source text,
    run_id bigint default null, actors text[] default null, reasons text[] default null)
  returns bigint
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  outer_nestloop constant text := current_setting('enable_nestloop');
  outer_work_mem constant text := current_setting('work_mem');
  arrived_count  bigint;
begin
  perform level_sync._plan_for_set(user_ids);
  arrived_count := cardinality(level_sync._carry_progress_to_licenses(
                     user_ids, specializations, sides, changes, source, run_id, actors, reasons, false, null, null));
  arrived_count := cardinality(level_sync._carry_licenses_to_progress(
                     user_ids, specializations, sides, changes, source, run_id, actors, reasons, false, null, null))
                   + arrived_count;
  perform set_config('enable_nestloop', outer_nestloop, true),
          set_config('work_mem', outer_work_mem, true);
  return arrived_count;
end
$$;

comment on function level_sync._carry_pairs(bigint[], text[], text[], text[], text, bigint, text[], text[]) is
  'Brings pairs into step: the other side follows the side that was written; what was created never demotes. Returns for how many of them it is certain without another look that they are equal now.';

create or replace function level_sync._carry_pair(
    user_id bigint, specialization text, side text, change text, source text, run_id bigint default null)
  returns bigint
  language sql
  set search_path = pg_catalog, pg_temp
as $$
  select level_sync._carry_pairs(array[user_id], array[specialization], array[side], array[change], source, run_id)
$$;

comment on function level_sync._carry_pair(bigint, text, text, text, text, bigint) is 'Brings one pair into step.';

-- What a carry has to leave behind: both rows with one level, or no row on either side.
create or replace function level_sync._unequal_pairs(user_ids bigint[], specializations text[], sides text[])
  returns table (pair_number bigint, user_id bigint, specialization text, state text, message text)
  language plpgsql
  stable
  set search_path = pg_catalog, pg_temp
  set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  ends record;
begin
  select min(pair.user_id) as first_user, max(pair.user_id) as last_user into ends from unnest(user_ids) as pair (user_id);
  return query
    select pair.pair_number, pair.user_id, pair.specialization,
           case when not source.is_in_range then '23514' end,
           case when not source.is_in_range then
             format('%s level %s is out of range: allowed is 1 to %s; correct it first', pair.side,
                    coalesce(source.level::text, 'NULL'), coalesce(limits.max_levels::text, 'any'))
           end
      from unnest(user_ids, specializations, sides) with ordinality as pair (user_id, specialization, side, pair_number)
      left join public.specialization_progress as progress
        on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
       and progress.student_id between ends.first_user and ends.last_user
      left join public.user_licenses as license
        on license.user_id = pair.user_id and license.specialization_type = pair.specialization
       and license.user_id between ends.first_user and ends.last_user
      left join public.specializations as limits on limits.id = pair.specialization
     cross join lateral (
       select given.level, coalesce(given.level between 1 and coalesce(limits.max_levels, given.level), false) as is_in_range
         from (select case pair.side when 'progress' then progress.current_level else license.current_level end) as given (level)
     ) as source
     where ((progress.student_id is null) <> (license.user_id is null)
            or progress.current_level is distinct from license.current_level)
       -- Written again by a trigger while it was carried: the set of that write comes after this one.
       and not exists (
             select from level_sync.pending_pairs as again
              where again.transaction_id = pg_current_xact_id_if_assigned()
                and again.user_id = pair.user_id and again.specialization = pair.specialization);
end
$$;

comment on function level_sync._unequal_pairs(bigint[], text[], text[]) is
  'The pairs, numbered from 1 as given, that have two levels or only one row and that this transaction does not carry once more; with the reason where the given side''s level is out of range.';

create or replace function level_sync._refuse_difference(user_id bigint, specialization text)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
begin
  -- A snapshot older than the row (REPEATABLE READ) sees it beside the one it replaced: neither is the truth.
  if (select count(*) from public.specialization_progress as progress
       where progress.student_id = _refuse_difference.user_id
         and progress.specialization_id = _refuse_difference.specialization) > 1
     or (select count(*) from public.user_licenses as license
          where license.user_id = _refuse_difference.user_id
            and license.specialization_type = _refuse_difference.specialization) > 1
  then
    raise serialization_failure using
      message = 'could not serialize access: another transaction has deleted this pair',
      hint    = 'The transaction might succeed if retried.';
  end if;
  if not exists (select from level_sync._unequal_pairs(array[user_id], array[specialization], array['progress'])) then
    return;
  end if;
  perform from public.specialization_progress as progress
    where progress.student_id = _refuse_difference.user_id
      and progress.specialization_id = _refuse_difference.specialization
      for no key update nowait;
  perform from public.user_licenses as license
    where license.user_id = _refuse_difference.user_id
      and license.specialization_type = _refuse_difference.specialization
      for no key update nowait;
  raise object_not_in_prerequisite_state using
    message = 'the level did not arrive: a trigger of the other table changed or dropped the write';
end
$$;

comment on function level_sync._refuse_difference(bigint, text) is
  'Where a pair is not equal after it was carried: raises lock_not_available if somebody holds a row, serialization_failure if the snapshot is too old, else object_not_in_prerequisite_state.';

-- Carries what can be carried and tells the failures apart, in few subtransactions: a set that fails is done again
-- in chunks, the chunk that fails pair by pair, and the rest without the pair that failed.
create or replace function level_sync._carry_pairs_that_can(
    user_ids bigint[], specializations text[], sides text[], changes text[], source text, run_id bigint,
    subtransaction_limit integer, actors text[], reasons text[],
    out failed_numbers bigint[], out failed_sqlstates text[], out failed_messages text[])
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  chunk_size constant integer := 500;
  pair_count constant integer := cardinality(user_ids);
  first_pair integer := 1;
  chunk_from integer;
  chunk_to   integer;
  suspect    integer;
  last_whole integer;
  has_failed boolean;
begin
  failed_numbers := '{}'; failed_sqlstates := '{}'; failed_messages := '{}';

  perform level_sync._count_subtransaction();
  begin
    if level_sync._carry_pairs(user_ids, specializations, sides, changes, source, run_id, actors, reasons) = pair_count then
      return;
    end if;
    first_pair := pair_count + 1;  -- Nothing failed, but somebody's trigger or lock may have kept a level from arriving.
  exception when others or assert_failure then
    if sqlstate = '40001' then
      raise;
    end if;
    if sqlstate in ('55P03', '40P01') then
      perform set_config('lock_timeout', '1ms', true);  -- Waited once: what is still held is not waited for again.
    end if;
  end;

  while first_pair <= pair_count and level_sync._count_subtransaction() + 2 <= subtransaction_limit loop
    begin
      for chunk in 0 .. (pair_count - first_pair) / chunk_size loop
        chunk_from := first_pair + chunk * chunk_size;
        chunk_to   := least(chunk_from + chunk_size - 1, pair_count);
        perform level_sync._carry_pairs(user_ids[chunk_from:chunk_to], specializations[chunk_from:chunk_to],
                                        sides[chunk_from:chunk_to], changes[chunk_from:chunk_to], source, run_id,
                                        actors[chunk_from:chunk_to], reasons[chunk_from:chunk_to]);
      end loop;
      exit;
    exception when others or assert_failure then
      if sqlstate = '40001' then
        raise;
      end if;
    end;

    has_failed := false;
    perform level_sync._count_subtransaction();
    begin
      for pair in chunk_from .. chunk_to loop
        suspect := pair;
        perform level_sync._carry_pairs(user_ids[pair:pair], specializations[pair:pair], sides[pair:pair], changes[pair:pair],
                                        source, run_id, actors[pair:pair], reasons[pair:pair]);
      end loop;
    exception when others or assert_failure then
      if sqlstate = '40001' then
        raise;
      end if;
      has_failed       := true;
      failed_numbers   := failed_numbers || suspect::bigint;
      failed_sqlstates := failed_sqlstates || sqlstate::text;
      failed_messages  := failed_messages || left(sqlerrm, 1000);
    end;

    -- Of the chunk, what came before the failure is gone with it; where each pair by itself did not fail, nothing is.
    last_whole := case when has_failed then suspect - 1 else chunk_from - 1 end;
    perform level_sync._count_subtransaction();
    begin
      perform level_sync._carry_pairs(user_ids[first_pair:last_whole], specializations[first_pair:last_whole],
                                      sides[first_pair:last_whole], changes[first_pair:last_whole], source, run_id,
                                      actors[first_pair:last_whole], reasons[first_pair:last_whole]);
    exception when others or assert_failure then
      if sqlstate = '40001' then
        raise;
      end if;
    end;
    first_pair := suspect + 1;
  end loop;

  select array_agg(unequal.pair_number), array_agg(coalesce(failed.state, unequal.state)),
         array_agg(coalesce(failed.message, unequal.message))
    into failed_numbers, failed_sqlstates, failed_messages
    from level_sync._unequal_pairs(user_ids, specializations, sides) as unequal
    left join unnest(failed_numbers, failed_sqlstates, failed_messages) as failed (pair_number, state, message)
      on failed.pair_number = unequal.pair_number;
end
$$;

comment on function level_sync._carry_pairs_that_can(bigint[], text[], text[], text[], text, bigint, integer, text[], text[]) is
  'Carries the pairs it can and returns the numbers of those that are not equal now, with their errors where there were any, without using more subtransactions than allowed.';

create or replace function level_sync._is_pair_free(user_id bigint, specialization text)
  returns boolean
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
begin
  perform from public.specialization_progress as progress
    where progress.student_id = _is_pair_free.user_id and progress.specialization_id = _is_pair_free.specialization
      for no key update skip locked;
  if not found and exists (
    select from public.specialization_progress as progress
     where progress.student_id = _is_pair_free.user_id and progress.specialization_id = _is_pair_free.specialization)
  then
    return false;
  end if;
  perform from public.user_licenses as license
    where license.user_id = _is_pair_free.user_id and license.specialization_type = _is_pair_free.specialization
      for no key update skip locked;
  return found or not exists (
    select from public.user_licenses as license
     where license.user_id = _is_pair_free.user_id and license.specialization_type = _is_pair_free.specialization);
end
$$;

comment on function level_sync._is_pair_free(bigint, text) is
  'Locks the rows of a pair without waiting; false where somebody holds one of them.';

create or replace function level_sync.carry_pending_pairs()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
  set jit = off
as $$
declare
  outer_lock_timeout constant text := current_setting('lock_timeout');
  on_error           text := 'queue';
  lock_timeout       text;
  pairs              record;
  failed_numbers     bigint[];
  failed_sqlstates   text[];
  failed_messages    text[];
  unfinished         record;
  is_taken           boolean := false;
begin
  perform set_config('level_sync.pending', '', true);
  delete from level_sync.pending_commits as pending
   where pending.transaction_id = new.transaction_id and pending.act = 'carry';
  if length(current_setting('level_sync.subtransactions', true)) > 56 then
    return null;  -- No subtransaction is left to do this safely in: the pairs stay behind for the drain.
  end if;
  perform level_sync._count_subtransaction();
  begin
    perform set_config('lock_timeout', '100', true);
    -- Half of lock_wait: a pair that is tried a second time has waited once.
    select settings.on_error, greatest(1, extract(epoch from settings.lock_wait) * 500)::integer::text
      into on_error, lock_timeout
      from level_sync.settings;

    -- The last write of a pair decides which side the other one follows.
    with taken as (
      delete from level_sync.pending_pairs as pending
       where pending.transaction_id = new.transaction_id
         and pending.change not in ('moved_from', 'moved_to')
      returning pending.pending_id, pending.user_id, pending.specialization, pending.side, pending.change,
                pending.actor, pending.reason
    ), left_pairs as materialized (
      -- A row that was deleted or moved away is no missing one: what is to happen is judged at commit, not here.
      select gone.user_id, gone.specialization
        from level_sync.pending_pairs as gone
       where gone.transaction_id = new.transaction_id
         and gone.change in ('left', 'moved_from')
         and case gone.side
               when 'progress' then not exists (
                 select from public.specialization_progress as progress
                  where progress.student_id = gone.user_id and progress.specialization_id = gone.specialization)
               else not exists (
                 select from public.user_licenses as license
                  where license.user_id = gone.user_id and license.specialization_type = gone.specialization)
             end
    ), latest as (
      select distinct on (taken.user_id, taken.specialization) taken.*
        from taken
       where taken.change <> 'left'
         and not exists (
           select from left_pairs
            where left_pairs.user_id = taken.user_id and left_pairs.specialization = taken.specialization)
       order by taken.user_id, taken.specialization, taken.pending_id desc
    )
    select array_agg(latest.user_id) as user_ids, array_agg(latest.specialization) as specializations,
           array_agg(latest.side) as sides, array_agg(latest.change) as changes,
           array_agg(latest.actor) as actors, array_agg(latest.reason) as reasons
      into pairs
      from latest;
    if pairs.user_ids is null then
      perform set_config('lock_timeout', outer_lock_timeout, true);
      return null;
    end if;
    is_taken := true;

    perform set_config('lock_timeout', lock_timeout, true);
    -- The usual case beside bulk: one pair that somebody holds. The set below, planned anew, would cost more than it.
    if on_error = 'queue' and cardinality(pairs.user_ids) = 1
       and not level_sync._is_pair_free(pairs.user_ids[1], pairs.specializations[1])
    then
      perform level_sync._enqueue(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes, array['55P03'],
                                  array['the other row is held by another transaction'], pairs.actors, pairs.reasons);
      perform set_config('lock_timeout', outer_lock_timeout, true);
      return null;
    end if;

    if on_error = 'raise' then
      if level_sync._carry_pairs(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes, 'trigger', null,
                                 pairs.actors, pairs.reasons) < cardinality(pairs.user_ids)
      then
        select array_agg(unequal.pair_number)
          into failed_numbers
          from level_sync._unequal_pairs(pairs.user_ids, pairs.specializations, pairs.sides) as unequal;
      end if;
    else
      select * into failed_numbers, failed_sqlstates, failed_messages
        from level_sync._carry_pairs_that_can(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes,
                                              'trigger', null, 62, pairs.actors, pairs.reasons);
    end if;

    if failed_numbers <> '{}' then
      select array_agg(pair.user_id) as user_ids, array_agg(pair.specialization) as specializations,
             array_agg(pair.side) as sides, array_agg(pair.change) as changes,
             array_agg(pair.actor) as actors, array_agg(pair.reason) as reasons,
             array_agg(coalesce(failed.state, '55P03')) as sqlstates,
             array_agg(coalesce(failed.message, 'the other row is held by another transaction, its trigger dropped the write, or too many others failed')) as messages
        into unfinished
        from unnest(failed_numbers, failed_sqlstates, failed_messages) as failed (pair_number, state, message)
        join unnest(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes, pairs.actors, pairs.reasons)
               with ordinality as pair (user_id, specialization, side, change, actor, reason, pair_number)
          on pair.pair_number = failed.pair_number;
      if on_error = 'raise' and unfinished.user_ids is not null then
        perform level_sync._refuse_difference(unfinished.user_ids[1], unfinished.specializations[1]);
      elsif unfinished.user_ids is not null then
        perform level_sync._enqueue(unfinished.user_ids, unfinished.specializations, unfinished.sides, unfinished.changes,
                                    unfinished.sqlstates, unfinished.messages, unfinished.actors, unfinished.reasons);
      end if;
    end if;
    perform set_config('lock_timeout', outer_lock_timeout, true);
  exception when others or assert_failure then
    if on_error = 'raise' or sqlstate = '40001' then
      raise;
    end if;
    if not is_taken then
      -- The other table is locked as a whole, say: what is in it is the drain's to judge.
      select array_agg(pending.user_id order by pending.pending_id) as user_ids,
             array_agg(pending.specialization order by pending.pending_id) as specializations,
             array_agg(pending.side order by pending.pending_id) as sides,
             array_agg(pending.change order by pending.pending_id) as changes,
             array_agg(pending.actor order by pending.pending_id) as actors,
             array_agg(pending.reason order by pending.pending_id) as reasons
        into pairs
        from level_sync.pending_pairs as pending
       where pending.transaction_id = new.transaction_id
         and pending.change in ('created', 'level_changed', 'deleted');
    end if;
    if pairs.user_ids is not null then
      if level_sync._enqueue(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes,
                             array_fill(sqlstate::text, array[cardinality(pairs.user_ids)]),
                             array_fill(sqlerrm::text, array[cardinality(pairs.user_ids)]),
                             pairs.actors, pairs.reasons)
      then
        delete from level_sync.pending_pairs as pending
         where pending.transaction_id = new.transaction_id
           and pending.change not in ('moved_from', 'moved_to');
        return null;
      end if;
    end if;
    raise warning using
      message = format('level_sync could not carry the pairs of this transaction: %s', sqlerrm),
      hint    = 'The writes stand, and the next drain takes the pairs up.';
  end;
  return null;
end
$$;

comment on function level_sync.carry_pending_pairs() is
  'Carries, at commit or at SET CONSTRAINTS ALL IMMEDIATE, the pairs this transaction left for then; queues what it cannot.';

select level_sync._ensure_trigger('level_sync.pending_commits', 'pending_pairs_committed', $trigger$
  create constraint trigger pending_pairs_committed
    after insert on level_sync.pending_commits
    deferrable initially deferred
    for each row
    when (new.act = 'carry')
    execute function level_sync.carry_pending_pairs()
$trigger$, 'Carries the pairs of a transaction when it commits.');

-- UPDATE of a pair's key is judged like a delete and an insert, once both rows may have moved.
create or replace function level_sync.judge_moves()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
as $$
declare
  place record;
begin
  perform set_config('level_sync.moves', '', true);
  delete from level_sync.pending_commits as pending
   where pending.transaction_id = new.transaction_id and pending.act = 'judge';
  for place in
    with taken as (
      delete from level_sync.pending_pairs as pending
       where pending.transaction_id = new.transaction_id
         and pending.change in ('moved_from', 'moved_to')
      returning pending.*
    )
    select * from taken order by taken.pending_id
  loop
    case place.side || ' ' || place.change
      when 'progress moved_from' then perform level_sync._judge_lone_license(place.user_id, place.specialization);
      when 'license moved_from'  then perform level_sync._judge_lone_progress(place.user_id, place.specialization);
      when 'progress moved_to'   then perform level_sync._judge_moved_progress(place.user_id, place.specialization);
      when 'license moved_to'    then perform level_sync._judge_moved_license(place.user_id, place.specialization);
    end case;
  end loop;
  return null;
end
$$;

comment on function level_sync.judge_moves() is
  'Judges, at commit or at SET CONSTRAINTS ALL IMMEDIATE, each pair that a row has left like a delete, and each that one has come to like an insert.';

select level_sync._ensure_trigger('level_sync.pending_commits', 'moves_committed', $trigger$
  create constraint trigger moves_committed
    after insert on level_sync.pending_commits
    deferrable initially deferred
    for each row
    when (new.act = 'judge')
    execute function level_sync.judge_moves()
$trigger$, 'At commit: the pair that was left is judged like a delete, the new one like an insert.');

-- The drain. It locks both rows of a pair before it looks at them, and leaves alone what somebody else holds.
create or replace function level_sync._lock_pairs_that_are_free(
    user_ids bigint[], specializations text[],
    out pair_numbers bigint[], out has_progress boolean[], out progress_levels integer[], out has_license boolean[],
    out license_levels integer[])
  language plpgsql
  set search_path = pg_catalog, pg_temp
  set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  ends record;
begin
  select min(pair.user_id) as first_user, max(pair.user_id) as last_user into ends from unnest(user_ids) as pair (user_id);
  with pair as materialized (
    select pair.user_id, pair.specialization, pair.pair_number
      from unnest(user_ids, specializations) with ordinality as pair (user_id, specialization, pair_number)
  ), locked_progress as materialized (
    select pair.pair_number, progress.current_level
      from pair
      join public.specialization_progress as progress
        on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
       and progress.student_id between ends.first_user and ends.last_user
       for no key update of progress skip locked
  ), locked_license as materialized (
    select pair.pair_number, license.current_level
      from pair
      join public.user_licenses as license
        on license.user_id = pair.user_id and license.specialization_type = pair.specialization
       and license.user_id between ends.first_user and ends.last_user
       for no key update of license skip locked
  )
  select array_agg(pair.pair_number),
         array_agg(locked_progress.pair_number is not null), array_agg(locked_progress.current_level),
         array_agg(locked_license.pair_number is not null), array_agg(locked_license.current_level)
    into pair_numbers, has_progress, progress_levels, has_license, license_levels
    from pair
    left join locked_progress on locked_progress.pair_number = pair.pair_number
    left join locked_license on locked_license.pair_number = pair.pair_number
   where (locked_progress.pair_number is not null
          or not exists (
            select from public.specialization_progress as progress
             where progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
               and progress.student_id between ends.first_user and ends.last_user))
     and (locked_license.pair_number is not null
          or not exists (
            select from public.user_licenses as license
             where license.user_id = pair.user_id and license.specialization_type = pair.specialization
               and license.user_id between ends.first_user and ends.last_user));
end
$$;

comment on function level_sync._lock_pairs_that_are_free(bigint[], text[]) is
  'Locks the rows of the pairs that nobody holds, without waiting, and returns their numbers, counted from 1, and their levels as locked. A missing row cannot be locked: it may come any time.';

create or replace function level_sync._waiting_pairs(user_ids bigint[], specializations text[], own_entries bigint[])
  returns bigint[]
  language plpgsql
  stable
  set search_path = pg_catalog, pg_temp
  set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  ends record;
begin
  select min(pair.user_id) as first_user, max(pair.user_id) as last_user into ends from unnest(user_ids) as pair (user_id);
  return array(
    select pair.pair_number
      from unnest(user_ids, specializations) with ordinality as pair (user_id, specialization, pair_number)
      join (
        select queued.user_id, queued.specialization
          from level_sync.sync_queue as queued
         where queued.user_id between ends.first_user and ends.last_user
           and queued.queue_id <> all (own_entries)
         union all
        select left_behind.user_id, left_behind.specialization
          from level_sync.pending_pairs as left_behind
         where left_behind.user_id between ends.first_user and ends.last_user
      ) as waiting
        on waiting.user_id = pair.user_id and waiting.specialization = pair.specialization);
end
$$;

comment on function level_sync._waiting_pairs(bigint[], text[], bigint[]) is
  'Numbers, counted from 1, of the pairs for which something waits besides own_entries of sync_queue.';

-- Of a large set, the rows that nobody is in the way of are locked, compared and written in one statement. What was queued
-- is looked at again afterwards: with both rows locked, nothing more can come. The rest of the set is for those who tell
-- one pair from the other, and all of it where that look finds something or a write fails: they meet that error again,
-- wait longer for it, and record it. In a small set there is little to gain.
create or replace function level_sync._carry_undisturbed(
    user_ids bigint[], specializations text[], sides text[], changes text[], source text, run_id bigint,
    actors text[], reasons text[], progress_levels integer[], license_levels integer[], own_entries bigint[])
  returns bigint[]
  language plpgsql
  set search_path = pg_catalog, pg_temp
  set lock_timeout = '1ms'
as $$
declare
  outer_nestloop constant text := current_setting('enable_nestloop');
  outer_work_mem constant text := current_setting('work_mem');
  waiting        bigint;
  arrived        bigint[];
begin
  if cardinality(user_ids) < 100 or 'level_changed' <> any (changes) or sides[1] <> any (sides) then
    return '{}'::bigint[];
  end if;
  if progress_levels is not null then  -- A plan may be old. A drain has taken what waits just now.
    foreach waiting in array level_sync._waiting_pairs(user_ids, specializations, own_entries) loop
      user_ids[waiting] := null;  -- and so has no row
    end loop;
  end if;
  perform level_sync._count_subtransaction();
  begin
    perform level_sync._plan_for_set(user_ids);
    arrived := case sides[1]
      when 'progress' then level_sync._carry_progress_to_licenses(
        user_ids, specializations, sides, changes, source, run_id, actors, reasons, true, progress_levels, license_levels)
      else level_sync._carry_licenses_to_progress(
        user_ids, specializations, sides, changes, source, run_id, actors, reasons, true, license_levels, progress_levels)
    end;
    perform set_config('enable_nestloop', outer_nestloop, true),
            set_config('work_mem', outer_work_mem, true);
    if level_sync._waiting_pairs(user_ids, specializations, own_entries) && arrived then
      raise object_not_in_prerequisite_state using message = 'a pair was written while its set was carried';
    end if;
  exception when others or assert_failure then
    return '{}'::bigint[];
  end;
  return arrived;
end
$$;

comment on function level_sync._carry_undisturbed(bigint[], text[], text[], text[], text, bigint, text[], text[], integer[], integer[], bigint[]) is
  'Of many pairs whose level was changed on one side: carries those of which both rows are there and held by nobody, for which nothing waits besides own_entries of sync_queue, and if levels are given still have them. Returns their numbers, counted from 1, locked and equal.';

create or replace function level_sync._drain_batch(due_before timestamptz)
  returns integer
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
  set lock_timeout = '100ms'
  set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  rule             record;
  ripe             record;
  pairs            record;
  taken_count      integer;
  done             bigint[];
  lockable         record;
  newer            bigint[];
  free             record;
  failures         record;
begin
  select settings.batch_size, settings.max_attempts, settings.retry_backoff
    into rule
    from level_sync.settings;

  -- Only pairs of committed transactions that could not finish their own set can be seen here.
  with left_behind as (
    delete from level_sync.pending_pairs as pending
     where pending.ctid = any (array(
             select waiting.ctid from level_sync.pending_pairs as waiting
              where waiting.transaction_id <> pg_current_xact_id()
                for update skip locked))
    returning pending.*
  )
  insert into level_sync.sync_queue
         (queued_at, next_attempt_at, user_id, specialization, side, change, sqlstate, message, actor, reason)
  select left_behind.queued_at, left_behind.queued_at, left_behind.user_id, left_behind.specialization, left_behind.side,
         case left_behind.change when 'moved_from' then 'deleted' when 'moved_to' then 'created' else left_behind.change end,
         '00000', 'left behind by its transaction', left_behind.actor, left_behind.reason
    from left_behind
   where left_behind.change <> 'left'
   order by left_behind.pending_id;

  -- Locked, so that a pair whose ripe entry another drain holds is not taken up again and again for its other entries.
  select array_agg(entry.user_id) as user_ids, array_agg(entry.specialization) as specializations,
         min(entry.user_id) as first_user, max(entry.user_id) as last_user
    into ripe
    from (
      select queued.user_id, queued.specialization
        from level_sync.sync_queue as queued
       where queued.dead_at is null
         and queued.next_attempt_at <= due_before
       order by queued.next_attempt_at
       limit rule.batch_size
         for update skip locked
    ) as entry;
  if ripe.user_ids is null then
    return 0;
  end if;

  -- Coalesced: the newest entry of a pair tells which side was written last.
  with taken as materialized (
    select queued.user_id, queued.specialization, queued.side, queued.change, queued.queue_id, queued.queued_at,
           queued.attempts, queued.dead_at, queued.actor, queued.reason
      from level_sync.sync_queue as queued
     where queued.user_id between ripe.first_user and ripe.last_user
       and exists (
             select from unnest(ripe.user_ids, ripe.specializations) as pair (user_id, specialization)
              where pair.user_id = queued.user_id and pair.specialization = queued.specialization)
       for update skip locked
  ), ranked as materialized (
    select taken.user_id, taken.specialization, taken.side, taken.change, taken.queue_id, taken.actor, taken.reason,
           row_number() over pair as place,
           max(taken.attempts) filter (where taken.dead_at is null) over pair as attempts
      from taken
    window pair as (
             partition by taken.user_id, taken.specialization order by taken.queued_at desc, taken.queue_id desc
             rows between unbounded preceding and unbounded following)
  ), newest as (
    select array_agg(ranked.user_id) as user_ids, array_agg(ranked.specialization) as specializations,
           array_agg(ranked.side) as sides, array_agg(ranked.change) as changes, array_agg(ranked.queue_id) as queue_ids,
           array_agg(ranked.attempts) as attempts, array_agg(ranked.actor) as actors, array_agg(ranked.reason) as reasons
      from ranked
     where ranked.place = 1
  )
  select newest.*, array(select ranked.queue_id from ranked where ranked.place > 1) as older_ids into pairs from newest;
  if pairs.older_ids <> '{}' then
    delete from level_sync.sync_queue as queued
     where queued.user_id between ripe.first_user and ripe.last_user
       and queued.queue_id = any (pairs.older_ids);
  end if;

  taken_count := cardinality(pairs.user_ids);
  done := level_sync._carry_undisturbed(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes, 'trigger', null,
                                        pairs.actors, pairs.reasons, null, null, pairs.queue_ids);
  if done <> '{}' then
    delete from level_sync.sync_queue as queued
     using unnest(pairs.user_ids, pairs.queue_ids) with ordinality as pair (user_id, queue_id, pair_number)
     where pair.pair_number = any (done)
       and queued.user_id between ripe.first_user and ripe.last_user
       and queued.user_id = pair.user_id
       and queued.queue_id = pair.queue_id;
    if cardinality(done) = taken_count then
      return taken_count;
    end if;
    select array_agg(pair.user_id) as user_ids, array_agg(pair.specialization) as specializations,
           array_agg(pair.side) as sides, array_agg(pair.change) as changes, array_agg(pair.queue_id) as queue_ids,
           array_agg(pair.attempts) as attempts, array_agg(pair.actor) as actors, array_agg(pair.reason) as reasons
      into pairs
      from unnest(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes, pairs.queue_ids, pairs.attempts,
                  pairs.actors, pairs.reasons)
             with ordinality as pair (user_id, specialization, side, change, queue_id, attempts, actor, reason, pair_number)
     where pair.pair_number <> all (done);
  end if;

  -- A statement of its own: the next one's snapshot has what was queued until the locks were taken.
  select * into lockable from level_sync._lock_pairs_that_are_free(pairs.user_ids, pairs.specializations);
  -- Written since the queue was read: the newer entry, not this one, knows the side.
  newer := level_sync._waiting_pairs(pairs.user_ids, pairs.specializations, pairs.queue_ids);

  -- The row that was written may be gone, by a way that triggers do not see: then the one that is left is the truth.
  -- And one whose deletion waits here may have come back.
  -- A missing row cannot be locked: should it come just now, the higher of the two levels stands, as for any insert.
  select array_agg(pair.user_id) as user_ids, array_agg(pair.specialization) as specializations,
         array_agg(pair.side) as sides, array_agg(pair.change) as changes, array_agg(pair.queue_id) as queue_ids,
         array_agg(pair.attempts) as attempts, array_agg(pair.actor) as actors, array_agg(pair.reason) as reasons
    into free
    from (
      select pair.user_id, pair.specialization, pair.queue_id, pair.attempts, pair.actor, pair.reason,
             case when pair.change = 'deleted' then pair.side
                  when locked.has_license and not locked.has_progress then 'license'
                  when locked.has_progress and not locked.has_license then 'progress'
                  else pair.side end as side,
             case when pair.change = 'level_changed' and not (locked.has_progress and locked.has_license)
                    or pair.change = 'deleted' and case pair.side when 'progress' then locked.has_progress else locked.has_license end
                  then 'created' else pair.change end as change
        from unnest(lockable.pair_numbers, lockable.has_progress, lockable.has_license)
               as locked (pair_number, has_progress, has_license)
        join unnest(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes, pairs.queue_ids, pairs.attempts,
                    pairs.actors, pairs.reasons)
               with ordinality as pair (user_id, specialization, side, change, queue_id, attempts, actor, reason, pair_number)
          on pair.pair_number = locked.pair_number
       where pair.pair_number <> all (newer)
       order by pair.pair_number
    ) as pair;

  -- Somebody else is at work on these: not a failure, only later.
  update level_sync.sync_queue as queued
     set next_attempt_at = clock_timestamp() + rule.retry_backoff,
         attempts = coalesce(pair.attempts, 0)
    from unnest(pairs.user_ids, pairs.queue_ids, pairs.attempts) as pair (user_id, queue_id, attempts)
   where queued.user_id = pair.user_id
     and queued.queue_id = pair.queue_id
     and pair.queue_id <> all (coalesce(free.queue_ids, '{}'));
  if free.user_ids is null then
    return taken_count;
  end if;

  select * into failures
    from level_sync._carry_pairs_that_can(free.user_ids, free.specializations, free.sides, free.changes,
                                          'trigger', null, 1000000, free.actors, free.reasons);

  with outcome as materialized (
    select pair.user_id, pair.queue_id,
           -- Held by somebody, or made by somebody who has not committed yet: later, as above.
           coalesce(pair.attempts, 0) + case when failed.state in ('55P03', '40P01') then 0 else 1 end as attempts,
           failed.pair_number is null as is_done,
           coalesce(failed.state, '55000') as state,
           coalesce(failed.message, 'the level did not arrive: a trigger of the other table changed or dropped the write') as message
      from unnest(free.user_ids, free.queue_ids, free.attempts) with ordinality
             as pair (user_id, queue_id, attempts, pair_number)
      left join unnest(failures.failed_numbers, failures.failed_sqlstates, failures.failed_messages)
                  as failed (pair_number, state, message)
        on failed.pair_number = pair.pair_number
  ), done as (
    delete from level_sync.sync_queue as queued
     using outcome
     where outcome.is_done
       and queued.user_id between ripe.first_user and ripe.last_user
       and queued.user_id = outcome.user_id
       and queued.queue_id = outcome.queue_id
  )
  update level_sync.sync_queue as queued
     set attempts        = outcome.attempts,
         sqlstate        = outcome.state,
         message         = outcome.message,
         next_attempt_at = clock_timestamp() + rule.retry_backoff * power(2, least(greatest(outcome.attempts - 1, 0), 10)),
         dead_at         = case when outcome.attempts >= rule.max_attempts then clock_timestamp() end
    from outcome
   where not outcome.is_done
     and queued.user_id = outcome.user_id
     and queued.queue_id = outcome.queue_id;

  return taken_count;
end
$$;

comment on function level_sync._drain_batch(timestamptz) is
  'Tries one batch of the pairs that were due at a moment, in one transaction. Returns how many pairs it took; 0 when none is left.';

-- Whether a CALL may commit, nothing tells. A COMMIT in a block that catches errors is always refused: with one message
-- where no COMMIT would be allowed, with another where only the block forbids it. A function hears the first one, in the
-- server's language.
create or replace function level_sync._refusal_to_commit()
  returns text
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  refusal text;
begin
  begin
    commit;
  exception when invalid_transaction_termination then
    refusal := sqlerrm;
  end;
  return refusal;
end
$$;

comment on function level_sync._refusal_to_commit() is
  'What PostgreSQL says to a COMMIT inside a transaction that somebody else has begun.';

create or replace procedure level_sync._look_for_transaction(inout is_inside_transaction boolean)
  language plpgsql
as $$
begin
  commit;
exception when invalid_transaction_termination then
  is_inside_transaction := sqlerrm operator(pg_catalog.=) level_sync._refusal_to_commit();
end
$$;

comment on procedure level_sync._look_for_transaction(boolean) is
  'Tells a procedure that calls it whether it is inside a transaction that somebody else has begun, and so may not commit.';

-- A procedure that commits can neither be SECURITY DEFINER nor have a SET clause: what a function would pin there is
-- set again after each COMMIT. READ COMMITTED, so that a look after a lock sees what was committed before it; other
-- people's deferred constraints at once, so that they fail inside a batch and not at its COMMIT, where nothing can
-- catch them.
create or replace procedure level_sync._begin_batch(is_inside_transaction boolean)
  language plpgsql
as $$
begin
  if not is_inside_transaction then
    commit;
    set transaction isolation level read committed;
    set constraints all immediate;
  end if;
  set local search_path = pg_catalog, pg_temp;
end
$$;

comment on procedure level_sync._begin_batch(boolean) is
  'Ends the batch before and begins the next one in a transaction of its own, or in the caller''s where that has begun one.';

create or replace procedure level_sync.drain_queue()
  language plpgsql
as $$
declare
  outer_path            constant text        := pg_catalog.current_setting('search_path');
  started_at            constant timestamptz := pg_catalog.clock_timestamp();
  is_inside_transaction boolean;
  taken                 integer;
  tries                 integer := 0;
begin
  call level_sync._look_for_transaction(is_inside_transaction);
  call level_sync._begin_batch(is_inside_transaction);
  loop
    -- SKIP LOCKED skips no row whose newer version somebody is writing right now: PostgreSQL waits for that one.
    begin
      taken := level_sync._drain_batch(started_at);
      tries := 0;
    exception when serialization_failure or deadlock_detected or lock_not_available then
      tries := tries + 1;
      if tries = 3 then
        raise;
      end if;
    end;
    exit when taken = 0;
    call level_sync._begin_batch(is_inside_transaction);
    if tries > 0 then
      perform pg_sleep(0.1 * tries);
    end if;
  end loop;
  perform set_config('search_path', outer_path, true);
end
$$;

comment on procedure level_sync.drain_queue() is
  'Tries every due pair of sync_queue again, from the live rows, batch_size pairs a transaction. Inside a transaction block it works as one transaction. What fails waits for retry_backoff, twice as long each time, and is dead after max_attempts.';
