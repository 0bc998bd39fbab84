-- depends: 0003_create_level_sync_tables
-- Four foreign keys with ON DELETE RESTRICT forbid orphans. An older one on the same column is replaced in the
-- same statement, so there is never a moment without one; its ON UPDATE rule and its deferral stay. Existing rows
-- are checked by the next migration, which does not block writers.
do $$
declare
  wanted   record;
  older    record;
  drops    text;
  adds     text;
  kept     text;
  is_there boolean;
begin
  -- So that every name below, also in the SQL kept for a rollback, comes out with its schema.
  perform set_config('search_path', 'pg_catalog', true);

  for wanted in
    select key.*,
           key.on_table::pg_catalog.regclass as relation,
           target.attnum as column_number
      from (values
        ('public.specialization_progress', 'student_id',          'public.users',           'fk_specialization_progress_user'),
        ('public.specialization_progress', 'specialization_id',   'public.specializations', 'fk_specialization_progress_spec'),
        ('public.user_licenses',           'user_id',             'public.users',           'fk_user_licenses_user'),
        ('public.user_licenses',           'specialization_type', 'public.specializations', 'fk_user_licenses_spec')
      ) as key (on_table, on_column, refers_to, name)
      join pg_catalog.pg_attribute as target
        on target.attrelid = key.on_table::pg_catalog.regclass and target.attname = key.on_column
  loop
    drops := '';
    kept  := '';
    for older in
      select present.conname, pg_catalog.pg_get_constraintdef(present.oid) as definition,
             pg_catalog.obj_description(present.oid, 'pg_constraint') as description,
             case present.confupdtype when 'c' then ' on update cascade' when 'n' then ' on update set null'
                                      when 'd' then ' on update set default' when 'r' then ' on update restrict'
                                      else '' end
               || case when present.condeferred then ' deferrable initially deferred'
                       when present.condeferrable then ' deferrable' else '' end as rules
        from pg_catalog.pg_constraint as present
       where present.conrelid = wanted.relation
         and present.contype = 'f'
         and present.confrelid = wanted.refers_to::pg_catalog.regclass
         and present.conkey = array[wanted.column_number]
         and present.conparentid = 0
         and not (present.conname = wanted.name and present.confdeltype = 'r')
    loop
      drops := drops || format('drop constraint %I, ', older.conname);
      kept  := older.rules;
      insert into level_sync.application_changes (kind, on_table, name, undo_sql)
      values ('foreign_key', wanted.on_table, older.conname,
              format('alter table %s add constraint %I %s', wanted.relation, older.conname, older.definition)
                || case when older.description is null then ''
                        else format('; comment on constraint %I on %s is %L', older.conname, wanted.relation, older.description)
                   end);
    end loop;

    is_there := exists (
      select from pg_catalog.pg_constraint as present
       where present.conrelid = wanted.relation
         and present.conname = wanted.name
         and present.contype = 'f'
         and present.confrelid = wanted.refers_to::pg_catalog.regclass
         and present.conkey = array[wanted.column_number]
         and present.confdeltype = 'r');
    continue when is_there and drops = '';

    -- All at once and before anything is held: one after the other they would meet writers coming the other way.
    lock table public.users, public.specializations, public.specialization_progress, public.user_licenses
      in access exclusive mode;
    if is_there then
      execute format('alter table %s ', wanted.relation) || rtrim(drops, ', ');
      continue;
    end if;

    adds := format('add constraint %I foreign key (%I) references %s (id) on delete restrict%s',
                   wanted.name, wanted.on_column, wanted.refers_to, kept);
    -- Before PostgreSQL 18 a partitioned table takes no foreign key that is not valid yet.
    if current_setting('server_version_num')::integer >= 180000
       or (select relkind from pg_catalog.pg_class where oid = wanted.relation) <> 'p' then
      adds := adds || ' not valid';
    end if;
    execute format('alter table %s ', wanted.relation) || drops || adds;

    -- Undone before the older one comes back: the highest change_id goes first.
    insert into level_sync.application_changes (kind, on_table, name, undo_sql)
    values ('foreign_key', wanted.on_table, wanted.name,
            format('alter table if exists %s drop constraint if exists %I', wanted.relation, wanted.name));
  end loop;
end
$$;
