-- The drain tries the queued pairs again, from the live rows. It locks both rows of a pair before it looks at them, and
-- skips what somebody else has locked.

-- Of a large set, the rows that nobody else has locked are locked, compared and written in one statement. What was queued
-- is looked at again afterwards: with both rows locked, nothing more can come. The rest of the set takes the slow path,
-- and all of it where that look finds something or a write fails: it meets that error again, waits longer for it, and
-- records it. In a small set there is little to gain.
create or replace function level_sync._carry_uncontended(
    pairs level_sync.pair[], source text, run_id bigint, as_planned boolean, ignored_entries bigint[])
  returns bigint[] language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '1ms'
as $$
declare
  synced  bigint[];
  waiting bigint;
begin
  if cardinality(pairs) < 100 then
    return '{}'::bigint[];
  end if;
  if as_planned then  -- A plan may be old. A drain has taken what waits just now.
    foreach waiting in array level_sync._waiting_ordinals(pairs, ignored_entries) loop
      pairs[waiting] := null;  -- and so has no row
    end loop;
  end if;
  perform set_config('level_sync.outer_nestloop', current_setting('enable_nestloop'), true);
  begin
    synced := level_sync._carry_levels(pairs, source, run_id, as_planned);
    if level_sync._waiting_ordinals(pairs, ignored_entries) && synced then
      raise object_not_in_prerequisite_state using message = 'a pair was written while its set was carried';
    end if;
  exception when others or assert_failure then
    return '{}'::bigint[];
  end;
  return synced;
end
$$;
comment on function level_sync._carry_uncontended(level_sync.pair[], text, bigint, boolean, bigint[]) is 'Of many pairs: carries those that have both rows, locked by nobody else, for which nothing waits besides the ignored entries of sync_queue, and, as_planned, that still have the levels given. Returns their numbers, counted from 1: locked and equal.';

create or replace function level_sync._queue_orphaned_pairs()
  returns void language sql set search_path = pg_catalog, pg_temp
as $$
  with orphaned as (
    delete from level_sync.pending_pairs as pending
     where pending.ctid = any (array(
             select waiting.ctid from level_sync.pending_pairs as waiting
              where waiting.transaction_id <> pg_current_xact_id()
                for update skip locked))
    returning pending.*
  )
  insert into level_sync.sync_queue
         (queued_at, next_attempt_at, user_id, specialization, side, change, sqlstate, message, actor, reason)
  select orphaned.queued_at, orphaned.queued_at, orphaned.user_id, orphaned.specialization, orphaned.side,
         case orphaned.change when 'moved_from' then 'deleted' when 'moved_to' then 'created' else orphaned.change end,
         '00000', 'its transaction could not carry it', orphaned.actor, orphaned.reason
    from orphaned
   where orphaned.change <> 'departed'
   order by orphaned.pending_id
$$;
comment on function level_sync._queue_orphaned_pairs() is 'Queues the pairs of transactions that have committed without carrying them: only those can be seen here.';

create or replace function level_sync._take_due_pairs(due_before timestamptz, batch_size integer)
  returns level_sync.pair[] language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  due    record;
  newest record;
begin
  -- Locked, so that a pair whose due entry another drain has locked is not taken up again and again for its other entries.
  select array_agg(level_sync._pair(entry.user_id, entry.specialization, null, null, null, null)) as pairs,
         min(entry.user_id) as first_user, max(entry.user_id) as last_user
    into due
    from (
      select queued.user_id, queued.specialization
        from level_sync.sync_queue as queued
       where queued.dead_at is null
         and queued.next_attempt_at <= due_before
       order by queued.next_attempt_at
       limit batch_size
         for update skip locked
    ) as entry;
  if due.pairs is null then
    return null;
  end if;

  -- Coalesced: the newest entry of a pair tells which side was written last.
  with taken as materialized (
    select queued.user_id, queued.specialization, queued.side, queued.change, queued.queue_id, queued.queued_at,
           queued.attempts, queued.dead_at, queued.actor, queued.reason
      from level_sync.sync_queue as queued
     where queued.user_id between due.first_user and due.last_user
       and exists (
             select from unnest(due.pairs) as pair
              where pair.user_id = queued.user_id and pair.specialization = queued.specialization)
       for update skip locked
  ), ranked as materialized (
    select taken.user_id, taken.specialization, taken.side, taken.change, taken.queue_id, taken.actor, taken.reason,
           row_number() over pair as rank,
           max(taken.attempts) filter (where taken.dead_at is null) over pair as attempts
      from taken
    window pair as (
             partition by taken.user_id, taken.specialization order by taken.queued_at desc, taken.queue_id desc
             rows between unbounded preceding and unbounded following)
  )
  select array_agg(level_sync._pair(ranked.user_id, ranked.specialization, ranked.side, ranked.change, ranked.actor, ranked.reason,
                                    queue_id => ranked.queue_id, attempts => coalesce(ranked.attempts, 0)))
           filter (where ranked.rank = 1) as pairs,
         array_agg(ranked.queue_id) filter (where ranked.rank > 1) as older_entries
    into newest
    from ranked;
  if newest.older_entries is not null then
    delete from level_sync.sync_queue as queued
     where queued.user_id between due.first_user and due.last_user
       and queued.queue_id = any (newest.older_entries);
  end if;
  return newest.pairs;
