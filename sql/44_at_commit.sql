-- The set that a transaction carries at its commit, and the moved rows that it checks there.

create or replace function level_sync._take_pending_pairs(of_transaction xid8, segment_limit integer)
  returns setof level_sync.pair[] language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  pair_count   constant bigint := (
    select count(*) from level_sync.pending_pairs as pending where pending.transaction_id = of_transaction);
  segment_size constant bigint := level_sync._segment_size(pair_count, segment_limit);
begin
  return query
    with taken as (
      delete from level_sync.pending_pairs as pending
       where pending.transaction_id = of_transaction
         and pending.change not in ('moved_from', 'moved_to')
      returning pending.*
    ), departed as materialized (
      -- A row that was deleted or moved away is no missing one: what is to happen is checked at commit, not here.
      select gone.user_id, gone.specialization
        from level_sync.pending_pairs as gone
       where gone.transaction_id = of_transaction
         and gone.change in ('departed', 'moved_from')
         and case gone.side
               when 'progress' then not exists (
                 select from level_sync.progress_side as progress
                  where progress.user_id = gone.user_id and progress.specialization = gone.specialization)
               else not exists (
                 select from level_sync.license_side as license
                  where license.user_id = gone.user_id and license.specialization = gone.specialization)
             end
    ), latest as (
      -- The last write of a pair decides which side the other one follows.
      select distinct on (taken.user_id, taken.specialization) taken.*
        from taken
       where taken.change <> 'departed'
         and not exists (
           select from departed
            where departed.user_id = taken.user_id and departed.specialization = taken.specialization)
       order by taken.user_id, taken.specialization, taken.pending_id desc
    ), numbered as (
      select latest.*, row_number() over () as ordinal from latest
    )
    select array_agg(level_sync._pair(numbered.user_id, numbered.specialization, numbered.side, numbered.change,
                                      numbered.actor, numbered.reason))
      from numbered
     group by (numbered.ordinal - 1) / segment_size;
end
$$;
comment on function level_sync._take_pending_pairs(xid8, integer) is 'Takes what a transaction has left for its commit, each pair with its last write, in segments.';

create or replace function level_sync._is_pair_busy(pair level_sync.pair)
  returns boolean language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  perform from level_sync.progress_side as progress
    where progress.user_id = pair.user_id and progress.specialization = pair.specialization
      for no key update skip locked;
  if not found and exists (
    select from level_sync.progress_side as progress
     where progress.user_id = pair.user_id and progress.specialization = pair.specialization)
  then
    return true;
  end if;
  perform from level_sync.license_side as license
    where license.user_id = pair.user_id and license.specialization = pair.specialization
      for no key update skip locked;
  return not found and exists (
    select from level_sync.license_side as license
     where license.user_id = pair.user_id and license.specialization = pair.specialization);
end
$$;
comment on function level_sync._is_pair_busy(level_sync.pair) is 'Whether somebody else has locked a row of this pair. Locks its rows, without waiting, where nobody has.';

create or replace function level_sync._carry_at_commit(of_transaction xid8, raises boolean)
  returns level_sync.pair[] language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  segment_limit constant integer := level_sync._commit_budget() - level_sync._used_subtransactions() - 1;
  failure_limit constant bigint  := 100;
  segment       level_sync.pair[];
  unsynced      level_sync.pair[] := '{}'::level_sync.pair[];
begin
  for segment in select level_sync._take_pending_pairs(of_transaction, segment_limit) loop
    if raises then
      perform level_sync._raise_unless_synced(pair) from unnest(level_sync._carry_pairs(segment, 'trigger')) as pair;
    -- The usual case beside bulk: one pair that somebody has locked. A set, planned anew, would cost more than this look.
    elsif cardinality(segment) = 1 and level_sync._is_pair_busy(segment[1]) then
      unsynced := unsynced || level_sync._all_failed(segment, '55P03', 'a row of the pair is locked by another transaction');
    else
      unsynced := unsynced || level_sync._carry_segment(segment, 'trigger', null,
                                                        failure_limit - level_sync._count_failed(unsynced));
    end if;
  end loop;
  return level_sync._unequal_pairs(unsynced);
end
$$;
comment on function level_sync._carry_at_commit(xid8, boolean) is 'Carries what a transaction has left for its commit and returns the pairs to be queued, each with its error; raises the first error instead where it is told to.';

