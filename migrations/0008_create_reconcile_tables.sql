-- depends: 0007_comment_application_tables
-- What a reconcile found and means to do, pair by pair; kept for dry runs and for runs that wait for approval.
create table if not exists level_sync.sync_plan (
  run_id         bigint  not null,
  user_id        bigint  not null,
  specialization text    not null,
  issue_type     text    not null,
  progress_level integer,
  license_level  integer,
  action         text    not null,
  outcome        text    not null default 'planned',
  primary key (run_id, user_id, specialization),
  constraint issue_type_is_known check (issue_type in ('level_mismatch', 'missing_license', 'missing_progress')),
  constraint action_is_known
    check (action in ('create_license', 'create_progress', 'update_license', 'update_progress', 'report_only')),
  constraint outcome_is_known check (outcome in ('planned', 'repaired', 'changed', 'held', 'queued', 'failed'))
);

comment on table level_sync.sync_plan is 'What a reconcile found, pair by pair, with the levels it saw and what it means to do. Kept for dry runs and for runs that wait for approval.';
comment on column level_sync.sync_plan.run_id is 'sync_log.run_id of the run that found it.';
comment on column level_sync.sync_plan.user_id is 'users.id of the pair.';
comment on column level_sync.sync_plan.specialization is 'specializations.id of the pair.';
comment on column level_sync.sync_plan.issue_type is 'level_mismatch, missing_license or missing_progress.';
comment on column level_sync.sync_plan.progress_level is 'Level the run saw in specialization_progress.';
comment on column level_sync.sync_plan.license_level is 'Level the run saw in user_licenses.';
comment on column level_sync.sync_plan.action is 'create_license, create_progress, update_license, update_progress or report_only.';
comment on column level_sync.sync_plan.outcome is 'planned; repaired; changed (levels differ from those seen, left alone); held (somebody was writing the pair); queued (left to its entry in sync_queue, which knows the side written last); failed (queued with its error).';

create table if not exists level_sync.installed_functions (
  signature text primary key,
  hash      text not null
);

comment on table level_sync.installed_functions is 'The functions level_sync loaded, with a hash of each, so that health sees one that was replaced.';
comment on column level_sync.installed_functions.signature is 'Function with its argument types.';
comment on column level_sync.installed_functions.hash is 'Hash of body, rights, volatility and settings.';
