-- Puts back the foreign keys and comments that migrate changed on tables it did not create, and the rows it moved aside.
do $$
declare
  done record;
begin
  if exists (select from level_sync.application_changes where change like '% foreign key %')
     and to_regclass('public.users') is not null and to_regclass('public.specializations') is not null
     and to_regclass('public.specialization_progress') is not null and to_regclass('public.user_licenses') is not null
  then
    -- All at once and before anything is held: one after the other they would meet writers coming the other way.
    lock table public.users, public.specializations, public.specialization_progress, public.user_licenses
      in access exclusive mode;
  end if;
  for done in
    select change_id, undo_sql from level_sync.application_changes where change not like 'added column %' order by change_id desc
  loop
    execute done.undo_sql;
    delete from level_sync.application_changes where change_id = done.change_id;
  end loop;

  -- The foreign keys are gone by now, the columns the rows were set aside with are still there.
  if to_regprocedure('level_sync._restore_rows_or_stop()') is not null
     and to_regclass('level_sync.quarantined_rows') is not null
  then
    perform level_sync._restore_rows_or_stop();
  end if;
end
$$;
