-- Functions and views go with their dependants; the triggers on the application's tables are among those.
do $$
declare
  statement text;
begin
  -- All statements first: each drop takes others of the list along, which then no longer have a name.
  foreach statement in array
    array(
      select format('drop %s if exists %s cascade',
                    case routine.prokind when 'p' then 'procedure' else 'function' end,
                    routine.oid::pg_catalog.regprocedure)
        from pg_catalog.pg_proc as routine
       where routine.pronamespace = 'level_sync'::pg_catalog.regnamespace)
    || array(
      select format('drop view if exists %s cascade', relation.oid::pg_catalog.regclass)
        from pg_catalog.pg_class as relation
       where relation.relnamespace = 'level_sync'::pg_catalog.regnamespace
         and relation.relkind = 'v')
  loop
    execute statement;
  end loop;
end
$$;

drop table if exists level_sync.application_changes;

-- yoyo may keep its own tables in this schema while it works; whoever removes those removes the schema.
do $$
begin
  if not exists (select from pg_catalog.pg_class where relnamespace = 'level_sync'::pg_catalog.regnamespace) then
    drop schema level_sync;
  end if;
end
$$;
