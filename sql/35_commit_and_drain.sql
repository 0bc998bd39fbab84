-- The set that a transaction carries at its commit, and the drain of what was queued. Both bring pairs into step
-- by the rules of the two files before this one, find the few that fail, and queue those.

create or replace function level_sync._carry_pairs(
    user_ids bigint[], specializations text[], sides text[], changes text[], source text, run_id bigint default null)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
begin
  perform level_sync._carry_progress_to_licenses(user_ids, specializations, sides, changes, source, run_id);
  perform level_sync._carry_licenses_to_progress(user_ids, specializations, sides, changes, source, run_id);
end
$$;

comment on function level_sync._carry_pairs(bigint[], text[], text[], text[], text, bigint) is
  'Brings pairs into step: the other side follows the side that was written; what was created never demotes.';

create or replace function level_sync._carry_pair(
    user_id bigint, specialization text, side text, change text, source text, run_id bigint default null)
  returns void
  language sql
  set search_path = pg_catalog, pg_temp
as $$
  select level_sync._carry_pairs(array[user_id], array[specialization], array[side], array[change], source, run_id)
$$;

comment on function level_sync._carry_pair(bigint, text, text, text, text, bigint) is 'Brings one pair into step.';

-- What a carry has to leave behind: both rows with one level, or no row on either side.
create or replace function level_sync._unequal_pairs(user_ids bigint[], specializations text[])
  returns table (pair_number bigint, user_id bigint, specialization text)
  language plpgsql
  stable
  set search_path = pg_catalog, pg_temp
  set plan_cache_mode = force_custom_plan
as $$
begin
  return query
    select pair.pair_number, pair.user_id, pair.specialization
      from unnest(user_ids, specializations) with ordinality as pair (user_id, specialization, pair_number)
      left join public.specialization_progress as progress
        on progress.student_id = pair.user_id and progress.specialization_id = pair.specialization
      left join public.user_licenses as license
        on license.user_id = pair.user_id and license.specialization_type = pair.specialization
     where (progress.student_id is null) <> (license.user_id is null)
        or progress.current_level is distinct from license.current_level;
end
$$;

comment on function level_sync._unequal_pairs(bigint[], text[]) is
  'The pairs, numbered from 1 as given, that have two levels or only one row.';

create or replace function level_sync._refuse_difference(user_id bigint, specialization text)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from level_sync._unequal_pairs(array[user_id], array[specialization])) then
    raise lock_not_available using message =
      'the level did not arrive: the other row is held by another transaction, or a trigger there changed or dropped the write';
  end if;
end
$$;

comment on function level_sync._refuse_difference(bigint, text) is
  'Raises lock_not_available where a pair is not equal after it was carried.';

