-- depends: 0004_add_foreign_keys
-- Checks the rows that were there before; reads without blocking writers. An orphan stops it with the orphan named.
do $$
declare
  unchecked record;
begin
  for unchecked in
    select present.conrelid::pg_catalog.regclass as relation, present.conname
      from pg_catalog.pg_constraint as present
     where present.conname in ('fk_specialization_progress_user', 'fk_specialization_progress_spec',
                               'fk_user_licenses_user', 'fk_user_licenses_spec')
       and present.conrelid in ('public.specialization_progress'::pg_catalog.regclass,
                                'public.user_licenses'::pg_catalog.regclass)
       and not present.convalidated
  loop
    execute format('alter table %s validate constraint %I', unchecked.relation, unchecked.conname);
  end loop;
end
$$;
