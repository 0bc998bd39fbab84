-- depends: 0009_make_pairs_unique
-- What a transaction does at its commit is armed by one row here, so that writing the pairs themselves fires no trigger.
create unlogged table if not exists level_sync.pending_commits (
  transaction_id xid8 not null default pg_current_xact_id(),
  act            text not null,
  constraint act_is_known check (act in ('carry', 'judge'))
);

comment on table level_sync.pending_commits is 'What open transactions do when they commit. Empty for everybody else.';
comment on column level_sync.pending_commits.transaction_id is 'Transaction that commits.';
comment on column level_sync.pending_commits.act is 'carry: brings its pending pairs into step in one set. judge: judges the rows whose pair it changed.';

-- What the code of this version no longer makes is removed when it is loaded, right after this. Until then a bulk write
-- queues its pairs.
delete from level_sync.installed_triggers as installed
 where installed.trigger_name in ('pending_pairs_committed', 'progress_pair_changed', 'license_pair_changed');
drop trigger if exists pending_pairs_committed on level_sync.pending_pairs;
alter table level_sync.pending_pairs drop column if exists arms_commit;
