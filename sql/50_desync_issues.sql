-- The one definition of a desync: a pair whose sides differ, or of which one side is missing.
-- On the covering primary keys it is an index-only merge join.

-- FORCE ROW LEVEL SECURITY binds the owner too, and then "missing" may mean "hidden".
create or replace function level_sync._hidden_tables()
  returns text language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select string_agg(needed.name, ', ' order by needed.name)
    from (values ('users'), ('specializations'), ('specialization_progress'), ('user_licenses')) as needed (name)
   where row_security_active(format('public.%I', needed.name)::regclass)
$$;
comment on function level_sync._hidden_tables() is 'The tables whose rows row level security may hide from the owner of level_sync; NULL where there is none.';

create or replace function level_sync._repairs()
  returns table (action text, issue_type text, side text, change text) language sql immutable rows 4
as $$
  values ('create_license',  'missing_license',  'progress', 'created'),
         ('create_progress', 'missing_progress', 'license',  'created'),
         ('update_license',  'level_mismatch',   'progress', 'level_changed'),
         ('update_progress', 'level_mismatch',   'license',  'level_changed')
$$;
comment on function level_sync._repairs() is 'What each action repairs, and the side that it follows as if that one had been written so.';

-- It has no SET clause, because only then the planner sees through it, for a range of users as for all of them. It is
-- only called by functions that pin their search_path.
create or replace function level_sync._desync_issues_between(first_user bigint, last_user bigint)
  returns table (user_id bigint, specialization text, issue_type text, progress_level bigint, license_level bigint,
  difference bigint, recommended_action text) language sql stable
as $$
  select coalesce(progress.user_id, license.user_id)::bigint,
         coalesce(progress.specialization, license.specialization)::text,
         issue.issue_type,
         progress.level::bigint,
         license.level::bigint,
         issue.difference,
         case issue.issue_type
           when 'level_mismatch' then
                case (select settings.conflict_policy from level_sync.settings)
                  when 'progress_wins' then 'update_license'
                  when 'license_wins'  then 'update_progress'
                  when 'highest_wins'  then case when license.level > coalesce(progress.level, 0)
                                                 then 'update_progress' else 'update_license' end
                  when 'latest_wins'   then (
                    -- Looked up here, for the few pairs that differ: the scan below stays index-only. As seconds,
                    -- so that a timestamp without time zone counts as UTC.
                    select case when extract(epoch from issued.last_advanced_at) > extract(epoch from earned.last_activity)
                                then 'update_progress' else 'update_license' end
                      from public.specialization_progress as earned
                      join public.user_licenses as issued
                        on issued.user_id = earned.student_id and issued.specialization_type = earned.specialization_id
                     where earned.student_id = progress.user_id
                       and earned.specialization_id = progress.specialization)
                  else 'report_only'
                end
           else (select repair.action from level_sync._repairs() as repair where repair.issue_type = issue.issue_type)
         end
    from (
      select earned.*
        from level_sync.progress_side as earned
       where earned.user_id between first_user and last_user
         and earned.specialization is not null  -- a row without a pair is an orphan, not a desync
    ) as progress
    full join (
      select issued.*
        from level_sync.license_side as issued
       where issued.user_id between first_user and last_user
         and issued.specialization is not null
    ) as license
      on license.user_id = progress.user_id
     and license.specialization = progress.specialization
   cross join lateral (
     select case when license.user_id is null then 'missing_license'
                 when progress.user_id is null then 'missing_progress'
                 else 'level_mismatch'
            end as issue_type,
            abs(progress.level::bigint - license.level) as difference
   ) as issue
   where progress.user_id is null
      or license.user_id is null
      or progress.level is distinct from license.level
$$;
comment on function level_sync._desync_issues_between(bigint, bigint) is 'The desyncs of the users in a range of ids; desync_issues is this over all of them.';

-- A reader of the view needs no right on the application's tables, and his search_path makes no difference.
create or replace function level_sync._all_desync_issues()
  returns table (user_id bigint, specialization text, issue_type text, progress_level bigint, license_level bigint,
  difference bigint, recommended_action text) language sql stable security definer rows 100
  set search_path = pg_catalog, pg_temp
as $$
  select * from level_sync._desync_issues_between(-9223372036854775808, 9223372036854775807)
$$;
comment on function level_sync._all_desync_issues() is 'The desyncs of all users, seen with the rights of the owner.';

create or replace view level_sync.desync_issues as
select issues.*
  from level_sync._all_desync_issues() as issues;

comment on view level_sync.desync_issues is 'Every pair whose sides differ: level_mismatch, missing_license or missing_progress. Empty when all is well.';
comment on column level_sync.desync_issues.user_id is 'users.id of the pair.';
comment on column level_sync.desync_issues.specialization is 'specializations.id of the pair.';
comment on column level_sync.desync_issues.issue_type is 'level_mismatch, missing_license or missing_progress.';
comment on column level_sync.desync_issues.progress_level is 'specialization_progress.current_level; NULL where the row is missing.';
comment on column level_sync.desync_issues.license_level is 'user_licenses.current_level; NULL where the row is missing.';
comment on column level_sync.desync_issues.difference is 'Levels between the two sides; NULL where one is missing.';
comment on column level_sync.desync_issues.recommended_action is 'create_license, create_progress, update_license, update_progress or report_only, after settings.conflict_policy.';

create or replace function level_sync.find_desync_issues(specialization text default null)
  returns setof level_sync.desync_issues language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select issues.*
    from level_sync.desync_issues as issues
   where find_desync_issues.specialization is null
      or issues.specialization = find_desync_issues.specialization
   order by issues.user_id, issues.specialization
$$;
comment on function level_sync.find_desync_issues(text) is 'The rows of desync_issues for one specialization, or all of them for NULL, in key order.';

create or replace function level_sync._count_desyncs()
  returns table (issue_type text, specialization text, pairs bigint) language sql stable security definer
  set search_path = pg_catalog, pg_temp
as $$
  with counted as (
    select issues.issue_type, issues.specialization, count(*) as pairs
      from level_sync.desync_issues as issues
     group by issues.issue_type, issues.specialization
  ), possible as (
    select kind.issue_type, known.id as specialization
      from unnest(array['level_mismatch', 'missing_license', 'missing_progress']) as kind (issue_type)
     cross join public.specializations as known
  )
  select issue_type, specialization, coalesce(counted.pairs, 0)
    from possible
    full join counted using (issue_type, specialization)
$$;
comment on function level_sync._count_desyncs() is 'How many pairs of each specialization have each kind of desync; 0 where none has.';
