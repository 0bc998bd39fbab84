-- depends: 0002_create_application_tables
-- A pair on its way: what every function that defers, carries, queues, drains or repairs takes and returns.
do $$
begin
  if to_regtype('level_sync.pair') is null then
    create type level_sync.pair as (
      user_id        bigint,
      specialization text,
      side           text,    -- progress or license: the side that was written, which the other one follows
      change         text,    -- created (never demotes the other side), level_changed or deleted
      actor          text,
      reason         text,
      progress_level bigint,  -- as last seen; NULL where nobody has looked, or the row is missing
      license_level  bigint,
      queue_id       bigint,  -- entry of sync_queue that it comes from
      attempts       integer,
      sqlstate       text,    -- why it could not be carried
      message        text
    );
  end if;
end
$$;

comment on type level_sync.pair is
  'One (user, specialization) on its way from the side that was written to the side that follows, with who wrote it and why, the levels last seen, its entry of sync_queue, and its last error.';

-- What a check has found.
do $$
begin
  if to_regtype('level_sync.check_result') is null then
    create type level_sync.check_result as (name text, ok boolean, detail text, hint text);
  end if;
end
$$;

comment on type level_sync.check_result is
  'One row of level_sync.health: what is checked, whether it is good (NULL: could not be checked), what was found, and what to do.';

-- How level_sync behaves: one row, changed with UPDATE, effective with the next write.
create table if not exists level_sync.settings (
  is_only_row     boolean  primary key default true,
  conflict_policy text     not null default 'progress_wins',
  on_error        text     not null default 'queue',
  on_delete       text     not null default 'restrict',
  lock_wait       interval not null default '5 milliseconds',
  inline_limit    integer  not null default 32,
  trigger_search_path text not null default 'public',
  batch_size      integer  not null default 5000,
  repair_limit    integer  not null default 10000,
  max_attempts    integer  not null default 3,
  retry_backoff   interval not null default '1 minute',
  schedule        text     not null default '0 */6 * * *',
  misfire_grace   interval not null default '300 seconds',
  log_retention   interval not null default '90 days',
  event_retention interval not null default '365 days',
  uses_pg_cron    boolean  not null default true,
  constraint settings_is_one_row check (is_only_row),
  constraint conflict_policy_is_known
    check (conflict_policy in ('progress_wins', 'license_wins', 'highest_wins', 'latest_wins', 'report_only')),
  constraint on_error_is_queue_or_raise check (on_error in ('queue', 'raise')),
  constraint on_delete_is_restrict_propagate_or_recreate check (on_delete in ('restrict', 'propagate', 'recreate')),
  constraint lock_wait_is_between_0_and_500_milliseconds
    check (lock_wait between interval '0' and interval '500 milliseconds'),
  constraint inline_limit_is_between_0_and_40 check (inline_limit between 0 and 40),
  constraint trigger_search_path_is_a_list_of_schemas
    check (trigger_search_path ~ '^\s*("[^"]+"|[a-z_][a-z0-9_$]*)(\s*,\s*("[^"]+"|[a-z_][a-z0-9_$]*))*\s*$'),
  constraint batch_size_is_between_1_and_100000 check (batch_size between 1 and 100000),
  constraint repair_limit_is_not_negative check (repair_limit >= 0),
  constraint max_attempts_is_between_1_and_100 check (max_attempts between 1 and 100),
  constraint retry_backoff_is_between_1_second_and_1_day
    check (retry_backoff between interval '1 second' and interval '1 day'),
  constraint schedule_has_five_fields check (schedule ~ '^\s*\S+(\s+\S+){4}\s*$'),
  constraint misfire_grace_is_not_negative check (misfire_grace >= interval '0'),
  constraint log_retention_is_at_least_1_day check (log_retention >= interval '1 day'),
  constraint event_retention_is_at_least_1_day check (event_retention >= interval '1 day')
);

insert into level_sync.settings default values on conflict do nothing;

