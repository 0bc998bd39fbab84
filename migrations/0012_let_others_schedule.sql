-- depends: 0011_leave_room_in_plans
alter table level_sync.settings add column if not exists uses_pg_cron boolean not null default true;

comment on column level_sync.settings.uses_pg_cron is 'Whether pg_cron runs the jobs. false: another scheduler does, and health does not look for them; last_success and queue_draining show whether it does. level-sync schedule sets it to true.';
