-- A level lies in 1..max_levels of its specialization, and max_achieved_level never goes down.
-- A write that breaks the first is refused; the second is put right.

create or replace function level_sync._is_level_in_range(level bigint, max_levels bigint)
  returns boolean language sql immutable
as $$
  select coalesce(level between 1 and coalesce(max_levels, level), false)
$$;
comment on function level_sync._is_level_in_range(bigint, bigint) is 'Whether a specialization has this level; max_levels NULL: no upper limit. NULL is no level.';

create or replace function level_sync._level_violation(side text, user_id bigint, specialization text, level bigint, max_levels bigint)
  returns text language sql immutable set search_path = pg_catalog, pg_temp
as $$
  select case when level is null
              then format('the %s level of user %s in %s is NULL', side, user_id, specialization)
              else format('level %s of user %s in %s is out of range: allowed is 1 to %s', level, user_id, specialization,
                          coalesce(max_levels::text, 'any')) end
$$;
comment on function level_sync._level_violation(text, bigint, text, bigint, bigint) is 'What is wrong with a level that is not in range: the pair, the level and the limit.';

create or replace function level_sync._raise_level_violation(side text, user_id bigint, specialization text, level bigint, max_levels bigint)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using
    errcode = case when level is null then '23502' else '23514' end,
    message = level_sync._level_violation(side, user_id, specialization, level, max_levels),
    hint    = case when level is null
                   then format('Set current_level to a number from 1 to %s.', coalesce(max_levels::text, 'the highest level'))
                   else 'The limit is specializations.max_levels; NULL there means no upper limit.' end;
end
$$;
comment on function level_sync._raise_level_violation(text, bigint, text, bigint, bigint) is 'Raises check_violation, or not_null_violation for NULL, naming the pair, the level and the limit.';

create or replace function level_sync.raise_max_achieved_level()
  returns trigger language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  new.max_achieved_level := greatest(new.max_achieved_level, new.current_level);
  if tg_op = 'UPDATE' then
    new.max_achieved_level := greatest(new.max_achieved_level, old.max_achieved_level);
  end if;
  return new;
end
$$;
comment on function level_sync.raise_max_achieved_level() is 'Keeps user_licenses.max_achieved_level at the highest level ever held, also where the application sets current_level alone.';

select level_sync._ensure_trigger('public.user_licenses', 'license_inserted_below_its_level', $trigger$
  create trigger license_inserted_below_its_level
    before insert on public.user_licenses
    for each row
    when (new.max_achieved_level is null or new.max_achieved_level < new.current_level)
    execute function level_sync.raise_max_achieved_level()
$trigger$, 'max_achieved_level is at least current_level.');

select level_sync._ensure_trigger('public.user_licenses', 'license_max_achieved_lowered', $trigger$
  create trigger license_max_achieved_lowered
    before update on public.user_licenses
    for each row
    when (new.max_achieved_level < new.current_level
          or new.max_achieved_level < old.max_achieved_level
          or new.max_achieved_level is null)
    execute function level_sync.raise_max_achieved_level()
$trigger$, 'max_achieved_level never goes down and is at least current_level.');
