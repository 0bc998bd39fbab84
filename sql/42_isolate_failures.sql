-- Carries what can be carried. A set in which one write fails is undone by PostgreSQL as a whole. So it is carried in
-- segments, and in one that fails the pairs that fail are found by probing, and the others are carried without them.
-- Only the subtransactions that stay are counted: those that are rolled back cost other sessions nothing.

create or replace function level_sync._segment_size(pair_count bigint, segment_limit integer)
  returns bigint language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select greatest(20000, ceil(pair_count::numeric / greatest(least(segment_limit, 16), 1))::bigint)
$$;
comment on function level_sync._segment_size(bigint, integer) is 'How many pairs are carried in one subtransaction, where no more than this many of them may stay.';

create or replace function level_sync._segments(pairs level_sync.pair[], segment_size bigint)
  returns table (first_ordinal bigint, segment level_sync.pair[]) language plpgsql stable
  set search_path = pg_catalog, pg_temp
as $$
begin
  if cardinality(pairs) <= segment_size then
    return query select 1::bigint, pairs;
    return;
  end if;
  return query
    select min(numbered.ordinal), array_agg(numbered.pair order by numbered.ordinal)
      from (select unnest(pairs) as pair, generate_subscripts(pairs, 1)::bigint as ordinal) as numbered
     group by (numbered.ordinal - 1) / segment_size
     order by 1;
end
$$;
comment on function level_sync._segments(level_sync.pair[], bigint) is 'The pairs in segments of this size, each with the number of its first pair, counted from 1.';

create or replace function level_sync._try_to_carry(
    pairs level_sync.pair[], source text, run_id bigint, segment_size bigint, is_probe boolean,
    out unsynced level_sync.pair[], out failed_ordinal bigint, out error_code text, out error_message text)
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  part record;
begin
  unsynced := '{}';
  for part in select * from level_sync._segments(pairs, segment_size) loop
    failed_ordinal := part.first_ordinal;
    unsynced := unsynced || level_sync._carry_pairs(part.segment, source, run_id);
  end loop;
  failed_ordinal := null;
  if is_probe then
    raise exception using errcode = 'LVS02', message = 'the probe found no failure';
  end if;
  perform level_sync._count_subtransaction();
exception
  when serialization_failure then
    raise;
  when sqlstate 'LVS02' then
    unsynced := pairs;
  when others or assert_failure then
    error_code    := sqlstate;
    error_message := sqlerrm;
    if sqlstate in ('55P03', '40P01') then
      perform set_config('lock_timeout', '1ms', true);  -- Waited once: what is still locked is not waited for again.
    end if;
end
$$;
comment on function level_sync._try_to_carry(level_sync.pair[], text, bigint, bigint, boolean) is 'Carries pairs segment by segment in one subtransaction: all, or none. Returns the pairs of which it is not certain that they are equal now; or the number of the first pair of the segment that failed, and its error. A probe is always rolled back.';

create or replace function level_sync._find_failure(
    pairs level_sync.pair[], source text, run_id bigint,
    out good_count bigint, out error_code text, out error_message text)
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  segment_size bigint := 500;
  suspects     level_sync.pair[] := pairs;
  probe        record;
begin
  good_count := 0;
  loop
    probe := level_sync._try_to_carry(suspects, source, run_id, segment_size, true);
    if probe.error_code is null then
      good_count := good_count + cardinality(suspects);
      return;
    end if;
    good_count := good_count + probe.failed_ordinal - 1;
    suspects   := suspects[probe.failed_ordinal : probe.failed_ordinal + segment_size - 1];
    exit when cardinality(suspects) = 1;
    segment_size := greatest(segment_size / 8, 1);
  end loop;
  error_code    := probe.error_code;
  error_message := probe.error_message;
end
$$;
comment on function level_sync._find_failure(level_sync.pair[], text, bigint) is 'How many of the pairs, from the first on, do not fail, and the error of the one behind them; no error where none fails by itself. Writes nothing.';

create or replace function level_sync._carry_segment(pairs level_sync.pair[], source text, run_id bigint, failure_limit bigint)
  returns level_sync.pair[] language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  attempt   record;
  probe     record;
  good      level_sync.pair[] := '{}'::level_sync.pair[];
  failed    level_sync.pair[] := '{}'::level_sync.pair[];
  remaining level_sync.pair[] := pairs;
begin
  attempt := level_sync._try_to_carry(pairs, source, run_id, cardinality(pairs), false);
  if attempt.error_code is null then
    return attempt.unsynced;
  elsif cardinality(pairs) = 1 then
    return level_sync._all_failed(pairs, attempt.error_code, attempt.error_message);
  end if;

  while remaining <> '{}' and cardinality(failed) < failure_limit loop
    probe     := level_sync._find_failure(remaining, source, run_id);
    good      := good || remaining[1 : probe.good_count];
    remaining := remaining[probe.good_count + 1 : ];
    if probe.error_code is not null then
      failed    := failed || level_sync._failed(remaining[1], probe.error_code, probe.error_message);
      remaining := remaining[2 : ];
    end if;
  end loop;
  failed := failed || level_sync._all_failed(remaining, attempt.error_code, attempt.error_message);

  attempt := level_sync._try_to_carry(good, source, run_id, cardinality(good), false);
  while attempt.error_code is not null and cardinality(failed) < failure_limit loop  -- They fail only together.
    attempt := level_sync._try_to_carry(good, source, run_id, 1, false);
    if attempt.error_code is not null then
      failed := failed || level_sync._failed(good[attempt.failed_ordinal], attempt.error_code, attempt.error_message);
      good   := level_sync._pairs_except(good, array[attempt.failed_ordinal]);
    end if;
  end loop;
  if attempt.error_code is not null then
    return failed || level_sync._all_failed(good, attempt.error_code, attempt.error_message);
  end if;
  return failed || attempt.unsynced;
