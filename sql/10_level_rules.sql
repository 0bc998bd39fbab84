-- A level lies in 1..max_levels of its specialization, and max_achieved_level never goes down.
-- Whoever breaks the first is refused; the second is put right.

create or replace function level_sync._refuse_level(side text, user_id bigint, specialization text, level integer, max_levels integer)
  returns void
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
begin
  if level is null then
    raise not_null_violation using
      message = format('the %s level of user %s in %s is NULL', side, user_id, specialization),
      hint    = format('Set current_level to a number from 1 to %s.', coalesce(max_levels::text, 'the highest level'));
  end if;
  raise check_violation using
    message = format('level %s of user %s in %s is out of range: allowed is 1 to %s',
                     level, user_id, specialization, coalesce(max_levels::text, 'any')),
    hint    = 'The limit is specializations.max_levels; NULL there means no upper limit.';
end
$$;

comment on function level_sync._refuse_level(text, bigint, text, integer, integer) is
  'Raises check_violation, or not_null_violation for NULL, naming the pair, the level and the limit.';

create or replace function level_sync.raise_max_achieved_level()
  returns trigger
  language plpgsql
  set search_path = pg_catalog, pg_temp
as $$
begin
  new.max_achieved_level := greatest(new.max_achieved_level, new.current_level);
  if tg_op = 'UPDATE' then
    new.max_achieved_level := greatest(new.max_achieved_level, old.max_achieved_level);
  end if;
  return new;
end
$$;

comment on function level_sync.raise_max_achieved_level() is
  'Keeps user_licenses.max_achieved_level at the highest level ever held, also where the application sets current_level alone.';

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