comment on table level_sync.settings is 'How level_sync behaves. Exactly one row; an UPDATE takes effect with the next write.';
comment on column level_sync.settings.is_only_row is 'Always true: there is one row.';
comment on column level_sync.settings.conflict_policy is 'Which side the reconcile follows where no one knows which was written last: progress_wins, license_wins, highest_wins, latest_wins (later of last_activity and last_advanced_at) or report_only.';
comment on column level_sync.settings.on_error is 'What a failed sync does to the write that caused it: queue (the write stands, the pair is queued) or raise (the write fails with the error).';
comment on column level_sync.settings.on_delete is 'What happens at commit when one side of a pair was deleted and the other still stands: restrict (the commit is refused), propagate (the other side is deleted), recreate (the deleted side comes back).';
comment on column level_sync.settings.lock_wait is 'How long a write of progress waits for the license row when somebody else holds it, 0 to 500 ms; a write of the license waits a fifth of it for the progress row. 0 never waits for a row. After that the pair is queued.';
comment on column level_sync.settings.inline_limit is 'How many subtransactions a transaction spends on carrying pairs one by one, 0 to 40. Later pairs are carried in one set at commit.';
comment on column level_sync.settings.trigger_search_path is 'Schemas in which the application''s own triggers find their tables when level_sync writes the other side; pg_catalog comes before and pg_temp after them. Nobody untrusted should be able to create objects there.';
comment on column level_sync.settings.batch_size is 'Pairs per transaction in drain_queue and reconcile.';
comment on column level_sync.settings.repair_limit is 'A reconcile that finds more issues than this repairs nothing and asks for approval.';
comment on column level_sync.settings.max_attempts is 'Failed attempts after which a queued pair is dead and waits for a person.';
comment on column level_sync.settings.retry_backoff is 'Wait before the second attempt at a queued pair; doubles with each further one.';
comment on column level_sync.settings.schedule is 'Cron expression of the reconcile, five fields.';
comment on column level_sync.settings.misfire_grace is 'How late a scheduled run may be before it is caught up.';
comment on column level_sync.settings.log_retention is 'Age at which rows of sync_log and dead rows of sync_queue are purged.';
comment on column level_sync.settings.event_retention is 'Age at which rows of sync_events are purged.';
comment on column level_sync.settings.uses_pg_cron is 'Whether pg_cron runs the jobs. false: another scheduler does, and health does not look for them; last_success and queue_draining show whether it does. level-sync schedule sets it to true.';

-- One row per reconcile run.
create table if not exists level_sync.sync_log (
  run_id           bigint generated always as identity primary key,
  status           text        not null default 'running',
  dry_run          boolean     not null default false,
  direction        text,
  started_by       text        not null default 'manual',
  job_start        timestamptz not null default clock_timestamp(),
  job_end          timestamptz,
  duration_seconds numeric generated always as (extract(epoch from job_end - job_start)) stored,
  issues_found     bigint,
  synced_count     bigint,
  failed_count     bigint,
  results          jsonb,
  error            text,
  backend_pid      integer     not null default pg_backend_pid(),
  constraint status_is_known
    check (status in ('running', 'success', 'partial', 'failed', 'skipped', 'aborted', 'needs_approval')),
  constraint started_by_is_known check (started_by in ('cron', 'manual', 'catch_up')),
  constraint only_a_running_run_has_no_end check ((status = 'running') = (job_end is null))
);

