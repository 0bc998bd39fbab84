-- Orphans and duplicates of the time before level_sync are quarantined whole, never deleted, and can come back.

create or replace function level_sync._orphans_and_duplicates(on_table text, why text)
  returns table (relation oid, place tid, user_id bigint, specialization text) language sql stable
  set search_path = pg_catalog, pg_temp
as $$
  select progress.tableoid, progress.ctid, progress.student_id::bigint, progress.specialization_id::text
    from public.specialization_progress as progress
   where (on_table, why) = ('specialization_progress', 'orphan')
     and (not exists (select from public.users where users.id = progress.student_id)
          or not exists (select from public.specializations as known where known.id = progress.specialization_id))
   union all
  select license.tableoid, license.ctid, license.user_id::bigint, license.specialization_type::text
    from public.user_licenses as license
   where (on_table, why) = ('user_licenses', 'orphan')
     and (not exists (select from public.users where users.id = license.user_id)
          or not exists (select from public.specializations as known where known.id = license.specialization_type))
   union all
  -- Of a pair's rows the one with the highest level stays, among equals the latest.
  select ranked.tableoid, ranked.ctid, ranked.student_id::bigint, ranked.specialization_id::text
    from (
      select progress.tableoid, progress.ctid, progress.student_id, progress.specialization_id,
             row_number() over (partition by progress.student_id, progress.specialization_id
                                order by progress.current_level desc nulls last, progress.last_activity desc nulls last,
                                         progress.total_xp desc nulls last, progress.tableoid, progress.ctid desc) as rank
        from public.specialization_progress as progress
       where (on_table, why) = ('specialization_progress', 'duplicate')
    ) as ranked
   where ranked.rank > 1
   union all
  select ranked.tableoid, ranked.ctid, ranked.user_id::bigint, ranked.specialization_type::text
    from (
      select license.tableoid, license.ctid, license.user_id, license.specialization_type,
             row_number() over (partition by license.user_id, license.specialization_type
                                order by license.current_level desc nulls last, license.last_advanced_at desc nulls last,
                                         license.started_at desc nulls last, license.tableoid, license.ctid desc) as rank
        from public.user_licenses as license
       where (on_table, why) = ('user_licenses', 'duplicate')
    ) as ranked
   where ranked.rank > 1
$$;
comment on function level_sync._orphans_and_duplicates(text, text) is 'Where the orphans or duplicates of a table are, with the pair each belongs to.';

create or replace function level_sync._raise_orphans_and_duplicates(on_table text, why text)
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  stray record;
begin
  select count(*) as count, (array_agg(format('user %s in %s', coalesce(found.user_id::text, 'NULL'), coalesce(found.specialization, 'NULL'))))[1:5] as examples
    into stray
    from level_sync._orphans_and_duplicates(on_table, why) as found;
  if stray.count > 0 then
    raise exception using
      errcode = case why when 'orphan' then '23503' else '23505' end,
      message = format(case why when 'orphan' then '%s row(s) of %s have no user or no specialization: %s'
                                else '%s row(s) of %s are duplicates: %s' end,
                       stray.count, on_table, array_to_string(stray.examples, '; ')),
      hint    = case why when 'orphan' then 'Add what is missing, or level-sync migrate --quarantine-orphans moves the rows aside; nothing is lost.'
                         else 'level-sync migrate --merge-duplicates keeps the highest level, then the latest, and moves the others aside; nothing is lost.' end;
  end if;
end
$$;
comment on function level_sync._raise_orphans_and_duplicates(text, text) is 'Raises foreign_key_violation or unique_violation with a count and examples where a table has orphans or duplicates.';

create or replace function level_sync._quarantine_rows(on_table text, why text)
  returns bigint language plpgsql
  set search_path = pg_catalog, pg_temp set datestyle = 'ISO' set intervalstyle = 'postgres'
  set extra_float_digits = 1
as $$
declare
  parent     constant regclass := format('public.%I', on_table)::regclass;
  reference  record;
  referring  bigint;
  moved      bigint;
