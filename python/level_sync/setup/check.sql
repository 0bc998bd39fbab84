-- What `level-sync check` asks a database before anything is installed: it reads, and works without our schema.

-- name: server()^
select current_setting('server_version_num')::integer as version_number,
       current_setting('server_version') as version,
       current_user as role,
       (select rolsuper from pg_roles where rolname = current_user) as is_superuser,
       has_database_privilege(current_database(), 'create') as may_create_schema,
       has_schema_privilege('public', 'create') as may_create_tables,
       to_regnamespace('level_sync') is not null as is_installed,
       has_schema_privilege('public', 'public', 'create') as may_anybody_create,
       (select setting from pg_settings where name = 'cron.database_name') as cron_database,
       pg_has_role(current_user, 'pg_read_all_settings', 'usage') as may_read_settings,
       current_database() as database

-- name: tables()
select wanted.name,
       found.oid is not null as is_there,
       found.relkind = 'p' as is_partitioned,
       coalesce(found.relkind in ('r', 'p'), true) as is_table,
       coalesce(pg_has_role(found.relowner, 'usage'), true) as is_owned,
       pg_get_userbyid(found.relowner) as owner,
       (select pg_roles.rolsuper from pg_roles where pg_roles.oid = found.relowner) as is_owned_by_superuser,
       nullif(found.reltuples, -1)::bigint as estimated_rows,
       coalesce(found.relrowsecurity, false) as has_row_security,
       coalesce(found.relforcerowsecurity, false) as forces_row_security,
       (select array_agg(pg_rewrite.rulename::text order by pg_rewrite.rulename)
          from pg_rewrite where pg_rewrite.ev_class = found.oid) as rules,
       (select array_agg(pg_namespace.nspname::text order by pg_namespace.nspname)
          from pg_class as elsewhere
          join pg_namespace on pg_namespace.oid = elsewhere.relnamespace
         where elsewhere.relname = wanted.name and elsewhere.relkind in ('r', 'p')
           and pg_namespace.nspname not in ('public', 'level_sync')
           and pg_namespace.nspname !~ '^pg_') as other_schemas
  from (values ('users'), ('specializations'), ('specialization_levels'), ('specialization_progress'), ('user_licenses'))
         as wanted (name)
  left join pg_class as found
    on found.relname = wanted.name and found.relnamespace = 'public'::regnamespace

-- name: columns()
-- family: what level_sync needs of the type. An empty type: the column is missing.
select wanted.on_table, wanted.name, wanted.family, wanted.is_key,
       coalesce(format_type(present.atttypid, present.atttypmod), '') as type,
       case when pg_type.typtype = 'e' then 'enum'
            when pg_type.oid in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) then 'integer'
            when pg_type.typcategory = 'S' then 'text'
            when pg_type.oid = 'timestamptz'::regtype then 'timestamptz'
            when pg_type.oid = 'timestamp'::regtype then 'timestamp'
            else pg_type.typname end as actual_family,
       case when pg_type.oid in ('varchar'::regtype, 'bpchar'::regtype) and present.atttypmod > 4
            then present.atttypmod - 4 end as max_length
  from (values
    ('users', 'id', 'integer', true),
    ('specializations', 'id', 'text', true),
    ('specializations', 'max_levels', 'integer', false),
    ('specialization_progress', 'student_id', 'integer', true),
    ('specialization_progress', 'specialization_id', 'text', true),
    ('specialization_progress', 'current_level', 'integer', true),
    ('specialization_progress', 'total_xp', 'integer', false),
    ('specialization_progress', 'completed_sessions', 'integer', false),
    ('specialization_progress', 'completed_projects', 'integer', false),
    ('specialization_progress', 'last_activity', 'timestamptz', false),
    ('user_licenses', 'user_id', 'integer', true),
    ('user_licenses', 'specialization_type', 'text', true),
    ('user_licenses', 'current_level', 'integer', true),
    ('user_licenses', 'max_achieved_level', 'integer', false),
    ('user_licenses', 'started_at', 'timestamptz', false),
    ('user_licenses', 'last_advanced_at', 'timestamptz', false)
  ) as wanted (on_table, name, family, is_key)
  join pg_class as relation
    on relation.relname = wanted.on_table and relation.relnamespace = 'public'::regnamespace
  left join pg_attribute as present
    on present.attrelid = relation.oid and present.attname = wanted.name and not present.attisdropped
  left join pg_type on pg_type.oid = present.atttypid

