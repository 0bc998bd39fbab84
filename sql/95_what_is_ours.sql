-- The last file: everything of this version is there. A trigger of an older version, or one that somebody renamed,
-- goes; and what was loaded is remembered, so that health sees a function that somebody replaced.

do $$
declare
  stray record;
begin
  for stray in
    select pg_trigger.tgname, pg_trigger.tgrelid::pg_catalog.regclass as relation
      from pg_catalog.pg_trigger
      join pg_catalog.pg_proc on pg_proc.oid = pg_trigger.tgfoid
     where pg_proc.pronamespace = 'level_sync'::pg_catalog.regnamespace
       and not pg_trigger.tgisinternal
       and pg_trigger.tgparentid = 0
       and not exists (
         select from level_sync.installed_triggers as installed
          where installed.relation = pg_trigger.tgrelid and installed.trigger_name = pg_trigger.tgname)
  loop
    execute format('drop trigger %I on %s', stray.tgname, stray.relation);
  end loop;
end
$$;

delete from level_sync.installed_functions;

insert into level_sync.installed_functions (signature, hash)
select pg_proc.oid::pg_catalog.regprocedure::text, level_sync._function_hash(pg_proc.oid)
  from pg_catalog.pg_proc
 where pg_proc.pronamespace = 'level_sync'::pg_catalog.regnamespace;
