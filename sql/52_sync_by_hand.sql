-- What a person does by hand for one pair or one user. The same carry as everywhere else, with an answer.

create or replace function level_sync._sync_pair(user_id bigint, specialization text, side text, synced_by text)
  returns jsonb language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  outer_actor text := current_setting('level_sync.actor', true);
  target      constant text := case side when 'progress' then 'license' else 'progress' end;
  action      text := 'none';
  message     text;
  before      record;
  after       record;
begin
  if user_id is null or specialization is null then
    raise null_value_not_allowed using
      message = format('user_id (%s) and specialization (%s) must both be given', user_id, specialization);
  end if;

  begin
    perform set_config('level_sync.actor', coalesce(synced_by, outer_actor), true);
    perform from level_sync.progress_side as progress
      where progress.user_id = _sync_pair.user_id and progress.specialization = _sync_pair.specialization
        for no key update;
    perform from level_sync.license_side as license
      where license.user_id = _sync_pair.user_id and license.specialization = _sync_pair.specialization
        for no key update;
    select * into before from level_sync._pair_levels(user_id, specialization, side);

    if not before.has_source then
      message := format('user %s has no %s in %s: nothing to carry', user_id, side, specialization);
    elsif not level_sync._is_level_in_range(before.source_level, before.max_levels) then
      message := level_sync._level_violation(side, user_id, specialization, before.source_level, before.max_levels)
                   || '; correct it first';
    else
      perform level_sync._raise_unless_synced(pair)
         from unnest(level_sync._carry_pairs(array[level_sync._pair(user_id, specialization, side, 'level_changed')], 'manual')) as pair;
      if not before.has_target then
        action := 'created';
      elsif before.source_level is distinct from before.target_level then
        action := 'updated';
      end if;
    end if;
    perform set_config('level_sync.actor', coalesce(outer_actor, ''), true);
  exception
    when serialization_failure then
      raise;
    when others or assert_failure then
      action  := 'none';
      message := format('%s (SQLSTATE %s)', sqlerrm, sqlstate);
      select * into before from level_sync._pair_levels(user_id, specialization, side);
  end;
  select * into after from level_sync._pair_levels(user_id, specialization, side);

  return jsonb_build_object(
    'success', message is null,
    'action', action,
    'user_id', user_id,
    'specialization', specialization,
    'direction', side || '_to_' || target,
    'old_level', before.target_level,
    'new_level', after.target_level,
    'message', coalesce(message, case action
      when 'created' then format('%s created at level %s', target, after.target_level)
      when 'updated' then format('%s level %s -> %s', target, before.target_level, after.target_level)
      else format('both sides already have level %s', after.target_level)
    end));
end
$$;
comment on function level_sync._sync_pair(bigint, text, text, text) is 'Carries one pair from the given side and answers with what was done.';

create or replace function level_sync._pair_levels(
    user_id bigint, specialization text, side text,
    out has_source boolean, out source_level bigint, out has_target boolean, out target_level bigint, out max_levels bigint)
  language sql stable set search_path = pg_catalog, pg_temp
as $$
  select case side when 'progress' then progress.user_id else license.user_id end is not null,
         case side when 'progress' then progress.level else license.level end,
         case side when 'progress' then license.user_id else progress.user_id end is not null,
         case side when 'progress' then license.level else progress.level end,
         known.max_levels
    from (values (_pair_levels.user_id, _pair_levels.specialization)) as pair (user_id, specialization)
    left join level_sync.progress_side as progress
      on progress.user_id = pair.user_id and progress.specialization = pair.specialization
    left join level_sync.license_side as license
      on license.user_id = pair.user_id and license.specialization = pair.specialization
    left join public.specializations as known on known.id = pair.specialization
$$;
comment on function level_sync._pair_levels(bigint, text, text) is 'Both levels of a pair as seen from one side, and the limit.';

create or replace function level_sync.sync_progress_to_license(user_id bigint, specialization text, synced_by text default null)
  returns jsonb language sql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '2s'
as $$
  select level_sync._sync_pair(user_id, specialization, 'progress', synced_by)
$$;
comment on function level_sync.sync_progress_to_license(bigint, text, text) is 'Gives the license the level of the progress; creates it where it is missing. Returns jsonb: success, action (created, updated, none), user_id, specialization, direction, old_level, new_level (of the license), message. Raises null_value_not_allowed for a NULL key; waits up to 2 s for a held row.';

create or replace function level_sync.sync_license_to_progress(user_id bigint, specialization text, synced_by text default null)
  returns jsonb language sql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '2s'
as $$
  select level_sync._sync_pair(user_id, specialization, 'license', synced_by)
$$;
comment on function level_sync.sync_license_to_progress(bigint, text, text) is 'Gives the progress the level of the license; creates it with 0 XP where it is missing. Returns jsonb: success, action (created, updated, none), user_id, specialization, direction, old_level, new_level (of the progress), message. Raises null_value_not_allowed for a NULL key; waits up to 2 s for a held row.';

-- It waits with the rows of earlier pairs locked: all its waits together are to be shorter than deadlock_timeout, after
-- which an application that wants those rows would be the one to fail.
create or replace function level_sync.sync_user(user_id bigint, direction text default 'progress_to_license')
  returns jsonb language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '100ms'
as $$
declare
  answers jsonb;
begin
  if direction is null or direction not in ('progress_to_license', 'license_to_progress') then
    raise invalid_parameter_value using
      message = format('unknown direction %L', direction),
      hint    = 'Use progress_to_license or license_to_progress.';
  end if;
  if user_id is null or not exists (select from public.users where users.id = sync_user.user_id) then
    raise no_data_found using message = format('there is no user %s', coalesce(user_id::text, 'NULL'));
  end if;

  select coalesce(jsonb_agg(level_sync._sync_pair(sync_user.user_id, pair.specialization,
                                                  split_part(direction, '_to_', 1), null)
                            order by pair.specialization), '[]')
    into answers
    from (
      select progress.specialization_id::text
        from public.specialization_progress as progress
       where progress.student_id = sync_user.user_id
       union
      select license.specialization_type::text
        from public.user_licenses as license
       where license.user_id = sync_user.user_id
    ) as pair (specialization);

  return (
    select jsonb_build_object(
             'success', coalesce(bool_and((answer ->> 'success')::boolean), true),
             'user_id', sync_user.user_id,
             'direction', direction,
             'created', count(*) filter (where answer ->> 'action' = 'created'),
             'updated', count(*) filter (where answer ->> 'action' = 'updated'),
             'none', count(*) filter (where answer ->> 'action' = 'none'),
             'message', format('%s specialization(s) looked at', count(*)),
             'pairs', answers)
      from jsonb_array_elements(answers) as answer);
end
$$;
comment on function level_sync.sync_user(bigint, text) is 'Carries every specialization of one user in the given direction. Returns jsonb: success, counts of created, updated and none, and pairs (one answer per specialization, as sync_progress_to_license gives it). Raises no_data_found for an unknown user and invalid_parameter_value for an unknown direction; waits up to 0.1 s for each held row.';
