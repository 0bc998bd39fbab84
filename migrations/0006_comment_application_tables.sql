-- depends: 0005_validate_foreign_keys
-- Documents both tables; a comment that is already there stays.
do $$
declare
  documented record;
  target     text;
  present    text;
begin
  for documented in
    select doc.*
      from (values
        ('public.specialization_progress', null, 'What a student earned: one row per student and specialization. Its level is kept equal to user_licenses.current_level by level_sync.'),
        ('public.specialization_progress', 'student_id', 'users.id of the student.'),
        ('public.specialization_progress', 'specialization_id', 'specializations.id.'),
        ('public.specialization_progress', 'current_level', 'Earned level, 1 to specializations.max_levels. level_sync carries a change to user_licenses.current_level in the same transaction.'),
        ('public.specialization_progress', 'total_xp', 'Experience points earned so far; never negative.'),
        ('public.specialization_progress', 'completed_sessions', 'Training sessions completed so far.'),
        ('public.specialization_progress', 'completed_projects', 'Projects completed so far.'),
        ('public.specialization_progress', 'last_activity', 'Last time something happened here; level_sync sets it when a license change arrives.'),
        ('public.user_licenses', null, 'What the academy issued: one row per user and specialization. Its level is kept equal to specialization_progress.current_level by level_sync.'),
        ('public.user_licenses', 'user_id', 'users.id of the holder.'),
        ('public.user_licenses', 'specialization_type', 'specializations.id.'),
        ('public.user_licenses', 'current_level', 'Issued level, 1 to specializations.max_levels. level_sync carries a change to specialization_progress.current_level in the same transaction.'),
        ('public.user_licenses', 'max_achieved_level', 'Highest level ever held; never goes down.'),
        ('public.user_licenses', 'started_at', 'When the license was issued.'),
        ('public.user_licenses', 'last_advanced_at', 'When the level last changed; level_sync sets it when a progress change arrives.')
      ) as doc (on_table, on_column, text)
      left join pg_catalog.pg_attribute as part
        on part.attrelid = doc.on_table::pg_catalog.regclass and part.attname = doc.on_column
     where pg_catalog.obj_description(doc.on_table::pg_catalog.regclass, 'pg_class') is null and doc.on_column is null
        or pg_catalog.col_description(doc.on_table::pg_catalog.regclass, part.attnum) is null and part.attnum is not null
  loop
    target := case when documented.on_column is null then format('table %s', documented.on_table)
                   else format('column %s.%I', documented.on_table, documented.on_column) end;
    present := case when documented.on_column is null
                    then format('pg_catalog.obj_description(pg_catalog.to_regclass(%L), ''pg_class'')', documented.on_table)
                    else format('(select pg_catalog.col_description(attrelid, attnum) from pg_catalog.pg_attribute'
                                ' where attrelid = pg_catalog.to_regclass(%L) and attname = %L)',
                                documented.on_table, documented.on_column) end;
    execute format('comment on %s is %L', target, documented.text);
    -- A comment that somebody has rewritten since, and a table that is gone, are left alone.
    insert into level_sync.application_changes (kind, on_table, name, undo_sql)
    values ('comment', documented.on_table, coalesce(documented.on_column, documented.on_table),
            format('do $undo$ begin if %s = %L then comment on %s is null; end if; end $undo$',
                   present, documented.text, target));
  end loop;
end
$$;