-- name: unique_pairs()
-- Which of the two tables has a unique index on exactly the pair.
select keyed.on_table,
       (select pg_class.relkind = 'p' from pg_class where pg_class.oid = to_regclass('public.' || keyed.on_table)) as is_partitioned,
       exists (
         select from pg_index
          where pg_index.indrelid = to_regclass('public.' || keyed.on_table)
            and pg_index.indisunique and pg_index.indisvalid and pg_index.indpred is null and pg_index.indexprs is null
            and (select array_agg(part.attname::text order by part.attname)
                   from unnest(pg_index.indkey) with ordinality as key (number, place)
                   join pg_attribute as part on part.attrelid = pg_index.indrelid and part.attnum = key.number
                  where key.place <= pg_index.indnkeyatts) = keyed.columns) as is_unique
  from (values ('specialization_progress', array['specialization_id', 'student_id']),
               ('user_licenses', array['specialization_type', 'user_id'])) as keyed (on_table, columns)

-- name: foreign_keys()
select wanted.on_table, wanted.on_column, wanted.refers_to, wanted.name,
       coalesce((select array_agg(present.conname::text || ' ' || pg_get_constraintdef(present.oid) order by present.conname)
                   from pg_constraint as present
                  where present.conrelid = to_regclass('public.' || wanted.on_table) and present.contype = 'f'
                    and present.confrelid = to_regclass('public.' || wanted.refers_to)
                    and present.conkey = array[part.attnum]
                    and not (present.conname = wanted.name and present.confdeltype = 'r')), '{}') as replaced,
       exists (select from pg_constraint as present
                where present.conrelid = to_regclass('public.' || wanted.on_table) and present.conname = wanted.name
                  and present.confdeltype = 'r') as is_there
  from (values
    ('specialization_progress', 'student_id', 'users', 'fk_specialization_progress_user'),
    ('specialization_progress', 'specialization_id', 'specializations', 'fk_specialization_progress_spec'),
    ('user_licenses', 'user_id', 'users', 'fk_user_licenses_user'),
    ('user_licenses', 'specialization_type', 'specializations', 'fk_user_licenses_spec')
  ) as wanted (on_table, on_column, refers_to, name)
  left join pg_attribute as part
    on part.attrelid = to_regclass('public.' || wanted.on_table) and part.attname = wanted.on_column

-- name: columns_without_default()
-- NOT NULL columns that level_sync cannot fill in a row that it creates.
select pg_class.relname::text as on_table, pg_attribute.attname::text as name,
       format_type(pg_attribute.atttypid, pg_attribute.atttypmod) as type
  from pg_attribute
  join pg_class on pg_class.oid = pg_attribute.attrelid
 where pg_class.oid in (to_regclass('public.specialization_progress'), to_regclass('public.user_licenses'))
   and pg_attribute.attnum > 0 and not pg_attribute.attisdropped
   and pg_attribute.attnotnull and not pg_attribute.atthasdef and pg_attribute.attidentity = ''
   and pg_attribute.attgenerated = ''
   and not exists (select from pg_type where pg_type.oid = pg_attribute.atttypid and pg_type.typdefault is not null)
   and pg_attribute.attname not in ('student_id', 'specialization_id', 'current_level', 'total_xp', 'completed_sessions',
                                    'completed_projects', 'last_activity', 'user_id', 'specialization_type',
                                    'max_achieved_level', 'started_at', 'last_advanced_at')
 order by pg_class.relname, pg_attribute.attnum

-- name: triggers()
select pg_class.relname::text as on_table, pg_trigger.tgname::text as name
  from pg_trigger
  join pg_class on pg_class.oid = pg_trigger.tgrelid
  join pg_proc on pg_proc.oid = pg_trigger.tgfoid
 where pg_class.oid in (to_regclass('public.specialization_progress'), to_regclass('public.user_licenses'))
   and not pg_trigger.tgisinternal
   and pg_proc.pronamespace is distinct from to_regnamespace('level_sync')
 order by pg_class.relname, pg_trigger.tgname

