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