end
$$;
comment on function level_sync._carry_segment(level_sync.pair[], text, bigint, bigint) is 'Carries the pairs it can. Returns those that fail, with their errors, and those of which it is not certain that they are equal now. Once failure_limit of them have failed, those behind are not tried by themselves.';

-- What a carry has to leave behind: both rows with one level, or no row on either side.
create or replace function level_sync._unequal_pairs(pairs level_sync.pair[])
  returns level_sync.pair[] language plpgsql
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
  user_range record;
  unequal    level_sync.pair[];
  locked     level_sync.pair[];
begin
  if pairs = '{}' then
    return pairs;
  end if;
  select * into user_range from level_sync._user_range(pairs);
  unequal := array(
    select case when pair.sqlstate is null and not level_sync._is_level_in_range(source.level, known.max_levels)
                then level_sync._failed(pair, '23514',
                       level_sync._level_violation(pair.side, pair.user_id, pair.specialization, source.level, known.max_levels)
                         || '; correct it first')
                else pair end
      from unnest(pairs) as pair
      left join level_sync.progress_side as progress
        on progress.user_id = pair.user_id and progress.specialization = pair.specialization
       and progress.user_id between user_range.first_user and user_range.last_user
      left join level_sync.license_side as license
        on license.user_id = pair.user_id and license.specialization = pair.specialization
       and license.user_id between user_range.first_user and user_range.last_user
      left join public.specializations as known on known.id = pair.specialization
     cross join lateral (select case pair.side when 'progress' then progress.level else license.level end) as source (level)
     where ((progress.user_id is null) <> (license.user_id is null) or progress.level is distinct from license.level)
       -- Written again by a trigger while it was carried: the set of that write comes after this one.
       and not exists (
             select from level_sync.pending_pairs as again
              where again.transaction_id = pg_current_xact_id_if_assigned()
                and again.user_id = pair.user_id and again.specialization = pair.specialization));
  if unequal = '{}' then
    return unequal;
  end if;

  locked := level_sync._lock_pairs(unequal);
  return array(
    select case when pair.sqlstate is not null then pair
                when exists (
                  select from unnest(locked) as free
                   where free.user_id = pair.user_id and free.specialization = pair.specialization)
                then level_sync._failed(pair, '55000', 'a trigger of the other table changed or dropped the write')
                else level_sync._failed(pair, '55P03', 'a row of the pair is locked by another transaction') end
      from unnest(unequal) as pair);
end
$$;
comment on function level_sync._unequal_pairs(level_sync.pair[]) is 'The pairs that have two levels or only one row and that this transaction does not carry once more, each with its error: its own, or what keeps it from being equal now.';

create or replace function level_sync._raise_unless_synced(pair level_sync.pair)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  unequal level_sync.pair[];
begin
  -- A snapshot older than the row (REPEATABLE READ) sees it beside the one it replaced: neither is the truth.
  if (select count(*) > 1 from level_sync.progress_side as progress
       where progress.user_id = pair.user_id and progress.specialization = pair.specialization)
     or (select count(*) > 1 from level_sync.license_side as license
          where license.user_id = pair.user_id and license.specialization = pair.specialization)
  then
    raise serialization_failure using
      message = 'could not serialize access: another transaction has deleted this pair',
      hint    = 'The transaction might succeed if retried.';
  end if;
  unequal := level_sync._unequal_pairs(array[pair]);
  if unequal <> '{}' then
    raise exception using errcode = (unequal[1]).sqlstate, message = (unequal[1]).message;
  end if;
end
$$;
comment on function level_sync._raise_unless_synced(level_sync.pair) is 'Where a pair is not equal after it was carried: raises serialization_failure if the snapshot is too old, else what keeps it from being equal, such as lock_not_available.';

create or replace function level_sync._count_failed(pairs level_sync.pair[])
  returns bigint language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select count(*) from unnest(pairs) as pair where pair.sqlstate is not null
$$;
comment on function level_sync._count_failed(level_sync.pair[]) is 'How many of these pairs have an error.';

create or replace function level_sync._carry_or_isolate(pairs level_sync.pair[], source text, run_id bigint)
  returns level_sync.pair[] language sql set search_path = pg_catalog, pg_temp
as $$
  select level_sync._unequal_pairs(level_sync._carry_segment(pairs, source, run_id, cardinality(pairs)))
$$;
comment on function level_sync._carry_or_isolate(level_sync.pair[], text, bigint) is 'Carries the pairs it can and returns those that are not equal now, each with its error.';
