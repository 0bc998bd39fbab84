-- Where a pair waits that could not be carried at once: until the commit of its transaction (pending_pairs), or
-- until a drain (sync_queue). Only the pair and the side that was written are kept, never a level.
--
-- Five transaction-local settings steer this; none is needed for correctness:
--   level_sync.own_depth        trigger depth at which our own statement runs: its echo needs no second look
--   level_sync.subtransactions  one dot for each subtransaction used; past 64 every other session slows down
--   level_sync.pending          'on' once the transaction carries a set at its commit, 'lost' where it cannot
--   level_sync.moves            'on' once the transaction judges moved rows at its commit
--   level_sync.limits           max_levels of the specializations that bulk has looked up: \x01, id, \x02, 10 digits, ...

create or replace function level_sync._count_subtransaction()
  returns integer
  language sql
  set search_path = pg_catalog, pg_temp
as $$
  select length(set_config('level_sync.subtransactions',
                           coalesce(current_setting('level_sync.subtransactions', true), '') || '.', true))
$$;

comment on function level_sync._count_subtransaction() is
  'Counts one more subtransaction of this transaction and returns how many that makes.';

-- Two who wrote the two sides of one pair wait for each other in vain. The one who wrote the license gives way early,
-- so that the other is carried, and one pair is queued instead of two.
create or replace function level_sync._lock_timeout(lock_wait interval, side text)
  returns text
  language sql
  immutable
as $$
  select greatest(1, extract(epoch from lock_wait) * case side when 'progress' then 1000 else 200 end)::integer::text
$$;

comment on function level_sync._lock_timeout(interval, text) is
  'How long a carry waits for the other side''s row, in milliseconds, by the side that was written.';

create or replace function level_sync._session_actor()
  returns text
  language sql
  stable
as $$
  select left(nullif(current_setting('level_sync.actor', true), ''), 200)
$$;

comment on function level_sync._session_actor() is 'The application''s own name for who is at work: its setting level_sync.actor.';

create or replace function level_sync._session_reason()
  returns text
  language sql
  stable
as $$
  select left(nullif(current_setting('level_sync.reason', true), ''), 1000)
$$;

comment on function level_sync._session_reason() is 'Why, in the application''s words: its setting level_sync.reason.';

-- A set is written by statements that also run the application's own triggers and the checks of foreign keys. Called
-- within such a statement, when it is planned and nothing has been written yet, the first of these two gives them what
-- they are used to; the other takes it back.
create or replace function level_sync._as_the_application(trigger_path text)
  returns boolean
  language plpgsql
as $$
begin
  perform pg_catalog.set_config('plan_cache_mode', 'auto', true),
          pg_catalog.set_config('enable_nestloop', pg_catalog.current_setting('level_sync.outer_nestloop'), true),
          pg_catalog.set_config('search_path', trigger_path, true);
  return true;
end
$$;

comment on function level_sync._as_the_application(text) is
  'Sets the search_path and the planning of what runs within a statement that writes a set. Always true.';

create or replace function level_sync._as_ourselves(nestloop text)
  returns void
  language plpgsql
as $$
begin
  perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
          pg_catalog.set_config('plan_cache_mode', 'force_custom_plan', true),
          pg_catalog.set_config('enable_nestloop', nestloop, true);
end
$$;

comment on function level_sync._as_ourselves(text) is
  'Takes back what _as_the_application has set; nestloop is enable_nestloop for the statements that follow.';

-- A text, because PL/pgSQL gives it whichever type the column has that it is for, without asking TimeZone or DateStyle.
create or replace function level_sync._as_utc(moment timestamptz)
  returns text
  language sql
  stable
