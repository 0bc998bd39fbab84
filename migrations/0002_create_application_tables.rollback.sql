-- Removes the columns that migrate added to tables it did not create, unless there is something in them by now.
do $$
declare
  added     record;
  is_filled boolean;
begin
  for added in
    select changes.*
      from level_sync.application_changes as changes
     where changes.kind = 'column'
     order by changes.change_id desc
  loop
    is_filled := false;
    if exists (
      select from pg_catalog.pg_attribute as present
       where present.attrelid = pg_catalog.to_regclass(added.on_table)
         and present.attname = added.name and not present.attisdropped)
    then
      execute format('select exists (select from %s where %I is not null)', added.on_table, added.name) into is_filled;
    end if;
    if is_filled then
      raise warning 'column % of % stays, because there are values in it', added.name, added.on_table;
    else
      execute added.undo_sql;
    end if;
    delete from level_sync.application_changes where change_id = added.change_id;
  end loop;
end
$$;
