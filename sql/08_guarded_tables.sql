-- settings keeps its one row, and what is written to sync_events stays as it was written.

create or replace function level_sync.refuse_statement()
  returns trigger language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  raise restrict_violation using
    message = format('%s of level_sync.%s is refused', lower(tg_op), tg_table_name),
    hint    = tg_argv[0];
end
$$;
comment on function level_sync.refuse_statement() is 'Raises restrict_violation with the hint given as argument.';

select level_sync._ensure_trigger('level_sync.settings', 'settings_row_removed', $trigger$
  create trigger settings_row_removed
    before delete or truncate on level_sync.settings
    for each statement execute function level_sync.refuse_statement('There is always exactly one row: change it with UPDATE.')
$trigger$, 'settings has exactly one row.');

select level_sync._ensure_trigger('level_sync.sync_events', 'sync_events_rewritten', $trigger$
  create trigger sync_events_rewritten
    before update or truncate on level_sync.sync_events
    for each statement execute function level_sync.refuse_statement('sync_events is append-only; old rows leave with their retention.')
$trigger$, 'sync_events is append-only.');
