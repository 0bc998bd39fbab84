-- The academy's own two acts: a student earns XP, an admin advances a license. Each writes its own side only;
-- the triggers carry the level, and sync_result tells how that went.

create or replace function level_sync._sync_result(user_id bigint, specialization text, side text, target_level_before bigint)
  returns jsonb language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  levels   record;
  is_equal boolean;
  action   text;
begin
  select * into levels from level_sync._pair_levels(user_id, specialization, side);
  is_equal := levels.has_target and levels.target_level is not distinct from levels.source_level;
  action := case
    when is_equal then
      case when target_level_before is null then 'created'
           when target_level_before is distinct from levels.target_level then 'updated'
           else 'none' end
    when exists (
      select from level_sync.pending_pairs as pending
       where pending.transaction_id = pg_current_xact_id_if_assigned()
         and pending.user_id = _sync_result.user_id
         and pending.specialization = _sync_result.specialization) then 'at_commit'
    when exists (
      select from level_sync.sync_queue as queued
       where queued.user_id = _sync_result.user_id and queued.specialization = _sync_result.specialization) then 'queued'
    else 'none'
  end;
  return jsonb_build_object(
    'success', is_equal,
    'action', action,
    'old_level', target_level_before,
    'new_level', levels.target_level,
    'message', case action
      when 'at_commit' then 'the other side follows when this transaction commits'
      when 'queued' then 'the other side could not follow yet; the pair is in level_sync.sync_queue'
      when 'none' then
        case when is_equal then format('both sides have level %s', levels.target_level)
             else 'the two sides differ and nothing was carried; level_sync.desync_issues shows the pair, the next reconcile repairs it' end
      else format('%s %s at level %s', case side when 'progress' then 'license' else 'progress' end, action, levels.target_level)
    end);
end
$$;
comment on function level_sync._sync_result(bigint, text, text, bigint) is 'How the other side of a pair has followed: created, updated, none, at_commit or queued.';

create or replace function level_sync._find_specialization(student_id bigint, specialization_id text, out id text, out max_levels bigint)
  language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
  if student_id is null or not exists (select from public.users where users.id = _find_specialization.student_id) then
    raise no_data_found using
      message = format('there is no student %s', coalesce(student_id::text, 'NULL')),
      hint    = 'student_id is users.id.';
  end if;
  select known.id, known.max_levels
    into id, max_levels
    from public.specializations as known
   where known.id = _find_specialization.specialization_id;
  if not found then
    raise no_data_found using
      message = format('there is no specialization %L', specialization_id),
      hint    = format('Known are %s.', (select string_agg(known.id::text, ', ' order by known.id) from public.specializations as known));
  end if;
end
$$;
comment on function level_sync._find_specialization(bigint, text) is 'The specialization with its limit. Raises no_data_found for an unknown student or specialization.';

create or replace function level_sync._lock_or_create_progress(
    student_id bigint, specialization_id text, level bigint,
    out current_level bigint, out xp numeric, out sessions numeric, out projects numeric)
  language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  insert into public.specialization_progress
         (student_id, specialization_id, current_level, total_xp, completed_sessions, completed_projects)
  select _lock_or_create_progress.student_id, _lock_or_create_progress.specialization_id, level, 0, 0, 0
   where (select level_sync._enter_trigger_context())
  on conflict do nothing;
  perform level_sync._leave_trigger_context();

  select progress.current_level, coalesce(progress.total_xp, 0), coalesce(progress.completed_sessions, 0),
         coalesce(progress.completed_projects, 0)
    into current_level, xp, sessions, projects
    from public.specialization_progress as progress
   where progress.student_id = _lock_or_create_progress.student_id
     and progress.specialization_id = _lock_or_create_progress.specialization_id
     for no key update;
  if not found then
    raise object_not_in_prerequisite_state using
      message = format('the progress of student %s in %s was not created: a trigger of specialization_progress dropped it',
                       student_id, specialization_id);
  end if;
end
$$;
comment on function level_sync._lock_or_create_progress(bigint, text, bigint) is 'Locks a student''s progress, created at this level where it is missing, and returns what it holds. Raises object_not_in_prerequisite_state where a trigger keeps it from being created.';

create or replace function level_sync._raise_unless_totals_fit(
    student_id bigint, specialization_id text, xp numeric, sessions numeric, projects numeric, totals_before text)
  returns void language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
