-- What this version has not loaded by now is an older version's: its functions and triggers go, and so does a trigger
-- that somebody renamed. Before the rights are set, because that writes every function's row.

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
    if stray.relation in ('public.specialization_progress'::pg_catalog.regclass, 'public.user_licenses'::pg_catalog.regclass) then
      -- Both before either: one after the other they would meet writers coming the other way.
      lock table public.specialization_progress, public.user_licenses in access exclusive mode;
    end if;
    execute format('drop trigger %I on %s', stray.tgname, stray.relation);
  end loop;
  for stray in
    select pg_proc.oid::pg_catalog.regprocedure as signature
      from pg_temp.functions_before as before
      join pg_catalog.pg_proc
        on pg_proc.oid = before.oid and pg_proc.xmin::pg_catalog.text = before.written_by and pg_proc.ctid = before.place
  loop
    execute format('drop routine %s', stray.signature);
  end loop;
end
$$;