begin
  -- A foreign key from elsewhere may cascade, and then this would delete rows of others.
  for reference in
    select constraint_.conrelid::regclass as child, constraint_.conname as name,
           (select string_agg(format('child.%I = parent.%I', child_part.attname, parent_part.attname), ' and ')
              from unnest(constraint_.conkey, constraint_.confkey) as key (child_number, parent_number)
              join pg_attribute as child_part
                on child_part.attrelid = constraint_.conrelid and child_part.attnum = key.child_number
              join pg_attribute as parent_part
                on parent_part.attrelid = constraint_.confrelid and parent_part.attnum = key.parent_number) as condition
      from pg_constraint as constraint_
     where constraint_.contype = 'f' and constraint_.confrelid = parent
  loop
    execute format(
      'select count(*) from level_sync._orphans_and_duplicates($1, $2) as stray
         join %s as parent on parent.tableoid = stray.relation and parent.ctid = stray.place
         join %s as child on %s', parent, reference.child, reference.condition)
      into referring using on_table, why;
    if referring > 0 then
      raise foreign_key_violation using
        message = format('%s row(s) of %s refer to %ss of %s (%s)', referring, reference.child, why, on_table, reference.name),
        hint    = 'Point them to the row that stays, or delete them yourself: level_sync does not touch other tables.';
    end if;
  end loop;

  execute format(
    'with stray as materialized (
       select * from level_sync._orphans_and_duplicates($1, $2)
     ), moved as (
       delete from %1$s as parent
        using stray
        where (select level_sync._enter_trigger_context())
          and parent.tableoid = stray.relation and parent.ctid = stray.place
       returning stray.user_id, stray.specialization, parent::%1$s::text as whole_row
     )
     insert into level_sync.quarantined_rows (on_table, why, user_id, specialization, whole_row)
     select $1, $2, moved.user_id, moved.specialization, moved.whole_row
       from moved', parent)
    using on_table, why;
  get diagnostics moved = row_count;
  return moved;
end
$$;
comment on function level_sync._quarantine_rows(text, text) is 'Moves the orphans or duplicates of a table, whole, to quarantined_rows and returns how many. Raises foreign_key_violation where other tables refer to them.';

create or replace function level_sync._restore_rows(out restored bigint, out quarantined bigint, out reason text)
  language plpgsql set search_path = pg_catalog, pg_temp set datestyle = 'ISO' set intervalstyle = 'postgres'
as $$
declare
  stray   record;
  columns text;
begin
  restored    := 0;
  quarantined := 0;
  for stray in
    select * from level_sync.quarantined_rows order by quarantine_id for update
  loop
    select string_agg(quote_ident(part.attname), ', ' order by part.attnum)
      into columns
      from pg_attribute as part
     where part.attrelid = format('public.%I', stray.on_table)::regclass
       and part.attnum > 0 and not part.attisdropped and part.attgenerated = '';
    begin
      execute format('insert into public.%1$I (%2$s) overriding system value select %2$s from (select ($1::public.%1$I).*) as stray
                      where (select level_sync._enter_trigger_context())',
                     stray.on_table, columns)
        using stray.whole_row;
      perform level_sync._leave_trigger_context();
      delete from level_sync.quarantined_rows where quarantined_rows.quarantine_id = stray.quarantine_id;
      restored := restored + 1;
    exception when others then
      quarantined := quarantined + 1;
      reason := coalesce(reason, format('user %s in %s: %s', stray.user_id, stray.specialization, sqlerrm));
    end;
  end loop;
end
$$;
comment on function level_sync._restore_rows() is 'Puts quarantined rows back where nothing forbids it any more; tells how many came back, how many could not, and why the first could not.';

-- A rollback drops the table they are kept in.
create or replace function level_sync._restore_rows_or_stop()
  returns void language plpgsql set search_path = pg_catalog, pg_temp
as $$
declare
  outcome record;
begin
  select * into outcome from level_sync._restore_rows();
  if outcome.quarantined > 0 then
    raise object_not_in_prerequisite_state using
      message = format('%s row(s) of level_sync.quarantined_rows cannot come back: %s', outcome.quarantined, outcome.reason),
      hint    = 'They would be lost. Remove what forbids them, or copy them elsewhere and delete them there; then roll back again.';
  end if;
end
$$;
comment on function level_sync._restore_rows_or_stop() is 'Puts every quarantined row back, or raises object_not_in_prerequisite_state: what a rollback does before it drops them.';