-- Carries what can be carried and tells the failures apart, in few subtransactions: a set that fails is done again
-- in chunks, the chunk that fails pair by pair, and the rest without the pair that failed.
create or replace function level_sync._carry_pairs_that_can(
    user_ids bigint[], specializations text[], sides text[], changes text[], source text, run_id bigint,
    subtransaction_limit integer,
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
begin
  failed_numbers := '{}'; failed_sqlstates := '{}'; failed_messages := '{}';

  perform level_sync._count_subtransaction();
  begin
    perform level_sync._carry_pairs(user_ids, specializations, sides, changes, source, run_id);
    return;
  exception when others or assert_failure then
    if sqlstate = '40001' then
      raise;
    end if;
  end;

  while first_pair <= pair_count and level_sync._count_subtransaction() + 2 <= subtransaction_limit loop
    begin
      for chunk in 0 .. (pair_count - first_pair) / chunk_size loop
        chunk_from := first_pair + chunk * chunk_size;
        chunk_to   := least(chunk_from + chunk_size - 1, pair_count);
        perform level_sync._carry_pairs(user_ids[chunk_from:chunk_to], specializations[chunk_from:chunk_to],
                                        sides[chunk_from:chunk_to], changes[chunk_from:chunk_to], source, run_id);
      end loop;
      return;
    exception when others or assert_failure then
      if sqlstate = '40001' then
        raise;
      end if;
    end;

    suspect := chunk_to + 1;
    perform level_sync._count_subtransaction();
    begin
      for pair in chunk_from .. chunk_to loop
        suspect := pair;
        perform level_sync._carry_pair(user_ids[pair], specializations[pair], sides[pair], changes[pair], source, run_id);
      end loop;
      suspect := chunk_to + 1;
    exception when others or assert_failure then
      if sqlstate = '40001' then
        raise;
      end if;
      failed_numbers   := failed_numbers || suspect::bigint;
      failed_sqlstates := failed_sqlstates || sqlstate::text;
      failed_messages  := failed_messages || sqlerrm::text;
    end;

    perform level_sync._count_subtransaction();
    begin
      perform level_sync._carry_pairs(user_ids[first_pair:suspect - 1], specializations[first_pair:suspect - 1],
                                      sides[first_pair:suspect - 1], changes[first_pair:suspect - 1], source, run_id);
    exception when others or assert_failure then
      if sqlstate = '40001' then
        raise;
      end if;
    end;
    first_pair := suspect + 1;
  end loop;
end
$$;

comment on function level_sync._carry_pairs_that_can(bigint[], text[], text[], text[], text, bigint, integer) is
  'Carries the pairs it can and returns the numbers of those that failed, with their errors, without using more subtransactions than allowed.';

create or replace function level_sync.carry_pending_pairs()
  returns trigger
  language plpgsql
  security definer
  set search_path = pg_catalog, pg_temp
as $$
declare
  outer_lock_timeout text := current_setting('lock_timeout');
  rule               record;
  pairs              record;
  failures           record;
  unfinished         record;
begin
  perform set_config('level_sync.pending', '', true);

  select settings.on_error, greatest(1, extract(epoch from settings.lock_wait) * 1000)::integer::text as lock_timeout
    into rule
    from level_sync.settings;

  -- The last write of a pair decides which side the other one follows.
  with taken as (
    delete from level_sync.pending_pairs as pending
     where pending.transaction_id = new.transaction_id
    returning pending.pending_id, pending.user_id, pending.specialization, pending.side, pending.change
  ), latest as (
    select distinct on (taken.user_id, taken.specialization) taken.*
      from taken
     order by taken.user_id, taken.specialization, taken.pending_id desc
  )
  select array_agg(latest.user_id) as user_ids, array_agg(latest.specialization) as specializations,
         array_agg(latest.side) as sides, array_agg(latest.change) as changes
    into pairs
    from latest;
  if pairs.user_ids is null then
    return null;
  end if;

  perform set_config('lock_timeout', rule.lock_timeout, true);
  if rule.on_error = 'raise' then
    perform level_sync._carry_pairs(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes, 'trigger');
  else
    select * into failures
      from level_sync._carry_pairs_that_can(pairs.user_ids, pairs.specializations, pairs.sides, pairs.changes,
                                            'trigger', null, 60);
  end if;
  perform set_config('lock_timeout', outer_lock_timeout, true);

  select array_agg(unequal.user_id) as user_ids, array_agg(unequal.specialization) as specializations,
         array_agg(pair.side) as sides, array_agg(pair.change) as changes,
         array_agg(coalesce(failed.state, '55P03')) as sqlstates,
         array_agg(coalesce(failed.message, 'the other row is held by another transaction, or too many others failed')) as messages
    into unfinished
    from level_sync._unequal_pairs(pairs.user_ids, pairs.specializations) as unequal
    join unnest(pairs.sides, pairs.changes) with ordinality as pair (side, change, pair_number)
      on pair.pair_number = unequal.pair_number
    left join unnest(failures.failed_numbers, failures.failed_sqlstates, failures.failed_messages)
                as failed (pair_number, state, message)
      on failed.pair_number = unequal.pair_number;
  if unfinished.user_ids is not null then
    if rule.on_error = 'raise' then
      perform level_sync._refuse_difference(unfinished.user_ids[1], unfinished.specializations[1]);
    end if;
    perform level_sync._enqueue(unfinished.user_ids, unfinished.specializations, unfinished.sides, unfinished.changes,
                                unfinished.sqlstates, unfinished.messages);
  end if;
  return null;
exception when others or assert_failure then
  if rule.on_error = 'raise' or sqlstate = '40001' then
    raise;
  end if;
  raise warning using
    message = format('level_sync could not carry the pairs of this transaction: %s', sqlerrm),
    hint    = 'The writes stand. The next reconcile finds the pairs; level_sync.desync_issues shows them.';
  return null;
end
$$;

comment on function level_sync.carry_pending_pairs() is
  'Carries, at commit or at SET CONSTRAINTS ALL IMMEDIATE, the pairs this transaction left for then; queues what it cannot.';

select level_sync._ensure_trigger('level_sync.pending_pairs', 'pending_pairs_committed', $trigger$
  create constraint trigger pending_pairs_committed
    after insert on level_sync.pending_pairs
    deferrable initially deferred
    for each row
    when (new.arms_commit)
    execute function level_sync.carry_pending_pairs()
$trigger$, 'Carries the pairs of a transaction when it commits.');
