-- Removes the columns that migrate added to tables it did not create.
do $$
declare
  done record;
begin
  for done in
    select change_id, undo_sql from level_sync.application_changes where change like 'added column %' order by change_id desc
  loop
    execute done.undo_sql;
    delete from level_sync.application_changes where change_id = done.change_id;
  end loop;
end
$$;