comment on table level_sync.sync_log is 'One row per reconcile run.';
comment on column level_sync.sync_log.run_id is 'Grows with each run.';
comment on column level_sync.sync_log.status is 'running; success; partial (some pairs failed and are queued); failed (see error); skipped (another run was at work); aborted (its session died); needs_approval (more issues than settings.repair_limit).';
comment on column level_sync.sync_log.dry_run is 'Whether the run only looked and recorded its plan.';
comment on column level_sync.sync_log.direction is 'Direction asked for; NULL: settings.conflict_policy decides.';
comment on column level_sync.sync_log.started_by is 'cron (the schedule), manual (a person) or catch_up (the maintenance, after a missed slot).';
comment on column level_sync.sync_log.job_start is 'When the run began.';
comment on column level_sync.sync_log.job_end is 'When it ended; NULL while it runs.';
comment on column level_sync.sync_log.duration_seconds is 'From job_start to job_end, in seconds, however the run ended.';
comment on column level_sync.sync_log.issues_found is 'Desyncs found, or pairs of the plan that was applied.';
comment on column level_sync.sync_log.synced_count is 'Pairs repaired; of a run at work, and of one whose session ended before it did, those of the batches it has committed.';
comment on column level_sync.sync_log.failed_count is 'Pairs that could not be repaired; they are queued with their errors.';
comment on column level_sync.sync_log.results is 'Counts by issue type, action and outcome, and a sample of at most 20 pairs; of a run at work, how many pairs it has repaired, by action. The repairs themselves are in sync_events by run_id.';
comment on column level_sync.sync_log.error is 'Why a run failed, was skipped or aborted.';
comment on column level_sync.sync_log.backend_pid is 'Process id of the session that ran it, as in pg_stat_activity.';

-- With a run each minute the log has a hundred thousand rows, and every scrape counts them by status.
create index if not exists sync_log_status on level_sync.sync_log (status);

-- One row per level carried over, row created or deleted. No CHECKs: only functions of level_sync write here, and each
-- CHECK is parsed again by every statement that carries a level.
create table if not exists level_sync.sync_events (
  event_id       bigint generated always as identity,
  occurred_at    timestamptz not null,
  user_id        bigint      not null,
  specialization text        not null,
  direction      text        not null,
  action         text        not null,
  old_level      bigint,
  new_level      bigint,
  source         text        not null,
  run_id         bigint,
  session_role   text        not null default session_user,
  actor          text        default left(nullif(current_setting('level_sync.actor', true), ''), 200),
  reason         text        default left(nullif(current_setting('level_sync.reason', true), ''), 1000),
  transaction_id xid8        not null default pg_current_xact_id(),
  primary key (user_id, event_id)
);

create index if not exists sync_events_occurred_at on level_sync.sync_events using brin (occurred_at);

comment on table level_sync.sync_events is 'What level_sync wrote: one row per level carried over, row created or row deleted. Append-only.';
comment on column level_sync.sync_events.event_id is 'Grows with each event; order within one transaction.';
comment on column level_sync.sync_events.occurred_at is 'When the other side was written (clock time, not transaction start).';
comment on column level_sync.sync_events.user_id is 'users.id of the pair.';
comment on column level_sync.sync_events.specialization is 'specializations.id of the pair.';
comment on column level_sync.sync_events.direction is 'The side that was written by the application, then the side that followed.';
comment on column level_sync.sync_events.action is 'What happened to the side that followed: created, updated or deleted.';
comment on column level_sync.sync_events.old_level is 'Level of the side that followed before; NULL where the row was created.';
comment on column level_sync.sync_events.new_level is 'Level of the side that followed now; NULL where the row was deleted.';
comment on column level_sync.sync_events.source is 'Who carried it: trigger (a write, or the retry of one), reconcile, manual (a person called a function) or undo.';
comment on column level_sync.sync_events.run_id is 'sync_log.run_id of the reconcile or undo that did it; otherwise NULL.';
comment on column level_sync.sync_events.session_role is 'Role that logged in to the session that wrote (session_user).';
comment on column level_sync.sync_events.actor is 'The application''s own name for who did it: what it set as level_sync.actor, first 200 characters.';
comment on column level_sync.sync_events.reason is 'Why: what was set as level_sync.reason, first 1,000 characters.';
comment on column level_sync.sync_events.transaction_id is 'Transaction that wrote (pg_current_xact_id).';

-- Pairs, never values: a later drain recomputes the levels from the live rows.
create table if not exists level_sync.sync_queue (
  queue_id        bigint generated always as identity,
  queued_at       timestamptz not null default clock_timestamp(),
  user_id         bigint      not null,
  specialization  text        not null,
  side            text        not null,
  change          text        not null,
  sqlstate        text        not null,
  message         text        not null,
  attempts        integer     not null default 0,
  next_attempt_at timestamptz not null default clock_timestamp(),
  dead_at         timestamptz,
  actor           text        default left(nullif(current_setting('level_sync.actor', true), ''), 200),
  reason          text        default left(nullif(current_setting('level_sync.reason', true), ''), 1000),
  primary key (user_id, queue_id),
  constraint side_is_known check (side in ('progress', 'license')),
  constraint change_is_known check (change in ('created', 'level_changed', 'deleted')),
  constraint attempts_is_not_negative check (attempts >= 0)
);

