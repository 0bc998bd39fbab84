-- A pair on its way (type level_sync.pair), and both tables under one set of names, so that one statement serves both
-- directions.

-- Made once: replacing a view waits for everybody who has read it in an open transaction, and every writer may have.
do $$
begin
  if to_regclass('level_sync.progress_side') is null then
    create view level_sync.progress_side as
    select progress.student_id as user_id, progress.specialization_id as specialization, progress.current_level as level
      from public.specialization_progress as progress;
  end if;
  if to_regclass('level_sync.license_side') is null then
    create view level_sync.license_side as
    select license.user_id, license.specialization_type as specialization, license.current_level as level
      from public.user_licenses as license;
  end if;
end
$$;

comment on view level_sync.progress_side is 'specialization_progress as one side of a pair. For reading and locking; what is written is written to the table.';
comment on column level_sync.progress_side.user_id is 'users.id of the pair.';
comment on column level_sync.progress_side.specialization is 'specializations.id of the pair.';
comment on column level_sync.progress_side.level is 'The earned level.';
comment on view level_sync.license_side is 'user_licenses as one side of a pair. For reading and locking; what is written is written to the table.';
comment on column level_sync.license_side.user_id is 'users.id of the pair.';
comment on column level_sync.license_side.specialization is 'specializations.id of the pair.';
comment on column level_sync.license_side.level is 'The issued level.';

create or replace function level_sync._session_actor()
  returns text language sql stable
as $$
  select left(nullif(current_setting('level_sync.actor', true), ''), 200)
$$;
comment on function level_sync._session_actor() is 'The application''s own name for who is at work: its setting level_sync.actor.';

create or replace function level_sync._session_reason()
  returns text language sql stable
as $$
  select left(nullif(current_setting('level_sync.reason', true), ''), 1000)
$$;
comment on function level_sync._session_reason() is 'Why, in the application''s words: its setting level_sync.reason.';

create or replace function level_sync._pair(
    user_id bigint, specialization text, side text, change text,
    actor text default level_sync._session_actor(), reason text default level_sync._session_reason(),
    progress_level bigint default null, license_level bigint default null, queue_id bigint default null,
    attempts integer default null, sqlstate text default null, message text default null)
  returns level_sync.pair language sql stable
as $$
  select row(user_id, specialization, side, change, actor, reason, progress_level, license_level, queue_id, attempts,
             sqlstate, message)::level_sync.pair
$$;
comment on function level_sync._pair(bigint, text, text, text, text, text, bigint, bigint, bigint, integer, text, text) is 'A pair; actor and reason are those of this session where none are given.';

create or replace function level_sync._failed(pair level_sync.pair, sqlstate text, message text)
  returns level_sync.pair language sql stable
as $$
  select level_sync._pair(pair.user_id, pair.specialization, pair.side, pair.change, pair.actor, pair.reason,
                          pair.progress_level, pair.license_level, pair.queue_id, pair.attempts, _failed.sqlstate, _failed.message)
$$;
comment on function level_sync._failed(level_sync.pair, text, text) is 'The pair, with the error that kept it from being carried.';

create or replace function level_sync._all_failed(pairs level_sync.pair[], sqlstate text, message text)
  returns level_sync.pair[] language sql stable set search_path = pg_catalog, pg_temp
as $$
  select array(select level_sync._failed(pair, _all_failed.sqlstate, _all_failed.message) from unnest(pairs) as pair)
$$;
comment on function level_sync._all_failed(level_sync.pair[], text, text) is 'The pairs, each with the same error.';

-- The numbers go into the plan as a constant: only then PostgreSQL looks them up by hash.
create or replace function level_sync._pairs_at(pairs level_sync.pair[], ordinals bigint[])
  returns level_sync.pair[] language plpgsql stable
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan
as $$
begin
  if cardinality(ordinals) = cardinality(pairs) then
    return pairs;
  end if;
  return array(
    select numbered.pair
      from (select unnest(pairs) as pair, generate_subscripts(pairs, 1)::bigint as ordinal) as numbered
     where numbered.ordinal = any (ordinals));
end
$$;
comment on function level_sync._pairs_at(level_sync.pair[], bigint[]) is 'The pairs with these numbers, counted from 1 and given once each.';

create or replace function level_sync._pairs_except(pairs level_sync.pair[], ordinals bigint[])
  returns level_sync.pair[] language plpgsql stable
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan
as $$
begin
  if cardinality(ordinals) = cardinality(pairs) then
    return '{}'::level_sync.pair[];
  end if;
  return array(
    select numbered.pair
      from (select unnest(pairs) as pair, generate_subscripts(pairs, 1)::bigint as ordinal) as numbered
     where numbered.ordinal <> all (ordinals));
end
$$;
comment on function level_sync._pairs_except(level_sync.pair[], bigint[]) is 'The pairs but those with these numbers, counted from 1 and given once each.';

-- Said besides the pairs, so that a batch of neighbours is looked up as a range and not in the whole table.
create or replace function level_sync._user_range(pairs level_sync.pair[], out first_user bigint, out last_user bigint)
  language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select min(pair.user_id), max(pair.user_id) from unnest(pairs) as pair
$$;
comment on function level_sync._user_range(level_sync.pair[]) is 'The lowest and the highest user of these pairs.';

create or replace function level_sync._pairs_without(pairs level_sync.pair[], others level_sync.pair[])
  returns level_sync.pair[] language plpgsql stable
  set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan
as $$
begin
  return array(
    select pair
      from unnest(pairs) as pair
     where not exists (
       select from unnest(others) as other
        where other.user_id = pair.user_id and other.specialization = pair.specialization));
end
$$;
comment on function level_sync._pairs_without(level_sync.pair[], level_sync.pair[]) is 'The pairs that are not among the others.';
