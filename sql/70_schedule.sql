-- Two pg_cron jobs: the reconcile, and a maintenance every minute. Loading this file schedules nothing.

-- Cron, as far as a five-field expression goes: lists, ranges, steps, names of months and days.
create or replace function level_sync._cron_field(field text, lowest integer, highest integer, names text[] default '{}')
  returns integer[] language plpgsql immutable set search_path = pg_catalog, pg_temp
as $$
declare
  given  constant text := field;
  part   text;
  bounds text[];
  step   integer;
  first  integer;
  last   integer;
  found_values integer[] := array[]::integer[];
begin
  field := lower(field);
  for position in 1 .. coalesce(cardinality(names), 0) loop
    field := regexp_replace(field, '\m' || names[position] || '\M', (position - 1 + lowest)::text, 'g');
  end loop;
  foreach part in array string_to_array(field, ',') loop
    bounds := regexp_match(part, '^(?:\*|(\d{1,2})(?:-(\d{1,2}))?)(?:/(\d{1,2}))?$');
    if bounds is null then
      raise invalid_parameter_value using
        message = format('%L is not a cron field between %s and %s', given, lowest, highest);
    end if;
    step  := coalesce(bounds[3]::integer, 1);
    first := coalesce(bounds[1]::integer, lowest);
    last  := coalesce(bounds[2]::integer, case when bounds[1] is null or bounds[3] is not null then highest else first end);
    if first < lowest or last > highest or first > last or step < 1 then
      raise invalid_parameter_value using
        message = format('%L is out of range: a cron field between %s and %s', given, lowest, highest);
    end if;
    found_values := found_values || array(select generate_series(first, last, step));
  end loop;
  return found_values;
end
$$;
comment on function level_sync._cron_field(text, integer, integer, text[]) is 'The values one field of a cron expression matches. Raises invalid_parameter_value for anything else.';

create or replace function level_sync._last_slot(cron_expression text, before timestamptz)
  returns timestamptz language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
  fields constant text[] := regexp_split_to_array(btrim(cron_expression), '\s+');
begin
  if cardinality(fields) <> 5 then
    raise invalid_parameter_value using
      message = format('%L is not a cron expression of five fields', cron_expression),
      hint    = 'Minute, hour, day of the month, month, day of the week: 0 */6 * * * is every six hours.';
  end if;

  declare
    minutes  constant integer[] := level_sync._cron_field(fields[1], 0, 59);
    hours    constant integer[] := level_sync._cron_field(fields[2], 0, 23);
    days     constant integer[] := level_sync._cron_field(fields[3], 1, 31);
    months   constant integer[] := level_sync._cron_field(fields[4], 1, 12,
      array['jan','feb','mar','apr','may','jun','jul','aug','sep','oct','nov','dec']);
    weekdays constant integer[] := level_sync._cron_field(fields[5], 0, 7,
      array['sun','mon','tue','wed','thu','fri','sat']);
    -- pg_cron counts in GMT, from 1.5 on in cron.timezone.
    zone     constant text      := coalesce((select nullif(setting, '') from pg_settings where name = 'cron.timezone'), 'GMT');
    local_at constant timestamp := before at time zone zone;
  begin
    return (
      select slot.at at time zone zone
        from generate_series(0, 366 * 5) as days_back (count)
       cross join lateral (select date_trunc('day', local_at) - make_interval(days => days_back.count) as start) as day
       cross join lateral (
         select max(day.start + make_interval(hours => hour.value, mins => minute.value)) as at
           from unnest(hours) as hour (value), unnest(minutes) as minute (value)
          where day.start + make_interval(hours => hour.value, mins => minute.value) <= local_at
       ) as slot
       where slot.at is not null
         and extract(month from day.start) = any (months)
         -- As cron does: with both a day of the month and a weekday given, either will do.
         and case when fields[3] like '*%' or fields[5] like '*%'
                  then extract(day from day.start) = any (days)
                       and (extract(dow from day.start) = any (weekdays) or 7 = any (weekdays) and extract(dow from day.start) = 0)
                  else extract(day from day.start) = any (days)
                       or extract(dow from day.start) = any (weekdays) or 7 = any (weekdays) and extract(dow from day.start) = 0
             end
       order by days_back.count
       limit 1);
  end;
end
$$;
comment on function level_sync._last_slot(text, timestamptz) is 'When the schedule was due the last time at or before a moment; NULL if never within five years.';

-- pg_cron shows its settings to members of pg_read_all_settings only: what the owner of level_sync sees, its readers may know.
create or replace function level_sync._cron_database()
  returns text language sql stable security definer set search_path = pg_catalog, pg_temp
as $$
  select pg_settings.setting from pg_settings where pg_settings.name = 'cron.database_name'