declare
  totals constant text := format('XP %s, sessions %s, projects %s', xp, sessions, projects);
begin
  if xp > 9223372036854775807 or sessions > 2147483647 or projects > 2147483647 then
    raise numeric_value_out_of_range using
      message = format('student %s in %s would have a total beyond what its column holds: %s', student_id, specialization_id, totals),
      hint    = 'xp_gained, sessions_completed and projects_completed are added to what the student has.';
  end if;
  if xp < 0 or sessions < 0 or projects < 0 then
    raise check_violation using
      message = format('student %s in %s would have a total below zero: %s', student_id, specialization_id, totals),
      hint    = format('They have %s now.', totals_before);
  end if;
end
$$;
comment on function level_sync._raise_unless_totals_fit(bigint, text, numeric, numeric, numeric, text) is 'Raises numeric_value_out_of_range for a total that its column cannot hold, check_violation for one below zero.';

-- Every step up to the new level must be reached, without a gap.
create or replace function level_sync._reached_level(specialization_id text, from_level bigint, max_levels bigint, xp numeric, sessions numeric)
  returns bigint language sql stable set search_path = pg_catalog, pg_temp
as $$
  select coalesce(max(step.level), from_level)
    from (
      select rung.level,
             bool_and(rung.required_xp <= xp and rung.required_sessions <= sessions) over (order by rung.level) as is_reached,
             rung.level - row_number() over (order by rung.level) = from_level as has_no_gap
        from public.specialization_levels as rung
       where rung.specialization_id = _reached_level.specialization_id
         and rung.level > from_level
         and rung.level <= coalesce(max_levels, rung.level)
    ) as step
   where step.is_reached
     and step.has_no_gap
$$;
comment on function level_sync._reached_level(text, bigint, bigint, numeric, numeric) is 'The highest level that these totals allow, by specialization_levels, for somebody who has from_level; never a lower one.';

create or replace function level_sync.update_progress(
    student_id bigint, specialization_id text,
    xp_gained bigint default 0, sessions_completed integer default 0, projects_completed integer default 0)
  returns jsonb language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  specialization record;
  before         record;
  after          record;
  license_before bigint;
  xp_total       numeric;
  session_total  numeric;
  project_total  numeric;
  written_at     public.specialization_progress.last_activity%type;
begin
  if xp_gained is null or sessions_completed is null or projects_completed is null then
    raise null_value_not_allowed using
      message = 'xp_gained, sessions_completed and projects_completed must be numbers, not NULL';
  end if;
  specialization := level_sync._find_specialization(student_id, specialization_id);
  license_before := (level_sync._pair_levels(student_id, specialization_id, 'license')).source_level;
  -- At the license's level, which an insert would be given anyway, though in bulk only at commit.
  before := level_sync._lock_or_create_progress(student_id, specialization_id, greatest(license_before, 1));

  xp_total      := before.xp + xp_gained;
  session_total := before.sessions + sessions_completed;
  project_total := before.projects + projects_completed;
  perform level_sync._raise_unless_totals_fit(
    student_id, specialization_id, xp_total, session_total, project_total,
    totals_before => format('XP %s, sessions %s, projects %s', before.xp, before.sessions, before.projects));

  written_at := level_sync._as_utc(clock_timestamp());
  update public.specialization_progress as progress
     set total_xp           = xp_total,
         completed_sessions = session_total,
         completed_projects = project_total,
         current_level      = level_sync._reached_level(
           specialization.id, before.current_level, specialization.max_levels, xp_total, session_total),
         last_activity      = written_at
   where (select level_sync._enter_trigger_context())
     and progress.student_id = update_progress.student_id
     and progress.specialization_id = update_progress.specialization_id
  returning progress.current_level, progress.total_xp, progress.completed_sessions, progress.completed_projects
       into after;
  if after is null then
    raise object_not_in_prerequisite_state using
      message = format('the progress of student %s in %s was not written: a trigger of specialization_progress dropped the update',
                       student_id, specialization_id);
  end if;
  perform level_sync._leave_trigger_context();

  return jsonb_build_object(
    'success', true,
    'student_id', student_id,
    'specialization_id', specialization_id,
    'leveled_up', after.current_level > before.current_level,
    'old_level', before.current_level,
    'new_level', after.current_level,
    'level_name', (
      select rung.name
        from public.specialization_levels as rung
       where rung.specialization_id = update_progress.specialization_id and rung.level = after.current_level),
    'total_xp', after.total_xp,
    'completed_sessions', after.completed_sessions,
    'completed_projects', after.completed_projects,
    'sync_result', level_sync._sync_result(student_id, specialization_id, 'progress', license_before));