create index if not exists sync_queue_due on level_sync.sync_queue (next_attempt_at) where dead_at is null;

comment on table level_sync.sync_queue is 'Pairs whose sync could not be done. drain_queue recomputes them from the live rows. Append-only for writers.';
comment on column level_sync.sync_queue.queue_id is 'Identifies the entry.';
comment on column level_sync.sync_queue.queued_at is 'When the pair was left to wait: the newest entry of a pair tells which side was written last.';
comment on column level_sync.sync_queue.user_id is 'users.id of the pair.';
comment on column level_sync.sync_queue.specialization is 'specializations.id of the pair.';
comment on column level_sync.sync_queue.side is 'The side the application wrote: progress or license.';
comment on column level_sync.sync_queue.change is 'What the application did there: created (never demotes the other side), level_changed or deleted.';
comment on column level_sync.sync_queue.sqlstate is 'SQLSTATE of the last failure.';
comment on column level_sync.sync_queue.message is 'Message of the last failure.';
comment on column level_sync.sync_queue.attempts is 'Drains that tried and failed.';
comment on column level_sync.sync_queue.next_attempt_at is 'Not tried again before.';
comment on column level_sync.sync_queue.dead_at is 'When max_attempts was reached; a dead pair waits for a person.';
comment on column level_sync.sync_queue.actor is 'Who wrote, as in sync_events: its event names them too.';
comment on column level_sync.sync_queue.reason is 'Why, as in sync_events.';

-- Pairs a transaction carries at its commit. Only rows of open transactions stand here, so a crash loses nothing.
create unlogged table if not exists level_sync.pending_pairs (
  pending_id     bigint      generated always as identity (cache 1000),
  transaction_id xid8        not null default pg_current_xact_id(),
  queued_at      timestamptz not null default clock_timestamp(),
  user_id        bigint      not null,
  specialization text        not null,
  side           text        not null,
  change         text        not null,
  actor          text        default left(nullif(current_setting('level_sync.actor', true), ''), 200),
  reason         text        default left(nullif(current_setting('level_sync.reason', true), ''), 1000)
);

comment on table level_sync.pending_pairs is 'Pairs that open transactions carry in one set when they commit. Empty for everybody else.';
comment on column level_sync.pending_pairs.pending_id is 'Order in which the transaction wrote.';
comment on column level_sync.pending_pairs.transaction_id is 'Transaction that wrote.';
comment on column level_sync.pending_pairs.queued_at is 'When it wrote.';
comment on column level_sync.pending_pairs.user_id is 'users.id of the pair.';
comment on column level_sync.pending_pairs.specialization is 'specializations.id of the pair.';
comment on column level_sync.pending_pairs.side is 'The side that was written: progress or license.';
comment on column level_sync.pending_pairs.change is 'created, level_changed or deleted; departed (the row was deleted, so the set does not make it anew); moved_from and moved_to (the key of the row was changed).';
comment on column level_sync.pending_pairs.actor is 'Who wrote, as in sync_events.';
comment on column level_sync.pending_pairs.reason is 'Why, as in sync_events.';

-- What a transaction does at its commit is armed by one row here, so that writing the pairs themselves fires no trigger.
create unlogged table if not exists level_sync.pending_commits (
  transaction_id xid8 not null default pg_current_xact_id(),
  act            text not null,
  constraint act_is_known check (act in ('carry', 'check_moves'))
);

comment on table level_sync.pending_commits is 'What open transactions do when they commit. Empty for everybody else.';
comment on column level_sync.pending_commits.transaction_id is 'Transaction that commits.';
comment on column level_sync.pending_commits.act is 'carry: brings its pending pairs into step in one set. check_moves: checks the rows whose key it changed.';

