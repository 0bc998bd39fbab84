-- level-sync grant and revoke: what a reader may see and an operator may run, each by name.

create or replace function level_sync._grant_to(role_name name, kind text)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  reading   constant name[] := array['_all_desync_issues', 'find_desync_issues', '_count_desyncs', '_check_triggers', '_check_functions',
    '_check_foreign_keys', '_check_orphans', '_check_hidden_rows', '_check_pairs', '_check_queue', '_check_runs',
    '_check_schedule', '_schema_version', '_row_counts', '_cron_database', '_cron_access', '_cron_jobs_query', '_check_cron_jobs'];
  operating constant name[] := array['reconcile', '_detect_outer_transaction', '_refusal_to_commit', '_begin_batch',
    '_validate_run_arguments', '_run_lock', '_try_run_lock', '_log_skipped_run', '_start_run', '_run_step', '_finish_run',
    '_drain_batch', 'drain_queue', 'requeue', 'undo', 'purge', '_purge_batch', 'maintain', '_is_run_missed', '_check_live', 'sync_progress_to_license', 'sync_license_to_progress',
    'sync_user', 'update_progress', 'advance_license'];
  granted   name[];
  missing   name[];
  routine   record;
begin
  granted := case kind when 'reader' then reading when 'operator' then reading || operating end;
  if granted is null then
    raise invalid_parameter_value using
      message = format('%L is neither reader nor operator', kind);
  end if;
  if not exists (select from pg_roles where pg_roles.rolname = role_name) then
    raise undefined_object using
      message = format('there is no role %L', role_name),
      hint    = 'create role ... first.';
  end if;
  select array_agg(wanted.name)
    into missing
    from unnest(granted) as wanted (name)
   where not exists (
     select from pg_proc
      where pg_proc.pronamespace = 'level_sync'::regnamespace and pg_proc.proname = wanted.name);
  if missing is not null then
    raise undefined_function using
      message = format('level_sync lacks %s: run level-sync migrate', array_to_string(missing, ', '));
  end if;

  perform level_sync._revoke_from(role_name);
  execute format('grant usage on schema level_sync to %I', role_name);
  execute format('grant select on level_sync.settings, level_sync.sync_log, level_sync.sync_events, level_sync.sync_queue,
                  level_sync.sync_plan, level_sync.desync_issues, level_sync.health, level_sync.quick_health, level_sync.installed_functions to %I', role_name);
  if kind = 'operator' then
    execute format('grant update on level_sync.settings to %I', role_name);
  end if;
  for routine in
    select pg_proc.oid::regprocedure as signature
      from pg_proc
     where pg_proc.pronamespace = 'level_sync'::regnamespace
       and pg_proc.proname = any (granted)
  loop
    execute format('grant execute on routine %s to %I', routine.signature, role_name);
  end loop;
end
$$;
comment on function level_sync._grant_to(name, text) is 'Gives a role the rights of a reader (see everything, change nothing) or of an operator (also run, repair, undo, requeue and change settings), and no others of level_sync. Raises undefined_object for an unknown role.';

create or replace function level_sync._revoke_from(role_name name)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from pg_roles where pg_roles.rolname = role_name) then
    raise undefined_object using message = format('there is no role %L', role_name);
  end if;
  execute format('revoke all on all tables in schema level_sync from %I', role_name);
  execute format('revoke all on all routines in schema level_sync from %I', role_name);
  execute format('revoke all on schema level_sync from %I', role_name);
end
$$;
comment on function level_sync._revoke_from(name) is 'Takes every right in level_sync from a role.';
