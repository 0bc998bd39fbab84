-- depends: 0013_find_runs_by_status
-- What a run repairs it takes out of its plan, so a plan is written once and needs no room for its outcomes.
alter table level_sync.sync_plan reset (fillfactor);
comment on column level_sync.sync_plan.outcome is 'planned; repaired (of these only those among the first 20 of the plan stay until the run ends: the others stand in sync_events); changed (levels differ from those seen, left alone); held (somebody was writing the pair); queued (left to its entry in sync_queue, which knows the side written last); failed (queued with its error).';
comment on column level_sync.sync_log.synced_count is 'Pairs repaired; of a run at work, and of one whose session ended before it did, those of the batches it has committed.';
comment on column level_sync.sync_log.results is 'Counts by issue type, action and outcome, and a sample of at most 20 pairs; of a run at work, how many pairs it repaired and took out of its plan, by action. The repairs themselves stand in sync_events by run_id.';