end
$$;
comment on function level_sync._take_due_pairs(timestamptz, integer) is 'Takes a batch of the pairs that were due at a moment, each with its newest entry alone; NULL where none is left.';

create or replace function level_sync._queue_ids(pairs level_sync.pair[])
  returns bigint[] language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select array(select pair.queue_id from unnest(pairs) as pair)
$$;
comment on function level_sync._queue_ids(level_sync.pair[]) is 'The entries of sync_queue that these pairs come from.';

create or replace function level_sync._dequeue(pairs level_sync.pair[])
  returns void language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan
as $$
declare
  done record;
begin
  select array_agg(pair.queue_id) as entries, min(pair.user_id) as first_user, max(pair.user_id) as last_user
    into done
    from unnest(pairs) as pair;
  delete from level_sync.sync_queue as queued
   where queued.user_id between done.first_user and done.last_user
     and queued.queue_id = any (done.entries);
end
$$;
comment on function level_sync._dequeue(level_sync.pair[]) is 'Deletes the entries that these pairs come from.';

create or replace function level_sync._postpone(pairs level_sync.pair[])
  returns void language sql set search_path = pg_catalog, pg_temp
as $$
  update level_sync.sync_queue as queued
     set next_attempt_at = clock_timestamp() + settings.retry_backoff,
         attempts = pair.attempts
    from level_sync.settings, unnest(pairs) as pair
   where queued.user_id = pair.user_id
     and queued.queue_id = pair.queue_id
$$;
comment on function level_sync._postpone(level_sync.pair[]) is 'For pairs that somebody else is writing: their entries are due again after retry_backoff, and no attempt is counted.';

create or replace function level_sync._record_failures(pairs level_sync.pair[])
  returns void language sql set search_path = pg_catalog, pg_temp
as $$
  update level_sync.sync_queue as queued
     set attempts        = failed.attempts,
         sqlstate        = failed.sqlstate,
         message         = failed.message,
         next_attempt_at = clock_timestamp() + settings.retry_backoff * power(2, least(greatest(failed.attempts - 1, 0), 10)),
         dead_at         = case when failed.attempts >= settings.max_attempts then clock_timestamp() end
    from level_sync.settings, (
      -- Locked by somebody, or made by somebody who has not committed yet: only later.
      select pair.user_id, pair.queue_id, pair.sqlstate, pair.message,
             pair.attempts + case when pair.sqlstate in ('55P03', '40P01') then 0 else 1 end as attempts
        from unnest(pairs) as pair
    ) as failed
   where queued.user_id = failed.user_id
     and queued.queue_id = failed.queue_id
$$;
comment on function level_sync._record_failures(level_sync.pair[]) is 'Keeps the error of each pair in its entry, which is due again after the back-off, or dead after max_attempts.';

create or replace function level_sync._drain_batch(due_before timestamptz)
  returns integer language plpgsql security definer
  set search_path = pg_catalog, pg_temp set lock_timeout = '100ms' set plan_cache_mode = force_custom_plan
  set jit = off
as $$
declare
  pairs      level_sync.pair[];
  due        level_sync.pair[];
  failed     level_sync.pair[];
  synced     bigint[];
  pair_count integer;
begin
  perform level_sync._queue_orphaned_pairs();
  pairs := level_sync._take_due_pairs(due_before, (select settings.batch_size from level_sync.settings));
  if pairs is null then
    return 0;
  end if;
  pair_count := cardinality(pairs);

  synced := level_sync._carry_uncontended(pairs, 'trigger', null, false, level_sync._queue_ids(pairs));
  if synced <> '{}' then
    perform level_sync._dequeue(level_sync._pairs_at(pairs, synced));
    pairs := level_sync._pairs_except(pairs, synced);
    if pairs = '{}' then
      return pair_count;
    end if;
  end if;

  due := level_sync._lock_pairs(pairs);
  -- A statement of its own, whose snapshot has what was queued until the locks were taken: the newer entry knows the side.
  due := level_sync._pairs_except(due, level_sync._waiting_ordinals(due, level_sync._queue_ids(pairs)));
  perform level_sync._postpone(level_sync._pairs_without(pairs, due));
  if due <> '{}' then
    failed := level_sync._carry_or_isolate(due, 'trigger', null);
    perform level_sync._record_failures(failed);
    perform level_sync._dequeue(level_sync._pairs_without(due, failed));
  end if;
  return pair_count;
end
$$;
comment on function level_sync._drain_batch(timestamptz) is 'Tries one batch of the pairs that were due at a moment, in one transaction. Returns how many pairs it took; 0 when none is left.';

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
  call level_sync._detect_outer_transaction(is_inside_transaction);
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
comment on procedure level_sync.drain_queue() is 'Tries every due pair of sync_queue again, from the live rows, batch_size pairs a transaction. Inside a transaction block it works as one transaction. What fails waits for retry_backoff, twice as long each time, and is dead after max_attempts.';
