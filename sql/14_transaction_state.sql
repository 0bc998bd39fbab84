-- What a transaction remembers of its own syncing, and how many subtransactions it may still use.
--
-- Transaction-local settings; none is needed for correctness:
--   level_sync.own_depth        trigger depth at which our own statement runs: its echo needs no second look
--   level_sync.subtransactions  one dot for each subtransaction used; past 64 every other session slows down
--   level_sync.pending          'on' once the transaction carries a set at its commit, 'abandoned' where it cannot
--   level_sync.moves            'on' once the transaction checks moved rows at its commit
--   level_sync.limits           max_levels of the specializations that bulk has looked up: \x01, id, \x02, 10 digits, ...
--   level_sync.outer_nestloop   enable_nestloop as the session has it, for the triggers that run within our statements

-- Of the 64 subtransactions that do not slow down others, the last 8 are kept for the commit.
create or replace function level_sync._write_budget()
  returns integer language sql immutable
as $$
  select 56
$$;
comment on function level_sync._write_budget() is 'Subtransactions that the writes of a transaction may use.';

create or replace function level_sync._commit_budget()
  returns integer language sql immutable
as $$
  select 62
$$;
comment on function level_sync._commit_budget() is 'Subtransactions that a transaction may have used when its commit has carried its pairs and is about to queue the rest.';

create or replace function level_sync._count_subtransaction()
  returns integer language sql set search_path = pg_catalog, pg_temp
as $$
  select length(set_config('level_sync.subtransactions',
                           coalesce(current_setting('level_sync.subtransactions', true), '') || '.', true))
$$;
comment on function level_sync._count_subtransaction() is 'Counts one more subtransaction of this transaction and returns how many that makes.';

create or replace function level_sync._used_subtransactions()
  returns integer language sql stable
as $$
  select coalesce(length(current_setting('level_sync.subtransactions', true)), 0)
$$;
comment on function level_sync._used_subtransactions() is 'How many subtransactions this transaction has used.';

-- Two who wrote the two sides of one pair wait for each other in vain. The one who wrote the license gives way early,
-- so that the other is carried, and one pair is queued instead of two.
create or replace function level_sync._lock_timeout(lock_wait interval, side text)
  returns text language sql immutable
as $$
  select greatest(1, extract(epoch from lock_wait) * case side when 'progress' then 1000 else 200 end)::integer::text
$$;
comment on function level_sync._lock_timeout(interval, text) is 'How long a carry waits for the other side''s row, in milliseconds, by the side that was written.';

-- A text, because PL/pgSQL gives it whichever type the column has that it is for, without asking TimeZone or DateStyle.
create or replace function level_sync._as_utc(moment timestamptz)
  returns text language sql stable
as $$
  select to_char(moment at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00')
$$;
comment on function level_sync._as_utc(timestamptz) is 'A moment written so that a timestamptz takes it as it is, and a timestamp without time zone as UTC.';

-- Our statements also run the application's own triggers and the checks of foreign keys. Called within such a statement,
-- when its own names are resolved and before anything is written, these give them what they are used to. The SET clauses
-- of the function around the statement take it back, or _leave_trigger_context where more statements follow.
create or replace function level_sync._enter_trigger_context()
  returns boolean language plpgsql
as $$
begin
  perform pg_catalog.set_config('search_path', level_sync._trigger_path(), true);
  return true;
end
$$;
comment on function level_sync._enter_trigger_context() is 'Sets the search_path for the triggers that run within a statement of ours. Always true.';

create or replace function level_sync._enter_trigger_context_of_set()
  returns boolean language plpgsql
as $$
begin
  perform pg_catalog.set_config('plan_cache_mode', 'auto', true),
          pg_catalog.set_config('enable_nestloop', pg_catalog.current_setting('level_sync.outer_nestloop'), true);
  return level_sync._enter_trigger_context();
end
$$;
comment on function level_sync._enter_trigger_context_of_set() is 'The same where the statement writes a set and is planned in its own way. Always true.';

create or replace function level_sync._leave_trigger_context()
  returns void language plpgsql
as $$
begin
  perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
end
$$;
comment on function level_sync._leave_trigger_context() is 'Pins the search_path again after a statement that has entered the trigger context.';

create or replace function level_sync._trigger_path()
  returns text language sql stable set search_path = pg_catalog, pg_temp
as $$
  select settings.trigger_search_path || ', pg_temp' from level_sync.settings
$$;
comment on function level_sync._trigger_path() is 'The search_path with which the application''s own triggers run when level_sync writes their table.';
