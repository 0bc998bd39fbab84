-- What stood here before: what this version does not replace is an older version's, and goes when all is loaded.
drop table if exists pg_temp.functions_before;
create temp table functions_before on commit drop as
select pg_proc.oid, pg_proc.xmin::pg_catalog.text as written_by, pg_proc.ctid as place
  from pg_catalog.pg_proc
 where pg_proc.pronamespace = 'level_sync'::pg_catalog.regnamespace;

-- Loading a trigger twice changes nothing and takes no lock: a trigger is only made where it is missing or
-- differs from what was made last time.

create or replace function level_sync._ensure_trigger(relation regclass, trigger_name name, statement text, promise text)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  present text := (
    select pg_get_triggerdef(pg_trigger.oid)
      from pg_trigger
     where pg_trigger.tgrelid = _ensure_trigger.relation
       and pg_trigger.tgname = _ensure_trigger.trigger_name
       and pg_trigger.tgenabled = 'O');
begin
  if exists (
    select from level_sync.installed_triggers as installed
     where installed.relation = _ensure_trigger.relation
       and installed.trigger_name = _ensure_trigger.trigger_name
       and installed.statement = _ensure_trigger.statement
       and installed.definition = present)
  then
    return;
  end if;

  -- Both tables at once and before either is held: one after the other they would meet writers coming the other way.
  if (select pg_class.relnamespace from pg_class where pg_class.oid = relation) <> 'level_sync'::regnamespace then
    if exists (
      select from pg_trigger
       where pg_trigger.tgrelid = _ensure_trigger.relation and pg_trigger.tgname = _ensure_trigger.trigger_name)
    then
      lock table public.specialization_progress, public.user_licenses in access exclusive mode;
    else
      lock table public.specialization_progress, public.user_licenses in share row exclusive mode;
    end if;
  end if;

  execute format('drop trigger if exists %I on %s', trigger_name, relation);
  execute statement;
  execute format('comment on trigger %I on %s is %L', trigger_name, relation, promise);

  insert into level_sync.installed_triggers as installed (relation, trigger_name, statement, definition)
  select _ensure_trigger.relation, _ensure_trigger.trigger_name, _ensure_trigger.statement, pg_get_triggerdef(pg_trigger.oid)
    from pg_trigger
   where pg_trigger.tgrelid = _ensure_trigger.relation
     and pg_trigger.tgname = _ensure_trigger.trigger_name
  on conflict on constraint installed_triggers_pkey do update
     set statement = excluded.statement, definition = excluded.definition;
end
$$;
comment on function level_sync._ensure_trigger(regclass, name, text, text) is 'Makes a trigger from its CREATE TRIGGER statement, unless it is there and enabled exactly as made before.';

-- A statement trigger on a partitioned table does not see statements on its partitions: those get their own.
create or replace function level_sync._table_and_partitions(root regclass)
  returns table (relation regclass, qualified_name text) language sql stable set search_path = pg_catalog, pg_temp
as $$
  select pg_class.oid, format('%I.%I', pg_namespace.nspname, pg_class.relname)
    from pg_class
    join pg_namespace on pg_namespace.oid = pg_class.relnamespace
   where pg_class.oid = root
      or pg_class.oid in (select part.relid from pg_partition_tree(root) as part)
$$;
comment on function level_sync._table_and_partitions(regclass) is 'A table, and every partition below it.';

create or replace function level_sync._remove_triggers()
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  installed record;
begin
  if exists (
    select from pg_trigger
     where pg_trigger.tgrelid in (to_regclass('public.specialization_progress'), to_regclass('public.user_licenses'))
       and pg_trigger.tgname in (select installed_triggers.trigger_name from level_sync.installed_triggers))
  then
    lock table public.specialization_progress, public.user_licenses in access exclusive mode;
  end if;
  for installed in
    select * from level_sync.installed_triggers
     where to_regclass(installed_triggers.relation::text) is not null
  loop
    execute format('drop trigger if exists %I on %s', installed.trigger_name, installed.relation);
  end loop;
  delete from level_sync.installed_triggers;
end
$$;
comment on function level_sync._remove_triggers() is 'Removes every trigger level_sync made; the first step of a rollback.';

create or replace function level_sync._function_hash(function_oid oid)
  returns text language sql stable set search_path = pg_catalog, pg_temp
as $$
  select md5(concat_ws('|', pg_proc.prosrc, pg_proc.prosecdef, pg_proc.provolatile, pg_proc.proconfig::text))
    from pg_proc
   where pg_proc.oid = function_oid
$$;
comment on function level_sync._function_hash(oid) is 'Hash of what a function does: body, rights, volatility, settings.';
