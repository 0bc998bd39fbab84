-- The schema that holds everything of level_sync's own.
create schema if not exists level_sync;

revoke all on schema level_sync from public;

comment on schema level_sync is
  'level_sync: keeps specialization_progress.current_level and user_licenses.current_level equal. Read level_sync.desync_issues, sync_events, sync_queue and sync_log; change level_sync.settings.';

-- What migrate changed on tables it did not create, with the statement that puts it back.
create table if not exists level_sync.application_changes (
  change_id  bigint generated always as identity primary key,
  changed_at timestamptz not null default clock_timestamp(),
  kind       text not null,
  on_table   text not null,
  name       text not null,
  undo_sql   text not null,
  constraint kind_is_known check (kind in ('column', 'foreign_key', 'comment'))
);

comment on table level_sync.application_changes is
  'Every change migrate made to application tables that were there before, with the SQL that undoes it. Rollback runs undo_sql from the highest change_id down.';
comment on column level_sync.application_changes.kind is 'column (added), foreign_key (added or replaced) or comment (added).';
comment on column level_sync.application_changes.on_table is 'Table that was changed, with its schema.';
comment on column level_sync.application_changes.name is 'Column or foreign key; of a comment on the table itself, the table.';
comment on column level_sync.application_changes.undo_sql is 'Statement that takes the change back.';