$$;
comment on function level_sync._cron_database() is 'Database in which pg_cron lives; NULL where it is not preloaded, or where the owner of level_sync may not see that.';

-- For who may not see the setting, pg_cron may be preloaded or not. Its table is looked up in the catalog: to_regclass would
-- raise for a role without USAGE on schema cron, such as any reader.
create or replace function level_sync._cron_access(out is_preloaded boolean, out is_here boolean, out may_read boolean, out cron_database text)
  language sql stable set search_path = pg_catalog, pg_temp
as $$
  select case when shown.setting is not null or job.oid is not null then true
              when pg_has_role(current_user, 'pg_read_all_settings', 'usage') then false end,
         job.oid is not null,
         coalesce(has_schema_privilege(job.relnamespace, 'usage') and has_table_privilege(job.oid, 'select'), false),
         shown.setting
    from (
      select coalesce((select pg_settings.setting from pg_settings where pg_settings.name = 'cron.database_name'),
                      level_sync._cron_database())
    ) as shown (setting)
    left join (
      select pg_class.oid, pg_class.relnamespace
        from pg_class
        join pg_namespace on pg_namespace.oid = pg_class.relnamespace
       where pg_namespace.nspname = 'cron' and pg_class.relname = 'job'
    ) as job on true
$$;
comment on function level_sync._cron_access() is 'Whether pg_cron is preloaded (NULL: this role may not see that), lives in this database and may be read; and in which database it lives.';

create or replace function level_sync._wanted_cron_jobs(cron_expression text default null)
  returns table (jobname text, schedule text, command text, signature text) language sql stable security definer
  set search_path = pg_catalog, pg_temp
as $$
  select 'level_sync_reconcile', coalesce(cron_expression, settings.schedule),
         'call level_sync.reconcile(started_by => ''cron'')', 'level_sync.reconcile(boolean,text,bigint,boolean,text)'
    from level_sync.settings
   union all
  select 'level_sync_maintain', '* * * * *', 'call level_sync.maintain()', 'level_sync.maintain()'
$$;
comment on function level_sync._wanted_cron_jobs(text) is 'The two jobs as they should stand in cron.job.';

create or replace function level_sync.schedule(cron_expression text default null)
  returns jsonb language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  cron      record;
  job       record;
  job_id    bigint;
  wanted    text  := coalesce(cron_expression, (select settings.schedule from level_sync.settings));
  scheduled jsonb := jsonb_build_object();
begin
  perform level_sync._last_slot(wanted, clock_timestamp());
  select * into cron from level_sync._cron_access();
  if not cron.is_here then
    raise feature_not_supported using
      message = case when cron.is_preloaded and cron.cron_database <> current_database()
                     then format('pg_cron lives in database %I, not in %I', cron.cron_database, current_database())
                     else 'pg_cron is not installed in this database' end,
      hint    = case when cron.is_preloaded and cron.cron_database <> current_database()
                     then 'Run level-sync schedule, which makes the jobs there with cron.schedule_in_database.'
                     else 'Install the package (postgresql-NN-cron), set shared_preload_libraries = ''pg_cron'', restart, and create extension pg_cron; or let another scheduler, such as cron or a systemd timer, run "level-sync reconcile" and "call level_sync.maintain()", and set level_sync.settings.uses_pg_cron to false.'
                          || case when cron.is_preloaded is null then ' If pg_cron lives in another database, grant pg_read_all_settings to this role, so that it can be found.' else '' end end;
  end if;

  update level_sync.settings set schedule = wanted, uses_pg_cron = true;
  for job in select * from level_sync._wanted_cron_jobs(wanted) loop
    execute 'select cron.schedule($1, $2, $3)' into job_id using job.jobname, job.schedule, job.command;
    scheduled := scheduled || jsonb_build_object(job.jobname, job_id);
  end loop;
  return scheduled || jsonb_build_object('schedule', wanted);
end
$$;
comment on function level_sync.schedule(text) is 'Makes or updates the pg_cron jobs level_sync_reconcile (default: settings.schedule) and level_sync_maintain (every minute). Returns their ids. Raises feature_not_supported with what to do where pg_cron is not in this database, invalid_parameter_value for a bad expression.';

create or replace function level_sync.unschedule()
  returns integer language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  removed integer := 0;
begin
  if (select access.is_here from level_sync._cron_access() as access) then
    execute $sql$
      select count(cron.unschedule(job.jobid))
        from cron.job
       where (starts_with(job.jobname, 'level_sync_reconcile') or starts_with(job.jobname, 'level_sync_maintain'))
         and job.database = current_database()
    $sql$ into removed;
  end if;
  return removed;
end
$$;
comment on function level_sync.unschedule() is 'Removes both pg_cron jobs and returns how many there were.';
