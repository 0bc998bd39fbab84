-- The last file: everything of this version is loaded. What an older version has left is dropped, rights are set, and what
-- was loaded is remembered, so that health sees a function that somebody replaced.

-- Before the rights are set, because that writes every function's row. A trigger that somebody renamed goes, too.
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

-- Nobody but the owner may run or write anything here until it is granted: level-sync grant.
-- The triggers need no such right: they run for whoever may write the application's tables.

revoke all on schema level_sync from public;
revoke all on all tables in schema level_sync from public;
revoke all on all sequences in schema level_sync from public;
revoke all on all routines in schema level_sync from public;

-- Whoever was granted a role before gets what that role needs in this version.
select level_sync._grant_to(grantee.rolname, case when bool_or(right_.may_run) then 'operator' else 'reader' end)
  from (
    select (aclexplode(pg_class.relacl)).grantee, false as may_run
      from pg_catalog.pg_class
     where pg_class.oid = 'level_sync.sync_log'::pg_catalog.regclass
     union all
    select (aclexplode(pg_proc.proacl)).grantee, true
      from pg_catalog.pg_proc
     where pg_proc.pronamespace = 'level_sync'::pg_catalog.regnamespace and pg_proc.proname = 'reconcile'
  ) as right_
  join pg_catalog.pg_roles as grantee on grantee.oid = right_.grantee
 where grantee.oid <> (select pg_namespace.nspowner from pg_catalog.pg_namespace where pg_namespace.nspname = 'level_sync')
 group by grantee.rolname;

delete from level_sync.installed_functions;

insert into level_sync.installed_functions (signature, hash)
select pg_proc.oid::pg_catalog.regprocedure::text, level_sync._function_hash(pg_proc.oid)
  from pg_catalog.pg_proc
 where pg_proc.pronamespace = 'level_sync'::pg_catalog.regnamespace;