end
$$;
comment on function level_sync.update_progress(bigint, text, bigint, integer, integer) is 'Adds XP, sessions and projects (negative ones correct a mistake) and applies every level-up that specialization_levels allows. Creates the progress where it is missing; never takes a level away. Returns jsonb: leveled_up, old_level, new_level, level_name, totals, sync_result. Raises no_data_found for an unknown student or specialization, check_violation for a total below zero.';

create or replace function level_sync.advance_license(
    user_id bigint, specialization text, target_level bigint, advanced_by text default null, reason text default null)
  returns jsonb language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
declare
  outer_actor     text := current_setting('level_sync.actor', true);
  outer_reason    text := current_setting('level_sync.reason', true);
  old_level       bigint;
  new_level       bigint;
  max_levels      bigint;
  progress_before bigint;
  refusal         text;
  written_at      public.user_licenses.last_advanced_at%type;
begin
  select license.current_level
    into old_level
    from public.user_licenses as license
   where license.user_id = advance_license.user_id
     and license.specialization_type = advance_license.specialization
     for no key update;
  if not found then
    refusal := format('user %s has no license in %s', coalesce(user_id::text, 'NULL'), coalesce(specialization, 'NULL'));
  end if;
  select known.max_levels
    into max_levels
    from public.specializations as known
   where known.id = advance_license.specialization;
  refusal := coalesce(refusal, case
    when target_level is null then 'target_level must be a number, not NULL'
    when target_level <= old_level then
      format('target level %s is not above the current level %s of user %s in %s', target_level, old_level, user_id, specialization)
    when target_level > max_levels then
      format('target level %s is above the highest level %s of %s', target_level, max_levels, specialization)
    when target_level < 1 then format('target level %s is below 1', target_level)
  end);

  if refusal is not null then
    return jsonb_build_object(
      'success', false, 'user_id', user_id, 'specialization', specialization,
      'old_level', old_level, 'new_level', old_level, 'message', refusal, 'sync_result', null);
  end if;

  select progress.current_level
    into progress_before
    from public.specialization_progress as progress
   where progress.student_id = advance_license.user_id
     and progress.specialization_id = advance_license.specialization;

  perform set_config('level_sync.actor', coalesce(advanced_by, outer_actor), true),
          set_config('level_sync.reason', coalesce(advance_license.reason, outer_reason), true);
  written_at := level_sync._as_utc(clock_timestamp());
  update public.user_licenses as license
     set current_level      = target_level,
         max_achieved_level = greatest(license.max_achieved_level, target_level),
         last_advanced_at   = written_at
   where (select level_sync._enter_trigger_context())
     and license.user_id = advance_license.user_id
     and license.specialization_type = advance_license.specialization
  returning license.current_level into new_level;
  perform level_sync._leave_trigger_context();
  perform set_config('level_sync.actor', coalesce(outer_actor, ''), true),
          set_config('level_sync.reason', coalesce(outer_reason, ''), true);

  -- Somebody else's trigger may have written another level, or none.
  return jsonb_build_object(
    'success', new_level is not distinct from target_level, 'user_id', user_id, 'specialization', specialization,
    'old_level', old_level, 'new_level', coalesce(new_level, old_level),
    'message', case when new_level = target_level
                    then format('license of user %s in %s advanced from level %s to %s', user_id, specialization, old_level, target_level)
                    else format('a trigger of user_licenses changed or dropped the write: license of user %s in %s has level %s, not %s',
                                user_id, specialization, coalesce(new_level, old_level), target_level) end,
    'advanced_by', advanced_by, 'reason', reason,
    'sync_result', level_sync._sync_result(user_id, specialization, 'license', progress_before));
end
$$;
comment on function level_sync.advance_license(bigint, text, bigint, text, text) is 'Raises a license to a higher level; advanced_by and reason stand in sync_events as actor and reason. Returns jsonb: success, old_level, new_level, message, advanced_by, reason, sync_result. A target that is not above the current level or above max_levels is refused with success = false and a message.';
