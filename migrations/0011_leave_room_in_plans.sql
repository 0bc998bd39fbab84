-- depends: 0010_arm_commits_apart
-- A plan is written once and its outcome once: with room for that in the same page, no index is written again.
alter table level_sync.sync_plan set (fillfactor = 50);