as $$
  select to_char(moment at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00')
$$;

comment on function level_sync._as_utc(timestamptz) is
  'A moment written so that a timestamptz takes it as it is, and a timestamp without time zone as UTC.';

create or replace function level_sync._enqueue(
    user_ids bigint[], specializations text[], sides text[], changes text[], sqlstates text[], messages text[],
    actors text[] default null, reasons text[] default null)
  returns boolean
  language plpgsql
  set search_path = pg_catalog, pg_temp
  set lock_timeout = '100ms'
as $$
begin
  actors  := coalesce(actors, array_fill(level_sync._session_actor(), array[cardinality(user_ids)]));
  reasons := coalesce(reasons, array_fill(level_sync._session_reason(), array[cardinality(user_ids)]));
  perform level_sync._count_subtransaction();
  begin
    insert into level_sync.sync_queue (user_id, specialization, side, change, sqlstate, message, actor, reason)
    select pair.user_id, pair.specialization, pair.side, pair.change, pair.sqlstate, left(pair.message, 1000), pair.actor,
           pair.reason
      from unnest(user_ids, specializations, sides, changes, sqlstates, messages, actors, reasons)
             as pair (user_id, specialization, side, change, sqlstate, message, actor, reason);
    return true;
  exception when others then
    if sqlstate = '40001' then
      raise;
    end if;
    raise warning using
      message = format('level_sync could neither carry nor queue %s pair(s), first user %s in %s: %s',
                       cardinality(user_ids), user_ids[1], specializations[1], sqlerrm),
      detail  = messages[1],
      hint    = 'The write stands. The next reconcile finds the pairs; level_sync.desync_issues shows them.';
    return false;
  end;
end
$$;

comment on function level_sync._enqueue(bigint[], text[], text[], text[], text[], text[], text[], text[]) is
  'Queues pairs for the next drain, with who wrote them and why (NULL: this session''s actor and reason). Where that is impossible it warns and returns false; the write stands.';

-- A row of a bulk write finds the limit without a query. A limit that somebody lowers meanwhile is seen by the set.
create or replace function level_sync._is_level_allowed(specialization text, level integer)
  returns boolean
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
declare
  limits  constant text := coalesce(current_setting('level_sync.limits', true), '');
  highest integer;
begin
  select coalesce(known.max_levels, 2147483647)
    into highest
    from public.specializations as known
   where known.id = _is_level_allowed.specialization;
  if highest is not null and length(limits) < 1000 then
    perform set_config('level_sync.limits',
                       e'\x01' || specialization || e'\x02' || lpad(highest::text, 10) || limits, true);
  end if;
  return coalesce(level between 1 and highest, false);
end
$$;

comment on function level_sync._is_level_allowed(text, integer) is
  'Whether the specialization has this level. Remembers its limit until the transaction ends, for the rows to come.';

create or replace function level_sync._defer_pair(user_id bigint, specialization text, side text, change text)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
  set lock_timeout = '100ms'
as $$
declare
  pending  constant text    := coalesce(current_setting('level_sync.pending', true), '');
  is_spent constant boolean := length(current_setting('level_sync.subtransactions', true)) > 56;
begin
  if pending = 'lost' then
    return;
  elsif pending = 'on' or is_spent then
    -- No subtransaction for each pair of many. Where none is left to arm the commit, the pair stays for the drain.
    insert into level_sync.pending_pairs (user_id, specialization, side, change)
    values (_defer_pair.user_id, _defer_pair.specialization, _defer_pair.side, _defer_pair.change);
    return;
  end if;

  perform level_sync._count_subtransaction();
  begin
    -- After SET CONSTRAINTS ALL IMMEDIATE each further pair would be carried as a set of one.
    set constraints level_sync.pending_pairs_committed deferred;
    insert into level_sync.pending_pairs (user_id, specialization, side, change)
    values (_defer_pair.user_id, _defer_pair.specialization, _defer_pair.side, _defer_pair.change);
    insert into level_sync.pending_commits (act) values ('carry');
    perform set_config('level_sync.pending', 'on', true);
  exception when others then
    if sqlstate = '40001' then
      raise;
    end if;
    perform level_sync._enqueue(array[user_id], array[specialization], array[side], array[change],
                                array[sqlstate], array[sqlerrm]);
    if length(current_setting('level_sync.subtransactions', true)) > 48 then
      perform set_config('level_sync.pending', 'lost', true);
      raise warning using
        message = format('level_sync neither carries nor queues further pairs of this transaction: %s', sqlerrm),
        hint    = 'The writes stand. The next reconcile finds the pairs; level_sync.desync_issues shows them.';
    end if;
  end;
end
$$;

comment on function level_sync._defer_pair(bigint, text, text, text) is
  'Leaves a pair to the commit of this transaction, or to SET CONSTRAINTS ALL IMMEDIATE if that comes first.';

-- A moved row has left one pair, as a delete does, and come to another, as an insert does. Where the commit cannot be
-- armed, the pairs go to the queue as just that.
create or replace function level_sync._defer_move(
    side text, old_user bigint, old_specialization text, new_user bigint, new_specialization text)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
  set lock_timeout = '100ms'
as $$
declare
  is_armed constant boolean := coalesce(current_setting('level_sync.moves', true), '') = 'on';
  is_spent constant boolean := length(current_setting('level_sync.subtransactions', true)) > 56;
begin
  if is_armed or is_spent then
    insert into level_sync.pending_pairs (user_id, specialization, side, change)
    select place.user_id, place.specialization, _defer_move.side, place.change
      from (values (old_user, old_specialization, 'moved_from'), (new_user, new_specialization, 'moved_to'))
             as place (user_id, specialization, change)
     where place.user_id is not null and place.specialization is not null;
    if not is_armed then
      insert into level_sync.pending_commits (act) values ('judge');
      perform set_config('level_sync.moves', 'on', true);
    end if;
    return;
  end if;

  perform level_sync._count_subtransaction();
  begin
    set constraints level_sync.moves_committed deferred;
    insert into level_sync.pending_commits (act) values ('judge');
    perform set_config('level_sync.moves', 'on', true);
    perform level_sync._defer_move(side, old_user, old_specialization, new_user, new_specialization);
  exception when others then
    if sqlstate = '40001' then
      raise;
    end if;
    perform level_sync._enqueue(array[old_user, new_user], array[old_specialization, new_specialization], array[side, side],
                                array['deleted', 'created'], array[sqlstate, sqlstate], array[sqlerrm, sqlerrm]);
  end;
end
$$;

comment on function level_sync._defer_move(text, bigint, text, bigint, text) is
  'Leaves the two places of a moved row to be judged at the commit of this transaction, or at SET CONSTRAINTS ALL IMMEDIATE if that comes first.';
