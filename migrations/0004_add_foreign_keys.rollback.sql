-- Puts back the foreign keys that migrate replaced on tables it did not create, and the rows it moved aside.
do $$
declare
  changed record;
begin
  if exists (select from level_sync.application_changes as changes where changes.kind = 'foreign_key')
     and to_regclass('public.users') is not null and to_regclass('public.specializations') is not null
     and to_regclass('public.specialization_progress') is not null and to_regclass('public.user_licenses') is not null
  then
    -- All at once and before any of them is locked: one after the other they would meet writers coming the other way.
    lock table public.users, public.specializations, public.specialization_progress, public.user_licenses
      in access exclusive mode;
  end if;
  for changed in
    select * from level_sync.application_changes as changes where changes.kind = 'foreign_key' order by changes.change_id desc
  loop
    execute changed.undo_sql;
    delete from level_sync.application_changes as changes where changes.change_id = changed.change_id;
  end loop;

  -- The foreign keys are gone by now, and the columns that the rows had when they were moved are still there.
  if to_regprocedure('level_sync._restore_rows_or_stop()') is not null
     and to_regclass('level_sync.quarantined_rows') is not null
  then
    perform level_sync._restore_rows_or_stop();
  end if;
end
$$;
