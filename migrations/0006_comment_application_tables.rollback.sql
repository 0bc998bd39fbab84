-- Takes back the comments that migrate added, except those that somebody has rewritten since.
do $$
declare
  changed record;
begin
  for changed in
    select * from level_sync.application_changes as changes where changes.kind = 'comment' order by changes.change_id desc
  loop
    execute changed.undo_sql;
    delete from level_sync.application_changes as changes where changes.change_id = changed.change_id;
  end loop;
end
$$;