create or replace function level_sync.carry_pending_pairs()
  returns trigger language plpgsql security definer
  set search_path = pg_catalog, pg_temp set jit = off set lock_timeout = '100ms'
as $$
declare
  raises       boolean := false;
  lock_timeout text;
  unsynced     level_sync.pair[];
begin
  perform set_config('level_sync.pending', '', true);
  delete from level_sync.pending_commits as pending
   where pending.transaction_id = new.transaction_id and pending.act = 'carry';
  if level_sync._used_subtransactions() > level_sync._write_budget() then
    return null;  -- No subtransaction is left to do this safely in: the pairs stay for the drain.
  end if;
  perform level_sync._count_subtransaction();
  begin
    -- Half of lock_wait: a pair that is tried a second time has waited once.
    select settings.on_error = 'raise', greatest(1, extract(epoch from settings.lock_wait) * 500)::integer::text
      into raises, lock_timeout
      from level_sync.settings;
    perform set_config('lock_timeout', lock_timeout, true);
    unsynced := level_sync._carry_at_commit(new.transaction_id, raises);
    if unsynced <> '{}' then
      perform level_sync._enqueue(unsynced);
    end if;
  exception
    when serialization_failure then
      raise;
    when others or assert_failure then
      if raises then
        raise;
      end if;
      -- The other table is locked as a whole, say: what is in it, the drain will see.
      unsynced := array(
        select level_sync._pair(pending.user_id, pending.specialization, pending.side, pending.change, pending.actor,
                                pending.reason, sqlstate => sqlstate, message => sqlerrm)
          from level_sync.pending_pairs as pending
         where pending.transaction_id = new.transaction_id
           and pending.change in ('created', 'level_changed', 'deleted')
         order by pending.pending_id);
      if unsynced = '{}' or level_sync._enqueue(unsynced) then
        delete from level_sync.pending_pairs as pending
         where pending.transaction_id = new.transaction_id
           and pending.change not in ('moved_from', 'moved_to');
        return null;
      end if;
      raise warning using
        message = format('level_sync could not carry the pairs of this transaction: %s', sqlerrm),
        hint    = 'The writes stand, and the next drain takes the pairs up.';
  end;
  return null;
end
$$;
comment on function level_sync.carry_pending_pairs() is 'Carries, at commit or at SET CONSTRAINTS ALL IMMEDIATE, the pairs this transaction left for then; queues what it cannot.';

select level_sync._ensure_trigger('level_sync.pending_commits', 'pending_pairs_committed', $trigger$
  create constraint trigger pending_pairs_committed
    after insert on level_sync.pending_commits
    deferrable initially deferred for each row
    when (new.act = 'carry')
    execute function level_sync.carry_pending_pairs()
$trigger$, 'Carries the pairs of a transaction when it commits.');

-- UPDATE of a pair's key is checked like a delete and an insert, once both rows may have moved.
create or replace function level_sync.check_moves()
  returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  moved record;
begin
  perform set_config('level_sync.moves', '', true);
  delete from level_sync.pending_commits as pending
   where pending.transaction_id = new.transaction_id and pending.act = 'check_moves';
  for moved in
    with taken as (
      delete from level_sync.pending_pairs as pending
       where pending.transaction_id = new.transaction_id
         and pending.change in ('moved_from', 'moved_to')
      returning pending.*
    )
    select * from taken order by taken.pending_id
  loop
    case moved.side || ' ' || moved.change
      when 'progress moved_from' then perform level_sync._check_lone_license(moved.user_id, moved.specialization);
      when 'license moved_from'  then perform level_sync._check_lone_progress(moved.user_id, moved.specialization);
      when 'progress moved_to'   then perform level_sync._check_moved_progress(moved.user_id, moved.specialization);
      when 'license moved_to'    then perform level_sync._check_moved_license(moved.user_id, moved.specialization);
    end case;
  end loop;
  return null;
end
$$;
comment on function level_sync.check_moves() is 'Checks, at commit or at SET CONSTRAINTS ALL IMMEDIATE, each pair that a row has left like a delete, and each that one has come to like an insert.';

select level_sync._ensure_trigger('level_sync.pending_commits', 'moves_committed', $trigger$
  create constraint trigger moves_committed
    after insert on level_sync.pending_commits
    deferrable initially deferred for each row
    when (new.act = 'check_moves')
    execute function level_sync.check_moves()
$trigger$, 'At commit: the pair that was left is checked like a delete, the new one like an insert.');
