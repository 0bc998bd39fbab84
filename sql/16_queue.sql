-- Where a pair waits that could not be carried at once: until the commit of its transaction (pending_pairs), or
-- until a drain (sync_queue). Only the pair and the side that was written are kept, never a level.

create or replace function level_sync._enqueue(pairs level_sync.pair[])
  returns boolean language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '100ms'
as $$
begin
  perform level_sync._count_subtransaction();
  begin
    insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, actor, reason)
    select pair.user_id, pair.specialization, pair.side, pair.change, pair.sqlstate, left(pair.message, 1000), pair.actor,
           pair.reason
      from unnest(pairs) as pair;
    return true;
  exception
    when serialization_failure then
      raise;
    when others then
      raise warning using
        message = format('level_sync could neither carry nor queue %s pair(s), first user %s in %s: %s',
                         cardinality(pairs), (pairs[1]).user_id, (pairs[1]).specialization, sqlerrm),
        detail  = (pairs[1]).message,
        hint    = 'The write stands. The next reconcile finds the pairs; level_sync.desync_issues shows them.';
      return false;
  end;
end
$$;
comment on function level_sync._enqueue(level_sync.pair[]) is 'Queues pairs, with their errors, for the next drain. Where that is impossible it warns and returns false; the write stands.';

-- A row of a bulk write finds the limit without a query. A limit that somebody lowers meanwhile is seen by the set.
create or replace function level_sync._is_level_allowed(specialization text, level bigint)
  returns boolean language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  limits  constant text := coalesce(current_setting('level_sync.limits', true), '');
  highest bigint;
begin
  select coalesce(known.max_levels, 2147483647)
    into highest
    from public.specializations as known
   where known.id = _is_level_allowed.specialization;
  if highest is not null and length(limits) < 1000 then
    perform set_config('level_sync.limits',
                       e'\x01' || specialization || e'\x02' || lpad(highest::text, 10) || limits, true);
  end if;
  return highest is not null and level_sync._is_level_in_range(level, highest);
end
$$;
comment on function level_sync._is_level_allowed(text, bigint) is 'Whether the specialization has this level. Remembers its limit until the transaction ends, for the rows to come.';

create or replace function level_sync._defer_pair(pair level_sync.pair)
  returns void language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '100ms'
as $$
declare
  pending constant text := coalesce(current_setting('level_sync.pending', true), '');
begin
  if pending = 'abandoned' then
    return;
  elsif pending = 'on' or level_sync._used_subtransactions() > level_sync._write_budget() then
    -- No subtransaction for each pair of many. Where none is left to arm the commit, the pair stays for the drain.
    insert into level_sync.pending_pairs (user_id, specialization, side, change)
    values (pair.user_id, pair.specialization, pair.side, pair.change);
    return;
  end if;

  perform level_sync._count_subtransaction();
  begin
    -- After SET CONSTRAINTS ALL IMMEDIATE each further pair would be carried as a set of one.
    set constraints level_sync.pending_pairs_committed deferred;
    insert into level_sync.pending_pairs (user_id, specialization, side, change)
    values (pair.user_id, pair.specialization, pair.side, pair.change);
    insert into level_sync.pending_commits (act) values ('carry');
    perform set_config('level_sync.pending', 'on', true);
  exception
    when serialization_failure then
      raise;
    when others then
      perform level_sync._enqueue(array[level_sync._failed(pair, sqlstate, sqlerrm)]);
      if level_sync._used_subtransactions() > level_sync._write_budget() - 8 then
        perform set_config('level_sync.pending', 'abandoned', true);
        raise warning using
          message = format('level_sync neither carries nor queues further pairs of this transaction: %s', sqlerrm),
          hint    = 'The writes stand. The next reconcile finds the pairs; level_sync.desync_issues shows them.';
      end if;
  end;
end
$$;
comment on function level_sync._defer_pair(level_sync.pair) is 'Leaves a pair to the commit of this transaction, or to SET CONSTRAINTS ALL IMMEDIATE if that comes first.';

-- A moved row has left one pair, as a delete does, and come to another, as an insert does. Where the commit cannot be
-- armed, the pairs go to the queue as just that.
create or replace function level_sync._defer_move(departed level_sync.pair, arrived level_sync.pair)
  returns void language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '100ms'
as $$
declare
  is_armed constant boolean := coalesce(current_setting('level_sync.moves', true), '') = 'on';
  is_spent constant boolean := level_sync._used_subtransactions() > level_sync._write_budget();
begin
  if is_armed or is_spent then
    insert into level_sync.pending_pairs (user_id, specialization, side, change)
    select place.user_id, place.specialization, place.side, place.change
      from (values (departed.user_id, departed.specialization, departed.side, 'moved_from'),
                   (arrived.user_id, arrived.specialization, arrived.side, 'moved_to'))
             as place (user_id, specialization, side, change)
     where place.user_id is not null and place.specialization is not null;
    if not is_armed then
      insert into level_sync.pending_commits (act) values ('check_moves');
      perform set_config('level_sync.moves', 'on', true);
    end if;
    return;
  end if;

  perform level_sync._count_subtransaction();
  begin
    set constraints level_sync.moves_committed deferred;
    insert into level_sync.pending_commits (act) values ('check_moves');
    perform set_config('level_sync.moves', 'on', true);
    perform level_sync._defer_move(departed, arrived);
  exception
    when serialization_failure then
      raise;
    when others then
      perform level_sync._enqueue(level_sync._all_failed(array[departed, arrived], sqlstate, sqlerrm));
  end;
end
$$;
comment on function level_sync._defer_move(level_sync.pair, level_sync.pair) is 'Leaves the two places of a moved row to be checked at the commit of this transaction, or at SET CONSTRAINTS ALL IMMEDIATE if that comes first.';

create or replace function level_sync._waiting_ordinals(pairs level_sync.pair[], ignored_entries bigint[])
  returns bigint[] language plpgsql stable
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  user_range record;
begin
  select * into user_range from level_sync._user_range(pairs);
  return array(
    select pair.ordinality
      from unnest(pairs) with ordinality as pair
      join (
        select queued.user_id, queued.specialization
          from level_sync.sync_queue as queued
         where queued.user_id between user_range.first_user and user_range.last_user
           and queued.queue_id <> all (ignored_entries)
         union  -- each pair once
        select orphaned.user_id, orphaned.specialization
          from level_sync.pending_pairs as orphaned
         where orphaned.user_id between user_range.first_user and user_range.last_user
      ) as waiting
        on waiting.user_id = pair.user_id and waiting.specialization = pair.specialization);
end
$$;
comment on function level_sync._waiting_ordinals(level_sync.pair[], bigint[]) is 'Numbers, counted from 1, of the pairs for which something waits besides the ignored entries of sync_queue.';