-- Old rows that migrate may not keep in place and does not delete: orphans and duplicates.
create table if not exists level_sync.quarantined_rows (
  quarantine_id  bigint generated always as identity primary key,
  quarantined_at timestamptz not null default clock_timestamp(),
  on_table       text        not null,
  why            text        not null,
  user_id        bigint,
  specialization text,
  whole_row      text        not null,
  constraint on_table_is_known check (on_table in ('specialization_progress', 'user_licenses')),
  constraint why_is_known check (why in ('orphan', 'duplicate'))
);

comment on table level_sync.quarantined_rows is 'Rows that migrate moved aside, whole: orphans and duplicates. level-sync restore brings them back, and so does a rollback.';
comment on column level_sync.quarantined_rows.quarantine_id is 'Identifies the row.';
comment on column level_sync.quarantined_rows.quarantined_at is 'When it was moved.';
comment on column level_sync.quarantined_rows.on_table is 'Table of schema public it came from.';
comment on column level_sync.quarantined_rows.why is 'orphan (no user or no specialization) or duplicate (another row of the pair was kept).';
comment on column level_sync.quarantined_rows.user_id is 'users.id of the pair.';
comment on column level_sync.quarantined_rows.specialization is 'specializations.id of the pair.';
comment on column level_sync.quarantined_rows.whole_row is 'The row as PostgreSQL writes a composite value of its table.';

-- What loading sql/ compares with, so that loading it again leaves a trigger alone that is as it should be.
create table if not exists level_sync.installed_triggers (
  relation     regclass not null,
  trigger_name name     not null,
  statement    text     not null,
  definition   text     not null,
  primary key (relation, trigger_name)
);

comment on table level_sync.installed_triggers is
  'The triggers level_sync made, as asked for (statement) and as PostgreSQL shows them (definition).';

-- What a reconcile found and means to do, pair by pair; kept for dry runs and for runs that wait for approval.
create table if not exists level_sync.sync_plan (
  run_id         bigint  not null,
  user_id        bigint  not null,
  specialization text    not null,
  issue_type     text    not null,
  progress_level bigint,
  license_level  bigint,
  action         text    not null,
  outcome        text    not null default 'planned',
  primary key (run_id, user_id, specialization),
  constraint issue_type_is_known check (issue_type in ('level_mismatch', 'missing_license', 'missing_progress')),
  constraint action_is_known
    check (action in ('create_license', 'create_progress', 'update_license', 'update_progress', 'report_only')),
  constraint outcome_is_known check (outcome in ('planned', 'repaired', 'changed', 'busy', 'queued', 'failed'))
);

comment on table level_sync.sync_plan is 'What a reconcile found, pair by pair, with the levels it saw and what it means to do. Kept for dry runs and for runs that wait for approval.';
comment on column level_sync.sync_plan.run_id is 'sync_log.run_id of the run that found it.';
comment on column level_sync.sync_plan.user_id is 'users.id of the pair.';
comment on column level_sync.sync_plan.specialization is 'specializations.id of the pair.';
comment on column level_sync.sync_plan.issue_type is 'level_mismatch, missing_license or missing_progress.';
comment on column level_sync.sync_plan.progress_level is 'Level the run saw in specialization_progress.';
comment on column level_sync.sync_plan.license_level is 'Level the run saw in user_licenses.';
comment on column level_sync.sync_plan.action is 'create_license, create_progress, update_license, update_progress or report_only.';
comment on column level_sync.sync_plan.outcome is 'planned; repaired (only those among the first 20 of the plan are kept, until the run ends: the repairs themselves are in sync_events); changed (the levels differ from those seen: skipped); busy (somebody was writing the pair: skipped); queued (left to its entry in sync_queue, which knows the side written last); failed (queued with its error).';

create table if not exists level_sync.installed_functions (
  signature text primary key,
  hash      text not null
);

comment on table level_sync.installed_functions is 'The functions level_sync loaded, with a hash of each, so that health sees one that was replaced.';
comment on column level_sync.installed_functions.signature is 'Function with its argument types.';
comment on column level_sync.installed_functions.hash is 'Hash of body, rights, volatility and settings.';
