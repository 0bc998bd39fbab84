-- depends: 0003_create_level_sync_tables
-- Columns that adopted tables lack and level_sync can do with empty. Each is added without a default, so that no row
-- is rewritten; the pair and its level are never added: without them the tables are others than meant.
do $$
declare
  missing record;
begin
  for missing in
    select wanted.*
      from (values
        ('public.specializations', 'max_levels', 'integer'),
        ('public.specialization_progress', 'total_xp', 'bigint'),
        ('public.specialization_progress', 'completed_sessions', 'integer'),
        ('public.specialization_progress', 'completed_projects', 'integer'),
        ('public.specialization_progress', 'last_activity', 'timestamptz'),
        ('public.user_licenses', 'max_achieved_level', 'integer'),
        ('public.user_licenses', 'started_at', 'timestamptz'),
        ('public.user_licenses', 'last_advanced_at', 'timestamptz')
      ) as wanted (on_table, name, type)
     where not exists (
       select from pg_catalog.pg_attribute as present
        where present.attrelid = wanted.on_table::pg_catalog.regclass
          and present.attname = wanted.name and not present.attisdropped)
  loop
    execute format('alter table %s add column %I %s', missing.on_table, missing.name, missing.type);
    insert into level_sync.application_changes (change, undo_sql)
    values (format('added column %I to %s', missing.name, missing.on_table),
            format('alter table if exists %s drop column if exists %I', missing.on_table, missing.name));
  end loop;
end
$$;
