-- The SQL of the demo, in the order it is shown. The text before each statement is what the audience reads.

-- name: create_database()!
create database academy;

-- name: seed_random()$
-- So that each demo has the same academy.
select setseed(0.5);

-- name: add_students(first_id, last_id)!
insert into public.users (id, name)
select student.id, concat('Student ', student.id, ', year ', 2020 + mod(student.id, 6))
  from generate_series(:first_id::bigint, :last_id::bigint) as student (id);

-- name: enrol_students(first_id, last_id)!
-- Everybody trains one to three specializations; the level is the highest one that XP and sessions reach.
insert into public.specialization_progress
       (student_id, specialization_id, current_level, total_xp, completed_sessions, last_activity)
select enrolled.student_id, enrolled.specialization_id,
       greatest(1, (select max(rung.level)
                      from public.specialization_levels as rung
                     where rung.specialization_id = enrolled.specialization_id
                       and rung.required_xp <= enrolled.xp
                       and rung.required_sessions <= enrolled.sessions)),
       enrolled.xp, enrolled.sessions, clock_timestamp()
  from (
    select student.id as student_id, specialization.id as specialization_id,
           (40000 * power(random(), 3))::bigint as xp, (120 * random())::integer as sessions
      from public.users as student
      join (values ('PLAYER', 1), ('COACH', 2), ('INTERNSHIP', 3)) as specialization (id, every)
        on mod(student.id, specialization.every) = 0
     where student.id between :first_id and :last_id
  ) as enrolled;

-- name: refresh_statistics()!
analyze public.specialization_progress, public.user_licenses;

-- name: academy()
select progress.specialization_id as specialization, count(*) as students,
       max(progress.current_level) as highest_level, count(license.user_id) as licenses,
       count(*) filter (where license.current_level is distinct from progress.current_level) as differ
  from public.specialization_progress as progress
  left join public.user_licenses as license
    on license.user_id = progress.student_id and license.specialization_type = progress.specialization_id
 group by progress.specialization_id
 order by progress.specialization_id;

-- name: enrol_lin()!
insert into public.users (id, name) values (20001, 'Lin');

-- name: lin_trains()
select level_sync.update_progress(20001, 'PLAYER', xp_gained => 2600, sessions_completed => 15) as answer;

-- name: lin_both_sides()
select progress.current_level as progress_level, license.current_level as license_level,
       progress.total_xp, license.max_achieved_level
  from public.specialization_progress as progress
  full join public.user_licenses as license
    on license.user_id = progress.student_id and license.specialization_type = progress.specialization_id
 where coalesce(progress.student_id, license.user_id) = 20001;

-- name: admin_advances_lin()
select level_sync.advance_license(20001, 'PLAYER', 5, 'head.coach', 'passed the exam') as answer;

-- name: admin_writes_the_table()!
update public.user_licenses
   set current_level = 6
 where user_id = 20001 and specialization_type = 'PLAYER';

-- name: lin_history()
select direction, action, old_level, new_level, session_role, actor, reason
  from level_sync.sync_events
 where user_id = 20001
 order by event_id;

-- name: promote_a_year()!
update public.specialization_progress as progress
   set current_level = progress.current_level + 1
  from public.users as student, public.specializations as specialization
 where student.id = progress.student_id
   and right(student.name, 4) = '2024'
   and specialization.id = progress.specialization_id
   and progress.current_level < specialization.max_levels;

-- name: promote_lin_too_far()!
update public.specialization_progress
   set current_level = 9
 where student_id = 20001 and specialization_id = 'PLAYER';

-- name: break_the_license_side()!
alter table public.user_licenses
  add constraint license_printer_is_out_of_order check (user_id <> 20001) not valid;

-- name: lin_levels_up_meanwhile()!
update public.specialization_progress
   set current_level = 7
 where student_id = 20001 and specialization_id = 'PLAYER';

-- name: queue()
select user_id, specialization, side, change, sqlstate, message
  from level_sync.sync_queue;

-- name: repair_the_license_side()!
alter table public.user_licenses
  drop constraint license_printer_is_out_of_order;

-- name: drain()!
call level_sync.drain_queue();

-- name: may_bypass()$
select rolsuper from pg_roles where rolname = current_user;

-- name: bypass()!
set session_replication_role = replica;
update public.user_licenses set current_level = 2 where user_id = 20001;
delete from public.user_licenses where user_id = 12;
set session_replication_role = origin;

-- name: desyncs()
select user_id, specialization, issue_type, progress_level, license_level, recommended_action
  from level_sync.desync_issues;

-- name: reconcile()!
call level_sync.reconcile();

-- name: last_run()
select run_id, status, started_by, issues_found, synced_count, failed_count, results -> 'actions' as actions
  from level_sync.sync_log
 order by run_id desc
 limit 1;

-- name: has_cron()$
select to_regclass('cron.job') is not null;

-- name: create_cron()!
create extension if not exists pg_cron;

-- name: schedule_every_minute()
select level_sync.schedule('* * * * *') as answer;

-- name: cron_jobs()
select jobname, schedule, command, active from cron.job order by jobname;

-- name: cron_has_run()$
select exists (
  select from level_sync.sync_log where started_by = 'cron' and status = 'success' and issues_found > 0);

-- name: bypass_again()!
set session_replication_role = replica;
update public.user_licenses set current_level = 1 where user_id = 20001;
set session_replication_role = origin;

-- name: schedule_as_usual()
select level_sync.schedule('0 */6 * * *') as answer;
