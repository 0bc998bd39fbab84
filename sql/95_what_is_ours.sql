-- The last file: everything of this version is there. What was loaded is remembered, so that health sees a function
-- that somebody replaced.

delete from level_sync.installed_functions;

insert into level_sync.installed_functions (signature, hash)
select pg_proc.oid::pg_catalog.regprocedure::text, level_sync._function_hash(pg_proc.oid)
  from pg_catalog.pg_proc
 where pg_proc.pronamespace = 'level_sync'::pg_catalog.regnamespace;