-- name: referring_tables()
select distinct pg_constraint.confrelid::regclass::text as on_table, pg_constraint.conrelid::regclass::text as name
  from pg_constraint
 where pg_constraint.contype = 'f'
   and pg_constraint.confrelid in (to_regclass('public.specialization_progress'), to_regclass('public.user_licenses'))

-- name: duplicates(on_table)^
-- Of the two tables only this one is read.
select count(*) as pairs, (array_agg(concat('user ', user_id, ' in ', specialization, ': ', copies, ' rows')))[1 : 5] as examples
  from (
    select student_id as user_id, specialization_id::text as specialization, count(*) as copies
      from public.specialization_progress
     where :on_table = 'specialization_progress'
     group by student_id, specialization_id having count(*) > 1
     union all
    select user_id, specialization_type::text, count(*)
      from public.user_licenses
     where :on_table = 'user_licenses'
     group by user_id, specialization_type having count(*) > 1) as duplicate

-- name: orphans()
select orphan.on_table, orphan.refers_to, count(*) as pairs,
       (array_agg(concat('user ', orphan.user_id, ' in ', orphan.specialization)))[1 : 5] as examples
  from (
    select 'specialization_progress' as on_table, 'users' as refers_to, student_id::text as user_id,
           specialization_id::text as specialization
      from public.specialization_progress as progress
     where student_id is null or not exists (select from public.users where users.id = progress.student_id)
     union all
    select 'specialization_progress', 'specializations', student_id::text, specialization_id::text
      from public.specialization_progress as progress
     where not exists (
       select from public.specializations as known where known.id::text = progress.specialization_id::text)
     union all
    select 'user_licenses', 'users', user_id::text, specialization_type::text
      from public.user_licenses as license
     where user_id is null or not exists (select from public.users where users.id = license.user_id)
     union all
    select 'user_licenses', 'specializations', user_id::text, specialization_type::text
      from public.user_licenses as license
     where not exists (
       select from public.specializations as known where known.id::text = license.specialization_type::text)
  ) as orphan
 group by orphan.on_table, orphan.refers_to
 order by orphan.on_table, orphan.refers_to

-- name: out_of_range_levels()
-- max_levels is read through jsonb, because the column may be missing.
select leveled.on_table, count(*) as pairs,
       (array_agg(concat('user ', leveled.user_id, ' in ', leveled.specialization, ': ', coalesce(leveled.level::text, 'NULL'))))[1 : 5]
         as examples
  from (
    select 'specialization_progress' as on_table, student_id as user_id, specialization_id::text as specialization,
           current_level as level
      from public.specialization_progress
     union all
    select 'user_licenses', user_id, specialization_type::text, current_level from public.user_licenses
  ) as leveled
  left join public.specializations as known on known.id::text = leveled.specialization
 where leveled.level is null or leveled.level < 1
    or leveled.level > (to_jsonb(known) ->> 'max_levels')::integer
 group by leveled.on_table
 order by leveled.on_table

-- name: desyncs()
select issue.issue_type, count(*) as pairs,
       (array_agg(concat('user ', issue.user_id, ' in ', issue.specialization)))[1 : 5] as examples
  from (
    select coalesce(progress.student_id, license.user_id) as user_id,
           coalesce(progress.specialization, license.specialization) as specialization,
           case when license.user_id is null then 'missing_license'
                when progress.student_id is null then 'missing_progress'
                when progress.level is distinct from license.level then 'level_mismatch' end as issue_type
      from (select student_id, specialization_id::text as specialization, max(current_level) as level
              from public.specialization_progress group by student_id, specialization_id) as progress
      full join (select user_id, specialization_type::text as specialization, max(current_level) as level
                   from public.user_licenses group by user_id, specialization_type) as license
        on license.user_id = progress.student_id and license.specialization = progress.specialization
  ) as issue
 where issue.issue_type is not null
 group by issue.issue_type
 order by issue.issue_type

-- name: longest_specialization()$
select coalesce(max(length(id::text)), 0) from public.specializations
